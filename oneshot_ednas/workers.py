"""Where independent jobs run: here, in processes of this machine, or on Ray.

All are `concurrent.futures` executors, so callers submit and wait in one way.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

R = TypeVar("R")


class Workers(NamedTuple):
    """An executor and how many jobs it runs at a time."""

    executor: Executor
    size: int


class SerialExecutor(Executor):
    """Runs each job in this process when it is submitted."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> "Future[R]":
        """Run the job; its future is done."""
        future: Future[R] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def open_workers(text: str) -> Iterator[Workers]:
    """Workers as the command line names them; running jobs are abandoned on an error.

    Args:
        text: `1` runs in this process, `N` in N processes with one torch thread each.

    Raises:
        ValueError: for anything else.
    """
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--workers: expected a number of processes, got {text}")
    count = int(text)
    if count == 1:
        yield Workers(SerialExecutor(), 1)
        return
    # Fork would copy torch's threads in an unknown state.
    pool = ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_process
    )
    try:
        yield Workers(pool, count)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    pool.shutdown()


def _prepare_process() -> None:
    """Several processes with several threads each cost far more than they give."""
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of a terminal; the one that submits ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
