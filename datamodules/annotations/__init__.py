"""Readers of the field's annotation files: each returns plain dataclasses, row by row."""
