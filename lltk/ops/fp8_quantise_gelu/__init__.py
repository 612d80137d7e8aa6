"""GELU and quantisation to FP8 at once."""
