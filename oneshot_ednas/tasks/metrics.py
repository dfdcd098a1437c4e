"""Metrics of the dense tasks: pure sums over a batch, pure scores of the summed batches.

One convention for all: everything is pooled over the valid pixels of the whole split, and nothing
is averaged per batch or image, so that the batch size cannot change a score. `PooledMetrics` adds
the sums of the batches on their own device and reads them once, in `compute`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from oneshot_ednas.tasks.losses import INVALID_LABEL

SEGMENTATION_METRICS = ("miou", "pixel_accuracy")
DEPTH_METRICS = ("absolute_error", "relative_error", "rmse", "delta_1", "delta_2", "delta_3")
NORMALS_METRICS = ("mean_angle_deg", "within_11", "within_22", "within_30")

_ANGLES_DEG = (11.25, 22.5, 30.0)
_NUM_LABELS = INVALID_LABEL + 2
# Rows of the label table: one per uint8 value, and a last one for every label outside 0..255.
_MIN_DEPTH_M = 1e-6
# Predictions at or below 0 count as this depth in the delta ratios, which they always fail.


class PooledMetrics:
    """Scores of a whole split, from sums that are added up batch by batch.

    Build one with `segmentation_metrics`, `depth_metrics` or `normals_metrics`, or with any pair of
    functions of the same form.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        sums: Callable[[Tensor, Tensor], Tensor],
        scores: Callable[[Sequence[int | float]], tuple[float, ...]],
    ) -> None:
        """Set up empty sums.

        Args:
            names: one name per score.
            sums: (prediction, target) to a vector of sums whose last three entries are the number
                of valid pixels, of frames without one, and of frames.
            scores: the summed vector to one score per name.
        """
        self.names = names
        self.num_invalid_frames = 0
        """Frames without a valid pixel; known after `compute`."""
        self._batch_sums = sums
        self._scores = scores
        self._sums: Tensor | None = None

    @torch.no_grad()
    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add one batch; nothing is copied to the host."""
        sums = self._batch_sums(pred, target)
        self._sums = sums if self._sums is None else self._sums + sums

    def compute(self) -> dict[str, float]:
        """Scores over everything added so far.

        Raises:
            ValueError: if nothing valid was added, or a label was out of range.
        """
        names = ", ".join(self.names)
        if self._sums is None:
            raise ValueError(f"no batch was added, so there is no {names}; call update first")
        sums = self._sums.tolist()
        num_valid, num_invalid_frames, num_frames = sums[-3:]
        self.num_invalid_frames = int(num_invalid_frames)
        if num_valid == 0:
            raise ValueError(
                f"none of {int(num_frames)} frames has a valid pixel, so there is no {names}; "
                f"check the targets and their invalid value"
            )
        return dict(zip(self.names, self._scores(sums), strict=True))


def segmentation_metrics(num_classes: int) -> PooledMetrics:
    """`miou` over the classes present in the ground truth, and `pixel_accuracy`, as fractions.

    Raises:
        ValueError: if there is no class, or a class would have the label of invalid pixels.
    """
    if not 1 <= num_classes <= INVALID_LABEL:
        raise ValueError(f"num_classes must be in 1..{INVALID_LABEL}, got {num_classes}")
    return PooledMetrics(
        SEGMENTATION_METRICS,
        lambda pred, target: segmentation_sums(pred, target, num_classes),
        lambda sums: segmentation_scores(sums, num_classes),
    )


def depth_metrics() -> PooledMetrics:
    """`absolute_error` and `rmse` in metres, `relative_error`, and `delta_k`, as fractions."""
    return PooledMetrics(DEPTH_METRICS, depth_sums, depth_scores)


def normals_metrics() -> PooledMetrics:
    """`mean_angle_deg` in degrees, and the fractions within 11.25, 22.5 and 30 degrees."""
    return PooledMetrics(NORMALS_METRICS, normals_sums, normals_scores)


def segmentation_sums(
    pred: Integer[Tensor, "batch height width"],
    target: Integer[Tensor, "batch height width"],
    num_classes: int,
) -> Int64[Tensor, " sums"]:
    """Pixel counts per (target label, predicted class), and the three common counts.

    Labels out of range are counted under their own value, so that `segmentation_scores` can name
    them: a check here would wait for the device at every batch.

    Args:
        pred: predicted class indices.
        target: class indices, or 255 for invalid.
        num_classes: number of classes.

    Returns:
        257 x (num_classes + 1) counts, row by row (the last row holds labels outside 0..255, the
        last column predictions out of range), then valid pixels, frames without one, frames.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_one_shape(pred, target)
    is_label = (target >= 0) & (target <= INVALID_LABEL)
    row = torch.where(is_label, target.long(), _NUM_LABELS - 1)
    is_class = (pred >= 0) & (pred < num_classes)
    column = torch.where(is_class, pred.long(), num_classes)
    index = (row * (num_classes + 1) + column).flatten()
    # bincount would do the same, but on a GPU it waits for the largest index.
    counts = torch.zeros(_NUM_LABELS * (num_classes + 1), dtype=torch.int64, device=target.device)
    counts.scatter_add_(0, index, torch.ones_like(index))
    return torch.cat([counts, _common_counts(target != INVALID_LABEL)])


