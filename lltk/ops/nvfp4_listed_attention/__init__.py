"""Attention of a chunk over its own keys and the pages in NVFP4 that a mask lists."""
