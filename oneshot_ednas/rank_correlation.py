"""How well one score ranks architectures by another, with intervals, and what it favours.

Intervals are percentile bootstrap intervals over architectures. A resample is a count per
architecture, and all statistics are sums over pairs weighted by such counts, so thousands of
resamples are a few matrix products: no list is ever drawn, sorted or compared again.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A statistic and its bootstrap interval; None where ranks say nothing."""

    value: float | None
    low: float | None
    """Lower end of the interval that holds `CONFIDENCE` of the resamples."""
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "none"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def resample_counts(
    num_items: int, generator: np.random.Generator, num_resamples: int = NUM_RESAMPLES
) -> Array:
    """How often each item is in each resample of as many items: [resamples, items]."""
    chances = np.full(num_items, 1 / num_items)
    return generator.multinomial(num_items, chances, size=num_resamples).astype(float)


# Statistics of weighted lists -----------------------------------------------------------------


def weighted_kendall_tau(a: Array, b: Array, counts: Array) -> Array:
    """Kendall's tau-b of each resample: [resamples]; NaN where one list is constant.

    Equal to `correlation.kendall_tau` of the lists with each item repeated by its count.

    Args:
        a: one score per item.
        b: another.
        counts: [resamples, items].
    """
    x, y = _signs(a), _signs(b)
    together, first, second = (
        np.einsum("ri,ri->r", counts @ pairs, counts) for pairs in (x * y, x * x, y * y)
    )
    return _ratio(together, np.sqrt(first * second))


def weighted_spearman(a: Array, b: Array, counts: Array) -> Array:
    """Spearman's correlation of each resample, see `weighted_kendall_tau`.

    The mid-rank of an item is half the sum of its signs against all others, up to a constant, and
    the signs of all pairs add up to 0, so these ranks are centred already.
    """
    x, y = counts @ _signs(a).T, counts @ _signs(b).T
    together, first, second = ((counts * pair).sum(1) for pair in (x * y, x * x, y * y))
    return _ratio(together, np.sqrt(first * second))


def weighted_top_overlap(a: Array, b: Array, counts: Array, *, share: float) -> Array:
    """Share of the best by `b` that is among the best by `a`, in each resample: [resamples].

    The best are the highest `share` of the items, rounded, at least one. Of equal items at the
    border each belongs to them in part.
    """
    size = max(1, round(share * counts[0].sum()))
    taken = [_taken(values, counts, size) for values in (a, b)]
    return np.minimum(*taken).sum(1) / size


def _taken(values: Array, counts: Array, size: int) -> Array:
    """How much of each item is among the `size` best: [resamples, items], rows add up to it."""
    signs = _signs(values)
    above, equal = counts @ (signs > 0), counts @ (signs == 0)
    return counts * np.clip((size - above) / np.maximum(equal, 1), 0, 1)


def _signs(values: Array) -> Array:
    """Sign of value i less value j: [items, items]."""
    return np.sign(values[:, None] - values[None, :])


def _ratio(numerator: Array, denominator: Array) -> Array:
    return np.divide(
        numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0
    )


STATISTICS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "kendall_tau": weighted_kendall_tau,
    "spearman": weighted_spearman,
    "top_10_percent": partial(weighted_top_overlap, share=0.1),
    "top_25_percent": partial(weighted_top_overlap, share=0.25),
}
"""What is computed of two scores; all are 1 where the two order alike."""


# Estimates ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Statistics of two scores, of the items as they are and of resamples."""

    values: dict[str, Array]
    """Per statistic: the items as they are, then the resamples."""

    def estimates(self) -> dict[str, Estimate]:
        """Each statistic with its interval."""
        return {name: estimate(values) for name, values in self.values.items()}

    def over(self, ceiling: "Agreement") -> dict[str, Estimate]:
        """Each statistic as a share of a ceiling, resampled independently of it.

        Where the ceiling has fewer resamples, they are used again.
        """
        found = {}
        for name, values in self.values.items():
            first, rest = ceiling.values[name][:1], ceiling.values[name][1:]
            below = np.append(first, np.resize(rest, len(values) - 1))
            found[name] = estimate(_ratio(values, below))
        return found


def agreement(a: Array, b: Array, counts: Array) -> Agreement:
    """How alike two scores rank the same items.

    Args:
        a: the score that predicts, higher is better.
        b: the score that counts, higher is better.
        counts: resamples, see `resample_counts`.

    Raises:
        ValueError: if the lists differ in length or hold what is not finite.
    """
    return mean_agreement([(a, b)], counts)


def mean_agreement(pairs: Sequence[tuple[Array, Array]], counts: Array) -> Agreement:
    """Mean over several pairs of scores of how alike they rank, see `agreement`."""
    with_all = np.vstack([np.ones(counts.shape[1]), counts])
    checked = [_checked(a, b, counts.shape[1]) for a, b in pairs]
    return Agreement(
        {
            name: np.mean([statistic(a, b, with_all) for a, b in checked], axis=0)
            for name, statistic in STATISTICS.items()
        }
    )


