"""Products of NVFP4 operands."""
