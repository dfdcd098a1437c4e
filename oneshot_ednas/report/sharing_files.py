"""The files of a run that searched what tasks share, read and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oneshot_ednas.report.plots import RunLog
from oneshot_ednas.schema import read_json, read_text
from oneshot_ednas.tasks import Task

FILES = {"branching": "branching.json", "operators": "policy.json"}
"""What a search by each method leaves; a run that searched both has both."""
RESULT_KEYS = (
    "method",
    "backbone",
    "found",
    "networks",
    "baseline",
    "target_ms",
    "search",
    "seed",
    "versions",
    "num_frames",
    "date",
)
"""Of `results.json`."""
NETWORK_KEYS = (
    "what",
    "parameters",
    "gmacs",
    "latency_ms",
    "shared_parameters",
    "metrics",
    "metrics_std",
    "delta",
    "branching",
    "seeds",
)
"""Of each network of `results.json`."""
SEARCHED_KEYS = {
    "branching": (
        "tasks",
        "layers",
        "groupings",
        "architectures",
        "probabilities",
        "grouping_probabilities",
    ),
    "operators": ("tasks", "operators", "policy", "probabilities"),
}
"""Of what a search by each method leaves."""


@dataclass(frozen=True, kw_only=True)
class SharingFiles:
    """What the report shows, as read from the run folder."""

    config_text: str
    results: dict[str, Any]
    branching: dict[str, Any] | None
    policy: dict[str, Any] | None
    seconds: dict[str, float]
    log: RunLog
    tasks: Mapping[str, Task]
    image: np.ndarray

    @property
    def networks(self) -> dict[str, dict[str, Any]]:
        """Figures of each network by its name, the found one first."""
        found = self.results["found"]
        return {found: self.results["networks"][found], **self.results["networks"]}

    @classmethod
    def read(cls, folder: Path, tasks: Mapping[str, Task], image: np.ndarray) -> "SharingFiles":
        """Read the files of a run folder.

        Args:
            folder: the run folder.
            tasks: the tasks that its files must have.
            image: uint8 [height, width, 3], a frame to show.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if one is damaged or does not belong to the tasks.
        """
        config = folder / "config.yaml"
        if not config.is_file():
            raise FileNotFoundError(f"no file {config}")
        path = folder / "results.json"
        results = _read_object(path, RESULT_KEYS)
        networks = results["networks"]
        _check_object(networks, (), f"{path}: networks")
        for key in ("found", "baseline"):
            if results[key] not in networks:
                raise ValueError(
                    f"{path}: {key}: expected one of {', '.join(networks)}, got {results[key]!r}"
                )
        for name, row in networks.items():
            _check_object(row, NETWORK_KEYS, f"{path}: network {name}")
            if set(row["metrics"]) != set(tasks):
                raise ValueError(
                    f"{path}: network {name}: expected metrics of the tasks "
                    f"{', '.join(tasks)}, got {', '.join(row['metrics']) or 'none'}"
                )
        if results["method"] not in FILES:
            raise ValueError(
                f"{path}: method: expected {' or '.join(FILES)}, got {results['method']!r}"
            )
        searched: dict[str, dict[str, Any] | None] = {}
        for method, keys in SEARCHED_KEYS.items():
            path = folder / FILES[method]
            needed = path.exists() or method == results["method"]
            found = searched[method] = _read_object(path, keys) if needed else None
            if found is not None and set(found["tasks"]) != set(tasks):
                raise ValueError(
                    f"{path}: expected the tasks {', '.join(tasks)}, "
                    f"got {', '.join(found['tasks'])}"
                )
        return cls(
            config_text=read_text(config),
            results=results,
            branching=searched["branching"],
            policy=searched["operators"],
            seconds=_read_object(folder / "seconds.json", ()),
            log=RunLog.read(folder / "metrics.jsonl"),
            tasks=tasks,
            image=image,
        )


def _read_object(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    found = read_json(path)
    _check_object(found, keys, str(path))
    return dict(found)


def _check_object(found: object, keys: Sequence[str], where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected an object, got {type(found).__name__}; run it again")
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(
            f"{where}: expected the keys {', '.join(keys)}, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; run it again"
        )
