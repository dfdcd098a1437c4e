"""The reward of a network, and its gain over baselines: pure functions of metrics and latency.

Metrics come as `metrics[task][metric]`, as evaluation returns them. Only a task's reward metrics
enter by default, so that further diagnostics (rmse, delta_1, ...) do not change a score.

Source:
    Vu et al., Toward Edge-Efficient Dense Predictions with Synergistic Multi-Task Neural
    Architecture Search, WACV 2023, eq. 4-7 and 9-12, https://arxiv.org/abs/2210.01384
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from oneshot_ednas.tasks import LOWER_IS_BETTER, REWARD_METRICS

SMALLEST_ERROR = 1e-6
"""An error below this, such as a perfect 0, counts as this in the accuracy product."""


@dataclass(frozen=True, kw_only=True)
class Deltas:
    """Relative gains over baselines, in percent; positive is better."""

    metrics: dict[str, dict[str, float]]
    """Per task and metric (eq. 9)."""

    tasks: dict[str, float]
    """Per task, the mean over its metrics (eq. 11)."""

    overall: float
    """The mean over tasks (eq. 12)."""


def accuracy_product(
    metrics: Mapping[str, Mapping[str, float]],
    *,
    weights: Mapping[str, Mapping[str, float]] | None = None,
    lower_is_better: Collection[str] = LOWER_IS_BETTER,
) -> float:
    """Geometric mean over tasks of each task's weighted geometric mean over metrics.

    The paper does not say how errors enter: here an error m enters as 1/m, at least
    `SMALLEST_ERROR`, so that its unit changes every product by the same factor. A
    higher-is-better metric of 0 makes the product 0.

    Args:
        metrics: value per task and metric, finite and not negative.
        weights: weight per task and metric (w_ij); metrics without one do not enter. None gives
            weight 1 to the known reward metrics of each task, or to all where it has none of them.
        lower_is_better: names of the metrics that are errors.

    Returns:
        The accuracy product, 0 or more.

    Raises:
        ValueError: if nothing enters, a weighted metric is missing, or a value is negative or not
            finite.
    """
    if not metrics:
        raise ValueError("expected metrics of at least one task, got none")
    if weights is None:
        weights = {task: dict.fromkeys(_reward_names(metrics[task]), 1.0) for task in metrics}
    elif set(weights) != set(metrics):
        raise ValueError(
            f"expected weights for the tasks {', '.join(metrics)}, "
            f"got {', '.join(weights) or 'none'}"
        )
    log_means = [_log_mean(task, metrics[task], weights[task], lower_is_better) for task in metrics]
    return math.exp(math.fsum(log_means) / len(log_means))


def reward(
    accuracy: float, latency_ms: float, target_ms: float, *, p: float = 0.0, q: float = -0.07
) -> float:
    """Accuracy times (latency / target)^p within the target, ^q above it.

    Args:
        accuracy: the accuracy product.
        latency_ms: latency of the network, in ms.
        target_ms: latency target, in ms.
        p: exponent up to and at the target; 0 makes every network inside it equal.
        q: exponent above the target, 0 or less.

    Raises:
        ValueError: if a latency is not positive, or the accuracy is negative or not finite.
    """
    if not (math.isfinite(accuracy) and accuracy >= 0):
        raise ValueError(f"accuracy must be finite and not negative, got {accuracy}")
    for name, value in (("latency_ms", latency_ms), ("target_ms", target_ms)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and above 0, got {value}")
    exponent = p if latency_ms <= target_ms else q
    return accuracy * (latency_ms / target_ms) ** exponent


def delta_metric(value: float, baseline: float, *, lower_is_better: bool) -> float:
    """Gain of one metric over its baseline, in percent; positive is better (eq. 9-10).

    Raises:
        ValueError: if the baseline is not positive, or a value is not finite.
    """
    if not (math.isfinite(value) and math.isfinite(baseline) and baseline > 0):
        raise ValueError(
            f"expected a finite value and a baseline above 0, got {value} and {baseline}"
        )
    gain = (value - baseline) / baseline * 100
    return -gain if lower_is_better else gain


def delta_task(metric_deltas: Iterable[float]) -> float:
    """Mean gain over a task's metrics, in percent (eq. 11).

    Raises:
        ValueError: if there is none.
    """
    return _mean(metric_deltas, "metric")


def delta_overall(task_deltas: Iterable[float]) -> float:
    """Mean gain over tasks, in percent (eq. 12).

    Raises:
        ValueError: if there is none.
    """
    return _mean(task_deltas, "task")


def deltas(
    metrics: Mapping[str, Mapping[str, float]],
    baselines: Mapping[str, Mapping[str, float]],
    *,
    names: Mapping[str, Collection[str]] | None = None,
    lower_is_better: Collection[str] = LOWER_IS_BETTER,
) -> Deltas:
    """All gains of a network over baselines, such as single-task networks.

    Args:
        metrics: value per task and metric; the same metrics enter as in `accuracy_product`.
        baselines: value per task and metric; further tasks and metrics are not looked at.
        names: the metrics of each task that enter, in place of those.
        lower_is_better: names of the metrics that are errors.

    Raises:
        ValueError: if a baseline is missing, zero or negative, or a value is not finite.
    """
    gains: dict[str, dict[str, float]] = {}
    for task, values in metrics.items():
        gains[task] = {}
        for name in _reward_names(values) if names is None else names[task]:
            if name not in baselines.get(task, {}):
                raise ValueError(f"no baseline for {task}.{name}; evaluate one, or leave it out")
            try:
                gains[task][name] = delta_metric(
                    values[name], baselines[task][name], lower_is_better=name in lower_is_better
                )
            except ValueError as error:
                raise ValueError(f"{task}.{name}: {error}") from None
    per_task = {task: delta_task(gain.values()) for task, gain in gains.items()}
    return Deltas(metrics=gains, tasks=per_task, overall=delta_overall(per_task.values()))


def _reward_names(values: Mapping[str, float]) -> list[str]:
    return [name for name in values if name in REWARD_METRICS] or list(values)


def _log_mean(
    task: str,
    values: Mapping[str, float],
    weights: Mapping[str, float],
    lower_is_better: Collection[str],
) -> float:
    """Logarithm of a task's weighted geometric mean; minus infinity if a metric is 0."""
    terms = []
    for name, weight in weights.items():
        if name not in values:
            raise ValueError(
                f"{task}.{name} has a weight but no value; got {', '.join(values) or 'none'}"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"weight of {task}.{name} must be finite and not negative, got {weight}"
            )
        if weight > 0:
            log_value = _log_value(f"{task}.{name}", values[name], name in lower_is_better)
            terms.append(weight * log_value)
    total = math.fsum(weights.values())
    if total == 0:
        raise ValueError(f"task {task} needs at least one metric with a weight above 0")
    return sum(terms) / total


def _log_value(where: str, value: float, is_error: bool) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{where} must be finite and not negative, got {value}")
    if is_error:
        return -math.log(max(value, SMALLEST_ERROR))
    return math.log(value) if value > 0 else -math.inf


def _mean(values: Iterable[float], what: str) -> float:
    numbers = list(values)
    if not numbers:
        raise ValueError(f"expected at least one {what} delta, got none")
    return math.fsum(numbers) / len(numbers)
