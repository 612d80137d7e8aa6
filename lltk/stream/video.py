"""Video files, written as frames arrive, and a contact sheet of shots."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, cast

import torch
from torch import Tensor

from lltk.files.outputs import marked
from lltk.files.writing import claimed, explained, prepared, sync, sync_folder, whole_file
from lltk.parallel.transfer import download
from lltk.stream.forms import FORMS, Form, form_of

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.filter import Graph
    from av.video.reformatter import VideoReformatter
    from typing_extensions import Buffer

KEYFRAME_EVERY = 12
"""Frames a fragment of a file: what a kill can lose."""
BT709, LIMITED = 1, 1
"""FFmpeg's numbers for the matrix, primaries and transfer of BT.709, and for luma of 16 to 235."""
TILE, LABEL = 192, 18
"""Pixels: a contact sheet's widest tile, and the height of a caption."""
_VIDEO_MARK, _SHEET_MARK = "made by lltk stream", "lltk contact sheet"
VIDEO, CONTACT_SHEET = marked("a video", _VIDEO_MARK), marked("a contact sheet", _SHEET_MARK)


class _Disk(FileIO):
    """A file whose writes are whole or raise (FFmpeg's own lose a failure while closing)."""

    def write(self, data: Buffer, /) -> int:
        left = memoryview(data)
        while left:
            left = left[super().write(left) :]
        return memoryview(data).nbytes


def pixels(video: Tensor) -> Tensor:
    """What a `VideoWriter` takes of a decoded video.

    Args:
        video: [1, 3, F, H, W] in [-1, 1].

    Returns:
        uint8 [F, H, W, 3] on the CPU.
    """
    (clip,) = video
    return download(levels(clip).permute(1, 2, 3, 0))


