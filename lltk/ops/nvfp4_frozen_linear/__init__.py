"""A linear over a weight in NVFP4 that does not train."""
