"""Work on the frames of a data set, spread over processes, with results in the frames' order."""

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar, cast

R = TypeVar("R")
J = TypeVar("J", bound=Sequence[Any])

Progress = Callable[[int, int], None]
"""Called with what is done and how much there is in all."""


def chunks(items: J, size: int) -> list[J]:
    """The items in groups of this size; the last may be smaller."""
    return [cast(J, items[start : start + size]) for start in range(0, len(items), size)]


def run_chunks(
    work: Callable[[J], R],
    jobs: Sequence[J],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Iterator[R]:
    """Results of `work` for each group of frames, in order.

    The first error ends the work; what is under way is finished, what is not begun is dropped.

    Args:
        work: a function that can travel to other processes, as can its results.
        jobs: groups of frames.
        workers: processes; None is one per processor, 1 is this process.
        progress: called with the frames done and the frames in all.

    Raises:
        ValueError: for fewer than one worker.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"--workers: expected at least 1, got {workers}")
    count = min(_processors() if workers is None else workers, len(jobs))
    if count <= 1:
        yield from _reported(map(work, jobs), jobs, progress)
        return
    # Workers run NumPy and Pillow only, never torch, so a fork of a process with a GPU is safe;
    # it also spares scripts the `if __name__ == "__main__"` that a fresh interpreter would need.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with (
        ProcessPoolExecutor(count, mp_context=context, initializer=_leave_stopping) as pool,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
        try:
            yield from _reported(pool.map(work, jobs), jobs, progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _reported(
    results: Iterator[R], jobs: Sequence[Sequence[Any]], progress: Progress | None
) -> Iterator[R]:
    total, done = sum(map(len, jobs)), 0
    for job, result in zip(jobs, results, strict=True):
        yield result
        done += len(job)
        if progress is not None:
            progress(done, total)


def _leave_stopping() -> None:
    """Ctrl-C reaches every process of a terminal; the one that submits ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _processors() -> int:
    """Processors that this process may use; in a container these are not all of the machine's."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
