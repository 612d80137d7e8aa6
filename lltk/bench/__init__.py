"""Measurements: what was generated, how fast, and how sure that is."""
