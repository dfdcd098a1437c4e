"""Candidates scored with supernet weights, by the same reward as evolution."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.derive import DerivedArchitecture
from oneshot_ednas.models.network import Network, derived_network, recalibrate_bn
from oneshot_ednas.reward import reward
from oneshot_ednas.tasks import Task
from oneshot_ednas.training import Metrics, accuracy_of, calibration_images, evaluate


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How candidates are scored with inherited weights."""

    calibration_batches: int = 8
    """Batches behind the BN statistics of each candidate."""
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Counts are positive."""
        for name in ("calibration_batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DeriveConfig(ScoringConfig):
    """From alpha to the architecture that is retrained."""

    num_candidates: int = 8
    """How many of the most probable architectures within the target are ranked."""
    num_samples: int = 24
    """Further candidates drawn by alpha inside the target: after a short search the most probable
    architectures are near copies of each other, and alpha is less sure than their order says."""
    num_budgets: int = 64
    """Points of the Pareto front in the report."""

    def __post_init__(self) -> None:
        """Counts are positive, or 0 for no samples."""
        super().__post_init__()
        if self.num_samples < 0:
            raise ValueError(f"num_samples: expected 0 or more, got {self.num_samples}")
        for name in ("num_candidates", "num_budgets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def scoring_macs(self, forward_macs: int, num_calibration: int, num_validation: int) -> int:
        """Multiply-adds of one score: forward passes for BN statistics and validation.

        Args:
            forward_macs: of the candidate, for one image.
            num_calibration: frames of the split behind the BN statistics.
            num_validation: frames that it is scored on.
        """
        batches = self.calibration_batches * min(self.batch_size, num_calibration)
        return forward_macs * (batches + num_validation)


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

    Args:
        supernet: the trained supernet.
        architecture: what to score.
        tasks: the tasks.
        calibration: images for the BN statistics: the weight split.
        validation: what is scored on.
        config: batches and their size.
        seed: of the calibration images.
        device: where to compute.
    """
    network = derived_network(supernet, architecture)
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
