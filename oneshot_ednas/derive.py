"""From alpha to architectures inside the latency target, exactly.

Argmax of alpha ignores the budget. Here the most probable architectures within it are found by
best-first search under an exact dynamic-programming bound, so the target is met by construction,
the k best come in order, and no rounding of latencies is involved.

The streaming term makes latency non-additive: `ms + s * max(0, bytes - cache)`. That is the larger
of two sums, so the target is two additive budgets, both handled exactly.
"""

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from oneshot_ednas.architecture import Architecture, BlockArchitecture
from oneshot_ednas.latency.costs import SpaceCosts
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.relaxation import ArchitectureParameters
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace

Array = npt.NDArray[np.float64]
NUM_BINS = 4096
"""Resolution of the bound; it changes the time that a query takes, never the result."""
TIE_BREAK_PER_MS = 1e-9
"""Log-probability that a millisecond is worth: of equally probable architectures, the faster."""
SLACK_MS = 1e-9
"""Float rounding allowed while pruning; the final check is exact."""


@dataclass(frozen=True, kw_only=True)
class DerivedArchitecture:
    """An architecture inside a budget."""

    architecture: Architecture
    latency_ms: float
    log_probability: float
    """Log of its probability under softmax(alpha)."""


def derive_architectures(
    alpha: ArchitectureParameters,
    table: LatencyTable,
    space: SearchSpace,
    *,
    target_ms: float,
    k: int = 8,
    out_channels: Mapping[str, int] | None = None,
) -> list[Architecture]:
    """The k most probable architectures within the latency target, best first.

    Args:
        alpha: architecture parameters of the space.
        table: the latency table.
        space: the search space.
        target_ms: the budget in milliseconds; no returned architecture exceeds it.
        k: how many to return; fewer come back where the budget holds fewer.
        out_channels: output channels per task; the table's where not given.

    Raises:
        ValueError: if nothing fits the target (both figures are named), or k is not positive.
    """
    search = BudgetSearch(alpha, table.costs(space, out_channels))
    return [found.architecture for found in search.best(target_ms, k)]


def pareto_front(
    alpha: ArchitectureParameters,
    table: LatencyTable,
    space: SearchSpace,
    *,
    num_budgets: int | None = None,
    out_channels: Mapping[str, int] | None = None,
) -> list[DerivedArchitecture]:
    """Architectures that no other beats in both latency and probability, fastest first.

    Args:
        alpha: architecture parameters of the space.
        table: the latency table.
        space: the search space.
        num_budgets: exact answers for this many budgets, evenly spaced from the least latency to
            that of the most probable architecture; None for the whole front.
        out_channels: output channels per task; the table's where not given.

    Raises:
        ValueError: if `num_budgets` is not positive.
    """
    if num_budgets is not None and num_budgets < 1:
        raise ValueError(f"num_budgets: expected at least 1, got {num_budgets}")
    costs = table.costs(space, out_channels)
    search = BudgetSearch(alpha, costs)
    found = search.best(math.inf, 1)
    if num_budgets is None:
        while found[-1].latency_ms > costs.min_latency_ms:
            budget = math.nextafter(found[-1].latency_ms, 0.0)
            if budget < costs.min_latency_ms:
                break
            found += search.best(budget, 1)
    else:
        budgets = np.linspace(costs.min_latency_ms, found[0].latency_ms, num_budgets)
        found += [search.best(float(budget), 1)[0] for budget in np.unique(budgets)]
    front: list[DerivedArchitecture] = []
    for candidate in sorted(found, key=lambda f: (f.latency_ms, -f.log_probability)):
        if not front or candidate.log_probability > front[-1].log_probability:
            front.append(candidate)
    return front


def sample_within_budget(
    alpha: ArchitectureParameters,
    costs: SpaceCosts,
    *,
    target_ms: float,
    num_samples: int,
    generator: np.random.Generator,
) -> list[DerivedArchitecture]:
    """Architectures drawn by alpha inside the target; the same one can come more than once.

    Each draw adds Gumbel noise to all log-probabilities and takes the exact best within the
    budget. Without a budget that is a draw from softmax(alpha); within one, no draw is rejected.

    Args:
        alpha: architecture parameters.
        costs: `table.costs(space)`.
        target_ms: the budget in milliseconds.
        num_samples: how many to draw.
        generator: source of the noise.

    Raises:
        ValueError: if nothing fits the target.

    Source:
        Papandreou and Yuille, Perturb-and-MAP Random Fields, ICCV 2011.
    """
    found = []
    for _ in range(num_samples):
        search = BudgetSearch(alpha, costs, noise=generator)
        (drawn,) = search.best(target_ms, 1)
        log_probability = float(alpha.log_probability(drawn.architecture).detach())
        found.append(replace(drawn, log_probability=log_probability))
    return found