def segmentation_scores(sums: Sequence[int | float], num_classes: int) -> tuple[float, ...]:
    """(miou, pixel_accuracy) of summed `segmentation_sums`.

    Raises:
        ValueError: if a target label or a predicted class was out of range.
    """
    table = np.array(sums[:-3], dtype=np.int64).reshape(_NUM_LABELS, num_classes + 1)
    per_label = table.sum(axis=1)
    per_label[INVALID_LABEL] = 0
    if (wrong := np.flatnonzero(per_label[num_classes:]) + num_classes).size:
        label = str(wrong[0]) if wrong[0] < _NUM_LABELS - 1 else "outside 0..255"
        num_pixels = int(per_label[wrong[0]])
        raise ValueError(_wrong_label("segmentation target", label, num_pixels, num_classes))
    confusion = table[:num_classes]
    if num_outside := int(confusion[:, -1].sum()):
        raise ValueError(
            f"{num_outside} predicted pixels lie outside 0..{num_classes - 1}; "
            f"expected class indices of {num_classes} classes"
        )
    confusion = confusion[:, :-1]
    correct, actual, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    present = actual > 0
    iou = correct[present] / (actual + predicted - correct)[present]
    return float(iou.mean()), float(correct.sum() / actual.sum())


def depth_sums(
    pred: Float[Tensor, "batch 1 height width"],
    target: Float[Tensor, "batch 1 height width"],
) -> Float[Tensor, " sums"]:
    """Sums of |e|, |e|/depth, e^2 and of pixels with ratio below 1.25^k, and the common counts.

    Args:
        pred: predicted depth, in metres.
        target: ground-truth depth, in metres; 0, negative or not finite means invalid.

    Returns:
        Nine float64 sums: the six named above, valid pixels, frames without one, frames.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_one_shape(pred, target)
    valid = valid_depth(target)
    truth = _wide(torch.where(valid, target, 1))
    guess = _wide(torch.where(valid, pred, 1))
    error = (guess - truth).abs()
    positive = guess.clamp_min(_MIN_DEPTH_M)
    ratio = torch.maximum(positive / truth, truth / positive)
    sums = [error.sum(), (error / truth).sum(), error.square().sum()]
    sums += [((ratio < 1.25**k) & valid).sum() for k in (1, 2, 3)]
    return torch.cat([torch.stack([_wide(s) for s in sums]), _wide(_common_counts(valid))])


def depth_scores(sums: Sequence[int | float]) -> tuple[float, ...]:
    """Scores of summed `depth_sums`, in the order of `DEPTH_METRICS`."""
    absolute, relative, square, *below, num_valid, _, _ = sums
    fractions = (count / num_valid for count in below)
    return absolute / num_valid, relative / num_valid, math.sqrt(square / num_valid), *fractions


def normals_sums(
    pred: Float[Tensor, "batch 3 height width"],
    target: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, " sums"]:
    """Sum of true angles in degrees, pixels below each threshold, and the common counts.

    Args:
        pred: predicted normals, of any length; a zero vector counts as 90 degrees off.
        target: ground-truth normals; (0, 0, 0) or not finite means invalid.

    Returns:
        Seven float64 sums: the four named above, valid pixels, frames without one, frames.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_one_shape(pred, target)
    valid = valid_normals(target)
    truth = _wide(torch.where(valid, target, 0))
    guess = _wide(torch.where(valid, pred, 0))
    # atan2 is exact for small angles, where acos of a rounded cosine is off by 0.02 degrees.
    sine = torch.linalg.vector_norm(torch.linalg.cross(guess, truth, dim=1), dim=1, keepdim=True)
    angle_deg = torch.rad2deg(torch.atan2(sine, (guess * truth).sum(dim=1, keepdim=True)))
    has_direction = (guess != 0).any(dim=1, keepdim=True)
    angle_deg = torch.where(valid, torch.where(has_direction, angle_deg, 90.0), 0.0)
    sums = [angle_deg.sum()]
    sums += [_wide(((angle_deg < limit) & valid).sum()) for limit in _ANGLES_DEG]
    return torch.cat([torch.stack(sums), _wide(_common_counts(valid))])


