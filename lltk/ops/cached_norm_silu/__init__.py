"""A causal convolution's input: norm and SiLU behind the frames of the calls before."""
