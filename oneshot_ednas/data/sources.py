"""Where the image and each target of a data set lie and how they are encoded. No torch.

One frozen dataclass per encoding; a manifest spells them in YAML, told apart by `kind`. `decode.py`
turns what lies in the files into what `targets.py` describes.
"""

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import ClassVar, Literal

from oneshot_ednas.data.targets import IGNORE
from oneshot_ednas.schema import nearest

SUFFIXES = (".png", ".jpg", ".jpeg", ".npy", ".mat")

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
    """Sub-folder of the root; `.` is the root. `{parent}` in it stands for the parent of the frame
    id: with folder `{parent}/label`, the frame `train/7` lies in `train/label/7`."""
    suffix: str
    """End of the file's name: `.png`, `.jpg`, `.npy`, or more of it, as in `_depth.png`."""
    stack: str | None = None
    """Array of the one HDF5 file `<folder>/<suffix>` that holds all frames (MATLAB 7.3); the frame
    id is the index."""

    def __post_init__(self) -> None:
        check_relative(self.folder, "folder")
        if not self.suffix.lower().endswith(SUFFIXES) or "/" in self.suffix:
            raise ValueError(f"expected a suffix of {', '.join(SUFFIXES)}, got {self.suffix!r}")

    def path(self, frame_id: str) -> str:
        """The file of one frame, relative to the root."""
        frame = PurePosixPath(frame_id)
        if self.stack is not None:
            return str(PurePosixPath(self.folder) / self.suffix)
        if "{parent}" in self.folder:
            folder = self.folder.replace("{parent}", str(frame.parent))
            return f"{folder}/{frame.name}{self.suffix}"
        return str(PurePosixPath(self.folder) / f"{frame_id}{self.suffix}")


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
class LabelsSource(FileSource):
    """Class maps; the stored value is the class index unless a label map says otherwise."""

    target_kind: ClassVar[str] = "labels"

    kind: Literal["labels"]
    classes: tuple[str, ...]
    """Names of the classes, by class index."""
    map: tuple[int, ...] | None = None
    """Class index of each stored label; 255 drops a label. None: a label is its class index."""
    ignore: int | None = None
    """Stored value of pixels without a label; null is 255, or none where `above` is set."""
    above: float | None = None
    """For maps of a quantity: a pixel is of class 1 above this value, else of class 0."""
    label_maps: dict[str, LabelMap] = field(default_factory=dict)
    """Named alternatives to the stored classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.label_map(None)  # refuses wrong classes and a wrong map
        if self.above is not None and len(self.classes) != 2:
            raise ValueError(f"above makes two classes, got {len(self.classes)}")
        if self.above is not None and self.label_maps:
            raise ValueError("above makes the classes, so there can be no label_maps")
        stored = len(self.classes if self.map is None else self.map)
        for name, label_map in self.label_maps.items():
            if len(label_map.map) != stored:
                raise ValueError(
                    f"label_maps.{name}: expected a class for each of {stored} stored labels, "
                    f"got {len(label_map.map)}"
                )

    def label_map(self, name: str | None) -> LabelMap:
        """A named label map; None is `classes` by `map`.

        Raises:
            ValueError: if there is no such map.
        """
        if name is None:
            same = tuple(range(len(self.classes)))
            return LabelMap(classes=self.classes, map=same if self.map is None else self.map)
        if name not in self.label_maps:
            maps = self.label_maps
            hint = nearest(name, maps) if maps else "it has none: leave the label map out"
            raise ValueError(f"no label map {name}; {hint}")
        return self.label_maps[name]


@dataclass(frozen=True, kw_only=True)
class PartsSource(FileSource):
    """Human parts in MATLAB files of PASCAL-Parts, one structure of objects and parts a file.

    A frame without a person is invalid everywhere, as in ASTMT.
    """

    target_kind: ClassVar[str] = "labels"

    kind: Literal["pascal_parts"]
    person: int = 15
    """Class index of persons among the objects."""
    classes: tuple[str, ...]
    """Names of the classes; the first is the background."""
    parts: dict[str, int]
    """Class of each part name in the files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_classes(self.classes)
        for name, index in self.parts.items():
            if not 0 < index < len(self.classes):
                raise ValueError(
                    f"parts.{name}: expected a class of 1..{len(self.classes) - 1}, got {index}"
                )


@dataclass(frozen=True, kw_only=True)
class EdgesSource(FileSource):
    """Maps of edges."""

    target_kind: ClassVar[str] = "edges"

    kind: Literal["edges"]
    above: float = 0.0
    """A pixel is an edge if its stored value is above this one."""
    ignore: float | None = None
    """Stored value of pixels of which nothing is known."""


