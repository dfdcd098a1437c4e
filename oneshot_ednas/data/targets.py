"""What the maps of a data set are: how each kind is stored, resized and augmented. No torch.

`TARGET_KINDS` is the only place that lists them. A target is what was measured (metres, classes,
directions); which loss and which metrics a network is trained and scored with is its task's
(`tasks.TASK_KINDS`), and several kinds of task may learn from one kind of target.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Shaped

IGNORE = 255

PLAUSIBLE_MEDIAN_M = (0.05, 100.0)
"""Medians of depths between close-ups and streets, in metres; others tell a wrong unit."""
PLAUSIBLE_DEPTH_M = 1000.0
"""Depths beyond this, in metres, tell a wrong unit or invalid values that are taken for depths."""


@dataclass(frozen=True, kw_only=True)
class TargetKind:
    """One row of `TARGET_KINDS`."""

    dtype: type[np.generic]
    """Type of a decoded map, which is also that of the packed arrays."""
    channels: int = 1
    """Maps are [height, width], or [height, width, channels] if there are several."""
    invalid: int | float = 0.0
    """Value of pixels that take no part in losses and metrics, in every channel."""
    resize: Literal["nearest", "any"] = "nearest"
    """`nearest`: the stored pixel at the centre. `any`: for maps of 0 and 1, whether any pixel that
    the new one covers is 1, so that thin lines survive."""
    enlarged: int = 0
    """Values are multiplied by s to this power where the image is enlarged by s: a scene that
    looks s times larger is s times nearer."""
    mirrored: tuple[float, ...] = (1.0,)
    """Factor of each channel where the image is mirrored from left to right."""
    rule: str
    """Which pixels are invalid, for people."""

    @property
    def is_whole(self) -> bool:
        """Whether values are class indices, which have no channel axis in a batch."""
        return np.issubdtype(self.dtype, np.integer)


TARGET_KINDS: dict[str, TargetKind] = {
    "labels": TargetKind(
        dtype=np.uint8, invalid=IGNORE, rule=f"the ignored label (stored as {IGNORE})"
    ),
    "edges": TargetKind(
        dtype=np.uint8, invalid=IGNORE, resize="any", rule=f"stored as {IGNORE}; others are 0 or 1"
    ),
    "depth": TargetKind(
        dtype=np.float32, enlarged=-1, rule="0, not finite, or beyond the largest depth (metres)"
    ),
    "disparity": TargetKind(dtype=np.float32, enlarged=1, rule="0 or not finite"),
    "normals": TargetKind(
        dtype=np.float16, channels=3, mirrored=(-1.0, 1.0, 1.0), rule="(0, 0, 0) or not finite"
    ),
    # NaN, since each finite number may be a value.
    "values": TargetKind(dtype=np.float32, invalid=np.nan, rule="not finite"),
}


def is_valid(kind: str, target: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "height width"]:
    """Which pixels of a decoded map take part in losses and metrics."""
    row = TARGET_KINDS[kind]
    if row.channels > 1:
        return np.asarray((target != row.invalid).any(axis=-1))
    return np.isfinite(target) if np.isnan(row.invalid) else np.asarray(target != row.invalid)


def is_in_metres(median: float, largest: float) -> bool:
    """Whether depths may be of scenes that a camera took; millimetres taken for metres may not.

    Args:
        median: of the valid depths, in metres.
        largest: of the valid depths, in metres.
    """
    low, high = PLAUSIBLE_MEDIAN_M
    return low <= median <= high and largest <= PLAUSIBLE_DEPTH_M


def resized(
    kind: str, target: Shaped[np.ndarray, "..."], height: int, width: int
) -> Shaped[np.ndarray, "..."]:
    """A decoded map at another size, without values that nobody measured.

    A mean of two labels, or of the two sides of a depth edge, is no valid target, so the nearest
    stored pixel is taken, or `any` where the kind says so.
    """
    if target.shape[:2] == (height, width):
        return target
    rows = (np.arange(height) * 2 + 1) * target.shape[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * target.shape[1] // (2 * width)
    nearest = target[np.ix_(rows, columns)]
    if TARGET_KINDS[kind].resize == "nearest":
        return nearest
    # The nearest pixel may lie in the next one's area; it counts as 1 there, and not twice.
    rest = np.where(nearest == 1, np.zeros_like(nearest), nearest)
    return np.where(_covers(target == 1, height, width), np.ones_like(nearest), rest)


def _covers(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Whether any true pixel lies in the area of each new one; a stored pixel lies in one only."""
    for axis, size in enumerate((height, width)):
        old = mask.shape[axis]
        starts = np.arange(size) * old // size
        # What is enlarged covers less than a pixel; the nearest one is taken for it already.
        if size < old:
            mask = np.logical_or.reduceat(mask, starts, axis=axis)
        else:
            mask = mask.take((np.arange(size) * 2 + 1) * old // (2 * size), axis=axis)
    return mask
