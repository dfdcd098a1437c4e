"""Task groupings: set partitions, how probable each is, and how often a layer is computed.

Every task takes one candidate of every layer, independently, with probabilities `[tasks, layers,
candidates]`. Tasks share a layer where their candidates agree in it and in all layers before.

Source: BMTAS (Bruggemann et al., BMVC 2020), section 3.3, eq. 5-6. Its recursion over ancestor
groupings takes a product form on the events "shared at least as in this grouping", because those
need the same agreements in every layer:

    P(layer l shares at least as in g) = P(layer l - 1 shares at least as in g) * prod_{parts of g}
                                         P(the tasks of the part agree in layer l)

from which Moebius inversion over the lattice of partitions gives the exact groupings. What a layer
is expected to cost needs no partitions at all: by inclusion and exclusion over sets of tasks, the
number of distinct ways that tasks take to a layer is the alternating sum over sets of the
probability that the set's tasks take one.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAX_TASKS = 7
"""Of most tasks there are 877 groupings, 4,140 with one more."""

Grouping = tuple[int, ...]
"""Each task's group, numbered by first appearance: (0, 1, 0) has tasks 1 and 3 together."""


def bell_number(num_tasks: int) -> int:
    """How many groupings there are of this many tasks."""
    row = [1]
    for _ in range(num_tasks - 1):
        row = list(itertools.accumulate([row[-1], *row]))
    return row[-1]


def check_num_tasks(num_tasks: int) -> None:
    """Refuse what cannot be branched.

    Raises:
        ValueError: for fewer than two tasks, or more than `MAX_TASKS`.
    """
    if num_tasks < 2:
        raise ValueError(f"sharing is between tasks: expected at least 2, got {num_tasks}")
    if num_tasks > MAX_TASKS:
        raise ValueError(
            f"{num_tasks} tasks have {bell_number(num_tasks):,} groupings (their Bell number); the "
            f"limit is {MAX_TASKS} tasks with {bell_number(MAX_TASKS)}; search with fewer tasks"
        )


def relabelled(labels: Sequence[int]) -> Grouping:
    """The grouping of any labels, in order of first appearance."""
    order: dict[int, int] = {}
    return tuple(order.setdefault(label, len(order)) for label in labels)


def refined(coarse: Sequence[int], labels: Sequence[int]) -> Grouping:
    """Tasks together in both."""
    pairs = list(zip(coarse, labels, strict=True))
    order = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    return tuple(order[pair] for pair in pairs)


@cache
def all_groupings(num_tasks: int) -> tuple[Grouping, ...]:
    """Every grouping, all tasks together first, all apart last.

    Raises:
        ValueError: for fewer than two tasks, or more than `MAX_TASKS`.
    """
    check_num_tasks(num_tasks)
    found: list[Grouping] = [(0,)]
    for _ in range(num_tasks - 1):
        found = [(*head, label) for head in found for label in range(max(head) + 2)]
    return tuple(found)


def set_agreement(
    probabilities: Float[Tensor, "tasks layers candidates"],
) -> Float[Tensor, "sets layers candidates"]:
    """Probability that all tasks of a set take a candidate, for all sets.

    A set's index has a bit per task; the empty set has ones.
    """
    sets = torch.ones_like(probabilities[:1])
    for task in probabilities:
        sets = torch.cat([sets, sets * task])
    return sets


@cache
def set_signs(num_tasks: int) -> Float[Tensor, " sets"]:
    """Of inclusion and exclusion: 1 for sets of odd size, -1 for even ones, 0 for the empty set."""
    sizes = torch.tensor([index.bit_count() for index in range(2**num_tasks)])
    return torch.where(sizes == 0, 0.0, 1.0 - 2.0 * ((sizes + 1) % 2)).double()


def agreement(sets: Float[Tensor, "sets layers candidates"]) -> Float[Tensor, "sets layers"]:
    """Probability that all tasks of a set agree in a layer, from `set_agreement`."""
    # The empty set and single tasks always do; sums of probabilities may miss 1 by rounding.
    return torch.where(_is_trivial(sets.shape[0])[:, None].to(sets.device), 1.0, sets.sum(-1))


def shared_so_far(sets: Float[Tensor, "sets layers candidates"]) -> Float[Tensor, "sets layers"]:
    """Probability that all tasks of a set agree in a layer and all before it."""
    return agreement(sets).cumprod(1)


def expected_groups(
    probabilities: Float[Tensor, "tasks layers candidates"],
) -> Float[Tensor, " layers"]:
    """How often each layer is expected to be computed, from 1 to the number of tasks.

    Equal to the sum over groupings of their probability times their number of groups (eq. 5 with
    c(k, l) = number of groups), without going through them.
    """
    shared = shared_so_far(set_agreement(probabilities))
    signs = set_signs(probabilities.shape[0]).to(probabilities)
    return signs @ shared


def grouping_probabilities(
    probabilities: Float[Tensor, "tasks layers candidates"],
) -> Float[Tensor, "layers groupings"]:
    """Probability of each of `all_groupings` in each layer (eq. 6), with gradient.

    Args:
        probabilities: of each task's candidates; sums to one over candidates.

    Raises:
        ValueError: for fewer than two tasks, or more than `MAX_TASKS`.
    """
    num_tasks = probabilities.shape[0]
    parts, moebius = _lattice(num_tasks)
    agreed = agreement(set_agreement(probabilities))
    at_least = agreed[parts.to(agreed.device)].prod(1).cumprod(1)
    return (moebius.to(at_least) @ at_least).T


@cache
def _is_trivial(num_sets: int) -> Bool[Tensor, " sets"]:
    return torch.tensor([index.bit_count() < 2 for index in range(num_sets)])


@cache
def _lattice(
    num_tasks: int,
) -> tuple[Int[Tensor, "groupings tasks"], Float[Tensor, "groupings groupings"]]:
    """The parts of each grouping as indices of sets, and the Moebius function.

    Parts are filled up with the empty set.

    The function of a grouping and a coarser one is the product over the parts of the coarser of
    (-1)^(n-1) (n-1)!, where n parts of the finer make up the part.
    """
    found = all_groupings(num_tasks)
    parts = torch.zeros(len(found), num_tasks, dtype=torch.long)
    for row, grouping in enumerate(found):
        for task, label in enumerate(grouping):
            parts[row, label] += 2**task
    moebius = torch.zeros(len(found), len(found), dtype=torch.float64)
    for row, fine in enumerate(found):
        # A coarser grouping is a grouping of the finer one's parts.
        for joined in all_groupings(max(fine) + 1) if max(fine) > 0 else ((0,),):
            coarse = relabelled([joined[label] for label in fine])
            sizes = [joined.count(label) for label in set(joined)]
            value = math.prod((-1) ** (n - 1) * math.factorial(n - 1) for n in sizes)
            moebius[row, found.index(coarse)] = value
    return parts, moebius
