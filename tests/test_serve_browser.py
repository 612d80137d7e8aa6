"""The page in a real browser: what it shows is what was asked for, from the frame it names."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("playwright", reason="playwright is not installed; install lltk[dev]")
from browsing import CHROMIUM, NEEDED, chromium, cut_connections, tiny_plan
from fastapi import WebSocketDisconnect
from playwright.sync_api import Browser, Page, Request, TimeoutError, expect
from pydantic import BaseModel
from serving import Server, serving, time_enough

from lltk.bench.scorer import agreement, read
from lltk.models.tiny.world import draw_story, render
from lltk.serve.messages import FromClient, InteractionQueued, SessionInteraction
from lltk.serve.realtime import Connection
from lltk.serve.sessions import Entry
from lltk.stream.chunks import Receipt
from lltk.stream.fragments import CODECS, FragmentWriter
from lltk.stream.video import levels, read_video
from lltk.streaming import Stream, StreamPlan

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(CHROMIUM is None, reason=NEEDED)]

TOKEN = "a-token_of.letters"
RED = "a red circle moving left on a dark background"
GREEN = "a green square moving up on a light background"
BLUE = "a blue star moving right on a dark background"
CANVAS = """
window.canvas = {};
addEventListener("DOMContentLoaded", () => {
    const video = document.getElementById("video");
    const context = Object.assign(document.createElement("canvas"), { width: 128, height: 128 })
        .getContext("2d", { willReadFrequently: true });
    const draw = (now, { mediaTime }) => {
        context.drawImage(video, 0, 0, 128, 128);
        const { data } = context.getImageData(0, 0, 128, 128);
        window.canvas[Math.round(mediaTime * 16)] = data;
        video.requestVideoFrameCallback(draw);
    };
    video.requestVideoFrameCallback(draw);
});
"""
"""Draws each frame that is seen on a canvas, and keeps its pixels by the frame's number."""
PIXELS = """(numbers) => numbers.map((number) => btoa(String.fromCharCode(
    ...window.canvas[number].filter((_, place) => place % 4 < 3))))"""
MOST = 8
"""Frames that are looked at of many: reading one takes time."""
PLAY = """async ([mime, data]) => {
    const { Player } = await import("./player.js");
    const video = document.getElementById("video");
    const shown = (frame) => (document.getElementById("number").textContent = frame);
    const player = new Player(video, shown);
    if (Player.refusal(mime)) throw new Error(Player.refusal(mime));
    player.open(mime, { fps: 16, first_frame: 0 });
    for (const each of data) player.append(Uint8Array.from(atob(each), (c) => c.charCodeAt(0)));
    player.end();
    await video.play();
}"""


@pytest.fixture(scope="module")
def plan() -> StreamPlan:
    return tiny_plan()


