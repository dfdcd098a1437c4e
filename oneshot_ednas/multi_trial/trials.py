"""Trials in a SQLite file: written as they are proposed and as they end.

Both are events of one common order, so that a search can be replayed exactly. The file is never
rewritten: a trial that has ended stays, whatever happens to the search.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.multi_trial.database import (
    clear_errors,
    damaged,
    let_go,
    open_to_write,
    read_beside_writer,
    start_log,
    unsaved_path,
)
from oneshot_ednas.training import Metrics

FORMAT = 1
RESERVE_BYTES = 64 * 1024
"""Set aside for trials that end when the file cannot be written: about 2 KB each."""

State = Literal["running", "done", "failed", "duplicate"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One proposal and what came of it; figures are None where there is none."""

    number: int
    """From 0, in the order of proposals."""
    architecture: Architecture
    choices: tuple[int, ...]
    """As `SearchSpace.encode` gives."""
    seed: int
    """Of the training."""
    state: State
    """`duplicate`: a trial before had the architecture, and its figures are taken over."""
    proposed: int
    """Place of the proposal among the events of the search."""
    ended: int | None = None
    """Place of the end among them."""
    metrics: Metrics | None = None
    """On the validation split."""
    accuracy: float | None = None
    latency_ms: float
    reward: float | None = None
    """None also for a failed trial, whatever the search was told of it."""
    seconds: float | None = None
    cpu_seconds: float | None = None
    macs: float | None = None
    """Multiply-adds of the training, for a failed trial those of a whole one; 0 for a duplicate."""
    error: str | None = None


_COLUMNS = {
    "number": "INTEGER PRIMARY KEY",
    "architecture": "TEXT NOT NULL",
    "choices": "TEXT NOT NULL",
    "seed": "INTEGER NOT NULL",
    "state": "TEXT NOT NULL",
    "proposed": "INTEGER NOT NULL UNIQUE",
    "ended": "INTEGER UNIQUE",
    "metrics": "TEXT",
    "accuracy": "REAL",
    "latency_ms": "REAL NOT NULL",
    "reward": "REAL",
    "seconds": "REAL",
    "cpu_seconds": "REAL",
    "macs": "REAL",
    "error": "TEXT",
}


