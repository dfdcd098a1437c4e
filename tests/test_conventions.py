"""The conventions of other papers against NumPy, batch by batch as their evaluations run."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from oneshot_ednas.tasks import TASK_KINDS, TaskConfig, TaskMetrics, make_task
from oneshot_ednas.tasks.conventions import (
    adashare_depth,
    adashare_disparity,
    adashare_heatmap,
    adashare_log_depth,
    adashare_normals,
    adashare_segmentation,
    astmt_depth,
    astmt_human_parts,
    astmt_segmentation,
    mtan_depth,
    mtan_normals,
    mtan_segmentation,
)
from oneshot_ednas.tasks.metrics import PooledMetrics, segmentation_metrics

NUM_CLASSES = 6
BATCHES = (3, 3, 1)
"""Frames of each batch: the last is smaller, as at the end of a split."""


def label_maps() -> tuple[Tensor, Tensor]:
    """Class 3 is never predicted, 4 occurs in the prediction alone, 5 nowhere."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 4, (7, 9, 8), generator=generator)
    noise = torch.randint(0, 5, target.shape, generator=generator)
    noise = torch.where(noise == 3, 4, noise)
    is_wrong = torch.rand(target.shape, generator=generator) < 0.3
    pred = torch.where(is_wrong | (target == 3), noise, target)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    target[0, :6] = 255
    target[1, target[1] == 2] = 255
    return pred, target


def depth_maps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(7, 1, 9, 8, generator=generator) * 5 + 0.5
    target *= torch.arange(1, 8).view(7, 1, 1, 1)  # frames differ, or batches would not matter
    pred = target * torch.exp(0.4 * torch.randn(target.shape, generator=generator))
    target[torch.rand(target.shape, generator=generator) < 0.2] = 0
    target[0, :, :6], target[2, :, 0, 0] = 0, 1e-5
    return pred, target


def normal_maps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    target = torch.nn.functional.normalize(torch.randn(7, 3, 9, 8, generator=generator), dim=1)
    noise = torch.randn(target.shape, generator=generator)
    pred = torch.nn.functional.normalize(target + 0.5 * noise, dim=1)
    target[:, :, 0] = 0
    target[0, :, :6] = 0
    target[3, :, 4, 4] = torch.tensor([1.0, 0.0, 0.0])
    return pred, target


def scores(metrics: PooledMetrics, pred: Tensor, target: Tensor) -> dict[str, float]:
    for p, t in zip(pred.split(list(BATCHES)), target.split(list(BATCHES)), strict=True):
        metrics.update(p, t)
    return metrics.compute()


