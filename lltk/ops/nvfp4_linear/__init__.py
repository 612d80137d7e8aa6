"""A linear layer that trains in NVFP4."""
