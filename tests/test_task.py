"""Tasks: settings, losses and predictions at the target's size, metrics and pictures."""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_ednas.schema import dump_yaml, parse_yaml
from oneshot_ednas.tasks import (
    LOWER_IS_BETTER,
    REWARD_METRICS,
    TASK_KINDS,
    Task,
    TaskConfig,
    TaskKind,
    lower_is_better,
    make_task,
    make_tasks,
    task_kind,
)
from oneshot_ednas.tasks.losses import (
    balanced_cross_entropy,
    cross_entropy,
    depth_l1,
    jared,
    log_depth,
)

TASKS = make_tasks(
    {
        "segmentation": TaskConfig(kind="segmentation", num_classes=5, loss_weight=0.5),
        "depth": TaskConfig(kind="depth", relative_weight=0.05, scale=10.0),
        "normals": TaskConfig(kind="normals", loss_weight=40.0),
        "human_parts": TaskConfig(
            kind="human_parts", num_classes=5, class_weights=(0.5, 1.0, 1.0, 2.0, 1.0)
        ),
        "saliency": TaskConfig(kind="saliency"),
        "edges": TaskConfig(kind="edges"),
        "log_depth": TaskConfig(kind="log_depth"),
        "disparity": TaskConfig(kind="disparity", relative_weight=0.1, scale=10.0),
        "heatmap": TaskConfig(kind="heatmap", scale=10.0),
    }
)
LABELLED = ("segmentation", "human_parts")
BINARY = ("saliency", "edges")
DEPTHS = ("depth", "log_depth", "disparity")
INVALID = {"labels": 255, "edges": 255, "values": math.nan}


def target_of(name: str, seed: int = 0) -> Tensor:
    """A target of two frames of 8 x 12 pixels; the top row is invalid, one other value is NaN."""
    generator = torch.Generator().manual_seed(seed)
    if name in LABELLED + BINARY:
        target = torch.randint(0, 5 if name in LABELLED else 2, (2, 8, 12), generator=generator)
        target[:, 0] = 255
        return target
    if name in DEPTHS:
        target = torch.rand(2, 1, 8, 12, generator=generator) * 8 + 1
        target[..., 0, :], target[0, 0, 1, 1] = 0, math.nan
        return target
    if name == "heatmap":
        target = torch.randn(2, 1, 8, 12, generator=generator)
        target[..., 0, :], target[0, 0, 1, 1] = math.inf, math.nan
        return target
    target = F.normalize(torch.randn(2, 3, 8, 12, generator=generator), dim=1)
    target[..., 0, :], target[0, :, 1, 1] = 0, math.nan
    return target


def output_of(name: str, seed: int = 1, rows: int = 2, columns: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, TASKS[name].out_channels, rows, columns, generator=generator)


def perfect_output(name: str) -> Tensor:
    """The output, at full size, that predicts the target wherever it is valid."""
    target = target_of(name)
    if name in LABELLED:
        return F.one_hot(target % 255, 5).movedim(-1, 1).float() * 50
    if name in BINARY:
        return ((target == 1).float().unsqueeze(1) - 0.5) * 100
    if name == "log_depth":
        return log_depth(target.nan_to_num())
    return target.nan_to_num(posinf=0) / TASKS[name].config.scale


