"""Layer norm, modulation and quantisation to FP8 at once."""
