"""Anytime curves: the best reward so far against what was spent for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from oneshot_ednas.comparison.methods import Cost, Found, Method
from oneshot_ednas.comparison.runs import RecordedRun


@dataclass(frozen=True, kw_only=True)
class Point:
    """A reward and what was spent until it was known."""

    cost: Cost
    reward: float


def search_curve(found: Found) -> list[Point]:
    """What the search knew on its validation split, at growing cost; empty for a baseline.

    Multi-trial: the best reward so far among the trials inside the target. One-shot: the rewards,
    with supernet weights, of the most probable architecture inside the target, as logged.
    """
    if found.search.macs == 0:
        return []
    return trial_curve(found.run) if found.run.trials else supernet_curve(found)


def trial_curve(run: RecordedRun) -> list[Point]:
    """The points at which the best reward inside the target rises, and the end of the search."""
    by_end = {trial.ended: trial for trial in run.trials if trial.ended is not None}
    trials = [by_end[event] for event in sorted(by_end)]
    spent = list(
        accumulate(Cost(macs=one.macs or 0.0, seconds=one.seconds or 0.0) for one in trials)
    )
    target_ms, points = run.config.latency.target_ms, list[Point]()
    for trial, cost in zip(trials, spent, strict=True):
        if trial.reward is None or trial.latency_ms > target_ms:
            continue
        if not points or trial.reward > points[-1].reward:
            points.append(Point(cost=cost, reward=trial.reward))
    return [*points, Point(cost=spent[-1], reward=points[-1].reward)] if points else []


def supernet_curve(found: Found) -> list[Point]:
    """The logged validations; their seconds are taken as their share of the search's."""
    _, rewards = found.run.log.curve("search", "validation/reward")
    _, spent = found.run.log.curve("search", "validation/macs")
    return [
        Point(
            cost=Cost(macs=macs, seconds=macs / found.search.macs * found.search.seconds),
            reward=value,
        )
        for macs, value in zip(spent.tolist(), rewards.tolist(), strict=True)
    ]


def final_point(found: Found) -> Point:
    """The retrained network on the test split, at the cost of search and retraining."""
    return Point(cost=found.cost, reward=found.reward)


def trial_band(
    method: Method, cost: Callable[[Point], float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """The best trials so far `over_seeds`; None where that is no line, but a point or nothing."""
    curves = []
    for found in method.found:
        points = search_curve(found) if found.run.trials else []
        if points:
            rewards = np.array([point.reward for point in points])
            curves.append((np.array(list(map(cost, points))), rewards))
    band = over_seeds(curves) if curves else None
    return band if band is not None and len(band[0]) > 1 else None


def over_seeds(
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, smallest and largest of step curves wherever all of them have begun.

    Args:
        curves: per seed, ascending costs, and the values that hold from there on.

    Returns:
        Costs, mean, smallest and largest value at each.
    """
    grid = np.unique(np.concatenate([costs for costs, _ in curves]))
    grid = grid[grid >= max(costs[0] for costs, _ in curves)]
    rows = np.stack(
        [values[np.searchsorted(costs, grid, side="right") - 1] for costs, values in curves]
    )
    return grid, rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0)
