"""Attention over committed pages and the chunk in flight."""