def batches(pred: Tensor, target: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    parts = zip(pred.split(list(BATCHES)), target.split(list(BATCHES)), strict=True)
    return [(p.numpy().astype(np.float64), t.numpy().astype(np.float64)) for p, t in parts]


def by_frames(values: list[float]) -> float:
    return float(np.average(values, weights=BATCHES))


@pytest.mark.parametrize("count_invalid", [False, True])
def test_adashare_segmentation(count_invalid: bool) -> None:
    pred, target = label_maps()
    accuracies = []
    for p, t in batches(pred, target):
        counted = np.ones_like(t, bool) if count_invalid else t != 255
        accuracies.append((p == t)[counted].mean())
    p, t = pred.numpy()[target.numpy() != 255], target.numpy()[target.numpy() != 255]
    iou = [((p == c) & (t == c)).sum() / max(((p == c) | (t == c)).sum(), 1) for c in range(6)]
    found = scores(adashare_segmentation(6, count_invalid=count_invalid), pred, target)
    expected = {"miou": np.mean([v for v in iou if v > 0]), "pixel_accuracy": by_frames(accuracies)}
    assert found == pytest.approx(expected)
    ours = scores(segmentation_metrics(6), pred, target)
    assert found["miou"] > ours["miou"] + 0.1
    assert (found["pixel_accuracy"] < ours["pixel_accuracy"] - 0.1) == count_invalid


def test_adashare_miou_is_zero_where_no_pixel_is_correct() -> None:
    target = torch.zeros(1, 2, 2, dtype=torch.int64)
    metrics = adashare_segmentation(2)
    metrics.update(target + 1, target)
    assert metrics.compute() == {"miou": 0.0, "pixel_accuracy": 0.0}


def test_adashare_depth_and_disparity() -> None:
    pred, target = depth_maps()
    absolute, relative, ratios = [], [], []
    for p, t in batches(pred, target):
        known = t > 3e-5
        error = np.abs(p - t)[known]
        absolute.append(error.mean())
        relative.append((error / t[known]).mean())
        ratios.append(np.maximum(p[known] / t[known], t[known] / p[known]))
    ratio = np.concatenate(ratios)
    expected = {"absolute_error": by_frames(absolute), "relative_error": by_frames(relative)}
    assert scores(adashare_disparity(), pred, target) == pytest.approx(expected)
    expected |= {f"delta_{k}": np.less_equal(ratio, 1.25**k).mean() for k in (1, 2, 3)}
    assert scores(adashare_depth(), pred, target) == pytest.approx(expected)
    assert abs(by_frames(absolute) / np.mean(absolute) - 1) > 0.05


def test_adashare_normals_are_angles_between_bytes() -> None:
    pred, target = normal_maps()
    angles = []
    for p, t in batches(pred, target):
        known = (t != 0).any(axis=1)
        # The images hold right, forward and up; ours are right, down and forward.
        guess, truth = (
            np.stack([v[:, 0], v[:, 2], -v[:, 1]], axis=-1)[known] * 127.5 + 127.5 for v in (p, t)
        )
        truth = np.rint(truth)
        guess, truth = guess[truth.max(-1) != 255], truth[truth.max(-1) != 255]
        cosine = (guess * truth).sum(-1)
        cosine /= np.linalg.norm(guess, axis=-1) * np.linalg.norm(truth, axis=-1)
        angles.append(np.rad2deg(np.arccos(cosine.clip(-1, 1))))
    angle = np.concatenate(angles)
    assert len(angle) < (target != 0).any(dim=1).sum()
    expected = {
        "mean_angle_deg": angle.mean(),
        "within_11": (angle <= 11.25).mean(),
        "within_22": (angle <= 22.5).mean(),
        "within_30": (angle <= 30).mean(),
    }
    assert scores(adashare_normals(), pred, target) == pytest.approx(expected, rel=1e-5)


def test_a_true_right_angle_reads_34_degrees_by_adashare() -> None:
    toward = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    slanted = torch.tensor([0.6, 0.0, 0.8]).view(1, 3, 1, 1)
    for truth, guess, expected in (
        (slanted, slanted, 0.0),
        (slanted, torch.tensor([0.0, -1.0, 0.0]).view(1, 3, 1, 1), 32.0),
    ):
        metrics = adashare_normals()
        metrics.update(guess, truth)
        assert metrics.compute()["mean_angle_deg"] == pytest.approx(expected, abs=1.0)
    # An axis itself has a byte of 255 and is taken for invalid; its neighbour reads 34 degrees.
    nearly = torch.tensor([0.0, 0.1, 0.99]).view(1, 3, 1, 1)
    metrics = adashare_normals()
    metrics.update(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1), nearly)
    assert metrics.compute()["mean_angle_deg"] == pytest.approx(
        math.degrees(math.acos(5 / 6)), 0.03
    )
    metrics = adashare_normals()
    metrics.update(toward, toward)
    with pytest.raises(ValueError, match="none of 1 frames has a valid pixel"):
        metrics.compute()


def test_adashare_averages_log_depth_and_heat_maps_over_batches() -> None:
    pred, target = depth_maps()
    logs, errors = [], []
    for p, t in batches(pred, target):
        known = t > 0
        unit = [np.log(1 + 512 * d[known]) / math.log(2**16) for d in (p, t)]
        logs.append(np.abs(unit[0] - unit[1]).mean())
        errors.append(np.abs(p - t).mean())
    found = scores(adashare_log_depth(), pred, target)
    assert found == pytest.approx({"log_absolute_error": by_frames(logs)})
    found = scores(adashare_heatmap(), pred, target)
    assert found == pytest.approx({"absolute_error": by_frames(errors)})


def test_mtan_segmentation_is_a_mean_of_batch_means() -> None:
    pred, target = label_maps()
    miou, accuracy = [], []
    for p, t in batches(pred, target):
        of_images = []
        for one, truth in zip(p, t, strict=True):
            known = truth != 255
            iou = []
            for c in range(NUM_CLASSES):
                union = (((one == c) | (truth == c)) & known).sum()
                if union:
                    iou.append(((one == c) & (truth == c)).sum() / union)
            of_images.append((np.mean(iou), (one == truth).sum() / known.sum()))
        miou.append(np.mean([m for m, _ in of_images]))
        accuracy.append(np.mean([a for _, a in of_images]))
    expected = {"miou": np.mean(miou), "pixel_accuracy": np.mean(accuracy)}
    assert scores(mtan_segmentation(NUM_CLASSES), pred, target) == pytest.approx(expected)


