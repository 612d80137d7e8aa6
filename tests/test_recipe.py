"""Recipes: what they extend and override, what is refused, and what is suggested instead."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import CANONICAL, make_recipe, refused, tiny_config
from hypothesis import assume, given
from hypothesis import strategies as st

from lltk.compiler import configured_passes, transform
from lltk.graph.geometry import Geometry, Kind
from lltk.graph.recipe import load_recipe, parse_recipe, read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.models import wan22, wan_vae
from lltk.models.configs import named_config
from lltk.models.wan22 import spec
from lltk.stream.recipe import stream_section
from lltk.train.distil_section import distil_section
from lltk.train.recipe import train_section, vae_recipe

pytestmark = pytest.mark.cpu

SHIPPED = sorted(Path(str(files("lltk.recipes"))).glob("*.yaml"))
PROGRAMS = [path for path in SHIPPED if path.stem != "tiny_vae"]
BASE: dict[str, Any] = {
    "program": "stream",
    "model": {"config": "tiny", "dtype": "float32"},
    "geometry": {"height": 64, "width": 96, "chunk": 2, "window": 8, "sink": 2},
    "passes": ["canonicalise", {"lora": {"rank": 4}}],
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return written(tmp_path / "base.yaml", BASE)


def written(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


# Shipped recipes


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_shipped_recipes_parse(path: Path) -> None:
    recipe = load_recipe(path)
    use = "distil" if recipe.distil else recipe.program
    assert use in path.stem.split("_")
    assert [step.name for step in configured_passes(recipe, None, ())] == [
        name for name, _ in recipe.steps()
    ]
    assert isinstance(recipe.model.config, str)
    if recipe.program in ("decode", "encode"):
        config = wan_vae.validate_config(named_config(recipe.model.config, wan_vae.CONFIGS))
        assert recipe.geometry.frame_tokens(wan_vae.spec(config)) > 0
    else:
        assert recipe.geometry.frame_tokens(spec(named_config(recipe.model.config))) > 0
    if recipe.stream is not None:
        stream_section(recipe.stream, path.name)
    if recipe.train is not None:
        train_section(recipe.train, path.name).calls(recipe.geometry.batch)
    if recipe.distil is not None:
        distil_section(recipe.distil, path.name)
    assert parse_recipe(recipe.resolved(), "resolved") == recipe


def test_the_shipped_autoencoders_recipe_parses() -> None:
    (path,) = set(SHIPPED) - set(PROGRAMS)
    recipe = vae_recipe(read_recipe(path, ()), path.name)
    assert recipe.vae.config in wan_vae.CONFIGS
    assert recipe.train.calls(recipe.vae.batch)


def test_every_size_ships_every_kind() -> None:
    kinds = {"train", "score", "stream", "decode", "encode"}
    assert {path.stem for path in SHIPPED} == {
        *(f"tiny_{kind}" for kind in (*kinds, "reference", "vae")),
        *(f"wan22_5b_{kind}" for kind in kinds - {"decode", "encode"}),
        *(
            f"{size}_{use}"
            for size in ("tiny", "wan22_5b")
            for use in ("stream_fp8", "stream_nvfp4", "stream_nvfp4_cache", "train_nvfp4")
        ),
        "tiny_stream_w4a4",
        "tiny_stream_bounded",
        "tiny_distil",
        "wan22_5b_distil",
        "wan22_5b_distil_fp8",
        "wan22_5b_stream_nvfp4_cache_sp2",
        "wan22_5b_stream_sp2",
        "tiny_train_sp2",
        *(f"wan22_5b_train_{length}" for length in ("16s", "32s", "64s", "lora")),
        "wan22_decode",
        "wan22_encode",
    }


@pytest.mark.parametrize("size", ["tiny", "wan22_5b"])
def test_weights_are_rounded_as_they_were_trained(size: str) -> None:
    steps = {
        path.stem: options
        for path in PROGRAMS
        for name, options in load_recipe(path).steps()
        if path.stem.startswith(size) and name in ("nvfp4_train", "nvfp4_infer")
    }
    trained = steps.pop(f"{size}_train_nvfp4")
    assert f"{size}_stream_nvfp4" in steps
    for rule in ("weight_rule", "activation_rule"):
        assert {options.get(rule) for options in steps.values()} == {trained.get(rule)}


# Extending


def test_a_recipe_extends_another(tmp_path: Path, base: Path) -> None:
    """Keys merge at every depth; lists are replaced."""
    child = {
        "extends": "base.yaml",
        "program": "score",
        "geometry": {"chunk": 4, "sink": 0},
        "passes": ["canonicalise"],
    }
    recipe = load_recipe(written(tmp_path / "child.yaml", child))
    assert recipe.program == "score" and recipe.model.config == "tiny"
    assert (recipe.geometry.width, recipe.geometry.chunk, recipe.geometry.sink) == (96, 4, 0)
    assert recipe.steps() == [("canonicalise", {})]


def test_extends_is_relative_to_its_file_and_goes_on(tmp_path: Path, base: Path) -> None:
    (tmp_path / "sub").mkdir()
    written(tmp_path / "sub/one.yaml", {"extends": "../base.yaml", "geometry": {"width": 64}})
    two = written(tmp_path / "two.yaml", {"extends": "sub/one.yaml", "geometry": {"height": 32}})
    geometry = load_recipe(two).geometry
    assert (geometry.height, geometry.width, geometry.chunk) == (32, 64, 2)


def test_a_recipe_extends_a_shipped_one(tmp_path: Path) -> None:
    """By name, unless there is such a file."""
    own = written(tmp_path / "own.yaml", {"extends": "tiny_score", "geometry": {"batch": 3}})
    recipe, shipped = load_recipe(own), load_recipe(find_recipe("tiny_score"))
    assert recipe.geometry.batch == 3 != shipped.geometry.batch
    assert recipe.passes == shipped.passes and recipe.program == "score"
    written(tmp_path / "tiny_score", {"program": "decode"})
    assert read_recipe(own)["program"] == "decode"


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path) -> None:
    a = written(tmp_path / "a.yaml", {"extends": "b.yaml"})
    written(tmp_path / "b.yaml", {"extends": "a.yaml"})
    assert refused(load_recipe, a) == f"{a}: extends itself through a.yaml → b.yaml"


def test_a_detour_to_itself_is_the_same_file(tmp_path: Path) -> None:
    a = written(tmp_path / "a.yaml", {"extends": f"../{tmp_path.name}/a.yaml"})
    assert "extends itself" in refused(load_recipe, a)


@pytest.mark.parametrize("parent", [3, ["base.yaml"], {"file": "base.yaml"}])
def test_extends_must_be_a_path(tmp_path: Path, base: Path, parent: object) -> None:
    path = written(tmp_path / "a.yaml", {"extends": parent})
    assert "extends" in refused(load_recipe, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such recipe file; shipped recipes: "),
        (Path(), "is a folder; name the file of a recipe"),
        ("a: [", "is not YAML"),
        ("- a\n- b\n", "is not a mapping of recipe keys"),
        ("", "is not a mapping of recipe keys"),
    ],
)
def test_unreadable_files_are_named(
    tmp_path: Path, content: str | Path | None, message: str
) -> None:
    """Where the parent is absent, or a folder, the error names the recipe that extends it too."""
    path = tmp_path / "parent.yaml"
    if isinstance(content, Path):
        path.mkdir()
    elif content is not None:
        written(path, content)
    child = written(tmp_path / "child.yaml", {"extends": "parent.yaml"})
    where = str(path) if isinstance(content, str) else f"{child}: extends: {path}"
    assert refused(load_recipe, child).startswith(f"{where}: {message}")


# Overriding


def test_overrides_take_yaml_values(base: Path) -> None:
    recipe = load_recipe(
        base,
        [
            "geometry.window=12",
            "geometry.shot_sink=false",
            "model.checkpoint=a=b.safetensors",
            "model.dtype=bfloat16",
            "passes=[canonicalise, {lower: {paged_attention: reference}}]",
        ],
    )
    assert recipe.geometry.window == 12 and recipe.geometry.shot_sink is False
    assert recipe.model.checkpoint == "a=b.safetensors" and recipe.model.dtype == "bfloat16"
    assert recipe.steps()[1] == ("lower", {"paged_attention": "reference"})


def test_overrides_reach_the_options_of_a_pass(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "program: score\nmodel: {config: tiny}\ngeometry: {height: 64, width: 64}\n"
        "passes: [canonicalise, {lora: {rank: 4}}, lower]\n"
    )
    changes = (
        "passes.lora.alpha=2",
        "passes.lower.fp8_matmul=a",
        "passes.lower.fp8_matmul=b",
    )
    steps = load_recipe(path, changes).steps()
    assert steps == [
        ("canonicalise", {}),
        ("lora", {"rank": 4, "alpha": 2}),
        ("lower", {"fp8_matmul": "b"}),
    ]


def test_the_last_override_wins_and_makes_sections(tmp_path: Path) -> None:
    path = written(tmp_path / "bare.yaml", {"program": "stream", "model": {}, "passes": []})
    sizes = ["geometry.height=32", "geometry.width=32", "geometry.height=64"]
    assert load_recipe(path, sizes).geometry.height == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("geometry.chunk", "--set geometry.chunk: write key.path=value"),
        ("program.x=1", "--set program.x=1: program holds a value, not keys"),
        ("passes.0=lower", "--set passes.0=lower: write passes.NAME.OPTION=VALUE"),
        ("passes.lowr.x=1", "--set passes.lowr.x=1: the recipe has no pass 'lowr'; did you mean"),
        ("model.dtype=[", "--set model.dtype=["),
    ],
)
def test_misshapen_overrides_are_refused(base: Path, override: str, message: str) -> None:
    assert refused(load_recipe, base, [override]).startswith(message)


# Keys and values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pases=[]", "unknown key 'pases'; did you mean 'passes'?"),
        ("model.chekpoint=x", "unknown key 'model.chekpoint'; did you mean 'checkpoint'?"),
        ("geometry.chunks=2", "unknown key 'geometry.chunks'; did you mean 'chunk'?"),
        ("geometry.zzz=2", "unknown key 'geometry.zzz'; known keys: batch, height, width, chunk"),
        ("program=steam", "program: Input should be 'train', 'score', 'stream', 'reference', "),
        ("model.dtype=half", "model.dtype: Input should be 'bfloat16', 'float16' or 'float32'"),
        ("model=3", "model: Input should be an object"),
        ("geometry.chunk=two", "geometry.chunk: Input should be a valid integer"),
        ("geometry.chunk=0", "geometry.chunk: Input should be greater than or equal to 1"),
        ("geometry.sink=-2", "geometry.sink: Input should be greater than or equal to 0"),
        ("passes=[{lora: {}, lower: {}}]", "write one pass an entry, not ['lora', 'lower']"),
    ],
)
def test_misfit_keys_and_values_are_named(base: Path, override: str, message: str) -> None:
    assert refused(load_recipe, base, [override]).startswith(f"{base}: {message}")


def test_every_finding_is_reported() -> None:
    data = BASE | {"prgram": 1, "geometry": BASE["geometry"] | {"widht": 1, "height": 0}}
    message = refused(parse_recipe, data, "r")
    for part in ("unknown key 'prgram'", "unknown key 'geometry.widht'", "geometry.height: "):
        assert part in message


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (["canonicalize"], "there is no pass 'canonicalize'; did you mean 'canonicalise'?"),
        ([{"lora": {"rnak": 3}}], "passes: lora: unknown key 'rnak'; did you mean 'rank'?"),
        ([{"commit": {"x": 3}}], "passes: commit: unknown key 'x'"),
    ],
)
def test_misfit_passes_are_named(passes: list[Any], message: str) -> None:
    assert refused(configured_passes, make_recipe("stream", passes), None, ()).startswith(message)


def test_unknown_configurations_are_named() -> None:
    recipe = parse_recipe(BASE | {"model": {"config": "tinny"}}, "r")
    wanted = "model configuration 'tinny' is not known; did you mean 'tiny'?"
    assert refused(transform, recipe, weights=False) == wanted
    recipe = make_recipe("stream", config=tiny_config() | {"num_layer": 2})
    assert "num_layer" in refused(transform, recipe, weights=False)


def test_plan_stops_and_leaves_out() -> None:
    recipe = make_recipe("stream")
    assert [s.name for s in configured_passes(recipe, "hoist_text", ())][-1] == "hoist_text"
    left = [s.name for s in configured_passes(recipe, "commit", ("hoist_text", "lower"))]
    assert left == [*CANONICAL, "cached_step", "commit"]
    assert refused(configured_passes, recipe, "hoist", ()).startswith(
        "'hoist' is not in the recipe's passes: "
    )
    assert refused(configured_passes, recipe, None, ["lora"]).startswith(
        "'lora' is not in the recipe's passes"
    )


# Geometry


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"chunk": 8, "window": 60, "sink": 8},
            "geometry.window: 60 latent frames is not a multiple of the chunk (8); "
            "the nearest that fit: 56 and 64",
        ),
        (
            {"chunk": 8, "window": 32, "sink": 3},
            "geometry.sink: 3 latent frames is not a multiple of the chunk (8); "
            "the nearest that fit: 0 and 8",
        ),
        (
            {"chunk": 8, "window": 32, "sink": 8, "frames": 4},
            "geometry.frames: 4 latent frames is not a multiple of the chunk (8); "
            "the nearest that fit: 8",
        ),
        (
            {"chunk": 8, "window": 16, "sink": 8},
            "geometry.window: 16 is less than 2*sink + chunk = 24; "
            "the nearest that fit: window=24, or sink=0",
        ),
        (
            {"chunk": 8, "window": 8, "sink": 8, "shot_sink": False},
            "geometry.window: 8 is less than sink + chunk = 16; "
            "the nearest that fit: window=16, or sink=0",
        ),
    ],
)
def test_misfit_sizes_are_refused_with_the_nearest(sizes: dict[str, int], message: str) -> None:
    data = BASE | {"geometry": {"height": 64, "width": 64} | sizes}
    assert refused(parse_recipe, data, "r") == f"r: {message}"


def test_resolutions_are_whole_tokens() -> None:
    model = spec(tiny_config())
    sizes = {"chunk": 2, "window": 8, "sink": 2}
    assert Geometry(height=64, width=96, **sizes).grid(model) == (2, 3)
    assert Geometry(height=64, width=96, **sizes).latent(model) == (4, 6)
    assert Geometry(height=64, width=96, **sizes).frame_tokens(model) == 6
    assert refused(Geometry(height=64, width=100, **sizes).grid, model) == (
        "geometry.width: 100 pixels is not a multiple of 32 (one token); "
        "the nearest that fit: 96 and 128"
    )


@pytest.mark.parametrize(
    ("program", "key", "size", "fit"),
    [("stream", "height", 512, 256), ("stream", "width", 512, 256), ("stream", "chunk", 9, 8),
     ("train", "frames", 5, 4), ("score", "frames", 9, 8)],
)  # fmt: skip
def test_sizes_beyond_the_rotary_table(program: Kind, key: str, size: int, fit: int) -> None:
    """The largest that fit are captured."""
    config = tiny_config(rope_max_seq_len=8)
    sizes = {"height": 32, "width": 32, "chunk": 1, "window": 3, "sink": 1, "frames": 1}

    def capture(value: int) -> None:
        scaled = {"window": 3 * value, "sink": value, "frames": value} if key == "chunk" else {}
        geometry = Geometry(**sizes | scaled | {key: value})
        wan22.captured(config, program, geometry, torch.float32)

    message = refused(capture, size)
    assert message.startswith(f"geometry.{key}: {size} takes ")
    assert message.endswith(f"RoPE table, which has 8 (rope_max_seq_len); {fit} fit")
    capture(fit)


@given(st.integers(1, 200))
def test_any_width_fits_or_both_suggestions_do(width: int) -> None:
    model = spec(tiny_config())
    sizes = Geometry(height=64, width=width, chunk=2, window=8, sink=2)
    if width % 32 == 0:
        assert sizes.grid(model) == (2, width // 32)
        return
    for value in suggestions(refused(sizes.grid, model))[0][1]:
        assert sizes.model_copy(update={"width": value}).grid(model)[1] == value // 32


def suggestions(message: str) -> list[tuple[str, list[int]]]:
    """(size, values) that a refusal suggests."""
    field = re.search(r"geometry\.(\w+):", message)
    tail = message.partition("the nearest that fit: ")[2].splitlines()[0]
    named = re.findall(r"(\w+)=(\d+)", tail)
    assert field and tail, message
    if named:
        return [(name, [int(value)]) for name, value in named]
    return [(field[1], [int(value) for value in re.findall(r"\d+", tail.partition(" [")[0])])]


def fits(sizes: dict[str, Any]) -> bool:
    """The rules, restated."""
    whole = all(sizes[name] % sizes["chunk"] == 0 for name in ("window", "sink", "frames"))
    sinks = sizes["sink"] * (2 if sizes["shot_sink"] else 1)
    return whole and sizes["window"] >= sinks + sizes["chunk"]


def attempt(sizes: dict[str, Any]) -> str | None:
    """The refusal, or None."""
    try:
        Geometry(height=64, width=64, **sizes)
    except ValueError as error:
        return str(error)
    return None


SIZES = st.fixed_dictionaries(
    {
        "chunk": st.integers(1, 12),
        "window": st.integers(1, 64),
        "sink": st.integers(0, 20),
        "frames": st.integers(1, 40),
        "shot_sink": st.booleans(),
    }
)


@given(SIZES)
def test_any_sizes_are_accepted_if_and_only_if_they_fit(sizes: dict[str, Any]) -> None:
    refusal = attempt(sizes)
    assert (refusal is None) == fits(sizes)


@given(SIZES, st.sampled_from(["window", "sink", "frames"]))
def test_what_is_suggested_for_one_wrong_size_is_accepted(
    sizes: dict[str, Any], wrong: str
) -> None:
    """All sizes fit but one, so changing that one as suggested must do."""
    value, chunk = sizes[wrong], sizes["chunk"]
    sizes = {
        name: size if name in ("chunk", "shot_sink") else size // chunk * chunk + chunk
        for name, size in sizes.items()
    }
    sizes["window"] = max(sizes["window"], 2 * sizes["sink"] + chunk)
    assert attempt(sizes) is None
    sizes[wrong] = value
    refusal = attempt(sizes)
    assume(refusal is not None)
    for name, values in suggestions(str(refusal)):
        for value in values:
            assert attempt(sizes | {name: value}) is None, f"{refusal}\nthen {name}={value}"


@given(SIZES, st.randoms(use_true_random=False))
def test_following_suggestions_settles(sizes: dict[str, Any], random: Any) -> None:
    """However many sizes are wrong, taking any suggestion each time ends in sizes that fit."""
    for _ in range(5):
        refusal = attempt(sizes)
        if refusal is None:
            return
        name, values = random.choice(suggestions(refusal))
        sizes = sizes | {name: random.choice(values)}
    assert attempt(sizes) is None
