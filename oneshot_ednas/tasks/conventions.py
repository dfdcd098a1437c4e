"""Metrics as other papers count them, for holding a result against their tables.

Numbers of two conventions are not comparable, nor are those of one convention over different batch
sizes where it averages batches: such a score moves with the batch size and with the order of
frames. Ours (`metrics`) pools all valid pixels of a split.

- `adashare`, of AdaShare and AutoMTL: mIoU leaves out each class without a correct pixel, which
  inflates it; pixel accuracy and depth errors are means over batches, weighted by frames; normals
  are compared as the bytes of their images, unshifted, in which a true right angle between two axes
  reads 34 degrees. On Cityscapes the pixel accuracy also counts pixels without a label as wrong:
  `adashare_cityscapes`.
- `mtan`: means over images of mIoU (over the classes that occur in either map) and of accuracy, and
  batch means of depth and normals errors, each averaged over batches, however small the last is.
- `astmt`: all pixels pooled, but each class that occurs nowhere counts as an IoU of 0; depth RMSE
  is a mean over images; human parts leave out images without a person. (BMTAS, which compares
  itself with it, leaves out such classes and keeps such images.)

What is not followed: predicted depths below 0 count as 0, as in all our metrics; a batch or an
image without a valid pixel is left out, where it makes the original's mean NaN; MTAN's rule that a
normal whose components sum to exactly 0 is invalid; ASTMT's depth of 1e-9 m in place of holes (its
depth maps have none) and its rounding of predictions to bytes on disk.

Source:
    Sun et al., AdaShare, NeurIPS 2020; Zhang et al., AutoMTL, NeurIPS 2022; Liu et al., End-to-End
    Multi-Task Learning with Attention, CVPR 2019; Maninis et al., Attentive Single-Tasking of
    Multiple Tasks, CVPR 2019; and the evaluation code that each has published
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from oneshot_ednas.tasks import metrics
from oneshot_ednas.tasks.losses import INVALID_LABEL
from oneshot_ednas.tasks.metrics import PooledMetrics, common_counts, wide

ADASHARE_DEPTH_METRICS = ("absolute_error", "relative_error", "delta_1", "delta_2", "delta_3")
MTAN_DEPTH_METRICS = ("absolute_error", "relative_error")
ASTMT_DEPTH_METRICS = ("rmse",)

_ANGLES_DEG = (11.25, 22.5, 30.0)
_MIN_ADASHARE_DEPTH = 3e-5


def adashare_segmentation(num_classes: int, *, count_invalid: bool = False) -> PooledMetrics:
    """`miou` over the classes with a correct pixel (0 if none has), `pixel_accuracy` over batches.

    Args:
        num_classes: number of classes.
        count_invalid: whether pixels without a label count as wrong.
    """
    return PooledMetrics(
        metrics.SEGMENTATION_METRICS,
        partial(_adashare_segmentation_sums, num_classes=num_classes, count_invalid=count_invalid),
        partial(_adashare_segmentation_scores, num_classes=num_classes),
    )


def adashare_depth() -> PooledMetrics:
    """Errors in metres and as fractions over batches; pooled `delta_k`, up to 1.25^k inclusive."""
    return PooledMetrics(ADASHARE_DEPTH_METRICS, _adashare_depth_sums, _adashare_depth_scores)


def adashare_disparity() -> PooledMetrics:
    """`adashare_depth` without ratios, in the unit of the disparities."""
    return PooledMetrics(
        metrics.DISPARITY_METRICS,
        _adashare_depth_sums,
        lambda sums: _adashare_depth_scores(sums)[:2],
    )


def adashare_log_depth() -> PooledMetrics:
    """`log_absolute_error` over batches."""
    return _over_batches(("log_absolute_error",), metrics.log_depth_sums, weigh_frames=True)


def adashare_heatmap() -> PooledMetrics:
    """`absolute_error` over batches."""
    return _over_batches(metrics.HEATMAP_METRICS, metrics.heatmap_sums, weigh_frames=True)


def adashare_normals() -> PooledMetrics:
    """Angles between byte vectors, in degrees, pooled; limits are inclusive.

    A normal (x right, y down, z forward) becomes the bytes 127.5 (1 + (x, z, -y)); those of truth
    are rounded. Pixels with a byte of 255 are invalid there, even the normal that is exactly x.
    """
    return PooledMetrics(metrics.NORMALS_METRICS, _adashare_normals_sums, metrics.normals_scores)


def mtan_segmentation(num_classes: int) -> PooledMetrics:
    """`miou` and `pixel_accuracy`, means over batches of means over images."""
    return PooledMetrics(
        metrics.SEGMENTATION_METRICS,
        partial(_mtan_segmentation_sums, num_classes=num_classes),
        partial(_mtan_segmentation_scores, num_classes=num_classes),
    )


def mtan_depth() -> PooledMetrics:
    """`absolute_error` and `relative_error`, means over batches."""
    return _over_batches(MTAN_DEPTH_METRICS, metrics.depth_sums, weigh_frames=False)


def mtan_normals() -> PooledMetrics:
    """The normals metrics, in true degrees, as means over batches."""
    return _over_batches(metrics.NORMALS_METRICS, metrics.normals_sums, weigh_frames=False)


def astmt_segmentation(num_classes: int) -> PooledMetrics:
    """`miou` over all classes, pooled; those that occur nowhere count as 0."""
    return PooledMetrics(
        ("miou",),
        lambda pred, target: metrics.segmentation_sums(pred, target, num_classes),
        partial(_astmt_scores, num_classes=num_classes),
    )


def astmt_human_parts(num_classes: int) -> PooledMetrics:
    """`astmt_segmentation` over the images that have more than background (class 0)."""
    return PooledMetrics(
        ("miou",),
        partial(_astmt_human_parts_sums, num_classes=num_classes),
        partial(_astmt_scores, num_classes=num_classes),
    )


def astmt_depth() -> PooledMetrics:
    """`rmse` in metres, a mean over images."""
    return PooledMetrics(ASTMT_DEPTH_METRICS, _astmt_depth_sums, _astmt_depth_scores)


def _over_batches(
    names: tuple[str, ...], sums: Callable[[Tensor, Tensor], Tensor], *, weigh_frames: bool
) -> PooledMetrics:
    """Means over batches of what `sums` has first, as one sum per name over the valid pixels."""
    return PooledMetrics(
        names,
        partial(_batch_means, sums=sums, num_names=len(names), weigh_frames=weigh_frames),
        _weighted_means,
    )


def _batch_means(
    pred: Tensor,
    target: Tensor,
    *,
    sums: Callable[[Tensor, Tensor], Tensor],
    num_names: int,
    weigh_frames: bool,
) -> Tensor:
    found = sums(pred, target)
    num_valid, weight = found[-3], _weight(found[-3] > 0, len(target), weigh_frames=weigh_frames)
    means = found[:num_names] / num_valid.clamp_min(1)
    return torch.cat([means * weight, weight[None], found[-3:]])


def _weighted_means(sums: Sequence[int | float]) -> tuple[float, ...]:
    *totals, weight, _, _, _ = sums
    return tuple(total / weight for total in totals)


def _weight(has_valid: Tensor, num_frames: int, *, weigh_frames: bool) -> Tensor:
    """Weight of a batch in the mean; 0 where it has nothing valid."""
    return wide(has_valid) * (num_frames if weigh_frames else 1)


def _adashare_segmentation_sums(
    pred: Tensor, target: Tensor, *, num_classes: int, count_invalid: bool
) -> Tensor:
    counts = metrics.segmentation_sums(pred, target, num_classes)
    num_pixels = torch.ones_like(target).sum() if count_invalid else counts[-3]
    correct = ((pred == target) & (target != INVALID_LABEL)).sum()
    weight = _weight(counts[-3] > 0, len(target), weigh_frames=True)
    accuracy = wide(correct) / num_pixels.clamp_min(1) * weight
    return torch.cat([torch.stack([accuracy, weight]), wide(counts)])


def _adashare_segmentation_scores(
    sums: Sequence[int | float], *, num_classes: int
) -> tuple[float, ...]:
    confusion = metrics.confusion_matrix(sums[2:], num_classes)
    correct = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - correct
    iou = correct[correct > 0] / union[correct > 0]
    return float(iou.mean()) if iou.size else 0.0, sums[0] / sums[1]


def _adashare_depth_sums(pred: Tensor, target: Tensor) -> Tensor:
    known = torch.where(target > _MIN_ADASHARE_DEPTH, target, 0)
    valid = metrics.valid_depth(known)
    truth, guess = (wide(torch.where(valid, depth, 1)) for depth in (known, pred))
    ratio = torch.maximum(guess / truth, truth / guess)
    means = _batch_means(pred, known, sums=metrics.depth_sums, num_names=2, weigh_frames=True)
    within = torch.stack([wide(((ratio <= 1.25**k) & valid).sum()) for k in (1, 2, 3)])
    return torch.cat([within, means])


def _adashare_depth_scores(sums: Sequence[int | float]) -> tuple[float, ...]:
    *within, absolute, relative, weight, num_valid, _, _ = sums
    return absolute / weight, relative / weight, *(count / num_valid for count in within)


def _adashare_normals_sums(pred: Tensor, target: Tensor) -> Tensor:
    valid = metrics.valid_normals(target)
    truth = _bytes(wide(torch.where(valid, target, 0))).round()
    guess = _bytes(wide(torch.where(valid, pred, 0)))
    valid = valid & (truth.amax(dim=1, keepdim=True) < 255)
    cosine = torch.nn.functional.cosine_similarity(guess, truth, dim=1).unsqueeze(1)
    angle_deg = torch.where(valid, torch.rad2deg(torch.acos(cosine.clamp(-1, 1))), 0)
    sums = [angle_deg.sum()]
    sums += [wide(((angle_deg <= limit) & valid).sum()) for limit in _ANGLES_DEG]
    return torch.cat([torch.stack(sums), wide(common_counts(valid))])


def _bytes(normals: Tensor) -> Tensor:
    x, y, z = normals.unbind(dim=1)
    return 127.5 * (1 + torch.stack([x, z, -y], dim=1))


def _mtan_segmentation_sums(pred: Tensor, target: Tensor, *, num_classes: int) -> Tensor:
    counts = metrics.segmentation_sums(pred, target, num_classes)
    valid = target != INVALID_LABEL
    num_valid = wide(valid.flatten(start_dim=1).sum(dim=1))
    total = torch.zeros_like(num_valid)
    num_present, num_correct = torch.zeros_like(total), torch.zeros_like(total)
    for index in range(num_classes):
        is_found, is_true = (pred == index) & valid, (target == index) & valid
        both = wide((is_found & is_true).flatten(start_dim=1).sum(dim=1))
        union = wide((is_found | is_true).flatten(start_dim=1).sum(dim=1))
        total += both / union.clamp_min(1)
        num_present += union > 0
        num_correct += both
    has_valid = num_valid > 0
    num_images = wide(has_valid).sum().clamp_min(1)
    miou = (total / num_present.clamp_min(1)).sum() / num_images
    accuracy = (num_correct / num_valid.clamp_min(1)).sum() / num_images
    weight = _weight(has_valid.any(), len(target), weigh_frames=False)
    return torch.cat([torch.stack([miou * weight, accuracy * weight, weight]), wide(counts)])


def _mtan_segmentation_scores(
    sums: Sequence[int | float], *, num_classes: int
) -> tuple[float, ...]:
    metrics.confusion_matrix(sums[3:], num_classes)  # refuses what is out of range
    return sums[0] / sums[2], sums[1] / sums[2]


def _astmt_human_parts_sums(pred: Tensor, target: Tensor, *, num_classes: int) -> Tensor:
    is_empty = (target == 0).flatten(start_dim=1).all(dim=1)
    known = torch.where(is_empty[:, None, None], INVALID_LABEL, target)
    return metrics.segmentation_sums(pred, known, num_classes)


def _astmt_scores(sums: Sequence[int | float], *, num_classes: int) -> tuple[float, ...]:
    confusion = metrics.confusion_matrix(sums, num_classes)
    correct = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - correct
    return (float((correct / np.maximum(union, 1)).mean()),)


def _astmt_depth_sums(pred: Tensor, target: Tensor) -> Tensor:
    valid = metrics.valid_depth(target)
    truth, guess = (wide(torch.where(valid, depth, 0)) for depth in (target, pred))
    square = (guess - truth).square().flatten(start_dim=1).sum(dim=1)
    num_valid = wide(valid.flatten(start_dim=1).sum(dim=1))
    rmse = (square / num_valid.clamp_min(1)).sqrt().sum()
    return torch.cat([rmse[None], wide(common_counts(valid))])


def _astmt_depth_scores(sums: Sequence[int | float]) -> tuple[float, ...]:
    rmse, _, num_invalid_frames, num_frames = sums
    return (rmse / (num_frames - num_invalid_frames),)
