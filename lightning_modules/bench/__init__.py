"""Ratios against the obvious alternative, interleaved: one module a bench."""
