"""The demo's whole video from a bundle, against torch's."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from streams import streamed
from torch import Tensor

from lltk.exporting import export, plan_export
from lltk.graph.recipe import open_recipe
from lltk.stream.script import load_script
from lltk.stream.video import levels
from lltk.streaming import Plan, plan_bundle, plan_stream

pytestmark = pytest.mark.manual


def test_every_frame_is_within_a_grey_level(tmp_path: Path) -> None:
    recipe = open_recipe("tiny_stream")
    export(plan_export(recipe), tmp_path / "bundle")
    script = load_script(Path(str(files("lltk.models.tiny"))) / "demo.yaml")

    def made(plan: Plan) -> Tensor:
        return levels(streamed(plan, script)[1]).int()

    ours, theirs = made(plan_bundle(tmp_path / "bundle")), made(plan_stream(recipe))
    farthest = (ours - theirs).abs().amax(dim=(0, 1, 3, 4))
    assert len(farthest) > 4 * 4 * 16 and int(farthest.max()) <= 1
    assert int((theirs[:, :, 1:] - theirs[:, :, :-1]).abs().amax(dim=(0, 1, 3, 4)).min()) > 1
