"""lltk: compile a video diffusion transformer by graph passes; train, stream and export it."""

__version__ = "0.1.0"
