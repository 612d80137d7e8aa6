"""A tensor to NVFP4."""