def read_trials(path: str | Path) -> list[Trial]:
    """All trials of a file, by number; the search that writes it may still run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or no file of trials.
        RuntimeError: if another process keeps it locked.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no trials {path}")
    with clear_errors(path, then="try again"):
        return read_beside_writer(path, partial(_read, path))


class TrialStore:
    """The trials of a running search."""

    def __init__(self, path: Path, *, commit_every: int = 1) -> None:
        """Open the file, or begin it.

        Args:
            path: the SQLite file.
            commit_every: events per transaction. More than 1 is faster and can lose the last ones
                to a crash.

        Raises:
            ValueError: if the file is damaged or none of trials; it is left as it is.
            RuntimeError: if another process keeps it locked, or the disk is full.
        """
        self.path, self.commit_every = path, commit_every
        self._unsaved_path = unsaved_path(path)
        self._unsaved: list[dict[str, Any]] = []
        self._is_broken = False
        """The file could not be written once: it is not tried again."""
        self._uncommitted = 0
        with clear_errors(path):
            self._connection = open_to_write(path)
        try:
            with clear_errors(path):
                self._begin_if_empty()
                self.trials = {trial.number: trial for trial in _read(path, self._connection)}
            self.num_events = len(self.trials)
            """Proposals and ends so far."""
            self.num_events += sum(trial.ended is not None for trial in self.trials.values())
            self._take_in_unsaved()
            with clear_errors(path):
                start_log(path, self._connection)
            self._reserve()
        except BaseException:
            let_go(self._connection)
            raise

    def _begin_if_empty(self) -> None:
        (count,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if count:
            return
        columns = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
        with self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"CREATE TABLE trials ({columns})")
            connection.execute(f"PRAGMA user_version = {FORMAT}")

    def close(self) -> None:
        """Commit what is left, and let the file go.

        Raises:
            RuntimeError: if that fails.
        """
        try:
            if not self._is_broken:
                with clear_errors(self.path):
                    self._connection.commit()
            if not self._unsaved:
                self._unsaved_path.unlink(missing_ok=True)
        finally:
            let_go(self._connection)

    def __enter__(self) -> "TrialStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Events ---------------------------------------------------------------------------------

    def propose(self, trial: Trial) -> None:
        """Keep a new trial.

        Raises:
            RuntimeError: if the file cannot be written.
            ValueError: if it is damaged.
        """
        row = _to_row(trial)
        marks = ", ".join("?" * len(row))
        with self._writing():
            self._connection.execute(
                f"INSERT INTO trials ({', '.join(row)}) VALUES ({marks})", tuple(row.values())
            )
        self.trials[trial.number] = trial
        self.num_events += 1

    def end(self, trial: Trial) -> None:
        """Keep what came of a trial.

        Where the file cannot be written it is kept beside it, and taken in when the file is next
        opened.

        Raises:
            RuntimeError: if the file cannot be written.
            ValueError: if it is damaged.
        """
        assert trial.ended is not None
        self.trials[trial.number] = trial
        self.num_events += 1
        row = _to_row(trial)
        if self._is_broken:
            self._put_aside(row)
            return
        try:
            with self._writing():
                self._write_end(row)
        except (RuntimeError, ValueError):
            self._put_aside(row)
            raise

    def _write_end(self, row: Mapping[str, Any]) -> None:
        names = [name for name in row if name != "number"]
        sets = ", ".join(f"{name} = ?" for name in names)
        values = [*(row[name] for name in names), row["number"]]
        done = self._connection.execute(
            f"UPDATE trials SET {sets} WHERE number = ? AND ended IS NULL", values
        )
        if done.rowcount != 1:
            raise RuntimeError(
                f"{self.path}: trial {row['number']} has been ended by another process; let only "
                f"one search run in a folder"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Around one event; commits if it is time to."""
        try:
            with clear_errors(self.path):
                yield
                self._uncommitted += 1
                if self._uncommitted >= self.commit_every:
                    self._connection.commit()
                    self._uncommitted = 0
        except (RuntimeError, ValueError):
            self._is_broken = True
            with suppress(sqlite3.Error):  # the first error says more
                self._connection.rollback()  # or it keeps others out
            raise

    # Ends that could not be written ---------------------------------------------------------

    def _reserve(self) -> None:
        """Set disk space aside for trials that end while the disk is full.

        Raises:
            RuntimeError: if there is none.
        """
        try:
            with self._unsaved_path.open("wb") as file:
                file.write(b"\n" * RESERVE_BYTES)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RuntimeError(
                f"{self._unsaved_path}: {error.strerror or error}; make room for it, then go on "
                f"with --resume"
            ) from None

    def _put_aside(self, row: dict[str, Any]) -> None:
        self._unsaved.append(row)
        data = "".join(json.dumps(one) + "\n" for one in self._unsaved).encode()
        # In place: on a full disk there is no room but what was reserved.
        try:
            mode = "r+b" if self._unsaved_path.exists() else "wb"
            with self._unsaved_path.open(mode) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RuntimeError(
                f"{self._unsaved_path}: {error.strerror or error}; trial {row['number']} has just "
                f"ended and can be written nowhere, it will be done again; see that the folder can "
                f"be written, then go on with --resume"
            ) from None

    def _take_in_unsaved(self) -> None:
        if not self._unsaved_path.exists():
            return
        with clear_errors(self.path):
            for number, line in enumerate(self._unsaved_path.read_text().splitlines(), start=1):
                if not line:
                    continue
                try:
                    trial = _from_row(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self._unsaved_path}:{number}: damaged ({error}); delete this line: its "
                        f"trial is then done again"
                    ) from None
                held = self.trials.get(trial.number)
                if held is not None and held.ended is None:
                    trial = replace(trial, ended=self.num_events)
                    self._write_end(_to_row(trial))
                    self.trials[trial.number] = trial
                    self.num_events += 1
            self._connection.commit()
        self._unsaved_path.unlink()


# Rows ---------------------------------------------------------------------------------------


def _read(path: Path, connection: sqlite3.Connection) -> list[Trial]:
    (form,) = connection.execute("PRAGMA user_version").fetchone()
    if form != FORMAT:
        raise ValueError(
            f"{path}: expected trials of format {FORMAT}, got {form}; choose another --out"
        )
    # A view could stand in for the table and never end, a trigger change what is written.
    held = "SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    if connection.execute(held).fetchall() != [("table", "trials")]:
        raise ValueError(damaged(path, "expected one table, trials, and nothing else"))
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise ValueError(damaged(path, " ".join(found.split())))
    cursor = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM trials ORDER BY number")
    try:
        return [_from_row(dict(zip(_COLUMNS, row, strict=True))) for row in cursor]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(damaged(path, str(error))) from None


def _to_row(trial: Trial) -> dict[str, Any]:
    row = {name: getattr(trial, name) for name in _COLUMNS}
    row["architecture"] = str(trial.architecture)
    row["choices"] = json.dumps(trial.choices)
    row["metrics"] = None if trial.metrics is None else json.dumps(trial.metrics)
    return row


def _from_row(row: Mapping[str, Any]) -> Trial:
    values = dict(row)
    values["architecture"] = Architecture.from_short(row["architecture"])
    values["choices"] = tuple(json.loads(row["choices"]))
    values["metrics"] = None if row["metrics"] is None else json.loads(row["metrics"])
    return Trial(**values)
