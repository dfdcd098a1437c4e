"""Losses against NumPy, their gradients, and what invalid pixels may not do."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oneshot_ednas.tasks.losses import (
    balanced_cross_entropy,
    cross_entropy,
    depth_l1,
    depth_of_log,
    depth_relative,
    inverse_cosine_similarity,
    jared,
    l1,
    log_depth,
    log_depth_l1,
    normalise,
    soft_binary_cross_entropy,
    soft_cross_entropy,
)

BAD_VALUES = (math.nan, math.inf, -math.inf, 0.0)


def masked_losses(pred: Tensor, target: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Every loss that takes a `valid` map, on a depth or a normals batch."""
    if pred.shape[1] == 3:
        return {"normals": inverse_cosine_similarity(pred, target, valid)}
    return {
        "l1": depth_l1(pred, target, valid),
        "plain": l1(pred, target, valid),
        "log": log_depth_l1(pred, target, valid),
        "relative": depth_relative(pred, target, valid),
        "jared": jared(pred, target, valid, 0.3),
    }


def depth_batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred = torch.rand(2, 1, 4, 5, generator=generator, dtype=dtype) * 5
    target = torch.rand(2, 1, 4, 5, generator=generator, dtype=dtype) * 5 + 0.5
    return pred, target, torch.rand(2, 1, 4, 5, generator=generator) < 0.7


def normals_batch(
    seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randn(2, 3, 4, 5, generator=generator, dtype=dtype)
    target = torch.randn(2, 3, 4, 5, generator=generator, dtype=dtype)
    return pred, target, torch.rand(2, 1, 4, 5, generator=generator) < 0.7


def label_batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 6, 4, 5, generator=generator, dtype=dtype)
    target = torch.randint(0, 6, (2, 4, 5), generator=generator)
    target[0, :2] = 255
    return logits, target


def binary_batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits, target = label_batch(seed, dtype)
    return 3 * logits[:, :1], torch.where(target == 255, 255, (target < 2).long())


