"""lltk: compile a video diffusion transformer by graph passes; train, stream and export it."""

from pathlib import Path

__version__ = "0.1.0"

_own = Path(__file__).resolve().parent  # resolved, as an editable installation holds links
if not (_own / "passes").is_dir():
    # In a checkout, passes, models and recipes stand beside lltk, not inside it.
    __path__[:] = [str(_own), str(_own.parent)]
