"""Attention in FP8."""
