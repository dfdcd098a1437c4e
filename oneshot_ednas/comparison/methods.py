"""Runs by method and seed, and what each method found and spent."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from oneshot_ednas.comparison.runs import RecordedRun, differing
from oneshot_ednas.reward import reward
from oneshot_ednas.training import training_macs

BASELINES = {"base": "base", "random": "random_network"}
"""Methods of their own, by the name of the baseline: `random` is a search already."""
LABELS = {
    "one_shot": "one-shot",
    "evolution": "evolution",
    "random": "random search",
    "base": "base network",
    "random_network": "random network",
}
SAME_REWARD = 1e-4
"""Relative: what separates one training made twice, on one machine and on another."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What was spent, in multiply-adds and in seconds."""

    macs: float
    seconds: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(macs=self.macs + other.macs, seconds=self.seconds + other.seconds)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The network that a method found with one seed, retrained and scored on the test split."""

    run: RecordedRun
    figures: Mapping[str, Any]
    """Its part of `results.json`."""
    search: Cost
    retrain: Cost

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.run.seed

    @property
    def cost(self) -> Cost:
        """Of search and retraining."""
        return self.search + self.retrain

    @property
    def rewards(self) -> list[float]:
        """One per training."""
        return [float(value) for value in self.figures["reward_per_seed"]]

    @property
    def reward(self) -> float:
        """Mean over the trainings."""
        return statistics.fmean(self.rewards)

    @property
    def latency_ms(self) -> float:
        """Of the network."""
        return float(self.figures["latency_ms"])

    @property
    def is_inside_target(self) -> bool:
        """Whether the network meets the latency target."""
        return bool(self.figures["is_inside_target"])

    @property
    def accuracy(self) -> float:
        """The accuracy product: the reward without its latency factor."""
        return self.reward / reward(1.0, self.latency_ms, self.run.config.latency.target_ms)


@dataclass(frozen=True, kw_only=True)
class Method:
    """All that one method found, one network per seed."""

    name: str
    label: str
    found: tuple[Found, ...]
    """By ascending seed."""
    missing: dict[int, str]
    """Seeds that other methods have and this one has not, and why."""

    @cached_property
    def rewards(self) -> list[list[float]]:
        """Per run, one reward per training."""
        return [one.rewards for one in self.found]

    @property
    def reward(self) -> float:
        """Mean over runs."""
        return statistics.fmean(one.reward for one in self.found)

    @property
    def seeds(self) -> list[int]:
        """Seeds of its finished runs."""
        return [one.seed for one in self.found]


def group(runs: Sequence[RecordedRun]) -> tuple[list[Method], list[str]]:
    """Methods, searches first, and what is odd about them, in words.

    Runs of one method with other search settings are a method of their own, named after the
    settings in which they differ. Unfinished runs and missing seeds are listed, not averaged.

    Raises:
        ValueError: if two runs are of the same method and seed.
    """
    named: dict[str, dict[int, RecordedRun]] = {}
    for run, name in zip(runs, _names(runs), strict=True):
        of_method = named.setdefault(name, {})
        if run.seed in of_method:
            raise ValueError(
                f"{of_method[run.seed].folder} and {run.folder} are both {name} with seed "
                f"{run.seed}; give one of them"
            )
        of_method[run.seed] = run
    seeds = sorted({run.seed for run in runs})
    methods = []
    for name, by_seed in sorted(named.items(), key=lambda item: _order(item[0])):
        found = [_picked(by_seed[seed]) for seed in sorted(by_seed) if by_seed[seed].results]
        unfinished = {
            seed: f"{run.folder} is not finished"
            for seed, run in by_seed.items()
            if run.results is None
        }
        methods.append(_method(name, found, seeds, unfinished))
    baselines, notes = _baselines(runs, seeds)
    return methods + baselines, notes


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and standard deviation (of a sample; None for a single value)."""
    numbers = list(values)
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
    }


def _names(runs: Sequence[RecordedRun]) -> list[str]:
    """The method of each run, with the settings in which its runs differ."""
    names = []
    for run in runs:
        peers = [other for other in runs if other.method == run.method]
        keys = dict.fromkeys(
            key
            for peer in peers
            for key in differing(peers[0].search_settings, peer.search_settings)
        )
        words = [f"{key}={run.search_settings.get(key)}" for key in keys]
        names.append(f"{run.method} ({', '.join(words)})" if words else run.method)
    return names


def _order(name: str) -> tuple[int, str]:
    return list(LABELS).index(name.partition(" ")[0]), name


def _method(
    name: str, found: Sequence[Found], seeds: Sequence[int], unfinished: Mapping[int, str]
) -> Method:
    base, space, rest = name.partition(" ")
    have = {one.seed for one in found}
    return Method(
        name=name,
        label=LABELS[base] + space + rest,
        found=tuple(sorted(found, key=lambda one: one.seed)),
        missing={seed: unfinished.get(seed, "no run") for seed in seeds if seed not in have},
    )


def _picked(run: RecordedRun) -> Found:
    assert run.results is not None
    cost = run.results["cost"]
    return Found(
        run=run,
        figures=run.results,
        search=Cost(macs=cost["search_macs"], seconds=cost["search_seconds"]),
        retrain=Cost(macs=cost["retrain_macs"], seconds=cost["retrain_seconds"]),
    )


def _baselines(runs: Sequence[RecordedRun], seeds: Sequence[int]) -> tuple[list[Method], list[str]]:
    """Baselines are functions of setup and seed, so one run per seed tells."""
    methods, notes = [], []
    for baseline, name in BASELINES.items():
        by_seed: dict[int, Found] = {}
        for run in runs:
            figures = ((run.results or {}).get("baselines") or {}).get(baseline)
            if figures is None:
                continue
            one = _baseline(run, baseline, figures)
            first = by_seed.setdefault(run.seed, one)
            if abs(one.reward - first.reward) > SAME_REWARD * abs(first.reward):
                notes.append(
                    f"{LABELS[name]}, seed {run.seed}: {run.folder} has reward {one.reward:.4g}, "
                    f"{first.run.folder} has {first.reward:.4g}; the latter counts"
                )
        if by_seed:
            methods.append(_method(name, list(by_seed.values()), seeds, {}))
    return methods, notes


def _baseline(run: RecordedRun, baseline: str, figures: Mapping[str, Any]) -> Found:
    assert run.results is not None
    config = run.config.retrain
    macs = training_macs(round(1e9 * figures["gmacs"]), config.steps * config.batch_size)
    seconds = run.results["seconds"][f"baseline.{baseline}"]
    return Found(
        run=run,
        figures=figures,
        search=Cost(macs=0.0, seconds=0.0),
        retrain=Cost(macs=macs * len(figures["reward_per_seed"]), seconds=seconds),
    )
