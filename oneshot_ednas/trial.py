"""A trial: one architecture trained stand-alone for a while and scored on the validation split.

Multi-trial search pays for nothing else, the tabular benchmark is a table of trials, and the rank
correlation of a supernet is measured against them.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.latency.operations import network_macs
from oneshot_ednas.retrain import RetrainConfig, StandAloneTraining
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.tasks import Task
from oneshot_ednas.training import Metrics, evaluate, training_macs


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial returns and what it cost."""

    metrics: Metrics
    """On the validation split, at the end."""
    test_metrics: Metrics | None = None
    """On the test split, where the trainer has one; a search must not look at it."""
    curve: dict[int, Metrics] = field(default_factory=dict)
    """Validation metrics after some numbers of steps; the last is `metrics`."""
    seconds: float
    """Wall time, with scoring."""
    cpu_seconds: float
    """Time of this process on the processor, which other processes do not lengthen."""
    macs: float
    """Multiply-adds of the training, see `training_macs`."""


@dataclass(frozen=True, kw_only=True)
class StandAloneTrainer:
    """Trains architectures, one at a time, all in the same way."""

    config: RetrainConfig
    space: SearchSpace
    tasks: Mapping[str, Task]
    training: PackedSplit
    validation: PackedSplit
    test: PackedSplit | None = None
    augmentation: AugmentConfig
    eval_batch_size: int
    device: torch.device

    def __call__(
        self, architecture: Architecture, seed: int, scored_steps: Collection[int] = ()
    ) -> Outcome:
        """Train and score one architecture.

        Args:
            architecture: what to train.
            seed: of weights, order and augmentation.
            scored_steps: numbers of finished steps at which to score besides the end.

        Raises:
            RuntimeError: if a loss is not finite.
            ValueError: if the architecture is not in the space.
        """
        began, began_cpu = time.perf_counter(), time.process_time()
        training = StandAloneTraining(
            self.config,
            self.space,
            architecture,
            self.tasks,
            self.training,
            stage="trial",
            augmentation=self.augmentation,
            seed=seed,
            device=self.device,
        )
        curve: dict[int, Metrics] = {}
        for step in range(self.config.steps):
            training.take_step(step)
            done = step + 1
            if done == self.config.steps or done in scored_steps:
                training.recalibrate()
                curve[done] = self._score(training, self.validation)
                training.network.train()
        test = None if self.test is None else self._score(training, self.test)
        channels = {name: task.out_channels for name, task in self.tasks.items()}
        size = (self.training.height, self.training.width)
        forward = network_macs(self.space, architecture, size, channels)
        return Outcome(
            metrics=curve[self.config.steps],
            test_metrics=test,
            curve=curve,
            seconds=time.perf_counter() - began,
            cpu_seconds=time.process_time() - began_cpu,
            macs=training_macs(forward, self.config.steps * self.config.batch_size),
        )

    def _score(self, training: StandAloneTraining, split: PackedSplit) -> Metrics:
        return evaluate(
            training.network,
            split,
            self.tasks,
            batch_size=self.eval_batch_size,
            device=self.device,
        )