class BudgetSearch:
    """Best-first search for the most probable architectures within budgets."""

    def __init__(
        self,
        alpha: ArchitectureParameters,
        costs: SpaceCosts,
        *,
        noise: np.random.Generator | None = None,
    ) -> None:
        """Prepare the bounds; `best` may then be asked for any number of budgets.

        Args:
            alpha: architecture parameters.
            costs: `table.costs(space)`.
            noise: adds Gumbel noise to the log-probabilities, see `sample_within_budget`.

        Raises:
            ValueError: if alpha and costs are of different spaces.
        """
        if alpha.space != costs.space:
            raise ValueError(
                f"alpha is of space {alpha.space.name}, the costs are of {costs.space.name}"
            )
        self.costs = costs
        self.log_probabilities = _log_probabilities(alpha, noise)
        # One budget for the time without streaming; a second one where streaming can occur.
        weights = [0.0]
        if _largest_bytes(costs) > costs.cache_bytes:
            weights.append(costs.streaming_ms_per_byte)
        self.budgets = [_Budget(costs, self.log_probabilities, weight) for weight in weights]

    def best(self, target_ms: float, k: int) -> list[DerivedArchitecture]:
        """The k most probable architectures within one target, best first.

        Raises:
            ValueError: if nothing fits the target, or k is not positive.
        """
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        if target_ms < self.costs.min_latency_ms:
            raise ValueError(
                f"target of {target_ms:.4g} ms is below the space's minimum of "
                f"{self.costs.min_latency_ms:.4g} ms; raise the target or widen the space"
            )
        found: list[DerivedArchitecture] = []
        for architecture, log_probability in self._complete(target_ms):
            latency_ms = self.costs.latency_ms(architecture)
            if latency_ms <= target_ms:
                found.append(
                    DerivedArchitecture(
                        architecture=architecture,
                        latency_ms=latency_ms,
                        log_probability=log_probability,
                    )
                )
                if len(found) == k:
                    break
        return found

    def _complete(self, target_ms: float) -> Iterator[tuple[Architecture, float]]:
        """Architectures within the target up to rounding and their log-probability, best first.

        A node is a prefix of blocks; its priority is its score plus the best that any rest can
        add within the slack that is left, which never underestimates. So the first complete
        prefix taken from the heap is the best, the next the second best, and so on. A score is
        the log-probability less the tie-break of the latency; since the latency is the larger of
        the budgets' sums, the score is the smaller of theirs.
        """
        heap: list[_Entry] = []
        count = self._push_children(
            heap,
            (),
            tuple(budget.start_score for budget in self.budgets),
            tuple(budget.slack(target_ms) for budget in self.budgets),
            0,
        )
        while heap:
            _, _, children, place = heapq.heappop(heap)
            # Only now, since most children are never looked at.
            children.push(heap, place + 1)
            cells, scores, slack = children.node(place)
            if len(cells) == len(self.log_probabilities):
                log_p = sum(
                    float(block[0][cell])
                    for block, cell in zip(self.log_probabilities, cells, strict=True)
                )
                yield self._architecture(cells), log_p
                continue
            count = self._push_children(heap, cells, scores, slack, count)

    def _push_children(
        self,
        heap: "list[_Entry]",
        cells: tuple[tuple[int, ...], ...],
        scores_before: tuple[float, ...],
        slack: tuple[float, ...],
        count: int,
    ) -> int:
        """Bound all that may follow a prefix, and push the best; returns the nodes so far."""
        depth, in_width = len(cells), cells[-1][-1] if cells else 0
        scores = [
            before + budget.scores[depth][in_width]
            for before, budget in zip(scores_before, self.budgets, strict=True)
        ]
        slacks = [
            left - budget.reduced[depth][in_width]
            for left, budget in zip(slack, self.budgets, strict=True)
        ]
        bounds = np.minimum.reduce(
            [
                score + budget.bound(depth + 1, left)
                for score, left, budget in zip(scores, slacks, self.budgets, strict=True)
            ]
        )
        children = _Children(cells, scores, slacks, bounds, count)
        children.push(heap, 0)
        return count + len(children.places)

    def _architecture(self, cells: tuple[tuple[int, ...], ...]) -> Architecture:
        space = self.costs.space
        blocks = tuple(
            BlockArchitecture(
                **{
                    field: spec.options(field)[index]
                    for field, index in zip(CHOICE_FIELDS, cell, strict=True)
                }
            )
            for spec, cell in zip(space.blocks, cells, strict=True)
        )
        return Architecture(blocks, space=space.name)


