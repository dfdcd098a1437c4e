"""Run folders as a comparison reads them, and whether they may be compared at all."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from oneshot_ednas.config import ExperimentConfig, what_defines
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.multi_trial.trials import Trial, read_trials
from oneshot_ednas.report.plots import RunLog
from oneshot_ednas.run_folder import RunFiles
from oneshot_ednas.schema import load_yaml, read_json, to_plain
from oneshot_ednas.space import SearchSpace

Settings = dict[str, Any]
"""Values by dotted key."""

RESULT_KEYS = ("method", "cost", "reward_per_seed", "metrics", "latency_ms", "architecture")
"""Keys without which the results are not those of a run of this version."""


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run, as its folder tells."""

    folder: Path
    config: ExperimentConfig
    setup: Settings
    """What must be the same in all runs of a comparison."""
    results: dict[str, Any] | None
    """None while the run is not finished."""
    trials: tuple[Trial, ...]
    """Of a multi-trial search, by number."""
    candidates: tuple[dict[str, Any], ...]
    """Of a one-shot search: scores with supernet weights, the derived architecture first."""
    log: RunLog

    @property
    def method(self) -> str:
        """How its architecture was found."""
        return self.config.method

    @property
    def seed(self) -> int:
        """The seed of everything in it; retraining adds further ones."""
        return self.config.seed

    @property
    def is_predicted(self) -> bool:
        """Whether its metrics are those that a benchmark predicts: nothing was trained."""
        return "data.json.benchmark" in self.setup

    @cached_property
    def search_settings(self) -> Settings:
        """The settings that belong to its method alone."""
        config = what_defines(self.config)
        if self.method != "one_shot":
            return flatten({"multi_trial": to_plain(config.multi_trial)})
        search = to_plain(config.search)
        # Those of all methods; which frames a split holds depends on a seed in every run.
        del search["splits"], search["split_seed"]
        return flatten({"search": search, "derive": to_plain(config.derive)})


def read_run(folder: Path) -> RecordedRun:
    """Read a run folder; nothing in it is changed.

    Raises:
        FileNotFoundError: if it is no run folder, or lacks a file that every run begins with.
        ValueError: if a file is damaged, or of another version.
    """
    files = RunFiles(folder)
    if not files.config.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.yaml")
    config = load_yaml(files.config, ExperimentConfig)
    results = read_json(files.results) if files.results.exists() else None
    if results is not None:
        missing = [key for key in RESULT_KEYS if key not in results]
        if missing:
            raise ValueError(
                f"{files.results} has no {', '.join(missing)}; another version wrote it: evaluate "
                f"the run again"
            )
        if results["cost"]["search_macs"] is None:
            raise ValueError(
                f"{files.results}: the multiply-adds of the search are not known, since an older "
                f"version trained part of it; search again"
            )
    return RecordedRun(
        folder=folder,
        config=config,
        setup=_setup(files, config),
        results=results,
        trials=tuple(read_trials(files.trials)) if files.trials.exists() else (),
        candidates=(
            tuple(read_json(files.candidates)["candidates"]) if files.candidates.exists() else ()
        ),
        log=RunLog.read(folder / "metrics.jsonl"),
    )


def check_comparable(runs: Sequence[RecordedRun]) -> None:
    """Refuse runs of which one has an advantage that is not its method's.

    Raises:
        ValueError: naming the first run that differs from the first one, and in which keys.
    """
    for run in runs[1:]:
        if run.is_predicted != runs[0].is_predicted:
            predicted, trained = (run, runs[0]) if run.is_predicted else (runs[0], run)
            raise ValueError(
                f"{run.folder} cannot be compared with {runs[0].folder}: the metrics of "
                f"{predicted.folder} are predicted by a benchmark, the networks of "
                f"{trained.folder} are trained; compare runs of one kind"
            )
        found = differing(runs[0].setup, run.setup)
        if found:
            shown = "; ".join(_difference(key, runs[0].setup, run.setup) for key in found)
            raise ValueError(
                f"{run.folder} cannot be compared with {runs[0].folder}: they differ in {shown}"
            )


def differing(one: Settings, other: Settings) -> list[str]:
    """Keys whose values differ, or that only one of the two has."""
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def flatten(tree: Mapping[str, Any], where: str = "") -> Settings:
    """A nested dict by dotted keys; an empty dict inside it is kept as a value."""
    flat: Settings = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        flat |= flatten(value, name) if isinstance(value, dict) and value else {name: value}
    return flat


def _setup(files: RunFiles, config: ExperimentConfig) -> Settings:
    """What must be the same: space, data, splits, tasks with the reward, latency and retraining."""
    plain = to_plain(what_defines(config))
    setup = flatten({key: plain[key] for key in ("data", "tasks", "retrain")})
    del setup["data.manifest"]  # where it lies; the digests speak for what it says
    setup["latency.target_ms"] = config.latency.target_ms
    setup["space.yaml"] = _digest(SearchSpace.load(files.space).to_yaml())
    setup["latency_table.csv"] = _digest(LatencyTable.load(files.table).to_text())
    for path in (files.data, files.splits):
        if path.exists():
            values = read_json(path)
            # Which frames a split holds depends on the seed, how many not.
            shown = {k: len(v) if path == files.splits else v for k, v in values.items()}
            setup |= flatten(shown, path.name)
    return setup


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _difference(key: str, one: Settings, other: Settings) -> str:
    shown = [json.dumps(side[key]) if key in side else "nothing" for side in (one, other)]
    # Digests are too long to read, and say nothing.
    return key if max(map(len, shown)) > 40 else f"{key} ({shown[1]} against {shown[0]})"
