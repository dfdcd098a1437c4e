"""What `measure.py` wrote on a device, read strictly: one machine, one runtime, one unit."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oneshot_ednas.bundle.robust import MAD_TO_DEVIATION
from oneshot_ednas.measure import FORMAT, UNIT
from oneshot_ednas.parsing import parse_json

_MEDIAN_TO_MEAN = 1.2533  # for normal noise: the error of a median over that of a mean


@dataclass(frozen=True, kw_only=True)
class Session:
    """Where times were made. Times may be held together only where all of this is equal."""

    bundle: str
    """Digest of the bundle that was measured."""
    device: str
    """What the times are of, as stated by who measured."""
    machine: str
    """Processor or board, operating system and architecture."""
    host: str
    runtime: str
    runtime_version: str
    delegate: str | None
    kernels: str
    threads: int
    clock_mhz: int | float | None
    compiler: str | None


@dataclass(frozen=True, kw_only=True)
class ModelTime:
    """Time of one model, over all rounds in which it was measured."""

    ms: float
    """Median over rounds of the median over runs."""
    spread_ms: float
    """Half the interquartile range over runs, median over rounds."""
    error_ms: float
    """Standard error of `ms`, from its own rounds and runs alone."""
    runs: int
    """Timed runs in all rounds."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Times of the models of one bundle on one machine."""

    session: Session
    date: str
    """Of the last sitting, `YYYY-MM-DD`."""
    times: Mapping[str, ModelTime]
    """By path of the model inside the bundle."""
    failures: Mapping[str, str]
    """Models that never ran, with the last error."""


class _Round(NamedTuple):
    median_ms: float
    spread_ms: float
    runs: int


def read_measurements(paths: Sequence[Path]) -> Measurements:
    """Read files of measurements and pool them: a median over all rounds of each model.

    A last line that was cut off is left out with a warning.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for no file, a file named twice, a damaged line, a time that is not finite and
            positive, another unit, or files from different machines, runtimes or bundles; names
            file and line.
    """
    if not paths:
        raise ValueError("expected at least one file of measurements")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"each file once, got {', '.join(map(str, paths))}")
    reading = _Reading()
    for path in paths:
        reading.begin_file()
        for where, line in _lines(path):
            reading.add(line, where)
    if reading.session is None or not reading.rounds:
        raise ValueError(f"no model is timed in {', '.join(map(str, paths))}")
    return Measurements(
        session=reading.session,
        date=max(reading.dates),
        times=_pooled(reading.rounds),
        failures={m: error for m, error in reading.failures.items() if m not in reading.rounds},
    )


class _Reading:
    """What the lines so far said."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.dates: list[str] = []
        self.rounds: dict[str, list[_Round]] = defaultdict(list)
        self.failures: dict[str, str] = {}

    def begin_file(self) -> None:
        self.has_session = False
        self.seen: set[tuple[str, int]] = set()

    def add(self, line: Mapping[str, Any], where: str) -> None:
        kind = _text(line, "type", where)
        if kind == "session":
            self.session = _same(self.session, _session(line, where), where)
            self.dates.append(_text(line, "date", where))
            self.has_session = True
        elif not self.has_session:
            raise ValueError(f"{where}: type: expected session first, got {kind}")
        elif kind == "failure":
            self.failures[_text(line, "model", where)] = _text(line, "error", where)
        elif kind == "model":
            model, number = _text(line, "model", where), _whole(line, "round", where)
            if (model, number) in self.seen:
                raise ValueError(f"{where}: a second line for round {number} of {model}")
            self.seen.add((model, number))
            self.rounds[model].append(_round(line, where))
        else:
            raise ValueError(f"{where}: type: expected session, model or failure, got {kind}")


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no measurements {path}; make them on the device with measure.py, which is in the "
            f"bundle"
        )
    lines = path.read_bytes().rstrip().split(b"\n")
    for number, text in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            line = parse_json(text.decode("utf-8"), where)
        except ValueError as error:
            if number == len(lines) > 1:
                warnings.warn(f"{where}: the last line was cut off; it is left out", stacklevel=3)
                return
            reason = str(error).removeprefix(f"{where}: not valid JSON: ")
            raise ValueError(
                f"{where}: not valid JSON ({reason}); the file is damaged: measure anew"
            ) from None
        if not isinstance(line, dict):
            raise ValueError(f"{where}: expected an object, got {text.decode('utf-8')[:40]}")
        yield where, line


def _session(line: Mapping[str, Any], where: str) -> Session:
    for key, expected in {"format": FORMAT, "unit": UNIT}.items():
        if line.get(key) != expected:
            raise ValueError(f"{where}: {key}: expected {expected}, got {line.get(key)}")
    values = {}
    for field in fields(Session):
        value = line.get(field.name)
        # `type`, because true is a whole number to isinstance.
        if field.name not in line or not isinstance(value, field.type) or type(value) is bool:  # type: ignore[arg-type]
            expected = getattr(field.type, "__name__", str(field.type)).replace("str", "text")
            raise ValueError(f"{where}: {field.name}: expected {expected}, got {value!r}")
        values[field.name] = value
    return Session(**values)


def _same(before: Session | None, now: Session, where: str) -> Session:
    for field in fields(Session):
        was, got = getattr(before or now, field.name), getattr(now, field.name)
        if was != got:
            raise ValueError(
                f"{where}: {field.name} is {got!r}, in the sessions before {was!r}; a table holds "
                f"times of one machine, runtime and bundle"
            )
    return now


def _round(line: Mapping[str, Any], where: str) -> _Round:
    return _Round(
        median_ms=_time(line, "median_ms", where, is_positive=True),
        spread_ms=_time(line, "spread_ms", where, is_positive=False),
        runs=_whole(line, "runs", where, least=1),
    )


def _text(line: Mapping[str, Any], key: str, where: str) -> str:
    value = line.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {key}: expected text, got {value!r}")
    return value


def _whole(line: Mapping[str, Any], key: str, where: str, *, least: int = 0) -> int:
    value = line.get(key)
    if type(value) is not int or value < least:
        raise ValueError(f"{where}: {key}: expected a whole number >= {least}, got {value!r}")
    return value


def _time(line: Mapping[str, Any], key: str, where: str, *, is_positive: bool) -> float:
    value = line.get(key)
    is_good = type(value) in (int, float) and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]
    if not is_good or (is_positive and value == 0):
        expected = f"a finite time {'> 0' if is_positive else '>= 0'} in ms"
        raise ValueError(f"{where}: {key}: expected {expected}, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def _pooled(rounds: Mapping[str, Sequence[_Round]]) -> dict[str, ModelTime]:
    times = {}
    for model, each in rounds.items():
        medians = np.array([one.median_ms for one in each])
        ms, runs = float(np.median(medians)), sum(one.runs for one in each)
        spread_ms = float(np.median([one.spread_ms for one in each]))
        # What varies from run to run, and from round to round; the larger of the two counts.
        between = MAD_TO_DEVIATION * float(np.median(np.abs(medians - ms))) / math.sqrt(len(each))
        within = MAD_TO_DEVIATION * spread_ms / math.sqrt(runs)
        times[model] = ModelTime(
            ms=ms, spread_ms=spread_ms, error_ms=_MEDIAN_TO_MEAN * max(between, within), runs=runs
        )
    return times
