"""Metrics of the dense tasks: pure sums over a batch, pure scores of the summed batches.

Our own convention: everything is pooled over the valid pixels of the whole split, and nothing is
averaged per batch, so that the batch size cannot change a score. Saliency is the one score that is
a mean over images, as everywhere in its literature. Other papers count otherwise: `conventions`.
`PooledMetrics` adds the sums of the batches on their own device and reads them once, in `compute`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from oneshot_ednas.tasks.losses import INVALID_LABEL, log_depth

SEGMENTATION_METRICS = ("miou", "pixel_accuracy")
DEPTH_METRICS = ("absolute_error", "relative_error", "rmse", "delta_1", "delta_2", "delta_3")
LOG_DEPTH_METRICS = ("log_absolute_error", *DEPTH_METRICS)
DISPARITY_METRICS = ("absolute_error", "relative_error")
HEATMAP_METRICS = ("absolute_error",)
SALIENCY_METRICS = ("iou", "max_f")
SALIENCY_THRESHOLDS = tuple(0.2 + 0.05 * k for k in range(15))
NORMALS_METRICS = ("mean_angle_deg", "within_11", "within_22", "within_30")

_ANGLES_DEG = (11.25, 22.5, 30.0)
_SALIENCY_EPSILON = 1e-12
_NUM_LABELS = INVALID_LABEL + 2
# Rows of the label table: one per uint8 value, and a last one for every label outside 0..255.
_MIN_DEPTH_M = 1e-6
# Predictions at or below 0 count as this depth in the delta ratios, which they always fail.


class PooledMetrics:
    """Scores of a whole split, from sums that are added up batch by batch.

    Build one with `segmentation_metrics`, `depth_metrics` and so on, or with any pair of functions
    of the same form.
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
        if sums.device.type == "mps":  # whose float32 does not count beyond 2 ** 24
            sums = sums.cpu().double()
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


def segmentation_metrics(num_classes: int, *, num_names: int = 2) -> PooledMetrics:
    """`miou` over the classes present in the ground truth, and `pixel_accuracy`, as fractions.

    Args:
        num_classes: number of classes.
        num_names: 1 leaves out the accuracy, which says little where background prevails.

    Raises:
        ValueError: if there is no class, or a class would have the label of invalid pixels.
    """
    if not 1 <= num_classes <= INVALID_LABEL:
        raise ValueError(f"num_classes must be in 1..{INVALID_LABEL}, got {num_classes}")
    return PooledMetrics(
        SEGMENTATION_METRICS[:num_names],
        lambda pred, target: segmentation_sums(pred, target, num_classes),
        lambda sums: segmentation_scores(sums, num_classes)[:num_names],
    )


def depth_metrics() -> PooledMetrics:
    """`absolute_error` and `rmse` in metres, `relative_error`, and `delta_k`, as fractions."""
    return PooledMetrics(DEPTH_METRICS, depth_sums, depth_scores)


def log_depth_metrics() -> PooledMetrics:
    """`log_absolute_error`, of `losses.log_depth`, and the depth metrics, in metres."""
    return PooledMetrics(LOG_DEPTH_METRICS, log_depth_sums, log_depth_scores)


def disparity_metrics() -> PooledMetrics:
    """`absolute_error` in the unit of the disparities, and `relative_error`, a fraction."""
    return PooledMetrics(DISPARITY_METRICS, depth_sums, lambda sums: depth_scores(sums)[:2])


def heatmap_metrics() -> PooledMetrics:
    """`absolute_error` in the unit of the values."""
    return PooledMetrics(HEATMAP_METRICS, heatmap_sums, heatmap_scores)


def saliency_metrics() -> PooledMetrics:
    """`iou` and `max_f`, fractions: the best over thresholds of means over images.

    Per image and threshold (0.2, 0.25, ..., 0.9): IoU of the salient pixels, 1 if neither map has
    any; precision and recall. `iou` is the largest mean IoU, `max_f` the largest harmonic mean of
    mean precision and mean recall. Images without a valid pixel are left out.

    Source:
        Maninis et al., Attentive Single-Tasking of Multiple Tasks, CVPR 2019, and its evaluation
        code, https://github.com/facebookresearch/astmt; `iou` also Bruggemann et al., BMTAS, 2020
    """
    return PooledMetrics(SALIENCY_METRICS, saliency_sums, saliency_scores)


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
    return torch.cat([counts, common_counts(target != INVALID_LABEL)])


