"""lltk: compile a video diffusion transformer by graph passes; train and stream it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lltk.streaming.to_video import stream_video as stream_video

__version__ = "0.1.0"

_own = Path(__file__).resolve().parent  # resolved, as an editable installation holds links
if not (_own / "passes").is_dir():
    # In a checkout, passes, models and recipes stand beside lltk, not inside it.
    __path__[:] = [str(_own), str(_own.parent)]


def __getattr__(name: str) -> Any:
    """Names that are imported as they are first used, so that importing lltk is light."""
    if name == "stream_video":
        from lltk.streaming.to_video import stream_video

        return stream_video
    raise AttributeError(f"module 'lltk' has no attribute {name!r}")
