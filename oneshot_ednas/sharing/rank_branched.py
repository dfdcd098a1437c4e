"""Derived branchings scored with the supergraph's weights, by the same reward as all networks."""

from collections.abc import Sequence
from dataclasses import dataclass

from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.models.network import recalibrate_bn
from oneshot_ednas.ranking import ScoringConfig
from oneshot_ednas.reward import reward
from oneshot_ednas.sharing.branched import (
    BranchedNetwork,
    branched_network,
    inherit_branched,
)
from oneshot_ednas.sharing.branching_search import BranchingSearch
from oneshot_ednas.sharing.derive_branched import DerivedBranching
from oneshot_ednas.training import Metrics, accuracy_of, calibration_images, evaluate


@dataclass(frozen=True, kw_only=True)
class RankedBranching:
    """A derived branching and its score with the supergraph's weights."""

    derived: DerivedBranching
    metrics: Metrics
    reward: float


def rank_branchings(
    found: Sequence[DerivedBranching],
    search: BranchingSearch,
    *,
    target: float,
    calibration: PackedSplit,
    validation: PackedSplit,
    config: ScoringConfig,
) -> list[RankedBranching]:
    """Candidates by the reward of EDNAS (eq. 4-7) on validation data, best first.

    Args:
        found: what to score, with inherited weights and BN statistics of its own.
        search: the supergraph and its tasks.
        target: of the reward, in the unit of the candidates' cost.
        calibration: frames for BN statistics.
        validation: frames to score on.
        config: batches and their size.
    """
    ranked = []
    for derived in found:
        network = inherited(search, derived)
        images = calibration_images(
            calibration,
            num_batches=config.calibration_batches,
            batch_size=config.batch_size,
            seed=search.seed,
            device=search.device,
        )
        recalibrate_bn(network, images)
        metrics = evaluate(
            network, validation, search.tasks, batch_size=config.batch_size, device=search.device
        )
        score = reward(accuracy_of(search.tasks, metrics), derived.cost, target)
        ranked.append(RankedBranching(derived=derived, metrics=metrics, reward=score))
    return sorted(ranked, key=lambda one: -one.reward)


def inherited(search: BranchingSearch, derived: DerivedBranching) -> BranchedNetwork:
    """The stand-alone network of a derived branching with the supergraph's weights."""
    channels = {name: task.out_channels for name, task in search.tasks.items()}
    network = branched_network(search.encoder, derived.branching, channels).to(search.device)
    inherit_branched(network, search.network, derived.candidates, derived.branching)
    return network
