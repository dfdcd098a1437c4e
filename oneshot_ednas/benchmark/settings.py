"""Whether trainings of a stored config are those that another config asks for."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from oneshot_ednas.config import ExperimentConfig
from oneshot_ednas.schema import to_plain

TRAINED_WITH = ("data", "tasks", "search.splits", "retrain", "multi_trial.steps")
"""Settings that the result of a trial depends on, besides the space and the seeds."""
NOT_OF_TRIALS = (
    "data.root",
    "data.layout",
    "data.manifest",
    "data.workers",
    "retrain.steps",
    "retrain.num_seeds",
    "retrain.loop",
)
"""Those under them that it does not; digests speak for the content of the data."""


def training_differences(stored: Mapping[str, Any], config: ExperimentConfig) -> list[str]:
    """Settings in which trials of a stored config differ from those of a config, as dotted keys.

    Seeds are left to the caller. A setting that the stored config lacks had its default.

    Args:
        stored: the config of a benchmark, as plain values, maybe of another version.
        config: the config at hand.
    """
    found: list[str] = []
    for where in TRAINED_WITH:
        held: Any = stored
        asked: Any = config
        for word in where.split("."):
            held = held.get(word) if isinstance(held, Mapping) else None
            asked = getattr(asked, word)
        found += _differing(held, asked, where)
    return found


def split_seed(config: Mapping[str, Any]) -> Any:
    """Seed of the splits, from plain values; older configs have only that of the run."""
    own = config.get("search", {}).get("split_seed")
    return config.get("seed") if own is None else own


def _differing(stored: Any, now: Any, where: str) -> Iterator[str]:
    if where in NOT_OF_TRIALS:
        return
    if isinstance(stored, Mapping) and (is_dataclass(now) or isinstance(now, Mapping)):
        asked, defaults = _parts(now)
        for key in {**stored, **asked}:
            if key not in asked or (key not in stored and key not in defaults):
                yield f"{where}.{key}"
            else:
                held = stored[key] if key in stored else defaults[key]
                yield from _differing(held, asked[key], f"{where}.{key}")
    # As JSON has it, where a tuple is a list.
    elif json.loads(json.dumps(to_plain(now))) != json.loads(json.dumps(stored)):
        yield where


def _parts(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings by name, and the defaults of those that have one, as plain values."""
    if isinstance(value, Mapping):
        return dict(value), {}
    known = fields(value)
    return (
        {one.name: getattr(value, one.name) for one in known},
        {one.name: to_plain(_default(one)) for one in known if _has_default(one)},
    )


def _has_default(field: "Field[Any]") -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _default(field: "Field[Any]") -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
