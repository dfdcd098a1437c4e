"""Run the measurements of a plan, and keep what they found."""

import datetime
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from oneshot_ednas.performance.growth import growth
from oneshot_ednas.performance.plan import Plan, Row
from oneshot_ednas.performance.ratios import (
    derivation,
    expected_latency_share,
    latencies,
    relaxed_step,
    supernet_step,
)
from oneshot_ednas.performance.shares import data_loading, whole_search

MEASUREMENTS: Mapping[str, Callable[[Plan], list[Row]]] = {
    "supernet_step": supernet_step,
    "relaxed_step": relaxed_step,
    "expected_latency": expected_latency_share,
    "latencies": latencies,
    "derivation": derivation,
    "whole_search": whole_search,
    "data_loading": data_loading,
    "growth": growth,
}
"""By name; each gives one row or more, whose names begin with it."""


def measure(
    plan: Plan,
    names: Iterable[str] = (),
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """The rows of some measurements, or of all.

    Args:
        plan: sizes and repeats.
        names: of `MEASUREMENTS`; none for all.
        on_row: called with each row when it is there.

    Raises:
        ValueError: for an unknown name.
    """
    wanted = list(names) or list(MEASUREMENTS)
    for name in wanted:
        if name not in MEASUREMENTS:
            raise ValueError(f"no measurement {name}; there are {', '.join(MEASUREMENTS)}")
    rows = []
    for name in MEASUREMENTS:
        if name in wanted:
            for found in MEASUREMENTS[name](plan):
                row = found if plan.is_judged else replace(found, bound=None)
                rows.append(row)
                on_row(row)
    return rows


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "machine": _machine(device),
    }


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