def test_mtan_depth_and_normals_are_means_of_batch_means() -> None:
    pred, target = depth_maps()
    errors = []
    for p, t in batches(pred, target):
        error = np.abs(p - t)[t != 0]
        errors.append((error.mean(), (error / t[t != 0]).mean()))
    absolute, relative = np.mean(errors, axis=0)
    expected = {"absolute_error": absolute, "relative_error": relative}
    assert scores(mtan_depth(), pred, target) == pytest.approx(expected)
    pred, target = normal_maps()
    means = []
    for p, t in batches(pred, target):
        known = (t != 0).any(axis=1)
        angle = np.degrees(np.arccos((p * t).sum(axis=1)[known].clip(-1, 1)))
        means.append((angle.mean(), *((angle < limit).mean() for limit in (11.25, 22.5, 30))))
    expected = dict(zip(TASK_KINDS["normals"].reward_metrics, np.mean(means, axis=0), strict=True))
    assert scores(mtan_normals(), pred, target) == pytest.approx(expected, rel=1e-5)


def test_astmt_segmentation_counts_classes_that_occur_nowhere_as_zero() -> None:
    pred, target = label_maps()
    p, t = pred.numpy()[target.numpy() != 255], target.numpy()[target.numpy() != 255]
    iou = [((p == c) & (t == c)).sum() / max(((p == c) | (t == c)).sum(), 1) for c in range(6)]
    assert scores(astmt_segmentation(6), pred, target) == pytest.approx({"miou": np.mean(iou)})


def test_astmt_human_parts_leave_out_images_of_background_alone() -> None:
    pred, target = label_maps()
    target[2], target[4] = 0, 0
    target[4, 0, 0] = 255
    p, t = pred[[0, 1, 3, 4, 5, 6]].numpy(), target[[0, 1, 3, 4, 5, 6]].numpy()
    p, t = p[t != 255], t[t != 255]
    iou = [((p == c) & (t == c)).sum() / max(((p == c) | (t == c)).sum(), 1) for c in range(6)]
    found = scores(astmt_human_parts(6), pred, target)
    assert found == pytest.approx({"miou": np.mean(iou)})
    assert found != scores(astmt_segmentation(6), pred, target)


def test_astmt_depth_is_a_mean_over_images() -> None:
    pred, target = depth_maps()
    p, t = pred.numpy().astype(np.float64), target.numpy().astype(np.float64)
    rmse = [np.sqrt(((a - b)[b > 0] ** 2).mean()) for a, b in zip(p, t, strict=True)]
    assert scores(astmt_depth(), pred, target) == pytest.approx({"rmse": np.mean(rmse)})


CASES = [
    (lambda: adashare_segmentation(NUM_CLASSES), label_maps, 255),
    (lambda: mtan_segmentation(NUM_CLASSES), label_maps, 255),
    (lambda: astmt_segmentation(NUM_CLASSES), label_maps, 255),
    (adashare_depth, depth_maps, 0),
    (mtan_depth, depth_maps, 0),
    (astmt_depth, depth_maps, 0),
    (adashare_normals, normal_maps, 0),
    (mtan_normals, normal_maps, 0),
    (adashare_heatmap, depth_maps, math.nan),
]


@pytest.mark.parametrize(("new_metrics", "maps", "invalid"), CASES)
def test_batches_without_a_valid_pixel_change_nothing(new_metrics, maps, invalid) -> None:
    pred, target = maps()
    metrics = new_metrics()
    metrics.update(pred[:2], torch.full_like(target[:2], invalid))
    with pytest.raises(ValueError, match="none of 2 frames has a valid pixel"):
        metrics.compute()
    assert scores(metrics, pred, target) == pytest.approx(scores(new_metrics(), pred, target))
    assert metrics.num_invalid_frames == 2


@pytest.mark.parametrize(
    "new_metrics", [adashare_segmentation, mtan_segmentation, astmt_segmentation]
)
def test_labels_out_of_range_are_refused_by_every_convention(new_metrics) -> None:
    pred, target = label_maps()
    target[0, 0, 0] = 9
    with pytest.raises(ValueError, match="label 9 in 1 pixels"):
        scores(new_metrics(NUM_CLASSES), pred, target)


def test_a_config_chooses_the_convention() -> None:
    pred, target = depth_maps()
    for name, metrics in (("adashare", adashare_depth()), ("mtan", mtan_depth())):
        task = make_task("depth", TaskConfig(kind="depth", convention=name))
        found: TaskMetrics = task.new_metric()
        for p, t in zip(pred.split(list(BATCHES)), target.split(list(BATCHES)), strict=True):
            found.update(p, t)
        assert found.compute() == scores(metrics, pred, target)
    rmse = make_task("depth", TaskConfig(kind="depth", convention="astmt"))
    assert rmse.reward_metrics == {"rmse": 1.0}
    assert rmse.lower_is_better == {"rmse"}
