"""Metrics against NumPy and torchmetrics, over batches and whole splits."""

import math
from collections.abc import Callable, Iterator

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oneshot_ednas.tasks.metrics import (
    PooledMetrics,
    check_labels,
    depth_metrics,
    disparity_metrics,
    heatmap_metrics,
    log_depth_metrics,
    normals_metrics,
    saliency_metrics,
    segmentation_metrics,
)

NUM_CLASSES = 6


def label_maps(seed: int = 0, frames: int = 4) -> tuple[Tensor, Tensor]:
    """Class 4 never occurs in the truth, class 5 never in the prediction; frame 0 is invalid."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, NUM_CLASSES, (frames, 7, 5), generator=generator)
    target = torch.where(target == 4, 5, target)
    noise = torch.randint(0, NUM_CLASSES - 1, target.shape, generator=generator)
    is_wrong = torch.rand(target.shape, generator=generator) < 0.4
    pred = torch.where(is_wrong | (target == 5), noise, target)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    target[0] = 255
    return pred, target


def depth_maps(seed: int = 0, frames: int = 4) -> tuple[Tensor, Tensor]:
    """Depths with every kind of invalid value; frame 0 is invalid; some predictions negative."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(frames, 1, 7, 5, generator=generator) * 9 + 0.5
    pred = target * (1 + 0.5 * torch.randn(target.shape, generator=generator))
    for bad in (0.0, math.nan, math.inf, -1.0):
        target[torch.rand(target.shape, generator=generator) < 0.05] = bad
    target[0] = 0
    return pred, target


def normal_maps(seed: int = 0, frames: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.nn.functional.normalize(torch.randn(frames, 3, 7, 5, generator=generator), dim=1)
    pred = target + 0.4 * torch.randn(target.shape, generator=generator)
    is_invalid = (torch.rand(frames, 1, 7, 5, generator=generator) < 0.2).expand_as(target)
    target = torch.where(is_invalid, 0, target)
    target[0], target[1, :, 0, 0] = 0, math.nan
    return pred, target


def saliency_maps(seed: int = 0, frames: int = 4) -> tuple[Tensor, Tensor]:
    """Frame 0 is invalid; the last frame has nothing salient."""
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(frames, 7, 5, generator=generator) < 0.4).long()
    target[-1] = 0
    noise = torch.rand(target.shape, generator=generator)
    pred = 0.6 * target + 0.4 * noise + 0.3 * noise * (1 - target)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    target[0] = 255
    return pred, target


