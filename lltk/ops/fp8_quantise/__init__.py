"""Rows quantised to FP8."""
