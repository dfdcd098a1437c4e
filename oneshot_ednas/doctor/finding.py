"""A finding, and how checks ask programs and packages."""

import importlib.metadata
import subprocess
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]
LIMIT_S = 4.0
"""For each process that a check asks."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one look found."""

    name: str
    state: State
    """`note`: something does less, or is absent that not everybody needs."""
    found: str
    cure: str | None = None
    """What to do about it; for all but `ok`."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """What is not right comes with its cure."""
        assert (self.state == "ok") == (self.cure is None), f"{self.name}: {self.state}"


def good(name: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(name=name, state="ok", found=found)


def note(name: str, found: str, cure: str) -> Finding:
    """Less is done, or something is absent that not everybody needs."""
    return Finding(name=name, state="note", found=found, cure=cure)


def problem(name: str, found: str, cure: str) -> Finding:
    """The package does not work here."""
    return Finding(name=name, state="problem", found=found, cure=cure)


def ask(*command: str) -> str:
    """Standard output of a program.

    Raises:
        RuntimeError: with its last words, if it fails or takes too long.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} did not answer within {LIMIT_S:g} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = said[-1] if said else f"exit status {done.returncode}"
        raise RuntimeError(f"{command[0]}: {reason}")
    return done.stdout.strip()


def version_of(package: str) -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
