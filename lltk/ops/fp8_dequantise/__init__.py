"""Rows in FP8, read back."""
