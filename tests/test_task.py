"""Tasks: settings, losses and predictions at the target's size, metrics and pictures."""

import math
from collections.abc import Callable, Iterator

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
    make_task,
    make_tasks,
)
from oneshot_ednas.tasks.losses import cross_entropy, depth_l1, jared

TASKS = make_tasks(
    {
        "segmentation": TaskConfig(kind="segmentation", num_classes=5, loss_weight=0.5),
        "depth": TaskConfig(kind="depth", relative_weight=0.05, scale=10.0),
        "normals": TaskConfig(kind="normals", loss_weight=40.0),
    }
)


def target_of(name: str, seed: int = 0) -> Tensor:
    """A target of two frames of 8 x 12 pixels; the top row is invalid, one depth is NaN."""
    generator = torch.Generator().manual_seed(seed)
    if name == "segmentation":
        target = torch.randint(0, 5, (2, 8, 12), generator=generator)
        target[:, 0] = 255
        return target
    if name == "depth":
        target = torch.rand(2, 1, 8, 12, generator=generator) * 8 + 1
        target[..., 0, :], target[0, 0, 1, 1] = 0, math.nan
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
    if name == "segmentation":
        return F.one_hot(target % 255, 5).movedim(-1, 1).float() * 50
    return target.nan_to_num() / (10 if name == "depth" else 1)


@pytest.fixture
def _without_shape_checks() -> Iterator[None]:
    """Runs as a user's program does: without the run-time shape checks of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_tasks_keep_names_order_channels_and_weights() -> None:
    assert list(TASKS) == ["segmentation", "depth", "normals"]
    assert {name: task.out_channels for name, task in TASKS.items()} == {
        "segmentation": 5,
        "depth": 1,
        "normals": 3,
    }
    assert [task.loss_weight for task in TASKS.values()] == [0.5, 1.0, 40.0]
    assert all(task.name == task.kind == name for name, task in TASKS.items())
    assert make_task("parts", TASKS["segmentation"].config).name == "parts"


def test_default_reward_metrics_are_those_of_the_paper() -> None:
    assert {name: list(task.reward_metrics) for name, task in TASKS.items()} == {
        "segmentation": ["miou", "pixel_accuracy"],
        "depth": ["absolute_error", "relative_error"],
        "normals": ["mean_angle_deg", "within_11", "within_22", "within_30"],
    }
    assert all(set(task.reward_metrics.values()) == {1.0} for task in TASKS.values())
    assert {"absolute_error", "relative_error", "rmse", "mean_angle_deg"} == LOWER_IS_BETTER
    assert {name for task in TASKS.values() for name in task.reward_metrics} == REWARD_METRICS


def test_reward_weights_of_the_config_replace_the_default() -> None:
    config = TaskConfig(kind="depth", reward_weights={"rmse": 2.0, "delta_1": 0.0})
    assert make_task("depth", config).reward_metrics == {"rmse": 2.0, "delta_1": 0.0}


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_rows_of_the_task_table_agree_with_themselves(kind: str) -> None:
    row = TASK_KINDS[kind]
    task = TASKS[kind]
    assert set(row.reward_metrics) <= set(row.metric_names)
    assert row.lower_is_better <= set(row.metric_names)
    assert task.lower_is_better == row.lower_is_better
    metric = task.new_metric()
    metric.update(output_of(kind), target_of(kind))
    assert tuple(metric.compute()) == row.metric_names


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_config_survives_yaml(task: Task) -> None:
    assert parse_yaml(dump_yaml(task.config), TaskConfig, source="task.yaml") == task.config
    weights = {TASK_KINDS[task.kind].metric_names[0]: 0.5}
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
    if name != "segmentation":
        assert (output.grad[0, :, 1, 1] == 0).all()
    assert (output.grad[..., 2:, :] != 0).any()


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_without_valid_pixels_has_loss_zero(name: str) -> None:
    output = output_of(name).requires_grad_()
    target = torch.full_like(target_of(name), 255 if name == "segmentation" else 0)
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


@pytest.mark.parametrize("name", TASKS)
def test_a_prediction_is_drawn_like_a_stored_target(name: str) -> None:
    prediction = TASKS[name].predict(output_of(name), (8, 12))[0].numpy()
    stored = {
        "segmentation": lambda: prediction.astype(np.uint8),
        "depth": lambda: prediction[0],
        "normals": lambda: np.moveaxis(prediction, 0, -1),
    }[name]()
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
        ({"kind": "depth", "num_classes": 3}, "num_classes belongs to segmentation, got 3"),
        ({"kind": "depth", "loss_weight": -1.0}, "loss_weight must be finite and 0 or more"),
        ({"kind": "depth", "loss_weight": math.inf}, "loss_weight must be finite and 0 or more"),
        (
            {"kind": "depth", "relative_weight": -1.0},
            "relative_weight must be finite and 0 or more",
        ),
        ({"kind": "depth", "scale": 0.0}, "scale must be finite and above 0, got 0"),
        (
            {"kind": "normals", "scale": 2.0},
            "relative_weight and scale belong to depth, got 0.0 and",
        ),
        ({"kind": "normals", "relative_weight": 0.1}, "relative_weight and scale belong to depth"),
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
    ],
)
def test_an_array_that_is_no_map_of_the_task_is_not_drawn(name: str, shape: tuple) -> None:
    with pytest.raises(ValueError, match=f"task {name}: expected one {name} map with"):
        TASKS[name].picture(np.zeros(shape, dtype=np.uint8))


def test_a_label_without_a_colour_is_refused() -> None:
    with pytest.raises(ValueError, match="picture: label 5 in 4 pixels"):
        TASKS["segmentation"].picture(np.full((2, 2), 5, dtype=np.uint8))