def levels(video: Tensor) -> Tensor:
    """Values in [-1, 1] as the nearest of a pixel's 256 levels, uint8."""
    return (video.float() * 127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def signal(video: Tensor) -> Tensor:
    """Levels of colour, uint8, as float32 in [-1, 1]; what is no uint8 is given back as it is."""
    return video.float() / 127.5 - 1 if video.dtype == torch.uint8 else video


def check_sides(height: int, width: int) -> None:
    """Raise ValueError where a side, in pixels, is odd or too small for 4:2:0."""
    for name, size in (("height", height), ("width", width)):
        if size < 2 or size % 2:
            below = max(size // 2 * 2, 2)
            raise ValueError(
                f"video: {name} of {size} pixels: 4:2:0 needs an even number; "
                f"the nearest that fit: {below} and {below + 2}"
            )


def check_frames(frames: Tensor, shape: tuple[int, int, int], where: str, least: int = 0) -> None:
    """Raise ValueError where frames are not uint8 [F, *shape], or fewer than so many."""
    fits = frames.dtype == torch.uint8 and tuple(frames.shape[1:]) == shape
    if not fits or len(frames) < least:
        raise ValueError(
            f"{where}: frames are {frames.dtype} {list(frames.shape)}; uint8 "
            f"[F, {', '.join(map(str, shape))}] is required"
        )


def threaded(options: Mapping[str, str], threads: int) -> dict[str, str]:
    """An encoder's options, with its number of threads in place of ``%d``."""
    return {name: value.replace("%d", str(threads)) for name, value in options.items()}


def tag_colours(stream: VideoStream) -> None:
    """Say in a stream that its colours are those of `in_yuv`."""
    stream.colorspace = stream.color_primaries = stream.color_trc = BT709
    stream.color_range = LIMITED


def in_yuv(reformatter: VideoReformatter, frame: VideoFrame) -> VideoFrame:
    """A frame's pixels in 4:2:0, by BT.709."""
    from av.video.reformatter import ColorRange, Colorspace

    return reformatter.reformat(
        frame,
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
    )


class VideoWriter:
    """A video file in the form that its suffix names; see `lltk.stream.forms`.

    It plays whatever became of its writer, unless it is a WebP, which is written as it is closed.
    An MP4 is a row of fragments of 12 frames, each on disk once the next begins or the writer is
    closed; so a killed process or a full disk loses a fragment, not the video. Colours are BT.709
    in 4:2:0, and tagged so; each frame of a GIF has a palette of its own. As a context manager it
    is closed on the way out, after an error too. What was at the path is replaced once the first
    fragment is whole; missing folders are made, and a link is followed.

    Args:
        path: the file, with one of the suffixes of `lltk.stream.forms.FORMS`.
        height, width: pixels, even.
        fps: frames a second.
        threads: of the encoder; fewer than the models leave free.
        about: what the file says of itself, as its description.
        form: None for the one that the suffix names.

    Raises:
        ValueError: odd sides, no frame rate, or a suffix of no form.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        height: int,
        width: int,
        fps: float,
        threads: int = 1,
        about: str = "",
        form: Form | None = None,
    ) -> None:
        form = form or form_of(path)
        if form is None:
            raise ValueError(f"{path}: names no form of video; add one of {', '.join(FORMS)}")
        check_sides(height, width)
        if not 1 <= fps <= form.fastest:
            raise ValueError(
                f"video: {fps:g} frames a second: {path.name} takes from 1 to {form.fastest}"
            )
        import av

        self._form = form
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._palette = _palette_graph(height, width) if form.pixels == "pal8" else None
        self._path = path
        with explained(path):
            self._place = prepared(path)
            if self._place.exists() and not self._place.is_file():
                raise OSError(21, "it is no file")
            self._now, descriptor = claimed(self._place)
            """Where the file is now."""
        self._shape = (height, width, 3)
        self._rate = Fraction(fps).limit_denominator(1001)
        self._frames = 0
        self._packets = 0
        self._kept = self._kept_bytes = 0
        """What plays where the file is cut off: whole fragments, which the next keyframe ends."""
        self._open: ExitStack | None = ExitStack()
        options = {"flush_packets": "1", **form.container_options}
        with self._writing() as stack:
            self._disk = stack.enter_context(_Disk(descriptor, "wb"))
            self._file = stack.enter_context(
                av.open(self._disk, "w", format=form.container, options=options)
            )
            self._file.metadata["comment"] = _VIDEO_MARK
            if about:
                self._file.metadata["description"] = about
            options = threaded(form.options, threads)
            made = self._file.add_stream(form.encoder, self._rate, options=options)
            self._stream = cast("VideoStream", made)
            self._stream.height, self._stream.width = height, width
            self._stream.pix_fmt = form.pixels
            self._stream.gop_size = KEYFRAME_EVERY
            self._stream.thread_count = threads
            if self._palette is None:
                tag_colours(self._stream)
            self._file.start_encoding()

    @property
    def frames(self) -> int:
        """Frames written so far."""
        return self._frames

    def write(self, frames: Tensor) -> None:
        """Append frames.

        Args:
            frames: uint8 [F, H, W, 3], RGB, on the CPU.

        Raises:
            ValueError: another shape or dtype.
            OSError: the file cannot be written further; the message says how much of it plays.
                The writer is closed.
        """
        check_frames(frames, self._shape, f"video: {self._path}")
        import av

        with self._writing():
            for pixels in frames.numpy():
                frame = self._encodable(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
                frame.pts, frame.time_base = self._frames, 1 / self._rate
                self._encode(frame)
                self._frames += 1

    def close(self) -> None:
        """Finish the file; errors as `write`'s. Closing again does nothing."""
        if self._open is None:
            return
        with self._writing() as stack:
            self._encode(None)
            self._file.close()
            if self._form.comment is not None and self._frames:
                self._form.comment(self._disk, _VIDEO_MARK.encode())
            stack.close()
            self._show()
            sync(self._place)
            sync_folder(self._place.parent)
        self._open = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _encodable(self, frame: VideoFrame) -> VideoFrame:
        """The frame in the encoder's pixels."""
        if self._palette is not None:
            self._palette.push(frame)
            return cast("VideoFrame", self._palette.pull())
        return in_yuv(self._reformatter, frame)

    def _encode(self, frame: VideoFrame | None) -> None:
        """Encode and write a frame, or what the encoder still holds."""
        for packet in self._stream.encode(frame):
            self._file.mux(packet)
            if packet.is_keyframe or self._form.any_cut:
                self._kept, self._kept_bytes = self._packets, self._disk.tell()
                if self._kept:
                    self._show()
            self._packets += 1

    def _show(self) -> None:
        """Let the file take its place, if it has not yet.

        Raises:
            OSError: another process has replaced it since.
        """
        if self._now != self._place:
            sync(self._now)
            os.replace(self._now, self._place)
            self._now, self._own = self._place, os.stat(self._place)
        elif not self._is_own():
            raise OSError(5, "another process has replaced it")

    def _is_own(self) -> bool:
        """Whether the file that is where this one should be is this one."""
        return self._now != self._place or os.path.samestat(self._own, os.stat(self._place))

    @contextmanager
    def _writing(self) -> Iterator[ExitStack]:
        """What is open. A failure to write closes it, leaves whole fragments, and says so.

        Players refuse a file that ends inside a fragment's header.
        """
        assert self._open is not None, "the writer is closed"
        try:
            yield self._open
        except OSError as error:
            import av

            with suppress(OSError, av.error.FFmpegError):
                self._open.close()
            self._open = None
            with suppress(OSError):
                if not self._kept:
                    os.unlink(self._now)
                elif self._is_own():
                    os.truncate(self._now, self._kept_bytes)
                    self._show()
            seconds = float(self._kept / self._rate)
            kept = f"the first {self._kept} frames ({seconds:.1f} s) are there and play"
            raise OSError(
                f"video: {self._path}: cannot be written ({error.strerror}); "
                f"{kept if self._kept else 'nothing was kept'}; name a path with room to write"
            ) from error


def _palette_graph(height: int, width: int) -> Graph:
    """Gives each frame a palette of its own."""
    import av

    graph = av.filter.Graph()
    given = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 1000)
    )
    both = graph.add("split")
    palette = graph.add("palettegen", "stats_mode=single")
    use = graph.add("paletteuse", "new=1")
    given.link_to(both)
    both.link_to(palette, 0, 0)
    both.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(graph.add("buffersink"))
    graph.configure()
    return graph


