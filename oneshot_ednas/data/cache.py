"""Whole splits as arrays on disk: read or rendered once, then opened as memory maps.

A split is packed into `<cache folder>/<name>-<hash of its identity>/`, one `.npy` per array beside
a `meta.json`. Whatever the frames depend on is in the identity, so a changed source gets a folder
of its own. A folder is written under another name and moved when whole: two processes may build
the same split at once, and a build that was cut off leaves nothing that could be mistaken for data.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import platformdirs
from jaxtyping import Bool

CACHE_VARIABLE = "ONESHOT_EDNAS_CACHE"
# Part of every identity: raise it when a change alters what is stored for the same source.
FORMAT_VERSION = 2
CHUNK = 16

# What reading a folder that was cut short or changed by hand may raise.
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError)

Progress = Callable[[int, int], None]


@runtime_checkable
class FrameSource(Protocol):
    """What a split is packed from. Travels to worker processes, so it must be picklable."""

    @property
    def name(self) -> str:
        """Readable part of the cache folder's name."""

    @property
    def frames(self) -> tuple[str, ...]:
        """Name of each frame."""

    @property
    def kinds(self) -> dict[str, str]:
        """Row in `TARGET_KINDS` of each target."""

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        """Names of the classes of each target that has some."""

    def identity(self) -> dict[str, object]:
        """Everything that the arrays depend on, fit for JSON."""

    def read(self, index: int) -> dict[str, np.ndarray]:
        """One frame: arrays of the same names, shapes and types for each index."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedArrays:
    """Arrays of one source, opened read-only."""

    arrays: dict[str, np.ndarray]
    """Memory maps by array name, one row per frame."""
    without_depth: Bool[np.ndarray, " frames"]
    """Frames that have a depth map without a single valid pixel."""


def default_cache_dir() -> Path:
    """Folder of the packed splits: `$ONESHOT_EDNAS_CACHE`, else the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("oneshot_ednas"))


def load_cached(
    source: FrameSource,
    *,
    cache_dir: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CachedArrays:
    """Open the arrays of a source, building them first if need be.

    Warns when a damaged folder has to be built again.

    Args:
        source: the frames.
        cache_dir: see `default_cache_dir`, which None stands for.
        workers: processes that read frames; None is one per processor, 1 is this process.
        progress: called with the frames done and the frames in all.

    Raises:
        ValueError: if the cache folder cannot be written or has not enough room, or a frame is
            not like the first one.
    """
    identity = {"format": FORMAT_VERSION, "name": source.name, **source.identity()}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    cache = default_cache_dir() if cache_dir is None else cache_dir
    folder = cache / f"{source.name}-{digest}"
    if folder.exists():
        try:
            return _open(folder)
        except _DAMAGE as error:
            warnings.warn(f"{folder} is damaged ({error}); building it again", stacklevel=2)
    _build(folder, source, identity, workers, progress)
    return _open(folder)


def _open(folder: Path) -> CachedArrays:
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    arrays = {}
    for name, kind in meta["arrays"].items():
        # Refuses a file that is shorter than its header says.
        array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        if [str(array.dtype), list(array.shape)] != kind:
            raise ValueError(f"{name}.npy holds {array.dtype} {array.shape}, expected {kind}")
        arrays[name] = array
    without_depth = np.zeros(meta["frames"], dtype=bool)
    without_depth[meta["without_depth"]] = True
    return CachedArrays(arrays=arrays, without_depth=without_depth)


def _build(
    folder: Path,
    source: FrameSource,
    identity: dict[str, object],
    workers: int | None,
    progress: Progress | None,
) -> None:
    count = len(source.frames)
    kinds = {name: (array.dtype, (count, *array.shape)) for name, array in source.read(0).items()}
    needed = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in kinds.values())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"cannot write the cache folder {folder.parent} ({error.strerror}); "
            f"set {CACHE_VARIABLE} to another folder"
        ) from None
    try:
        # A memory map on a full disk ends the process without a message, so ask before.
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise ValueError(
                f"{source.name} needs {needed / 1e6:.0f} MB in {folder.parent}, got "
                f"{free / 1e6:.0f} MB; set {CACHE_VARIABLE} to another folder"
            )
        for name, (dtype, shape) in kinds.items():
            np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype, shape)
        meta = {
            "frames": count,
            "arrays": {name: (str(dtype), list(shape)) for name, (dtype, shape) in kinds.items()},
            "without_depth": sorted(_fill_all(partial, source, workers, progress)),
            "identity": identity,
        }
        (partial / "meta.json").write_text(json.dumps(meta), "utf-8")
        _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, folder: Path) -> None:
    """Put a whole folder in its place, unless another process was first."""
    try:
        partial.replace(folder)
    except OSError:
        try:
            _open(folder)
        except _DAMAGE:
            # What lies there is the damaged folder. Moved away first, so that no reader ever
            # finds a folder half deleted.
            partial_of_old = partial.with_name(partial.name + "-old")
            folder.replace(partial_of_old)
            partial.replace(folder)
            shutil.rmtree(partial_of_old, ignore_errors=True)


def _fill_all(
    folder: Path, source: FrameSource, workers: int | None, progress: Progress | None
) -> list[int]:
    """Write every frame; returns the frames without valid depth."""
    count = len(source.frames)
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    workers = min(_processors() if workers is None else workers, len(chunks))
    without_depth: list[int] = []
    done = 0

    def finish(chunk: range, found: list[int]) -> None:
        nonlocal done
        without_depth.extend(found)
        done += len(chunk)
        if progress is not None:
            progress(done, count)

    if workers <= 1:
        for chunk in chunks:
            finish(chunk, _fill(folder, source, chunk))
        return without_depth
    # Workers run NumPy and Pillow only, never torch, so a fork of a process with a GPU is safe;
    # it also spares scripts the `if __name__ == "__main__"` that a fresh interpreter would need.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
        futures = {pool.submit(_fill, folder, source, chunk): chunk for chunk in chunks}
        try:
            for future in as_completed(futures):
                finish(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return without_depth


def _fill(folder: Path, source: FrameSource, chunk: range) -> list[int]:
    """Write some frames into the arrays; returns those without valid depth."""
    arrays = {path.stem: np.load(path, mmap_mode="r+") for path in folder.glob("*.npy")}
    without_depth = []
    for index in chunk:
        frame = source.read(index)
        if frame.keys() != arrays.keys():
            raise ValueError(
                f"{source.name}: frame {index} has {sorted(frame)}, the first has {sorted(arrays)}"
            )
        for name, array in arrays.items():
            if (frame[name].dtype, frame[name].shape) != (array.dtype, array.shape[1:]):
                raise ValueError(
                    f"{source.name}: {name} of frame {index} is {frame[name].dtype} "
                    f"{frame[name].shape}, expected {array.dtype} {array.shape[1:]} as the first"
                )
            array[index] = frame[name]
        if "depth" in frame and not (frame["depth"] > 0).any():
            without_depth.append(index)
    for array in arrays.values():
        array.flush()
    return without_depth


def _processors() -> int:
    """Processors that this process may use; in a container these are not all of the machine's."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
