"""Candidates scored with supernet weights."""

import pytest
import torch
from tiny import CPU, TARGET_MS

from oneshot_ednas.derive import BudgetSearch
from oneshot_ednas.models.network import derived_network, recalibrate_bn
from oneshot_ednas.ranking import DeriveConfig, rank_candidates, score_with_supernet
from oneshot_ednas.reward import reward
from oneshot_ednas.training import accuracy_of, calibration_images, evaluate

CONFIG = DeriveConfig(calibration_batches=2, batch_size=8)


@pytest.fixture(scope="module")
def searched(tiny):
    """A search after a few steps, its candidates, and the state that it had before scoring."""
    search = tiny.search(warmup_fraction=0.0, sandwich=True)
    for step in range(6):
        search.take_step(step)
    costs = tiny.table.costs(tiny.space, search.out_channels)
    found = BudgetSearch(search.alpha, costs).best(TARGET_MS, 4)
    before = {name: value.clone() for name, value in search.supernet.state_dict().items()}
    return search, found, before


def rank(tiny, search, found, target_ms=TARGET_MS):
    return rank_candidates(
        found,
        search.supernet,
        tiny.tasks,
        target_ms=target_ms,
        calibration=search.splits["weights"],
        validation=tiny.train.subset(range(24, 32)),
        config=CONFIG,
        seed=0,
        device=CPU,
    )


def test_candidates_come_by_reward_with_the_supernet_untouched(tiny, searched):
    search, found, before = searched
    ranked = rank(tiny, search, found)
    assert {c.derived for c in ranked} == set(found)
    rewards = [candidate.reward for candidate in ranked]
    assert rewards == sorted(rewards, reverse=True)
    assert len(set(rewards)) > 1
    for candidate in ranked:
        assert candidate.derived.latency_ms <= TARGET_MS
        assert candidate.accuracy == accuracy_of(tiny.tasks, candidate.metrics)
        assert candidate.reward == reward(candidate.accuracy, candidate.derived.latency_ms, 5.0)
    after = search.supernet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert search.supernet.training
    assert all(p.requires_grad for p in search.supernet.parameters())
    assert rank(tiny, search, found[::-1]) == ranked


def test_a_reward_above_the_target_is_lowered_by_the_latency(tiny, searched):
    search, found, _ = searched
    inside, above = (rank(tiny, search, found[:1], target_ms)[0] for target_ms in (5.0, 4.5))
    assert above.accuracy == inside.accuracy
    ratio = found[0].latency_ms / 4.5
    assert ratio > 1
    assert above.reward == pytest.approx(inside.reward * ratio**-0.07)


def test_scores_use_statistics_of_the_candidate_s_own(tiny, searched):
    search, found, _ = searched
    architecture = found[0].architecture
    validation = tiny.train.subset(range(24, 32))
    scored = score_with_supernet(
        search.supernet,
        architecture,
        tiny.tasks,
        calibration=search.splits["weights"],
        validation=validation,
        config=CONFIG,
        seed=0,
        device=CPU,
    )
    network = derived_network(search.supernet, architecture)
    stale = evaluate(network, validation, tiny.tasks, batch_size=8, device=CPU)
    images = calibration_images(
        search.splits["weights"], num_batches=2, batch_size=8, seed=0, device=CPU
    )
    recalibrate_bn(network, images)
    assert evaluate(network, validation, tiny.tasks, batch_size=8, device=CPU) == scored
    assert stale != scored


@pytest.mark.parametrize(
    "name", ["num_candidates", "calibration_batches", "batch_size", "num_budgets"]
)
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        DeriveConfig(**{name: 0})


def test_the_cost_of_a_score_is_that_of_its_forward_passes():
    assert CONFIG.scoring_macs(100, 50, 10) == 100 * (2 * 8 + 10)
    assert CONFIG.scoring_macs(100, 3, 10) == 100 * (2 * 3 + 10)  # batches of a small split
