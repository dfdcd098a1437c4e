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
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar

import torch

from oneshot_ednas.processes import end_with_parent

R = TypeVar("R")
MAX_RETRIES = 2
"""How often a job is run again whose process died."""
STOP_SECONDS = 30.0
"""How long a process that is asked to end may take."""


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
        self._threads = ThreadPoolExecutor(count, initializer=_block_ctrl_c)
        self._local, self._lock = threading.local(), threading.Lock()
        self._pools: set[ProcessPoolExecutor] = set()
        self._is_stopped = False

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> "Future[R]":
        """Run the job in the next free process.

        The future raises RuntimeError for a job whose process died each time.
        """
        return self._threads.submit(self._run, fn, args, kwargs)

    def _run(self, fn: Callable[..., R], args: Any, kwargs: Any) -> R:
        """The job, in the process of this thread."""
        for _ in range(1 + MAX_RETRIES):
            try:
                return self._begin(fn, args, kwargs).result()
            except BrokenProcessPool:
                with self._lock:
                    self._drop_pool()
                    if self._is_stopped:
                        raise
        raise RuntimeError(_died())

    def _begin(self, fn: Callable[..., R], args: Any, kwargs: Any) -> "Future[R]":
        # Under the lock, so that `shutdown` knows of every process.
        with self._lock:
            if self._is_stopped:
                raise BrokenProcessPool("stopped")
            if getattr(self._local, "pool", None) is not None:
                # One that died between two jobs is no fault of this one.
                with suppress(BrokenProcessPool):
                    return self._local.pool.submit(fn, *args, **kwargs)
                self._drop_pool()
            self._local.pool = ProcessPoolExecutor(
                1, mp_context=_context_for(fn), initializer=_prepare_process
            )
            self._pools.add(self._local.pool)
            return self._local.pool.submit(fn, *args, **kwargs)

    def _drop_pool(self) -> None:
        """Let go of a pool whose process is dead, and of its pipes."""
        if self._local.pool is not None:
            self._local.pool.shutdown(wait=False)
            self._pools.discard(self._local.pool)
            self._local.pool = None

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the jobs, or end their processes."""
        if wait:
            self._threads.shutdown(cancel_futures=cancel_futures)
        with self._lock:
            self._is_stopped = not wait
            pools = list(self._pools)
        if not wait:
            self._threads.shutdown(wait=False, cancel_futures=cancel_futures)
            # The pool has no method for it.
            _end([process for pool in pools for process in (pool._processes or {}).values()])
        for pool in pools:
            pool.shutdown(cancel_futures=cancel_futures)
        self._threads.shutdown()


def _context_for(fn: Callable[..., object]) -> BaseContext:
    """How processes start for such jobs.

    Not as a fork of this process, which would copy torch's threads in an unknown state, but of one
    that has done nothing but import the job's module: what takes seconds is done once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(fn, "func", fn).__module__])  # it may be a `partial`
    return context


def _end(processes: Sequence[BaseProcess]) -> None:
    """End processes; those that write a checkpoint have `STOP_SECONDS`, or until Ctrl-C."""
    give_up = time.monotonic() + STOP_SECONDS
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(max(0.0, give_up - time.monotonic()))
    finally:
        for process in processes:
            process.kill()


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

    SIGTERM stops what uses the workers as Ctrl-C does, so that none is left behind.

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
        with sigterm_as_ctrl_c():
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
    with sigterm_as_ctrl_c():
        try:
            yield Workers(executor, count)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
        executor.shutdown()


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM stops the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # which alone is told of signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Interruptible:
    """A block that Ctrl-C and SIGTERM stop by KeyboardInterrupt, but only where it lets them.

    What has to be done as a whole, such as writing an outcome that took an hour, is never cut off.
    """

    def __init__(self) -> None:
        """Signals are as before until the block is entered."""
        self._is_allowed = self._has_come = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruptible":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None and self._has_come:
            raise KeyboardInterrupt

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._has_come = True
        if self._is_allowed:
            raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Around what may be stopped anywhere.

        Raises:
            KeyboardInterrupt: if a signal comes, or came before.
        """
        self._is_allowed = True
        try:
            if self._has_come:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_allowed = False


def _died() -> str:
    return f"its process died {1 + MAX_RETRIES} times (killed, or out of memory)"


def _prepared(fn: Callable[..., R], args: Any, kwargs: Any) -> R:
    torch.set_num_threads(1)
    return fn(*args, **kwargs)


def _block_ctrl_c() -> None:
    """Ctrl-C reaches every process of a terminal; one that is starting inherits this."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _prepare_process() -> None:
    """Several processes with several threads each cost far more than they give."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that submits ends this one
    end_with_parent()
