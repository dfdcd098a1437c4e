"""Kinds of task, and the settings of one task.

`TASK_KINDS` is the only place that lists the kinds; a new one is one more row. A kind of your own
needs no change here: name it `package.module:NAME` in a config, where NAME is a `TaskKind`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_ednas.constants import constant
from oneshot_ednas.schema import imported, nearest
from oneshot_ednas.tasks import conventions, edges, losses, metrics, pictures


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Settings of one task."""

    kind: str
    """One of `TASK_KINDS` (segmentation, human_parts, saliency, edges, depth, log_depth, disparity,
    normals, heatmap), or your own as `package.module:NAME`."""

    target: str | None = None
    """The target of the data set that it learns from; null is the one of the task's name."""

    num_classes: int | None = None
    """Number of classes, 2..255; for segmentation and human parts, and only there."""

    class_weights: tuple[float, ...] | None = None
    """Weight of each class in the cross entropy, 0 or more; null weighs all pixels alike."""

    loss_weight: float = 1.0
    """Factor of this task's loss in the sum over tasks."""

    relative_weight: float = 0.0
    """Depth and disparity: lambda of JAReD, in the unit of the target (metres for depth); 0 is
    plain L1. EDNAS lists the factors of both terms: L1 0.95 and relative 0.05 are `loss_weight`
    0.95 and `relative_weight` 0.05 / 0.95."""

    scale: float = 1.0
    """Depth, disparity, heat maps: unit of the target (metres for depth) per unit of network
    output."""

    positive_weight: float | None = None
    """Edges and saliency: weight of positive pixels in the cross entropy, between 0 and 1; negative
    ones have the rest. Null is 0.95 for edges, and the share of negative pixels in the batch for
    saliency."""

    max_distance: float = 0.0075
    """Edges: how far a predicted pixel may lie from the true one it counts for, as a share of the
    image diagonal; .0075 on BSDS and PASCAL, .011 on NYUD."""

    convention: str = "ours"
    """How the metrics are counted: ours, or as another paper does (`tasks.conventions`)."""

    reward_weights: dict[str, float] | None = None
    """Weight of each metric in the reward (w_ij of eq. 7); null gives the kind's reward metrics
    weight 1. Metrics that are not named do not enter."""

    def __post_init__(self) -> None:
        """Check every value against the kind."""
        kind = task_kind(self.kind)
        for name in sorted(_OWN_SETTINGS - kind.settings):
            value = getattr(self, name)
            if value != _DEFAULTS[name]:
                raise ValueError(
                    f"{name} belongs to {_kinds_with(name)}, got {value} for kind {self.kind}; "
                    f"remove it"
                )
        self._check_classes(kind)
        for name in ("loss_weight", "relative_weight"):
            value = getattr(self, name)
            _check_number(name, value, value >= 0, "0 or more")
        for name in ("scale", "max_distance"):
            value = getattr(self, name)
            _check_number(name, value, value > 0, "above 0")
        if (weight := self.positive_weight) is not None:
            _check_number("positive_weight", weight, 0 < weight < 1, "between 0 and 1")
        if self.convention not in kind.metrics:
            raise ValueError(
                f"kind {self.kind} has no metrics by the convention {self.convention}; "
                f"known: {', '.join(kind.metrics)}"
            )
        self._check_reward_weights()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """All metrics of the task, by its convention."""
        return task_kind(self.kind).metrics[self.convention].names

    def _check_classes(self, kind: "TaskKind") -> None:
        if not kind.has_classes:
            return
        if self.num_classes is None or not 2 <= self.num_classes <= losses.INVALID_LABEL:
            raise ValueError(
                f"num_classes of a {self.kind} task must be in 2..{losses.INVALID_LABEL}, "
                f"got {self.num_classes}"
            )
        if self.class_weights is None:
            return
        if len(self.class_weights) != self.num_classes:
            raise ValueError(
                f"class_weights: expected one for each of {self.num_classes} classes, "
                f"got {len(self.class_weights)}"
            )
        for index, weight in enumerate(self.class_weights):
            _check_number(f"class_weights[{index}]", weight, weight >= 0, "0 or more")
        if not any(self.class_weights):
            raise ValueError("class_weights must give at least one class a weight above 0")

    def _check_reward_weights(self) -> None:
        if self.reward_weights is None:
            return
        known = self.metric_names
        for name, weight in self.reward_weights.items():
            if name not in known:
                raise ValueError(
                    f"reward_weights: no {self.kind} metric {name}; {nearest(name, known)}"
                )
            _check_number(f"reward_weights.{name}", weight, weight >= 0, "0 or more")
        if not any(self.reward_weights.values()):
            raise ValueError("reward_weights must give at least one metric a weight above 0")


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TaskConfig)}
_OWN_SETTINGS = frozenset(
    {
        "num_classes",
        "class_weights",
        "relative_weight",
        "scale",
        "positive_weight",
        "max_distance",
    }
)
# The settings that only some kinds have; the others belong to all.


