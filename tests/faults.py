"""File operations that fail: of chosen files, a number of times or always, in a chosen way."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

Way = int | str
"""How an operation fails: with an errno, or, of writes, `short` (takes a part) and `altered` (takes
all, and keeps something else)."""


class Fault:
    """Counts the operations that met it."""

    def __init__(self, way: Way, of: str, times: int | None) -> None:
        self.way, self.of, self.left = way, of, times
        self.hits = 0

    def meets(self, arguments: tuple[Any, ...]) -> bool:
        """Whether an operation is to fail; that it does is counted."""
        if self.left == 0 or not any(self.of in path for path in _paths(arguments)):
            return False
        self.hits += 1
        self.left = None if self.left is None else self.left - 1
        return True


@contextmanager
def failing(function: str, way: Way, *, of: str, times: int | None = None) -> Iterator[Fault]:
    """Have a function of `os` fail.

    Args:
        function: for example `write`.
        way: how.
        of: part of the path of the files that it fails for.
        times: how often, from the first time on; None is always.
    """
    fault, real = Fault(way, of, times), getattr(os, function)
    with patch.object(os, function, _faulty(fault, real)):
        yield fault


def _faulty(fault: Fault, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        if not fault.meets(arguments):
            return real(*arguments, **named)
        if isinstance(fault.way, int):
            raise OSError(fault.way, os.strerror(fault.way))
        handle, data = arguments
        if fault.way == "short":
            return real(handle, bytes(data[: 1 + len(data) // 3]))
        return real(handle, bytes([data[0] ^ 1]) + bytes(data[1:]))

    return call


def _paths(arguments: tuple[Any, ...]) -> list[str]:
    """What an operation is on: one open file, or paths."""
    if isinstance(arguments[0], int):
        return [os.readlink(f"/proc/self/fd/{arguments[0]}")]
    return [os.fspath(one) for one in arguments if isinstance(one, (str, os.PathLike))]
