"""Task groupings against enumeration of everything that the tasks may take."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.sharing.groupings import (
    MAX_TASKS,
    all_groupings,
    bell_number,
    check_num_tasks,
    expected_groups,
    grouping_probabilities,
    refined,
    relabelled,
)

laws = settings(deadline=None, derandomize=True, max_examples=60)
labels = st.lists(st.integers(-3, 3), min_size=2, max_size=6)


def random_probabilities(num_tasks, num_layers, num_candidates, seed=0, scale=1.5) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    shape = (num_tasks, num_layers, num_candidates)
    return (scale * torch.randn(shape, generator=source, dtype=torch.float64)).softmax(-1)


def parts_of(grouping) -> set[frozenset[int]]:
    """As a set of sets of tasks: another notation, for comparisons."""
    return {
        frozenset(task for task, label in enumerate(grouping) if label == group)
        for group in set(grouping)
    }


def brute_force(probabilities: np.ndarray) -> list[dict[frozenset, float]]:
    """Per layer, the probability of each set partition, by all ways of all tasks.

    Task by task: what is kept of the tasks before are their ways, since only those matter.
    """
    num_tasks, num_layers, count = probabilities.shape
    found = []
    for layer in range(num_layers):
        ways = list(itertools.product(range(count), repeat=layer + 1))
        odds = np.array(
            [
                [np.prod([p[step, j] for step, j in enumerate(way)]) for way in ways]
                for p in probabilities
            ]
        )
        # Tasks together have the same way up to here: which one it is does not matter further.
        held: dict[tuple[int, ...], float] = {(): 1.0}
        for task in range(num_tasks):
            after: dict[tuple[int, ...], float] = {}
            for taken, p in held.items():
                for way in range(len(ways)):
                    key = (*taken, way)
                    after[key] = after.get(key, 0.0) + p * odds[task, way]
            held = after
        row: dict[frozenset, float] = {}
        for taken, p in held.items():
            key = frozenset(parts_of(taken))
            row[key] = row.get(key, 0.0) + p
        found.append(row)
    return found


def by_sums_over_ways(probabilities: np.ndarray) -> list[dict[frozenset, float]]:
    """The same for more ways than can be combined: parts take distinct ways.

    For parts g1..gk the sum over distinct ways w1..wk of prod_i P(all of g_i take w_i).
    """
    num_tasks, num_layers, count = probabilities.shape
    found = []
    for layer in range(num_layers):
        ways = itertools.product(range(count), repeat=layer + 1)
        odds = np.array(
            [
                [np.prod([p[step, j] for step, j in enumerate(w)]) for w in ways]
                for ways, p in (
                    (list(ways), p)
                    for ways, p in zip(itertools.tee(ways, num_tasks), probabilities, strict=True)
                )
            ]
        )
        row = {}
        for grouping in all_groupings(num_tasks):
            parts = [list(part) for part in parts_of(grouping)]
            tables = [odds[part].prod(0) for part in parts]
            grid = np.ones(())
            for table in tables:
                grid = grid[..., None] * table
            index = np.indices(grid.shape)
            for one, other in itertools.combinations(range(len(parts)), 2):
                grid = np.where(index[one] == index[other], 0.0, grid)
            row[frozenset(map(frozenset, parts))] = float(grid.sum())
        found.append(row)
    return found


def assert_equal_to(reference, probabilities: torch.Tensor, tolerance: float) -> None:
    num_tasks = probabilities.shape[0]
    found = grouping_probabilities(probabilities)
    counts = expected_groups(probabilities)
    for layer, row in enumerate(reference):
        for column, grouping in enumerate(all_groupings(num_tasks)):
            expected = row.get(frozenset(parts_of(grouping)), 0.0)
            assert abs(float(found[layer, column]) - expected) <= tolerance
        expected = sum(p * len(parts) for parts, p in row.items())
        assert abs(float(counts[layer]) - expected) <= 8 * tolerance
    assert len(reference) == found.shape[0] == counts.shape[0]


# Partitions ---------------------------------------------------------------------------------


def test_bell_numbers():
    """OEIS A000110."""
    assert [bell_number(n) for n in range(1, 9)] == [1, 2, 5, 15, 52, 203, 877, 4140]


@pytest.mark.parametrize("num_tasks", range(2, MAX_TASKS + 1))
def test_there_are_as_many_groupings_as_partitions(num_tasks):
    found = all_groupings(num_tasks)
    assert len(found) == len(set(found)) == bell_number(num_tasks)
    assert found[0] == (0,) * num_tasks
    assert found[-1] == tuple(range(num_tasks))
    assert all(relabelled(grouping) == grouping for grouping in found)


def test_groupings_of_three_tasks():
    assert set(all_groupings(3)) == {(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 1, 2)}


@pytest.mark.parametrize(
    ("num_tasks", "words"), [(1, ["at least 2", "1"]), (0, ["0"]), (8, ["8", "4,140", "7", "877"])]
)
def test_what_cannot_be_branched_is_refused(num_tasks, words):
    for refuse in (
        lambda: check_num_tasks(num_tasks),
        lambda: all_groupings(num_tasks),
        lambda: grouping_probabilities(torch.ones(num_tasks, 2, 3) / 3),
    ):
        with pytest.raises(ValueError, match="tasks") as caught:
            refuse()
        message = str(caught.value)
        assert all(word in message for word in words)
        assert "\n" not in message


@laws
@given(labels, labels)
def test_refined_is_the_meet_of_partitions(one, other):
    count = min(len(one), len(other))
    one, other = one[:count], other[:count]
    meet = {a & b for a in parts_of(one) for b in parts_of(other)} - {frozenset()}
    found = refined(one, other)
    assert parts_of(found) == meet
    assert found == relabelled(found)
    assert found == refined(other, one)
    assert parts_of(relabelled(one)) == parts_of(one)


# Probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tasks", "num_layers", "count"),
    [(2, 1, 2), (2, 4, 2), (2, 3, 3), (3, 1, 3), (3, 2, 3), (3, 4, 2), (4, 1, 4), (4, 3, 2)],
)
def test_probabilities_and_counts_equal_enumeration(num_tasks, num_layers, count):
    probabilities = random_probabilities(num_tasks, num_layers, count)
    reference = brute_force(probabilities.numpy())
    assert_equal_to(reference, probabilities, 1e-12)
    assert_equal_to(reference, probabilities.float(), 1e-6)


@pytest.mark.parametrize(
    ("num_tasks", "num_layers", "count"), [(2, 4, 4), (3, 4, 3), (4, 2, 4), (4, 4, 2)]
)
def test_probabilities_equal_sums_over_distinct_ways(num_tasks, num_layers, count):
    probabilities = random_probabilities(num_tasks, num_layers, count, seed=1)
    reference = by_sums_over_ways(probabilities.numpy())
    assert_equal_to(reference, probabilities, 1e-12)
    assert_equal_to(reference, probabilities.float(), 1e-6)


def test_probabilities_are_the_frequencies_of_samples():
    """Five tasks: too many ways to enumerate."""
    probabilities = random_probabilities(5, 3, 5, seed=2)
    generator = np.random.default_rng(0)
    count = 20_000
    draws = generator.random((count, 5, 3, 1))
    taken = (probabilities.numpy().cumsum(-1)[None, ..., :-1] < draws).sum(-1)
    found = grouping_probabilities(probabilities).numpy()
    ways = np.zeros((count, 5), dtype=int)
    columns = {grouping: i for i, grouping in enumerate(all_groupings(5))}
    for layer in range(3):
        ways = ways * 5 + taken[:, :, layer]
        seen = np.zeros(len(columns))
        for row in ways.tolist():
            seen[columns[relabelled(row)]] += 1
        error = np.sqrt(found[layer] * (1 - found[layer]) / count)
        assert (np.abs(seen / count - found[layer]) <= 5 * error + 1e-4).all()


@laws
@given(st.integers(2, 5), st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
def test_probabilities_are_those_of_a_tree(num_tasks, num_layers, count, seed):
    probabilities = random_probabilities(num_tasks, num_layers, count, seed=seed, scale=3.0)
    found = grouping_probabilities(probabilities)
    assert float(found.min()) > -1e-12
    torch.testing.assert_close(found.sum(1), torch.ones(num_layers, dtype=torch.float64))
    # Tasks that have parted stay apart.
    assert bool((found[:, 0].diff() <= 1e-12).all())
    assert bool((found[:, -1].diff() >= -1e-12).all())
    counts = expected_groups(probabilities)
    sizes = torch.tensor([max(g) + 1.0 for g in all_groupings(num_tasks)], dtype=torch.float64)
    torch.testing.assert_close(counts, found @ sizes)
    assert bool((counts.diff() >= -1e-12).all())


@laws
@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 99))
def test_one_hot_probabilities_give_the_sampled_grouping(num_tasks, num_layers, seed):
    taken = np.random.default_rng(seed).integers(num_tasks, size=(num_tasks, num_layers))
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(taken), num_tasks).double()
    found, counts = grouping_probabilities(one_hot), expected_groups(one_hot)
    for layer in range(num_layers):
        ways = [tuple(row[: layer + 1]) for row in taken.tolist()]
        grouping = relabelled([ways.index(way) for way in ways])
        expected = torch.zeros(bell_number(num_tasks), dtype=torch.float64)
        expected[all_groupings(num_tasks).index(grouping)] = 1
        assert torch.equal(found[layer], expected)
        assert float(counts[layer]) == max(grouping) + 1


def test_one_candidate_is_always_shared():
    one = torch.ones(3, 4, 1, dtype=torch.float64)
    assert torch.equal(expected_groups(one), torch.ones(4, dtype=torch.float64))
    assert torch.equal(grouping_probabilities(one)[:, 0], torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("num_tasks", [2, 3, 4])
def test_gradients_equal_finite_differences(num_tasks):
    source = torch.Generator().manual_seed(num_tasks)
    logits = torch.randn(num_tasks, 3, num_tasks, generator=source, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grouping_probabilities(x.softmax(-1)), logits)
    assert torch.autograd.gradcheck(lambda x: expected_groups(x.softmax(-1)), logits)
    # Of one-hot probabilities too, where products hold zeros.
    one_hot = torch.eye(num_tasks, dtype=torch.float64)[:, None].repeat(1, 3, 1).requires_grad_()
    assert torch.autograd.gradcheck(expected_groups, one_hot)
