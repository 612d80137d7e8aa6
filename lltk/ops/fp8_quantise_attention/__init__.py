"""Attention over pages in NVFP4 and quantisation to FP8 at once."""
