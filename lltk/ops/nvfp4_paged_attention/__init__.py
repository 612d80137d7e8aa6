"""Attention over committed pages in NVFP4 and the chunk in flight."""