def normals_scores(sums: Sequence[int | float]) -> tuple[float, ...]:
    """Scores of summed `normals_sums`, in the order of `NORMALS_METRICS`."""
    *totals, num_valid, _, _ = sums
    return tuple(total / num_valid for total in totals)


def valid_depth(target: Tensor) -> Tensor:
    """True where a depth is known: finite and above 0."""
    return torch.isfinite(target) & (target > 0)


def valid_normals(target: Tensor) -> Tensor:
    """True, with one channel, where a normal is known: finite and not (0, 0, 0)."""
    is_finite = torch.isfinite(target).all(dim=1, keepdim=True)
    return is_finite & (target != 0).any(dim=1, keepdim=True)


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
    """Refuse class indices that no class has.

    Args:
        labels: class indices, of any shape.
        num_classes: number of classes.
        where: what the labels are, for the message (a file or a split).

    Raises:
        ValueError: if a label is neither in 0..num_classes-1 nor 255, or labels are not integers.
    """
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: expected integer class indices, got {labels.dtype}")
    is_wrong = ((labels < 0) | (labels >= num_classes)) & (labels != INVALID_LABEL)
    if is_wrong.any():
        wrong = labels[is_wrong]
        label = wrong.min()
        raise ValueError(_wrong_label(where, str(label), int((wrong == label).sum()), num_classes))


def _wrong_label(where: str, label: str, num_pixels: int, num_classes: int) -> str:
    return (
        f"{where}: label {label} in {num_pixels} pixels; expected 0..{num_classes - 1} for "
        f"{num_classes} classes, or {INVALID_LABEL} for invalid; set num_classes or remap labels"
    )


def _common_counts(valid: Tensor) -> Tensor:
    has_valid = valid.flatten(start_dim=1).any(dim=1)
    counts = [valid.sum(), (~has_valid).sum(), torch.ones_like(has_valid).sum()]
    return torch.stack(counts)


def _wide(values: Tensor) -> Tensor:
    """float64 where the device has it; Apple's GPUs have float32 alone."""
    return values.float() if values.device.type == "mps" else values.double()


def _check_one_shape(pred: Tensor, target: Tensor) -> None:
    if pred.shape != target.shape:
        raise ValueError(
            f"expected pred and target of one shape, "
            f"got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
