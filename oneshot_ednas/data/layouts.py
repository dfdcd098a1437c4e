"""Frames of a user's folder, read as its manifest says, at the size that is wanted.

Everything here is plain NumPy, so that worker processes need no torch.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Float32, Integer, Shaped, UInt8
from PIL import Image

from oneshot_ednas.data.manifest import (
    DIRECTIONS,
    IGNORE,
    DepthSource,
    ImageSource,
    Manifest,
    StoredNormals,
    check_relative,
    load_manifest,
    split_frames,
)
from oneshot_ednas.data.normals import normals_from_depth

__all__ = ["load_manifest", "read_frame", "split_frames"]


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
    check_relative(frame_id, "frame")
    stored = {
        name: _read_file(source.find(root, frame_id), frame_id, colour=name == "image")
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


def _read_file(path: Path, frame_id: str, *, colour: bool) -> np.ndarray:
    """A file as stored, [height, width] or [height, width, channels]."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                # Of a palette, an image wants the colours, a label map the indices.
                as_colour = colour and image.mode not in ("RGB", "L", "I;16")
                array = np.asarray(image.convert("RGB") if as_colour else image)
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
    if array.shape[2] not in (1, 3):
        raise ValueError(
            f"frame {frame_id}: expected an image of 1 or 3 channels, got {array.shape[2]}"
        )
    array = np.broadcast_to(array, (*array.shape[:2], 3))
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
    valid = np.asarray(np.isfinite(stored).all(axis=-1))
    if source.invalid is not None:
        valid &= (stored != np.array(source.invalid)).any(axis=-1)
    stored = np.where(valid[..., None], stored, 0)
    if source.encoding == "rgb":
        stored = stored * (2 / 255) - 1
    vectors = np.empty_like(stored)
    for channel, axis in enumerate(source.axes):
        target, sign = DIRECTIONS[axis]
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


def _whole_numbers(array: np.ndarray, frame_id: str) -> Integer[np.ndarray, "height width"]:
    whole = array.astype(np.int64) if np.isfinite(array).all() else None
    if whole is None or (array.dtype.kind == "f" and (whole != array).any()):
        raise ValueError(f"frame {frame_id}: expected whole numbers as labels, got {array.dtype}")
    return whole


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"
