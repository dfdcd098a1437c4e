"""From alpha to branched networks inside the target.

Argmax ignores the budget. Here the most probable routes within it come from dynamic programming
over the groupings of the tasks, layer by layer; and given routes, the most probable blocks within
it from dynamic programming over the tree that the routes make. What is spent is rounded up to one
of `NUM_BINS` parts of the slack over the cheapest, so no result exceeds the target, and the
cheapest is never lost to rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.derive import BudgetSearch
from oneshot_ednas.relaxation import ArchitectureParameters
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.branching_parameters import BranchingParameters
from oneshot_ednas.sharing.costs import BranchCosts
from oneshot_ednas.sharing.derive_blocks import SHARES, LogProbabilities, best_paths, weightings
from oneshot_ednas.sharing.derive_routes import ROUNDING, Array, Candidates, best_routes


@dataclass(frozen=True, kw_only=True)
class DerivedBranching:
    """A branched network and the candidates whose weights it inherits."""

    candidates: Candidates
    """`[tasks][layers]`"""
    branching: Branching
    cost: float
    """In the unit of the search."""
    log_probability: float
    """Of routes, and of each group's blocks by its candidate's probabilities."""


def derive_branched(
    parameters: BranchingParameters,
    costs: BranchCosts,
    tasks: Sequence[str],
    *,
    target: float,
    num_candidates: int,
    generator: np.random.Generator,
) -> list[DerivedBranching]:
    """Probable branched networks inside the target: the most probable ones, then drawn ones.

    Each draw adds Gumbel noise to all log-probabilities and takes the most probable within the
    target (perturb and MAP). Where blocks vary, the two are chosen one after the other, which is a
    heuristic: first the routes, with blocks at the lowest, the expected or the highest price, so
    that the budget goes to branches in some and to blocks in others; then the most probable blocks
    along these routes. Groups that take one candidate each choose blocks by its probabilities, and
    may choose different ones.

    Args:
        parameters: alpha.
        costs: of the backbone.
        tasks: names of the tasks.
        target: the budget, in the unit of `costs`.
        num_candidates: how many to return at most; no two are the same.
        generator: source of the noise.

    Raises:
        ValueError: if no branched network fits the target; it names both figures.
    """
    least = smallest_cost(costs, tasks)
    if not target >= least:
        raise ValueError(
            f"the target is {target:.4g} {costs.unit}, below the smallest branched network's "
            f"{least:.4g} {costs.unit}; raise it"
        )
    clean, space = LogProbabilities.of(parameters), parameters.space
    found: dict[Branching, DerivedBranching] = {}
    levels = 3 if clean.options else 1
    for attempt in range(2 * levels * num_candidates):
        log_p = clean if attempt < levels else clean.with_noise(generator)
        level = attempt % levels
        best = _most_probable(log_p, clean, costs, tasks, target, level=level)
        routes, branching = best or _shared(parameters, clean, costs, tasks, target)
        cost = costs.of(branching)
        if branching not in found:
            found[branching] = DerivedBranching(
                candidates=routes,
                branching=branching,
                cost=cost,
                log_probability=clean.of_network(routes, branching, space),
            )
        if len(found) == num_candidates:
            break
    return list(found.values())


def _most_probable(
    log_p: LogProbabilities,
    clean: LogProbabilities,
    costs: BranchCosts,
    tasks: Sequence[str],
    target: float,
    *,
    level: int,
) -> tuple[Candidates, Branching] | None:
    """The most probable routes and their blocks inside the target; how, see `best_paths`.

    None where it finds none: what streams past the cache may leave no weighting inside the target.
    """
    tried = set[Candidates]()
    for share in SHARES:
        found = []
        for weight in weightings(costs):
            layer_costs = _layer_costs(costs, clean, weight, level=level)
            slack = share * _slack(costs, layer_costs, weight, target)
            routes, paths = best_routes(log_p.routes, layer_costs, slack), None
            if routes in tried:
                continue
            tried.add(routes)
            if costs.space is not None:
                paths = best_paths(routes, log_p, costs, tasks, target)
                if paths is None:
                    continue
            branching = Branching.from_routes(tasks, routes, paths)
            if costs.of(branching) <= target:
                score = log_p.of_network(routes, branching, costs.space)
                found.append((score, routes, branching))
        if found:
            _, routes, branching = max(found, key=lambda one: one[0])
            return routes, branching
    return None


def _shared(
    parameters: BranchingParameters,
    clean: LogProbabilities,
    costs: BranchCosts,
    tasks: Sequence[str],
    target: float,
) -> tuple[Candidates, Branching]:
    """One encoder for all tasks, of the candidates that all together take most, exactly."""
    best = int(clean.routes.sum((0, 1)).argmax())
    path = None
    if costs.space is not None:
        path = costs.space.base_architecture
        if parameters.candidates:
            path = _unbranched(parameters.candidates[best], costs, target)
    branching = Branching.shared(tasks, costs.num_layers, path)
    return ((best,) * costs.num_layers,) * len(tasks), branching


def most_probable(
    parameters: BranchingParameters, costs: BranchCosts, tasks: Sequence[str]
) -> DerivedBranching:
    """The argmax of alpha, whatever it costs (BMTAS section 3.2)."""
    routes, space = parameters.argmax(), parameters.space
    branching = routes.branching(tasks)
    if branching.paths is None and space is not None:
        branching = replace(branching, paths=(space.base_architecture,) * len(tasks))
    log_p = LogProbabilities.of(parameters)
    return DerivedBranching(
        candidates=routes.candidates,
        branching=branching,
        cost=costs.of(branching),
        log_probability=log_p.of_network(routes.candidates, branching, space),
    )


def smallest_cost(costs: BranchCosts, tasks: Sequence[str]) -> float:
    """Cost of the cheapest branched network: fully shared, with the cheapest blocks; exact."""
    path = None
    if costs.space is not None:
        path = costs.space.base_architecture
        if not costs.space.is_fixed:
            path = _unbranched(ArchitectureParameters(costs.space), costs, math.inf)
    return costs.of(Branching.shared(tasks, costs.num_layers, path))


def _unbranched(alpha: ArchitectureParameters, costs: BranchCosts, target: float) -> Architecture:
    """The most probable blocks of one encoder for all tasks; of no target, the cheapest."""
    least = costs.unbranched.min_latency_ms
    # The two ways to sum up a cost round differently.
    target = least if math.isinf(target) else max(target * (1 + ROUNDING), least)
    return BudgetSearch(alpha, costs.unbranched).best(target, 1)[0].architecture


def _layer_costs(
    costs: BranchCosts, log_p: LogProbabilities, weight: float, *, level: int
) -> Array:
    """What a computation of each layer costs, where blocks vary at a level of their prices.

    Args:
        costs: of the backbone.
        log_p: of the blocks.
        weight: cost of a parameter byte.
        level: 0 the lowest price, 1 the expected one, 2 the highest.
    """
    found: Array = costs.layers @ np.array([1.0, weight])
    for index, pairs in enumerate(costs.blocks):
        prices = pairs @ np.array([1.0, weight])
        if level == 1 and log_p.options:
            share = np.mean(
                [
                    np.exp(log_p.of_block(j, index, prices.shape[-1]))
                    for j in range(len(log_p.options))
                ],
                axis=0,
            )
            found[index + 1] += float((prices.mean(0) * share).sum())
        else:
            found[index + 1] += float(prices.max() if level == 2 else prices.min())
    for laterals in costs.laterals.values():
        read = laterals @ np.array([1.0, weight])
        found[-1] += float((read.min(), read.mean(), read.max())[level])
    return found


def _slack(costs: BranchCosts, layer_costs: Array, weight: float, target: float) -> float:
    once = float(costs.constant @ np.array([1.0, weight])) - weight * costs.cache_bytes
    return max(target - once - float(layer_costs.sum()), 0.0)
