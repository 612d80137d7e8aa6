"""From a recipe to a running stream.

::

    plan = plan_stream(load_recipe(path), device=torch.device("cuda"))
    with VideoWriter(output, *plan.size, plan.section.fps) as writer:
        sink = lambda video: writer.write(pixels(video))
        with open_stream(plan, sink, load_script(script)) as stream:
            for report in stream:
                …
            stream.save(state)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lltk import __version__
from lltk.compiler import transform
from lltk.graph.facts import HighSteps, Ranks
from lltk.graph.fingerprint import fingerprint
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe, parse_recipe
from lltk.models import wan_vae
from lltk.models.pipelines import find_pipeline
from lltk.ops.implementations import check_device
from lltk.parallel.devices import find_device
from lltk.parallel.groups import SEQUENCE, rank_in, same_on_all
from lltk.stream.chunks import Chunking, Receipt
from lltk.stream.columns import ColumnDecoder
from lltk.stream.decoder import DecodedElsewhere, Decoder, LatentDecoder
from lltk.stream.memory import Parts, Placed, check_memory, loading_memory, stream_memory
from lltk.stream.recipe import DecoderSection, StreamSection, stream_section
from lltk.stream.report import ChunkReport
from lltk.stream.runtimes.cuda_graph import check_graphs
from lltk.stream.runtimes.torch import TorchRuntime
from lltk.stream.script import Shot
from lltk.stream.session import Sampling, Session
from lltk.stream.state import load_state, save_state
from lltk.stream.text import Prompts, TextEncoder, weight_bytes
from lltk.stream.timeline import Timeline


@dataclass(frozen=True)
class StreamPlan:
    """A recipe's stream, before anything is allocated; weights are mapped from their files.

    Attributes:
        recipe: what it was made from.
        section: its ``stream`` section.
        folder: the pipeline's.
        transformer: its Program.
        decoders: their Programs and where they run; several make a part of the columns each.
        device: where the transformer runs, and what the recipe puts nowhere else.
    """

    recipe: Recipe
    section: StreamSection
    folder: Path
    transformer: Program
    decoders: tuple[Placed, ...]
    device: torch.device

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the video in pixels."""
        return self.recipe.geometry.height, self.recipe.geometry.width

    @property
    def sampling(self) -> Sampling:
        """What a session needs of the section."""
        return Sampling(**{f.name: getattr(self.section, f.name) for f in fields(Sampling)})

    @property
    def chunking(self) -> Chunking:
        """How a script becomes chunks."""
        section, program = self.section, self.transformer
        size, stride = program.geometry.chunk, program.spec.stride[0]
        return Chunking(size, section.fps, stride, section.scene_cut, section.recache)

    @property
    def decoder_device(self) -> torch.device:
        """Where the frames are; of several decoders, the first one's."""
        return self.decoders[0].device

    @property
    def text_device(self) -> torch.device:
        """Where prompts are encoded."""
        return torch.device(self.section.text.device or self.device)

    @property
    def writer_threads(self) -> int:
        """For a `VideoWriter`: one where a model runs on the CPU, whose cores it would take."""
        return 1 if "cpu" in (self.device.type, self.decoder_device.type) else 8

    @cached_property
    def parts(self) -> Parts:
        """What is to be held in memory, and where."""
        return Parts(
            self.section,
            self.transformer,
            self.decoders,
            weight_bytes(self.folder / "text_encoder", self.transformer.dtype),
            weight_bytes(self.folder / "vae", self.decoders[0].program.dtype),
            self.device,
            self.text_device,
        )

    @property
    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes by device and owner while it runs; see `stream_memory`."""
        return stream_memory(self.parts)

    def loading_memory(self, image: bool) -> dict[str, dict[str, int]]:
        """Bytes by device and owner before it runs; see `loading_memory`."""
        return loading_memory(self.parts, image)

    def check(self, image: bool = False, decodes: bool = True) -> None:
        """Refuse what cannot run here.

        Args:
            image: whether the video begins with one.
            decodes: whether this process makes frames; of several ranks the first does.

        Raises:
            ValueError: not as many ranks as it is for, a device that is not here or lacks what the
                recipe wants, or too little memory.
        """
        rank_in(SEQUENCE, self.transformer.fact(Ranks).count)  # which refuses another number
        find_device(str(self.device), "the stream's device")
        find_device(str(self.text_device), "stream.text.device")
        check_device(self.transformer.implementations, self.device)
        if self.section.cuda_graphs:
            check_graphs(self.device, "stream.cuda_graphs")
        for decoder in self.decoders:
            find_device(str(decoder.device), "stream.decoder.device")
            made = decoder.program.implementations
            check_device(made, decoder.device, "the lower pass in stream.decoder.passes")
            if self.section.decoder.cuda_graphs:
                check_graphs(decoder.device, "stream.decoder.cuda_graphs")
        check_memory(self.parts, image, decodes)

    def refusal(self, image: bool = False) -> str:
        """What `check` says; nothing where the stream can run."""
        try:
            self.check(image)
        except ValueError as error:
            return str(error)
        return ""

    @property
    def rank(self) -> int:
        """Which of the transformer's ranks this process is.

        Raises:
            ValueError: it is not one of as many as the recipe is for.
        """
        return rank_in(SEQUENCE, self.transformer.fact(Ranks).count)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same where a saved stream goes on; reads every weight, once."""
        return {
            "lltk": __version__,
            "transformer": fingerprint(self.transformer),
            "decoder": "+".join(fingerprint(decoder.program) for decoder in self.decoders),
            **asdict(self.chunking),
            **asdict(self.sampling),
            **({"rank": self.rank} if self.transformer.fact(Ranks).count > 1 else {}),
        }

    def describe(self) -> dict[str, str]:
        """What runs where, by part, for people to read."""
        section, program = self.section, self.transformer
        geometry = program.geometry
        choices = ", ".join(f"{op} {name}" for op, name in program.implementations.items())
        guided = f", guidance {section.guidance:g}" if section.guidance != 1 else ""
        ranks = program.fact(Ranks).count
        ways = {"blocks compiled": section.compile, "CUDA graphs": section.cuda_graphs}
        how = "".join(f"{way}, " for way, used in ways.items() if used)
        return {
            "pipeline": section.pipeline,
            "transformer": f"{_where(self.device, program)}, {how}{choices}",
            "decoder": f"{' and '.join(_where(d.device, d.program) for d in self.decoders)}, "
            f"{'compiled, ' if section.decoder.compile else ''}"
            f"{'CUDA graphs, ' if section.decoder.cuda_graphs else ''}"
            f"passes {', '.join(entry.name for entry in self.decoders[0].program.log)}",
            "text encoder": f"{self.text_device}, {section.text.after} after use"
            + ("" if self.parts.text else "; its memory is not known without the pipeline's files"),
            "sampler": f"{section.steps} steps and a commit, shift {section.shift:g}{guided}",
            "video": f"{geometry.width}×{geometry.height} at {section.fps:g} fps",
            **({"ranks": str(ranks)} if ranks > 1 else {}),
            "cache": f"{geometry.window} latent frames in pages of {geometry.chunk}, "
            f"sinks of {geometry.sink}{' (global and shot)' if geometry.shot_sink else ''}",
        }


