"""Pages in NVFP4, decoded to E4M3 beside a chunk's own keys or values."""
