"""Whole splits as arrays on disk: read or rendered once, then opened as memory maps.

A split is packed into `<cache folder>/<name>-<hash of its identity>/`, one `.npy` per array beside
a `meta.json`. Whatever the frames depend on is in the identity, so a changed source gets a folder
of its own. A folder is written under another name and moved when whole and on the disk: two
processes may build the same split at once, and a build that was cut off leaves nothing that could
be mistaken for data. What it leaves is removed by the next build of the split.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import platformdirs
from jaxtyping import Bool

from oneshot_ednas.data.parallel import Progress, chunks, run_chunks
from oneshot_ednas.store import sync_file, sync_folder, write_text

CACHE_VARIABLE = "ONESHOT_EDNAS_CACHE"
# Part of every identity: raise it when a change alters what is stored for the same source.
FORMAT_VERSION = 3
CHUNK = 16
# Frames, and pixels of each, that tell the range of a depth.
SAMPLED_FRAMES = 32
SAMPLED_PIXELS = 4096

# What reading a folder that was cut short or changed by hand may raise.
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError)


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


@dataclass(frozen=True, kw_only=True)
class DepthRange:
    """Valid depths of some frames of a split, in metres."""

    median: float
    largest: float


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedArrays:
    """Arrays of one source, opened read-only."""

    arrays: dict[str, np.ndarray]
    """Memory maps by array name, one row per frame."""
    without_depth: Bool[np.ndarray, " frames"]
    """Frames that have a depth map without a single valid pixel."""
    depth_ranges: dict[str, DepthRange]
    """By target of kind depth; none where no sampled pixel is valid."""


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
    ranges = {name: DepthRange(**found) for name, found in meta["depth_ranges"].items()}
    return CachedArrays(arrays=arrays, without_depth=without_depth, depth_ranges=ranges)


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
    with ExitStack() as until_moved:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.parent):  # nobody takes the new folder for an abandoned one
                _remove_abandoned(folder)
                partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
                until_moved.enter_context(_locked(partial))
        except OSError as error:
            raise ValueError(
                f"cannot write the cache folder {folder.parent} ({error.strerror}); "
                f"set {CACHE_VARIABLE} to another folder"
            ) from None
        until_moved.callback(shutil.rmtree, partial, ignore_errors=True)
        _allocate(partial, source, kinds, needed)
        meta = {
            "frames": count,
            "arrays": {name: (str(dtype), list(shape)) for name, (dtype, shape) in kinds.items()},
            "without_depth": sorted(_fill_all(partial, source, workers, progress)),
            "depth_ranges": _depth_ranges(partial, source),
            "identity": identity,
        }
        for path in partial.glob("*.npy"):
            sync_file(path)
        write_text(partial / "meta.json", json.dumps(meta))
        _move(partial, folder)
        sync_folder(folder.parent)


def _allocate(
    folder: Path,
    source: FrameSource,
    kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    needed: int,
) -> None:
    """Make the arrays' files, with room on the disk for what they will hold.

    Raises:
        ValueError: if there is not enough.
    """
    free = shutil.disk_usage(folder).free
    try:
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, (dtype, shape) in kinds.items():
            path = folder / f"{name}.npy"
            np.lib.format.open_memmap(path, "w+", dtype, shape)
            # A memory map that meets a full disk ends the process without a message.
            if hasattr(os, "posix_fallocate"):
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"{source.name} needs {needed / 1e6:.0f} MB in {folder.parent}, got "
            f"{free / 1e6:.0f} MB; set {CACHE_VARIABLE} to another folder"
        ) from None


@contextmanager
def _locked(folder: Path, *, waits: bool = True) -> Iterator[bool]:
    """Lock a folder while this process lives; gives whether that worked.

    Network file systems may have no locks of folders.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        is_locked = False
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            is_locked = True
        yield is_locked
    finally:
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """Remove what builds of the same split left whose processes were killed."""
    for path in folder.parent.glob(f".{folder.name}-*"):
        with suppress(FileNotFoundError), _locked(path, waits=False) as is_locked:
            if is_locked:
                shutil.rmtree(path, ignore_errors=True)


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
    parts = chunks(range(len(source.frames)), CHUNK)
    fill = partial(_fill, folder, source)
    name = source.frames.__getitem__
    found = run_chunks(fill, parts, workers=workers, progress=progress, name=name)
    return [index for part in found for index in part]


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
        if source.kinds.get("depth") == "depth" and not (frame["depth"] > 0).any():
            without_depth.append(index)
    for array in arrays.values():
        array.flush()
    return without_depth


def _depth_ranges(folder: Path, source: FrameSource) -> dict[str, dict[str, float]]:
    """Range of each target of kind depth, from frames and pixels spread over the split."""
    ranges = {}
    for name in (name for name, kind in source.kinds.items() if kind == "depth"):
        array = np.load(folder / f"{name}.npy", mmap_mode="r")
        frames = np.unique(np.linspace(0, len(array) - 1, SAMPLED_FRAMES).astype(int))
        step = max(1, int(np.prod(array.shape[1:])) // SAMPLED_PIXELS)
        depths = np.concatenate([np.ravel(array[frame])[::step] for frame in frames])
        depths = depths[depths > 0]
        if depths.size:
            found = DepthRange(median=float(np.median(depths)), largest=float(depths.max()))
            ranges[name] = asdict(found)
    return ranges
