"""A linear over a weight in FP8 that does not train."""
