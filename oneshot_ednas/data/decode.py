"""What lies in the files of a frame, turned into the maps that `targets.py` describes.

Plain NumPy, so that worker processes need no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float16, Float32, Float64, Integer, Shaped, UInt8

from oneshot_ednas.data import files
from oneshot_ednas.data.normals import normals_from_depth
from oneshot_ednas.data.sources import (
    DIRECTIONS,
    DepthSource,
    DerivedEdges,
    DerivedNormals,
    DisparitySource,
    EdgesSource,
    ImageSource,
    Intrinsics,
    LabelsSource,
    NormalsSource,
    PartsSource,
    TargetSource,
    ValuesSource,
)
from oneshot_ednas.data.targets import IGNORE

VOID_RIM = 5
"""Pixels from the nearest label to which the place of a contour is told; PASCAL VOC's rims are
about five pixels wide."""

# What float32 can hold; larger numbers are damage, not measurements.
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One frame's files, for the decoders."""

    root: Path
    frame_id: str
    paths: Callable[[str], str]
    """Target name, or `image`, to the file's path below the root."""
    targets: dict[str, TargetSource]
    intrinsics: Intrinsics | None
    label_map: str | None
    """Chosen label map of `segmentation`."""

    def array(self, name: str, source: Any, *, colour: bool = False) -> np.ndarray:
        """The file of a target as it is."""
        return files.read_array(
            self.root, self.paths(name), self.frame_id, colour=colour, stack=source.stack
        )

    def error(self, name: str, message: str) -> ValueError:
        """An error of a target's file, which it names."""
        return ValueError(f"frame {self.frame_id}: {self.paths(name)}: {message}")


def image(stored: Stored, source: ImageSource) -> UInt8[np.ndarray, "height width 3"]:
    """The image as RGB in 0..255."""
    array = stored.array("image", source, colour=True)
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] not in (1, 3):
        raise stored.error("image", f"expected 1 or 3 channels, got {array.shape[2]}")
    array = np.broadcast_to(array, (*array.shape[:2], 3))
    low, high = float(array.min()), float(array.max())
    if not 0 <= low <= high <= source.white:
        raise stored.error(
            "image",
            f"expected values in 0..{source.white:g}, got {low:g}..{high:g}; set image.white to "
            f"the stored value of white",
        )
    if array.dtype == np.uint8 and source.white > 255:
        raise stored.error("image", f"image.white is {source.white:g}, got values of 8 bits")
    if array.dtype != np.uint8 or source.white != 255:
        array = np.rint(array.astype(np.float64) * (255 / source.white)).astype(np.uint8)
    return np.ascontiguousarray(array)


def target(name: str, stored: Stored) -> Shaped[np.ndarray, "..."]:
    """One target at the size of its file.

    Raises:
        ValueError: for whatever is wrong with its files.
    """
    source = stored.targets[name]
    return _DECODERS[type(source)](name, source, stored)


def needed_targets(name: str, targets: dict[str, TargetSource]) -> tuple[str, ...]:
    """The targets whose files must be read for this one: itself, or what it is derived from."""
    source = targets[name]
    if isinstance(source, DerivedEdges):
        return (source.labels,)
    if isinstance(source, DerivedNormals):
        return (source.depth, *([source.labels] if source.labels else []))
    return (name,)


