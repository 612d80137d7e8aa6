"""Writing a page of the cache in NVFP4."""
