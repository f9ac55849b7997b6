"""Use of trained models: read any checkpoint, convert, embed videos, search them."""
