"""Colour reconstruction of faded paintings after a well-kept reference."""

__version__ = "0.1.0"
