"""Convolutions of FP8 operands."""
