"""Where independent jobs run: here, in processes of this machine, or on Ray.

All are `concurrent.futures` executors, so callers submit and wait in one way. A job whose process
dies (killed, out of memory, a lost machine) is run again, a bounded number of times.
"""

import importlib.util
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

R = TypeVar("R")
MAX_RETRIES = 2
"""How often a job is run again whose process died."""


@dataclass(frozen=True)
class Workers:
    """An executor and how many jobs it runs at a time."""

    executor: Executor
    count: int


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


class ProcessExecutor(Executor):
    """Runs jobs in processes, each of its own pool: one that dies takes no other job with it."""

    def __init__(self, count: int) -> None:
        """Processes start with their first job."""
        self._threads = ThreadPoolExecutor(count)
        self._local = threading.local()
        self._pools: list[ProcessPoolExecutor] = []
        self._is_stopped = False

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> "Future[R]":
        """Run the job in the next free process.

        The future raises RuntimeError for a job whose process died each time.
        """
        return self._threads.submit(self._run, fn, args, kwargs)

    def _run(self, fn: Callable[..., R], args: Any, kwargs: Any) -> R:
        """The job, in the process of this thread."""
        for _ in range(1 + MAX_RETRIES):
            if getattr(self._local, "pool", None) is None:
                # Fork would copy torch's threads in an unknown state.
                context = multiprocessing.get_context("spawn")
                self._local.pool = ProcessPoolExecutor(
                    1, mp_context=context, initializer=_prepare_process
                )
                self._pools.append(self._local.pool)
            try:
                return self._local.pool.submit(fn, *args, **kwargs).result()
            except BrokenProcessPool:
                self._local.pool = None
                if self._is_stopped:
                    raise
        raise RuntimeError(_died())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the jobs, or end their processes."""
        self._is_stopped = not wait
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        for pool in self._pools:
            if not wait:
                for process in (pool._processes or {}).values():  # the pool has no method for it
                    process.terminate()
            pool.shutdown(wait=wait, cancel_futures=cancel_futures)


class RayExecutor(Executor):
    """Runs jobs as Ray tasks, on the cluster of `RAY_ADDRESS` or on this machine."""

    def __init__(self, count: int | None) -> None:
        """Connect, or start Ray here.

        Args:
            count: jobs at a time; None for one per GPU of the cluster, or per core without one.
        """
        import ray

        self._ray = ray
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            # Ray's own default is to run a job that needs too much memory again for ever.
            os.environ.setdefault("RAY_task_oom_retries", str(MAX_RETRIES))
            ray.init(
                num_cpus=None if "RAY_ADDRESS" in os.environ else count,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self.count = count or gpus or int(resources["CPU"])
        self._remote: Any = ray.remote(
            max_retries=MAX_RETRIES, num_cpus=1, num_gpus=min(1.0, gpus / self.count)
        )(_prepared)
        self._threads = ThreadPoolExecutor(self.count)
        self._tasks: set[Any] = set()

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> "Future[R]":
        """Run the job as a task.

        The future raises RuntimeError for a job whose process died each time.
        """
        return self._threads.submit(self._run, fn, args, kwargs)

    def _run(self, fn: Callable[..., R], args: Any, kwargs: Any) -> R:
        errors = self._ray.exceptions
        task = self._remote.remote(fn, args, kwargs)
        self._tasks.add(task)
        try:
            result: R = self._ray.get(task)
        except errors.RayTaskError as error:
            raise error.cause from None
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError):
            raise RuntimeError(_died()) from None
        except errors.RayError as error:
            raise RuntimeError(f"Ray: {error}") from None
        finally:
            self._tasks.discard(task)
        return result

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the jobs, or end them; then stop a Ray that was started here."""
        if not wait:
            for task in list(self._tasks):
                self._ray.cancel(task, force=True)
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        if self._is_ours:
            self._ray.shutdown()


@contextmanager
def open_workers(text: str) -> Iterator[Workers]:
    """Workers as the command line names them; running jobs are abandoned on an error.

    Args:
        text: `1` runs in this process, with the threads that torch has; `N` in N processes and
            `ray[:N]` as Ray tasks, with one torch thread each. Figures are those of a serial run
            with one thread (OMP_NUM_THREADS=1); another number of threads adds in another order.

    Raises:
        ValueError: for anything else, or if Ray is not installed.
    """
    name, _, number = text.partition(":")
    is_ray = name == "ray"
    digits = number if is_ray else text
    if (digits or not text == "ray") and (not digits.isdigit() or int(digits) < 1):
        raise ValueError(f"--workers: expected N, ray or ray:N, with N of at least 1; got {text}")
    count = int(digits) if digits else None
    if count == 1 and not is_ray:
        yield Workers(SerialExecutor(), 1)
        return
    executor: ProcessExecutor | RayExecutor
    if is_ray:
        if importlib.util.find_spec("ray") is None:
            raise ValueError(
                f"--workers {text}: Ray is not installed; pip install 'oneshot-ednas[ray]', or "
                f"give a number of processes"
            )
        executor = RayExecutor(count)
        count = executor.count
    else:
        assert count is not None
        executor = ProcessExecutor(count)
    try:
        yield Workers(executor, count)
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()


def _died() -> str:
    return f"its process died {1 + MAX_RETRIES} times (killed, or out of memory)"


def _prepared(fn: Callable[..., R], args: Any, kwargs: Any) -> R:
    torch.set_num_threads(1)
    return fn(*args, **kwargs)


def _prepare_process() -> None:
    """Several processes with several threads each cost far more than they give."""
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of a terminal; the one that submits ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A job whose submitter was killed has nobody left to tell."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
