"""A causal convolution's input in FP8."""
