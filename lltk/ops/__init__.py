"""The `lltk::` ops, one folder each: reference, op and kernels."""
