"""Layer norm, modulation and quantisation at once."""