def plan_stream(
    recipe: Recipe, device: torch.device | str = "cpu", *, weights: bool = True
) -> StreamPlan:
    """The Programs of a stream recipe.

    Args:
        recipe: with a ``stream`` section; ``model.checkpoint`` is by default the pipeline's.
        device: where it will run.
        weights: whether to map the weights; without, it can only be looked at.

    Raises:
        ValueError: the recipe, its checkpoint or its pipeline does not fit.
    """
    if recipe.program != "stream":
        raise ValueError(f"program: {recipe.program} cannot be streamed; name a stream recipe")
    section = stream_section(recipe.stream, "recipe")
    folder = find_pipeline(section.pipeline, needed=weights)
    model = recipe.model
    if model.checkpoint is None and weights:
        model = model.model_copy(update={"checkpoint": str(folder)})
    own = recipe.model_copy(update={"model": model})
    transformer = transform(own, weights=weights)
    if late := [index for index in transformer.fact(HighSteps).indices if index >= section.steps]:
        raise ValueError(
            f"keep_steps: {late} are no passes of a chunk, which has {section.steps} "
            f"(0 to {section.steps - 1}); set keep_steps or stream.steps"
        )
    _, width = transformer.geometry.latent(transformer.spec)
    return StreamPlan(
        own,
        section,
        folder,
        transformer,
        tuple(_decoders(own, section, folder if weights else None, torch.device(device), width)),
        torch.device(device),
    )


