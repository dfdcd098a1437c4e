"""Frames of a user's folder, described by a manifest: where each task lies and how it is encoded.

The manifest is `dataset.yaml` in the data folder, or a file of its own for folders that must not
be written to; `configs/datasets/` ships one per known data set. Everything here is plain NumPy,
so that worker processes need no torch.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from jaxtyping import Float16, Float32, Shaped, UInt8
from PIL import Image

from oneshot_ednas.data.normals import normals_from_depth
from oneshot_ednas.schema import load_yaml, nearest

MANIFEST_NAME = "dataset.yaml"
SUFFIXES = (".png", ".jpg", ".jpeg", ".npy")
TASKS = ("segmentation", "depth", "normals")
IGNORE = 255

# Camera axes are x right, y down, z forward; an opposite direction is the same axis negated.
_DIRECTIONS = {
    "right": (0, 1.0),
    "left": (0, -1.0),
    "down": (1, 1.0),
    "up": (1, -1.0),
    "forward": (2, 1.0),
    "backward": (2, -1.0),
}


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """Files of one kind: `<root>/<folder>/<frame id><suffix>`."""

    folder: str
    """Sub-folder of the root. `{parent}` in it stands for the parent of the frame id: with folder
    `{parent}/label`, the frame `train/7` lies in `train/label/7`."""
    suffix: str
    """End of the file's name, `.png`, `.jpg` or `.npy`; may begin earlier, as in `_depth.png`."""

    def __post_init__(self) -> None:
        _check_relative(self.folder, "folder")
        if not self.suffix.lower().endswith(SUFFIXES) or "/" in self.suffix:
            raise ValueError(f"expected a suffix of {', '.join(SUFFIXES)}, got {self.suffix!r}")

    def path(self, root: Path, frame_id: str) -> Path:
        """The file of one frame."""
        frame = PurePosixPath(frame_id)
        if "{parent}" in self.folder:
            folder = self.folder.replace("{parent}", str(frame.parent))
            return root / folder / (frame.name + self.suffix)
        return root / self.folder / (frame_id + self.suffix)


@dataclass(frozen=True, kw_only=True)
class ImageSource(FileSource):
    """Colour images, RGB or grey."""

    white: float = 255.0
    """Stored value of full brightness: 255, or 1 for arrays in 0..1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.white <= 0:
            raise ValueError(f"expected a positive stored value of white, got {self.white}")


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """Another set of classes, made from the stored labels."""

    classes: tuple[str, ...]
    """Names of the classes, by class index."""
    map: tuple[int, ...]
    """Class index of each stored label; 255 drops a label."""

    def __post_init__(self) -> None:
        _check_classes(self.classes)
        wrong = sorted(set(self.map) - set(range(len(self.classes))) - {IGNORE})
        if wrong:
            raise ValueError(
                f"map: expected classes 0..{len(self.classes) - 1} or {IGNORE} (dropped), "
                f"got {wrong[0]}"
            )


@dataclass(frozen=True, kw_only=True)
class SegmentationSource(FileSource):
    """Label maps; the stored value is the class index unless a label map says otherwise."""

    classes: tuple[str, ...]
    """Names of the stored classes, by stored label."""
    ignore: int = IGNORE
    """Stored value of pixels without a label."""
    label_maps: dict[str, LabelMap] = field(default_factory=dict)
    """Named alternatives to the stored classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_classes(self.classes)


