"""The tiny family: a procedural world and what is trained on it."""
