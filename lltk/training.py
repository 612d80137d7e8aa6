"""From a recipe to a training run.

::

    recipe = read_recipe(find_recipe("tiny_train"), ["train.steps=1000"])
    plan = plan_training(recipe, "cuda")
    with open_training(plan, Path("runs/tiny"), resume=True) as run:
        for metrics in run:
            print(metrics.step, metrics.loss)
    print(run.export())
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lltk.files.locks import held, lock_output
from lltk.files.outputs import Output, check_outputs
from lltk.graph.program import LogEntry
from lltk.models.checkpoint import LONGLIVE_LORA, MODEL_FOLDER, WEIGHTS_FILE
from lltk.models.pipelines import PIPELINE
from lltk.parallel.mesh import ALONE, Mesh, meshed
from lltk.parallel.ranks import Ranks
from lltk.tasks.autoencoder import plan_autoencoder
from lltk.tasks.distillation import plan_distillation
from lltk.tasks.transformer import ADAPTERS, plan_transformer
from lltk.train.data import Dataset
from lltk.train.loop import Trainer, newest_state, run_outputs
from lltk.train.metrics import Metrics
from lltk.train.objective import Objective
from lltk.train.progress import Note, silent
from lltk.train.recipe import TrainSection
from lltk.train.tensorboard import check_installed


class TrainingPlan(Protocol):
    """A recipe's training run, before anything is allocated.

    Each kind of training has an implementation of its own in `lltk.tasks`; `plan_training` chooses
    among them.
    """

    @property
    def section(self) -> TrainSection:
        """The recipe's ``train`` section."""

    @property
    def device(self) -> torch.device:
        """Where it trains."""

    @property
    def sequence(self) -> int:
        """How many ranks share the frames of a clip."""

    @property
    def log(self) -> Sequence[LogEntry]:
        """The passes that its Program went through; empty where there is no Program."""

    @property
    def origin(self) -> str:
        """Where the weights come from that training begins with."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What its training states say of it: ``recipe``, ``log`` and ``versions``."""

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes by owner."""

    def ways_to_fit(self, room: int) -> Sequence[str]:
        """Changes of keys with which a device's bytes would do, in words; empty if none are known.

        Args:
            room: bytes of a device.
        """

    def check_clips(self) -> None:
        """Refuse a folder of clips, or a prepared set, that cannot be what ``train.data`` says.

        Reads no clip, but of a prepared set its manifest and the encoders' files.

        Raises:
            ValueError: it is not there, or was made from something else.
        """

    def dataset(self, note: Note = silent, mesh: Mesh = ALONE) -> Dataset:
        """Load what makes the clips; ``note`` is told how many are encoded.

        The ranks of the mesh encode them together, and all call this.

        Raises:
            ValueError: the clips or their encoder cannot be read, or the device lacks what the
                recipe wants.
        """

    def objective(self, dataset: Dataset) -> Objective:
        """Make the model on the device, and what a step minimises; ``dataset`` is of this plan."""

    def export(
        self,
        objective: Objective,
        dataset: Dataset,
        trained: Mapping[str, Tensor],
        folder: Path,
        overwrite: bool = False,
    ) -> Path:
        """Write a model's file for others to load.

        Args:
            objective: of this plan.
            dataset: of this plan.
            trained: the trained weights, float32 by parameter name.
            folder: where to write it.
            overwrite: whether it may replace what lltk did not write.

        Returns:
            What was written.
        """

    def write_samples(
        self, objective: Objective, dataset: Dataset, folder: Path | None, note: Note = silent
    ) -> None:
        """Write what the module can do so far to a folder; ``note`` is told how far that is.

        Ranks but the first help to make it, and have no folder.
        """


def plan_training(
    recipe: Mapping[str, Any], device: torch.device | str = "cpu", where: str = "recipe"
) -> TrainingPlan:
    """The plan of a recipe with a ``train`` section.

    A recipe with a ``vae`` section trains an autoencoder, one with a ``distil`` section distils its
    stream, and any other trains its transformer.

    Args:
        recipe: plain data, as `lltk.graph.recipe.read_recipe` gives it.
        device: where it will train.
        where: what errors call the recipe.

    Raises:
        ValueError: the recipe or its checkpoint does not fit, or it has no ``train`` section.
    """
    chosen = torch.device(device)
    makes: Mapping[str, Callable[..., TrainingPlan]] = {
        "vae": plan_autoencoder,
        "distil": plan_distillation,
    }
    make = next((make for key, make in makes.items() if recipe.get(key)), plan_transformer)
    plan: TrainingPlan = make(recipe, chosen, where)
    if plan.section.tensorboard:
        check_installed()
    if plan.section.graphs and chosen.type != "cuda":
        raise ValueError(f"{where}: train.graphs: {chosen} has no CUDA graphs; set it to false")
    return plan


class Training:
    """A training run. Iterating takes one step at a time and gives its `Metrics`.

    Args:
        plan: what it was made by.
        dataset: the clips.
        folder: the run's; see `Trainer`.
        resume: go on from the newest training state in the folder, if there is one.
        note: told how far validations and samples are.
        overwrite: whether exported weights may replace what lltk did not write.
        mesh: the ranks that train together.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        dataset: Dataset,
        folder: Path,
        resume: bool,
        note: Note = silent,
        overwrite: bool = False,
        mesh: Mesh = ALONE,
    ) -> None:
        self._plan = plan
        self._mesh = mesh
        self._overwrite = overwrite
        self._dataset = dataset
        self._folder = folder
        self.objective = plan.objective(dataset)
        sample = partial(plan.write_samples, self.objective, dataset, note=note)
        self.trainer = Trainer(
            self.objective, dataset, plan.section, folder, plan.about, sample, resume, note, mesh
        )

    def __iter__(self) -> Iterator[Metrics]:
        return self.trainer

    def export(self) -> Path | None:
        """Write the averaged weights, or the weights as they are where nothing is averaged.

        A transformer is written to ``transformer/`` in the run's folder, an autoencoder to
        ``vae/``, both in diffusers' layout; adapters to what ``train.adapter`` says.

        All ranks must call it; the first writes.

        Returns:
            What was written; None on the other ranks.
        """
        trained = self.trainer.ema or self.trainer.weights
        if self._mesh.rank > 0:
            return None
        return self._plan.export(
            self.objective, self._dataset, trained, self._folder, self._overwrite
        )


