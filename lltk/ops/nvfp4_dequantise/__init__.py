"""NVFP4 to a tensor."""
