"""Rotary tables from frame positions."""
