"""Metrics of any architecture of a space, predicted from a tabular benchmark.

A Gaussian process per metric, on its logarithm: a linear part of what the options are, one of what
they cost, and a smooth rest. What the seed changes is not learnt but measured on the repeated
architectures, and drawn again, so that a search on the benchmark meets the noise that it would
meet live.

Source:
    Siems et al., NAS-Bench-301 and the Case for Surrogate Benchmarks for Neural Architecture
    Search, 2020, https://arxiv.org/abs/2008.09777; Rasmussen and Williams, Gaussian Processes for
    Machine Learning, 2006, eq. 2.30 (marginal likelihood) and 5.12 (leave one out).
"""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.benchmark.table import Benchmark
from oneshot_ednas.correlation import kendall_tau
from oneshot_ednas.latency.operations import network_operations
from oneshot_ednas.tasks import lower_is_better
from oneshot_ednas.training import Metrics, accuracy_of, numpy_generator, training_macs
from oneshot_ednas.trial import Outcome

Array = npt.NDArray[np.float64]

MIN_REPEATED = 4
"""Architectures with several seeds, below which seed noise is a guess."""
SMALLEST = 1e-6
"""A metric below this counts as this, so that it has a logarithm."""
CONSTANT_VARIANCE = 10.0
"""Prior variance of the mean, in variances of the metric."""
LEAST_NOISE = 1e-4
"""Least variance of the noise, in variances of the metric; keeps the equations solvable."""
FIRST_SCALES = np.array([0.5, 0.5, 0.5, 1.0])
"""Where the fit starts, see `kernel`."""
SCALE_RANGE = (0.02, 20.0)


class Prediction(NamedTuple):
    """What is expected of an architecture, over seeds."""

    metrics: Metrics
    test_metrics: Metrics
    cpu_seconds: float
    macs: int
    """Multiply-adds for one image, exact."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Predictions of architectures that were left out, one at a time, of one metric."""

    kendall_tau: float | None
    """With single trainings, those of the first seed."""
    linear_kendall_tau: float | None
    """The same of the model without its smooth rest."""
    noise_ceiling: float | None
    """Mean Kendall tau of two single trainings of the repeated architectures."""
    log_error: float
    """Root mean square of log(prediction / mean over seeds)."""
    linear_log_error: float
    """The same of the model without its smooth rest."""
    log_spread: float
    """Deviation of the logarithm between architectures."""
    log_noise: float
    """Deviation of the logarithm between seeds."""