def noise_ceiling(scores: Array, counts: Array) -> Agreement:
    """Mean agreement of two single trainings of the same items: [seeds, items] of scores.

    A score that says nothing about seeds can hardly rank single trainings better than another
    training does; one without any noise can, by up to about the square root.

    Raises:
        ValueError: if there are fewer than two seeds.
    """
    if len(scores) < 2:
        raise ValueError(f"a noise ceiling needs 2 seeds or more, got {len(scores)}")
    return mean_agreement(list(itertools.combinations(scores, 2)), counts)


def expected_ceiling(
    single: Array,
    repeated: Array,
    generator: np.random.Generator,
    *,
    num_pairs: int = 200,
    num_resamples: int = 200,
    pairs_per_resample: int = 8,
) -> Agreement:
    """The noise ceiling of all items, of which only some were trained with several seeds.

    Those may by chance be more or less alike than all are. So the noise is taken from them and
    the spread from all: scores are drawn towards their mean until noise and spread add up to what
    was seen, and pairs of trainings are drawn by adding normal noise twice. Resamples draw the
    items of both, before noise and spread are measured.

    Args:
        single: one training of every item: [items].
        repeated: trainings of some of them: [seeds, repeated items].
        generator: of the noise and the resamples.
        num_pairs: pairs of trainings behind the value.
        num_resamples: how often the items are drawn again.
        pairs_per_resample: pairs of trainings behind each; what chance is left in their mean
            makes the interval a little wider.

    Returns:
        The mean over the pairs, and that of each resample.

    Raises:
        ValueError: if there are fewer than two seeds or two repeated items.
    """
    seeds, items = repeated.shape
    if min(seeds, items) < 2:
        raise ValueError(f"expected 2 seeds and 2 items or more, got {seeds} and {items}")
    found = [_simulated(single, repeated, generator, num_pairs)]
    for _ in range(num_resamples):
        drawn = single[generator.integers(len(single), size=len(single))]
        again = repeated[:, generator.integers(items, size=items)]
        found.append(_simulated(drawn, again, generator, pairs_per_resample))
    return Agreement({name: np.array([one[name] for one in found]) for name in STATISTICS})


def _simulated(
    single: Array, repeated: Array, generator: np.random.Generator, num_pairs: int
) -> dict[str, float]:
    """Mean statistics of drawn pairs of trainings, see `expected_ceiling`."""
    seeds, items = repeated.shape
    # What all items of a seed have in common changes no ranking.
    rest = repeated - repeated.mean(1, keepdims=True)
    rest = rest - rest.mean(0)
    noise = (rest**2).sum() / ((seeds - 1) * (items - 1))
    spread = single.var(ddof=1)
    kept = np.sqrt(max(0.0, 1 - noise / spread)) if spread > 0 else 0.0
    truth = single.mean() + kept * (single - single.mean())
    once = np.ones((1, len(single)))
    drawn = truth + np.sqrt(noise) * generator.normal(size=(num_pairs, 2, len(single)))
    return {
        name: float(np.mean([statistic(a, b, once)[0] for a, b in drawn]))
        for name, statistic in STATISTICS.items()
    }


def estimate(values: Array) -> Estimate:
    """The first value, and the interval of the others; those that are not defined are left out."""
    rest = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not rest.size:
        return Estimate(None, None, None)
    low, high = np.quantile(rest, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(values[0]), float(low), float(high))


def _checked(a: Array, b: Array, length: int) -> tuple[Array, Array]:
    if a.shape != (length,) or b.shape != (length,):
        raise ValueError(
            f"expected two lists of {length} scores, got shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("expected finite scores; leave out the architectures without one")
    return a, b


# Bias -----------------------------------------------------------------------------------------


def rank_differences(a: Array, b: Array) -> Array:
    """Rank by `a` less rank by `b` over the number of items: above 0 where `a` overrates one."""
    first, second = _checked(a, b, len(a))
    return (_signs(first) - _signs(second)).sum(1) / (2 * len(first))


def group_means(
    differences: Array, groups: Mapping[str, Sequence[bool] | npt.NDArray[np.bool_]], counts: Array
) -> dict[str, Estimate]:
    """Mean difference of the items of each group, with intervals; None for an empty group.

    Args:
        differences: as of `rank_differences`.
        groups: per group, which items are in it.
        counts: resamples, see `resample_counts`.
    """
    with_all = np.vstack([np.ones(counts.shape[1]), counts])
    found = {}
    for name, members in groups.items():
        inside = with_all * np.asarray(members, dtype=float)
        found[name] = estimate(_ratio(inside @ differences, inside.sum(1)))
    return found
