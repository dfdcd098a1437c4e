"""Work on the frames of a data set, spread over processes, with results in the frames' order."""

import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from oneshot_ednas.processes import end_with_parent, num_cores

R = TypeVar("R")
J = TypeVar("J", bound=Sequence[Any])

MAX_RETRIES = 2
"""How often a group of frames is worked on again whose process died."""

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
    name: Callable[[Any], str] = str,
) -> Iterator[R]:
    """Results of `work` for each group of frames, in order.

    The first error ends the work; what is under way is finished, what is not begun is dropped. A
    group whose process dies is worked on again, a bounded number of times.

    Args:
        work: a function that can travel to other processes, as can its results. It may be called
            twice for a frame.
        jobs: groups of frames.
        workers: processes; None is one per processor, 1 is this process.
        progress: called with the frames done and the frames in all.
        name: what a frame is called in messages.

    Raises:
        ValueError: for fewer than one worker.
        RuntimeError: if the process that works on a frame dies each time; names the frame.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"--workers: expected at least 1, got {workers}")
    count = min(num_cores() if workers is None else workers, len(jobs))
    results = map(work, jobs) if count <= 1 else _in_processes(work, jobs, count, name)
    yield from _reported(results, jobs, progress)


def _in_processes(
    work: Callable[[J], R], jobs: Sequence[J], count: int, name: Callable[[Any], str]
) -> Iterator[R]:
    """Results of each job, in order."""
    while jobs:
        num_given = 0
        with _submitted(work, jobs, count) as futures:
            for future in futures:
                if _has_died(future):
                    break
                yield future.result()
                num_given += 1
            else:
                return
        # Nothing tells whose process died: it is one of the first `count` that are not done. Each
        # of these is done again on its own.
        lost = [one for one, future in enumerate(futures) if _has_died(future)][:count]
        for one in range(num_given, lost[-1] + 1):
            yield _alone(work, jobs[one], name) if one in lost else futures[one].result()
        jobs = jobs[lost[-1] + 1 :]


def _alone(work: Callable[[J], R], job: J, name: Callable[[Any], str]) -> R:
    """The result of a job in a process that does nothing else.

    Raises:
        RuntimeError: if its process dies each time.
    """
    for _ in range(1 + MAX_RETRIES):
        with _submitted(work, [job], 1) as (future,):
            if not _has_died(future):
                return future.result()
    frames = f"frames {name(job[0])} to {name(job[-1])}"
    for frame in chunks(job, 1):
        with _submitted(work, [frame], 1) as (future,):
            if _has_died(future):
                frames = f"frame {name(frame[0])}"
                break
    raise RuntimeError(
        f"the process that worked on {frames} died {1 + MAX_RETRIES} times (killed, or out of "
        f"memory); see that the files are sound, or use fewer workers"
    )


def _has_died(future: "Future[R]") -> bool:
    return isinstance(future.exception(), BrokenProcessPool)


@contextmanager
def _submitted(
    work: Callable[[J], R], jobs: Sequence[J], count: int
) -> Iterator[list["Future[R]"]]:
    """The futures of jobs in a pool of processes; what has not begun at the end is dropped."""
    # Workers run NumPy and Pillow only, never torch, so a fork of a process with a GPU is safe;
    # it also spares scripts the `if __name__ == "__main__"` that a fresh interpreter would need.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_prepare_process) as pool:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
            futures = [_submit(pool, work, job) for job in jobs]
        try:
            yield futures
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, work: Callable[[J], R], job: J) -> "Future[R]":
    try:
        return pool.submit(work, job)
    except BrokenProcessPool as error:  # a process has died already
        future: Future[R] = Future()
        future.set_exception(error)
        return future


def _reported(
    results: Iterator[R], jobs: Sequence[Sequence[Any]], progress: Progress | None
) -> Iterator[R]:
    total, done = sum(map(len, jobs)), 0
    for job, result in zip(jobs, results, strict=True):
        yield result
        done += len(job)
        if progress is not None:
            progress(done, total)


def _prepare_process() -> None:
    """End with the process that submits, and only with it."""
    # Ctrl-C reaches every process of a terminal; handlers are those of the process that forked.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
