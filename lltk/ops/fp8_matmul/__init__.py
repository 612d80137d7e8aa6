"""Products of FP8 operands."""
