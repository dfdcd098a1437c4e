"""Losses of the dense tasks, as pure functions.

Invalid pixels are masked before any arithmetic, so that NaN, infinite or zero values under them
reach neither the loss nor a gradient. A batch without a valid pixel has loss 0 and zero gradients.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from oneshot_ednas.constants import constant

INVALID_LABEL = 255
"""Class index of pixels that take no part in loss or metric."""

_LOG_DEPTH_STEPS_PER_M = 512
_LOG_DEPTH_MAX = math.log(2**16)
# Taskonomy stores depth in 16 bits, in steps of 1/512 m.
_MIN_LENGTH = 1e-3
# Shorter predicted normals are scaled as if they had this length: bounds the gradient near 0.


def cross_entropy(
    logits: Float[Tensor, "batch classes height width"],
    target: Int64[Tensor, "batch height width"],
    *,
    ignore: int = INVALID_LABEL,
    class_weights: Sequence[float] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross entropy over the pixels that have a label, in nats.

    Args:
        logits: unnormalised class scores.
        target: class indices in 0..classes-1, or `ignore`.
        ignore: the label of pixels to leave out.
        class_weights: weight of a pixel by its class, 0 or more; the mean is over weights, so that
            their unit does not matter. None weighs all pixels alike.

    Returns:
        Scalar mean loss; 0 when no pixel has a label.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if logits.ndim != 4 or (logits.shape[0], *logits.shape[2:]) != tuple(target.shape):
        raise ValueError(
            f"expected logits [batch, classes, height, width] and target [batch, height, width], "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    valid = target != ignore
    # The softmax of a NaN logit has a NaN gradient even where the label is ignored.
    known = torch.where(valid.unsqueeze(1), logits, 0)
    if class_weights is None:
        per_pixel = F.cross_entropy(known, target, ignore_index=ignore, reduction="none")
        return per_pixel.sum() / label_weight(target, ignore=ignore).clamp_min(1)
    weights = constant(tuple(class_weights), known)
    # Summed here: on a GPU, its own sum has no order, and so no deterministic result.
    per_pixel = F.cross_entropy(known, target, weights, ignore_index=ignore, reduction="none")
    total = per_pixel.sum()
    weight = label_weight(target, ignore=ignore, class_weights=weights)
    return total / torch.where(weight > 0, weight, 1)


def label_weight(
    target: Int64[Tensor, "batch height width"],
    *,
    ignore: int = INVALID_LABEL,
    class_weights: Tensor | None = None,
) -> Tensor:
    """What `cross_entropy` divides by: the weights of the pixels that have a label, summed.

    Args:
        target: class indices in 0..classes-1, or `ignore`.
        ignore: the label of pixels to leave out.
        class_weights: weight of a pixel by its class; None is 1 for all.
    """
    valid = target != ignore
    if class_weights is None:
        return valid.sum()
    return torch.where(valid, class_weights[torch.where(valid, target, 0)], 0).sum()


def balanced_cross_entropy(
    logits: Float[Tensor, "batch 1 height width"],
    target: Int64[Tensor, "batch height width"],
    *,
    positive_weight: float | None = None,
    ignore: int = INVALID_LABEL,
) -> Float[Tensor, ""]:
    """Mean binary cross entropy with a weight for each class, over the pixels with a label.

    A positive pixel costs -w log p, a negative one -(1 - w) log(1 - p), in nats.

    Args:
        logits: of the probability that a pixel is positive.
        target: 1 for positive, 0 for negative, or `ignore`.
        positive_weight: w, between 0 and 1; None takes the share of negative pixels in the batch,
            so that both classes weigh the same. 0.5 is half the plain cross entropy.
        ignore: the label of pixels to leave out.

    Returns:
        Scalar mean loss; 0 when no pixel has a label.

    Raises:
        ValueError: if the shapes do not belong together.

    Source:
        Xie and Tu, Holistically-Nested Edge Detection, ICCV 2015, eq. 2
    """
    if logits.ndim != 4 or (logits.shape[0], 1, *target.shape[1:]) != tuple(logits.shape):
        raise ValueError(
            f"expected logits [batch, 1, height, width] and target [batch, height, width], "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    valid = target != ignore
    score = torch.where(valid, logits.squeeze(1), 0)
    is_positive = valid & (target == 1)
    num_valid = valid.sum().clamp_min(1)
    if positive_weight is None:
        weight: Tensor | float = 1 - is_positive.sum().to(score.dtype) / num_valid
    else:
        weight = positive_weight
    loss = torch.where(
        is_positive, -weight * F.logsigmoid(score), (weight - 1) * F.logsigmoid(-score)
    )
    return torch.where(valid, loss, 0).sum() / num_valid


def l1(
    pred: Float[Tensor, "batch 1 height width"],
    target: Float[Tensor, "batch 1 height width"],
    valid: Bool[Tensor, "batch 1 height width"],
) -> Float[Tensor, ""]:
    """Mean absolute error over valid pixels, in the unit of the target.

    Args:
        pred: predicted values.
        target: ground truth; any value, even NaN, where not `valid`.
        valid: True where the value is known.

    Returns:
        Scalar mean error; 0 when no pixel is valid.

    Raises:
        ValueError: if the three shapes differ.
    """
    return _mean(_absolute_error(pred, target, valid), valid)


def log_depth(depth_m: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 + 512 d) / log(2^16) of depths in metres: 0 at 0 m, 1 at 128 m.

    Source:
        Zamir et al., Taskonomy: Disentangling Task Transfer Learning, CVPR 2018 (its 16-bit depths)
    """
    return torch.log1p(depth_m * _LOG_DEPTH_STEPS_PER_M) / _LOG_DEPTH_MAX


