"""A residual scaled by a gate and added."""