def write_video(path: Path, video: Tensor, fps: float) -> None:
    """Write a whole video, [3, F, H, W] in [-1, 1], at once; errors as `VideoWriter`'s."""
    frames = pixels(video[None])
    _, height, width, _ = frames.shape
    with VideoWriter(path, height, width, fps) as writer:
        writer.write(frames)


def read_video(path: Path) -> Tensor:
    """All frames of a video, as far as they can be decoded: uint8 [F, H, W, 3], RGB.

    A file that was cut off ends at its last whole frame.

    Raises:
        ValueError: no frame can be decoded.
        OSError: the file cannot be read.
    """
    import av

    frames: list[Tensor] = []
    with suppress(av.error.InvalidDataError, av.error.EOFError), av.open(path) as file:
        for stream in file.streams.video[:1]:
            for frame in file.decode(stream):
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
    if not frames:
        raise ValueError(f"{path}: holds no frame that can be decoded")
    return torch.stack(frames)


def contact_sheet(path: Path, shots: Sequence[tuple[str, Tensor]], columns: int = 6) -> None:
    """Write a PNG with a row a shot: its caption above evenly spaced frames of it.

    Args:
        path: the file; replaced whole.
        shots: caption and frames, uint8 [F, H, W, 3] on the CPU, of every shot.
        columns: frames a row, the first and the last among them.
    """
    from PIL import Image, ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo

    _, height, width, _ = shots[0][1].shape
    scale = min(TILE / width, 1)
    tile = (round(width * scale), round(height * scale))
    row = LABEL + tile[1]
    sheet = Image.new("RGB", (columns * tile[0], len(shots) * row), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LABEL - 6)
    for i, (caption, frames) in enumerate(shots):
        label = text = f"{i + 1}. {caption}"
        while font.getlength(label) > sheet.width - 6 and text:
            text = text[:-1]
            label = f"{text}…"
        draw.text((3, i * row + 2), label, "black", font)
        for j, k in enumerate(torch.linspace(0, len(frames) - 1, columns).round().int().tolist()):
            picture = Image.fromarray(frames[k].numpy()).resize(tile)
            sheet.paste(picture, (j * tile[0], i * row + LABEL))
    made = PngInfo()
    made.add_text("Software", _SHEET_MARK)
    with whole_file(path) as file:
        sheet.save(cast(IO[bytes], file), format="PNG", pnginfo=made)