@dataclass(frozen=True, kw_only=True)
class DerivedEdges:
    """Edges where the labels of neighbours differ; see `decode.label_edges`."""

    target_kind: ClassVar[str] = "edges"

    kind: Literal["derived_edges"]
    labels: str = "segmentation"
    """The target whose stored labels have the edges."""


@dataclass(frozen=True, kw_only=True)
class DepthSource(FileSource):
    """Depth along the optical axis, in metres once decoded."""

    target_kind: ClassVar[str] = "depth"

    kind: Literal["depth"]
    scale: float = 1.0
    """Metres per stored unit; for `encoding: inverse`, metres x stored unit (focal length x
    baseline, for a disparity)."""
    offset: float = 0.0
    """Added to the stored value before scaling, in stored units."""
    encoding: Literal["metric", "inverse"] = "metric"
    """Metres are `scale * (stored + offset)`, or `scale / (stored + offset)`."""
    camera: "CameraFiles | None" = None
    """For `encoding: inverse`: files whose baseline and focal length multiply `scale`."""
    invalid: tuple[float, ...] = (0.0,)
    """Stored values of pixels without a depth. Values that are not finite or not positive in
    metres are invalid in any case."""
    max_metres: float | None = None
    """Beyond this distance a pixel is invalid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale <= 0:
            raise ValueError(f"expected a positive depth scale, got {self.scale}")
        if self.camera is not None and self.encoding != "inverse":
            raise ValueError("camera files turn disparity into metres: set encoding: inverse")
        if self.max_metres is not None and self.max_metres <= 0:
            raise ValueError(f"max_metres: expected a positive distance, got {self.max_metres}")


@dataclass(frozen=True, kw_only=True)
class CameraFiles:
    """JSON files as Cityscapes has them: `extrinsic.baseline` (m) and `intrinsic.fx` (pixels)."""

    folder: str
    suffix: str

    def __post_init__(self) -> None:
        check_relative(self.folder, "folder")

    def path(self, frame_id: str) -> str:
        """The file of one frame, relative to the root."""
        return str(PurePosixPath(self.folder) / f"{frame_id}{self.suffix}")


@dataclass(frozen=True, kw_only=True)
class DisparitySource(FileSource):
    """Disparity of a stereo pair, in whatever unit it is stored; no metres."""

    target_kind: ClassVar[str] = "disparity"

    kind: Literal["disparity"]
    scale: float = 1.0
    """Disparity is `scale * (stored + offset)`."""
    offset: float = 0.0
    """Added to the stored value before scaling, in stored units."""
    invalid: tuple[float, ...] = (0.0,)
    """Stored values of pixels without one. What is not positive is invalid in any case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale <= 0:
            raise ValueError(f"expected a positive disparity scale, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class NormalsSource(FileSource):
    """Normals kept in files of three channels."""

    target_kind: ClassVar[str] = "normals"

    kind: Literal["normals"]
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

    target_kind: ClassVar[str] = "normals"

    kind: Literal["derived_normals"]
    depth: str = "depth"
    """The target that has the depth, in metres."""
    labels: str | None = None
    """Fit only pixels of one stored label of this target together."""
    window: int = 7
    """Side of the fitted neighbourhood, odd, in pixels of the stored depth."""

    def __post_init__(self) -> None:
        if self.window < 3 or self.window % 2 == 0:
            raise ValueError(f"expected an odd window of at least 3 pixels, got {self.window}")


@dataclass(frozen=True, kw_only=True)
class ValuesSource(FileSource):
    """Maps of any quantity, such as heat maps of keypoints."""

    target_kind: ClassVar[str] = "values"

    kind: Literal["values"]
    scale: float = 1.0
    """A value is `scale * stored`."""
    invalid: tuple[float, ...] = ()
    """Stored values of pixels without one. What is not finite is invalid in any case."""


TargetSource = (
    LabelsSource
    | PartsSource
    | EdgesSource
    | DerivedEdges
    | DepthSource
    | DisparitySource
    | NormalsSource
    | DerivedNormals
    | ValuesSource
)
"""How a target comes about; `target_kind` is its row in `TARGET_KINDS`."""


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


def check_relative(path: str, where: str) -> None:
    """Raise ValueError for a path that would leave the data folder, or is no UTF-8 text."""
    pure = PurePosixPath(path)
    if not path or "\\" in path or "\0" in path or pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{where}: expected a path inside the data folder, got {path!r}")
    # How Python spells the bytes of file names that are no UTF-8.
    if any("\ud800" <= character <= "\udfff" for character in path):
        raise ValueError(f"{where}: expected a name in UTF-8, got {path!r}; rename the file")


def _check_classes(classes: tuple[str, ...]) -> None:
    if not 1 <= len(classes) <= IGNORE:
        raise ValueError(f"expected 1 to {IGNORE} classes, got {len(classes)}")
    if len(set(classes)) != len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"classes: {twice} is listed twice")
