"""Expected latency: one-hot, brute-force mean, bounds, and gradients."""

import numpy as np
import pytest
import torch
from conftest import (
    OUT_CHANNELS,
    SMALL_SPACE,
    all_latencies,
    brute_force,
    random_alpha,
    toy_table,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.latency.expected import expected_latency
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.relaxation import ArchitectureParameters, one_hot_gates
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace, ednas_b0, ednas_tiny

seeds = st.integers(0, 2**31 - 1)
SMALL = SearchSpace.from_yaml(SMALL_SPACE)
SPACES = [ednas_b0(), ednas_tiny(), SMALL]
IDS = [space.name for space in SPACES]

# Cache in bytes and streaming in ms per byte: never, always, and for some architectures.
STREAMING = {
    "ednas_b0": [(1e9, 1e-3), (0.0, 1e-6), (1.2e6, 2e-6)],
    "ednas_tiny": [(1e9, 1e-3), (0.0, 1e-5), (6e4, 2e-5)],
    "small": [(1e9, 1e-3), (0.0, 1e-4), (3.5e3, 2e-4)],
}
TABLES = {
    space.name: [
        toy_table(space, cache_bytes=cache, streaming_ms_per_byte=ms)
        for cache, ms in STREAMING[space.name]
    ]
    for space in SPACES
}


@pytest.mark.parametrize("which", range(3), ids=["fits", "streams", "straddles"])
@pytest.mark.parametrize("space", SPACES, ids=IDS)
@settings(max_examples=10)
@given(seed=seeds)
def test_expected_latency_of_one_hot_equals_the_architecture_s(space, which, seed):
    table = TABLES[space.name][which]
    architecture = space.sample(np.random.default_rng(seed))
    latency_ms = table.latency_ms(space, architecture)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        gates = one_hot_gates(space, architecture, dtype=dtype)
        expected = expected_latency(table, space, gates)
        assert expected.dtype == dtype
        assert expected.shape == ()
        assert expected.item() == pytest.approx(latency_ms, rel=tolerance)


def probabilities_of(alpha: ArchitectureParameters) -> np.ndarray:
    """Probability of every architecture of the small space, in the order of `brute_force`."""
    _, options = brute_force(SMALL)
    result = np.ones(len(options))
    for number, block in enumerate(alpha.log_probabilities()):
        for column in range(len(CHOICE_FIELDS)):
            result *= block[column].exp().numpy()[options[:, number, column]]
    return result


@pytest.mark.parametrize("which", [0, 1], ids=["fits", "streams"])
@settings(max_examples=10)
@given(seed=seeds, scale=st.sampled_from([0.0, 1.0, 5.0]))
def test_expected_latency_is_the_mean_over_all_architectures(which, seed, scale):
    table = TABLES["small"][which]
    alpha = random_alpha(SMALL, seed, scale).double()
    p = probabilities_of(alpha)
    assert p.sum() == pytest.approx(1)
    mean = (p * all_latencies(table.costs(SMALL))).sum()
    expected = expected_latency(table, SMALL, alpha.probabilities()).item()
    assert expected == pytest.approx(mean, rel=1e-6)


@settings(max_examples=10)
@given(seeds)
def test_where_the_cache_straddles_the_expectation_is_no_more_than_the_mean(seed):
    # Streaming is convex in the bytes, so pricing it at the mean bytes can only be lower.
    table = TABLES["small"][2]
    alpha = random_alpha(SMALL, seed).double()
    mean = (probabilities_of(alpha) * all_latencies(table.costs(SMALL))).sum()
    expected = expected_latency(table, SMALL, alpha.probabilities()).item()
    unstreamed = expected_latency(TABLES["small"][0], SMALL, alpha.probabilities()).item()
    assert unstreamed <= expected <= mean + 1e-9
    assert mean > unstreamed + 1e-6


@pytest.mark.parametrize("space", SPACES, ids=IDS)
def test_expected_latency_lies_between_the_least_and_the_largest(space):
    for table in TABLES[space.name]:
        costs = table.costs(space)
        for seed in range(5):
            alpha = random_alpha(space, seed, scale=3.0)
            expected = expected_latency(table, space, alpha.probabilities()).item()
            assert costs.min_latency_ms - 1e-4 <= expected <= costs.max_latency_ms + 1e-4


@pytest.mark.parametrize("which", range(3), ids=["fits", "streams", "straddles"])
@pytest.mark.parametrize("space", SPACES, ids=IDS)
def test_the_gradient_agrees_with_finite_differences(space, which):
    table = TABLES[space.name][which]
    alpha = random_alpha(space, 3).double()
    expected_latency(table, space, alpha.probabilities()).backward()
    gradient = alpha.logits.grad
    moved = random_alpha(space, 3).double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            moved.logits.data.copy_(alpha.logits.data + step * direction)
            with torch.no_grad():
                values.append(expected_latency(table, space, moved.probabilities()).item())
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx((gradient @ direction).item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("space", SPACES, ids=IDS)
def test_every_choice_gets_a_gradient_from_the_latency(space, hard):
    for table in TABLES[space.name]:
        alpha = random_alpha(space, 0)
        gates = alpha.gates(1.0, hard=hard, generator=torch.Generator().manual_seed(1))
        expected_latency(table, space, gates).backward()
        start = 0
        for choice in space.choices:
            gradient = alpha.logits.grad[start : start + len(choice.options)]
            start += len(choice.options)
            assert (gradient.abs() > 0).all(), choice.name


def test_hard_gates_cost_what_their_architecture_costs():
    space, table = ednas_tiny(), TABLES["ednas_tiny"][2]
    alpha = random_alpha(space, 1)
    for seed in range(5):
        gates = alpha.gates(1.0, hard=True, generator=torch.Generator().manual_seed(seed))
        indices = [int(v.argmax()) for block in gates for v in block if len(v) > 1]
        latency_ms = table.latency_ms(space, space.decode(indices))
        assert expected_latency(table, space, gates).item() == pytest.approx(latency_ms, rel=1e-5)


def test_other_tasks_change_the_constant_part_only():
    space = ednas_tiny()
    table = toy_table(space, out_channels={**OUT_CHANNELS, "normals": 3})
    p = random_alpha(space, 0).double().probabilities()
    more, fewer = expected_latency(table, space, p), expected_latency(table, space, p, OUT_CHANNELS)
    base = space.base_architecture
    difference = table.latency_ms(space, base) - table.latency_ms(space, base, OUT_CHANNELS)
    assert (more - fewer).item() == pytest.approx(difference, rel=1e-9)
    assert difference > 0


def test_a_fixed_space_costs_its_only_network():
    fixed = SMALL.fix(SMALL.base_architecture)
    p = ArchitectureParameters(fixed).double().probabilities()
    for table in TABLES["small"]:
        expected = expected_latency(table, fixed, p).item()
        latency_ms = table.latency_ms(SMALL, SMALL.base_architecture)
        # Probabilities of a space without choices are constants in float32's precision.
        assert expected == pytest.approx(latency_ms, rel=1e-5)


def test_a_first_call_in_inference_mode_does_not_spoil_later_gradients():
    table = toy_table(SMALL, seed=99)
    alpha = random_alpha(SMALL, 0)
    with torch.inference_mode():
        first = expected_latency(table, SMALL, alpha.probabilities()).item()
    second = expected_latency(table, SMALL, alpha.probabilities())
    second.backward()
    assert second.item() == first
    assert alpha.logits.grad.abs().sum() > 0


def test_a_missing_row_stops_the_expectation():
    table = toy_table(SMALL)
    rows = {o: row for o, row in table.rows.items() if o.op != "fused_ibn"}
    with pytest.raises(ValueError, match=r"no row in toy\.csv for fused_ibn k3 e1 8->8 at 16x24"):
        expected_latency(
            LatencyTable(table.header, rows, "toy.csv"),
            SMALL,
            random_alpha(SMALL, 0).probabilities(),
        )