@dataclass(frozen=True, kw_only=True)
class DepthSource(FileSource):
    """Depth along the optical axis."""

    scale: float
    """Metres per stored unit; for `encoding: inverse`, metres x stored unit (focal length x
    baseline, for a disparity)."""
    offset: float = 0.0
    """Added to the stored value before scaling, in stored units."""
    encoding: Literal["metric", "inverse"] = "metric"
    """Metres are `scale * (stored + offset)`, or `scale / (stored + offset)`."""
    invalid: tuple[float, ...] = (0.0,)
    """Stored values of pixels without a depth. Values that are not finite or not positive in
    metres are invalid in any case."""
    max_metres: float | None = None
    """Beyond this distance a pixel is invalid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale <= 0:
            raise ValueError(f"expected a positive depth scale, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class StoredNormals(FileSource):
    """Normals kept in files of three channels."""

    axes: tuple[str, str, str]
    """Direction in which each stored channel grows: right or left, down or up, forward or
    backward (away from the camera, or back to it)."""
    encoding: Literal["unit", "rgb"] = "unit"
    """`unit`: the vector itself; `rgb`: 0..255 stands for -1..1."""
    invalid: tuple[float, ...] | None = None
    """Stored three values of pixels without a normal; vectors near zero are invalid anyway."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for axis in self.axes:
            if axis not in _DIRECTIONS:
                raise ValueError(f"axes: unknown direction {axis}; {nearest(axis, _DIRECTIONS)}")
        if {_DIRECTIONS[axis][0] for axis in self.axes} != {0, 1, 2}:
            raise ValueError(f"expected three different axes, got {', '.join(self.axes)}")
        if self.invalid is not None and len(self.invalid) != 3:
            raise ValueError(f"expected three invalid values, got {len(self.invalid)}")


@dataclass(frozen=True, kw_only=True)
class DerivedNormals:
    """Normals fitted to the depth; see `normals_from_depth`."""

    window: int = 7
    """Side of the fitted neighbourhood, odd, in pixels of the stored depth."""
    same_label: bool = True
    """Fit only pixels of one stored label together, where there are labels."""

    def __post_init__(self) -> None:
        if self.window < 3 or self.window % 2 == 0:
            raise ValueError(f"expected an odd window of at least 3 pixels, got {self.window}")


@dataclass(frozen=True, kw_only=True)
class NormalsSource:
    """Either kind of normals."""

    stored: StoredNormals | None = None
    derived: DerivedNormals | None = None

    def __post_init__(self) -> None:
        if (self.stored is None) == (self.derived is None):
            raise ValueError("expected normals to be either stored or derived")


