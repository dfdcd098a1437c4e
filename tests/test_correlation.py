"""Rank correlations against their definitions, and the laws that every rank correlation obeys."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from oneshot_ednas.correlation import kendall_tau, spearman

# Few distinct values, so that ties are common.
pairs = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=12)


def columns(values) -> tuple[np.ndarray, np.ndarray]:
    a, b = zip(*values, strict=True)
    assume(len(set(a)) > 1 and len(set(b)) > 1)
    return np.array(a, dtype=float), np.array(b, dtype=float)


def tau_by_definition(a, b) -> float:
    agree = differ = tied_a = tied_b = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        product = (a[i] - a[j]) * (b[i] - b[j])
        agree += product > 0
        differ += product < 0
        tied_a += a[i] == a[j]
        tied_b += b[i] == b[j]
    all_pairs = len(a) * (len(a) - 1) / 2
    return (agree - differ) / math.sqrt((all_pairs - tied_a) * (all_pairs - tied_b))


def rank_by_definition(values) -> list[float]:
    """The mean place of all equal values in the sorted list, from 1."""
    return [
        sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2
        for value in values
    ]


def spearman_by_definition(a, b) -> float:
    x, y = (np.array(rank_by_definition(values)) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))


@given(pairs)
def test_both_equal_their_definitions(values):
    a, b = columns(values)
    assert kendall_tau(a, b) == pytest.approx(tau_by_definition(a, b), abs=1e-12)
    assert spearman(a, b) == pytest.approx(spearman_by_definition(a, b), abs=1e-12)


@pytest.mark.parametrize("correlation", [spearman, kendall_tau])
@given(values=pairs, seed=st.integers(0, 1000))
def test_laws(correlation, values, seed):
    a, b = columns(values)
    value = correlation(a, b)
    assert -1 - 1e-12 <= value <= 1 + 1e-12
    assert correlation(b, a) == pytest.approx(value, abs=1e-12)
    assert correlation(a, a) == pytest.approx(1)
    assert correlation(-a, b) == pytest.approx(-value, abs=1e-12)
    assert correlation(np.exp(a) + a**3, b) == pytest.approx(value, abs=1e-12)
    order = np.random.default_rng(seed).permutation(len(a))
    assert correlation(a[order], b[order]) == pytest.approx(value, abs=1e-12)


def test_known_values():
    # One neighbouring pair swapped: (5 - 1) / 6, and 1 - 6 * 2 / (4 * 15).
    a, b = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])
    assert kendall_tau(a, b) == pytest.approx(2 / 3)
    assert spearman(a, b) == pytest.approx(0.8)
    # Ties: 5 of 6 pairs differ in a, all in b, and none is ordered apart.
    assert kendall_tau(np.array([7.0, 7, 8, 9]), a) == pytest.approx(5 / math.sqrt(30))
    assert spearman(np.array([7.0, 7, 8, 9]), a) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@pytest.mark.parametrize("correlation", [spearman, kendall_tau])
@pytest.mark.parametrize("a", [[], [1.0], [2.0, 2.0, 2.0]])
def test_ranks_that_say_nothing_give_none(correlation, a):
    a = np.array(a)
    other = np.arange(len(a), dtype=float)
    assert correlation(a, other) is None
    assert correlation(other, a) is None


@pytest.mark.parametrize("correlation", [spearman, kendall_tau])
def test_lists_of_different_lengths_are_refused(correlation):
    with pytest.raises(ValueError, match=r"two lists of one length, got shapes \(2,\) and \(1,\)"):
        correlation(np.array([1.0, 2.0]), np.array([1.0]))
