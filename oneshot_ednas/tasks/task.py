"""Tasks: what a network output means, how it is trained, scored and shown.

`TASK_KINDS` is the only place that lists the kinds of task; a new kind is one more row. A network
gives each task a raw map at a coarse stride; a `Task` resizes it (bilinearly) to its target,
decodes it, leaves out invalid pixels, and hands it to the loss or the metrics.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from oneshot_ednas.schema import nearest
from oneshot_ednas.tasks import losses, metrics, pictures


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Settings of one task."""

    kind: str
    """One of `TASK_KINDS`: segmentation, depth or normals."""

    num_classes: int | None = None
    """Number of classes, 2..255; for segmentation, and only there."""

    loss_weight: float = 1.0
    """Factor of this task's loss in the sum over tasks."""

    relative_weight: float = 0.0
    """Depth: lambda of JAReD, in metres; 0 is plain L1. EDNAS lists the factors of both terms:
    L1 0.95 and relative 0.05 are `loss_weight` 0.95 and `relative_weight` 0.05 / 0.95."""

    scale: float = 1.0
    """Depth: metres per unit of network output."""

    reward_weights: dict[str, float] | None = None
    """Weight of each metric in the reward (w_ij of eq. 7); null gives the kind's reward metrics
    weight 1. Metrics that are not named do not enter."""

    def __post_init__(self) -> None:
        """Check every value against the kind."""
        if self.kind not in TASK_KINDS:
            raise ValueError(f"unknown task kind {self.kind}; {nearest(self.kind, TASK_KINDS)}")
        self._check_num_classes()
        _check_number("loss_weight", self.loss_weight, self.loss_weight >= 0, "0 or more")
        _check_number(
            "relative_weight", self.relative_weight, self.relative_weight >= 0, "0 or more"
        )
        _check_number("scale", self.scale, self.scale > 0, "above 0")
        if not TASK_KINDS[self.kind].is_metric_depth and (self.relative_weight, self.scale) != (
            0,
            1,
        ):
            raise ValueError(
                f"relative_weight and scale belong to depth, got {self.relative_weight} and "
                f"{self.scale} for kind {self.kind}; remove them"
            )
        self._check_reward_weights()

    def _check_num_classes(self) -> None:
        if not TASK_KINDS[self.kind].has_classes:
            if self.num_classes is not None:
                raise ValueError(
                    f"num_classes belongs to segmentation, got {self.num_classes} for kind "
                    f"{self.kind}; remove it"
                )
        elif self.num_classes is None or not 2 <= self.num_classes <= losses.INVALID_LABEL:
            raise ValueError(
                f"num_classes of a {self.kind} task must be in 2..{losses.INVALID_LABEL}, "
                f"got {self.num_classes}"
            )

    def _check_reward_weights(self) -> None:
        if self.reward_weights is None:
            return
        known = TASK_KINDS[self.kind].metric_names
        for name, weight in self.reward_weights.items():
            if name not in known:
                raise ValueError(
                    f"reward_weights: no {self.kind} metric {name}; {nearest(name, known)}"
                )
            _check_number(f"reward_weights.{name}", weight, weight >= 0, "0 or more")
        if not any(self.reward_weights.values()):
            raise ValueError("reward_weights must give at least one metric a weight above 0")


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """One row of `TASK_KINDS`: everything that differs between kinds of task."""

    target_kind: str
    """The row of the targets it learns from, in `data.targets.TARGET_KINDS`."""

    metric_names: tuple[str, ...]
    """All metric names, as `new_metrics` computes them."""

    reward_metrics: tuple[str, ...]
    """The metrics that enter the reward by default."""

    lower_is_better: frozenset[str]
    """The metrics that are errors."""

    out_channels: Callable[[TaskConfig], int]
    """Channels of the network output."""

    decode: Callable[[Tensor, TaskConfig], Tensor]
    """Resized network output to what loss and distillation compare; differentiable."""

    predict: Callable[[Tensor], Tensor]
    """Decoded output to the prediction that is scored and shown."""

    loss: Callable[[Tensor, Tensor, TaskConfig], Tensor]
    """(decoded output, target, config) to a scalar."""

    distillation_loss: Callable[[Tensor, Tensor], Tensor]
    """(decoded output of the student, of the teacher) to a scalar."""

    new_metrics: Callable[[TaskConfig], metrics.PooledMetrics]
    """Empty sums for one split."""

    picture: Callable[[np.ndarray, TaskConfig], np.ndarray]
    """Map in the layout of the data set to RGB."""

    has_classes: bool = False
    """Whether the targets are class indices, without a channel axis."""

    is_metric_depth: bool = False
    """Whether `scale` and `relative_weight` apply."""


