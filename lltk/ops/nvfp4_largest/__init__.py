"""The magnitudes that NVFP4's decode scales follow from."""
