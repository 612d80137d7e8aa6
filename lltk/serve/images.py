"""Images that clients send, for first frames."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections import OrderedDict
from io import BytesIO

from torch import Tensor

from lltk.serve.messages import ImageReference
from lltk.serve.settings import Limits
from lltk.stream.image import decode_image

_FORMATS = ("PNG", "JPEG", "WEBP")


class Images:
    """Images at the video's size, in memory, by ids that the server made.

    Args:
        limits: of the server.
        size: height and width of the video.
    """

    def __init__(self, limits: Limits, size: tuple[int, int]) -> None:
        self._limits = limits
        self._size = size
        self._kept: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    def decode(self, data: bytes) -> Tensor:
        """An image that a client sent: float32 [1, 3, H, W] in [-1, 1].

        Raises:
            ValueError: it is none, or too large.
        """
        if len(data) > self._limits.image_bytes:
            raise ValueError(
                f"image: of {len(data)} bytes; send at most {self._limits.image_bytes}"
            )
        height, width = self._size
        return decode_image(
            BytesIO(data), "image", height, width, _FORMATS, self._limits.image_pixels
        )[0]

    def keep(self, owner: str, image: Tensor) -> str:
        """Keep an image for its owner; returns its id. The oldest makes room."""
        name = f"file-{secrets.token_hex(16)}"
        self._kept[owner, name] = image
        while len(self._kept) > self._limits.images:
            self._kept.popitem(last=False)
        return name

    def find(self, owner: str, reference: ImageReference) -> Tensor:
        """The image of a reference.

        Raises:
            ValueError: there is none, or it is no image.
        """
        if reference.file_id is not None:
            image = self._kept.get((owner, reference.file_id))
            if image is None:
                raise ValueError(
                    f"image: {reference.file_id} is not kept; send it by POST /v1/files again"
                )
            return image
        head, _, body = (reference.image_url or "").partition(",")
        if not head.endswith(";base64"):
            raise ValueError("image: write its URL as data:image/png;base64,…")
        try:
            return self.decode(base64.b64decode(body, validate=True))
        except binascii.Error as error:
            raise ValueError(f"image: its base64 cannot be read ({error})") from error
