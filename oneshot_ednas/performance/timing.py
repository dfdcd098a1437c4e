"""Times, activation memory and growth of pieces of work that are measured side by side."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

Work = Callable[[], object]
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A median over repeats, with the quartiles."""

    median: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some numbers.

        Raises:
            ValueError: if there are none.
        """
        if not values:
            raise ValueError("a median needs at least one repeat, got none")
        low, median, high = np.percentile(values, [25, 50, 75])
        return cls(median=float(median), low=float(low), high=float(high), count=len(values))

    @classmethod
    def exactly(cls, value: float) -> "Spread":
        """A number without noise."""
        return cls(median=value, low=value, high=value, count=1)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The exponent of a power law, from a straight line in logarithms."""

    exponent: float
    standard_error: float | None
    """None for two points, which leave nothing to tell it from."""


def interleaved(
    works: Mapping[str, Work], *, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each piece of work: all of them once to warm up, then A B A B ...

    What else the machine does slows neighbours alike, so ratios within a round mean something.

    Args:
        works: by name.
        repeats: rounds that count.
        device: waited for before and after each.

    Raises:
        ValueError: if there is no round.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in works}
    with _no_collection():
        for number in range(repeats + 1):
            for name, work in works.items():
                taken = _seconds(work, device)
                if number:
                    seconds[name].append(taken)
            gc.collect()
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of the rounds' quotients."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def _seconds(work: Work, device: torch.device) -> float:
    clock = clock_of(device)
    wait(device)
    began = clock()
    work()
    wait(device)
    return clock() - began


def clock_of(device: torch.device) -> Callable[[], float]:
    """The process's CPU time where one thread does all the work, else the time on the wall.

    The time that other processes take away is no part of the first.
    """
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if is_alone else time.perf_counter


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the middle of what is timed."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# Memory -------------------------------------------------------------------------------------


class _Held:
    """A tensor that autograd keeps for the backward pass, counted as long as it does."""

    def __init__(self, tensor: Tensor, ledger: "_Ledger") -> None:
        self.tensor, self._ledger = tensor, ledger
        ledger.add(tensor)

    def __del__(self) -> None:
        self._ledger.remove(self.tensor)


class _Ledger:
    """Bytes of the storages that are held now, and the most that were."""

    def __init__(self, left_out: set[int]) -> None:
        self._left_out = left_out
        self._counts: dict[int, int] = {}
        self._bytes = 0
        self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._left_out:
            return
        # Views of one storage, and layers that keep the same tensor, count once.
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] == 1:
            self._bytes += storage.nbytes()
            self.peak = max(self.peak, self._bytes)

    def remove(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._left_out:
            return
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key]
            self._bytes -= storage.nbytes()


def activation_bytes(work: Work, *modules: nn.Module) -> int:
    """The most bytes that autograd holds at a time for the backward pass.

    Args:
        work: forward and backward.
        modules: whose parameters and buffers do not count, nor views of them.
    """
    kept = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    ledger = _Ledger({tensor.untyped_storage().data_ptr() for tensor in kept})
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: _Held(tensor, ledger), lambda held: held.tensor
    ):
        work()
    return ledger.peak


def peak_device_bytes(work: Work, device: torch.device) -> int | None:
    """The most bytes allocated on a CUDA device, with all that was there before; else None."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    wait(device)
    return int(torch.cuda.max_memory_allocated(device))


# Growth -------------------------------------------------------------------------------------


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> Growth:
    """P of `value = c size ** p`, by least squares in logarithms.

    Raises:
        ValueError: for less than two sizes, or numbers that are not positive.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(values):
        raise ValueError(f"expected two or more sizes with a value each, got {sizes} and {values}")
    if not all(number > 0 and math.isfinite(number) for number in (*sizes, *values)):
        raise ValueError(f"expected positive sizes and values, got {sizes} and {values}")
    x, y = np.log(sizes), np.log(values)
    x, y = x - x.mean(), y - y.mean()
    exponent = float(x @ y / (x @ x))
    left, freedom = y - exponent * x, len(sizes) - 2
    error = math.sqrt(float(left @ left / (x @ x)) / freedom) if freedom else None
    return Growth(exponent=exponent, standard_error=error)
