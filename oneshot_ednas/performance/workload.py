"""What is measured: the searches and trainings of a shipped config, at a size of one's choice."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.config import ExperimentConfig
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.data.source import load_data
from oneshot_ednas.derive import sample_within_budget
from oneshot_ednas.latency.costs import SpaceCosts
from oneshot_ednas.latency.simulate import simulate_table
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.relaxation import ArchitectureParameters
from oneshot_ednas.retrain import StandAloneTraining
from oneshot_ednas.search import OneShotSearch
from oneshot_ednas.space import SearchSpace, named_space
from oneshot_ednas.tasks import Task, make_tasks
from oneshot_ednas.training import numpy_generator

MIN_FRAMES = 64
"""Frames that are rendered for a measurement, where the batch needs no more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """A config's search and retraining with few frames of its data."""

    config: ExperimentConfig
    device: torch.device
    width_factor: int = 1
    """Multiplies all channels of the config's space."""

    def resized(
        self,
        *,
        batch_size: int | None = None,
        image_size: tuple[int, int] | None = None,
        num_tasks: int | None = None,
        width_factor: int = 1,
        **search: Any,
    ) -> "Workload":
        """The workload at another size.

        Args:
            batch_size: of search and retraining.
            image_size: height and width.
            num_tasks: the config's tasks in turn, as often as it takes.
            width_factor: multiplies all channels of the space.
            **search: settings of `SearchConfig`.
        """
        config = self.config
        if batch_size is not None:
            search["batch_size"] = batch_size
            config = replace(config, retrain=replace(config.retrain, batch_size=batch_size))
        if image_size is not None:
            height, width = image_size
            config = replace(config, data=replace(config.data, height=height, width=width))
        if num_tasks is not None:
            names = list(config.tasks)
            tasks = {}
            for number in range(num_tasks):
                name = names[number % len(names)]
                one = config.tasks[name]
                target = one.target or name
                tasks[f"{name}_{number}"] = replace(one, target=target)
            config = replace(config, tasks=tasks)
        config = replace(config, search=replace(config.search, **search))
        return replace(self, config=config, width_factor=self.width_factor * width_factor)

    def warm_up_only(self) -> "Workload":
        """One network a step, drawn uniformly: a search's step to hold against a retraining's."""
        return self.resized(sandwich=False, warmup_fraction=0.999)

    @cached_property
    def space(self) -> SearchSpace:
        """The config's space."""
        space = named_space(self.config.space)
        return space if self.width_factor == 1 else widened(space, self.width_factor)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The config's tasks."""
        return make_tasks(self.config.tasks)

    @property
    def out_channels(self) -> Mapping[str, int]:
        """Output channels per task."""
        return {name: task.out_channels for name, task in self.tasks.items()}

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.config.data.image_size

    @property
    def size(self) -> str:
        """Space, image size, batch and tasks, in words."""
        height, width = self.image_size
        return (
            f"{self.space.name}, {height}x{width}, batch {self.config.search.batch_size}, "
            f"{len(self.tasks)} task{'s'[: len(self.tasks) - 1]}"
        )

    @cached_property
    def costs(self) -> SpaceCosts:
        """The table over the space."""
        return self.table.costs(self.space, self.out_channels)

    @property
    def target_ms(self) -> float:
        """The config's target, or the middle of the latencies where it lies outside of them."""
        low, high = self.costs.min_latency_ms, self.costs.max_latency_ms
        target_ms = self.config.latency.target_ms
        return target_ms if low <= target_ms <= high else (low + high) / 2

    @cached_property
    def table(self) -> LatencyTable:
        """Simulated for the space at this image size."""
        return simulate_table(self.space, self.image_size, self.out_channels)

    @cached_property
    def frames(self) -> PackedSplit:
        """Frames enough for a batch, stored as for a run."""
        batch_size = max(self.config.search.batch_size, self.config.retrain.batch_size)
        count = max(MIN_FRAMES, batch_size)
        data = replace(self.config.data, train_frames=count, test_frames=1)
        return load_data(data, self.tasks)[0]

    def search(self) -> OneShotSearch:
        """A new search."""
        return OneShotSearch(
            self.config.search,
            self.space,
            self.tasks,
            self.table,
            target_ms=self.target_ms,
            splits={"weights": self.frames, "alpha": self.frames},
            augmentation=self.config.data.augment,
            seed=self.config.seed,
            device=self.device,
        )

    def training(self, architecture: Architecture) -> StandAloneTraining:
        """A new stand-alone training."""
        return StandAloneTraining(
            self.config.retrain,
            self.space,
            architecture,
            self.tasks,
            self.frames,
            stage="bench",
            augmentation=self.config.data.augment,
            seed=self.config.seed,
            device=self.device,
        )

    def derived(self, count: int) -> list[Architecture]:
        """What a search may end in: drawn uniformly among those inside the target."""
        found = sample_within_budget(
            ArchitectureParameters(self.space),
            self.costs,
            target_ms=self.target_ms,
            num_samples=count,
            generator=numpy_generator(self.config.seed, "bench", "derived"),
        )
        return [one.architecture for one in found]


def widened(space: SearchSpace, factor: int) -> SearchSpace:
    """The space with all channels multiplied."""
    blocks = tuple(
        replace(
            spec,
            base=replace(spec.base, filters=factor * spec.base.filters),
            filters=tuple(factor * width for width in spec.filters),
        )
        for spec in space.blocks
    )
    return replace(
        space,
        name=f"{space.name} x{factor}",
        stem_filters=factor * space.stem_filters,
        blocks=blocks,
        fusion=replace(space.fusion, channels=factor * space.fusion.channels),
    )