@dataclass(frozen=True, kw_only=True)
class Intrinsics:
    """Pinhole camera, in pixels of the stored depth map."""

    fx: float
    fy: float
    cx: float
    cy: float

    def __post_init__(self) -> None:
        if self.fx <= 0 or self.fy <= 0:
            raise ValueError(f"expected positive focal lengths, got fx={self.fx}, fy={self.fy}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Layout of one data set."""

    name: str
    """Used in results and in names of cache folders: letters, digits, `_`, `-` and `.`."""
    image: ImageSource
    splits: dict[str, str]
    """Text file of each split, one frame id a line."""
    segmentation: SegmentationSource | None = None
    depth: DepthSource | None = None
    normals: NormalsSource | None = None
    intrinsics: Intrinsics | None = None

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "_-." for c in self.name):
            raise ValueError(f"name: expected letters, digits, _, - and ., got {self.name!r}")
        if not self.splits:
            raise ValueError("expected at least one split")
        for split, path in self.splits.items():
            _check_relative(path, f"splits.{split}")
        derived = self.normals is not None and self.normals.derived is not None
        if derived and (self.depth is None or self.intrinsics is None):
            raise ValueError("derived normals need depth and intrinsics in the manifest")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the data set has targets for."""
        return tuple(task for task in TASKS if getattr(self, task) is not None)

    def file_sources(self, tasks: Collection[str]) -> dict[str, FileSource]:
        """What must be read from files for the image and these tasks."""
        sources: dict[str, FileSource] = {"image": self.image}
        derived = self.normals.derived if self.normals and "normals" in tasks else None
        if self.segmentation and ("segmentation" in tasks or (derived and derived.same_label)):
            sources["segmentation"] = self.segmentation
        if self.depth and ("depth" in tasks or derived):
            sources["depth"] = self.depth
        if self.normals and self.normals.stored and "normals" in tasks:
            sources["normals"] = self.normals.stored
        return sources

    def check_tasks(self, tasks: Collection[str]) -> None:
        """Raise ValueError for a task that the data set has no targets for."""
        for task in tasks:
            if task not in self.tasks:
                raise ValueError(f"{self.name} has no task {task}; {nearest(task, self.tasks)}")

    def label_map(self, name: str | None) -> LabelMap:
        """A named label map; None is the stored classes.

        Raises:
            ValueError: if there is no such map, or no segmentation.
        """
        if self.segmentation is None:
            raise ValueError(f"{self.name} has no segmentation, so no label map {name}")
        if name is None:
            classes = self.segmentation.classes
            return LabelMap(classes=classes, map=tuple(range(len(classes))))
        maps = self.segmentation.label_maps
        if name not in maps:
            hint = nearest(name, maps) if maps else "it has none: leave the label map out"
            raise ValueError(f"{self.name} has no label map {name}; {hint}")
        return maps[name]


def load_manifest(root: Path, manifest: Path | None = None) -> Manifest:
    """Read a manifest and check that the data folder has what it names.

    Args:
        root: the data folder.
        manifest: the manifest, if it is not `dataset.yaml` in the data folder.

    Raises:
        ValueError: if the folder, the manifest, a sub-folder or a split file is missing, or the
            manifest is not valid; the message names the file and line.
    """
    if not root.is_dir():
        raise ValueError(f"no data folder {root}; give the folder that holds the data set")
    path = root / MANIFEST_NAME if manifest is None else manifest
    if not path.is_file():
        raise ValueError(f"no manifest {path}; write one as in configs/datasets/, or give its path")
    loaded = load_yaml(path, Manifest)
    for name, source in loaded.file_sources(loaded.tasks).items():
        if "{parent}" not in source.folder and not (root / source.folder).is_dir():
            raise ValueError(f"no folder {root / source.folder} for {name}, named in {path}")
    for split, file in loaded.splits.items():
        if not (root / file).is_file():
            raise ValueError(f"no file {root / file} for split {split}, named in {path}")
    return loaded


def split_frames(manifest: Manifest, root: Path, split: str) -> tuple[str, ...]:
    """Frame ids of a split, in the order of its file.

    Raises:
        ValueError: for an unknown split, a missing or empty split file, a frame that is listed
            twice or lies outside the data folder.
    """
    if split not in manifest.splits:
        raise ValueError(
            f"{manifest.name} has no split {split}; {nearest(split, manifest.splits)}"
        )
    path = root / manifest.splits[split]
    if not path.is_file():
        raise ValueError(f"no file {path} for split {split}")
    frames = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    if not frames:
        raise ValueError(f"{path}: expected one frame id a line, got an empty file")
    seen: set[str] = set()
    for frame in frames:
        _check_relative(frame, f"{path}: frame")
        if frame in seen:
            raise ValueError(f"{path}: frame {frame} is listed twice; keep one")
        seen.add(frame)
    return frames


def read_frame(
    manifest: Manifest,
    root: Path,
    frame_id: str,
    *,
    height: int,
    width: int,
    label_map: str | None = None,
    tasks: Collection[str] | None = None,
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """One frame at the wanted size: `image` (uint8 RGB) and one array per task.

    The image is averaged down or interpolated up; targets take the nearest stored pixel, since a
    mean of two labels or of two sides of a depth edge is no valid target. Normals are derived at
    the stored size, where a window covers the smallest piece of surface and the intrinsics hold
    as given, and only then resampled.

    Args:
        manifest: layout of the data set.
        root: the data folder.
        frame_id: one entry of a split.
        height: rows of every array.
        width: columns of every array.
        label_map: name of a label map; None keeps the stored classes.
        tasks: the targets to read; None is all that the data set has.

    Returns:
        `segmentation` uint8, 255 invalid; `depth` float32 in metres, 0 invalid; `normals` float16
        unit vectors (x right, y down, z forward, towards the camera), (0, 0, 0) invalid.

    Raises:
        ValueError: for a missing or unreadable file, images and targets of different sizes, a
            label outside the classes, an unknown task or label map.
    """
    tasks = manifest.tasks if tasks is None else tasks
    manifest.check_tasks(tasks)
    _check_relative(frame_id, "frame")
    stored = {
        name: _read_file(source.path(root, frame_id), frame_id)
        for name, source in manifest.file_sources(tasks).items()
    }
    size = stored["image"].shape[:2]
    for name, array in stored.items():
        if array.shape[:2] != size:
            raise ValueError(
                f"frame {frame_id}: {name} is {_size(array)}, expected the image's "
                f"{_size(stored['image'])}; store both at one size"
            )
    frame = {"image": _image(stored["image"], manifest.image, frame_id, (height, width))}
    rows = (np.arange(height) * 2 + 1) * size[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * size[1] // (2 * width)
    nearest_pixels = np.ix_(rows, columns)
    if "segmentation" in tasks:
        labels = _labels(stored["segmentation"], manifest, frame_id, label_map)
        frame["segmentation"] = labels[nearest_pixels]
    if manifest.depth is not None and "depth" in stored:
        metres = _metres(stored["depth"], manifest.depth, frame_id)
        if "depth" in tasks:
            frame["depth"] = metres[nearest_pixels]
    if manifest.normals is not None and "normals" in tasks:
        if manifest.normals.stored is not None:
            vectors = _vectors(stored["normals"], manifest.normals.stored, frame_id)
        else:
            vectors = _derived(metres, stored.get("segmentation"), manifest, frame_id)
        frame["normals"] = vectors[nearest_pixels]
    return frame


def _derived(
    metres: np.ndarray, labels: np.ndarray | None, manifest: Manifest, frame_id: str
) -> Float16[np.ndarray, "height width 3"]:
    assert manifest.normals is not None
    assert manifest.normals.derived is not None
    assert manifest.intrinsics is not None
    camera = manifest.intrinsics
    if not manifest.normals.derived.same_label:
        labels = None
    if labels is not None:
        labels = _whole_numbers(_one_channel(labels, "segmentation", frame_id), frame_id)
    window = manifest.normals.derived.window
    normals = normals_from_depth(
        metres, camera.fx, camera.fy, camera.cx, camera.cy, window=window, labels=labels
    )
    return normals.astype(np.float16)


def _read_file(path: Path, frame_id: str) -> np.ndarray:
    """A file as stored, [height, width] or [height, width, channels]."""
    if not path.is_file():
        raise ValueError(f"frame {frame_id}: no file {path}; restore it or drop it from its split")
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                # Palette images are label maps: their indices are the labels.
                array = np.asarray(image)
    except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"frame {frame_id}: {path} cannot be read ({reason}); expected a whole "
            f"{path.suffix} file"
        ) from None
    if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "uifb":
        raise ValueError(
            f"frame {frame_id}: {path}: expected numbers of shape height x width (x channels), "
            f"got {array.dtype} of shape {array.shape}"
        )
    return array


def _image(
    array: np.ndarray, source: ImageSource, frame_id: str, size: tuple[int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] not in (1, 3, 4):
        raise ValueError(f"frame {frame_id}: expected 1, 3 or 4 channels, got {array.shape[2]}")
    # Of 2 channels nothing is known; a fourth is opacity and is dropped.
    array = np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[..., :3]
    top = float(array.max())
    if float(array.min()) < 0 or not top <= source.white:
        raise ValueError(
            f"frame {frame_id}: expected image values in 0..{source.white:g}, got {top:g}; "
            f"set image.white to the stored value of white"
        )
    if array.dtype != np.uint8 or source.white != 255:
        array = np.rint(array.astype(np.float64) * (255 / source.white)).astype(np.uint8)
    if array.shape[:2] == size:
        return np.ascontiguousarray(array)
    shrinks = size[0] <= array.shape[0] and size[1] <= array.shape[1]
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    resized = Image.fromarray(np.ascontiguousarray(array)).resize((size[1], size[0]), method)
    return np.array(resized)


def _labels(
    array: np.ndarray, manifest: Manifest, frame_id: str, label_map: str | None
) -> UInt8[np.ndarray, "height width"]:
    assert manifest.segmentation is not None
    chosen = manifest.label_map(label_map)
    stored = _whole_numbers(_one_channel(array, "segmentation", frame_id), frame_id)
    valid = stored != manifest.segmentation.ignore
    wrong = valid & ((stored < 0) | (stored >= len(chosen.map)))
    if wrong.any():
        raise ValueError(
            f"frame {frame_id}: label {stored[wrong][0]} lies outside the {len(chosen.map)} stored "
            f"classes of {manifest.name} (ignored is {manifest.segmentation.ignore}); correct the "
            f"file, or the classes and the ignore value in the manifest"
        )
    table = np.array(chosen.map, dtype=np.uint8)
    return np.where(valid, table[np.where(valid, stored, 0)], np.uint8(IGNORE))


def _metres(
    array: np.ndarray, source: DepthSource, frame_id: str
) -> Float32[np.ndarray, "height width"]:
    stored = _one_channel(array, "depth", frame_id).astype(np.float64)
    valid = np.isfinite(stored) & ~np.isin(stored, source.invalid)
    shifted = np.where(valid, stored + source.offset, 0)
    valid &= shifted > 0
    if source.encoding == "inverse":
        metres = np.divide(source.scale, shifted, out=np.zeros_like(shifted), where=valid)
    else:
        metres = source.scale * shifted
    if source.max_metres is not None:
        valid &= metres <= source.max_metres
    return np.where(valid, metres, 0).astype(np.float32)


def _vectors(
    array: np.ndarray, source: StoredNormals, frame_id: str
) -> Float16[np.ndarray, "height width 3"]:
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"frame {frame_id}: expected normals of 3 channels, got {array.shape}")
    stored = array.astype(np.float64)
    valid = np.isfinite(stored).all(axis=-1)
    if source.invalid is not None:
        valid &= (stored != np.array(source.invalid)).any(axis=-1)
    stored = np.where(valid[..., None], stored, 0)
    if source.encoding == "rgb":
        stored = stored * (2 / 255) - 1
    vectors = np.empty_like(stored)
    for channel, axis in enumerate(source.axes):
        target, sign = _DIRECTIONS[axis]
        vectors[..., target] = sign * stored[..., channel]
    length = np.sqrt(np.einsum("hwc,hwc->hw", vectors, vectors))
    # Halfway to a unit vector: what is shorter was averaged away or never was a direction.
    valid &= length > 0.5
    scale = np.divide(1.0, length, out=np.zeros_like(length), where=valid)
    return (vectors * scale[..., None]).astype(np.float16)


def _one_channel(array: np.ndarray, name: str, frame_id: str) -> np.ndarray:
    if array.ndim == 3 and array.shape[2] != 1:
        raise ValueError(
            f"frame {frame_id}: expected {name} of one channel, got {array.shape[2]}; "
            f"colour-coded maps must be stored as numbers"
        )
    return array.reshape(array.shape[:2])


def _whole_numbers(array: np.ndarray, frame_id: str) -> np.ndarray:
    whole = array.astype(np.int64) if np.isfinite(array).all() else None
    if whole is None or (array.dtype.kind == "f" and (whole != array).any()):
        raise ValueError(f"frame {frame_id}: expected whole numbers as labels, got {array.dtype}")
    return whole


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _check_relative(path: str, where: str) -> None:
    pure = PurePosixPath(path)
    if not path or "\\" in path or pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{where}: expected a path inside the data folder, got {path!r}")


def _check_classes(classes: tuple[str, ...]) -> None:
    if not 1 <= len(classes) <= IGNORE:
        raise ValueError(f"expected 1 to {IGNORE} classes, got {len(classes)}")
    if len(set(classes)) != len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"classes: {twice} is listed twice")