def training_outputs(folder: Path) -> list[Output]:
    """What runs in a folder write there."""
    return [
        *run_outputs(folder),
        lock_output(folder),
        Output(folder / "transformer", MODEL_FOLDER),
        Output(folder / "vae", MODEL_FOLDER),
        Output(folder / "pipeline", PIPELINE),
        Output(folder / ADAPTERS["diffusers"], WEIGHTS_FILE),
        Output(folder / ADAPTERS["peft"], MODEL_FOLDER),
        Output(folder / ADAPTERS["longlive"], LONGLIVE_LORA),
    ]


@contextmanager
def open_training(
    plan: TrainingPlan,
    folder: Path,
    *,
    resume: bool = False,
    dataset: Dataset | None = None,
    note: Note = silent,
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> Iterator[Training]:
    """Load the clips and the model, ready to train.

    Inside the block no other process can train in the folder, and torch searches for the fastest
    convolutions, since shapes stay the same.

    Args:
        plan: of the run.
        folder: the run's. It gets training states, metrics, samples and exported weights.
        resume: go on from the newest training state in the folder, if there is one.
        dataset: the clips; None for those that ``train.data`` names.
        note: told how far the work is that is no step: looking at clips, encoding them, validating,
            sampling.
        overwrite: whether the run may replace what lltk did not write.
        ranks: those that train together, all of which call this; by default this process alone.

    Raises:
        ValueError: the ranks are not as many as the plan wants; or the folder is in use, holds a
            run that is not to be resumed, or has what lltk did not write under a name that the run
            needs. Or as `TrainingPlan.dataset` and `Trainer` raise it.
    """
    ranks = ranks or Ranks(0, 1, plan.device)
    with ExitStack() as opened:
        mesh = opened.enter_context(meshed(ranks, plan.sequence, plan.section.shards))
        first = mesh.rank == 0
        if first:
            check_outputs(training_outputs(folder), [], overwrite)
            newest_state(folder, resume, plan.about)  # refuses before clips are made
        there = folder.exists()
        if first and there:
            opened.enter_context(held(folder))
        clips = plan.dataset(note, mesh) if dataset is None else dataset
        if first and not there:  # it is made once all that the recipe names was found
            opened.enter_context(held(folder))
        ranks.any(False)  # the first has checked the folder
        run = Training(plan, clips, folder, resume, note, overwrite, mesh)
        opened.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True))
        yield run
        run.trainer.settle()
