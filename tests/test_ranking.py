"""Candidates scored with supernet weights."""

from dataclasses import replace

import pytest
import torch
from tiny import CPU, TARGET_MS

from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.derive import BudgetSearch
from oneshot_ednas.models.network import derived_network, inherit_weights, recalibrate_bn
from oneshot_ednas.ranking import DeriveConfig, rank_candidates, score_with_supernet
from oneshot_ednas.retrain import RetrainConfig, StandAloneTraining
from oneshot_ednas.reward import reward
from oneshot_ednas.training import accuracy_of, calibration_images, evaluate

CONFIG = DeriveConfig(
    calibration_batches=2, batch_size=8, adaptation_steps=2, adaptation_batch_size=4
)


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


def score(tiny, search, architecture, **settings):
    return score_with_supernet(
        search.supernet,
        architecture,
        tiny.tasks,
        calibration=search.splits["weights"],
        validation=tiny.train.subset(range(24, 32)),
        config=replace(CONFIG, **settings),
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
    scored = score(tiny, search, architecture, adaptation_steps=0)
    network = derived_network(search.supernet, architecture)
    stale = evaluate(network, validation, tiny.tasks, batch_size=8, device=CPU)
    images = calibration_images(
        search.splits["weights"], num_batches=2, batch_size=8, seed=0, device=CPU
    )
    recalibrate_bn(network, images)
    assert evaluate(network, validation, tiny.tasks, batch_size=8, device=CPU) == scored
    assert stale != scored


def test_adaptation_trains_a_copy_on_the_weight_split(tiny, searched):
    search, found, before = searched
    architecture = found[0].architecture
    weights = search.splits["weights"]
    scores = [score(tiny, search, architecture, adaptation_steps=n) for n in (0, 3, 3)]
    assert scores[0] != scores[1] == scores[2]
    training = StandAloneTraining(
        RetrainConfig(steps=3, batch_size=4, optimizer=CONFIG.adaptation),
        tiny.space,
        architecture,
        tiny.tasks,
        weights,
        stage="",
        augmentation=AugmentConfig(),
        seed=0,
        device=CPU,
    )
    inherit_weights(training.network, search.supernet, architecture)
    for step in range(3):
        training.take_step(step)
    images = calibration_images(weights, num_batches=2, batch_size=8, seed=0, device=CPU)
    recalibrate_bn(training.network, images)
    validation = tiny.train.subset(range(24, 32))
    by_hand = evaluate(training.network, validation, tiny.tasks, batch_size=8, device=CPU)
    assert scores[1] == by_hand
    after = search.supernet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_cost_of_a_score_is_that_of_its_passes():
    # 2 steps of 4 frames forward and backward, 2 batches of 8 and 10 frames forward.
    assert CONFIG.scoring_macs(100, 50, 10) == 100 * (3 * 8 + 16 + 10)
    # A split of 3 frames cuts the batches.
    assert CONFIG.scoring_macs(100, 3, 10) == 100 * (3 * 2 * 3 + 2 * 3 + 10)
    assert replace(CONFIG, adaptation_steps=0).scoring_macs(100, 50, 10) == 100 * (16 + 10)


def test_a_negative_number_of_adaptation_steps_is_refused():
    with pytest.raises(ValueError, match="adaptation_steps: expected at least 0, got -1"):
        DeriveConfig(adaptation_steps=-1)


@pytest.mark.parametrize(
    "name",
    [
        "num_candidates",
        "adaptation_batch_size",
        "calibration_batches",
        "batch_size",
        "num_budgets",
    ],
)
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        DeriveConfig(**{name: 0})
