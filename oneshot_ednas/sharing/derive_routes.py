"""The most probable routes inside a budget, by dynamic programming over groupings and layers."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from oneshot_ednas.sharing.groupings import Grouping, all_groupings, refined, relabelled

Array = npt.NDArray[np.float64]
Candidates = tuple[tuple[int, ...], ...]
"""`[tasks][layers]`: the candidate that each task takes in each layer."""

NUM_BINS = 1024
"""Parts of the slack; a result may leave one per layer and group unspent."""
ROUNDING = 1e-9
"""Share of a bin, or of the target, that float rounding may add; the last check is exact."""
PREFERENCE = 1e-9
"""Log-probability that a unit of cost is worth: of equally probable networks, the cheaper."""

Part = tuple[tuple[int, ...], Grouping]
"""Tasks that were together, and how they part."""


def best_routes(log_p: Array, layer_costs: Array, slack: float) -> Candidates:
    """The most probable candidates whose branching spends no more than the slack.

    Args:
        log_p: `[tasks, layers, candidates]`.
        layer_costs: `[layers]`: what each computation of a layer beyond the first costs.
        slack: what may be spent beyond the fully shared network, 0 or more.

    Returns:
        `[tasks][layers]`.
    """
    num_tasks, num_layers, _ = log_p.shape
    groupings, pairs = all_groupings(num_tasks), _refinements(num_tasks)
    bin_cost = max(slack, 1e-300) / NUM_BINS
    assignments = [_best_assignments(log_p[:, layer]) for layer in range(num_layers)]

    def step(layer: int, fine: int, parts: Sequence[Part]) -> tuple[float, int]:
        """Value of a layer's grouping, and what it spends in bins."""
        extra = float(layer_costs[layer]) * max(groupings[fine])
        score = sum(assignments[layer][part][0] for part in parts) - PREFERENCE * extra
        return score, bins_of(extra, bin_cost)

    # Best value of the layers from one on, per grouping before it and bins left.
    rest = np.zeros((len(groupings), NUM_BINS + 1))
    tables = [rest]
    for layer in range(num_layers - 1, -1, -1):
        best = np.full_like(rest, -np.inf)
        for coarse, fine, parts in pairs:
            score, spent = step(layer, fine, parts)
            if spent <= NUM_BINS:
                window = best[coarse, spent:]
                np.maximum(window, score + rest[fine, : NUM_BINS + 1 - spent], out=window)
        rest = best
        tables.insert(0, rest)
    grouping, left = 0, NUM_BINS
    routes = np.zeros((num_tasks, num_layers), dtype=int)
    for layer in range(num_layers):
        value, after, spent, taken = -math.inf, 0, 0, dict[int, int]()
        for coarse, fine, parts in pairs:
            score, bins = step(layer, fine, parts)
            if coarse != grouping or bins > left:
                continue
            if score + tables[layer + 1][fine, left - bins] > value:
                value, after, spent = (
                    float(score + tables[layer + 1][fine, left - bins]),
                    fine,
                    bins,
                )
                taken = {t: j for part in parts for t, j in assignments[layer][part][1].items()}
        grouping, left = after, left - spent
        routes[list(taken), layer] = list(taken.values())
    return tuple(tuple(route) for route in routes.tolist())


@functools.cache
def _refinements(num_tasks: int) -> tuple[tuple[int, int, tuple[Part, ...]], ...]:
    """Groupings and finer ones, by index, with how each group of the coarser parts."""
    groupings = all_groupings(num_tasks)
    pairs = []
    for c, coarse in enumerate(groupings):
        for f, fine in enumerate(groupings):
            if refined(coarse, fine) != fine:
                continue
            parts = []
            for group in range(max(coarse) + 1):
                members = tuple(t for t, label in enumerate(coarse) if label == group)
                parts.append((members, relabelled([fine[t] for t in members])))
            pairs.append((c, f, tuple(parts)))
    return tuple(pairs)


def _best_assignments(log_p: Array) -> dict[Part, tuple[float, dict[int, int]]]:
    """Per way that tasks part, the best candidates: one within a group, others between groups.

    Args:
        log_p: `[tasks, candidates]` of one layer.

    Returns:
        The log-probability, and the candidate of each of the tasks.
    """
    found = {}
    for part in {part: None for _, _, parts in _refinements(len(log_p)) for part in parts}:
        members, labels = part
        gain = np.zeros((max(labels) + 1, log_p.shape[1]))
        np.add.at(gain, list(labels), log_p[list(members)])
        _, columns = linear_sum_assignment(gain, maximize=True)
        taken = {task: int(columns[label]) for task, label in zip(members, labels, strict=True)}
        found[part] = (float(sum(log_p[task, j] for task, j in taken.items())), taken)
    return found


def bins_of(cost: float, bin_cost: float) -> int:
    """What a cost takes, rounded up."""
    return math.ceil(min(cost / bin_cost, NUM_BINS + 1.0) - ROUNDING)
