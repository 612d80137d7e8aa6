"""The transpose of a weight in NVFP4."""
