"""A gated residual added, and the sum normed and quantised to FP8 at once."""
