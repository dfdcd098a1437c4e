"""Splits packed into arrays: the embedded data set's or a data folder's, and their batches."""

import hashlib
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int64, Integer
from torch import Tensor

from oneshot_ednas.data import streets
from oneshot_ednas.data.cache import (
    FrameSource,
    default_cache_dir,
    load_cached,
)
from oneshot_ednas.data.dataset import DataSet
from oneshot_ednas.data.order import batch_indices, split_indices
from oneshot_ednas.data.parallel import Progress
from oneshot_ednas.data.street_scene import CLASSES
from oneshot_ednas.data.targets import TARGET_KINDS, is_in_metres
from oneshot_ednas.schema import to_plain

__all__ = [
    "PackedSplit",
    "batch_indices",
    "default_cache_dir",
    "folder_split",
    "load_packed",
    "split_indices",
    "streets_split",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedSplit:
    """Frames of one split; a subset shares the arrays."""

    name: str
    """Name of the data set and the split."""
    arrays: dict[str, np.ndarray]
    """Stored frames by array name: `image`, and one per task. Often memory maps."""
    indices: Int64[np.ndarray, " frames"]
    """Rows of the arrays that belong to this split, in order."""
    sources: tuple[str, ...]
    """Name of each frame of this split."""
    kinds: dict[str, str]
    """Row in `TARGET_KINDS` of each array but `image`."""
    class_names: dict[str, tuple[str, ...]]
    """Names of the classes of each target that has some, by class index."""
    without_depth: Bool[np.ndarray, " stored"]
    """Of each row of the arrays, whether it has a depth map without a single valid pixel."""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def height(self) -> int:
        """Rows of each frame."""
        return int(self.arrays["image"].shape[1])

    @property
    def width(self) -> int:
        """Columns of each frame."""
        return int(self.arrays["image"].shape[2])

    @property
    def num_invalid_depth_frames(self) -> int:
        """Frames that have a depth map, but no valid pixel in it."""
        return int(self.without_depth[self.indices].sum())

    def digest(self) -> str:
        """SHA-256 over all that the frames hold: the same data, wherever it lies."""
        found = hashlib.sha256()
        for name in sorted(self.arrays):
            array = self.arrays[name]
            found.update(f"{name} {array.dtype} {array.shape[1:]}".encode())
            for row in self.indices:
                found.update(array[row].tobytes())
        return found.hexdigest()

    def subset(self, indices: Sequence[int] | Integer[np.ndarray, " part"]) -> "PackedSplit":
        """The given frames of this split, in the given order.

        Raises:
            ValueError: if there are none, or one lies outside the split.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.size == 0:
            raise ValueError(f"expected at least one frame for a part of {self.name}, got none")
        if chosen.min() < 0 or chosen.max() >= len(self):
            wrong = chosen.min() if chosen.min() < 0 else chosen.max()
            raise ValueError(f"{self.name} has frames 0..{len(self) - 1}, got {wrong}")
        sources = tuple(self.sources[i] for i in chosen)
        return replace(self, indices=self.indices[chosen], sources=sources)

    def frame(self, index: int) -> dict[str, np.ndarray]:
        """One frame's arrays as stored, copied."""
        row = self.indices[index]
        return {name: np.array(array[row]) for name, array in self.arrays.items()}

    def batch(
        self,
        indices: Sequence[int] | Integer[np.ndarray, " batch"],
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Frames as tensors on the device, in the layout that training expects.

        Args:
            indices: frames of this split, not rows of the arrays.
            device: where the tensors go; to a GPU they are copied from pinned memory.

        Returns:
            `image` float32 [B, 3, H, W] in -1..1, and each target by its kind: class indices and
            edges int64 [B, H, W], others float32 [B, channels, H, W]; invalid pixels as
            `TARGET_KINDS` says.
        """
        rows = self.indices[np.asarray(indices, dtype=np.int64)]
        device = torch.device(device)
        tensors = {}
        for name, array in self.arrays.items():
            stored = torch.from_numpy(np.asarray(array[rows]))
            if device.type == "cuda":
                stored = stored.pin_memory().to(device, non_blocking=True)
            # Stored types are the small ones; they widen on the device.
            tensors[name] = _to_training(self.kinds.get(name), stored.to(device))
        return tensors


def _to_training(kind: str | None, stored: Tensor) -> Tensor:
    """Stored rows of a target, or of the image for None, as `PackedSplit.batch` returns them."""
    if kind is not None and TARGET_KINDS[kind].is_whole:
        return stored.long()
    if stored.ndim == 3:
        return stored.unsqueeze(1)
    planes = stored.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.div_(127.5).sub_(1) if kind is None else planes


@dataclass(frozen=True, kw_only=True)
class _Streets:
    split: str
    num_frames: int
    height: int
    width: int

    @property
    def name(self) -> str:
        return f"streets-{self.split}"

    @property
    def frames(self) -> tuple[str, ...]:
        return tuple(f"{self.split}/{i}" for i in range(self.num_frames))

    @property
    def kinds(self) -> dict[str, str]:
        return dict(streets.TARGETS)

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        return {"segmentation": tuple(CLASSES)}

    def identity(self) -> dict[str, object]:
        size = [self.num_frames, self.height, self.width]
        return {"streets": streets.RENDERER_VERSION, "split": self.split, "size": size}

    def read(self, index: int) -> dict[str, np.ndarray]:
        return streets.render_frame(index, height=self.height, width=self.width, split=self.split)


@dataclass(frozen=True, kw_only=True)
class _Files:
    data: DataSet
    split: str
    height: int
    width: int
    label_map: str | None
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.data.name}-{self.split}"

    @property
    def frames(self) -> tuple[str, ...]:
        return self.data.frames(self.split)

    @property
    def kinds(self) -> dict[str, str]:
        return {name: self.data.target_kind(name) for name in self.targets}

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        named = {name: self.data.class_names(name, self.label_map) for name in self.targets}
        return {name: classes for name, classes in named.items() if classes}

    def identity(self) -> dict[str, object]:
        files = hashlib.sha256("\n".join(self.frames).encode())
        for path, size, changed in self.data.identity(self.split, self.targets):
            files.update(f"\n{path}\t{size}\t{changed}".encode())
        sources = {"image": self.data.image, **self.data.sources(self.targets)}
        return {
            "root": str(self.data.root),
            "sources": {name: to_plain(source) for name, source in sources.items()},
            "intrinsics": to_plain(self.data.intrinsics),
            "split": self.split,
            "size": [len(self.frames), self.height, self.width],
            "label_map": self.label_map,
            "targets": list(self.targets),
            "files": files.hexdigest(),
        }

    def read(self, index: int) -> dict[str, np.ndarray]:
        return self.data.read_frame(
            self.frames[index],
            height=self.height,
            width=self.width,
            targets=self.targets,
            label_map=self.label_map,
        )


def streets_split(
    split: str,
    num_frames: int,
    *,
    height: int,
    width: int,
    cache_dir: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackedSplit:
    """The first frames of a split of the embedded data set.

    Args:
        split: one of the splits of `streets`.
        num_frames: how many frames.
        height: rows of each frame.
        width: columns of each frame.
        cache_dir: see `default_cache_dir`, which None stands for.
        workers: processes that render; None is one per processor.
        progress: called with the frames done and the frames in all.

    Raises:
        ValueError: for a number of frames below 1, or a cache folder that cannot be used.
    """
    _check_size(height, width)
    if num_frames < 1:
        raise ValueError(f"expected at least one frame of {split}, got {num_frames}")
    source = _Streets(split=split, num_frames=num_frames, height=height, width=width)
    return load_packed(source, cache_dir=cache_dir, workers=workers, progress=progress)


def folder_split(
    data: DataSet,
    split: str,
    *,
    height: int,
    width: int,
    label_map: str | None = None,
    targets: Collection[str] | None = None,
    cache_dir: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackedSplit:
    """A split of a data folder.

    Args:
        data: the data set.
        split: one of its splits.
        height: rows of each frame.
        width: columns of each frame.
        label_map: name of a label map of `segmentation`; None keeps the stored classes.
        targets: the targets to pack; None is all that the data set has.
        cache_dir: see `default_cache_dir`, which None stands for.
        workers: processes that read; None is one per processor.
        progress: called with the frames done and the frames in all.

    Raises:
        ValueError: for whatever is missing or wrong in the data folder, or a cache folder that
            cannot be used.
    """
    _check_size(height, width)
    data.frames(split)
    data.check_targets(data.targets if targets is None else targets)
    if label_map is not None:
        data.label_map(label_map)
    source = _Files(
        data=data,
        split=split,
        height=height,
        width=width,
        label_map=label_map,
        # In one order, so that the same targets named in another order find the same cache.
        targets=tuple(name for name in data.targets if targets is None or name in targets),
    )
    return load_packed(source, cache_dir=cache_dir, workers=workers, progress=progress)


def load_packed(
    source: FrameSource,
    *,
    cache_dir: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackedSplit:
    """All frames of a source as a split, from the cache or built; see `load_cached`.

    Warns when frames have no valid depth, and when a depth is hardly in metres.
    """
    cached = load_cached(source, cache_dir=cache_dir, workers=workers, progress=progress)
    packed = PackedSplit(
        name=source.name,
        arrays=cached.arrays,
        indices=np.arange(len(source.frames)),
        sources=source.frames,
        kinds=source.kinds,
        class_names=source.class_names,
        without_depth=cached.without_depth,
    )
    if packed.num_invalid_depth_frames:
        warnings.warn(
            f"{packed.num_invalid_depth_frames} of {len(packed)} frames of {packed.name} have no "
            f"valid depth; they are kept, and count for the other tasks",
            stacklevel=2,
        )
    for name, found in cached.depth_ranges.items():
        if not is_in_metres(found.median, found.largest):
            warnings.warn(
                f"{name} of {packed.name} has a median of {found.median:.4g} m and reaches "
                f"{found.largest:.4g} m; expected metres: check its scale, and its invalid values "
                f"or largest distance",
                stacklevel=2,
            )
    return packed


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"expected a height and a width of at least 1, got {height} and {width}")
