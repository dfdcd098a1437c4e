"""The manifest of a data folder: where each task lies and how it is encoded. No torch.

The manifest is `dataset.yaml` in the data folder, or a file of its own for folders that must not
be written to; `configs/datasets/` ships one per known data set.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from oneshot_ednas.schema import load_yaml, nearest

MANIFEST_NAME = "dataset.yaml"
SUFFIXES = (".png", ".jpg", ".jpeg", ".npy")
TASKS = ("segmentation", "depth", "normals")
IGNORE = 255

# Camera axes are x right, y down, z forward; an opposite direction is the same axis negated.
DIRECTIONS = {
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
        check_relative(self.folder, "folder")
        if not self.suffix.lower().endswith(SUFFIXES) or "/" in self.suffix:
            raise ValueError(f"expected a suffix of {', '.join(SUFFIXES)}, got {self.suffix!r}")

    def path(self, root: Path, frame_id: str) -> Path:
        """The file of one frame."""
        frame = PurePosixPath(frame_id)
        if "{parent}" in self.folder:
            folder = self.folder.replace("{parent}", str(frame.parent))
            return root / folder / (frame.name + self.suffix)
        return root / self.folder / (frame_id + self.suffix)

    def find(self, root: Path, frame_id: str) -> Path:
        """The file of one frame, which must exist.

        Raises:
            ValueError: naming the frame and the file that is missing.
        """
        path = self.path(root, frame_id)
        if not path.is_file():
            raise ValueError(
                f"frame {frame_id}: no file {path}; restore it or drop the frame from its split"
            )
        return path


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
            if axis not in DIRECTIONS:
                raise ValueError(f"axes: unknown direction {axis}; {nearest(axis, DIRECTIONS)}")
        if {DIRECTIONS[axis][0] for axis in self.axes} != {0, 1, 2}:
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
            check_relative(path, f"splits.{split}")
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
        raise ValueError(f"{manifest.name} has no split {split}; {nearest(split, manifest.splits)}")
    path = root / manifest.splits[split]
    if not path.is_file():
        raise ValueError(f"no file {path} for split {split}")
    frames = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    if not frames:
        raise ValueError(f"{path}: expected one frame id a line, got an empty file")
    seen: set[str] = set()
    for frame in frames:
        check_relative(frame, f"{path}: frame")
        if frame in seen:
            raise ValueError(f"{path}: frame {frame} is listed twice; keep one")
        seen.add(frame)
    return frames


def check_relative(path: str, where: str) -> None:
    """Raise ValueError for a path that would leave the data folder."""
    pure = PurePosixPath(path)
    if not path or "\\" in path or pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{where}: expected a path inside the data folder, got {path!r}")


def _check_classes(classes: tuple[str, ...]) -> None:
    if not 1 <= len(classes) <= IGNORE:
        raise ValueError(f"expected 1 to {IGNORE} classes, got {len(classes)}")
    if len(set(classes)) != len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"classes: {twice} is listed twice")
