"""Dense prediction tasks: losses, metrics, and the one table of task kinds."""

from oneshot_ednas.tasks.kinds import (
    LOWER_IS_BETTER,
    REWARD_METRICS,
    TASK_KINDS,
    MetricSet,
    TaskConfig,
    TaskKind,
    task_kind,
)
from oneshot_ednas.tasks.metrics import PooledMetrics, check_labels
from oneshot_ednas.tasks.task import Task, TaskMetrics, lower_is_better, make_task, make_tasks

__all__ = [
    "LOWER_IS_BETTER",
    "REWARD_METRICS",
    "TASK_KINDS",
    "MetricSet",
    "PooledMetrics",
    "Task",
    "TaskConfig",
    "TaskKind",
    "TaskMetrics",
    "check_labels",
    "lower_is_better",
    "make_task",
    "make_tasks",
    "task_kind",
]