@dataclass(frozen=True, kw_only=True)
class MetricSet:
    """The metrics of a kind by one convention."""

    names: tuple[str, ...]
    """Names, as `new` computes them."""

    new: Callable[[TaskConfig], metrics.PooledMetrics]
    """Empty sums for one split."""


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """One row of `TASK_KINDS`: everything that differs between kinds of task."""

    target_kind: str
    """The row of the targets it learns from, in `data.targets.TARGET_KINDS`."""

    target_channels: int
    """Channels of the target; 0 if it has no channel axis, as class indices."""

    metrics: Mapping[str, MetricSet]
    """Metrics by convention; `ours` is the default and must be there."""

    reward_metrics: tuple[str, ...]
    """The metrics that enter the reward by default."""

    lower_is_better: frozenset[str]
    """The metrics that are errors, by any convention."""

    out_channels: Callable[[TaskConfig], int]
    """Channels of the network output."""

    decode: Callable[[Tensor, TaskConfig], Tensor]
    """Resized network output to what loss and distillation compare; differentiable."""

    predict: Callable[[Tensor], Tensor]
    """Decoded output to the prediction that is scored and shown, in the shape of the target."""

    loss: Callable[[Tensor, Tensor, TaskConfig], Tensor]
    """(decoded output, target, config) to a scalar."""

    distillation_loss: Callable[[Tensor, Tensor], Tensor]
    """(decoded output of the student, of the teacher) to a scalar, a mean over the frames."""

    divisor: Callable[[Tensor, TaskConfig], Tensor | None] = lambda target, config: None
    """(target, config) to what `loss` divides a sum over pixels by, such as the number of valid
    ones, so that losses of parts of a batch have a mean; None where the loss is no such mean: then
    each of several processes computes it on the whole batch."""

    picture: Callable[[np.ndarray, TaskConfig], np.ndarray]
    """Map in the layout of the data set to RGB."""

    spans: Callable[[np.ndarray], np.ndarray] | None = None
    """Map to the values that its colours span, NaN where it has none; None if the colours of a
    value are the same in every map."""

    num_classes: int | None = None
    """Number of classes that its labels must have, where that is no setting."""

    settings: frozenset[str] = frozenset()
    """The fields of `TaskConfig` that not every kind has, and this one has."""

    def __post_init__(self) -> None:
        """Check that the row agrees with itself.

        Raises:
            ValueError: naming what does not.
        """
        names = {name for found in self.metrics.values() for name in found.names}
        for what, given, known in (
            ("metrics", {"ours"}, set(self.metrics)),
            ("reward_metrics", set(self.reward_metrics), names),
            ("lower_is_better", set(self.lower_is_better), names),
            ("settings", set(self.settings), set(_OWN_SETTINGS)),
        ):
            if missing := given - known:
                raise ValueError(
                    f"{what} of a task kind: no {', '.join(sorted(missing))} "
                    f"among {', '.join(sorted(known)) or 'none'}"
                )

    @property
    def metric_names(self) -> frozenset[str]:
        """All metrics, by any convention."""
        return frozenset(name for found in self.metrics.values() for name in found.names)

    @property
    def has_classes(self) -> bool:
        """Whether a config says how many classes there are."""
        return "num_classes" in self.settings


def task_kind(name: str) -> TaskKind:
    """The kind of that name: a row of `TASK_KINDS`, or an object `package.module:NAME` of your own.

    Raises:
        ValueError: if there is none, if it is no `TaskKind`, or if it calls a metric an error that
            another kind has as a score, or the other way round.
    """
    if name in TASK_KINDS:
        return TASK_KINDS[name]
    if ":" not in name:
        raise ValueError(
            f"unknown task kind {name}; {nearest(name, TASK_KINDS)} (your own: package.module:NAME)"
        )
    return _imported(name)


