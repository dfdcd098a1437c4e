"""Jobs for the tests of workers: other processes import them from here."""

import os
import signal
import time
from pathlib import Path


def square(number: int) -> int:
    return number * number


def process_id(_: int) -> int:
    return os.getpid()


def die(path: Path, times: int) -> str:
    """Kill the process that runs this, the first `times` times."""
    with path.open("a") as file:
        file.write("x")
    if path.stat().st_size <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "lived"


def refuse() -> None:
    raise ValueError("bad input")


def sleep(seconds: float) -> None:
    time.sleep(seconds)
