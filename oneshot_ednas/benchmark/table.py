"""The benchmark file: which architectures were trained, how, and what came out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.schema import parse_yaml, read_json
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.store import write_text
from oneshot_ednas.tasks import Task, TaskConfig, make_tasks
from oneshot_ednas.training import Metrics

FORMAT = 1
DIGITS = 6
"""Significant digits of stored figures, far more than their noise leaves."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One stand-alone training of one architecture."""

    seed: int
    cpu_seconds: float
    """Processor time, scoring included."""
    curve: dict[int, Metrics]
    """Validation metrics after some numbers of steps, ascending."""
    test_metrics: Metrics
    """At the end, on the test split; no search may look at them."""

    @property
    def metrics(self) -> Metrics:
        """Validation metrics at the end."""
        return self.curve[max(self.curve)]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One architecture and its trainings, by ascending seed."""

    architecture: Architecture
    trainings: tuple[Training, ...]


@dataclass(frozen=True, kw_only=True)
class _TasksOfConfig:
    """What is read of the config: the rest may be of another version."""

    tasks: dict[str, TaskConfig]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Trainings of many architectures of one space, all made in the same way."""

    space: SearchSpace
    config: dict[str, Any]
    """The config of the trainings, as plain values."""
    made: dict[str, Any]
    """How it was made: command, date, versions."""
    entries: tuple[Entry, ...]

    @property
    def steps(self) -> int:
        """Steps of every training."""
        return int(self.config["multi_trial"]["steps"])

    @property
    def batch_size(self) -> int:
        """Frames per step."""
        return int(self.config["retrain"]["batch_size"])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.config["data"]["height"]), int(self.config["data"]["width"])

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks that were trained."""
        held = json.dumps({"tasks": self.config["tasks"]})
        return make_tasks(parse_yaml(held, _TasksOfConfig, source="config").tasks)

    @cached_property
    def repeated(self) -> tuple[Entry, ...]:
        """Entries with the largest number of seeds, which is at least 2; they show the noise."""
        most = max(len(entry.trainings) for entry in self.entries)
        if most < 2:
            return ()
        return tuple(entry for entry in self.entries if len(entry.trainings) == most)

    # Files ----------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> "Benchmark":
        """Read a benchmark file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not one, naming the file and the entry.
        """
        data = read_json(Path(path))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path}: expected a benchmark of format {FORMAT}")
        try:
            space = SearchSpace.from_yaml(data["space"], source=f"{path}: space")
            columns = [tuple(name.split(".")) for name in data["columns"]]
            entries = tuple(
                _read_entry(row, columns, space, f"{path}: entry {number}")
                for number, row in enumerate(data["entries"], start=1)
            )
            return cls(space=space, config=data["config"], made=data["made"], entries=entries)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a benchmark: {error!r}") from None

    def save(self, path: str | Path) -> None:
        """Write the file that `load` reads: one line per training."""
        first = self.entries[0].trainings[0].metrics
        columns = [(task, name) for task, values in first.items() for name in values]
        rows = [_entry_text(entry, columns) for entry in self.entries]
        head = {
            "format": FORMAT,
            "made": self.made,
            "config": self.config,
            "space": self.space.to_yaml(),
            "columns": [".".join(column) for column in columns],
        }
        text = json.dumps(head, indent=1)[:-2]
        write_text(Path(path), text + ',\n "entries": [\n' + ",\n".join(rows) + "\n ]\n}\n")


def _entry_text(entry: Entry, columns: list[tuple[str, str]]) -> str:
    trainings = []
    for one in entry.trainings:
        row = {
            "seed": one.seed,
            "cpu_seconds": round(one.cpu_seconds, 2),
            "curve": {str(step): _row(metrics, columns) for step, metrics in one.curve.items()},
            "test": _row(one.test_metrics, columns),
        }
        trainings.append("   " + json.dumps(row, separators=(",", ":")))
    name = json.dumps(str(entry.architecture))
    return f'  {{"architecture": {name}, "trainings": [\n' + ",\n".join(trainings) + "]}"


def _row(metrics: Metrics, columns: list[tuple[str, str]]) -> list[float]:
    return [float(f"{metrics[task][name]:.{DIGITS}g}") for task, name in columns]


def _read_entry(
    row: Mapping[str, Any], columns: list[tuple[str, ...]], space: SearchSpace, where: str
) -> Entry:
    def metrics(values: list[float]) -> Metrics:
        if len(values) != len(columns) or not np.isfinite(values).all():
            raise ValueError(f"{where}: expected {len(columns)} finite figures, got {values}")
        table: Metrics = {}
        for (task, name), value in zip(columns, values, strict=True):
            table.setdefault(task, {})[name] = float(value)
        return table

    try:
        architecture = Architecture.from_short(row["architecture"], space=space.name)
        space.check(architecture)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    trainings = tuple(
        Training(
            seed=int(one["seed"]),
            cpu_seconds=float(one["cpu_seconds"]),
            curve={int(step): metrics(values) for step, values in one["curve"].items()},
            test_metrics=metrics(one["test"]),
        )
        for one in row["trainings"]
    )
    if not trainings or not all(training.curve for training in trainings):
        raise ValueError(f"{where}: has no training, or one without a figure")
    return Entry(architecture=architecture, trainings=trainings)