def confusion_matrix(
    sums: Sequence[int | float], num_classes: int
) -> Int64[np.ndarray, "classes classes"]:
    """Pixels per target class (row) and predicted class (column) of summed `segmentation_sums`.

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
    return confusion[:, :-1]


def segmentation_scores(sums: Sequence[int | float], num_classes: int) -> tuple[float, ...]:
    """(miou, pixel_accuracy) of summed `segmentation_sums`.

    Raises:
        ValueError: if a target label or a predicted class was out of range.
    """
    confusion = confusion_matrix(sums, num_classes)
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
    truth = wide(torch.where(valid, target, 1))
    guess = wide(torch.where(valid, pred, 1))
    error = (guess - truth).abs()
    positive = guess.clamp_min(_MIN_DEPTH_M)
    ratio = torch.maximum(positive / truth, truth / positive)
    sums = [error.sum(), (error / truth).sum(), error.square().sum()]
    sums += [((ratio < 1.25**k) & valid).sum() for k in (1, 2, 3)]
    return torch.cat([torch.stack([wide(s) for s in sums]), wide(common_counts(valid))])


def depth_scores(sums: Sequence[int | float]) -> tuple[float, ...]:
    """Scores of summed `depth_sums`, in the order of `DEPTH_METRICS`."""
    absolute, relative, square, *below, num_valid, _, _ = sums
    fractions = (count / num_valid for count in below)
    return absolute / num_valid, relative / num_valid, math.sqrt(square / num_valid), *fractions


def log_depth_sums(
    pred: Float[Tensor, "batch 1 height width"],
    target: Float[Tensor, "batch 1 height width"],
) -> Float[Tensor, " sums"]:
    """Sum of the errors of `losses.log_depth`, then `depth_sums`.

    Args:
        pred: predicted depth, in metres, at least 0.
        target: ground-truth depth, in metres; 0, negative or not finite means invalid.

    Raises:
        ValueError: if the shapes differ.
    """
    others = depth_sums(pred, target)
    valid = valid_depth(target)
    truth, guess = (wide(torch.where(valid, depth_m, 0)) for depth_m in (target, pred))
    error = (log_depth(guess) - log_depth(truth)).abs().sum()
    return torch.cat([error[None], others])


def log_depth_scores(sums: Sequence[int | float]) -> tuple[float, ...]:
    """Scores of summed `log_depth_sums`, in the order of `LOG_DEPTH_METRICS`."""
    return sums[0] / sums[-3], *depth_scores(sums[1:])


def heatmap_sums(
    pred: Float[Tensor, "batch 1 height width"],
    target: Float[Tensor, "batch 1 height width"],
) -> Float[Tensor, " sums"]:
    """Sum of |e|, and the common counts.

    Args:
        pred: predicted values.
        target: ground truth; not finite means invalid.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_one_shape(pred, target)
    valid = torch.isfinite(target)
    error = wide(torch.where(valid, pred, 0)) - wide(torch.where(valid, target, 0))
    return torch.cat([error.abs().sum()[None], wide(common_counts(valid))])


def heatmap_scores(sums: Sequence[int | float]) -> tuple[float, ...]:
    """(absolute_error,) of summed `heatmap_sums`."""
    total, num_valid, _, _ = sums
    return (total / num_valid,)


