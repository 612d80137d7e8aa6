"""Attention over pages that a mask lists, and the chunk in flight."""