class _Children:
    """The nodes that follow a prefix, best first; each is made when it is asked for."""

    def __init__(
        self,
        cells: tuple[tuple[int, ...], ...],
        scores: list[Array],
        slacks: list[Array],
        bounds: Array,
        count: int,
    ) -> None:
        self.cells, self.scores, self.slacks = cells, scores, slacks
        self.shape = bounds.shape
        places = np.flatnonzero(bounds > -np.inf)
        values = -bounds.ravel()[places]
        counts = -np.arange(count + 1, count + 1 + len(places))
        order = np.lexsort((counts, values))
        self.places = places[order]
        self.values: list[float] = values[order].tolist()
        self.counts: list[int] = counts[order].tolist()

    def push(self, heap: "list[_Entry]", place: int) -> None:
        """Push the node at a place of the order, if there is one."""
        if place < len(self.values):
            heapq.heappush(heap, (self.values[place], self.counts[place], self, place))

    def node(
        self, place: int
    ) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...], tuple[float, ...]]:
        """Its cells, scores and slacks."""
        cell = tuple(int(i) for i in np.unravel_index(self.places[place], self.shape))
        return (
            (*self.cells, cell),
            tuple(float(score[cell]) for score in self.scores),
            tuple(float(left[cell]) for left in self.slacks),
        )


_Entry = tuple[float, int, _Children, int]
"""Of the heap: priority, order of ties, and a node as a place among the children of its prefix."""


class _Budget:
    """One additive budget `ms + weight * (bytes - cache) <= target`, and its bound.

    Costs are reduced: an option costs what it adds over the cheapest way to go on, so what is
    spent is the slack over the cheapest architecture, and nothing is ever pruned or kept by a
    rounded cost that could be decided exactly.
    """

    def __init__(self, costs: SpaceCosts, log_probabilities: list[Array], weight: float) -> None:
        self.start_score = -TIE_BREAK_PER_MS * costs.offset(weight)
        self.scores: list[Array] = [
            log_p - TIE_BREAK_PER_MS * (ms + weight * size)
            for log_p, ms, size in zip(
                log_probabilities, costs.block_ms, costs.block_bytes, strict=True
            )
        ]
        minima = costs.suffix_minima(1.0, weight)
        self.minimum_ms = costs.offset(weight) + float(minima[0][0])
        self.reduced: list[Array] = [
            ms + weight * size + after - before[:, None, None, None, None]
            for ms, size, before, after in zip(
                costs.block_ms, costs.block_bytes, minima[:-1], minima[1:], strict=True
            )
        ]
        largest = sum(float(reduced.max()) for reduced in self.reduced)
        self.bin_ms = max(largest, SLACK_MS) / NUM_BINS
        self.best_rest = self._best_rest()

    def slack(self, target_ms: float) -> float:
        """Milliseconds that may be spent over the cheapest architecture."""
        return min(target_ms - self.minimum_ms, (NUM_BINS + 1) * self.bin_ms) + SLACK_MS

    def bound(self, depth: int, slack: Array) -> Array:
        """Largest score that blocks depth.. can add, per out-width of the block before.

        Args:
            depth: number of blocks decided.
            slack: what is left, per option `[op, kernel, expansion, out-width]`.
        """
        bins = np.minimum(np.maximum((slack / self.bin_ms).astype(np.int64), 0), NUM_BINS)
        rest = self.best_rest[depth][np.arange(slack.shape[-1]), bins]
        return np.where(slack >= 0, rest, -np.inf)

    def _best_rest(self) -> list[Array]:
        """Per depth, `[in-width, bins]`: best score of the rest within a number of bins.

        Costs are rounded down to bins, so the bound is never too low.
        """
        rest = np.zeros((self.scores[-1].shape[-1], NUM_BINS + 1))
        table = [rest]
        for score, reduced in zip(reversed(self.scores), reversed(self.reduced), strict=True):
            bins = np.floor(reduced / self.bin_ms).astype(np.int64)
            best = np.full((reduced.shape[0], NUM_BINS + 1), -np.inf)
            for cell in np.ndindex(reduced.shape):
                spent = min(int(bins[cell]), NUM_BINS)
                window = best[cell[0], spent:]
                np.maximum(window, score[cell] + rest[cell[-1], : NUM_BINS + 1 - spent], out=window)
            rest = best
            table.append(rest)
        return table[::-1]


def _largest_bytes(costs: SpaceCosts) -> float:
    return costs.constant_bytes - float(costs.suffix_minima(0.0, -1.0)[0][0])


def _log_probabilities(
    alpha: ArchitectureParameters, noise: np.random.Generator | None
) -> list[Array]:
    """Log-probability of each option of each block, `[1, op, kernel, expansion, out-width]`."""
    per_block = []
    for gates in alpha.log_probabilities():
        vectors = [vector.numpy() for vector in gates]
        if noise is not None:
            vectors = [vector + noise.gumbel(size=vector.shape) for vector in vectors]
        op, kernel, expand, filters = vectors
        per_block.append(
            op[:, None, None, None] + kernel[:, None, None] + expand[:, None] + filters
        )
    return [block[None] for block in per_block]
