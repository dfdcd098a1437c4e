"""From alpha to branched networks inside the target.

Argmax ignores the budget. Here the most probable routes within it come from dynamic programming
over the groupings of the tasks, layer by layer; and given routes, the most probable blocks within
it from dynamic programming over the tree that the routes make. What is spent is rounded up to one
of `NUM_BINS` parts of the slack over the cheapest, so no result exceeds the target, and the
cheapest is never lost to rounding.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from oneshot_ednas.architecture import Architecture, BlockArchitecture
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.derive import BudgetSearch
from oneshot_ednas.models.network import recalibrate_bn
from oneshot_ednas.ranking import ScoringConfig
from oneshot_ednas.relaxation import ArchitectureParameters
from oneshot_ednas.reward import reward
from oneshot_ednas.sharing.branched import (
    BranchedNetwork,
    branched_network,
    inherit_branched,
)
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.branching_search import BranchingParameters, BranchingSearch
from oneshot_ednas.sharing.costs import BranchCosts
from oneshot_ednas.sharing.groupings import MAX_TASKS, Grouping, all_groupings, refined, relabelled
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace
from oneshot_ednas.training import Metrics, accuracy_of, calibration_images, evaluate

Array = npt.NDArray[np.float64]
Candidates = tuple[tuple[int, ...], ...]

NUM_BINS = 1024
"""Parts of the slack; a result may leave one per layer and group unspent."""
ROUNDING = 1e-9
"""Share of a bin, or of the target, that float rounding may add; the last check is exact."""
SHARES = (1.0, 0.98, 0.95, 0.9, 0.8, 0.6, 0.3, 0.0)
"""Of the slack, tried in turn where streaming makes the cost more than a weighting of it says."""
PREFERENCE = 1e-9
"""Log-probability that a unit of cost is worth: of equally probable networks, the cheaper."""


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
    clean, space = _LogProbabilities.of(parameters), parameters.space
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
    log_p: "_LogProbabilities",
    clean: "_LogProbabilities",
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
        for weight in _weightings(costs):
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
    clean: "_LogProbabilities",
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
    log_p = _LogProbabilities.of(parameters)
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


# Log-probabilities ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _LogProbabilities:
    routes: Array
    """`[tasks, layers, candidates]`"""
    options: tuple[tuple[tuple[Array, ...], ...], ...] = ()
    """`[candidates][blocks][decisions]`, each over its options; empty where blocks are fixed."""

    @classmethod
    def of(cls, parameters: BranchingParameters) -> "_LogProbabilities":
        routes = parameters.routes.detach().cpu().double().log_softmax(-1).numpy()
        options = tuple(
            tuple(tuple(vector.numpy() for vector in block) for block in one.log_probabilities())
            for one in parameters.candidates
        )
        return cls(routes, options)

    def with_noise(self, generator: np.random.Generator) -> "_LogProbabilities":
        options = tuple(
            tuple(tuple(v + generator.gumbel(size=v.shape) for v in block) for block in one)
            for one in self.options
        )
        return _LogProbabilities(self.routes + generator.gumbel(size=self.routes.shape), options)

    def of_block(self, candidate: int, block: int, num_options: int) -> Array:
        """`[op, kernel, expansion, out-width]` of one block."""
        if not self.options:
            return np.zeros((1, 1, 1, num_options))
        op, kernel, expand, filters = self.options[candidate][block]
        return op[:, None, None, None] + kernel[:, None, None] + expand[:, None] + filters

    def of_network(
        self, routes: Candidates, branching: Branching, space: SearchSpace | None
    ) -> float:
        total = sum(
            float(self.routes[task, layer, candidate])
            for task, route in enumerate(routes)
            for layer, candidate in enumerate(route)
        )
        if space is None or branching.paths is None or not self.options:
            return total
        for layer in range(1, len(space.blocks) + 1):
            for group in range(branching.num_groups[layer]):
                task = branching.first_task(layer, group)
                block, spec = branching.paths[task].blocks[layer - 1], space.blocks[layer - 1]
                vectors = self.options[routes[task][layer]][layer - 1]
                for name, vector in zip(CHOICE_FIELDS, vectors, strict=True):
                    total += float(vector[spec.options(name).index(getattr(block, name))])
        return total


# Routes -------------------------------------------------------------------------------------

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
        return score, _bins(extra, bin_cost)

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


def _layer_costs(
    costs: BranchCosts, log_p: _LogProbabilities, weight: float, *, level: int
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


def _weightings(costs: BranchCosts) -> tuple[float, ...]:
    """Costs of a parameter byte for which the cost is a sum over layers, see `best_paths`."""
    if not _can_stream(costs):
        return (0.0,)
    return (0.0, 0.5 * costs.streaming_per_byte, costs.streaming_per_byte)


def _can_stream(costs: BranchCosts) -> bool:
    """Whether separate networks with the largest blocks exceed the cache."""
    count = 1.0 + MAX_TASKS
    size = costs.constant[1] + count * costs.layers[:, 1].sum()
    size += count * sum(prices[..., 1].max() for prices in costs.blocks)
    size += count * sum(prices[:, 1].max() for prices in costs.laterals.values())
    return bool(costs.streaming_per_byte > 0 and size > costs.cache_bytes)


def _bins(cost: float, bin_cost: float) -> int:
    """What a cost takes, rounded up."""
    return math.ceil(min(cost / bin_cost, NUM_BINS + 1.0) - ROUNDING)


# Blocks -------------------------------------------------------------------------------------


def best_paths(
    routes: Candidates,
    log_p: _LogProbabilities,
    costs: BranchCosts,
    tasks: Sequence[str],
    target: float,
) -> tuple[Architecture, ...] | None:
    """The most probable blocks along routes inside the target, one path per task.

    The streaming term makes the cost the larger of two sums. Each weighting of the two is a lower
    bound of it, so the answer for a weighting that is inside the target is the best there is for
    that weighting; where none is, the weightings' targets are lowered until one is.

    Returns:
        None where the cheapest blocks of these routes exceed the target.
    """
    trees = [_Tree(routes, log_p, costs, weight) for weight in _weightings(costs)]
    for share in SHARES:
        found = []
        for tree in trees:
            if tree.least > target * (1 + ROUNDING):
                return None
            paths = tree.solve(tree.least + share * (target - tree.least))
            if costs.of(Branching.from_routes(tasks, routes, paths)) <= target:
                found.append((tree.score(paths), paths))
        if found:
            return max(found, key=lambda one: one[0])[1]
    return None


@dataclass
class _Node:
    """A block that some tasks compute together."""

    layer: int
    candidate: int
    tasks: tuple[int, ...]
    children: list["_Node"]
    score: Array
    """`[in-width, op, kernel, expansion, out-width]`: log-probability less the preference."""
    reduced: Array
    """Same shape: cost beyond the cheapest way to go on."""
    least: Array
    """`[in-width]`: the cheapest block and what follows it."""
    best: Array = field(default_factory=lambda: np.zeros((0, 0)))
    """`[in-width, bins]`: best value of the block and what follows it."""
    joined: list[Array] = field(default_factory=list)
    """Per number of children, `[out-width, bins]`: best value of the first ones."""


class _Tree:
    """Blocks along routes, from the stem to the last layer, with costs as one weighted sum."""

    def __init__(
        self, routes: Candidates, log_p: _LogProbabilities, costs: BranchCosts, weight: float
    ) -> None:
        assert costs.space is not None
        self.space, self.costs, self.log_p = costs.space, costs, log_p
        self.weights = np.array([1.0, weight])
        self.routes = routes
        groupings = Branching.from_routes([str(t) for t in range(len(routes))], routes).groupings
        self.groupings = groupings
        self.roots = [self._node(1, members) for members in _members(groupings[1])]
        counts = np.array([max(labels) + 1 for labels in groupings])
        once = costs.constant + counts @ costs.layers
        self.once = float(once @ self.weights) - weight * costs.cache_bytes
        self.least = self.once + sum(float(root.least[0]) for root in self.roots)

    def _node(self, layer: int, tasks: tuple[int, ...]) -> _Node:
        index = layer - 1
        prices = self.costs.blocks[index] @ self.weights
        if index in self.costs.laterals:
            # Each BiFPN that comes after reads the block by laterals of its own.
            readers = len({self.groupings[-1][task] for task in tasks})
            prices = prices + readers * (self.costs.laterals[index] @ self.weights)
        children = list[_Node]()
        if layer < len(self.costs.blocks):
            parts = [self.groupings[layer + 1][task] for task in tasks]
            for members in _members(relabelled(parts)):
                children.append(self._node(layer + 1, tuple(tasks[m] for m in members)))
        after = sum((child.least for child in children), np.zeros(prices.shape[-1]))
        total = prices + after
        least = total.min(axis=(1, 2, 3, 4))
        candidate = self.routes[tasks[0]][layer]
        log_p = self.log_p.of_block(candidate, index, prices.shape[-1])
        return _Node(
            layer=layer,
            candidate=candidate,
            tasks=tasks,
            children=children,
            score=np.broadcast_to(log_p, prices.shape) - PREFERENCE * prices,
            reduced=total - least[:, None, None, None, None],
            least=least,
        )

    def solve(self, target: float) -> tuple[Architecture, ...]:
        """The best paths that cost no more than a target, which is not below `least`."""
        self.bin_cost = max(target - self.least, 1e-300) / NUM_BINS
        total = _joined([self._fill(root)[:1] for root in self.roots])
        blocks: list[list[BlockArchitecture | None]] = [
            [None] * len(self.space.blocks) for _ in self.routes
        ]
        left = NUM_BINS
        for number in range(len(self.roots) - 1, -1, -1):
            spent = _split(total[number], self.roots[number].best[:1], 0, left)
            self._take(self.roots[number], 0, spent, blocks)
            left -= spent
        return tuple(
            Architecture(tuple(block for block in path if block is not None), space=self.space.name)
            for path in blocks
        )

    def score(self, paths: Sequence[Architecture]) -> float:
        """Log-probability of the blocks, each group's once."""
        total, todo = 0.0, list(self.roots)
        while todo:
            node = todo.pop()
            todo += node.children
            spec = self.space.blocks[node.layer - 1]
            block = paths[node.tasks[0]].blocks[node.layer - 1]
            cell = tuple(spec.options(n).index(getattr(block, n)) for n in CHOICE_FIELDS)
            log_p = self.log_p.of_block(node.candidate, node.layer - 1, len(spec.filters))
            total += float(log_p[cell])
        return total

    def _fill(self, node: _Node) -> Array:
        """Tables of a node and all after it; returns its own."""
        num_widths = node.reduced.shape[-1]
        node.joined = _joined([self._fill(child) for child in node.children], num_widths)
        after = node.joined[-1]
        node.best = np.full((node.reduced.shape[0], NUM_BINS + 1), -np.inf)
        for cell in np.ndindex(node.reduced.shape):
            spent = _bins(float(node.reduced[cell]), self.bin_cost)
            if spent <= NUM_BINS:
                window = node.best[cell[0], spent:]
                value = node.score[cell] + after[cell[-1], : NUM_BINS + 1 - spent]
                np.maximum(window, value, out=window)
        return node.best

    def _take(
        self,
        node: _Node,
        in_width: int,
        left: int,
        blocks: list[list[BlockArchitecture | None]],
    ) -> None:
        """Write the choice behind a value into the paths of the node's tasks, and go on."""
        best, taken, rest = -math.inf, (0, 0, 0, 0), 0
        after = node.joined[-1]
        for cell in np.ndindex(node.reduced.shape[1:]):
            spent = _bins(float(node.reduced[in_width][cell]), self.bin_cost)
            if spent <= left:
                value = float(node.score[in_width][cell] + after[cell[-1], left - spent])
                if value > best:
                    best, taken, rest = value, cell, left - spent
        spec = self.space.blocks[node.layer - 1]
        options = {
            name: spec.options(name)[i] for name, i in zip(CHOICE_FIELDS, taken, strict=True)
        }
        for task in node.tasks:
            blocks[task][node.layer - 1] = BlockArchitecture(**options)
        for number in range(len(node.children) - 1, -1, -1):
            child = node.children[number]
            spent = _split(node.joined[number], child.best, taken[-1], rest)
            self._take(child, taken[-1], spent, blocks)
            rest -= spent


