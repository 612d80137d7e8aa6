"""Decoding all pages of an arena in NVFP4."""
