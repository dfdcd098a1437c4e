"""Tasks: what a network output means, how it is trained, scored and shown.

A network gives each task a raw map at a coarse stride; a `Task` resizes it (bilinearly) to its
target, decodes it, leaves out invalid pixels, and hands it to the loss or the metrics of its kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from oneshot_ednas.tasks.kinds import TaskConfig, TaskKind, task_kind


class TaskMetrics:
    """Metrics of one task over a split, fed with raw network outputs."""

    def __init__(self, task: "Task") -> None:
        """Start with nothing added."""
        self._task = task
        self._pooled = task.row.metrics[task.config.convention].new(task.config)

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
        """Name of its kind."""
        return self.config.kind

    @property
    def row(self) -> TaskKind:
        """Everything that its kind decides."""
        return task_kind(self.config.kind)

    @property
    def target(self) -> str:
        """The target of a data set that it learns from; in batches it has the task's name."""
        return self.config.target or self.name

    @property
    def num_classes(self) -> int | None:
        """Number of classes that its target must have, None where it has no classes."""
        return self.config.num_classes or self.row.num_classes

    @property
    def out_channels(self) -> int:
        """Channels that the network must give this task."""
        return self.row.out_channels(self.config)

    @property
    def loss_weight(self) -> float:
        """Factor of `loss` in the sum over tasks; not applied by `loss` itself."""
        return self.config.loss_weight

    @property
    def reward_metrics(self) -> dict[str, float]:
        """Weight of each metric that enters the reward."""
        if self.config.reward_weights is not None:
            return dict(self.config.reward_weights)
        names = self.config.metric_names
        # A convention may have none of the kind's usual metrics.
        entering = [name for name in self.row.reward_metrics if name in names] or names
        return dict.fromkeys(entering, 1.0)

    @property
    def lower_is_better(self) -> frozenset[str]:
        """Those of its metrics that are errors."""
        return self.row.lower_is_better & set(self.config.metric_names)

    def loss(
        self, output_raw: Float[Tensor, "batch channels rows columns"], target: Tensor
    ) -> Float[Tensor, ""]:
        """Training loss at the target's resolution, before `loss_weight`.

        Args:
            output_raw: network output at any stride.
            target: int64 [batch, height, width] for labels and edges, else float32
                [batch, channels, height, width]; invalid pixels as `data.targets` says.

        Raises:
            ValueError: if output and target do not belong together.
        """
        self.check_target(output_raw, target)
        decoded = self._decode(_resize(output_raw, (target.shape[-2], target.shape[-1])))
        return self.row.loss(decoded, target, self.config)

    def loss_divisor(self, target: Tensor) -> Float[Tensor, ""] | None:
        """Weight of a part of a batch: the loss of the whole is the weighted mean of its parts'.

        None if it is no such mean, see `TaskKind.divisor`.
        """
        divisor = self.row.divisor(target, self.config)
        return None if divisor is None else divisor.float()

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
        return self.row.distillation_loss(student, teacher)

    def predict(
        self, output_raw: Float[Tensor, "batch channels rows columns"], size: tuple[int, int]
    ) -> Tensor:
        """Prediction at full size, for metrics and pictures.

        Args:
            output_raw: network output at any stride.
            size: height and width of the result.

        Returns:
            A map of the target's shape. Segmentation, human parts: int64 classes. Saliency, edges:
            probabilities. Depth and log depth: metres, at least 0. Disparity, heat maps: in the
            unit of the target. Normals: unit vectors.
        """
        return self.row.predict(self._decode(_resize(output_raw, size)))

    def new_metric(self) -> TaskMetrics:
        """Empty metrics; `update` takes (raw output, target), `compute` gives the scores."""
        return TaskMetrics(self)

    def picture(self, values: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
        """One map as RGB; invalid pixels are black.

        The colours of depths, disparities and heat maps span the values of the map: join maps side
        by side before drawing them where their colours shall be comparable, see `in_range_of`.

        Args:
            values: a target as stored ([H, W], [H, W] or [H, W, 3]), or one frame of a batch
                or prediction ([H, W], [1, H, W] or [3, H, W]).

        Raises:
            ValueError: for another shape, or labels out of range.
        """
        return self.row.picture(_channels_last(values, self), self.config)

    def in_range_of(self, target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """The prediction, limited to the values of the target if colours span those of a map.

        One stray pixel would take most of the colours of a joined picture for itself.
        """
        if self.row.spans is None:
            return prediction
        values = self.row.spans(target)
        known = values[np.isfinite(values)]
        return prediction.clip(known.min(), known.max()) if known.size else prediction

    def check_target(self, output_raw: Tensor, target: Tensor) -> None:
        """Refuse an output or a target whose shape this task does not have.

        Raises:
            ValueError: naming both shapes.
        """
        channels = self.out_channels
        middle = () if self.row.target_channels == 0 else (self.row.target_channels,)
        expected = (output_raw.shape[0], *middle, *target.shape[-2:])
        if output_raw.ndim != 4 or output_raw.shape[1] != channels or target.shape != expected:
            axes = ", ".join(["batch", *map(str, middle), "height, width"])
            raise ValueError(
                f"task {self.name}: expected output [batch, {channels}, rows, columns] and target "
                f"[{axes}], got {tuple(output_raw.shape)} and {tuple(target.shape)}"
            )

    def _decode(self, output: Tensor) -> Tensor:
        return self.row.decode(output, self.config)


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
        ValueError: if there is none, or if a metric is an error to one task and none to another.
    """
    if not configs:
        raise ValueError("expected at least one task, got none; name one under tasks")
    tasks = {name: make_task(name, config) for name, config in configs.items()}
    errors = lower_is_better(tasks)
    for task in tasks.values():
        if wrong := (errors & set(task.config.metric_names)) - task.lower_is_better:
            raise ValueError(
                f"task {task.name}: {min(wrong)} is an error to another task and none to this one; "
                f"rename it in one of the two kinds"
            )
    return tasks


def lower_is_better(tasks: Mapping[str, Task]) -> frozenset[str]:
    """The metrics that are errors to any of the tasks, those of kinds of your own included."""
    return frozenset().union(*(task.lower_is_better for task in tasks.values()))


def _in_full_precision(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _resize(output: Tensor, size: tuple[int, int]) -> Tensor:
    # Half precision would round metres and logits before they are compared with the target.
    full = _in_full_precision(output)
    return F.interpolate(full, size=size, mode="bilinear", align_corners=False)


def _channels_last(values: np.ndarray, task: Task) -> np.ndarray:
    """A map without a channel axis, or vectors on the last axis."""
    num_channels = max(task.row.target_channels, 1)
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