def _members(labels: Grouping) -> list[tuple[int, ...]]:
    return [
        tuple(i for i, label in enumerate(labels) if label == group)
        for group in range(max(labels) + 1)
    ]


def _joined(tables: Sequence[Array], num_widths: int = 1) -> list[Array]:
    """Best values of the first 0, 1, ... of some subtrees that share the bins left."""
    found = [np.zeros((num_widths, NUM_BINS + 1))]
    for table in tables:
        before, both = found[-1], np.full((num_widths, NUM_BINS + 1), -np.inf)
        if len(found) == 1:
            both = table
        else:
            for spent in range(NUM_BINS + 1):
                window = both[:, spent:]
                value = table[:, spent : spent + 1] + before[:, : NUM_BINS + 1 - spent]
                np.maximum(window, value, out=window)
        found.append(both)
    return found


def _split(before: Array, table: Array, width: int, left: int) -> int:
    """Bins for a subtree, of those left for it and the subtrees before it."""
    value = table[width, : left + 1] + before[width, left::-1]
    return int(np.argmax(value))


# Ranking ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RankedBranching:
    """A derived branching and its score with the supergraph's weights."""

    derived: DerivedBranching
    metrics: Metrics
    reward: float


def rank_branchings(
    found: Sequence[DerivedBranching],
    search: BranchingSearch,
    *,
    target: float,
    calibration: PackedSplit,
    validation: PackedSplit,
    config: ScoringConfig,
) -> list[RankedBranching]:
    """Candidates by the reward of EDNAS (eq. 4-7) on validation data, best first.

    Args:
        found: what to score, with inherited weights and BN statistics of its own.
        search: the supergraph and its tasks.
        target: of the reward, in the unit of the candidates' cost.
        calibration: frames for BN statistics.
        validation: frames to score on.
        config: batches and their size.
    """
    ranked = []
    for derived in found:
        network = inherited(search, derived)
        images = calibration_images(
            calibration,
            num_batches=config.calibration_batches,
            batch_size=config.batch_size,
            seed=search.seed,
            device=search.device,
        )
        recalibrate_bn(network, images)
        metrics = evaluate(
            network, validation, search.tasks, batch_size=config.batch_size, device=search.device
        )
        score = reward(accuracy_of(search.tasks, metrics), derived.cost, target)
        ranked.append(RankedBranching(derived=derived, metrics=metrics, reward=score))
    return sorted(ranked, key=lambda one: -one.reward)


def inherited(search: BranchingSearch, derived: DerivedBranching) -> BranchedNetwork:
    """The stand-alone network of a derived branching with the supergraph's weights."""
    channels = {name: task.out_channels for name, task in search.tasks.items()}
    network = branched_network(search.encoder, derived.branching, channels).to(search.device)
    inherit_branched(network, search.network, derived.candidates, derived.branching)
    return network
