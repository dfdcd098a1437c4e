"""Intervals of the difference between two methods: which of them may be called better."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

NUM_DRAWS = 10_000
LEVEL = 0.95
FEW_SEEDS = 3
"""Methods with fewer runs are compared with a warning."""

Rewards = Sequence[Sequence[float]]
"""One list per run, with one reward per training of its network."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean reward of one method minus that of another."""

    one: str
    other: str
    value: float
    low: float | None
    """Lower end of the interval; None where a method has one run, which shows no spread."""
    high: float | None
    num_runs: tuple[int, int]

    @property
    def winner(self) -> str | None:
        """The better method, if the interval leaves out 0."""
        if self.low is not None and self.low > 0:
            return self.one
        return self.other if self.high is not None and self.high < 0 else None


def difference(
    one: str,
    other: str,
    rewards: tuple[Rewards, Rewards],
    *,
    seed: int = 0,
    num_draws: int = NUM_DRAWS,
) -> Difference:
    """The difference of two methods, with its bootstrap interval at `LEVEL`.

    A draw takes runs with replacement, each as the mean of its trainings: their noise is in the
    spread of these means already, and trainings drawn again would count it twice. The methods are
    independent. The plain percentiles of so few values are too narrow: for three runs against
    three they leave out 0 in one of five comparisons of a method with itself. So deviations
    from the mean are widened by sqrt(n / (n - 1)) and by Student's t over the normal quantile,
    with Welch's degrees of freedom.

    Args:
        one: name of a method.
        other: name of the method to subtract.
        rewards: of both.
        seed: of the draws.
        num_draws: how many.

    Raises:
        ValueError: if a method has no run, or a run has no training.

    Source:
        Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8;
        Welch, The generalization of "Student's" problem, Biometrika 34, 1947.
    """
    for name, groups in zip((one, other), rewards, strict=True):
        if not groups or not all(groups):
            raise ValueError(f"{name}: expected at least one run with at least one reward each")
    means = [np.array([np.mean(group) for group in groups]) for groups in rewards]
    counts = len(means[0]), len(means[1])
    value = float(means[0].mean() - means[1].mean())
    if min(counts) < 2:
        return Difference(one=one, other=other, value=value, low=None, high=None, num_runs=counts)
    rng = np.random.default_rng(seed)
    deviations = [
        math.sqrt(len(run_means) / (len(run_means) - 1))
        * (resampled_means(run_means, num_draws, rng) - run_means.mean())
        for run_means in means
    ]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(deviations[0] - deviations[1], [tail, 1 - tail])
    widening = student_quantile(1 - tail, _welch(means)) / NormalDist().inv_cdf(1 - tail)
    return Difference(
        one=one,
        other=other,
        value=value,
        low=value + widening * float(low),
        high=value + widening * float(high),
        num_runs=counts,
    )


def resampled_means(values: np.ndarray, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means of draws with replacement, of as many values: `[num_draws]`."""
    return rng.choice(values, size=(num_draws, len(values))).mean(axis=1)


def student_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t distribution.

    With t = sqrt(freedom) tan(angle) the density becomes cos(angle)^(freedom - 1), which is
    summed over a fine grid.
    """
    # Beyond the last angle there is less than any tail asked for.
    reach = min(math.pi / 2, 40 / math.sqrt(freedom))
    edges = np.linspace(-reach, reach, 20_001)
    middles = (edges[1:] + edges[:-1]) / 2
    sums = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (freedom - 1))])
    return math.sqrt(freedom) * math.tan(np.interp(probability, sums / sums[-1], edges))


def _welch(means: Sequence[np.ndarray]) -> float:
    """Welch's degrees of freedom of the difference of two means; at least 1."""
    parts = [float(m.var(ddof=1)) / len(m) for m in means]
    fewest = float(min(len(m) for m in means) - 1)
    if sum(parts) == 0:
        return fewest
    squares = sum(part**2 / (len(m) - 1) for part, m in zip(parts, means, strict=True))
    return max(sum(parts) ** 2 / squares, 1.0) if squares > 0 else fewest
