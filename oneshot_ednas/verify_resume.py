"""Does a run go on exactly where it was killed? Tried on a copy of the run itself.

What defines the run and one of its checkpoints are copied. From there one process takes some steps
without a stop; others are killed with SIGKILL at random moments and resumed. In the end both have
the same state, bit by bit, and have logged the same, or the check tells the first difference. The
run is only read.
"""

import contextlib
import io
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.checkpoint import (
    has_checkpoint,
    load_checkpoint,
    previous_checkpoint,
    save_checkpoint,
    state_digest,
)
from oneshot_ednas.config import ExperimentConfig, TaskSharingConfig, load_config
from oneshot_ednas.pipeline import OneShotRun, Run, run_class
from oneshot_ednas.run_folder import RunFiles
from oneshot_ednas.schema import dump_yaml, read_json
from oneshot_ednas.sharing_methods import BranchRun, ShareRun
from oneshot_ednas.sharing_run import SharingRun
from oneshot_ednas.store import write_text
from oneshot_ednas.training import note

RESUMES = 0.25
"""Share of the kills that come while a process is still starting."""
POLL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of what a stage has come to."""

    name: str
    """Of an entry of the checkpoint, or `log`."""
    uninterrupted: str
    """SHA-256."""
    killed: str
    """SHA-256 in the run that was killed."""
    difference: str | None
    """The first one; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class StageCheck:
    """What became of a stage with kills and without."""

    stage: str
    first_step: int
    """Finished steps of the checkpoint that it began from."""
    last_step: int
    kills: tuple[int, ...]
    """Logged steps at each kill."""
    parts: tuple[Part, ...]
    cause: str | None
    """Where parts differ: what that says."""

    @property
    def difference(self) -> str | None:
        """The first difference; None if all is equal."""
        return next((part.difference for part in self.parts if part.difference), None)


def verify_resume(
    folder: Path,
    *,
    num_steps: int = 20,
    num_kills: int = 3,
    seed: int = 0,
    data: Path | None = None,
) -> list[StageCheck]:
    """Check that a run goes on exactly: its search, and its newest retraining.

    Each begins at its newest checkpoint or, where that is the last, at the one before; without one,
    at step 0.

    Args:
        folder: the run folder; it is only read.
        num_steps: steps to take, rounded up to whole intervals between checkpoints; fewer where the
            stage ends before.
        num_kills: processes to kill; fewer where one ends before it is killed.
        seed: of the moments.
        data: the data folder, where it is no longer where it was.

    Returns:
        One check per stage.

    Raises:
        FileNotFoundError: if it is no run folder, or lacks what it was started with.
        ValueError: for a run without such stages, or less than a step or a kill.
        RuntimeError: if a process fails by itself.
    """
    if num_steps < 1 or num_kills < 1:
        raise ValueError(f"expected at least 1 step and 1 kill, got {num_steps} and {num_kills}")
    run = open_run(folder, data)
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="verify_resume_") as work:
        return [
            _checked(run, stage, Path(work), num_steps, num_kills, moments)
            for stage in stages_to_check(run)
        ]


def open_run(folder: Path, data: Path | None = None) -> Run | SharingRun:
    """The run in a folder; nothing is written and nothing is locked.

    Raises:
        FileNotFoundError: if it is no run folder.
        ValueError: if it trains no networks, or its data is not readable.
    """
    files = RunFiles(folder)
    if not files.config.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.yaml")
    if files.data.is_file() and "benchmark" in read_json(files.data):
        raise ValueError(
            f"{folder} is a search on a benchmark, which trains no networks: there is no training "
            f"to resume"
        )
    method = folder / "method.json"
    if method.is_file():
        kind: type[SharingRun] = BranchRun if read_json(method) == BranchRun.method else ShareRun
        sharing = load_config(files.config, kind=TaskSharingConfig)
        return kind(replace(sharing, data=_found(sharing, data)), folder)
    config = load_config(files.config)
    config = replace(config, data=_found(config, data))
    return run_class(config)(config, folder, is_reopened=True)


def _found(config: ExperimentConfig | TaskSharingConfig, data: Path | None) -> Any:
    return config.data if data is None else replace(config.data, root=str(data.resolve()))


def stages_to_check(run: Run | SharingRun) -> dict[str, int]:
    """The search and the newest retraining of a run, with the steps that they have in all.

    Raises:
        ValueError: if it has neither.
    """
    if isinstance(run, SharingRun):
        return {run.method: run.search_config.steps}
    stages = {"search": run.config.search.steps} if isinstance(run, OneShotRun) else {}
    begun = [stage for stage in trainings(run) if has_checkpoint(run.files.checkpoint(stage))]
    if begun:
        newest = begun[-1]  # they are done in order
        stages[newest] = run.config.retrain.steps
    if not stages:
        raise ValueError(
            f"{run.files.folder} is a run of method {run.config.method} without a retraining yet: "
            f"finished trials are kept, and one that is killed begins anew, so there is nothing to "
            f"resume in it; see docs/durability.md"
        )
    return stages


