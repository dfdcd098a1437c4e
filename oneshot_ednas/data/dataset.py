"""A data set as found in a folder: which splits and targets it has, and its frames. No torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from oneshot_ednas.data import decode, files
from oneshot_ednas.data.sources import (
    DepthSource,
    DerivedEdges,
    DerivedNormals,
    FileSource,
    ImageSource,
    Intrinsics,
    LabelMap,
    LabelsSource,
    PartsSource,
    TargetSource,
    check_relative,
)
from oneshot_ednas.data.targets import TARGET_KINDS, resized
from oneshot_ednas.schema import nearest


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What a layout or a manifest says about a folder. Travels to worker processes."""

    name: str
    """Used in results and in names of cache folders: letters, digits, `_`, `-` and `.`."""
    layout: str
    """What the folder was recognised as, for people."""
    root: Path
    """The data folder, resolved."""
    image: ImageSource
    targets: dict[str, TargetSource]
    """How each target comes about, by its name."""
    splits: dict[str, tuple[str, ...]]
    """Frame ids of each split, in order."""
    intrinsics: Intrinsics | None = None
    listed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """For layouts whose lists name each file: frame id to `image` or target to path."""
    notes: tuple[str, ...] = ()
    """What a user should know about the data, such as that a depth is no metres."""

    def __post_init__(self) -> None:
        """Check names, and that derived targets have what they are derived from."""
        _check_name(self.name, "name")
        if not self.splits:
            raise ValueError("expected at least one split")
        if "image" in self.targets:
            raise ValueError("targets.image: image is the input; name the target otherwise")
        # Both are parts of the names of cached files.
        for what, names in (("targets", self.targets), ("splits", self.splits)):
            for name in names:
                _check_name(name, what)
        for split, frames in self.splits.items():
            for frame_id in frames:
                check_relative(frame_id, f"split {split}: frame")
        for name, source in self.targets.items():
            self._check_derived(name, source)

    def _check_derived(self, name: str, source: TargetSource) -> None:
        where = f"targets.{name}: derived from"
        if isinstance(source, DerivedNormals):
            if not isinstance(self.targets.get(source.depth), DepthSource):
                raise ValueError(f"{where} {source.depth}, expected a target of kind depth")
            if self.intrinsics is None:
                raise ValueError(f"{where} depth, which needs the camera's intrinsics")
        labels = source.labels if isinstance(source, (DerivedEdges, DerivedNormals)) else None
        if labels is None:
            return
        source_of_labels = self.targets.get(labels)
        if not isinstance(source_of_labels, LabelsSource) or source_of_labels.above is not None:
            raise ValueError(f"{where} {labels}, expected a target of kind labels that stores them")

    def target_kind(self, target: str) -> str:
        """The row of a target in `TARGET_KINDS`.

        Raises:
            ValueError: for an unknown target.
        """
        self.check_targets([target])
        return self.targets[target].target_kind

    def class_names(self, target: str, label_map: str | None = None) -> tuple[str, ...]:
        """Names of a target's classes, by class index; none for other kinds."""
        source = self.targets[target]
        if isinstance(source, PartsSource):
            return source.classes
        if isinstance(source, LabelsSource):
            return self.label_map(label_map).classes if target == "segmentation" else source.classes
        return ()

    def label_map(self, name: str | None) -> LabelMap:
        """A named label map of `segmentation`; None is the stored classes.

        Raises:
            ValueError: if there is no such map, or no segmentation.
        """
        source = self.targets.get("segmentation")
        if not isinstance(source, LabelsSource):
            raise ValueError(f"{self.name} has no segmentation, so no label map {name}")
        try:
            return source.label_map(name)
        except ValueError as error:
            raise ValueError(f"{self.name} has {error}") from None

    def check_targets(self, targets: Collection[str]) -> None:
        """Raise ValueError for a target that the data set does not have."""
        for name in targets:
            if name not in self.targets:
                raise ValueError(f"{self.name} has no target {name}; {nearest(name, self.targets)}")

    def frames(self, split: str) -> tuple[str, ...]:
        """Frame ids of a split, in order.

        Raises:
            ValueError: for an unknown or empty split.
        """
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split}; {nearest(split, self.splits)}")
        if not self.splits[split]:
            raise ValueError(f"split {split} of {self.name} is empty")
        return self.splits[split]

    def path(self, name: str, frame_id: str) -> str:
        """File of the image or of a target of a frame, relative to the root."""
        if frame_id in self.listed:
            return self.listed[frame_id][name]
        source = self.image if name == "image" else self.targets[name]
        assert isinstance(source, FileSource), f"{name} is derived and has no file"
        return source.path(frame_id)

    def sources(self, targets: Collection[str]) -> dict[str, TargetSource]:
        """How these targets come about, and those that they are derived from."""
        names = [n for name in targets for n in (name, *decode.needed_targets(name, self.targets))]
        return {name: self.targets[name] for name in names}

    def files(self, frame_id: str, targets: Collection[str]) -> tuple[str, ...]:
        """All files that the image and these targets of a frame are read from."""
        found = {self.path("image", frame_id): None}
        for name, source in self.sources(targets).items():
            if isinstance(source, FileSource):
                found[self.path(name, frame_id)] = None
            if isinstance(source, DepthSource) and source.camera is not None:
                found[source.camera.path(frame_id)] = None
        return tuple(found)

    def read_frame(
        self,
        frame_id: str,
        *,
        height: int,
        width: int,
        targets: Collection[str] | None = None,
        label_map: str | None = None,
    ) -> dict[str, Shaped[np.ndarray, "..."]]:
        """One frame at the wanted size: `image` (uint8 RGB) and one array per target.

        The image is averaged down or interpolated up; for targets see `targets.resized`. What is
        derived is derived at the stored size, where a window covers the smallest piece of surface
        and the intrinsics hold as given, and only then resampled.

        Args:
            frame_id: one entry of a split.
            height: rows of every array.
            width: columns of every array.
            targets: the targets to read; None is all that the data set has.
            label_map: name of a label map of `segmentation`; None keeps the stored classes.

        Returns:
            Arrays as `TARGET_KINDS` describes them. Normals are unit vectors with x right, y down,
            z forward, towards the camera.

        Raises:
            ValueError: for a missing or unreadable file, images and targets of different sizes, a
                label outside the classes, an unknown target or label map.
        """
        frame = self.read_stored(frame_id, targets=targets, label_map=label_map)
        found = {"image": _resized_image(frame.pop("image"), height, width)}
        for name, array in frame.items():
            found[name] = resized(self.targets[name].target_kind, array, height, width)
        return found

    def read_stored(
        self,
        frame_id: str,
        *,
        targets: Collection[str] | None = None,
        label_map: str | None = None,
    ) -> dict[str, Shaped[np.ndarray, "..."]]:
        """One frame at the size of its files, see `read_frame`."""
        targets = tuple(self.targets) if targets is None else targets
        self.check_targets(targets)
        if label_map is not None:
            self.label_map(label_map)
        check_relative(frame_id, "frame")
        stored = decode.Stored(
            root=self.root,
            frame_id=frame_id,
            paths=partial(self.path, frame_id=frame_id),
            targets=self.targets,
            intrinsics=self.intrinsics,
            label_map=label_map,
        )
        frame: dict[str, np.ndarray] = {"image": decode.image(stored, self.image)}
        size = frame["image"].shape[:2]
        for name in targets:
            array = decode.target(name, stored)
            if array.shape[:2] != size:
                raise ValueError(
                    f"frame {frame_id}: {name} is {_size(array)}, expected the image's "
                    f"{_size(frame['image'])}; store both at one size"
                )
            dtype = TARGET_KINDS[self.targets[name].target_kind].dtype
            assert array.dtype == dtype, f"{name} is {array.dtype}, expected {dtype}"
            frame[name] = array
        return frame

    def identity(self, split: str, targets: Collection[str]) -> list[tuple[str, int, int]]:
        """Path, size and time of change of every file that a split's targets are read from.

        Raises:
            ValueError: if one is missing.
        """
        seen: dict[str, tuple[str, int, int]] = {}
        for frame_id in self.frames(split):
            for path in self.files(frame_id, targets):
                if path not in seen:
                    status = files.find_file(self.root, path, frame_id).stat()
                    seen[path] = (path, status.st_size, status.st_mtime_ns)
        return list(seen.values())


def with_num_classes(data: DataSet, num_classes: Mapping[str, int]) -> DataSet:
    """The data set with its nameless classes numbered as far as a config says there are.

    Layouts whose files do not say how many classes there are give `NAMELESS` classes.
    """
    targets = dict(data.targets)
    for name, count in num_classes.items():
        source = targets.get(name)
        if isinstance(source, LabelsSource) and source.classes == NAMELESS:
            targets[name] = replace(source, classes=NAMELESS[:count])
    return replace(data, targets=targets)


def _check_name(name: str, where: str) -> None:
    if not name or not all(c.isalnum() or c in "_-." for c in name):
        raise ValueError(f"{where}: expected letters, digits, _, - and ., got {name!r}")


NAMELESS = tuple(f"class {index}" for index in range(255))
"""Classes of a target whose files do not say how many there are."""


def _resized_image(
    array: Shaped[np.ndarray, "..."], height: int, width: int
) -> Shaped[np.ndarray, "..."]:
    if array.shape[:2] == (height, width):
        return array
    shrinks = height <= array.shape[0] and width <= array.shape[1]
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(array).resize((width, height), method))


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"