@pytest.fixture
def _without_shape_checks() -> Iterator[None]:
    """Runs as a user's program does: without the run-time shape checks of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_cross_entropy_equals_numpy() -> None:
    logits, target = label_batch()
    x, t = logits.numpy().astype(np.float64), target.numpy()
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    picked = [-log_p[b, t[b, i, j], i, j] for b, i, j in np.ndindex(t.shape) if t[b, i, j] != 255]
    assert cross_entropy(logits, target).item() == pytest.approx(np.mean(picked), rel=1e-6)


def test_class_weights_make_a_weighted_mean() -> None:
    logits, target = label_batch()
    x, t = logits.numpy().astype(np.float64), target.numpy()
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    weights = np.array([0.0, 0.5, 1.0, 2.0, 3.0, 0.1])
    places = [(b, i, j) for b, i, j in np.ndindex(t.shape) if t[b, i, j] != 255]
    costs = [-log_p[b, t[b, i, j], i, j] for b, i, j in places]
    expected = np.average(costs, weights=[weights[t[place]] for place in places])
    found = cross_entropy(logits, target, class_weights=weights.tolist())
    assert found.item() == pytest.approx(expected, rel=1e-6)
    scaled = cross_entropy(logits, target, class_weights=(7 * weights).tolist())
    torch.testing.assert_close(scaled, found)
    alike = cross_entropy(logits, target, class_weights=[4.0] * 6)
    torch.testing.assert_close(alike, cross_entropy(logits, target))


@pytest.mark.parametrize("weight", [None, 0.95, 0.5])
def test_balanced_cross_entropy_equals_numpy(weight: float | None) -> None:
    logits, target = binary_batch()
    known = target.numpy() != 255
    x, t = logits.numpy()[:, 0][known].astype(np.float64), target.numpy()[known]
    p = 1 / (1 + np.exp(-x))
    w = (t == 0).mean() if weight is None else weight
    expected = np.where(t == 1, -w * np.log(p), -(1 - w) * np.log(1 - p)).mean()
    found = balanced_cross_entropy(logits, target, positive_weight=weight)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    if weight == 0.5:
        plain = torch.nn.functional.binary_cross_entropy_with_logits(
            logits[:, 0][target != 255], target[target != 255].float()
        )
        torch.testing.assert_close(2 * found, plain)


def test_balanced_classes_weigh_the_same() -> None:
    # One positive among 100: a constant guess of one half is stationary only if they balance.
    logits = torch.zeros(1, 1, 10, 10, requires_grad=True)
    target = torch.zeros(1, 10, 10, dtype=torch.int64)
    target[0, 3, 3] = 1
    (gradient,) = torch.autograd.grad(balanced_cross_entropy(logits, target), logits)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-7)
    assert gradient[0, 0, 3, 3] < 0
    alone = balanced_cross_entropy(logits, torch.ones_like(target))
    assert alone.item() == 0


def test_log_depth_is_taskonomys() -> None:
    metres = torch.tensor([0.0, 1 / 512, 1.0, 65535 / 512], dtype=torch.float64)
    expected = np.log(1 + np.array([0, 1, 512, 65535])) / np.log(2**16)
    np.testing.assert_allclose(log_depth(metres).numpy(), expected)
    torch.testing.assert_close(depth_of_log(log_depth(metres)), metres)
    beyond = depth_of_log(torch.tensor([-3.0, 50.0], dtype=torch.float64))
    assert beyond.tolist() == pytest.approx([0, 65535 / 512])
    pred, target, valid = depth_batch()
    p, t = pred.numpy()[valid.numpy()], target.numpy()[valid.numpy()]
    expected = np.abs(p - np.log(1 + 512 * t) / np.log(2**16)).mean()
    assert log_depth_l1(pred, target, valid).item() == pytest.approx(expected, rel=1e-6)


def test_soft_binary_cross_entropy_is_that_of_two_classes() -> None:
    student, teacher = binary_batch(0)[0], binary_batch(1)[0]
    pair = [torch.cat([torch.zeros_like(x), x], dim=1) for x in (student, teacher)]
    torch.testing.assert_close(
        soft_binary_cross_entropy(student, teacher), soft_cross_entropy(*pair)
    )


def test_depth_losses_equal_numpy() -> None:
    pred, target, valid = depth_batch()
    p, t = pred.numpy()[valid.numpy()], target.numpy()[valid.numpy()]
    l1, relative = np.abs(p - t).mean(), (np.abs(p - t) / t).mean()
    assert depth_l1(pred, target, valid).item() == pytest.approx(l1, rel=1e-6)
    assert depth_relative(pred, target, valid).item() == pytest.approx(relative, rel=1e-6)
    expected = l1 + 0.05 * relative
    assert jared(pred, target, valid, 0.05).item() == pytest.approx(expected, rel=1e-6)


def test_jared_by_hand() -> None:
    pred = torch.tensor([[[[3.0, 2.0, 9.0]]]])
    target = torch.tensor([[[[2.0, 4.0, 0.0]]]])
    valid = torch.tensor([[[[True, True, False]]]])
    # |e| = 1, 2; |e| / y = 0.5, 0.5
    assert jared(pred, target, valid, 2.0).item() == pytest.approx(1.5 + 2.0 * 0.5)


def test_inverse_cosine_similarity_equals_numpy() -> None:
    pred, target, valid = normals_batch()
    p, t = pred.numpy(), target.numpy()
    cosine = (p * t).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(t, axis=1)
    expected = (1 - cosine)[valid.numpy()[:, 0]].mean()
    assert inverse_cosine_similarity(pred, target, valid).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_soft_cross_entropy_equals_numpy() -> None:
    student, teacher = label_batch(0)[0], label_batch(1)[0]
    s, t = student.numpy().astype(np.float64), teacher.numpy().astype(np.float64)
    log_s = s - np.log(np.exp(s).sum(axis=1, keepdims=True))
    p = np.exp(t) / np.exp(t).sum(axis=1, keepdims=True)
    expected = -(p * log_s).sum(axis=1).mean()
    assert soft_cross_entropy(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_soft_cross_entropy_has_no_gradient_at_the_teacher() -> None:
    teacher = label_batch()[0].double()
    student = teacher.clone().requires_grad_()
    soft_cross_entropy(student, teacher).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(teacher), atol=1e-12, rtol=0)


def test_cross_entropy_ignores_another_label_on_request() -> None:
    logits, target = label_batch()
    renamed = torch.where(target == 255, 3, target)
    kept = torch.where(target == 3, 255, target)
    kept_without_3 = cross_entropy(logits, torch.where(renamed == 3, 255, renamed))
    assert cross_entropy(logits, renamed, ignore=3).item() == pytest.approx(kept_without_3.item())
    assert cross_entropy(logits, kept).item() == pytest.approx(kept_without_3.item())


@pytest.mark.parametrize("batch", [depth_batch, normals_batch])
def test_gradients_of_masked_losses_agree_with_finite_differences(
    batch: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    pred, target, valid = batch(dtype=torch.float64)
    pred.requires_grad_()
    for name in masked_losses(pred, target, valid):
        assert torch.autograd.gradcheck(
            lambda p, name=name: masked_losses(p, target, valid)[name], (pred,)
        )


def test_gradients_of_cross_entropies_agree_with_finite_differences() -> None:
    logits, target = label_batch(dtype=torch.float64)
    teacher = label_batch(1, torch.float64)[0]
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, target), (logits,))
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, teacher), (logits,))
    weights = [0.0, 0.5, 1.0, 2.0, 3.0, 0.1]
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, target, class_weights=weights), (logits,)
    )
    score, is_positive = binary_batch(dtype=torch.float64)
    score.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: balanced_cross_entropy(x, is_positive), (score,))
    guide = binary_batch(1, torch.float64)[0]
    assert torch.autograd.gradcheck(lambda x: soft_binary_cross_entropy(x, guide), (score,))


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize("batch", [depth_batch, normals_batch])
def test_invalid_pixels_change_neither_loss_nor_gradient(
    batch: Callable[..., tuple[Tensor, Tensor, Tensor]], bad: float
) -> None:
    pred, target, valid = batch()
    spoiled_pred = torch.where(valid, pred, bad).requires_grad_()
    spoiled_target = torch.where(valid, target, bad)
    clean_pred = pred.clone().requires_grad_()
    clean = masked_losses(clean_pred, target, valid)
    spoiled = masked_losses(spoiled_pred, spoiled_target, valid)
    for name, loss in spoiled.items():
        torch.testing.assert_close(loss, clean[name])
        (gradient,) = torch.autograd.grad(loss, spoiled_pred, retain_graph=True)
        (expected,) = torch.autograd.grad(clean[name], clean_pred, retain_graph=True)
        torch.testing.assert_close(gradient, expected)
        assert (gradient[~valid.expand_as(gradient)] == 0).all()
        assert (gradient[valid.expand_as(gradient)] != 0).any()


LABEL_LOSSES = [
    (cross_entropy, label_batch),
    (partial(cross_entropy, class_weights=[0.0, 0.5, 1.0, 2.0, 3.0, 0.1]), label_batch),
    (balanced_cross_entropy, binary_batch),
    (partial(balanced_cross_entropy, positive_weight=0.95), binary_batch),
]


@pytest.mark.parametrize("bad", BAD_VALUES)
@pytest.mark.parametrize(("loss_of", "batch"), LABEL_LOSSES)
def test_ignored_pixels_give_no_gradient_even_when_the_logit_is_bad(
    loss_of: Callable[..., Tensor], batch: Callable[[], tuple[Tensor, Tensor]], bad: float
) -> None:
    logits, target = batch()
    ignored = (target == 255).unsqueeze(1).expand_as(logits)
    spoiled = torch.where(ignored, bad, logits).requires_grad_()
    loss = loss_of(spoiled, target)
    loss.backward()
    assert loss.item() == pytest.approx(loss_of(logits, target).item())
    assert spoiled.grad is not None
    assert (spoiled.grad[ignored] == 0).all()
    assert torch.isfinite(spoiled.grad).all()
    assert (spoiled.grad != 0).any()


@pytest.mark.parametrize(("loss_of", "batch"), LABEL_LOSSES)
def test_label_losses_are_zero_with_zero_gradients_where_nothing_is_valid(
    loss_of: Callable[..., Tensor], batch: Callable[[], tuple[Tensor, Tensor]]
) -> None:
    logits, target = batch()
    logits.requires_grad_()
    loss = loss_of(logits, torch.full_like(target, 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_losses_are_zero_with_zero_gradients_where_nothing_is_valid() -> None:
    for pred, target, valid in (depth_batch(), normals_batch()):
        pred.requires_grad_()
        for loss in masked_losses(pred, target, torch.zeros_like(valid)).values():
            assert loss.item() == 0
            (gradient,) = torch.autograd.grad(loss, pred, retain_graph=True)
            assert (gradient == 0).all()


def test_a_zero_vector_is_a_right_angle_with_a_finite_gradient() -> None:
    pred = torch.zeros(1, 3, 1, 1, requires_grad=True)
    target = torch.tensor([0.0, 0.0, -1.0]).view(1, 3, 1, 1)
    loss = inverse_cosine_similarity(pred, target, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 1
    assert pred.grad is not None
    assert torch.isfinite(pred.grad).all()
    assert pred.grad.abs().max() <= 1001
    assert pred.grad[0, 2, 0, 0] > 0


@settings(deadline=None, derandomize=True, max_examples=50)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 10), weight=st.floats(0, 3))
def test_laws_of_the_depth_losses(seed: int, scale: float, weight: float) -> None:
    pred, target, valid = (x if x.dtype == torch.bool else x.double() for x in depth_batch(seed))
    l1, relative = depth_l1(pred, target, valid), depth_relative(pred, target, valid)
    torch.testing.assert_close(jared(pred, target, valid, weight), l1 + weight * relative)
    torch.testing.assert_close(depth_l1(pred * scale, target * scale, valid), l1 * scale)
    torch.testing.assert_close(depth_relative(pred * scale, target * scale, valid), relative)
    assert jared(target, target, valid, weight).item() == 0


@settings(deadline=None, derandomize=True, max_examples=50)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 10))
def test_laws_of_the_normals_loss(seed: int, scale: float) -> None:
    pred, target, valid = (x if x.dtype == torch.bool else x.double() for x in normals_batch(seed))
    loss = inverse_cosine_similarity(pred, target, valid)
    assert 0 <= loss.item() <= 2
    torch.testing.assert_close(inverse_cosine_similarity(pred * scale, target, valid), loss)
    opposite = inverse_cosine_similarity(-pred, target, valid)
    torch.testing.assert_close(loss + opposite, torch.full_like(loss, 2.0 * float(valid.any())))


def test_normalised_vectors_have_unit_length() -> None:
    length = torch.linalg.vector_norm(normalise(normals_batch()[0]), dim=1)
    torch.testing.assert_close(length, torch.ones_like(length))


@pytest.mark.usefixtures("_without_shape_checks")
def test_shapes_that_do_not_belong_together_are_refused() -> None:
    pred, target, valid = depth_batch()
    # Each of these would broadcast silently.
    for wrong in (
        (pred[:1], target, valid),
        (pred, target[..., :1], valid),
        (pred, target, valid[:1]),
    ):
        for loss in (depth_l1, depth_relative, partial(jared, relative_weight=0.1)):
            with pytest.raises(
                ValueError, match="expected pred, target and valid of one shape, got"
            ):
                loss(*wrong)
    vectors, goal, known = normals_batch()
    for wrong in ((vectors[:1], goal, known), (vectors, goal, known[..., :1])):
        with pytest.raises(ValueError, match="valid with one channel, got"):
            inverse_cosine_similarity(*wrong)
    logits, labels = label_batch()
    with pytest.raises(ValueError, match=r"expected logits \[batch, classes, height, width\]"):
        cross_entropy(logits, labels[:, :2])
    for loss in (soft_cross_entropy, soft_binary_cross_entropy):
        with pytest.raises(ValueError, match="student and teacher logits of one shape"):
            loss(logits, logits[:1])
    with pytest.raises(ValueError, match=r"expected logits \[batch, 1, height, width\] and target"):
        balanced_cross_entropy(logits, labels)
