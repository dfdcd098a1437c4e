"""Runs, grouped, checked and reckoned: everything that the files of a comparison say."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from oneshot_ednas.comparison.bootstrap import FEW_SEEDS, Difference, difference
from oneshot_ednas.comparison.methods import BASELINES, Found, Method, group
from oneshot_ednas.comparison.runs import RecordedRun, check_comparable, read_run
from oneshot_ednas.reward import Deltas, deltas
from oneshot_ednas.tasks import Task, lower_is_better, make_tasks
from oneshot_ednas.training import Metrics


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the files say."""

    runs: tuple[RecordedRun, ...]
    tasks: dict[str, Task]
    methods: tuple[Method, ...]
    """Those with a finished run."""
    unfinished: tuple[Method, ...]
    """Those without."""
    differences: tuple[Difference, ...]
    baseline: Method | None
    """What gains are relative to."""
    gains: dict[str, list[Deltas]]
    """Per method, one per run; empty without a baseline."""
    notes: tuple[str, ...]
    """What a reader should know before the figures."""

    @property
    def target_ms(self) -> float:
        """The latency target of all runs."""
        return self.runs[0].config.latency.target_ms

    @property
    def is_predicted(self) -> bool:
        """Whether the metrics are predicted by a benchmark: of all runs, or of none."""
        return self.runs[0].is_predicted

    @property
    def macs_power(self) -> int:
        """Tables and pictures count multiply-adds in 10 to this power, a multiple of 3.

        The largest that is not above the mean of the cheapest search.
        """
        means = [statistics.fmean(one.search.macs for one in each.found) for each in self.methods]
        return 3 * math.floor(math.log10(min((m for m in means if m > 0), default=1.0)) / 3)


def compared(folders: Sequence[Path], *, baseline: str | None = None) -> Comparison:
    """Compare the methods of some runs.

    Args:
        folders: run folders, one per method and seed.
        baseline: method that the gains are relative to; None is the base network where some run
            trained it.

    Raises:
        FileNotFoundError: if a folder holds no run.
        ValueError: if the runs cannot be compared, a file is damaged, no run is finished, or no
            run has the baseline.
    """
    if len({folder.resolve() for folder in folders}) < len(folders) or not folders:
        raise ValueError(
            f"expected run folders, each once, got {', '.join(map(str, folders)) or 'none'}"
        )
    runs = [read_run(folder) for folder in folders]
    check_comparable(runs)
    methods, notes = group(runs)
    finished = [method for method in methods if method.found]
    if not finished:
        raise ValueError("none of the runs is finished: there is nothing to compare")
    differences = [
        difference(one.name, other.name, (one.rewards, other.rewards))
        for one, other in combinations(finished, 2)
    ]
    tasks = make_tasks(runs[0].config.tasks)
    reference = _baseline(finished, baseline)
    gains: dict[str, list[Deltas]] = {}
    if reference is None:
        notes.append("No gains over a baseline: no run trained the base network.")
    else:
        try:
            gains = _gains(finished, reference, tasks)
        except ValueError as error:  # a metric of 0 has no relative gain; all else can be shown
            notes.append(f"No gains over {reference.label}: {error}")
    return Comparison(
        runs=tuple(runs),
        tasks=tasks,
        methods=tuple(finished),
        unfinished=tuple(method for method in methods if not method.found),
        differences=tuple(differences),
        baseline=reference,
        gains=gains,
        notes=(*_warnings(methods), *_made_otherwise(runs), *notes),
    )


def _baseline(methods: Sequence[Method], name: str | None) -> Method | None:
    by_name = {method.name: method for method in methods}
    if name is not None and name not in by_name:
        raise ValueError(
            f"--baseline: expected a method with a finished run ({', '.join(by_name)}), got {name}"
        )
    return by_name.get(BASELINES["base"] if name is None else name)


def _gains(
    methods: Sequence[Method], baseline: Method, tasks: dict[str, Task]
) -> dict[str, list[Deltas]]:
    """Gains of every run over the baseline's mean (EDNAS eq. 9-12)."""
    rows = [_reward_metrics(found, tasks) for found in baseline.found]
    reference = {
        task: {name: statistics.fmean(row[task][name] for row in rows) for name in values}
        for task, values in rows[0].items()
    }
    errors = lower_is_better(tasks)
    names = {name: tuple(task.reward_metrics) for name, task in tasks.items()}
    return {
        method.name: [
            deltas(_reward_metrics(one, tasks), reference, names=names, lower_is_better=errors)
            for one in method.found
        ]
        for method in methods
    }


def _reward_metrics(found: Found, tasks: dict[str, Task]) -> Metrics:
    metrics = found.figures["metrics"]
    return {
        name: {metric: metrics[name][metric] for metric in task.reward_metrics}
        for name, task in tasks.items()
    }


def _benchmarks(method: Method) -> set[str]:
    return {
        one.run.results["benchmark"]["file"]
        for one in method.found
        if one.run.results and "benchmark" in one.run.results
    }


def _made_otherwise(runs: Sequence[RecordedRun]) -> list[str]:
    """Devices and versions of finished runs, where they are not the same."""
    notes = []
    made = [run.results["versions"] for run in runs if run.results and "versions" in run.results]
    for name in dict.fromkeys(name for one in made for name in one):
        values = sorted({one.get(name) or "unknown" for one in made})
        if len(values) > 1:
            # Seconds that a benchmark predicts do not depend on the device.
            has_seconds = name == "device" and not runs[0].is_predicted
            effect = "seconds do not compare" if has_seconds else "figures may differ by that"
            notes.append(f"Runs were made with different {name}: {', '.join(values)}; {effect}.")
    return notes


def _warnings(methods: Sequence[Method]) -> list[str]:
    notes = []
    for benchmark in sorted({name for method in methods for name in _benchmarks(method)}):
        notes.append(f"No network was trained: all figures are those of the benchmark {benchmark}.")
    for method in methods:
        for seed, why in method.missing.items():
            notes.append(f"{method.label}, seed {seed}: {why}; not averaged.")
    few = [method for method in methods if 0 < len(method.found) < FEW_SEEDS]
    if few:
        listed = ", ".join(f"{method.label} ({len(method.found)})" for method in few)
        notes.append(f"Fewer than {FEW_SEEDS} seeds: {listed}; a spread of so few says little.")
    return notes
