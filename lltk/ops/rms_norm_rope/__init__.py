"""RMS norm over all heads, then rotary positions, at once."""
