"""Where the time of a step goes, operator by operator."""

from functools import partial

from torch.profiler import ProfilerActivity, profile

from oneshot_ednas.performance.timing import Work, wait
from oneshot_ednas.performance.workload import Workload

NUM_OPERATORS = 25
NUM_STEPS = 2


def profile_tables(workload: Workload) -> dict[str, str]:
    """torch.profiler's tables of a weight step of the warm-up and of an alpha step, as text."""
    search = workload.search()
    steps = {
        "weight step": partial(search.take_step, 0),
        "alpha step": partial(search._alpha_step, search.config.warmup_steps),
    }
    return {f"{name}, {workload.size}": _table(workload, step) for name, step in steps.items()}


def _table(workload: Workload, work: Work) -> str:
    activities = [ProfilerActivity.CPU]
    if workload.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    work()
    with profile(activities=activities) as found:
        for _ in range(NUM_STEPS):
            work()
        wait(workload.device)
    by = f"self_{'cuda' if workload.device.type == 'cuda' else 'cpu'}_time_total"
    return str(found.key_averages().table(sort_by=by, row_limit=NUM_OPERATORS))