def heat_maps(seed: int = 0, frames: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(frames, 1, 7, 5, generator=generator)
    pred = target + torch.randn(target.shape, generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = math.nan
    target[0] = math.inf
    return pred, target


CASES = [
    (lambda: segmentation_metrics(NUM_CLASSES), label_maps),
    (depth_metrics, depth_maps),
    (normals_metrics, normal_maps),
    (lambda: segmentation_metrics(NUM_CLASSES, num_names=1), label_maps),
    (saliency_metrics, saliency_maps),
    (disparity_metrics, depth_maps),
    (heatmap_metrics, heat_maps),
    (log_depth_metrics, lambda *a, **k: (depth_maps(*a, **k)[0].abs(), depth_maps(*a, **k)[1])),
]


@pytest.fixture
def _without_shape_checks() -> Iterator[None]:
    """Runs as a user's program does: without the run-time shape checks of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def scores(metrics: PooledMetrics, pred: Tensor, target: Tensor) -> dict[str, float]:
    metrics.update(pred, target)
    return metrics.compute()


def test_segmentation_metrics_equal_numpy() -> None:
    pred, target = label_maps()
    p, t = pred.numpy()[target.numpy() != 255], target.numpy()[target.numpy() != 255]
    iou = [((p == c) & (t == c)).sum() / ((p == c) | (t == c)).sum() for c in np.unique(t)]
    found = scores(segmentation_metrics(NUM_CLASSES), pred, target)
    assert found == pytest.approx({"miou": np.mean(iou), "pixel_accuracy": (p == t).mean()})
    assert len(iou) == 5
    assert min(iou) == 0


def test_segmentation_metrics_equal_torchmetrics() -> None:
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    pred, target = label_maps()
    found = scores(segmentation_metrics(NUM_CLASSES), pred, target)
    jaccard = MulticlassJaccardIndex(NUM_CLASSES, average="none", ignore_index=255)
    present = target[target != 255].unique()
    assert found["miou"] == pytest.approx(jaccard(pred, target)[present].mean().item())
    accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro", ignore_index=255)
    assert found["pixel_accuracy"] == pytest.approx(accuracy(pred, target).item())


def test_segmentation_metrics_by_hand() -> None:
    target = torch.tensor([[[0, 0, 1, 1, 255]]])
    pred = torch.tensor([[[0, 1, 1, 2, 0]]])
    # class 0: 1 of 2; class 1: 1 of 3; class 2 is not in the truth
    expected = {"miou": (1 / 2 + 1 / 3) / 2, "pixel_accuracy": 0.5}
    assert scores(segmentation_metrics(3), pred, target) == pytest.approx(expected)


def test_depth_metrics_equal_numpy() -> None:
    pred, target = depth_maps()
    t = target.numpy().astype(np.float64)
    valid = np.isfinite(t) & (t > 0)
    p, t = pred.numpy().astype(np.float64)[valid], t[valid]
    ratio = np.where(p > 0, np.maximum(p / t, t / np.where(p > 0, p, 1)), np.inf)
    expected = {
        "absolute_error": np.abs(p - t).mean(),
        "relative_error": (np.abs(p - t) / t).mean(),
        "rmse": np.sqrt(((p - t) ** 2).mean()),
        **{f"delta_{k}": (ratio < 1.25**k).mean() for k in (1, 2, 3)},
    }
    assert (p <= 0).any()
    assert scores(depth_metrics(), pred, target) == pytest.approx(expected)


def test_depth_metrics_equal_torchmetrics() -> None:
    from torchmetrics.regression import (
        MeanAbsoluteError,
        MeanAbsolutePercentageError,
        MeanSquaredError,
    )

    pred, target = depth_maps()
    valid = torch.isfinite(target) & (target > 0)
    p, t = pred[valid], target[valid]
    found = scores(depth_metrics(), pred, target)
    assert found["absolute_error"] == pytest.approx(MeanAbsoluteError()(p, t).item())
    assert found["relative_error"] == pytest.approx(MeanAbsolutePercentageError()(p, t).item())
    assert found["rmse"] == pytest.approx(MeanSquaredError(squared=False)(p, t).item())


def test_log_depth_and_disparity_metrics_equal_numpy() -> None:
    pred, target = depth_maps()
    pred = pred.abs()
    t = target.numpy().astype(np.float64)
    valid = np.isfinite(t) & (t > 0)
    p, t = pred.numpy().astype(np.float64)[valid], t[valid]
    unit = [np.log(1 + 512 * metres) / np.log(2**16) for metres in (p, t)]
    expected = {"log_absolute_error": np.abs(unit[0] - unit[1]).mean()}
    metres = scores(depth_metrics(), pred, target)
    assert scores(log_depth_metrics(), pred, target) == pytest.approx(expected | metres)
    found = scores(disparity_metrics(), pred, target)
    assert found == {name: metres[name] for name in ("absolute_error", "relative_error")}


def test_heatmap_metrics_equal_numpy() -> None:
    pred, target = heat_maps()
    t = target.numpy().astype(np.float64)
    error = np.abs(pred.numpy().astype(np.float64) - t)[np.isfinite(t)].mean()
    assert scores(heatmap_metrics(), pred, target) == pytest.approx({"absolute_error": error})


def test_saliency_metrics_equal_numpy() -> None:
    pred, target = saliency_maps(frames=6)
    iou, precision, recall = np.zeros((3, 15, 5))
    for j, threshold in enumerate(np.linspace(0.2, 0.9, 15)):
        for i in range(1, 6):  # frame 0 is invalid
            known = target[i].numpy() != 255
            found, salient = pred[i].numpy()[known] > threshold, target[i].numpy()[known] == 1
            both, either = (found & salient).sum(), (found | salient).sum()
            iou[j, i - 1] = both / either if either else 1
            precision[j, i - 1] = both / max(found.sum(), 1)
            recall[j, i - 1] = both / max(salient.sum(), 1)
    p, r = precision.mean(axis=1), recall.mean(axis=1)
    expected = {"iou": iou.mean(axis=1).max(), "max_f": (2 * p * r / (p + r + 1e-12)).max()}
    assert scores(saliency_metrics(), pred, target) == pytest.approx(expected)
    assert (iou == 1).any()
    assert iou.mean(axis=1).argmax() not in (0, 14)


def test_labels_that_are_neither_salient_nor_not_are_refused() -> None:
    pred, target = saliency_maps()
    target[1, 0, :2] = 2
    with pytest.raises(ValueError, match="saliency target: 2 pixels are neither 0, 1 nor 255"):
        scores(saliency_metrics(), pred, target)


@pytest.mark.parametrize("prediction", [0.0, -3.0])
def test_a_depth_at_or_below_zero_is_within_no_ratio(prediction: float) -> None:
    target = torch.full((1, 1, 2, 2), 3.0)
    found = scores(depth_metrics(), torch.full_like(target, prediction), target)
    assert found["delta_3"] == 0
    assert found["absolute_error"] == 3 - prediction


def test_normals_metrics_equal_numpy() -> None:
    pred, target = normal_maps()
    t = np.moveaxis(target.numpy().astype(np.float64), 1, -1)
    p = np.moveaxis(pred.numpy().astype(np.float64), 1, -1)
    valid = np.isfinite(t).all(-1) & (t != 0).any(-1)
    cosine = (p * t).sum(-1)[valid] / np.linalg.norm(p, axis=-1)[valid]
    cosine /= np.linalg.norm(t, axis=-1)[valid]
    angle = np.rad2deg(np.arccos(cosine.clip(-1, 1)))
    expected = {
        "mean_angle_deg": angle.mean(),
        "within_11": (angle < 11.25).mean(),
        "within_22": (angle < 22.5).mean(),
        "within_30": (angle < 30).mean(),
    }
    assert 0 < expected["within_11"] < expected["within_22"] < expected["within_30"] < 1
    assert scores(normals_metrics(), pred, target) == pytest.approx(expected)


@pytest.mark.parametrize("angle_deg", [0.0, 0.01, 11.24, 11.26, 29.9, 90.0, 179.99, 180.0])
def test_known_angles_are_measured_exactly(angle_deg: float) -> None:
    angle = math.radians(angle_deg)
    target = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64).view(1, 3, 1, 1)
    pred = torch.tensor([math.sin(angle), 0.0, -math.cos(angle)], dtype=torch.float64)
    found = scores(normals_metrics(), 7 * pred.view(1, 3, 1, 1), target)
    assert found["mean_angle_deg"] == pytest.approx(angle_deg, abs=1e-9)
    assert found["within_11"] == float(angle_deg < 11.25)
    assert found["within_30"] == float(angle_deg < 30)


def test_a_zero_normal_counts_as_a_right_angle() -> None:
    target = torch.tensor([0.0, 0.0, -1.0]).view(1, 3, 1, 1)
    found = scores(normals_metrics(), torch.zeros_like(target), target)
    assert found["mean_angle_deg"] == 90
    assert found["within_30"] == 0


@settings(deadline=None, derandomize=True, max_examples=20)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 6))
def test_any_batches_give_the_scores_of_the_whole_split(seed: int, cut: int) -> None:
    for new_metrics, maps in CASES:
        pred, target = maps(seed, frames=7)
        parts = new_metrics()
        for start in range(0, 7, cut):
            parts.update(pred[start : start + cut], target[start : start + cut])
        whole = new_metrics()
        assert parts.compute() == pytest.approx(scores(whole, pred, target), rel=1e-12)
        assert parts.num_invalid_frames == whole.num_invalid_frames >= 1


@pytest.mark.parametrize(("new_metrics", "maps"), CASES)
def test_scores_do_not_depend_on_predictions_under_invalid_pixels(
    new_metrics: Callable[[], PooledMetrics], maps: Callable[[], tuple[Tensor, Tensor]]
) -> None:
    pred, target = maps()
    known = target if target.ndim == 3 else target[:, :1]
    is_depth = target.ndim == 4 and maps is not heat_maps
    is_invalid = (known == 255) | ~torch.isfinite(known) | ((known <= 0) & is_depth)
    if pred.shape[1] == 3:
        is_invalid = ~(torch.isfinite(target).all(1, True) & (target != 0).any(1, True))
    bad = 0 if pred.dtype == torch.int64 else math.nan
    spoiled = torch.where(is_invalid, bad, pred)
    assert scores(new_metrics(), spoiled, target) == scores(new_metrics(), pred, target)


@pytest.mark.parametrize(("new_metrics", "maps"), CASES)
def test_a_split_without_a_valid_pixel_is_refused_by_metric_name(
    new_metrics: Callable[[], PooledMetrics], maps: Callable[[], tuple[Tensor, Tensor]]
) -> None:
    metrics = new_metrics()
    with pytest.raises(ValueError, match=f"no batch was added, so there is no {metrics.names[0]}"):
        metrics.compute()
    pred, target = maps()
    metrics.update(pred[:1], target[:1])
    with pytest.raises(
        ValueError, match=f"none of 1 frames has a valid pixel, so there is no {metrics.names[0]}"
    ):
        metrics.compute()
    assert metrics.num_invalid_frames == 1


@pytest.mark.parametrize(
    ("label", "named"),
    [(6, "6"), (254, "254"), (-1, r"outside 0\.\.255"), (300, r"outside 0\.\.255")],
)
def test_a_label_out_of_range_is_named_with_the_number_of_classes(label: int, named: str) -> None:
    pred, target = label_maps()
    target[1, :2, 0] = label
    message = rf"target: label {named} in 2 pixels; expected 0\.\.5 for 6 classes, or 255"
    with pytest.raises(ValueError, match=message):
        scores(segmentation_metrics(NUM_CLASSES), pred, target)


@pytest.mark.parametrize("wrong", [-1, NUM_CLASSES])
def test_a_prediction_out_of_range_is_refused(wrong: int) -> None:
    pred, target = label_maps()
    pred[target == 1] = wrong
    with pytest.raises(ValueError, match=r"predicted pixels lie outside 0\.\.5"):
        scores(segmentation_metrics(NUM_CLASSES), pred, target)


@pytest.mark.parametrize("num_classes", [0, 256])
def test_a_number_of_classes_without_an_invalid_label_is_refused(num_classes: int) -> None:
    with pytest.raises(ValueError, match=rf"num_classes must be in 1\.\.255, got {num_classes}"):
        segmentation_metrics(num_classes)


def test_255_classes_leave_255_invalid() -> None:
    target = torch.tensor([[[254, 255, 0]]], dtype=torch.uint8)
    found = scores(segmentation_metrics(255), torch.tensor([[[254, 3, 1]]]), target)
    assert found == {"miou": 0.5, "pixel_accuracy": 0.5}


def test_check_labels_names_place_label_and_classes() -> None:
    good = np.array([[0, 5], [255, 3]], dtype=np.uint8)
    check_labels(good, 6, "val")
    with pytest.raises(
        ValueError, match=r"val: label 5 in 1 pixels; expected 0\.\.4 for 5 classes"
    ):
        check_labels(good, 5, "val")
    with pytest.raises(ValueError, match=r"a\.npy: label -1 in 1 pixels"):
        check_labels(np.array([0, -1]), 5, "a.npy")
    with pytest.raises(ValueError, match="val: expected integer class indices, got float32"):
        check_labels(good.astype(np.float32), 6, "val")


@pytest.mark.usefixtures("_without_shape_checks")
@pytest.mark.parametrize(("new_metrics", "maps"), CASES)
def test_shapes_that_differ_are_refused(
    new_metrics: Callable[[], PooledMetrics], maps: Callable[[], tuple[Tensor, Tensor]]
) -> None:
    pred, target = maps()
    with pytest.raises(ValueError, match="expected pred and target of one shape, got"):
        new_metrics().update(pred[:1], target)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_scores_on_a_gpu_equal_those_on_the_cpu() -> None:
    for new_metrics, maps in CASES:
        pred, target = maps()
        on_gpu = scores(new_metrics(), pred.cuda(), target.cuda())
        assert on_gpu == pytest.approx(scores(new_metrics(), pred, target), rel=1e-9)
