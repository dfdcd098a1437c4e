"""A run folder: what a run reads and writes, checked before the first step."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch

from oneshot_ednas import __version__, distributed
from oneshot_ednas.architecture import Architecture
from oneshot_ednas.checkpoint import has_checkpoint, load_checkpoint
from oneshot_ednas.config import C, ExperimentConfig, first_difference, what_defines
from oneshot_ednas.data.order import split_indices
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.data.source import DataConfig, load_data
from oneshot_ednas.data.targets import is_valid
from oneshot_ednas.determinism import use_deterministic
from oneshot_ednas.latency.costs import SpaceCosts
from oneshot_ednas.latency.operations import network_macs
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.memory import Training, estimate_memory, watched_memory
from oneshot_ednas.models.network import build_network
from oneshot_ednas.reward import reward
from oneshot_ednas.schema import dump_yaml, find_file, load_yaml, read_json
from oneshot_ednas.search import check_target
from oneshot_ednas.space import SearchSpace, named_space
from oneshot_ednas.store import LOCK, PARTIAL, lock_folder, remove_partials, write_json, write_text
from oneshot_ednas.tasks import Task, make_tasks
from oneshot_ednas.training import Metrics, accuracy_of, choose_device, numpy_generator
from oneshot_ednas.trial import StandAloneTrainer

MIN_WATCHED_STEPS = 20
"""Memory is neither estimated nor measured for shorter trainings."""
MAX_RANDOM_DRAWS = 20_000
"""Draws for a random architecture inside the target before giving up."""


@dataclass(frozen=True)
class RunFiles:
    """Where a run keeps things."""

    folder: Path
    """Absolute: workers may run in another folder."""

    def __post_init__(self) -> None:
        """Keep the folder as an absolute path."""
        object.__setattr__(self, "folder", self.folder.absolute())

    @property
    def config(self) -> Path:
        """The config with every setting spelled out."""
        return self.folder / "config.yaml"

    @property
    def space(self) -> Path:
        """The search space."""
        return self.folder / "space.yaml"

    @property
    def splits(self) -> Path:
        """Frames of the weight, alpha and validation splits."""
        return self.folder / "splits.json"

    @property
    def data(self) -> Path:
        """Digests of the images and targets."""
        return self.folder / "data.json"

    @property
    def table(self) -> Path:
        """The latency table."""
        return self.folder / "latency_table.csv"

    @property
    def architecture(self) -> Path:
        """The derived architecture."""
        return self.folder / "architecture.json"

    @property
    def branching(self) -> Path:
        """Which tasks share which layers, as found."""
        return self.folder / "branching.json"

    @property
    def policy(self) -> Path:
        """Which operators each task shares, has for itself or skips, as found."""
        return self.folder / "policy.json"

    @property
    def candidates(self) -> Path:
        """The ranked candidates and the Pareto front."""
        return self.folder / "candidates.json"

    @property
    def trials(self) -> Path:
        """The trials of a multi-trial search."""
        return self.folder / "trials.sqlite"

    @property
    def results(self) -> Path:
        """Figures of the run."""
        return self.folder / "results.json"

    @property
    def model(self) -> Path:
        """The derived network, first seed, for the device."""
        return self.folder / "model.tflite"

    @property
    def export(self) -> Path:
        """What was exported, and how it compares with the float network."""
        return self.folder / "export.json"

    @property
    def seconds(self) -> Path:
        """Time per stage, over all sittings."""
        return self.folder / "seconds.json"

    @property
    def memory(self) -> Path:
        """Bytes that each stage was expected to need, and its measured peak."""
        return self.folder / "memory.json"

    def stage(self, stage: str) -> Path:
        """Log of a training that runs on a worker."""
        return self.folder / "stages" / stage

    def checkpoint(self, stage: str) -> Path:
        """Checkpoint of a stage."""
        return self.folder / "checkpoints" / f"{stage}.safetensors"


class RunFolder(Generic[C]):
    """A config with its tasks and device, and the folder of its run."""

    def __init__(self, config: C, folder: Path, *, is_reopened: bool = False) -> None:
        """Check what every kind of run has, but the data.

        Args:
            config: the config, its files named as `load_config` does.
            folder: the run folder; need not exist yet.
            is_reopened: take from the folder what it keeps of the config's files, so that a run can
                go on where they are no longer as they were.

        Raises:
            ValueError: for whatever is wrong in device or tasks.
        """
        self.config, self.files = config, RunFiles(folder)
        self.is_reopened = is_reopened
        use_deterministic(is_wanted=config.deterministic)
        self.device = distributed.own_device(choose_device(config.device))
        self.tasks: dict[str, Task] = make_tasks(config.tasks)
        self.out_channels = {name: task.out_channels for name, task in self.tasks.items()}

    def open(self, *, resume: bool) -> None:
        """Start the run folder, or go on with it; it is this process's until the run is gone.

        Of several processes the main one has it, and the others wait until it is there.

        Raises:
            ValueError: if the folder holds another config, other contents or another data order,
                something else than a run, or this run and `resume` was not asked for; or if another
                process works in it.
        """
        if distributed.is_main():
            self._open(resume=resume)
        distributed.barrier()

    def _open(self, *, resume: bool) -> None:
        files, contents = self.files, self._contents
        if files.folder.exists() and not files.config.exists():
            # A run that was cut before its config was written has no steps behind it.
            known = {LOCK, *(path.name for path in contents)}
            found = [path for path in files.folder.iterdir() if path.suffix != PARTIAL]
            if not known.issuperset(path.name for path in found):
                raise ValueError(
                    f"{files.folder} is not empty and holds no run; choose another --out"
                )
        # Before the comparison: nobody else may begin another run here meanwhile.
        self._lock = lock_folder(files.folder)
        if files.config.exists():
            difference = first_difference(
                what_defines(self._held_config()), what_defines(self.config)
            )
            if difference:
                raise ValueError(
                    f"{files.folder} already holds a run of another config ({difference}); "
                    f"choose another --out, or go on with its own config, {files.config}"
                )
            if not resume:
                raise ValueError(f"{files.folder} already holds this run; go on with --resume")
            for path, (what, text) in contents.items():
                if path != files.config and path.exists() and self._held(path) != text:
                    raise ValueError(
                        f"the {what} has changed since the run began (it is no longer that of "
                        f"{path}); restore it, or start anew with another --out"
                    )
        remove_partials(files.folder)
        for path, (_, text) in contents.items():
            write_text(path, text)

    def _held_config(self) -> C:
        try:
            return load_yaml(self.files.config, type(self.config))
        except ValueError as error:
            raise ValueError(
                f"{self.files.folder} already holds a run of another kind or version ({error}); "
                f"choose another --out"
            ) from None

    @property
    def _contents(self) -> dict[Path, tuple[str, str]]:
        """What defines the run: per file its name in messages and its text; the config last."""
        return {self.files.config: ("config", dump_yaml(self.config))}

    def _held(self, path: Path) -> str:
        """Text of a file of the folder, in the form that is written now."""
        return path.read_text(encoding="utf-8")

    @contextmanager
    def timed(self, stage: str) -> Iterator[Callable[[], None]]:
        """Add the time of a block to a stage, also when it is interrupted.

        Gives what adds the time so far: a kill loses no more than what came after.
        """
        last = time.perf_counter()

        def add() -> None:
            nonlocal last
            now = time.perf_counter()
            self.add_seconds(stage, now - last)
            last = now

        try:
            yield add
        except BaseException:
            with suppress(OSError):  # the first error tells what is wrong
                add()
            raise
        add()

    @contextmanager
    def watched(self, stage: str, training: Training, num_steps: int) -> Iterator[None]:
        """Tell the memory that a stage needs before it, and keep it beside its peak after it.

        Args:
            stage: its name.
            training: what it trains.
            num_steps: that are left; the estimate costs about as much as a few.
        """
        if num_steps < MIN_WATCHED_STEPS:
            yield
            return
        with watched_memory(stage, self.device, partial(estimate_memory, training)) as figures:
            yield
        if distributed.is_main():
            before = self.memory.get(stage, {}).get("peak") or 0
            peak = None if figures["peak"] is None else max(before, figures["peak"])
            write_json(self.files.memory, self.memory | {stage: figures | {"peak": peak}})

    @property
    def memory(self) -> dict[str, dict[str, int | None]]:
        """Bytes per stage, `estimated` and at the `peak` over all sittings."""
        path = self.files.memory
        return dict(read_json(path)) if path.exists() else {}

    def has_finished(self, stage: str, num_steps: int) -> bool:
        """Whether the checkpoint of a stage holds so many steps."""
        path = self.files.checkpoint(stage)
        return has_checkpoint(path) and int(load_checkpoint(path)["step"]) >= num_steps

    def add_seconds(self, stage: str, spent: float) -> None:
        """Add to the time of a stage."""
        if not distributed.is_main():
            return
        seconds = self.seconds
        spent += seconds.get(stage, 0.0)
        write_json(self.files.seconds, seconds | {stage: round(spent, 4)})

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far."""
        path = self.files.seconds
        return dict(read_json(path)) if path.exists() else {}


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The frames of a run: the training split with its parts, and the test split."""

    train: PackedSplit
    test: PackedSplit
    indices: dict[str, list[int]]
    """Rows of the training split by the name of the part."""

    @classmethod
    def load(
        cls,
        config: DataConfig,
        tasks: Mapping[str, Task],
        *,
        splits: dict[str, float],
        seed: int,
    ) -> "Frames":
        """Load the data and divide the training split.

        Args:
            config: the data.
            tasks: the tasks; each needs its target.
            splits: share of the training split by the name of the part.
            seed: of the division.

        Raises:
            ValueError: for whatever is wrong in the data.
            FileNotFoundError: for a missing folder or manifest.
        """
        train, test = load_data(config, tasks)
        return cls(train=train, test=test, indices=split_indices(len(train), splits, seed))

    def part(self, name: str) -> PackedSplit:
        """A part of the training split, for example `weights`, `alpha` or `validation`."""
        return self.train.subset(self.indices[name])

    @property
    def sources(self) -> dict[str, list[str]]:
        """Frames of the parts."""
        sources = self.train.sources
        return {name: [sources[i] for i in part] for name, part in self.indices.items()}

    @property
    def digests(self) -> dict[str, str]:
        """What images and targets of the training and the test split hold."""
        return {split.name: split.digest() for split in (self.train, self.test)}

    def contents(self, files: RunFiles) -> dict[Path, tuple[str, str]]:
        """What a run folder keeps of them, as of `RunFolder._contents`."""
        return {
            files.splits: ("data, or how it is split,", json.dumps(self.sources, indent=1) + "\n"),
            files.data: ("data", json.dumps(self.digests, indent=1) + "\n"),
        }

    def check_batches(self, setting: str, batch_size: int, *parts: str) -> None:
        """Refuse batches larger than what they are drawn from.

        Args:
            setting: names the batch size, for example `search.batch_size`.
            batch_size: frames of a batch.
            parts: the parts that batches are drawn from; none for the whole training split.

        Raises:
            ValueError: naming the setting.
        """
        count = min((len(self.indices[name]) for name in parts), default=len(self.train))
        if batch_size <= count:
            return
        words = [name.removesuffix("s") for name in parts] or ["training"]
        smaller = f"smaller of the {' and '.join(words)} splits"
        where = smaller if len(words) > 1 else f"{words[0]} split"
        raise ValueError(
            f"{setting} is {batch_size}, the {where} has {count} frames; lower it or use more "
            f"frames"
        )

    def check_scored(self, tasks: Mapping[str, Task]) -> None:
        """Refuse splits on which a metric would have nothing to score, before training for it.

        Raises:
            ValueError: if no frame of the test split or the part `validation` has a valid pixel.
        """
        scored = {"test": self.test, "validation": self.part("validation")}
        for part, split in scored.items():
            for name, task in tasks.items():
                rows = (split.arrays[name][row] for row in split.indices)
                if not any(is_valid(split.kinds[name], row).any() for row in rows):
                    raise ValueError(
                        f"none of the {len(split)} {part} frames has a valid pixel of "
                        f"{task.target}; give it more frames, or leave the task out"
                    )


class Problem(RunFolder[ExperimentConfig]):
    """What is searched for: a config with its space, tasks, table and target, and a run folder."""

    def __init__(
        self, config: ExperimentConfig, folder: Path, *, is_reopened: bool = False
    ) -> None:
        """Load and check what the config names, but the data.

        Args:
            config: the config, its files named as `load_config` does.
            folder: the run folder; need not exist yet.
            is_reopened: take space and table from the folder, so that a run can go on where they
                are no longer as they were.

        Raises:
            ValueError: for whatever is wrong in config, space, table or target.
            FileNotFoundError: for a missing file.
        """
        super().__init__(config, folder, is_reopened=is_reopened)
        space = str(self.files.space) if is_reopened else config.space
        self.space = named_space(space)
        table = self.files.table if is_reopened else find_file(config.latency.table)
        self.table = replace(LatencyTable.load(table), name=Path(config.latency.table).name)
        self.table.check_image_size(*config.data.image_size)
        self.table.check_calibrated(allowed=config.latency.allow_uncalibrated)
        self.costs: SpaceCosts = self.table.costs(self.space, self.out_channels)
        self.target_ms = config.latency.target_ms
        check_target(self.table, self.space, self.out_channels, self.target_ms)

    @property
    def _contents(self) -> dict[Path, tuple[str, str]]:
        files = self.files
        searched = {
            files.space: ("search space", self.space.to_yaml()),
            files.table: ("latency table", self.table.to_text()),
        }
        # A reopened run has them from there.
        return ({} if self.is_reopened else searched) | super()._contents

    def _held(self, path: Path) -> str:
        if path == self.files.space:
            return SearchSpace.load(path).to_yaml()
        if path == self.files.table:
            return LatencyTable.load(path).to_text()
        return super()._held(path)

    # Figures --------------------------------------------------------------------------------

    def macs(self, architecture: Architecture) -> int:
        """Multiply-adds of one forward pass on one frame."""
        size = self.config.data.image_size
        return network_macs(self.space, architecture, size, self.out_channels)

    def reward(self, architecture: Architecture, metrics: Metrics) -> float:
        """EDNAS eq. 4-7.

        Raises:
            ValueError: if a metric is not finite.
        """
        latency_ms = self.costs.latency_ms(architecture)
        return reward(accuracy_of(self.tasks, metrics), latency_ms, self.target_ms)

    def figures(self, architecture: Architecture, scores: Sequence[Metrics]) -> dict[str, Any]:
        """Latency, size, and metrics averaged over seeds, with the reward of each."""
        latency_ms = self.costs.latency_ms(architecture)
        network = build_network(self.space.fix(architecture), self.out_channels)
        rewards = [self.reward(architecture, metrics) for metrics in scores]
        return {
            "architecture": str(architecture),
            "latency_ms": latency_ms,
            "is_inside_target": latency_ms <= self.target_ms,
            "parameters": network.num_parameters,
            "gmacs": self.macs(architecture) / 1e9,
            "reward": statistics.fmean(rewards),
            "reward_per_seed": rewards,
            "metrics": over_seeds(scores, statistics.fmean),
            "metrics_std": over_seeds(scores, statistics.stdev) if len(scores) > 1 else None,
        }


class Experiment(Problem):
    """A problem and its data."""

    def __init__(
        self, config: ExperimentConfig, folder: Path, *, is_reopened: bool = False
    ) -> None:
        """Load and check everything that can be wrong before a file is written.

        Args:
            config: the config, its files named as `load_config` does.
            folder: the run folder; need not exist yet.
            is_reopened: as of `Problem`.

        Raises:
            ValueError: for whatever is wrong in config, space, table, data or target.
            FileNotFoundError: for a missing file.
        """
        super().__init__(config, folder, is_reopened=is_reopened)
        split_seed = config.search.split_seed
        self.frames = Frames.load(
            config.data,
            self.tasks,
            splits=config.search.splits,
            seed=config.seed if split_seed is None else split_seed,
        )
        self.train, self.test = self.frames.train, self.frames.test
        self.indices = self.frames.indices
        self.frames.check_batches("search.batch_size", config.search.batch_size, "weights", "alpha")
        self.frames.check_batches("retrain.batch_size", config.retrain.batch_size)
        distributed.check_batch_size("search.batch_size", config.search.batch_size)
        distributed.check_batch_size("retrain.batch_size", config.retrain.batch_size)
        self.baselines = {name: self.baseline(name) for name in config.baselines}
        self.frames.check_scored(self.tasks)

    @property
    def _contents(self) -> dict[Path, tuple[str, str]]:
        return self.frames.contents(self.files) | super()._contents

    @property
    def split_sources(self) -> dict[str, list[str]]:
        """Frames of the weight, alpha and validation splits."""
        return self.frames.sources

    @property
    def data_digests(self) -> dict[str, str]:
        """What images and targets of the training and the test split hold."""
        return self.frames.digests

    def part(self, name: str) -> PackedSplit:
        """The `weights`, `alpha` or `validation` split."""
        return self.frames.part(name)

    def trainer(self, *, with_test: bool = False) -> StandAloneTrainer:
        """What trains and scores a trial: on all training frames but those of the validation split.

        Args:
            with_test: score the test split too, for a study; no search may look at it.

        Raises:
            ValueError: if a batch is larger than the training set of a trial.
        """
        indices = sorted([*self.indices["weights"], *self.indices["alpha"]])
        if self.config.retrain.batch_size > len(indices):
            raise ValueError(
                f"retrain.batch_size is {self.config.retrain.batch_size}, a trial has "
                f"{len(indices)} training frames; lower it or use more frames"
            )
        return StandAloneTrainer(
            config=replace(self.config.retrain, steps=self.config.multi_trial.steps),
            space=self.space,
            tasks=self.tasks,
            training=self.train.subset(indices),
            validation=self.part("validation"),
            test=self.test if with_test else None,
            augmentation=self.config.data.augment,
            eval_batch_size=self.config.derive.batch_size,
            device=self.device,
        )

    def baseline(self, name: str) -> Architecture:
        """The architecture of a baseline.

        Raises:
            ValueError: if no random draw fits the target.
        """
        if name == "base":
            return self.space.base_architecture
        generator = numpy_generator(self.config.seed, "random baseline")
        for _ in range(MAX_RANDOM_DRAWS):
            architecture = self.space.sample(generator)
            if self.costs.latency_ms(architecture) <= self.target_ms:
                return architecture
        raise ValueError(
            f"none of {MAX_RANDOM_DRAWS} random architectures is inside {self.target_ms:g} ms; "
            f"raise latency.target_ms or leave out the baseline random"
        )


def over_seeds(scores: Sequence[Metrics], statistic: Callable[[list[float]], float]) -> Metrics:
    """Each metric over the seeds, for example its mean."""
    return {
        task: {name: statistic([metrics[task][name] for metrics in scores]) for name in values}
        for task, values in scores[0].items()
    }


def _git_revision() -> str:
    """Revision of the checkout that the package runs from; empty for an installed one."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return ""
    return found.stdout.strip()


def versions(device: torch.device) -> dict[str, str]:
    """What a result depends on besides config and data."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    count = distributed.count()
    processes = f", {count} processes" if count > 1 else ""
    return {
        "oneshot_ednas": __version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": f"{device.type} ({name}), {torch.get_num_threads()} threads{processes}",
    }
