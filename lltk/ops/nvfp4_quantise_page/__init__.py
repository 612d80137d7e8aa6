"""A page in NVFP4."""