def depth_of_log(log_depth: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Metres of `log_depth`, which is limited to 0..1 (0 to 128 m) first."""
    return torch.expm1(log_depth.clamp(0, 1) * _LOG_DEPTH_MAX) / _LOG_DEPTH_STEPS_PER_M


def log_depth_l1(
    pred: Float[Tensor, "batch 1 height width"],
    target: Float[Tensor, "batch 1 height width"],
    valid: Bool[Tensor, "batch 1 height width"],
) -> Float[Tensor, ""]:
    """Mean absolute error of `log_depth` over valid pixels.

    Args:
        pred: predicted `log_depth`.
        target: ground-truth depth, in metres; positive where `valid`, any value elsewhere.
        valid: True where the depth is known.

    Returns:
        Scalar mean error; 0 when no pixel is valid.

    Raises:
        ValueError: if the three shapes differ.
    """
    return l1(pred, log_depth(torch.where(valid, target, 0)), valid)


def soft_binary_cross_entropy(
    student: Float[Tensor, "batch 1 height width"],
    teacher: Float[Tensor, "batch 1 height width"],
) -> Float[Tensor, ""]:
    """Mean cross entropy of the student's probability of a positive under the teacher's, in nats.

    Args:
        student: logits that are trained.
        teacher: logits to imitate; pass them detached if they should get no gradient.

    Returns:
        Scalar mean over pixels; at its least (the teacher's entropy) where both agree.

    Raises:
        ValueError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"expected student and teacher logits of one shape, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    return F.binary_cross_entropy_with_logits(student, teacher.sigmoid())


def depth_l1(
    pred: Float[Tensor, "batch 1 height width"],
    target: Float[Tensor, "batch 1 height width"],
    valid: Bool[Tensor, "batch 1 height width"],
) -> Float[Tensor, ""]:
    """Mean absolute depth error over valid pixels, in metres.

    Args:
        pred: predicted depth, in metres.
        target: ground-truth depth, in metres; any value, even NaN, where not `valid`.
        valid: True where the depth is known.

    Returns:
        Scalar mean error; 0 when no pixel is valid.

    Raises:
        ValueError: if the three shapes differ.
    """
    return l1(pred, target, valid)


def depth_relative(
    pred: Float[Tensor, "batch 1 height width"],
    target: Float[Tensor, "batch 1 height width"],
    valid: Bool[Tensor, "batch 1 height width"],
) -> Float[Tensor, ""]:
    """Mean of |error| / depth over valid pixels, a fraction.

    Args:
        pred: predicted depth, in metres.
        target: ground-truth depth, in metres; positive where `valid`, any value elsewhere.
        valid: True where the depth is known.

    Returns:
        Scalar mean relative error; 0 when no pixel is valid.

    Raises:
        ValueError: if the three shapes differ.
    """
    error = _absolute_error(pred, target, valid)
    return _mean(error / torch.where(valid, target, 1), valid)


def jared(
    pred: Float[Tensor, "batch 1 height width"],
    target: Float[Tensor, "batch 1 height width"],
    valid: Bool[Tensor, "batch 1 height width"],
    relative_weight: float,
) -> Float[Tensor, ""]:
    """Joint absolute-relative depth loss: mean |error| + weight * mean(|error| / depth).

    Args:
        pred: predicted depth, in metres.
        target: ground-truth depth, in metres; positive where `valid`, any value elsewhere.
        valid: True where the depth is known.
        relative_weight: the paper's lambda, in metres; 0 gives `depth_l1`.

    Returns:
        Scalar loss; 0 when no pixel is valid.

    Raises:
        ValueError: if the three shapes differ.

    Source:
        Vu et al., Toward Edge-Efficient Dense Predictions with Synergistic Multi-Task Neural
        Architecture Search, WACV 2023, eq. 8, https://arxiv.org/abs/2210.01384
    """
    return depth_l1(pred, target, valid) + relative_weight * depth_relative(pred, target, valid)


def inverse_cosine_similarity(
    pred: Float[Tensor, "batch 3 height width"],
    target: Float[Tensor, "batch 3 height width"],
    valid: Bool[Tensor, "batch 1 height width"],
) -> Float[Tensor, ""]:
    """Mean of 1 - cos(angle between the vectors) over valid pixels, in 0..2.

    Args:
        pred: predicted normals, of any length; a zero vector counts as a right angle.
        target: ground-truth normals, of any length but 0 where `valid`; any value elsewhere.
        valid: True where the normal is known.

    Returns:
        Scalar mean; 0 when no pixel is valid.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if pred.shape != target.shape or (pred.shape[0], 1, *pred.shape[2:]) != tuple(valid.shape):
        raise ValueError(
            f"expected pred and target of one shape and valid with one channel, "
            f"got {tuple(pred.shape)}, {tuple(target.shape)} and {tuple(valid.shape)}"
        )
    guess, truth = torch.where(valid, pred, 0), torch.where(valid, target, 0)
    cosine = (guess * truth).sum(dim=1, keepdim=True)
    cosine = cosine * _inverse_length(guess) * _inverse_length(truth)
    return _mean(torch.where(valid, 1 - cosine, 0), valid)


def soft_cross_entropy(
    student: Float[Tensor, "batch classes height width"],
    teacher: Float[Tensor, "batch classes height width"],
) -> Float[Tensor, ""]:
    """Mean cross entropy of the student's class distribution under the teacher's, in nats.

    Args:
        student: logits that are trained.
        teacher: logits to imitate; pass them detached if they should get no gradient.

    Returns:
        Scalar mean over pixels; at its least (the teacher's entropy) where both agree.

    Raises:
        ValueError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"expected student and teacher logits of one shape, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    return -(teacher.softmax(dim=1) * student.log_softmax(dim=1)).sum(dim=1).mean()


def normalise(
    vectors: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """Vectors of unit length; those shorter than 0.001 stay shorter, so gradients stay finite."""
    return vectors * _inverse_length(vectors)


def _inverse_length(vectors: Tensor) -> Tensor:
    # Clamped before the root, whose gradient at 0 is not finite.
    return vectors.square().sum(dim=1, keepdim=True).clamp_min(_MIN_LENGTH**2).rsqrt()


def _absolute_error(pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    if not pred.shape == target.shape == valid.shape:
        raise ValueError(
            f"expected pred, target and valid of one shape, "
            f"got {tuple(pred.shape)}, {tuple(target.shape)} and {tuple(valid.shape)}"
        )
    # Two masks, not one over the difference: an infinite operand would leave a NaN gradient.
    return (torch.where(valid, pred, 0) - torch.where(valid, target, 0)).abs()


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    return values.sum() / valid.sum().clamp_min(1)
