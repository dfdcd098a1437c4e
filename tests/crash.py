"""Crashes, enumerated: what a folder holds if its process, or the machine, dies at any moment.

A run is watched once. After each of its file operations, `Watcher` works out what a crash there
would leave, by a model of the disk: the content of a file counts as safe from its last fsync on,
and so do the names in a folder. To die there and to go on from such a folder is the same thing.
"""

import builtins
import hashlib
import io
import json
import os
import re
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny import new_run

from oneshot_ednas.pipeline import run_all
from oneshot_ednas.retrain import NetworkTraining
from oneshot_ednas.schema import read_json
from oneshot_ednas.search import OneShotSearch

WAYS = ("killed", "power cut", "power cut, names kept", "torn")
"""What a crash leaves: what the kernel shows; files and names as of their last fsync; files as of
their last fsync under the names that the kernel shows; what the kernel shows, but half of what was
written last."""
SEARCH_STEPS = 10
RETRAIN_STEPS = 6
INTERVALS = (2, 1)
"""Steps between checkpoints, of the search and of a retraining."""
SMALLEST = (
    "data.train_frames=16",
    "data.test_frames=2",
    f"search.steps={SEARCH_STEPS}",
    "search.batch_size=2",
    "search.num_validations=1",
    f"search.loop.checkpoint_every={INTERVALS[0]}",
    "derive.num_candidates=1",
    "derive.num_samples=0",
    "derive.calibration_batches=1",
    f"retrain.steps={RETRAIN_STEPS}",
    "retrain.batch_size=2",
    "retrain.num_seeds=1",
    "retrain.calibration_batches=1",
    f"retrain.loop.checkpoint_every={INTERVALS[1]}",
    "baselines=[base]",
)
"""A run of all stages in a second or two."""
DRAWS = "tensorboard"
"""Folder of what is drawn from the log: never synced, never read, and not compared."""

State = dict[str, tuple[str, int] | None]
"""By path, the SHA-256 of a file and the time in nanoseconds when it changed; None for folders."""


# A model of the disk ------------------------------------------------------------------------


@dataclass(eq=False)
class Content:
    """A file, whatever its names."""

    stamp: tuple[int, int] = (0, 0)
    """Size and time of the last change."""
    now: bytes = b""
    synced: bytes = b""
    torn: bytes = b""
    """With half of the last write."""


@dataclass(frozen=True)
class Point:
    """A moment after a file operation."""

    number: int
    """Operations so far."""
    operation: str
    path: str
    steps: int
    """Training steps that were begun."""
    states: dict[str, State]
    """By the way to die."""


