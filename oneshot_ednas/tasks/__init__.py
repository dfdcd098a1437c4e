"""Dense prediction tasks: losses, metrics, and the one table of task kinds."""

from oneshot_ednas.tasks.metrics import check_labels
from oneshot_ednas.tasks.task import (
    LOWER_IS_BETTER,
    REWARD_METRICS,
    TASK_KINDS,
    Task,
    TaskConfig,
    TaskKind,
    TaskMetrics,
    make_task,
    make_tasks,
)

__all__ = [
    "LOWER_IS_BETTER",
    "REWARD_METRICS",
    "TASK_KINDS",
    "Task",
    "TaskConfig",
    "TaskKind",
    "TaskMetrics",
    "check_labels",
    "make_task",
    "make_tasks",
]
