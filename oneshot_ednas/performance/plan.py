"""Sizes of the measurements, and the rows that they end in."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from oneshot_ednas.config import load_config
from oneshot_ednas.performance.timing import Spread
from oneshot_ednas.performance.workload import Workload

DEFAULT_CONFIGS = ("configs/demo.yaml", "configs/streets_256x256.yaml")
"""The shipped configs that need no data of the user's: the smallest run and the paper's space."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure beside its bound."""

    name: str
    what: str
    """What was measured, with its size."""
    measured: Spread
    unit: str
    """`x` for a ratio, `ms`, `s`, `%`, or `exponent`."""
    bound: float | None = None
    """None for a figure without one."""
    is_least: bool = False
    """Whether the bound is the least that holds, not the most."""
    details: Mapping[str, object] = field(default_factory=dict)
    """JSON-ready; for those who look closer."""

    @property
    def holds(self) -> bool | None:
        """Whether the median keeps the bound; None without one."""
        if self.bound is None:
            return None
        value = self.measured.median
        return value >= self.bound if self.is_least else value <= self.bound

    def to_json(self) -> dict[str, object]:
        """JSON-ready form."""
        return {
            "name": self.name,
            "what": self.what,
            "measured": self.measured.median,
            "low": self.measured.low,
            "high": self.measured.high,
            "repeats": self.measured.count,
            "unit": self.unit,
            "bound": self.bound,
            "is_least": self.is_least,
            "holds": self.holds,
            "details": dict(self.details),
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, how large and how often."""

    steps: Workload
    """Of the steps that are held against each other."""
    blocks: Workload
    """Of the relaxed blocks and their baseline; its batch is the one that counts."""
    defaults: Mapping[str, Workload]
    """Whole configs by name, at their own sizes."""
    timed: tuple[str, ...]
    """Which of them are timed whole; of the others, multiply-adds are counted."""
    growth: Workload
    """The smallest size of the growth measurements."""
    repeats: int
    num_architectures: int = 8
    num_steps: int = 4
    """Steps of the whole search that are timed in each of its phases."""
    num_draws: int = 32
    """Architectures behind a mean of multiply-adds."""
    num_latencies: int = 10_000
    num_candidates: int = 64
    """k of the derivation."""
    growth_factors: tuple[int, ...] = (1, 2, 4)
    is_judged: bool = True
    """Whether the figures are held against their bounds, which are made for full sizes."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.steps.device

    @property
    def profiled(self) -> list[Workload]:
        """Small and large, once each."""
        found = {one.size: one for one in (self.growth, self.steps)}
        return list(found.values())

    def repeated(self, repeats: int) -> "Plan":
        """The plan with another number of rounds."""
        return replace(self, repeats=repeats)

    @classmethod
    def full(cls, device: torch.device, *, repeats: int = 3) -> "Plan":
        """The plan behind `docs/performance.md`.

        On a CPU the batch of the paper's space is 16 instead of 32, to fit the memory of a small
        machine. It is no smaller, since with one thread torch runs the 1x1 convolutions of smaller
        batches by another, slower kernel.
        """
        demo, streets = (
            Workload(config=load_config(Path(name)), device=device) for name in DEFAULT_CONFIGS
        )
        large = streets.resized(batch_size=16) if device.type == "cpu" else streets
        return cls(
            steps=large,
            blocks=streets.resized(batch_size=16),
            defaults={"demo": demo, "streets_256x256": streets},
            timed=("demo",) if device.type == "cpu" else ("demo", "streets_256x256"),
            growth=demo,
            repeats=repeats,
        )

    @classmethod
    def quick(cls, device: torch.device, *, repeats: int = 1) -> "Plan":
        """Everything once, at sizes that say little: to see that it runs."""
        demo = Workload(config=load_config(Path(DEFAULT_CONFIGS[0])), device=device)
        return cls.tiny(demo.resized(batch_size=2, image_size=(32, 64)), repeats=repeats)

    @classmethod
    def tiny(cls, workload: Workload, *, repeats: int = 1) -> "Plan":
        """All of it on one workload."""
        return cls(
            steps=workload,
            blocks=workload,
            defaults={"tiny": workload},
            timed=("tiny",),
            growth=workload,
            repeats=repeats,
            num_architectures=2,
            num_steps=1,
            num_draws=2,
            num_latencies=100,
            num_candidates=4,
            growth_factors=(1, 2),
            is_judged=False,
        )