def label_edges(
    labels: Integer[np.ndarray, "height width"], is_void: Bool[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "height width"]:
    """1 where a pixel's label is not that of its right or lower neighbour, else 0.

    A pixel without a label gets that of the nearest one that has it: so the rim of void that
    PASCAL VOC draws around objects is one contour, not two. Deeper inside a region without labels
    nothing is known.

    Args:
        labels: any whole numbers.
        is_void: pixels without a label.

    Returns:
        0, 1, and 255 farther than `VOID_RIM` pixels from any label.
    """
    if is_void.all():
        return np.full(labels.shape, IGNORE, np.uint8)
    distance, nearest = scipy.ndimage.distance_transform_edt(is_void, return_indices=True)
    labels = labels[tuple(nearest)]
    edges = np.zeros(labels.shape, np.uint8)
    edges[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edges[:-1] |= labels[:-1] != labels[1:]
    edges[distance > VOID_RIM] = IGNORE
    return edges


def _labels(name: str, source: LabelsSource, stored: Stored) -> UInt8[np.ndarray, "height width"]:
    chosen = source.label_map(stored.label_map if name == "segmentation" else None)
    if source.above is not None:
        values = _numbers(name, source, stored)
        unknown = ~np.isfinite(values)
        if source.ignore is not None:
            unknown |= values == source.ignore
        return np.where(unknown, np.uint8(IGNORE), (values > source.above).astype(np.uint8))
    labels = _stored_labels(name, source, stored)
    ignore = IGNORE if source.ignore is None else source.ignore
    valid = labels != ignore
    wrong = valid & ((labels < 0) | (labels >= len(chosen.map)))
    if wrong.any():
        values = np.unique(labels[wrong])
        shown = ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
        raise stored.error(
            name,
            f"labels {shown} in {int(wrong.sum())} pixels lie outside the {len(chosen.map)} stored "
            f"classes (ignored is {ignore}); correct the file, or the classes and the "
            f"ignore value",
        )
    table = np.array(chosen.map, dtype=np.uint8)
    return np.where(valid, table[np.where(valid, labels, 0)], np.uint8(IGNORE))


def _stored_labels(
    name: str, source: LabelsSource, stored: Stored
) -> Integer[np.ndarray, "height width"]:
    array = _one_channel(stored.array(name, source), name, stored)
    if array.dtype.kind == "f":
        # Beyond this, numbers are no exact integers, and no labels either.
        wrong = array[~(np.abs(array) < 2**24) | (np.rint(array) != array)]
        if wrong.size:
            raise stored.error(name, f"expected whole numbers as labels, got {wrong[0]:g}")
    return array.astype(np.int64)


def _parts(name: str, source: PartsSource, stored: Stored) -> UInt8[np.ndarray, "height width"]:
    path = stored.paths(name)
    annotation = files.read_matlab(stored.root, path, stored.frame_id).get("anno")
    try:
        objects = np.atleast_1d(annotation.objects)  # type: ignore[union-attr]
        labels = np.zeros(np.shape(objects[0].mask), np.uint8)
        persons = [item for item in objects if int(item.class_ind) == source.person]
        found = False
        for person in persons:
            for part in np.atleast_1d(person.parts):
                index = source.parts.get(str(part.part_name))
                if index is not None:
                    labels[np.asarray(part.mask) > 0] = index
                    found = True
    except (AttributeError, IndexError, TypeError, ValueError):
        raise stored.error(
            name, "expected a structure anno with objects, their masks and parts"
        ) from None
    return labels if found else np.full_like(labels, IGNORE)


def _edges(name: str, source: EdgesSource, stored: Stored) -> UInt8[np.ndarray, "height width"]:
    values = _numbers(name, source, stored)
    unknown = ~np.isfinite(values)
    if source.ignore is not None:
        unknown |= values == source.ignore
    return np.where(unknown, np.uint8(IGNORE), (values > source.above).astype(np.uint8))


def _derived_edges(
    name: str, source: DerivedEdges, stored: Stored
) -> UInt8[np.ndarray, "height width"]:
    labels = stored.targets[source.labels]
    assert isinstance(labels, LabelsSource)
    found = _stored_labels(source.labels, labels, stored)
    is_void = found == (IGNORE if labels.ignore is None else labels.ignore)
    dropped = [label for label, index in enumerate(labels.label_map(None).map) if index == IGNORE]
    return label_edges(found, is_void | np.isin(found, dropped))


def _depth(name: str, source: DepthSource, stored: Stored) -> Float32[np.ndarray, "height width"]:
    values = _numbers(name, source, stored)
    valid = np.isfinite(values) & ~np.isin(values, source.invalid)
    shifted = np.where(valid, values, 0) + source.offset
    valid &= shifted > 0
    if source.encoding == "inverse":
        scale = source.scale * (1.0 if source.camera is None else _camera_factor(source, stored))
        metres = np.divide(scale, shifted, out=np.zeros_like(shifted), where=valid)
    else:
        metres = source.scale * shifted
    farthest = _LARGEST if source.max_metres is None else source.max_metres
    return np.where(valid & (metres <= farthest), metres, 0).astype(np.float32)


def _camera_factor(source: DepthSource, stored: Stored) -> float:
    assert source.camera is not None
    path = source.camera.path(stored.frame_id)
    camera = files.read_json(stored.root, path, stored.frame_id)
    try:
        factor = float(camera["extrinsic"]["baseline"]) * float(camera["intrinsic"]["fx"])
    except (KeyError, TypeError, ValueError):
        factor = 0.0
    if not factor > 0 or not np.isfinite(factor):
        raise ValueError(
            f"frame {stored.frame_id}: {path}: expected extrinsic.baseline and intrinsic.fx as "
            f"positive numbers"
        )
    return factor


def _disparity(
    name: str, source: DisparitySource, stored: Stored
) -> Float32[np.ndarray, "height width"]:
    values = _numbers(name, source, stored)
    valid = np.isfinite(values) & ~np.isin(values, source.invalid)
    found = source.scale * (np.where(valid, values, 0) + source.offset)
    return np.where(valid & (found > 0) & (found <= _LARGEST), found, 0).astype(np.float32)


def _normals(
    name: str, source: NormalsSource, stored: Stored
) -> Float16[np.ndarray, "height width 3"]:
    array = stored.array(name, source)
    if array.ndim != 3 or array.shape[2] != 3:
        raise stored.error(name, f"expected normals of 3 channels, got {array.shape}")
    values = array.astype(np.float64)
    valid = np.asarray(np.isfinite(values).all(axis=-1))
    if source.invalid is not None:
        valid &= (values != np.array(source.invalid)).any(axis=-1)
    values = np.where(valid[..., None], values, 0)
    if source.encoding == "rgb":
        values = values * (2 / 255) - 1
    vectors = np.empty_like(values)
    for channel, axis in enumerate(source.axes):
        position, sign = DIRECTIONS[axis]
        vectors[..., position] = sign * values[..., channel]
    length = np.sqrt(np.einsum("hwc,hwc->hw", vectors, vectors))
    # Halfway to a unit vector: what is shorter was averaged away or never was a direction.
    valid &= length > 0.5
    scale = np.divide(1.0, length, out=np.zeros_like(length), where=valid)
    if array.dtype == np.float16 and source.encoding == "unit":
        # Unit vectors rounded to float16 stay as they are, so that a decoded map that was stored
        # comes back to the bit.
        scale = np.where(valid & (np.abs(length - 1) < 1e-3), 1.0, scale)
    return (vectors * scale[..., None]).astype(np.float16)


def _derived_normals(
    name: str, source: DerivedNormals, stored: Stored
) -> Float16[np.ndarray, "height width 3"]:
    depth, camera = stored.targets[source.depth], stored.intrinsics
    assert isinstance(depth, DepthSource)
    assert camera is not None
    labels = None
    if source.labels is not None:
        labels_source = stored.targets[source.labels]
        assert isinstance(labels_source, LabelsSource)
        labels = _stored_labels(source.labels, labels_source, stored)
    normals = normals_from_depth(
        _depth(source.depth, depth, stored),
        camera.fx,
        camera.fy,
        camera.cx,
        camera.cy,
        window=source.window,
        labels=labels,
    )
    return normals.astype(np.float16)


def _values(name: str, source: ValuesSource, stored: Stored) -> Float32[np.ndarray, "height width"]:
    values = _numbers(name, source, stored)
    valid = np.isfinite(values) & ~np.isin(values, source.invalid)
    found = source.scale * np.where(valid, values, 0)
    return np.where(valid & (np.abs(found) <= _LARGEST), found, np.nan).astype(np.float32)


def _numbers(name: str, source: Any, stored: Stored) -> Float64[np.ndarray, "height width"]:
    """A map of one channel, of numbers that may be anything, NaN too."""
    return _one_channel(stored.array(name, source), name, stored).astype(np.float64)


def _one_channel(array: np.ndarray, name: str, stored: Stored) -> np.ndarray:
    if array.ndim == 3 and array.shape[2] != 1:
        raise stored.error(
            name,
            f"expected one channel, got {array.shape[2]}; colour-coded maps must be stored as "
            f"numbers",
        )
    return array.reshape(array.shape[:2])


_DECODERS: dict[type, Callable[[str, Any, Stored], np.ndarray]] = {
    LabelsSource: _labels,
    PartsSource: _parts,
    EdgesSource: _edges,
    DerivedEdges: _derived_edges,
    DepthSource: _depth,
    DisparitySource: _disparity,
    NormalsSource: _normals,
    DerivedNormals: _derived_normals,
    ValuesSource: _values,
}
