"""The most probable blocks along routes inside a budget, by dynamic programming over their tree."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from oneshot_ednas.architecture import Architecture, BlockArchitecture
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.branching_parameters import BranchingParameters
from oneshot_ednas.sharing.costs import BranchCosts
from oneshot_ednas.sharing.derive_routes import (
    NUM_BINS,
    PREFERENCE,
    ROUNDING,
    Array,
    Candidates,
    bins_of,
)
from oneshot_ednas.sharing.groupings import MAX_TASKS, Grouping, relabelled
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace

SHARES = (1.0, 0.98, 0.95, 0.9, 0.8, 0.6, 0.3, 0.0)
"""Of the slack, tried in turn where streaming makes the cost more than a weighting of it says."""


@dataclass(frozen=True)
class LogProbabilities:
    """Log softmax(alpha) of a branching search, without gradient."""

    routes: Array
    """`[tasks, layers, candidates]`"""
    options: tuple[tuple[tuple[Array, ...], ...], ...] = ()
    """`[candidates][blocks][decisions]`, each over its options; empty where blocks are fixed."""

    @classmethod
    def of(cls, parameters: BranchingParameters) -> "LogProbabilities":
        """Of parameters as they are now."""
        routes = parameters.routes.detach().cpu().double().log_softmax(-1).numpy()
        options = tuple(
            tuple(tuple(vector.numpy() for vector in block) for block in one.log_probabilities())
            for one in parameters.candidates
        )
        return cls(routes, options)

    def with_noise(self, generator: np.random.Generator) -> "LogProbabilities":
        """With Gumbel noise on each, for a draw by perturb and MAP."""
        options = tuple(
            tuple(tuple(v + generator.gumbel(size=v.shape) for v in block) for block in one)
            for one in self.options
        )
        return LogProbabilities(self.routes + generator.gumbel(size=self.routes.shape), options)

    def of_block(self, candidate: int, block: int, num_options: int) -> Array:
        """`[op, kernel, expansion, out-width]` of one block."""
        if not self.options:
            return np.zeros((1, 1, 1, num_options))
        op, kernel, expand, filters = self.options[candidate][block]
        return op[:, None, None, None] + kernel[:, None, None] + expand[:, None] + filters

    def of_network(
        self, routes: Candidates, branching: Branching, space: SearchSpace | None
    ) -> float:
        """Of routes and, where blocks vary, of each group's blocks."""
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


def best_paths(
    routes: Candidates,
    log_p: LogProbabilities,
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
    trees = [BlockTree(routes, log_p, costs, weight) for weight in weightings(costs)]
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


class BlockTree:
    """Blocks along routes, from the stem to the last layer, with costs as one weighted sum."""

    def __init__(
        self, routes: Candidates, log_p: LogProbabilities, costs: BranchCosts, weight: float
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
            spent = bins_of(float(node.reduced[cell]), self.bin_cost)
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
            spent = bins_of(float(node.reduced[in_width][cell]), self.bin_cost)
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


def weightings(costs: BranchCosts) -> tuple[float, ...]:
    """Costs of a parameter byte for which the cost is a sum over layers, see `best_paths`."""
    if not can_stream(costs):
        return (0.0,)
    return (0.0, 0.5 * costs.streaming_per_byte, costs.streaming_per_byte)


def can_stream(costs: BranchCosts) -> bool:
    """Whether separate networks with the largest blocks exceed the cache."""
    count = 1.0 + MAX_TASKS
    size = costs.constant[1] + count * costs.layers[:, 1].sum()
    size += count * sum(prices[..., 1].max() for prices in costs.blocks)
    size += count * sum(prices[:, 1].max() for prices in costs.laterals.values())
    return bool(costs.streaming_per_byte > 0 and size > costs.cache_bytes)
