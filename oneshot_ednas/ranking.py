"""Candidates scored with supernet weights, by the same reward as evolution."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.derive import DerivedArchitecture
from oneshot_ednas.models.network import Network, inherit_weights, recalibrate_bn
from oneshot_ednas.retrain import RetrainConfig, StandAloneTraining
from oneshot_ednas.reward import reward
from oneshot_ednas.tasks import Task
from oneshot_ednas.training import (
    Metrics,
    OptimizerConfig,
    accuracy_of,
    calibration_images,
    evaluate,
    training_macs,
)


@dataclass(frozen=True, kw_only=True)
class DeriveConfig:
    """From alpha to the architecture that is retrained."""

    num_candidates: int = 8
    """How many of the most probable architectures within the target are ranked."""
    num_samples: int = 24
    """Further candidates drawn by alpha inside the target: after a short search the most probable
    architectures are near copies of each other, and alpha is less sure than their order says."""
    adaptation_steps: int = 20
    """Training steps of each candidate, from its inherited weights, before it is scored; 0 scores
    them as they are. Weights that serve all architectures make them look more alike than they
    are; a few steps of their own show much of the difference."""
    adaptation_batch_size: int = 16
    adaptation: OptimizerConfig = OptimizerConfig(learning_rate=4e-3, warmup_fraction=0.25)
    """The optimizer of these steps."""
    calibration_batches: int = 8
    """Batches behind the BN statistics of each candidate."""
    batch_size: int = 32
    num_budgets: int = 64
    """Points of the Pareto front in the report."""

    def __post_init__(self) -> None:
        """Counts are positive; there may be no samples and no adaptation."""
        least = dict.fromkeys(("num_samples", "adaptation_steps"), 0)
        for name in ("num_candidates", "adaptation_batch_size", "calibration_batches"):
            least[name] = 1
        for name, smallest in (least | {"batch_size": 1, "num_budgets": 1}).items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {getattr(self, name)}")

    def scoring_macs(self, forward_macs: int, num_training: int, num_validation: int) -> float:
        """Multiply-adds of one score: adaptation, BN statistics, validation.

        Args:
            forward_macs: of the candidate, for one image.
            num_training: frames of the split that it adapts to.
            num_validation: frames that it is scored on.
        """
        calibration = self.calibration_batches * min(self.batch_size, num_training)
        batch = min(self.adaptation_batch_size, num_training)
        adaptation = training_macs(forward_macs, self.adaptation_steps * batch)
        return adaptation + forward_macs * (calibration + num_validation)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A derived architecture and its score with supernet weights."""

    derived: DerivedArchitecture
    metrics: Metrics
    accuracy: float
    reward: float


def score_with_supernet(
    supernet: Network,
    architecture: Architecture,
    tasks: Mapping[str, Task],
    *,
    calibration: PackedSplit,
    validation: PackedSplit,
    config: DeriveConfig,
    seed: int,
    device: torch.device,
) -> Metrics:
    """Metrics of an architecture with inherited weights and BN statistics of its own.

    The supernet stays as it is, also where the inherited weights adapt.

    Args:
        supernet: the trained supernet.
        architecture: what to score.
        tasks: the tasks.
        calibration: frames for adaptation and BN statistics: the weight split.
        validation: what is scored on.
        config: adaptation, batches and their size.
        seed: of the order of the frames.
        device: where to compute.

    Raises:
        RuntimeError: if a loss of the adaptation is not finite.
    """
    training = StandAloneTraining(
        RetrainConfig(
            steps=max(config.adaptation_steps, 1),
            batch_size=min(config.adaptation_batch_size, len(calibration)),
            optimizer=config.adaptation,
        ),
        supernet.space,
        architecture,
        tasks,
        calibration,
        stage="adaptation",
        augmentation=AugmentConfig(),
        seed=seed,
        device=device,
    )
    network = training.network
    inherit_weights(network, supernet, architecture)
    for step in range(config.adaptation_steps):
        training.take_step(step)
    images = calibration_images(
        calibration,
        num_batches=config.calibration_batches,
        batch_size=config.batch_size,
        seed=seed,
        device=device,
    )
    recalibrate_bn(network, images)
    return evaluate(network, validation, tasks, batch_size=config.batch_size, device=device)


def rank_candidates(
    found: Sequence[DerivedArchitecture],
    supernet: Network,
    tasks: Mapping[str, Task],
    *,
    target_ms: float,
    calibration: PackedSplit,
    validation: PackedSplit,
    config: DeriveConfig,
    seed: int,
    device: torch.device,
) -> list[Candidate]:
    """Candidates by the reward that evolution uses (EDNAS eq. 4-7), best first."""
    ranked = []
    for derived in found:
        metrics = score_with_supernet(
            supernet,
            derived.architecture,
            tasks,
            calibration=calibration,
            validation=validation,
            config=config,
            seed=seed,
            device=device,
        )
        accuracy = accuracy_of(tasks, metrics)
        ranked.append(
            Candidate(
                derived=derived,
                metrics=metrics,
                accuracy=accuracy,
                reward=reward(accuracy, derived.latency_ms, target_ms),
            )
        )
    return sorted(ranked, key=lambda candidate: -candidate.reward)