@pytest.fixture(scope="module")
def server(plan: StreamPlan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    with time_enough(), serving(plan, folder, [TOKEN], sessions=2, expires=20.0) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture
def opened(browser: Browser, server: Server) -> Iterator[Callable[..., Page]]:
    """Opens a tab with a token. The page asks no other host for anything, and nothing is wrong."""
    wrong: list[str] = []
    pages: list[Page] = []

    def asked(request: Request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:")):
            wrong.append(f"asked for {request.url}")

    def open_page(token: str = TOKEN, seed: int = 2, url: str = "") -> Page:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(60_000)
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", asked)
        page.add_init_script(CANVAS)
        page.goto(f"{url or server.url}/#token={token}")
        page.fill("#seed", str(seed))
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        if page.get_attribute("#status", "data-phase") in ("live", "paused"):
            page.click("#stop")
            expect(page.locator("#status")).to_have_text("Over")
        page.close()
    # The browser itself tells of connections that break.
    assert not [each for each in wrong if "WebSocket connection" not in each]


def typed(page: Page, prompt: str, key: str = "Enter") -> None:
    """Write a prompt and press a key, as a user without a mouse does."""
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    page.keyboard.type(prompt)
    page.keyboard.press(key)


def until(page: Page, frame: int) -> None:
    """Wait until a frame is seen."""
    for _ in range(800):
        number = page.inner_text("#number")
        if number.isdecimal() and int(number) >= frame:
            return
        page.wait_for_timeout(25)
    pytest.fail(f"frame {frame} did not come; the page: {page.inner_text('body')}")


def first_frame(page: Page, prompt: str) -> int:
    """The frame from which a prompt is seen, as its receipt says once it is."""
    shot = page.locator("#shots li", has_text=prompt)
    expect(shot).to_have_attribute("data-state", "visible", timeout=20_000)
    found = re.search(r"seen from frame (\d+)", shot.inner_text())
    assert found
    return int(found[1])


def numbers(page: Page, first: int, stop: int) -> list[int]:
    """Which of these frames the canvas showed."""
    every = page.evaluate("Object.keys(window.canvas).map(Number)")
    return sorted(number for number in every if first <= number < stop)


def canvas(page: Page, first: int, stop: int, most: int = MOST) -> dict[int, Tensor]:
    """What the canvas showed of frames, by their numbers: float [3, 128, 128] in [-1, 1].

    Of more than so many the first, the last and some between.
    """
    every = numbers(page, first, stop)
    if len(every) > most:
        every = [every[k * (len(every) - 1) // (most - 1)] for k in range(most)]
    frames = {}
    for number, data in zip(every, page.evaluate(PIXELS, every), strict=True):
        pixels = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.uint8)
        frames[number] = pixels.view(128, 128, 3).permute(2, 0, 1) / 127.5 - 1
    return frames


def shows(frames: dict[int, Tensor], caption: str) -> bool:
    """Whether the scorer reads a caption's shape, colour and background from frames."""
    assert len(frames) >= 4, f"the browser showed frames {sorted(frames)} alone"
    found = agreement(read(torch.stack([frames[k] for k in sorted(frames)])), caption)
    return found.shape and found.colour and found.background


def colours(frames: dict[int, Tensor]) -> set[str | None]:
    """The shape's colour in each frame alone."""
    return {read(frame[None]).colour.value for frame in frames.values()}


def reconnect(page: Page) -> None:
    """Let a page that is offline reach its server again, at once."""
    page.context.set_offline(False)
    with suppress(TimeoutError):  # it may have tried by itself in this moment
        page.click("#retry", timeout=500)


def session(page: Page) -> str:
    return str(page.evaluate("JSON.parse(sessionStorage.getItem('lltk')).session.id"))


def test_a_switch_and_a_cut_are_seen_from_the_frame_that_their_receipts_name(
    opened: Callable[..., Page],
) -> None:
    page = opened()
    assert TOKEN not in page.url, "nobody reads it over the user's shoulder"
    typed(page, RED)
    until(page, 8)
    typed(page, GREEN)
    switched = first_frame(page, GREEN)
    until(page, switched + 14)
    typed(page, BLUE, "Shift+Enter")
    cut = first_frame(page, BLUE)
    until(page, cut + 16)
    # The frame that a receipt names still has some of the old colour in it, as a blend.
    before, named = canvas(page, 0, switched), canvas(page, switched, switched + 1)
    after, later = canvas(page, switched + 1, cut), canvas(page, cut + 1, cut + 17)
    assert (colours(before), colours(after), colours(later)) == ({"red"}, {"green"}, {"blue"})
    assert "red" not in colours(named) and "green" not in colours(canvas(page, cut, cut + 1))
    assert shows(before, RED) and shows(after, GREEN) and shows(later, BLUE)
    assert not shows(before, GREEN), "the scorer tells captions apart"


def test_a_reload_goes_on(opened: Callable[..., Page]) -> None:
    page = opened()
    typed(page, RED)
    until(page, 16)
    begun, before = session(page), canvas(page, 0, 1000, most=99)
    page.reload()
    until(page, max(before) + 12)
    after = canvas(page, 0, 1000, most=99)
    assert session(page) == begun
    assert max(before) - 24 < min(after) <= max(before) + 3, "it goes on where it was"
    both = before.keys() & after.keys()
    assert all(bool((before[k] - after[k]).abs().max() < 0.1) for k in both), "by the same frames"
    expect(page.locator("#shots li")).to_have_attribute("data-state", "visible")


def test_a_lost_connection_goes_on(opened: Callable[..., Page], server: Server) -> None:
    page = opened()
    typed(page, RED)
    until(page, 20)
    begun = session(page)
    page.context.set_offline(True)
    cut_connections(server)
    expect(page.locator("#status")).to_have_text("Connection lost")
    expect(page.locator("#problem")).to_contain_text("The connection is lost. Trying again in")
    typed(page, BLUE, "Control+Enter")
    page.wait_for_timeout(700)
    expect(page.locator("#shots li").last).to_have_attribute("data-state", "written")
    reconnect(page)
    expect(page.locator("#status")).to_have_text("Live")
    expect(page.locator("#alert")).to_be_hidden()
    expect(page.locator("#shots li").last).to_have_attribute("data-state", "queued")
    until(page, 45)
    assert session(page) == begun
    assert page.evaluate("document.getElementById('video').buffered.length") == 1, "no gap"
    shown = numbers(page, 20, 45)
    assert max(b - a for a, b in pairwise(shown)) < 6


def test_what_is_lost_with_a_connection_is_sent_again(
    opened: Callable[..., Page], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the event is lost, and once its receipt: it is applied, and once."""
    came: list[str] = []
    applied: list[str] = []
    act, send, switch = Connection._act, Connection._send, Stream.switch

    async def acting(self: Connection, entry: Entry, message: FromClient) -> None:
        if isinstance(message, SessionInteraction):
            came.append(message.interaction.event_id)
            if len(came) == 1:
                cut_connections(server)
                return
        await act(self, entry, message)

    async def sending(self: Connection, message: BaseModel, data: bytes | None = None) -> None:
        if isinstance(message, InteractionQueued) and len(came) == 2:
            cut_connections(server)
            raise WebSocketDisconnect
        await send(self, message, data)

    def switching(self: Stream, prompt: str, recache: bool | None = None) -> Receipt:
        applied.append(prompt)
        return switch(self, prompt, recache)

    monkeypatch.setattr(Connection, "_act", acting)
    monkeypatch.setattr(Connection, "_send", sending)
    monkeypatch.setattr(Stream, "switch", switching)
    page = opened()
    typed(page, RED)
    until(page, 5)
    typed(page, GREEN)
    switched = first_frame(page, GREEN)
    assert came == came[:1] * 3 and applied == [GREEN]
    until(page, switched + 14)
    assert colours(canvas(page, switched + 1, switched + 14)) == {"green"}


def test_a_restarted_server_goes_on(
    opened: Callable[..., Page], plan: StreamPlan, tmp_path: Path
) -> None:
    """The page joins the session that was kept, and its video, by itself, in another codec."""
    with serving(plan, tmp_path, [TOKEN]) as server:
        page = opened(url=server.url)
        typed(page, RED)
        until(page, 12)
        begun = session(page)
        page.context.set_offline(True)
        cut_connections(server)  # for whose end the server would wait
    expect(page.locator("#problem")).to_contain_text("Trying again")
    port = int(server.url.rpartition(":")[2])
    serve = plan.section.serve.model_copy(update={"codec": "vp9"})
    other = replace(plan, section=plan.section.model_copy(update={"serve": serve}))
    with serving(other, tmp_path, [TOKEN], port=port):
        reconnect(page)
        expect(page.locator("#status")).to_have_text("Live")
        until(page, 36)
        assert session(page) == begun
        assert page.evaluate("document.getElementById('video').buffered.length") == 1, "no gap"
        assert colours(canvas(page, 0, 36)) == {"red"}
        page.click("#stop")
        expect(page.locator("#status")).to_have_text("Over")


def test_two_tabs_see_their_own_videos_and_a_third_waits(opened: Callable[..., Page]) -> None:
    first, second, third = opened(seed=2), opened(seed=3), opened()
    typed(first, RED)
    typed(second, BLUE)
    until(first, 5)
    until(second, 5)
    typed(third, GREEN)
    expect(third.locator("#status")).to_have_text("Waiting for room")
    expect(third.locator("#veil")).to_contain_text("Place 1 of 1")
    until(first, 20)
    until(second, 20)
    for page, caption in ((first, RED), (second, BLUE)):
        assert shows(canvas(page, 4, 20), caption)
        assert colours(canvas(page, 0, 20)) == {caption.split()[1]}
    assert session(first) != session(second)
    first.click("#stop")
    until(third, 20)  # a busy machine shows some of them alone
    assert shows(canvas(third, 0, 20), GREEN)


def test_a_bad_token_is_told_so(opened: Callable[..., Page]) -> None:
    page = opened(token="wrong")
    typed(page, RED)
    expect(page.get_by_role("alert")).to_contain_text("token: is missing or wrong")
    expect(page.locator("#shots li")).to_have_attribute("data-state", "written")
    page.get_by_label("Token").fill("no (such) thing")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The token is wrong.")
    page.get_by_label("Token").fill(TOKEN)
    page.keyboard.press("Enter")
    until(page, 3)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_an_image_becomes_the_first_frame(opened: Callable[..., Page], tmp_path: Path) -> None:
    story = draw_story(torch.Generator().manual_seed(5), 9, 1, 3)
    first = render([story])[0, 0]
    Image.fromarray(levels(first).permute(1, 2, 0).numpy()).save(tmp_path / "first.png")
    (tmp_path / "none.png").write_bytes(b"no image")
    page = opened()
    page.set_input_files("#image", tmp_path / "none.png")
    expect(page.get_by_role("alert")).to_contain_text("none.png is no image")
    page.set_input_files("#image", tmp_path / "first.png")
    expect(page.get_by_role("img", name="The chosen first frame")).to_be_visible()
    typed(page, story.captions[0])
    until(page, 4)
    shown = canvas(page, 0, 9)
    frame = shown[min(shown)]
    alike, flipped = (float((each - first).abs().mean()) for each in (frame, frame.flip(1)))
    assert alike < flipped / 2


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_plays(opened: Callable[..., Page], codec: str) -> None:
    """In the page's player, from the second write on."""
    story = draw_story(torch.Generator().manual_seed(5), 21, 1, 3)
    frames = levels(render([story])[0])
    given: list[bytes] = []
    with FragmentWriter(given.append, 128, 128, 16, codec) as writer:
        for chunk in frames.permute(0, 2, 3, 1).split((9, 12)):
            writer.write(chunk)
    mime = f'video/mp4; codecs="{writer.codec_string}"'
    data = [base64.b64encode(each).decode() for each in (given[0], b"".join(given[10:]))]
    page = opened()
    page.evaluate(PLAY, [mime, data])
    until(page, 20)
    shown = canvas(page, 0, 30, most=99)
    assert min(shown) >= 9 and len(shown) >= 6
    for number, frame in shown.items():
        near = [float((frame - (each / 127.5 - 1)).abs().mean()) for each in frames]
        assert abs(near.index(min(near)) - number) <= 1, "each frame is the one that it should be"
        assert min(near) < 0.06


def test_what_else_is_there(opened: Callable[..., Page], server: Server, tmp_path: Path) -> None:
    page = opened()
    typed(page, RED)
    until(page, 10)
    page.locator("#prompt").press("Escape")
    page.keyboard.press("k")
    expect(page.locator("#status")).to_have_text("Paused")
    page.wait_for_timeout(200)
    held = page.inner_text("#number")
    page.wait_for_timeout(400)
    assert page.inner_text("#number") == held
    assert server.service.sessions.entries[session(page)].live.progress.paused
    page.keyboard.press("k")
    until(page, int(held) + 5)
    page.keyboard.press("Shift+X")
    expect(page.locator("#status")).to_have_text("Over")
    with page.expect_download() as download:
        page.keyboard.press("d")
    file = tmp_path / "video.mp4"
    download.value.save_as(file)
    video = read_video(file)
    assert len(video) > int(held) + 5
    assert read(video[:9].movedim(3, 1) / 127.5 - 1).colour.value == "red"
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
