"""Residual, norm, activation and quantisation of each row, at once."""
