"""The pages: each number that was measured has its record beside it, and links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "models/tiny/README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
RECORD = re.compile(r"benchmarks/records/(\w+)\.md")
UNIT = r"%|ms|s|seconds|minutes|FPS|frames a second|times|TFLOPS?|[KMG]i?B|dB"
NUMBER = re.compile(rf"\d+(?:\.\d+)? (?:{UNIT})(?!\w)|\| *\d+\.\d+ *(?=[|(])")
"""A number with a unit, or a table's cell that begins with a decimal number."""
SETTINGS = (
    "95 % interval",
    "16 frames a second",
    "18 seconds of video",
    "26 MB",
    "at most 5 s",
    "last 15 %",
    "shot of 60 s",
    "shots of 4.5 s",
    "shots of 60 s",
    "shows 3.75 s",
    "the 60 s of a shot",
)
"""What was chosen and not measured."""
EXAMPLES = ("passes/wide_output.py", "lltk/ops/paged_attention/fast.py")
"""Files that a reader writes."""


def blocks(text: str) -> Iterator[str]:
    """A page's paragraphs and lists without code. A table belongs to the paragraph before it."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    yield from re.split(r"\n\n+(?!\|)", text)


def unrecorded(text: str) -> list[str]:
    """The measured numbers of blocks that name no record."""
    found = []
    for block in blocks(text):
        said = " ".join(block.split())
        for setting in SETTINGS:
            said = said.replace(setting, "")
        if not RECORD.search(said):
            found += NUMBER.findall(said)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_measured_number_has_a_record(page: Path) -> None:
    assert not unrecorded(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^):#]+)\)", text):
        assert (page.parent / link).exists(), link
    folders = "|".join(sorted(each.name for each in ROOT.iterdir() if each.is_dir()))
    for path in re.findall(rf"`((?:{folders})/[\w./]+)`", text):
        assert (ROOT / path).exists() or path in EXAMPLES, path


def test_a_number_without_a_record_is_seen() -> None:
    record = "([record](../benchmarks/records/dit.md))"
    assert unrecorded("It takes 12.5 ms.") == ["12.5 ms"]
    assert not unrecorded(f"It takes\n12.5 ms {record}.")
    assert unrecorded(f"It takes 12.5 ms.\n\nThat is less {record}.") == ["12.5 ms"]
    table = "\n\n| a | b |\n|---|---|\n| x | 12.5 |"
    assert unrecorded(f"Times:{table}") and not unrecorded(f"Times {record}:{table}")
    assert not unrecorded("```\nlltk bench # 12 s\n```\n\n    lltk bench # 12 s")


def test_every_record_is_named_by_a_page() -> None:
    held = {path.stem for path in (ROOT / "benchmarks" / "records").glob("*.json")}
    assert held == {name for page in PAGES for name in RECORD.findall(page.read_text())}


def test_the_readmes_example_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lltk.stream.video import read_video

    (example,) = re.findall(r"```python\n(import lltk\n.*?)```", PAGES[0].read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 5
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    video = read_video(tmp_path / "video.mp4")
    assert video.shape[1:] == (128, 128, 3) and len(video) > 2 * 2 * 16 - 12