def _decoders(
    recipe: Recipe, section: StreamSection, folder: Path | None, device: torch.device, width: int
) -> Iterator[Placed]:
    """The decoders of latents so wide, with the weights of a pipeline's folder if it is given."""
    own = section.decoder
    names = own.device if isinstance(own.device, tuple) else (own.device or device,)
    devices = [torch.device(name) for name in names]
    if len(devices) > width:
        raise ValueError(
            f"stream.decoder.device: names {len(devices)}, and a frame's latents are {width} wide; "
            "name fewer"
        )
    if own.latents > recipe.geometry.chunk:
        raise ValueError(
            f"stream.decoder.latents: {own.latents} are never at hand, a chunk has "
            f"{recipe.geometry.chunk}; name at most so many"
        )
    shared = [d for d in devices if (d.type, d.index or 0) == (device.type, device.index or 0)]
    if own.cuda_graphs and shared and device.type == "cuda":
        raise ValueError(
            f"stream.decoder.cuda_graphs: the transformer is on {shared[0]} too, whose waits would "
            "break a recording; name another GPU in stream.decoder.device, or set "
            "stream.decoder.cuda_graphs=false"
        )
    model: dict[str, Any] = {
        "config": own.config if folder is None else None,
        "checkpoint": None if folder is None else str(folder),
        "dtype": own.dtype,
        "latents": own.latents,
    }
    for index, place in enumerate(devices):
        if len(devices) > 1:
            model["columns"] = [width * i // len(devices) for i in (index, index + 1)]
        decode = {
            "program": "decode",
            "model": model,
            "geometry": recipe.geometry.model_dump(),
            "passes": _decoder_passes(own, devices),
        }
        parsed = parse_recipe(decode, "stream.decoder")
        yield Placed(transform(parsed, weights=folder is not None, section="stream.decoder"), place)


class Stream:
    """A running stream: a `Session`, and the file that it can go on from.

    Args:
        plan: what it was made by.
        session: ready to run.
    """

    def __init__(self, plan: StreamPlan, session: Session) -> None:
        self.plan = plan
        self.session = session

    def __iter__(self) -> Iterator[ChunkReport]:
        return self.session

    def switch(self, prompt: str, recache: bool | None = None) -> Receipt:
        """See `Timeline.switch`."""
        return self.session.timeline.switch(prompt, recache)

    def save(self, path: Path) -> None:
        """Write what `open_stream` needs to go on from here, bit for bit.

        Of several ranks each writes a file of its own, rank 0 the one that is named.

        Raises:
            ValueError: the session was interrupted within a chunk, or in decoding one, or a page is
                broken.
            OSError: the file cannot be written.
        """
        save_state(_own_file(path, self.plan.rank), self.session.state(), self.plan.identity)

    def close(self) -> None:
        """Wait for the last frames; raises what decoding or the sink raised."""
        self.session.close()

    def __enter__(self) -> Stream:
        self.session.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.session.__exit__(kind, error, trace)


def open_stream(
    plan: StreamPlan,
    sink: Callable[[Tensor], None] | None,
    script: Sequence[Shot] = (),
    *,
    image: Tensor | None = None,
    resume: Path | None = None,
    prompts: Callable[[str], Tensor] | None = None,
) -> Stream:
    """Load what a stream needs: the text encoder, which encodes the script, then the models.

    Args:
        plan: with weights.
        sink: takes the video of latents as they are decoded, [B, 3, 1 or n · stride, H, W] in
            [-1, 1], in a thread of its own; None in a rank whose latents another one decodes.
        script: the shots; none where a saved stream goes on.
        image: the first frame, [B, 3, H, W] in [-1, 1].
        resume: a state that `Stream.save` wrote; script, image and seed are then the state's.
        prompts: a prompt's embedding, [1, S, E] where the transformer runs; None for the
            pipeline's text encoder.

    Raises:
        ValueError: a file that is damaged or does not fit, not enough memory, a device that
            lacks what the recipe wants, or not as many ranks as it is for.
    """
    plan.check(image is not None, decodes=sink is not None)
    rank = plan.rank
    state = None if resume is None else load_state(_own_file(resume, rank), plan.identity)
    ranks = plan.transformer.fact(Ranks).count
    if state and not same_on_all(state.timeline.index, SEQUENCE, ranks):
        raise ValueError(f"{resume}: its ranks' files are of different chunks; resume another")
    timeline = Timeline(plan.chunking, script)
    if state is not None:
        timeline.restore(state.timeline)
    section, program, device = plan.section, plan.transformer, plan.device
    guided = section.guidance != 1
    negative = [section.negative_prompt] if guided else []
    if prompts is None:
        prompts = _encoded_prompts(plan, [*timeline.prompts, *negative])
    latent = None if image is None else _encoded(plan, image)
    module = instantiate(program, device)
    if section.compile:
        module.compile_blocks()
    session = Session(
        TorchRuntime(program, module, section.cuda_graphs),
        DecodedElsewhere(device) if sink is None else open_decoder(plan),
        sink or (lambda video: None),
        prompts,
        timeline,
        plan.sampling,
        section.seed,
        TorchRuntime(program, module, section.cuda_graphs) if guided else None,
        latent,
    )
    if state is not None:
        session.restore(state)
    return Stream(plan, session)


def _own_file(path: Path, rank: int) -> Path:
    """Where a rank keeps its part of a state."""
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def open_decoder(plan: StreamPlan) -> LatentDecoder:
    """Load what turns a plan's latents into frames."""
    section, made = plan.section.decoder, []
    for placed in plan.decoders:
        module = instantiate(placed.program, placed.device)
        if section.compile:
            module.compile_graph("steps" if section.latents > 1 else "step")
        made.append(Decoder(placed.program, module, section.cuda_graphs))
    return made[0] if len(made) == 1 else ColumnDecoder(made)


def _decoder_passes(section: DecoderSection, devices: Sequence[torch.device]) -> list[Any]:
    """The recipe's; else what is needed, and the pass that a CPU's decoder gains by."""
    if section.passes is not None:
        return section.passes
    wanted = section.dtype == "float32" and all(device.type == "cpu" for device in devices)
    wanted &= torch.backends.mkldnn.is_available() and not section.compile
    onednn = ["onednn_conv3d"] if wanted else []
    return ["canonicalise", *onednn]


def _encoded_prompts(plan: StreamPlan, texts: Sequence[str]) -> Prompts:
    """The pipeline's encoder, these texts encoded."""
    section, program = plan.section, plan.transformer
    encoder = TextEncoder(
        plan.folder,
        program.geometry.text_tokens,
        program.dtype,
        plan.text_device,
        None if section.text.cache is None else Path(section.text.cache),
    )
    prompts = Prompts(encoder, section.text.after, plan.device)
    prompts.prepare(texts)
    return prompts


def _encoded(plan: StreamPlan, image: Tensor) -> Tensor:
    """The image's latent, on the transformer's device."""
    device = plan.decoder_device
    loaded = wan_vae.load_vae(plan.folder)
    dtype = plan.decoders[0].program.dtype
    weights = {name: weight.to(device, dtype) for name, weight in loaded.weights.items()}
    vae = wan_vae.make_vae(loaded.config or {}, weights)
    return wan_vae.encode_image(vae, image.to(device)).to(plan.device)


def _where(device: torch.device, program: Program) -> str:
    return f"{device}, {str(program.dtype).removeprefix('torch.')}"