class TaskMetrics:
    """Metrics of one task over a split, fed with raw network outputs."""

    def __init__(self, task: "Task") -> None:
        """Start with nothing added."""
        self._task = task
        self._pooled = TASK_KINDS[task.kind].new_metrics(task.config)

    @property
    def num_invalid_frames(self) -> int:
        """Frames without a valid pixel; known after `compute`."""
        return self._pooled.num_invalid_frames

    @torch.no_grad()
    def update(self, output_raw: Tensor, target: Tensor) -> None:
        """Add a batch: raw network output and this task's target."""
        self._task.check_target(output_raw, target)
        size = (target.shape[-2], target.shape[-1])
        self._pooled.update(self._task.predict(output_raw, size), target)

    def compute(self) -> dict[str, float]:
        """Scores of everything added so far.

        Raises:
            ValueError: naming the task, if no pixel was valid or a label was out of range.
        """
        try:
            return self._pooled.compute()
        except ValueError as error:
            raise ValueError(f"task {self._task.name}: {error}") from None


@dataclass(frozen=True)
class Task:
    """A named task; build it with `make_task`."""

    name: str
    """Key of the task in batches, network outputs and results."""

    config: TaskConfig
    """Its settings."""

    @property
    def kind(self) -> str:
        """Its row in `TASK_KINDS`."""
        return self.config.kind

    @property
    def out_channels(self) -> int:
        """Channels that the network must give this task."""
        return TASK_KINDS[self.kind].out_channels(self.config)

    @property
    def loss_weight(self) -> float:
        """Factor of `loss` in the sum over tasks; not applied by `loss` itself."""
        return self.config.loss_weight

    @property
    def reward_metrics(self) -> dict[str, float]:
        """Weight of each metric that enters the reward."""
        if self.config.reward_weights is not None:
            return dict(self.config.reward_weights)
        return dict.fromkeys(TASK_KINDS[self.kind].reward_metrics, 1.0)

    @property
    def lower_is_better(self) -> frozenset[str]:
        """Those of its metrics that are errors."""
        return TASK_KINDS[self.kind].lower_is_better

    def loss(
        self, output_raw: Float[Tensor, "batch channels rows columns"], target: Tensor
    ) -> Float[Tensor, ""]:
        """Training loss at the target's resolution, before `loss_weight`.

        Args:
            output_raw: network output at any stride.
            target: int64 [batch, height, width] for segmentation, else float32
                [batch, channels, height, width]; invalid pixels as the data contract says.

        Raises:
            ValueError: if output and target do not belong together.
        """
        self.check_target(output_raw, target)
        decoded = self._decode(_resize(output_raw, (target.shape[-2], target.shape[-1])))
        return TASK_KINDS[self.kind].loss(decoded, target, self.config)

    def distillation_loss(
        self,
        student_raw: Float[Tensor, "batch channels rows columns"],
        teacher_raw: Float[Tensor, "batch channels rows columns"],
    ) -> Float[Tensor, ""]:
        """Distance of two raw outputs, at their own resolution; the teacher gets no gradient.

        Raises:
            ValueError: if the shapes differ.
        """
        if student_raw.shape != teacher_raw.shape:
            raise ValueError(
                f"task {self.name}: expected student and teacher outputs of one shape, "
                f"got {tuple(student_raw.shape)} and {tuple(teacher_raw.shape)}"
            )
        student = self._decode(_in_full_precision(student_raw))
        teacher = self._decode(_in_full_precision(teacher_raw.detach()))
        return TASK_KINDS[self.kind].distillation_loss(student, teacher)

    def predict(
        self, output_raw: Float[Tensor, "batch channels rows columns"], size: tuple[int, int]
    ) -> Tensor:
        """Prediction at full size, for metrics and pictures.

        Args:
            output_raw: network output at any stride.
            size: height and width of the result.

        Returns:
            Segmentation: int64 classes [batch, height, width]. Depth: metres, at least 0,
            [batch, 1, height, width]. Normals: unit vectors [batch, 3, height, width].
        """
        return TASK_KINDS[self.kind].predict(self._decode(_resize(output_raw, size)))

    def new_metric(self) -> TaskMetrics:
        """Empty metrics; `update` takes (raw output, target), `compute` gives the scores."""
        return TaskMetrics(self)

    def picture(self, values: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
        """One map as RGB; invalid pixels are black.

        The colours of depths span the nearest to the farthest pixel: join maps side by side before
        drawing them where their colours shall be comparable.

        Args:
            values: a target as stored ([H, W], [H, W] or [H, W, 3]), or one frame of a batch
                or prediction ([H, W], [1, H, W] or [3, H, W]).

        Raises:
            ValueError: for another shape, or labels out of range.
        """
        return TASK_KINDS[self.kind].picture(_channels_last(values, self), self.config)

    def check_target(self, output_raw: Tensor, target: Tensor) -> None:
        """Refuse an output or a target whose shape this task does not have.

        Raises:
            ValueError: naming both shapes.
        """
        channels = self.out_channels
        middle = () if TASK_KINDS[self.kind].has_classes else (channels,)
        expected = (output_raw.shape[0], *middle, *target.shape[-2:])
        if output_raw.ndim != 4 or output_raw.shape[1] != channels or target.shape != expected:
            axes = ", ".join(["batch", *map(str, middle), "height, width"])
            raise ValueError(
                f"task {self.name}: expected output [batch, {channels}, rows, columns] and target "
                f"[{axes}], got {tuple(output_raw.shape)} and {tuple(target.shape)}"
            )

    def _decode(self, output: Tensor) -> Tensor:
        return TASK_KINDS[self.kind].decode(output, self.config)


def make_task(name: str, config: TaskConfig) -> Task:
    """The task of that name.

    Raises:
        ValueError: if the name is empty.
    """
    if not name:
        raise ValueError("a task needs a name, got an empty one")
    return Task(name, config)


def make_tasks(configs: Mapping[str, TaskConfig]) -> dict[str, Task]:
    """One task per entry, in the given order.

    Raises:
        ValueError: if there is none.
    """
    if not configs:
        raise ValueError("expected at least one task, got none; name one under tasks")
    return {name: make_task(name, config) for name, config in configs.items()}


def _in_full_precision(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _resize(output: Tensor, size: tuple[int, int]) -> Tensor:
    # Half precision would round metres and logits before they are compared with the target.
    full = _in_full_precision(output)
    return F.interpolate(full, size=size, mode="bilinear", align_corners=False)


def _depth_loss(pred: Tensor, target: Tensor, config: TaskConfig) -> Tensor:
    valid = metrics.valid_depth(target)
    if config.relative_weight == 0:
        return losses.depth_l1(pred, target, valid)
    return losses.jared(pred, target, valid, config.relative_weight)


def _normals_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    everywhere = torch.ones_like(teacher[:, :1], dtype=torch.bool)
    return losses.inverse_cosine_similarity(student, teacher, everywhere)


def _num_classes(config: TaskConfig) -> int:
    assert config.num_classes is not None, "TaskConfig checks that segmentation has classes"
    return config.num_classes


def _check_number(name: str, value: float, is_in_range: bool, expected: str) -> None:
    if not (is_in_range and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and {expected}, got {value}")


def _channels_last(values: np.ndarray, task: Task) -> np.ndarray:
    """A map without a channel axis, or vectors on the last axis."""
    num_channels = 1 if TASK_KINDS[task.kind].has_classes else task.out_channels
    if num_channels == 1 and values.ndim == 3 and values.shape[0] == 1:
        return values[0]
    if num_channels == 1 and values.ndim == 2:
        return values
    if num_channels > 1 and values.ndim == 3 and values.shape[-1] == num_channels:
        return values
    if num_channels > 1 and values.ndim == 3 and values.shape[0] == num_channels:
        return np.moveaxis(values, 0, -1)
    raise ValueError(
        f"task {task.name}: expected one {task.kind} map with {num_channels} channels to draw, "
        f"got an array of shape {values.shape}"
    )


TASK_KINDS: dict[str, TaskKind] = {
    "segmentation": TaskKind(
        target_kind="labels",
        metric_names=metrics.SEGMENTATION_METRICS,
        reward_metrics=("miou", "pixel_accuracy"),
        lower_is_better=frozenset(),
        out_channels=_num_classes,
        decode=lambda logits, config: logits,
        predict=lambda logits: logits.argmax(dim=1),
        loss=lambda logits, target, config: losses.cross_entropy(logits, target),
        distillation_loss=losses.soft_cross_entropy,
        new_metrics=lambda config: metrics.segmentation_metrics(_num_classes(config)),
        picture=lambda labels, config: pictures.segmentation_picture(labels, _num_classes(config)),
        has_classes=True,
    ),
    "depth": TaskKind(
        target_kind="depth",
        metric_names=metrics.DEPTH_METRICS,
        reward_metrics=("absolute_error", "relative_error"),
        lower_is_better=frozenset({"absolute_error", "relative_error", "rmse"}),
        out_channels=lambda config: 1,
        decode=lambda output, config: output * config.scale,
        predict=lambda depth_m: depth_m.clamp_min(0),
        loss=_depth_loss,
        distillation_loss=F.l1_loss,
        new_metrics=lambda config: metrics.depth_metrics(),
        picture=lambda depth_m, config: pictures.depth_picture(depth_m),
        is_metric_depth=True,
    ),
    "normals": TaskKind(
        target_kind="normals",
        metric_names=metrics.NORMALS_METRICS,
        reward_metrics=metrics.NORMALS_METRICS,
        lower_is_better=frozenset({"mean_angle_deg"}),
        out_channels=lambda config: 3,
        decode=lambda output, config: output,
        predict=losses.normalise,
        loss=lambda pred, target, config: losses.inverse_cosine_similarity(
            pred, target, metrics.valid_normals(target)
        ),
        distillation_loss=_normals_distillation,
        new_metrics=lambda config: metrics.normals_metrics(),
        picture=lambda normals, config: pictures.normals_picture(normals),
    ),
}

LOWER_IS_BETTER = frozenset().union(*(kind.lower_is_better for kind in TASK_KINDS.values()))
"""Every known metric that is an error."""

REWARD_METRICS = frozenset(name for kind in TASK_KINDS.values() for name in kind.reward_metrics)
"""Every metric that enters the reward by default."""