def trainings(run: Run) -> dict[str, int]:
    """The retrainings of a run, each with the number of its seed."""
    seeds = range(run.config.retrain.num_seeds)
    baselines = dict.fromkeys((f"baseline.{name}" for name in run.baselines), 0)
    return {f"retrain.seed_{number}": number for number in seeds} | baselines


# One stage ----------------------------------------------------------------------------------


def _checked(
    run: Run | SharingRun,
    stage: str,
    work: Path,
    num_steps: int,
    num_kills: int,
    moments: random.Random,
) -> StageCheck:
    total = stages_to_check(run)[stage]
    first, state = _beginning(run.files.checkpoint(stage), total)
    # A few checkpoints, so that steps are lost and taken again.
    interval = max(1, num_steps // (num_kills + 1))
    last = min(total, -(-(first + num_steps) // interval) * interval)
    copies = {name: work / stage / name for name in ("uninterrupted", "killed", "again")}
    for copy in copies.values():
        _copy(run, copy, stage, state, interval)
    attempt = partial(_Attempt, stage=stage, last=last)

    note(f"verify-resume: {stage}: steps {first} to {last} without a stop")
    began = time.perf_counter()
    straight = attempt(copies["uninterrupted"])
    straight.wait_for(1)
    start_seconds = time.perf_counter() - began
    straight.finish()
    seconds = time.perf_counter() - began - start_seconds

    kills = []
    for number in range(num_kills):
        note(f"verify-resume: {stage}: kill {number + 1} of {num_kills}")
        begun = attempt(copies["killed"])
        if moments.random() < RESUMES:
            begun.process.join(moments.uniform(0, start_seconds))
        else:
            done = begun.logged
            begun.wait_for(moments.randint(done + 1, max(done + 1, last - first)))
            begun.process.join(moments.uniform(0, seconds / (last - first)))
        if not begun.kill():
            break
        kills.append(first + begun.logged)
    attempt(copies["killed"]).finish()

    parts = _parts(copies["uninterrupted"], copies["killed"], stage)
    cause = None
    if any(part.difference for part in parts):
        note(f"verify-resume: {stage}: they differ; once more without a stop, to tell why")
        attempt(copies["again"]).finish()
        again = _parts(copies["uninterrupted"], copies["again"], stage)
        cause = _cause(next((part.difference for part in again if part.difference), None))
    return StageCheck(
        stage=stage,
        first_step=first,
        last_step=last,
        kills=tuple(kills),
        parts=tuple(parts),
        cause=cause,
    )


def _beginning(checkpoint: Path, total: int) -> tuple[int, dict[str, Any] | None]:
    """Finished steps and state of the newest checkpoint that is not the last one."""
    for path in (checkpoint, previous_checkpoint(checkpoint)):
        if path.exists():
            state = load_checkpoint(path)
            if state["step"] < total:
                return int(state["step"]), state
    return 0, None


def _copy(
    run: Run | SharingRun, folder: Path, stage: str, state: dict[str, Any] | None, interval: int
) -> None:
    """A run folder that stands at a checkpoint, and writes often."""
    source, files = run.files, RunFiles(folder)
    folder.mkdir(parents=True)
    for path in (source.space, source.table, source.splits, source.data, source.architecture):
        if path.exists():
            shutil.copyfile(path, folder / path.name)
    if isinstance(run, SharingRun):
        shutil.copyfile(source.folder / "method.json", folder / "method.json")
    changes = {}
    for name in ("search", "retrain", "branching", "operators"):
        part = getattr(run.config, name, None)
        if part is not None:
            loop = replace(part.loop, log_every=1, checkpoint_every=interval)
            changes[name] = replace(part, loop=loop)
    if state is not None:
        save_checkpoint(files.checkpoint(stage), state)
    write_text(files.config, dump_yaml(replace(run.config, **changes)))


class _Attempt:
    """A process that goes on with a copy."""

    def __init__(self, copy: Path, *, stage: str, last: int) -> None:
        self._copy, self._stage = copy, stage
        # Fork would copy what a process has by now, and a resumed run begins without it.
        context = multiprocessing.get_context("spawn")
        self._errors, theirs = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(
            target=go_on, args=(copy, stage, last, theirs), daemon=True
        )
        self.process.start()
        theirs.close()

    @property
    def logged(self) -> int:
        """Steps in the log of the copy."""
        return len(_log(self._copy, self._stage))

    def wait_for(self, steps: int) -> None:
        """Until so many are logged, or the process has ended."""
        while self.process.is_alive() and self.logged < steps:
            time.sleep(POLL_SECONDS)

    def kill(self) -> bool:
        """SIGKILL; False if the process had come to its end.

        Raises:
            RuntimeError: if it had failed.
        """
        if not self.process.is_alive():
            self.finish()
            return False
        self.process.kill()
        self.process.join()
        return True

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            RuntimeError: if the process fails.
        """
        with contextlib.suppress(EOFError):  # nothing went wrong
            raise RuntimeError(f"{self._stage} does not go on: {self._errors.recv()}")
        self.process.join()
        if self.process.exitcode != 0:
            raise RuntimeError(f"{self._stage} does not go on: exit status {self.process.exitcode}")


# In the processes ---------------------------------------------------------------------------


class _ReachedError(Exception):
    """The last step to take is in a checkpoint."""


def go_on(folder: Path, stage: str, last: int, errors: Connection) -> None:
    """Go on with a stage of a run up to a checkpoint; what goes wrong is sent."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            _take_steps(folder, stage, last)
    except _ReachedError:
        return
    except Exception as error:
        errors.send(f"{type(error).__name__}: {error}")


def _take_steps(folder: Path, stage: str, last: int) -> None:
    run = open_run(folder)
    run.open(resume=True)
    checkpoint = run.files.checkpoint(stage)

    def on_save() -> None:
        if int(load_checkpoint(checkpoint)["step"]) >= last:
            raise _ReachedError

    if checkpoint.exists():
        on_save()  # killed after the last step
    if isinstance(run, SharingRun):
        assert isinstance(run, BranchRun | ShareRun)
        run.search.run(folder, checkpoint, on_save)
    elif stage == "search":
        assert isinstance(run, OneShotRun)
        run.search(on_save)
    else:
        name = stage.removeprefix("baseline.")
        is_baseline = name != stage
        one = run.baselines[name] if is_baseline else Architecture.load(run.files.architecture)
        run.train_network(one, stage, trainings(run)[stage], folder, on_save)


# Comparison ---------------------------------------------------------------------------------


def _log(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Numbers of each step of a stage; a line that is not whole is left out."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    return [row for row in rows if row["stage"] == stage and "loss/weights" in row]


def _parts(one: Path, other: Path, stage: str) -> list[Part]:
    states = [
        load_checkpoint(RunFiles(folder).checkpoint(stage))
        | {"log": {str(row["step"]): row for row in _log(folder, stage)}}
        for folder in (one, other)
    ]
    names = dict.fromkeys([*states[0], *states[1]])
    return [
        Part(
            name=name,
            uninterrupted=state_digest(states[0].get(name)),
            killed=state_digest(states[1].get(name)),
            difference=first_difference(states[0].get(name), states[1].get(name), name),
        )
        for name in names
    ]


def first_difference(one: Any, other: Any, where: str) -> str | None:
    """Where two states differ first, in words; None if they are equal bit by bit.

    Args:
        one: the state of the uninterrupted run, or a part of it.
        other: that of the run that was killed.
        where: name of the part.
    """
    if state_digest(one) == state_digest(other):
        return None
    for pairs in _inner(one, other):
        for name, (a, b) in pairs.items():
            found = first_difference(a, b, f"{where}/{name}")
            if found:
                return found
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape == other.shape and one.dtype == other.dtype:
            a, b = one.double(), other.double()
            count, most = int((a != b).sum()), float((a - b).abs().max())
            return f"{where}: {count} of {one.numel()} numbers differ, by up to {most:.3g}"
        return f"{where}: {tuple(one.shape)} {one.dtype}, not {tuple(other.shape)} {other.dtype}"
    return f"{where}: {_short(one)} against {_short(other)}"


def _inner(one: Any, other: Any) -> Iterator[Mapping[Any, tuple[Any, Any]]]:
    """Pairs of what two dicts of the same keys, or lists of the same length, hold."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        yield {key: (one[key], other[key]) for key in one}
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        yield dict(enumerate(zip(one, other, strict=True)))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _cause(again: str | None) -> str:
    if again is None:
        return (
            "two uninterrupted runs are equal: a step depends on something that its checkpoint "
            "does not hold"
        )
    return (
        f"two uninterrupted runs differ, too ({again}): a step itself is not repeatable; look for "
        f"draws from a generator without a seed, or for a device that adds in any order"
    )
