"""Exact derivation: always inside the target, and equal to brute force on a small space."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import (
    SMALL_SPACE,
    all_latencies,
    brute_force,
    random_alpha,
    toy_table,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.derive import (
    BudgetSearch,
    derive_architectures,
    pareto_front,
    sample_within_budget,
)
from oneshot_ednas.latency.costs import SpaceCosts
from oneshot_ednas.relaxation import ArchitectureParameters, one_hot_gates
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace, ednas_b0, ednas_tiny

seeds = st.integers(0, 2**31 - 1)
SMALL = SearchSpace.from_yaml(SMALL_SPACE)

# Cache in bytes and streaming in ms per byte. Networks of the small space have 2.3 to 5.2 kB.
STREAMING = {
    "inactive": (1e9, 1e-3),
    "active": (0.0, 3e-4),
    "straddling": (3.5e3, 5e-4),
    "dear": (2.6e3, 5e-3),
}
TABLES = {
    (name, seed): toy_table(SMALL, cache_bytes=cache, streaming_ms_per_byte=ms, seed=seed)
    for name, (cache, ms) in STREAMING.items()
    for seed in range(3)
}
cases = pytest.mark.parametrize("streaming", STREAMING)


def log_probabilities_of(alpha: ArchitectureParameters) -> np.ndarray:
    """Log-probability of every architecture, in the order of `brute_force`."""
    _, options = brute_force(alpha.space)
    total = np.zeros(len(options))
    for number, block in enumerate(alpha.log_probabilities()):
        for column in range(len(CHOICE_FIELDS)):
            total += block[column].numpy()[options[:, number, column]]
    return total


def ranked(alpha: ArchitectureParameters, costs: SpaceCosts, target_ms: float) -> np.ndarray:
    """Numbers of the architectures inside the target: most probable first, then the faster."""
    latencies, log_p = all_latencies(costs), log_probabilities_of(alpha)
    inside = np.flatnonzero(latencies <= target_ms)
    # Rounding, since sums of the same terms in another order are equal only up to it.
    order = np.lexsort((latencies[inside], -np.round(log_p[inside], 9)))
    return inside[order]


def target_at(costs: SpaceCosts, fraction: float) -> float:
    """A target so that about this fraction of the architectures fits."""
    return float(np.quantile(all_latencies(costs), fraction))


def check_against_brute_force(alpha, costs, target_ms: float, k: int) -> None:
    found = BudgetSearch(alpha, costs).best(target_ms, k)
    order = ranked(alpha, costs, target_ms)
    latencies, log_p = all_latencies(costs), log_probabilities_of(alpha)
    assert len(found) == min(k, len(order))
    assert len({one.architecture for one in found}) == len(found)
    for one, number in zip(found, order, strict=False):
        assert one.latency_ms <= target_ms
        assert one.latency_ms == costs.latency_ms(one.architecture)
        assert one.log_probability == pytest.approx(log_p[number], abs=1e-7)
        assert one.latency_ms == pytest.approx(latencies[number], rel=1e-12)


@cases
@settings(max_examples=15)
@given(
    seed=seeds,
    table=st.integers(0, 2),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    fraction=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]),
    k=st.sampled_from([1, 2, 8, 40]),
)
def test_the_k_best_are_those_that_brute_force_finds(streaming, seed, table, scale, fraction, k):
    costs = TABLES[streaming, table].costs(SMALL)
    alpha = random_alpha(SMALL, seed, scale)
    check_against_brute_force(alpha, costs, target_at(costs, fraction), k)


@cases
@settings(max_examples=5)
@given(seed=seeds)
def test_partly_tied_logits_are_ordered_by_latency_within_a_tie(streaming, seed):
    costs = TABLES[streaming, 0].costs(SMALL)
    alpha = random_alpha(SMALL, seed)
    # Logits of a few levels: many architectures of equal probability.
    alpha.logits.data.copy_(alpha.logits.data.round())
    check_against_brute_force(alpha, costs, target_at(costs, 0.3), 12)


@cases
def test_with_zero_alpha_the_fastest_come_first(streaming):
    costs = TABLES[streaming, 1].costs(SMALL)
    found = BudgetSearch(ArchitectureParameters(SMALL), costs).best(math.inf, 10)
    expected = np.sort(all_latencies(costs))[:10]
    assert [one.latency_ms for one in found] == pytest.approx(expected, rel=1e-12)
    uniform = -math.log(SMALL.num_architectures)
    assert [one.log_probability for one in found] == pytest.approx([uniform] * 10)


@cases
def test_a_target_above_the_maximum_gives_the_argmax(streaming):
    table = TABLES[streaming, 0]
    for seed in range(5):
        alpha = random_alpha(SMALL, seed)
        for target_ms in (table.costs(SMALL).max_latency_ms, 1e9, math.inf):
            (best,) = derive_architectures(alpha, table, SMALL, target_ms=target_ms, k=1)
            assert best == alpha.argmax()


@cases
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_a_target_of_exactly_the_minimum_gives_the_fastest(streaming, scale):
    for table_seed in range(3):
        table = TABLES[streaming, table_seed]
        costs = table.costs(SMALL)
        alpha = random_alpha(SMALL, 5, scale)
        fastest = brute_force(SMALL)[0][int(all_latencies(costs).argmin())]
        gates = one_hot_gates(SMALL, fastest)
        # Alpha wishes for anything but the fastest.
        alpha.logits.data -= 20 * torch.cat([v for block in gates for v in block if len(v) > 1])
        found = derive_architectures(alpha, table, SMALL, target_ms=costs.min_latency_ms, k=3)
        assert costs.latency_ms(found[0]) == costs.min_latency_ms
        assert all(costs.latency_ms(one) <= costs.min_latency_ms for one in found)


@cases
def test_a_target_below_the_minimum_is_refused_with_both_figures(streaming):
    table = TABLES[streaming, 0]
    minimum_ms = table.costs(SMALL).min_latency_ms
    target_ms = 0.9 * minimum_ms
    message = (
        rf"target of {target_ms:.4g} ms is below the space's minimum of {minimum_ms:.4g} ms; "
        rf"raise the target or widen the space"
    )
    with pytest.raises(ValueError, match=message):
        derive_architectures(random_alpha(SMALL, 0), table, SMALL, target_ms=target_ms)
    with pytest.raises(ValueError, match=message):
        derive_architectures(random_alpha(SMALL, 0), table, SMALL, target_ms=target_ms, k=10**6)
    just_below = math.nextafter(minimum_ms, 0.0)
    with pytest.raises(ValueError, match="is below the space's minimum"):
        derive_architectures(random_alpha(SMALL, 0), table, SMALL, target_ms=just_below)


@cases
def test_a_k_beyond_the_feasible_ones_returns_them_all(streaming):
    costs = TABLES[streaming, 0].costs(SMALL)
    target_ms = target_at(costs, 0.02)
    feasible = int((all_latencies(costs) <= target_ms).sum())
    found = BudgetSearch(random_alpha(SMALL, 0), costs).best(target_ms, 10 * feasible)
    assert 10 < len(found) == feasible
    assert len({one.architecture for one in found}) == feasible
    scores = [one.log_probability for one in found]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_all_architectures_come_out_once_where_everything_fits(scale):
    costs = TABLES["straddling", 0].costs(SMALL)
    found = BudgetSearch(random_alpha(SMALL, 1, scale), costs).best(math.inf, 10**6)
    assert len({one.architecture for one in found}) == SMALL.num_architectures
    if scale < 1000:
        total = sum(math.exp(one.log_probability) for one in found)
        assert total == pytest.approx(1, abs=1e-9)


# Pareto front -------------------------------------------------------------------------------


def brute_front(alpha: ArchitectureParameters, costs: SpaceCosts) -> list[tuple[float, float]]:
    """(latency, log-probability) that nothing faster or equally fast matches, fastest first."""
    latencies, log_p = all_latencies(costs), np.round(log_probabilities_of(alpha), 9)
    front: list[tuple[float, float]] = []
    for number in np.lexsort((-log_p, latencies)):
        if not front or log_p[number] > front[-1][1]:
            front.append((latencies[number], log_p[number]))
    return front


@cases
@settings(max_examples=8)
@given(
    seed=seeds,
    table=st.integers(0, 2),
    scale=st.sampled_from([0.0, 0.5, 3.0]),
    rounded=st.booleans(),
)
def test_the_pareto_front_is_the_one_that_brute_force_finds(streaming, seed, table, scale, rounded):
    alpha = random_alpha(SMALL, seed, scale)
    if rounded:
        alpha.logits.data.copy_(alpha.logits.data.round())
    table = TABLES[streaming, table]
    front = pareto_front(alpha, table, SMALL)
    expected = brute_front(alpha, table.costs(SMALL))
    assert [one.latency_ms for one in front] == pytest.approx([ms for ms, _ in expected])
    got = [one.log_probability for one in front]
    assert got == pytest.approx([log_p for _, log_p in expected], abs=1e-7)


@cases
def test_a_front_of_few_budgets_is_part_of_the_whole(streaming):
    table, alpha = TABLES[streaming, 0], random_alpha(SMALL, 2)
    whole = pareto_front(alpha, table, SMALL)
    for num_budgets in (1, 2, 5, 50):
        few = pareto_front(alpha, table, SMALL, num_budgets=num_budgets)
        assert {one.architecture for one in few} <= {one.architecture for one in whole}
        assert few[-1].architecture == alpha.argmax()
        assert few[0].latency_ms == table.costs(SMALL).min_latency_ms
        assert len(few) <= num_budgets + 1
        for faster, slower in pairwise(few):
            assert faster.latency_ms < slower.latency_ms
            assert faster.log_probability < slower.log_probability


def test_the_front_of_zero_alpha_is_the_fastest_alone():
    for name in STREAMING:
        table = TABLES[name, 0]
        (only,) = pareto_front(ArchitectureParameters(SMALL), table, SMALL)
        assert only.latency_ms == table.costs(SMALL).min_latency_ms


# The shipped spaces -------------------------------------------------------------------------

SHIPPED = {
    "tiny fits": toy_table(ednas_tiny(), (64, 64), 1e9, 1e-3),
    "tiny straddles": toy_table(ednas_tiny(), (64, 64), 6e4, 2e-5),
    "b0 fits": toy_table(ednas_b0(), (64, 64), 1e9, 1e-3),
    "b0 straddles": toy_table(ednas_b0(), (64, 64), 1.2e6, 2e-6),
}


@pytest.mark.parametrize("name", SHIPPED)
@settings(max_examples=5)
@given(seed=seeds, fraction=st.floats(0, 1), scale=st.sampled_from([0.0, 0.01, 1.0, 10.0]))
def test_derived_architectures_never_exceed_the_target(name, seed, fraction, scale):
    space = ednas_tiny() if name.startswith("tiny") else ednas_b0()
    table = SHIPPED[name]
    costs = table.costs(space)
    spread = costs.max_latency_ms - costs.min_latency_ms
    target_ms = costs.min_latency_ms + fraction * spread
    alpha = random_alpha(space, seed, scale)
    found = derive_architectures(alpha, table, space, target_ms=target_ms)
    assert 1 <= len(found) <= 8
    assert all(architecture in space for architecture in found)
    assert all(table.latency_ms(space, architecture) <= target_ms for architecture in found)
    log_p = [alpha.log_probability(architecture).item() for architecture in found]
    assert all(a >= b - 1e-3 for a, b in pairwise(log_p))
    # No architecture that random search finds inside the target is more probable.
    generator = np.random.default_rng(seed)
    for _ in range(20):
        other = space.sample(generator)
        if table.latency_ms(space, other) <= target_ms:
            assert alpha.log_probability(other).item() <= log_p[0] + 1e-3


@pytest.mark.parametrize("name", SHIPPED)
def test_one_mutation_never_improves_the_best(name):
    space = ednas_tiny() if name.startswith("tiny") else ednas_b0()
    table, alpha = SHIPPED[name], random_alpha(space, 7)
    costs = table.costs(space)
    target_ms = 0.6 * costs.min_latency_ms + 0.4 * costs.max_latency_ms
    best = derive_architectures(alpha, table, space, target_ms=target_ms, k=1)[0]
    score = alpha.double().log_probability(best).item()
    indices = space.encode(best)
    for which, choice in enumerate(space.choices):
        for option in range(len(choice.options)):
            other = space.decode((*indices[:which], option, *indices[which + 1 :]))
            if table.latency_ms(space, other) <= target_ms:
                assert alpha.log_probability(other).item() <= score + 1e-9


def test_a_fixed_space_derives_its_only_network():
    fixed = SMALL.fix(SMALL.base_architecture)
    table = TABLES["straddling", 0]
    alpha = ArchitectureParameters(fixed)
    assert derive_architectures(alpha, table, fixed, target_ms=1e9) == [SMALL.base_architecture]
    (only,) = pareto_front(alpha, table, fixed)
    assert only.log_probability == 0


def test_derivation_does_not_change_alpha():
    alpha = random_alpha(SMALL, 0)
    before = alpha.logits.detach().clone()
    derive_architectures(alpha, TABLES["active", 0], SMALL, target_ms=1e9)
    assert torch.equal(alpha.logits, before)
    assert alpha.logits.grad is None


@pytest.mark.parametrize("k", [0, -1])
def test_a_k_below_one_is_refused(k):
    with pytest.raises(ValueError, match=f"k: expected at least 1, got {k}"):
        derive_architectures(random_alpha(SMALL, 0), TABLES["active", 0], SMALL, target_ms=1e9, k=k)


def test_alpha_of_another_space_is_refused():
    table = TABLES["active", 0]
    with pytest.raises(ValueError, match="alpha is of space ednas_tiny, the costs are of small"):
        derive_architectures(ArchitectureParameters(ednas_tiny()), table, SMALL, target_ms=1e9)


# Samples ------------------------------------------------------------------------------------


def test_samples_are_inside_the_target_with_the_probability_of_alpha(small_space):
    table = toy_table(small_space, cache_bytes=2000.0, streaming_ms_per_byte=1e-4)
    costs = table.costs(small_space)
    alpha = random_alpha(small_space, seed=3)
    target = 0.7 * costs.min_latency_ms + 0.3 * costs.max_latency_ms
    drawn = sample_within_budget(
        alpha, costs, target_ms=target, num_samples=20, generator=np.random.default_rng(0)
    )
    assert len(drawn) == 20
    assert len({one.architecture for one in drawn}) > 5
    for one in drawn:
        assert one.latency_ms == costs.latency_ms(one.architecture) <= target
        expected = float(alpha.log_probability(one.architecture).detach())
        assert one.log_probability == pytest.approx(expected, abs=1e-5)


def test_without_a_budget_samples_follow_softmax_of_alpha(small_space):
    costs = toy_table(small_space).costs(small_space)
    alpha = random_alpha(small_space, seed=1)
    drawn = sample_within_budget(
        alpha, costs, target_ms=math.inf, num_samples=300, generator=np.random.default_rng(0)
    )
    rows = [small_space.encode(one.architecture) for one in drawn]
    expected = alpha.padded_logits().detach().softmax(1).numpy()
    for place, choice in enumerate(small_space.choices):
        share = np.bincount([row[place] for row in rows], minlength=len(choice.options)) / 300
        # Four standard errors of a share.
        assert np.abs(share - expected[place, : len(choice.options)]).max() < 4 * 0.5 / 300**0.5


def test_samples_of_an_impossible_target_are_refused(small_space):
    costs = toy_table(small_space).costs(small_space)
    with pytest.raises(ValueError, match="is below the space's minimum"):
        sample_within_budget(
            random_alpha(small_space, seed=0),
            costs,
            target_ms=0.9 * costs.min_latency_ms,
            num_samples=1,
            generator=np.random.default_rng(0),
        )