class BenchmarkTrainer:
    """Stands in for `StandAloneTrainer` on a benchmark: a trial takes about a millisecond.

    Validation metrics are the posterior mean with seed noise, a function of architecture and seed.
    Test metrics are without noise: what the result of a search is judged by.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        """Fit the surrogate, which takes seconds.

        Raises:
            ValueError: as of `Surrogate`.
        """
        self.benchmark = benchmark
        self.surrogate = Surrogate(benchmark)

    def __call__(
        self, architecture: Architecture, seed: int, scored_steps: Collection[int] = ()
    ) -> Outcome:
        """The predicted outcome of a trial.

        Args:
            architecture: what would be trained.
            seed: of the training; draws the noise.
            scored_steps: has no effect: only the end of a training is predicted.

        Raises:
            ValueError: if the architecture is not in the space.
        """
        del scored_steps
        benchmark, predicted = self.benchmark, self.surrogate.predict(architecture)
        metrics = self.surrogate.with_noise(predicted.metrics, architecture, seed)
        return Outcome(
            metrics=metrics,
            test_metrics=predicted.test_metrics,
            curve={benchmark.steps: metrics},
            seconds=predicted.cpu_seconds,
            cpu_seconds=predicted.cpu_seconds,
            macs=training_macs(predicted.macs, benchmark.steps * benchmark.batch_size),
        )


class Surrogate:
    """Gaussian processes of all metrics of a benchmark."""

    def __init__(self, benchmark: Benchmark) -> None:
        """Fit.

        Raises:
            ValueError: if too few architectures are repeated to measure the noise of seeds.
        """
        if len(benchmark.repeated) < MIN_REPEATED:
            raise ValueError(
                f"a surrogate needs at least {MIN_REPEATED} architectures with several seeds, "
                f"which show what a seed changes; the benchmark has {len(benchmark.repeated)}"
            )
        self.benchmark = benchmark
        self._out_channels = {name: task.out_channels for name, task in benchmark.tasks.items()}
        entries = benchmark.entries
        first = entries[0].trainings[0].metrics
        self._columns = [(task, name) for task, values in first.items() for name in values]
        described = [self._describe(entry.architecture) for entry in entries]
        features = [np.array([one[part] for one in described]) for part in (0, 1)]
        self._scaling = [(rows.mean(0), _deviation(rows)) for rows in features]
        self._inputs = self._scaled(*features)

        # The logarithms of all trainings, validation metrics beside test metrics.
        logs = [
            np.array([self._logs(t.metrics) + self._logs(t.test_metrics) for t in entry.trainings])
            for entry in entries
        ]
        self._first, self._means = (
            np.array(x) for x in zip(*[(one[0], one.mean(0)) for one in logs], strict=True)
        )
        covariance = _covariance_of_seeds(logs)
        width = len(self._columns)
        self._noise_root = _root(covariance[:width, :width])
        self._centre, self._spread = self._means.mean(0), _deviation(self._means)
        counts = np.array([len(entry.trainings) for entry in entries])
        self._noise = np.diag(covariance) / self._spread**2 / counts[:, None] + LEAST_NOISE
        self._low, self._high = self._plausible(np.concatenate(logs))

        pairs = _pair_terms(self._inputs, self._inputs)
        targets = self._targets = (self._means - self._centre) / self._spread
        # Test metrics depend on the architecture as validation metrics do: one fit for both.
        scales = [fit_scales(pairs, targets[:, i], self._noise[:, i]) for i in range(width)]
        self._scales = np.array([*scales, *scales])
        self._weights = np.array(
            [
                np.linalg.solve(kernel(one, pairs) + np.diag(noise), target)
                for one, noise, target in zip(self._scales, self._noise.T, targets.T, strict=True)
            ]
        )
        macs = np.array([one.macs for one in described], dtype=float)
        seconds = [
            math.fsum(one.cpu_seconds for one in entry.trainings) / len(entry.trainings)
            for entry in entries
        ]
        self._seconds_fit = np.polynomial.Polynomial.fit(macs, seconds, 1)
        self._least_seconds = min(seconds) / 2

    def predict(self, architecture: Architecture) -> Prediction:
        """The posterior mean; inside or near what was seen, whatever the architecture.

        Raises:
            ValueError: if the architecture is not in the space.
        """
        described = self._describe(architecture)
        inputs = self._scaled(*(np.array([described[part]]) for part in (0, 1)))
        terms = _pair_terms(inputs, self._inputs)
        near = kernel(self._scales.T[:, :, None], terms)
        logs = self._centre + self._spread * (near * self._weights).sum(1)
        logs = np.clip(logs, self._low, self._high)
        width = len(self._columns)
        return Prediction(
            metrics=self._metrics(logs[:width]),
            test_metrics=self._metrics(logs[width:]),
            cpu_seconds=max(self._least_seconds, float(self._seconds_fit(described.macs))),
            macs=described.macs,
        )

    def with_noise(self, metrics: Metrics, architecture: Architecture, seed: int) -> Metrics:
        """Metrics as one training would give them: a function of architecture and seed."""
        draw = numpy_generator(seed, "surrogate", str(architecture)).standard_normal
        noisy = np.array(self._logs(metrics)) + self._noise_root @ draw(len(self._columns))
        width = len(self._columns)
        return self._metrics(np.clip(noisy, self._low[:width], self._high[:width]))

    def held_out(self) -> dict[str, HeldOut]:
        """Leave-one-out figures of the validation metrics and of their accuracy product.

        The scales of the kernel and the noise are those of all architectures.
        """
        width = len(self._columns)
        smooth, linear = (self._left_out(is_linear=is_linear) for is_linear in (False, True))
        repeated = self.benchmark.repeated
        seeds = range(len(repeated[0].trainings))
        again = np.array([[self._logs(e.trainings[i].metrics) for e in repeated] for i in seeds])
        named = {"accuracy": self._log_accuracies} | {
            f"{task}.{name}": (lambda logs, i=i: logs[..., i])
            for i, (task, name) in enumerate(self._columns)
        }
        found = {}
        for name, read in named.items():
            one, other = read(smooth), read(linear)
            first, mean = read(self._first[:, :width]), read(self._means[:, :width])
            by_seed = [read(logs) for logs in again]
            noise = np.stack(by_seed).var(0, ddof=1).mean()
            found[name] = HeldOut(
                kendall_tau=kendall_tau(one, first),
                linear_kendall_tau=kendall_tau(other, first),
                noise_ceiling=_mean_tau(by_seed),
                log_error=_root_mean_square(one - mean),
                linear_log_error=_root_mean_square(other - mean),
                log_spread=float(mean.std()),
                log_noise=math.sqrt(noise),
            )
        return found

    # Parts ----------------------------------------------------------------------------------

    def _describe(self, architecture: Architecture) -> "_Described":
        space = self.benchmark.space
        operations = network_operations(
            space, architecture, self.benchmark.image_size, self._out_channels
        )
        blocks = [one.operation for one in operations if one.where.startswith("block_")]
        macs = sum(one.operation.macs for one in operations)
        chosen = np.concatenate(
            [
                np.arange(len(choice.options)) == index
                for choice, index in zip(space.choices, space.encode(architecture), strict=True)
            ]
        )
        # Per output pixel a convolution uses each of its parameters once (four times where an
        # IBN expands before its stride): about the size of the network, not of the maps.
        per_pixel = sum(one.macs / (one.out_height * one.out_width) for one in blocks)
        costs = [
            math.log(macs),
            math.log(per_pixel),
            *(math.log(one.macs) for one in blocks),
            *(math.log(one.out_channels) for one in blocks),
            *(math.log(one.in_channels * one.expand_ratio) for one in blocks),
            *(float(one.residual) for one in blocks),
        ]
        return _Described(chosen.astype(float), np.array(costs), macs)

    def _scaled(self, *features: Array) -> tuple[Array, ...]:
        """Features with mean 0 and deviation 1 over the benchmark: options, costs."""
        return tuple(
            (rows - mean) / deviation
            for rows, (mean, deviation) in zip(features, self._scaling, strict=True)
        )

    def _logs(self, metrics: Metrics) -> list[float]:
        return [math.log(max(metrics[task][name], SMALLEST)) for task, name in self._columns]

    def _metrics(self, logs: Array) -> Metrics:
        table: Metrics = {}
        for (task, name), value in zip(self._columns, np.exp(logs), strict=True):
            table.setdefault(task, {})[name] = float(value)
        return table

    def _plausible(self, logs: Array) -> tuple[Array, Array]:
        """Bounds of predictions: what was seen, and half of its extent on both sides.

        A metric that is better when higher and was nowhere above 1 is a share, and stays one.
        """
        low, high = logs.min(0), logs.max(0)
        margin = (high - low) / 2
        errors = lower_is_better(self.benchmark.tasks)
        is_share = [name not in errors for _, name in self._columns] * 2
        limit = np.where(np.array(is_share) & (high <= 0), 0.0, np.inf)
        return low - margin, np.minimum(high + margin, limit)

    def _left_out(self, *, is_linear: bool) -> Array:
        """Log metrics of each architecture as predicted from the others: [entries, columns]."""
        pairs = _pair_terms(self._inputs, self._inputs)
        found = []
        for i in range(len(self._columns)):
            target, noise = self._targets[:, i], self._noise[:, i]
            scales = (
                fit_scales(pairs, target, noise, is_linear=True) if is_linear else self._scales[i]
            )
            inverse = np.linalg.inv(kernel(scales, pairs) + np.diag(noise))
            left_out = target - inverse @ target / np.diag(inverse)
            found.append(self._centre[i] + self._spread[i] * left_out)
        return np.stack(found, axis=1)

    def _log_accuracies(self, logs: Array) -> Array:
        tasks = self.benchmark.tasks
        return np.array([math.log(accuracy_of(tasks, self._metrics(row))) for row in logs])


class _Described(NamedTuple):
    """Features of an architecture, and its multiply-adds."""

    options: Array
    """1 for each option that it has."""
    costs: Array
    macs: int


# Gaussian process -----------------------------------------------------------------------------


class _PairTerms(NamedTuple):
    """What kernels of any scales are made of: [one, other] each."""

    options: Array
    costs: Array
    distance: Array
    """Mean square difference over all features."""


def _pair_terms(one: Sequence[Array], other: Sequence[Array]) -> _PairTerms:
    products = [a @ b.T / a.shape[1] for a, b in zip(one, other, strict=True)]
    a, b = np.concatenate(one, axis=1), np.concatenate(other, axis=1)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T
    return _PairTerms(products[0], products[1], np.maximum(squares, 0) / a.shape[1])


def kernel(scales: Array, pairs: _PairTerms) -> Array:
    """Prior covariance of a metric in its variances.

    Args:
        scales: deviations of the linear part of options, of that of costs and of the smooth rest,
            and the length scale of that rest; each broadcasts against the pairs.
        pairs: of the architectures.
    """
    options, costs, rest, length = scales
    smooth = np.exp(-pairs.distance / (2 * length**2))
    return (
        CONSTANT_VARIANCE + options**2 * pairs.options + costs**2 * pairs.costs + rest**2 * smooth
    )


def fit_scales(pairs: _PairTerms, target: Array, noise: Array, *, is_linear: bool = False) -> Array:
    """Scales of the largest marginal likelihood, by a pattern search over their logarithms.

    Args:
        pairs: of the architectures.
        target: the metric per architecture, with deviation 1.
        noise: its noise variance per architecture.
        is_linear: leave out the smooth rest.
    """
    low, high = np.log(SCALE_RANGE)
    free = [0, 1] if is_linear else [0, 1, 2, 3]
    now = np.log(FIRST_SCALES)

    def scales(logs: Array) -> Array:
        return np.exp(logs) * ([1, 1, 0, 1] if is_linear else 1)

    best = _log_likelihood(scales(now), pairs, target, noise)
    step = 1.0
    while step > 0.1:
        is_better = False
        for i, sign in itertools.product(free, (-1, 1)):
            tried = now.copy()
            tried[i] = np.clip(tried[i] + sign * step, low, high)
            value = _log_likelihood(scales(tried), pairs, target, noise)
            if value > best + 1e-9:
                now, best, is_better = tried, value, True
        if not is_better:
            step /= 2
    return scales(now)


def _log_likelihood(scales: Array, pairs: _PairTerms, target: Array, noise: Array) -> float:
    """Up to a constant."""
    root = np.linalg.cholesky(kernel(scales, pairs) + np.diag(noise))
    solved = np.linalg.solve(root, target)
    return float(-0.5 * solved @ solved - np.log(np.diag(root)).sum())


def _covariance_of_seeds(logs: Sequence[Array]) -> Array:
    """Pooled covariance of trainings of one architecture: [columns, columns].

    Args:
        logs: per architecture, [seeds, columns].
    """
    repeated = [one - one.mean(0) for one in logs if len(one) > 1]
    freedom = sum(len(one) - 1 for one in repeated)
    return sum((one.T @ one for one in repeated), np.zeros(())) / freedom


def _root(covariance: Array) -> Array:
    """A matrix whose product with its transpose this is; it may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def _deviation(rows: Array) -> Array:
    """Deviation of each column; 1 for a constant one."""
    found = rows.std(0)
    return np.where(found > 1e-12, found, 1.0)


def _mean_tau(by_seed: Sequence[Array]) -> float | None:
    found = [kendall_tau(a, b) for a, b in itertools.combinations(by_seed, 2)]
    known = [one for one in found if one is not None]
    return float(np.mean(known)) if known else None


def _root_mean_square(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))
