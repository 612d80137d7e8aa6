"""Keeping a page in NVFP4 decoded to E4M3 beside it."""