@pytest.fixture
def _without_shape_checks() -> Iterator[None]:
    """Runs as a user's program does: without the run-time shape checks of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_tasks_keep_names_order_channels_and_weights() -> None:
    assert set(TASKS) == set(TASK_KINDS)
    assert list(TASKS)[:4] == ["segmentation", "depth", "normals", "human_parts"]
    channels = {name: task.out_channels for name, task in TASKS.items()}
    assert channels == dict.fromkeys(TASKS, 1) | {"segmentation": 5, "normals": 3, "human_parts": 5}
    assert [task.loss_weight for task in TASKS.values()][:4] == [0.5, 1.0, 40.0, 1.0]
    assert all(task.name == task.kind == name for name, task in TASKS.items())
    assert make_task("parts", TASKS["segmentation"].config).name == "parts"


def test_default_reward_metrics_are_those_of_the_paper() -> None:
    assert {name: list(task.reward_metrics) for name, task in TASKS.items()} == {
        "segmentation": ["miou", "pixel_accuracy"],
        "depth": ["absolute_error", "relative_error"],
        "normals": ["mean_angle_deg", "within_11", "within_22", "within_30"],
        "human_parts": ["miou"],
        "saliency": ["iou"],
        "edges": ["ods_f"],
        "log_depth": ["log_absolute_error", "absolute_error", "relative_error"],
        "disparity": ["absolute_error", "relative_error"],
        "heatmap": ["absolute_error"],
    }
    assert all(set(task.reward_metrics.values()) == {1.0} for task in TASKS.values())
    errors = {"absolute_error", "relative_error", "rmse", "mean_angle_deg", "log_absolute_error"}
    assert errors == LOWER_IS_BETTER == lower_is_better(TASKS)
    assert {name for task in TASKS.values() for name in task.reward_metrics} == REWARD_METRICS


def test_reward_weights_of_the_config_replace_the_default() -> None:
    config = TaskConfig(kind="depth", reward_weights={"rmse": 2.0, "delta_1": 0.0})
    assert make_task("depth", config).reward_metrics == {"rmse": 2.0, "delta_1": 0.0}


CONVENTIONS = [(kind, name) for kind, row in TASK_KINDS.items() for name in row.metrics]


@pytest.mark.parametrize(("kind", "convention"), CONVENTIONS)
def test_rows_of_the_task_table_agree_with_themselves(kind: str, convention: str) -> None:
    row = TASK_KINDS[kind]
    task = make_task(kind, dataclasses.replace(TASKS[kind].config, convention=convention))
    metric = task.new_metric()
    metric.update(output_of(kind), target_of(kind))
    found = metric.compute()
    assert tuple(found) == task.config.metric_names == row.metrics[convention].names
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert task.reward_metrics
    assert set(task.reward_metrics) <= set(found)


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_a_name_means_the_same_in_every_kind(kind: str) -> None:
    row = TASK_KINDS[kind]
    names = row.metrics["ours"].names
    assert row.lower_is_better == row.metric_names & LOWER_IS_BETTER
    # What enters by default must not depend on whether the task or the name is asked.
    assert [name for name in names if name in REWARD_METRICS] == list(row.reward_metrics)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_config_survives_yaml(task: Task) -> None:
    assert parse_yaml(dump_yaml(task.config), TaskConfig, source="task.yaml") == task.config
    weights = {task.config.metric_names[0]: 0.5}
    text = f"kind: {task.kind}\nnum_classes: {task.config.num_classes or 'null'}\n"
    config = parse_yaml(text + f"reward_weights: {weights}", TaskConfig, source="task.yaml")
    assert config.reward_weights == weights


def test_segmentation_loss_is_the_cross_entropy_of_resized_logits() -> None:
    output, target = output_of("segmentation"), target_of("segmentation")
    resized = F.interpolate(output, size=(8, 12), mode="bilinear", align_corners=False)
    expected = cross_entropy(resized, target)
    torch.testing.assert_close(TASKS["segmentation"].loss(output, target), expected)


def test_depth_loss_is_jared_in_metres_or_plain_l1() -> None:
    output, target = output_of("depth"), target_of("depth")
    metres = 10 * F.interpolate(output, size=(8, 12), mode="bilinear", align_corners=False)
    valid = target > 0
    expected = jared(metres, target, valid, 0.05)
    torch.testing.assert_close(TASKS["depth"].loss(output, target), expected)
    plain = make_task("depth", TaskConfig(kind="depth", scale=10.0))
    torch.testing.assert_close(plain.loss(output, target), depth_l1(metres, target, valid))


def test_losses_of_the_other_kinds_are_those_of_the_resized_output() -> None:
    def resized(name: str) -> Tensor:
        return F.interpolate(output_of(name), size=(8, 12), mode="bilinear")

    target = target_of("human_parts")
    expected = cross_entropy(
        resized("human_parts"), target, class_weights=[0.5, 1.0, 1.0, 2.0, 1.0]
    )
    found = TASKS["human_parts"].loss(output_of("human_parts"), target)
    torch.testing.assert_close(found, expected)
    for name, weight in (("saliency", None), ("edges", 0.95)):
        target = target_of(name)
        expected = balanced_cross_entropy(resized(name), target, positive_weight=weight)
        torch.testing.assert_close(TASKS[name].loss(output_of(name), target), expected)
    light = make_task("edges", TaskConfig(kind="edges", positive_weight=0.8))
    expected = balanced_cross_entropy(resized("edges"), target, positive_weight=0.8)
    torch.testing.assert_close(light.loss(output_of("edges"), target), expected)
    target = target_of("disparity")
    expected = jared(10 * resized("disparity"), target, target > 0, 0.1)
    torch.testing.assert_close(TASKS["disparity"].loss(output_of("disparity"), target), expected)
    target = target_of("log_depth")
    goal = (torch.log(1 + 512 * target) / math.log(65536)).nan_to_num()
    expected = depth_l1(resized("log_depth"), goal, target > 0)
    torch.testing.assert_close(TASKS["log_depth"].loss(output_of("log_depth"), target), expected)
    target = target_of("heatmap")
    expected = depth_l1(10 * resized("heatmap"), target, torch.isfinite(target))
    torch.testing.assert_close(TASKS["heatmap"].loss(output_of("heatmap"), target), expected)


def test_normals_loss_is_one_minus_the_cosine() -> None:
    task = TASKS["normals"]
    target = torch.tensor([0.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    for vector, expected in (
        ((0, 0, -5), 0),
        ((3, 0, 0), 1),
        ((0, 0, 2), 2),
        ((1, 0, -1), 1 - 0.5**0.5),
    ):
        output = torch.tensor(vector, dtype=torch.float32).view(1, 3, 1, 1)
        assert task.loss(output, target).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_a_perfect_output_has_no_loss_and_the_best_scores(name: str) -> None:
    output, target, task = perfect_output(name), target_of(name), TASKS[name]
    assert task.loss(output, target).item() == pytest.approx(0, abs=1e-6)
    metric = task.new_metric()
    metric.update(output, target)
    for metric_name, score in metric.compute().items():
        best = 0 if metric_name in task.lower_is_better else 1
        assert score == pytest.approx(best, abs=1e-5), metric_name


@pytest.mark.parametrize("name", TASKS)
def test_losses_train_every_channel_and_never_give_nan(name: str) -> None:
    output = output_of(name).requires_grad_()
    TASKS[name].loss(output, target_of(name)).backward()
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()
    assert (output.grad.abs().sum(dim=(0, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", TASKS)
def test_task_losses_agree_with_finite_differences(name: str) -> None:
    output = output_of(name).double().requires_grad_()
    target = target_of(name)
    target = target if target.dtype == torch.int64 else target.double()
    assert torch.autograd.gradcheck(lambda x: TASKS[name].loss(x, target), (output,))


@pytest.mark.parametrize("name", TASKS)
def test_invalid_pixels_of_a_target_do_not_matter(name: str) -> None:
    # At full size, so that the gradient of an invalid pixel is that pixel's own.
    output = output_of(name, rows=8, columns=12).requires_grad_()
    TASKS[name].loss(output, target_of(name)).backward()
    assert output.grad is not None
    assert (output.grad[..., 0, :] == 0).all()
    if name not in LABELLED + BINARY:
        assert (output.grad[0, :, 1, 1] == 0).all()
    assert (output.grad[..., 2:, :] != 0).any()


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_without_valid_pixels_has_loss_zero(name: str) -> None:
    output = output_of(name).requires_grad_()
    target = torch.full_like(target_of(name), INVALID.get(TASKS[name].row.target_kind, 0))
    loss = TASKS[name].loss(output, target)
    loss.backward()
    assert loss.item() == 0
    assert output.grad is not None
    assert (output.grad == 0).all()


@pytest.mark.parametrize("name", TASKS)
def test_half_precision_outputs_are_compared_in_full_precision(name: str) -> None:
    output = output_of(name).bfloat16()
    loss = TASKS[name].loss(output, target_of(name))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, TASKS[name].loss(output.float(), target_of(name)))
    assert TASKS[name].distillation_loss(output, output).dtype == torch.float32


def test_predictions_have_the_asked_size_and_the_units_of_the_targets() -> None:
    classes = TASKS["segmentation"].predict(output_of("segmentation"), (8, 12))
    assert (classes.dtype, classes.shape) == (torch.int64, (2, 8, 12))
    constant = torch.full((1, 1, 2, 2), 0.3)
    depth = TASKS["depth"].predict(constant, (5, 7))
    torch.testing.assert_close(depth, torch.full((1, 1, 5, 7), 3.0))
    assert (TASKS["depth"].predict(-constant, (5, 7)) == 0).all()
    disparity = TASKS["disparity"].predict(constant, (5, 7))
    torch.testing.assert_close(disparity, torch.full((1, 1, 5, 7), 3.0))
    heat = TASKS["heatmap"].predict(-constant, (5, 7))
    torch.testing.assert_close(heat, torch.full((1, 1, 5, 7), -3.0))
    metres = TASKS["log_depth"].predict(constant, (5, 7))
    torch.testing.assert_close(metres, torch.full((1, 1, 5, 7), (2**4.8 - 1) / 512))
    assert TASKS["log_depth"].predict(constant * 100, (5, 7)).max().item() < 128
    for name in BINARY:
        probability = TASKS[name].predict(torch.full((1, 1, 2, 2), math.log(3)), (5, 7))
        torch.testing.assert_close(probability, torch.full((1, 5, 7), 0.75))
    normals = TASKS["normals"].predict(output_of("normals"), (8, 12))
    assert normals.shape == (2, 3, 8, 12)
    length = torch.linalg.vector_norm(normals, dim=1)
    torch.testing.assert_close(length, torch.ones_like(length))


@pytest.mark.parametrize("name", TASKS)
def test_task_metrics_over_batches_equal_those_of_the_whole(name: str) -> None:
    output, target = output_of(name), target_of(name)
    whole, parts = TASKS[name].new_metric(), TASKS[name].new_metric()
    whole.update(output, target)
    for frame in range(2):
        parts.update(output[frame : frame + 1], target[frame : frame + 1])
    assert whole.compute() == pytest.approx(parts.compute(), rel=1e-6)


def test_task_metrics_count_invalid_frames_and_name_the_task_in_errors() -> None:
    task = make_task("range", TaskConfig(kind="depth"))
    metric, target = task.new_metric(), target_of("depth")
    target[0] = 0
    metric.update(output_of("depth")[:1], target[:1])
    with pytest.raises(ValueError, match="task range: none of 1 frames has a valid pixel"):
        metric.compute()
    metric.update(output_of("depth")[1:], target[1:])
    metric.compute()
    assert metric.num_invalid_frames == 1


@pytest.mark.parametrize("name", TASKS)
def test_distillation_pulls_the_student_towards_the_teacher(name: str) -> None:
    task = TASKS[name]
    student, teacher = output_of(name, 1).requires_grad_(), output_of(name, 2).requires_grad_()
    loss = task.distillation_loss(student, teacher)
    gradient, teacher_gradient = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
    assert teacher_gradient is None
    step = 0.01 / gradient.norm()
    assert task.distillation_loss(student - step * gradient, teacher) < loss
    assert task.distillation_loss(teacher, teacher) < loss


def test_depth_distillation_is_in_metres() -> None:
    zero = torch.zeros(1, 1, 2, 2)
    assert TASKS["depth"].distillation_loss(zero, zero + 0.2).item() == pytest.approx(2.0)


@pytest.mark.parametrize("num_classes", [2, 40, 255])
def test_classes_have_distinct_colours_and_invalid_is_black(num_classes: int) -> None:
    task = make_task("parts", TaskConfig(kind="segmentation", num_classes=num_classes))
    labels = np.array([[*range(num_classes), 255]], dtype=np.uint8)
    picture = task.picture(labels)
    assert picture.dtype == np.uint8
    assert len(np.unique(picture[0], axis=0)) == num_classes + 1
    assert picture[0, -1].tolist() == [0, 0, 0]
    assert (picture[0, :-1].max(axis=-1) > 60).all()


def test_depth_gets_darker_with_distance_and_invalid_is_black() -> None:
    metres = np.array([[1, 2, 4, 8, 16, 32, 64, 0, np.nan]], dtype=np.float32)
    picture = TASKS["depth"].picture(metres)[0].astype(float)
    brightness = picture @ [0.30, 0.59, 0.11]
    assert (np.diff(brightness[:7]) < 0).all()
    assert brightness[6] > 20
    assert (picture[7:] == 0).all()
    # Equal ratios of depth are equal steps, so the unit does not matter.
    assert (TASKS["depth"].picture(metres * 100) == TASKS["depth"].picture(metres)).all()
    assert (TASKS["depth"].picture(np.zeros((2, 3), np.float32)) == 0).all()
    assert TASKS["depth"].picture(np.ones((2, 3), np.float32)).min() > 0


def test_normals_become_rgb_and_invalid_is_black() -> None:
    normals = np.array([[[0, 0, -1], [1, 0, 0], [0, -1, 0], [0, 0, 0]]], dtype=np.float16)
    picture = TASKS["normals"].picture(normals)[0].tolist()
    assert picture == [[128, 128, 0], [255, 128, 128], [128, 0, 128], [0, 0, 0]]


def test_disparity_gets_brighter_with_nearness_as_depth_does() -> None:
    disparity = np.array([[64, 32, 16, 8, 4, 2, 1, 0, np.nan]], dtype=np.float32)
    metres = np.array([[1, 2, 4, 8, 16, 32, 64, 0, np.nan]], dtype=np.float32)
    assert (TASKS["disparity"].picture(disparity) == TASKS["depth"].picture(metres)).all()
    assert (TASKS["log_depth"].picture(metres) == TASKS["depth"].picture(metres)).all()


def test_heat_maps_get_brighter_with_the_value_and_invalid_is_black() -> None:
    picture = TASKS["heatmap"].picture(np.array([[-3, -1, 1, 3, np.nan, np.inf]]))[0]
    brightness = picture.astype(float) @ [0.30, 0.59, 0.11]
    assert (np.diff(brightness[:4]) > 0).all()
    assert brightness[0] > 20
    assert (picture[4:] == 0).all()
    assert (TASKS["heatmap"].picture(np.full((2, 3), np.nan)) == 0).all()
    assert TASKS["heatmap"].picture(np.zeros((2, 3))).min() > 0


@pytest.mark.parametrize("name", BINARY)
def test_probabilities_and_labels_are_grey_and_invalid_is_black(name: str) -> None:
    labels = TASKS[name].picture(np.array([[0, 1, 255]], dtype=np.uint8))[0]
    assert labels.tolist() == [[48] * 3, [255] * 3, [0] * 3]
    found = TASKS[name].picture(np.array([[0, 0.5, 1, np.nan]], dtype=np.float32))[0]
    assert found.tolist() == [[48] * 3, [152] * 3, [255] * 3, [0] * 3]


@pytest.mark.parametrize("name", TASKS)
def test_predictions_are_limited_to_the_range_of_the_target_where_colours_span_it(
    name: str,
) -> None:
    task, target = TASKS[name], target_of(name)[0].numpy()
    prediction = task.predict(output_of(name), (8, 12))[0].numpy()
    limited = task.in_range_of(target, prediction)
    if name in (*DEPTHS, "heatmap"):
        known = target[np.isfinite(target) & ((target > 0) | (name == "heatmap"))]
        assert (limited == prediction.clip(known.min(), known.max())).all()
        assert (limited != prediction).any()
        unknown = np.full_like(target, np.nan)
        assert (task.in_range_of(unknown, prediction) == prediction).all()
    else:
        assert (limited == prediction).all()


@pytest.mark.parametrize("name", TASKS)
def test_a_prediction_is_drawn_like_a_stored_target(name: str) -> None:
    prediction = TASKS[name].predict(output_of(name), (8, 12))[0].numpy()
    stored = {
        "labels": lambda: prediction.astype(np.uint8) if name in LABELLED else prediction,
        "edges": lambda: prediction,
        "normals": lambda: np.moveaxis(prediction, 0, -1),
    }.get(TASKS[name].row.target_kind, lambda: prediction[0])()
    picture = TASKS[name].picture(prediction)
    assert picture.shape == (8, 12, 3)
    assert (picture == TASKS[name].picture(stored)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dept"}, "unknown task kind dept; did you mean depth?"),
        (
            {"kind": "segmentation"},
            r"num_classes of a segmentation task must be in 2\.\.255, got N",
        ),
        ({"kind": "segmentation", "num_classes": 1}, r"must be in 2\.\.255, got 1"),
        ({"kind": "segmentation", "num_classes": 256}, r"must be in 2\.\.255, got 256"),
        (
            {"kind": "depth", "num_classes": 3},
            "num_classes belongs to segmentation, human_parts, got 3 for kind depth; remove it",
        ),
        ({"kind": "saliency", "num_classes": 2}, "num_classes belongs to segmentation, human_"),
        (
            {"kind": "human_parts", "num_classes": 3, "class_weights": (1.0, 2.0)},
            "class_weights: expected one for each of 3 classes, got 2",
        ),
        (
            {"kind": "segmentation", "num_classes": 2, "class_weights": (1.0, -1.0)},
            r"class_weights\[1\] must be finite and 0 or more, got -1",
        ),
        (
            {"kind": "segmentation", "num_classes": 2, "class_weights": (0.0, 0.0)},
            "class_weights must give at least one class a weight above 0",
        ),
        ({"kind": "depth", "class_weights": (1.0,)}, "class_weights belongs to segmentation"),
        (
            {"kind": "edges", "positive_weight": 1.0},
            "positive_weight must be finite and between 0 and 1, got 1",
        ),
        ({"kind": "depth", "positive_weight": 0.5}, "positive_weight belongs to saliency, edges"),
        ({"kind": "edges", "max_distance": 0.0}, "max_distance must be finite and above 0, got 0"),
        ({"kind": "saliency", "max_distance": 0.1}, "max_distance belongs to edges, got 0.1"),
        (
            {"kind": "depth", "convention": "libmtl"},
            "kind depth has no metrics by the convention libmtl; known: ours, adashare, mtan, astm",
        ),
        ({"kind": "heatmap", "convention": "astmt"}, "kind heatmap has no metrics by the conv"),
        (
            {"kind": "depth", "convention": "mtan", "reward_weights": {"rmse": 1.0}},
            "reward_weights: no depth metric rmse; known: absolute_error, relative_error",
        ),
        ({"kind": "depth", "loss_weight": -1.0}, "loss_weight must be finite and 0 or more"),
        ({"kind": "depth", "loss_weight": math.inf}, "loss_weight must be finite and 0 or more"),
        (
            {"kind": "depth", "relative_weight": -1.0},
            "relative_weight must be finite and 0 or more",
        ),
        ({"kind": "depth", "scale": 0.0}, "scale must be finite and above 0, got 0"),
        (
            {"kind": "normals", "scale": 2.0},
            "scale belongs to depth, disparity, heatmap, got 2.0 for kind normals; remove it",
        ),
        (
            {"kind": "heatmap", "relative_weight": 0.1},
            "relative_weight belongs to depth, disparity",
        ),
        (
            {"kind": "depth", "reward_weights": {"rms": 1.0}},
            "no depth metric rms; did you mean rmse",
        ),
        (
            {"kind": "depth", "reward_weights": {"rmse": -1.0}},
            r"reward_weights\.rmse must be finite",
        ),
        (
            {"kind": "depth", "reward_weights": {"rmse": 0.0}},
            "at least one metric a weight above 0",
        ),
        ({"kind": "depth", "reward_weights": {}}, "at least one metric a weight above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(**settings)


def test_a_task_needs_a_name_and_a_network_a_task() -> None:
    with pytest.raises(ValueError, match="a task needs a name, got an empty one"):
        make_task("", TaskConfig(kind="depth"))
    with pytest.raises(ValueError, match="expected at least one task, got none"):
        make_tasks({})


@pytest.mark.usefixtures("_without_shape_checks")
@pytest.mark.parametrize("name", TASKS)
def test_outputs_and_targets_that_do_not_belong_together_are_refused(name: str) -> None:
    task, output, target = TASKS[name], output_of(name), target_of(name)
    calls: tuple[Callable[[Tensor, Tensor], object], ...] = (task.loss, task.new_metric().update)
    for call in calls:
        for wrong in (
            (output[:1], target),
            (output[0], target),
            (output.repeat(1, 2, 1, 1), target),
        ):
            with pytest.raises(ValueError, match=rf"task {name}: expected output \[batch, "):
                call(*wrong)
        with pytest.raises(ValueError, match=rf"task {name}: expected output \[batch, "):
            call(output, target.unsqueeze(1))
    with pytest.raises(ValueError, match=f"task {name}: expected student and teacher outputs"):
        task.distillation_loss(output, output[:1])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("segmentation", (3, 4, 5)),
        ("depth", (4, 5, 3)),
        ("normals", (4, 5)),
        ("normals", (2, 4, 5)),
        ("saliency", (3, 4, 5)),
        ("heatmap", (2, 4, 5)),
    ],
)
def test_an_array_that_is_no_map_of_the_task_is_not_drawn(name: str, shape: tuple) -> None:
    with pytest.raises(ValueError, match=f"task {name}: expected one {name} map with"):
        TASKS[name].picture(np.zeros(shape, dtype=np.uint8))


def test_a_label_without_a_colour_is_refused() -> None:
    with pytest.raises(ValueError, match="picture: label 5 in 4 pixels"):
        TASKS["segmentation"].picture(np.full((2, 2), 5, dtype=np.uint8))


OWN_KIND = """
    import dataclasses
    from oneshot_ednas.tasks import TASK_KINDS, MetricSet, PooledMetrics
    from oneshot_ednas.tasks.metrics import heatmap_scores, heatmap_sums

    def renamed(name, errors):
        metric = MetricSet(
            names=(name,), new=lambda config: PooledMetrics((name,), heatmap_sums, heatmap_scores)
        )
        return dataclasses.replace(
            TASK_KINDS["heatmap"], metrics={"ours": metric}, reward_metrics=(name,),
            lower_is_better=frozenset({name} if errors else ()),
        )

    HEIGHT = renamed("height_error", True)
    SCORE = renamed("height_error", False)
    WRONG_SENSE = renamed("miou", True)
    NO_KIND = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a user's module on the import path, as `python -m` from their folder has it."""
    name = f"own_kinds_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(OWN_KIND), encoding="utf-8")
    (tmp_path / f"{name}_broken.py").write_text("import no_such_package\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_kind_of_ones_own_is_named_in_yaml_and_works_like_a_row(own_module: str) -> None:
    text = f"kind: {own_module}:HEIGHT\nscale: 10.0\n"
    config = parse_yaml(text, TaskConfig, source="task.yaml")
    assert parse_yaml(dump_yaml(config), TaskConfig, source="task.yaml") == config
    assert isinstance(task_kind(config.kind), TaskKind)
    tasks = make_tasks({"height": config, "heat": TASKS["heatmap"].config})
    output, target = output_of("heatmap"), target_of("heatmap")
    torch.testing.assert_close(
        tasks["height"].loss(output, target), tasks["heat"].loss(output, target)
    )
    metrics = {name: task.new_metric() for name, task in tasks.items()}
    for metric in metrics.values():
        metric.update(output, target)
    error = metrics["height"].compute()["height_error"]
    assert error == metrics["heat"].compute()["absolute_error"]
    assert lower_is_better(tasks) == {"height_error", "absolute_error"}
    assert tasks["height"].reward_metrics == {"height_error": 1.0}
    picture = tasks["height"].picture(target[0].numpy())
    assert (picture == tasks["heat"].picture(target[0].numpy())).all()


def test_a_regression_or_a_segmentation_of_ones_own_needs_yaml_alone() -> None:
    text = "kind: heatmap\nscale: 0.5\nloss_weight: 3.0\n"
    chlorophyll = make_task("chlorophyll", parse_yaml(text, TaskConfig, source="task.yaml"))
    assert chlorophyll.loss(torch.full((1, 1, 2, 2), 4.0), torch.zeros(1, 1, 4, 4)).item() == 2
    text = "kind: segmentation\nnum_classes: 3\nclass_weights: [0.2, 1, 1]\n"
    assert make_task("weeds", parse_yaml(text, TaskConfig, source="task.yaml")).out_channels == 3


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no_such_module_here:KIND", "cannot import no_such_module_here: No module named 'no_su"),
        ("{own}_broken:KIND", "cannot import {own}_broken: No module named 'no_such_package'"),
        ("{own}:MISSING", "module {own} has no MISSING"),
        ("{own}:NO_KIND", r"expected an oneshot_ednas\.tasks\.TaskKind, got int"),
        ("{own}:WRONG_SENSE", "is miou an error or a score\\? segmentation has one of that name"),
        ("{own}:", r"expected package\.module:NAME"),
        (".own:KIND", r"expected package\.module:NAME"),
        ("own", r"unknown task kind own; known: .* \(your own: package\.module:NAME\)"),
    ],
)
def test_a_kind_that_cannot_be_had_is_refused_in_one_line(
    own_module: str, kind: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message.format(own=own_module)) as raised:
        TaskConfig(kind=kind.format(own=own_module))
    assert "\n" not in str(raised.value)


def test_two_kinds_of_ones_own_must_agree_on_what_an_error_is(own_module: str) -> None:
    kinds = (f"{own_module}:HEIGHT", f"{own_module}:SCORE")
    with pytest.raises(ValueError, match="task b: height_error is an error to another task"):
        make_tasks({name: TaskConfig(kind=kind) for name, kind in zip("ab", kinds, strict=True)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {}, "reward_metrics": ()}, "metrics of a task kind: no ours among none"),
        ({"reward_metrics": ("pace",)}, "reward_metrics of a task kind: no pace among absolute_er"),
        ({"lower_is_better": frozenset({"pace"})}, "lower_is_better of a task kind: no pace among"),
        ({"settings": frozenset({"pace"})}, "settings of a task kind: no pace among class_weights"),
    ],
)
def test_a_row_that_disagrees_with_itself_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TASK_KINDS["heatmap"], **change)
