"""Attention and rotary-position kernels of EVA02-AT; imports nothing else of this project."""
