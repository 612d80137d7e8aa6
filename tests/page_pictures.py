"""Take the pictures of the page in docs/: python tests/page_pictures.py"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from browsing import chromium, tiny_plan
from PIL import Image
from playwright.sync_api import Page, expect
from serving import serving, time_enough

FOLDER = Path(__file__).parents[1] / "docs"
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
SHOTS = (
    ("a blue square circling on a dark background", "Enter"),
    ("a red star circling on a light background", "Enter"),
    ("a green circle moving left on a striped background", "Control+Enter"),
)
"""What is typed, and the key that sends it."""
PAUSES = (2500, 2600, 400)
"""Milliseconds after each of them."""


def direct(page: Page) -> None:
    """Direct a short video."""
    for (prompt, key), pause in zip(SHOTS, PAUSES, strict=True):
        page.fill("#prompt", prompt)
        page.press("#prompt", key)
        page.wait_for_timeout(pause)
    page.evaluate("document.activeElement.blur()")


def take(page: Page, path: Path) -> None:
    """Write what is seen, in a palette, which makes it small."""
    picture = Image.open(BytesIO(page.screenshot()))
    picture.convert("RGB").quantize(256).save(path, optimize=True)


def main() -> None:
    """Take each size in each colour scheme."""
    with (
        TemporaryDirectory() as folder,
        time_enough(),
        serving(tiny_plan(), Path(folder)) as server,
        chromium() as browser,
    ):
        for name, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(server.url)
            page.fill("#seed", "5")
            direct(page)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                take(page, FOLDER / f"live-{name}-{scheme}.png")
            page.click("#stop")
            expect(page.locator("#status")).to_have_text("Over")
            page.close()


if __name__ == "__main__":
    main()
