"""Attention's result in FP8, centred again, and quantisation to FP8 at once."""