@functools.cache
def _imported(name: str) -> TaskKind:
    kind: TaskKind = imported(name, TaskKind, what="task kind")
    for known, other in TASK_KINDS.items():
        shared = kind.metric_names & other.metric_names
        if wrong := shared & (kind.lower_is_better ^ other.lower_is_better):
            raise ValueError(
                f"task kind {name}: is {min(wrong)} an error or a score? {known} has one of that "
                f"name and sees it the other way; rename it"
            )
    return kind


def _kinds_with(setting: str) -> str:
    return ", ".join(name for name, kind in TASK_KINDS.items() if setting in kind.settings)


def _check_number(name: str, value: float, is_in_range: bool, expected: str) -> None:
    if not (is_in_range and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and {expected}, got {value}")


def _num_classes(config: TaskConfig) -> int:
    assert config.num_classes is not None, "TaskConfig checks that there are classes"
    return config.num_classes


def _depth_loss(pred: Tensor, target: Tensor, config: TaskConfig) -> Tensor:
    valid = metrics.valid_depth(target)
    if config.relative_weight == 0:
        return losses.depth_l1(pred, target, valid)
    return losses.jared(pred, target, valid, config.relative_weight)


def _normals_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    everywhere = torch.ones_like(teacher[:, :1], dtype=torch.bool)
    return losses.inverse_cosine_similarity(student, teacher, everywhere)


def _cross_entropy(logits: Tensor, target: Tensor, config: TaskConfig) -> Tensor:
    return losses.cross_entropy(logits, target, class_weights=config.class_weights)


def _labels_divisor(target: Tensor, config: TaskConfig) -> Tensor:
    if config.class_weights is None:
        return losses.label_weight(target)
    weights = constant(config.class_weights, torch.empty((), device=target.device))
    return losses.label_weight(target, class_weights=weights)


def _binary_divisor(target: Tensor, config: TaskConfig) -> Tensor | None:
    # Without a weight of its own, the loss takes the share of positive pixels in the whole batch.
    if config.positive_weight is None and config.kind != "edges":
        return None
    return losses.label_weight(target)


def _depth_divisor(target: Tensor, config: TaskConfig) -> Tensor:
    return metrics.valid_depth(target).sum()


def _edge_loss(logits: Tensor, target: Tensor, config: TaskConfig) -> Tensor:
    weight = 0.95 if config.positive_weight is None else config.positive_weight
    return losses.balanced_cross_entropy(logits, target, positive_weight=weight)


def _probability(logits: Tensor) -> Tensor:
    return logits.sigmoid().squeeze(1)


def _segmentation_picture(labels: np.ndarray, config: TaskConfig) -> np.ndarray:
    return pictures.segmentation_picture(labels, _num_classes(config))


_DEPTH_REWARD = ("absolute_error", "relative_error")
_DEPTH_ERRORS = frozenset({*_DEPTH_REWARD, "rmse"})

TASK_KINDS: dict[str, TaskKind] = {
    "segmentation": TaskKind(
        target_kind="labels",
        target_channels=0,
        metrics={
            "ours": MetricSet(
                names=metrics.SEGMENTATION_METRICS,
                new=lambda config: metrics.segmentation_metrics(_num_classes(config)),
            ),
            "adashare": MetricSet(
                names=metrics.SEGMENTATION_METRICS,
                new=lambda config: conventions.adashare_segmentation(_num_classes(config)),
            ),
            "adashare_cityscapes": MetricSet(
                names=metrics.SEGMENTATION_METRICS,
                new=lambda config: conventions.adashare_segmentation(
                    _num_classes(config), count_invalid=True
                ),
            ),
            "mtan": MetricSet(
                names=metrics.SEGMENTATION_METRICS,
                new=lambda config: conventions.mtan_segmentation(_num_classes(config)),
            ),
            "astmt": MetricSet(
                names=("miou",),
                new=lambda config: conventions.astmt_segmentation(_num_classes(config)),
            ),
        },
        reward_metrics=("miou", "pixel_accuracy"),
        lower_is_better=frozenset(),
        out_channels=_num_classes,
        decode=lambda logits, config: logits,
        predict=lambda logits: logits.argmax(dim=1),
        loss=_cross_entropy,
        divisor=_labels_divisor,
        distillation_loss=losses.soft_cross_entropy,
        picture=_segmentation_picture,
        settings=frozenset({"num_classes", "class_weights"}),
    ),
    "human_parts": TaskKind(
        target_kind="labels",
        target_channels=0,
        metrics={
            "ours": MetricSet(
                names=("miou",),
                new=lambda config: metrics.segmentation_metrics(_num_classes(config), num_names=1),
            ),
            "astmt": MetricSet(
                names=("miou",),
                new=lambda config: conventions.astmt_human_parts(_num_classes(config)),
            ),
        },
        reward_metrics=("miou",),
        lower_is_better=frozenset(),
        out_channels=_num_classes,
        decode=lambda logits, config: logits,
        predict=lambda logits: logits.argmax(dim=1),
        loss=_cross_entropy,
        divisor=_labels_divisor,
        distillation_loss=losses.soft_cross_entropy,
        picture=_segmentation_picture,
        settings=frozenset({"num_classes", "class_weights"}),
    ),
    "saliency": TaskKind(
        target_kind="labels",
        num_classes=2,
        target_channels=0,
        metrics=dict.fromkeys(
            ("ours", "astmt"),
            MetricSet(
                names=metrics.SALIENCY_METRICS, new=lambda config: metrics.saliency_metrics()
            ),
        ),
        reward_metrics=("iou",),
        lower_is_better=frozenset(),
        out_channels=lambda config: 1,
        decode=lambda logits, config: logits,
        predict=_probability,
        loss=lambda logits, target, config: losses.balanced_cross_entropy(
            logits, target, positive_weight=config.positive_weight
        ),
        divisor=_binary_divisor,
        distillation_loss=losses.soft_binary_cross_entropy,
        picture=lambda values, config: pictures.binary_picture(values),
        settings=frozenset({"positive_weight"}),
    ),
    "edges": TaskKind(
        target_kind="edges",
        target_channels=0,
        metrics=dict.fromkeys(
            ("ours", "astmt"),
            MetricSet(
                names=edges.EDGE_METRICS,
                new=lambda config: edges.edge_metrics(config.max_distance),
            ),
        ),
        reward_metrics=edges.EDGE_METRICS,
        lower_is_better=frozenset(),
        out_channels=lambda config: 1,
        decode=lambda logits, config: logits,
        predict=_probability,
        loss=_edge_loss,
        divisor=_binary_divisor,
        distillation_loss=losses.soft_binary_cross_entropy,
        picture=lambda values, config: pictures.binary_picture(values),
        settings=frozenset({"positive_weight", "max_distance"}),
    ),
    "depth": TaskKind(
        target_kind="depth",
        target_channels=1,
        metrics={
            "ours": MetricSet(
                names=metrics.DEPTH_METRICS, new=lambda config: metrics.depth_metrics()
            ),
            "adashare": MetricSet(
                names=conventions.ADASHARE_DEPTH_METRICS,
                new=lambda config: conventions.adashare_depth(),
            ),
            "mtan": MetricSet(
                names=conventions.MTAN_DEPTH_METRICS, new=lambda config: conventions.mtan_depth()
            ),
            "astmt": MetricSet(
                names=conventions.ASTMT_DEPTH_METRICS, new=lambda config: conventions.astmt_depth()
            ),
        },
        reward_metrics=_DEPTH_REWARD,
        lower_is_better=_DEPTH_ERRORS,
        out_channels=lambda config: 1,
        decode=lambda output, config: output * config.scale,
        predict=lambda depth_m: depth_m.clamp_min(0),
        loss=_depth_loss,
        divisor=_depth_divisor,
        distillation_loss=F.l1_loss,
        picture=lambda depth_m, config: pictures.depth_picture(depth_m),
        spans=pictures.positive,
        settings=frozenset({"relative_weight", "scale"}),
    ),
    "log_depth": TaskKind(
        target_kind="depth",
        target_channels=1,
        metrics={
            "ours": MetricSet(
                names=metrics.LOG_DEPTH_METRICS, new=lambda config: metrics.log_depth_metrics()
            ),
            "adashare": MetricSet(
                names=("log_absolute_error",),
                new=lambda config: conventions.adashare_log_depth(),
            ),
        },
        reward_metrics=("log_absolute_error", *_DEPTH_REWARD),
        lower_is_better=_DEPTH_ERRORS | {"log_absolute_error"},
        out_channels=lambda config: 1,
        decode=lambda output, config: output,
        predict=losses.depth_of_log,
        loss=lambda pred, target, config: losses.log_depth_l1(
            pred, target, metrics.valid_depth(target)
        ),
        divisor=_depth_divisor,
        distillation_loss=F.l1_loss,
        picture=lambda depth_m, config: pictures.depth_picture(depth_m),
        spans=pictures.positive,
    ),
    "disparity": TaskKind(
        target_kind="disparity",
        target_channels=1,
        metrics={
            "ours": MetricSet(
                names=metrics.DISPARITY_METRICS, new=lambda config: metrics.disparity_metrics()
            ),
            **dict.fromkeys(
                ("adashare", "adashare_cityscapes"),
                MetricSet(
                    names=metrics.DISPARITY_METRICS,
                    new=lambda config: conventions.adashare_disparity(),
                ),
            ),
            "mtan": MetricSet(
                names=metrics.DISPARITY_METRICS, new=lambda config: conventions.mtan_depth()
            ),
        },
        reward_metrics=_DEPTH_REWARD,
        lower_is_better=frozenset(_DEPTH_REWARD),
        out_channels=lambda config: 1,
        decode=lambda output, config: output * config.scale,
        predict=lambda disparity: disparity.clamp_min(0),
        loss=_depth_loss,
        divisor=_depth_divisor,
        distillation_loss=F.l1_loss,
        picture=lambda disparity, config: pictures.disparity_picture(disparity),
        spans=pictures.positive,
        settings=frozenset({"relative_weight", "scale"}),
    ),
    "normals": TaskKind(
        target_kind="normals",
        target_channels=3,
        metrics={
            **dict.fromkeys(
                ("ours", "astmt"),
                MetricSet(
                    names=metrics.NORMALS_METRICS, new=lambda config: metrics.normals_metrics()
                ),
            ),
            "adashare": MetricSet(
                names=metrics.NORMALS_METRICS, new=lambda config: conventions.adashare_normals()
            ),
            "mtan": MetricSet(
                names=metrics.NORMALS_METRICS, new=lambda config: conventions.mtan_normals()
            ),
        },
        reward_metrics=metrics.NORMALS_METRICS,
        lower_is_better=frozenset({"mean_angle_deg"}),
        out_channels=lambda config: 3,
        decode=lambda output, config: output,
        predict=losses.normalise,
        loss=lambda pred, target, config: losses.inverse_cosine_similarity(
            pred, target, metrics.valid_normals(target)
        ),
        divisor=lambda target, config: metrics.valid_normals(target).sum(),
        distillation_loss=_normals_distillation,
        picture=lambda normals, config: pictures.normals_picture(normals),
    ),
    "heatmap": TaskKind(
        target_kind="values",
        target_channels=1,
        metrics={
            "ours": MetricSet(
                names=metrics.HEATMAP_METRICS, new=lambda config: metrics.heatmap_metrics()
            ),
            "adashare": MetricSet(
                names=metrics.HEATMAP_METRICS, new=lambda config: conventions.adashare_heatmap()
            ),
        },
        reward_metrics=metrics.HEATMAP_METRICS,
        lower_is_better=frozenset(metrics.HEATMAP_METRICS),
        out_channels=lambda config: 1,
        decode=lambda output, config: output * config.scale,
        predict=lambda values: values,
        loss=lambda pred, target, config: losses.l1(pred, target, torch.isfinite(target)),
        divisor=lambda target, config: torch.isfinite(target).sum(),
        distillation_loss=F.l1_loss,
        picture=lambda values, config: pictures.heatmap_picture(values),
        spans=lambda values: np.where(np.isfinite(values), values, np.nan),
        settings=frozenset({"scale"}),
    ),
}

LOWER_IS_BETTER = frozenset().union(*(kind.lower_is_better for kind in TASK_KINDS.values()))
"""Every metric of `TASK_KINDS` that is an error."""

REWARD_METRICS = frozenset(name for kind in TASK_KINDS.values() for name in kind.reward_metrics)
"""Every metric of `TASK_KINDS` that enters the reward by default."""