def saliency_sums(
    pred: Float[Tensor, "batch height width"],
    target: Integer[Tensor, "batch height width"],
) -> Float[Tensor, " sums"]:
    """Sums over images of IoU, precision and recall at each threshold, and the common counts.

    Args:
        pred: probability that a pixel is salient.
        target: 1 for salient, 0 for not, 255 for invalid.

    Returns:
        45 sums, pixels with another label, valid pixels, frames without one, frames.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_one_shape(pred, target)
    valid = (target != INVALID_LABEL).flatten(start_dim=1)
    is_salient = valid & (target == 1).flatten(start_dim=1)
    num_salient, has_valid = wide(is_salient.sum(dim=1)), valid.any(dim=1)
    sums = []
    for threshold in SALIENCY_THRESHOLDS:
        is_found = valid & (pred.flatten(start_dim=1) > threshold)
        num_found = wide(is_found.sum(dim=1))
        num_correct = wide((is_found & is_salient).sum(dim=1))
        union = num_found + num_salient - num_correct
        iou = torch.where(union > 0, num_correct / union.clamp_min(1), 1)
        precision = num_correct / (num_found + _SALIENCY_EPSILON)
        recall = num_correct / (num_salient + _SALIENCY_EPSILON)
        sums += [torch.where(has_valid, score, 0).sum() for score in (iou, precision, recall)]
    num_wrong = ((target != 0) & (target != 1) & (target != INVALID_LABEL)).sum()
    return torch.cat([torch.stack([*sums, wide(num_wrong)]), wide(common_counts(valid))])


def saliency_scores(sums: Sequence[int | float]) -> tuple[float, ...]:
    """(iou, max_f) of summed `saliency_sums`.

    Raises:
        ValueError: if a label was neither 0, 1 nor 255.
    """
    check_binary(int(sums[-4]), "saliency")
    num_images = sums[-1] - sums[-2]
    iou, precision, recall = np.array(sums[:-4]).reshape(-1, 3).T / num_images
    f = 2 * precision * recall / (precision + recall + _SALIENCY_EPSILON)
    return float(iou.max()), float(f.max())


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
    truth = wide(torch.where(valid, target, 0))
    guess = wide(torch.where(valid, pred, 0))
    # atan2 is exact for small angles, where acos of a rounded cosine is off by 0.02 degrees.
    sine = torch.linalg.vector_norm(torch.linalg.cross(guess, truth, dim=1), dim=1, keepdim=True)
    angle_deg = torch.rad2deg(torch.atan2(sine, (guess * truth).sum(dim=1, keepdim=True)))
    has_direction = (guess != 0).any(dim=1, keepdim=True)
    angle_deg = torch.where(valid, torch.where(has_direction, angle_deg, 90.0), 0.0)
    sums = [angle_deg.sum()]
    sums += [wide(((angle_deg < limit) & valid).sum()) for limit in _ANGLES_DEG]
    return torch.cat([torch.stack(sums), wide(common_counts(valid))])


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


def check_binary(num_wrong: int, what: str) -> None:
    """Refuse maps in which pixels are neither 0, 1 nor invalid.

    Raises:
        ValueError: if there are any.
    """
    if num_wrong:
        raise ValueError(
            f"{what} target: {num_wrong} pixels are neither 0, 1 nor {INVALID_LABEL} (invalid); "
            f"map the labels to 0 and 1"
        )


def _wrong_label(where: str, label: str, num_pixels: int, num_classes: int) -> str:
    return (
        f"{where}: label {label} in {num_pixels} pixels; expected 0..{num_classes - 1} for "
        f"{num_classes} classes, or {INVALID_LABEL} for invalid; set num_classes or remap labels"
    )


def common_counts(valid: Tensor) -> Tensor:
    """Valid pixels, frames without one, and frames: the last three sums of every metric."""
    has_valid = valid.flatten(start_dim=1).any(dim=1)
    counts = [valid.sum(), (~has_valid).sum(), torch.ones_like(has_valid).sum()]
    return torch.stack(counts)


def wide(values: Tensor) -> Tensor:
    """float64 where the device has it; Apple's GPUs have float32 alone."""
    return values.float() if values.device.type == "mps" else values.double()


def _check_one_shape(pred: Tensor, target: Tensor) -> None:
    if pred.shape != target.shape:
        raise ValueError(
            f"expected pred and target of one shape, "
            f"got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
