"""The tiny world served, and a browser to look at its page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from playwright.sync_api import Browser, sync_playwright
from serving import Server

from lltk.graph.recipe import open_recipe
from lltk.streaming import StreamPlan, plan_stream

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
NEEDED = "no Chromium is installed; on Debian: apt-get install chromium-headless-shell"


def tiny_plan() -> StreamPlan:
    """The plan of the recipe that is served by default, with its trained weights."""
    recipe = open_recipe("tiny_stream", ["stream.text.after=keep"])
    return plan_stream(recipe, torch.device("cpu"))


def cut_connections(server: Server) -> None:
    """Break every connection, as a network does."""
    for connection in list(server.uvicorn.server_state.connections):
        connection.loop.call_soon_threadsafe(connection.transport.abort)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