class Watcher:
    """Watches the file operations of this process in a folder; `with` begins and ends it."""

    def __init__(
        self, folder: Path, *, blobs: Path | None = None, die_at: int | None = None
    ) -> None:
        """Watch a folder that exists, and is on the disk as it is.

        Args:
            folder: the folder.
            blobs: where to keep what files held, by SHA-256; None keeps no points.
            die_at: operation after which to be killed.
        """
        self.folder, self.blobs, self.die_at = folder, blobs, die_at
        self.points: list[Point] = []
        self.number = self.steps = 0
        self._inodes: dict[int, Content] = {}
        self._names: dict[str, dict[str, Content | None]] = {}
        self._last: Content | None = None
        self._lock = threading.RLock()
        self._look("")
        for content in self._inodes.values():
            content.synced = content.now
        self._synced_names = dict(self._names)

    @contextmanager
    def watching(self) -> Iterator["Watcher"]:
        """Look at each operation of the block."""
        first, second = lambda path, *_, **__: path, lambda _, path, **__: path
        touched = dict.fromkeys(("mkdir", "rmdir", "unlink", "remove", "truncate"), first)
        touched |= dict.fromkeys(("replace", "rename", "link", "symlink"), second)
        touched |= dict.fromkeys(("write", "fsync", "fdatasync", "ftruncate"), _path_of)
        touched["open"] = lambda path, flags, *_, **__: path if flags & os.O_CREAT else None
        with ExitStack() as stack:
            for name, path_of in touched.items():
                function = self._watched(name, getattr(os, name), path_of)
                stack.enter_context(patch.object(os, name, function))
            opened = self._opened(io.open)
            for module in (io, builtins):
                stack.enter_context(patch.object(module, "open", opened))
            for kind in (OneShotSearch, NetworkTraining):
                stack.enter_context(patch.object(kind, "take_step", self._counted(kind.take_step)))
            yield self

    def _counted(self, take_step: Callable[..., Any]) -> Callable[..., Any]:
        def call(search: object, step: int) -> Any:
            self.steps += 1
            return take_step(search, step)

        return call

    def _watched(
        self, name: str, function: Callable[..., Any], path_of: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = self._inside(path_of(*args, **kwargs))
            with self._lock:
                result = function(*args, **kwargs)
                if path is not None:
                    self.done(name, path)
                return result

        return call

    def _opened(self, open_file: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            path = None if isinstance(file, int) or mode in ("r", "rb") else self._inside(file)
            if path is None:
                return open_file(file, mode, *args, **kwargs)
            with self._lock:
                opened = WatchedFile(open_file(file, mode, *args, **kwargs), self, path)
                self.done("open", path)
                return opened

        return call

    def _inside(self, path: Any) -> str | None:
        """The path from the watched folder on; None if it is not in there."""
        path = None if path is None else Path(os.path.abspath(os.fsdecode(path)))
        if path is None or not path.is_relative_to(self.folder):
            return None
        return path.relative_to(self.folder).as_posix()

    def done(self, name: str, path: str) -> None:
        """Note an operation, or die of it."""
        self.number += 1
        if self.number == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.blobs is None:
            return
        self._look(path)
        if name in ("fsync", "fdatasync"):
            place = os.path.normpath(path)
            if place in self._names:
                self._synced_names[place] = dict(self._names[place])
            else:
                content = self._names[os.path.dirname(path) or "."][os.path.basename(path)]
                assert content is not None
                content.synced = content.now
        self.points.append(Point(self.number, name, path, self.steps, self.states()))

    # What the kernel shows ------------------------------------------------------------------

    def _look(self, touched: str) -> None:
        inodes, self._names = self._inodes, {}
        self._inodes = {}
        for place, folders, files in os.walk(self.folder):
            names = self._names[os.path.relpath(place, self.folder)] = dict.fromkeys(folders)
            for name in files:
                path = os.path.join(place, name)
                stat = os.stat(path)
                # The number of a file that has gone may be given to a new one.
                names[name] = self._inodes[stat.st_ino] = inodes.get(stat.st_ino) or Content()
                stamp = (stat.st_size, stat.st_mtime_ns)
                if stamp != names[name].stamp or os.path.relpath(path, self.folder) == touched:
                    self._read(names[name], path, stamp)

    def _read(self, content: Content, path: str, stamp: tuple[int, int]) -> None:
        with io.FileIO(path) as file:
            now = file.read()
        content.stamp = stamp
        if now != content.now:
            kept = content.now if now.startswith(content.now) else b""
            content.torn = kept + now[len(kept) : (len(kept) + len(now)) // 2]
            content.now = now
            self._last = content

    # What a crash leaves --------------------------------------------------------------------

    def states(self) -> dict[str, State]:
        """What a crash at this moment leaves, by the way to die."""
        last = self._last
        is_torn = last is not None and last.now != last.synced

        def torn(content: Content) -> bytes:
            return content.torn if content is last and is_torn else content.now

        return {
            "killed": self._state(self._names, lambda content: content.now),
            "power cut": self._state(self._synced_names, lambda content: content.synced),
            "power cut, names kept": self._state(self._names, lambda content: content.synced),
            "torn": self._state(self._names, torn),
        }

    def _state(
        self,
        names: dict[str, dict[str, Content | None]],
        held: Callable[[Content], bytes],
        place: str = ".",
    ) -> State:
        state: State = {}
        for name, content in names.get(place, {}).items():
            path = os.path.normpath(os.path.join(place, name))
            if content is None:
                state |= {path: None, **self._state(names, held, path)}
            else:
                state[path] = (self._kept(held(content)), content.stamp[1])
        return state

    def _kept(self, data: bytes) -> str:
        assert self.blobs is not None
        digest = hashlib.sha256(data).hexdigest()
        if not (self.blobs / digest).exists():
            with io.FileIO(self.blobs / digest, "w") as file:
                file.write(data)
        return digest


def _path_of(handle: int, *_: object) -> str:
    return os.readlink(f"/proc/self/fd/{handle}")


class WatchedFile:
    """An open file whose writes are operations."""

    def __init__(self, file: Any, watcher: Watcher, path: str) -> None:
        self._file, self._watcher, self._path = file, watcher, path

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._file, name)
        if name not in ("write", "writelines", "flush", "truncate", "close"):
            return member

        def call(*args: Any) -> Any:
            with self._watcher._lock:
                result = member(*args)
                self._watcher.done(name, self._path)
                return result

        return call

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


# Runs, each in a process of its own -----------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what must be equal, by path."""
    steps: int = 0
    """Training steps that were begun."""
    seconds: float = 0.0
    error: str = ""


def watched_run(project: Path, folder: Path, blobs: Path) -> tuple[list[Point], Outcome, Outcome]:
    """A run from its first file to its last.

    Returns:
        Its points, and what it had come to when it was evaluated and at its end.
    """
    torch.set_num_threads(1)
    folder.mkdir()
    blobs.mkdir()
    with Watcher(folder, blobs=blobs).watching() as watcher:
        watcher.points.append(Point(0, "nothing", "", 0, watcher.states()))
        run = new_run(project, folder / "run", overrides=SMALLEST)
        run.find()
        run.retrain()
        run.evaluate()
        evaluated = Outcome(compared_files(folder / "run"), watcher.steps)
        run.export()
        run.report()
    return watcher.points, evaluated, Outcome(compared_files(folder / "run"), watcher.steps)


def killed_run(project: Path, folder: Path, die_at: int) -> None:
    """The same run, killed after an operation."""
    torch.set_num_threads(1)
    folder.mkdir()
    with Watcher(folder, die_at=die_at).watching():
        run_all(new_run(project, folder / "run", overrides=SMALLEST))


def resumed_run(project: Path, folder: Path, *, is_whole: bool) -> Outcome:
    """Go on with what a crash left in a folder.

    Args:
        project: config, space and table.
        folder: what the run folder is in.
        is_whole: go on to the end, not only to the evaluation.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    with warnings.catch_warnings(), Watcher(folder).watching() as watcher:
        # No crash may damage a checkpoint.
        warnings.filterwarnings("error", message=".*the checkpoint is damaged")
        run = new_run(project, folder / "run", overrides=SMALLEST, resume=True)
        run.find()
        run.retrain()
        if is_whole:
            run.finish()
        else:
            run.evaluate()
    return Outcome(
        compared_files(folder / "run"), watcher.steps, seconds=time.perf_counter() - began
    )


def resumed_state(
    project: Path, folder: Path, blobs: Path, state: State, is_whole: bool
) -> Outcome:
    """As `resumed_run`, from a state in a new folder; an error is part of the outcome."""
    try:
        restore(state, blobs, folder)
        return resumed_run(project, folder, is_whole=is_whole)
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(folder)


def restore(state: State, blobs: Path, folder: Path) -> None:
    """Make a folder that holds a state."""
    folder.mkdir()
    for name, held in state.items():
        path = folder / name
        if held is None:
            path.mkdir()
        else:
            shutil.copyfile(blobs / held[0], path)
            os.utime(path, ns=(held[1], held[1]))


def distinct(
    points: Iterable[Point], ways: Sequence[str] = WAYS
) -> dict[tuple[Any, ...], tuple[Point, str]]:
    """The last point that has a state, and the first way to die there, by what tells the state.

    States that differ in what was drawn alone count as one: no run reads that.
    """
    found = {}
    for point in points:
        for way in reversed(ways):
            held = sorted(point.states[way].items())
            key = tuple((name, one and one[0]) for name, one in held if DRAWS not in name)
            found[key] = (point, way)
    return found


# What must be equal -------------------------------------------------------------------------


def compared_files(folder: Path) -> dict[str, str]:
    """SHA-256 of all files of a run, without times, dates and figures of speed in them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(DRAWS):
            found[name] = hashlib.sha256(_timeless(path)).hexdigest()
    return found


def named_alike(files: dict[str, str]) -> dict[str, str]:
    """Files of two runs have names of their own as long as they are not whole."""
    return {re.sub(r"\.\w{8}\.partial$", ".partial", name): held for name, held in files.items()}


def _timeless(path: Path) -> bytes:
    if "seconds.json" in path.name or "memory.json" in path.name or "report.html" in path.name:
        return b"there"
    data = path.read_bytes()
    if path.name not in ("results.json", "export.json"):
        return data
    value = read_json(path)
    for name in ("seconds", "memory", "date", "versions", "latency"):
        value.pop(name, None)
    for name in ("search_seconds", "retrain_seconds"):
        value.get("cost", {}).pop(name, None)
    return json.dumps(value).encode()
