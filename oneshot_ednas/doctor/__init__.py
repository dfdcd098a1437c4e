"""What a machine has for this package: each finding with what it means and how to change it.

Checks only look. What may hang, crash or hold a device (a driver, the Edge TPU's library) is asked
in a process of its own with a time limit, so that no check takes long or leaves anything behind.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from oneshot_ednas.doctor import devices, resources, software
from oneshot_ednas.doctor.finding import Finding, problem
from oneshot_ednas.export.edgetpu import COMPILER

Check = Callable[[], Iterator[Finding]]


def diagnose(checks: Mapping[str, Check] | None = None) -> list[Finding]:
    """The findings of all checks, each check by itself: one that fails is a finding too.

    Args:
        checks: by name; None is all of `CHECKS`.
    """
    found = []
    for name, check in (CHECKS if checks is None else checks).items():
        began = time.perf_counter()
        try:
            rows = list(check())
        except Exception as error:
            reason = f"the check failed: {type(error).__name__}: {error}"
            cure = "something on this machine is not as expected; report it with this line"
            rows = [problem(name, reason, cure)]
        spent = round(time.perf_counter() - began, 3)
        found += [replace(row, seconds=spent) for row in rows]
    return found


CHECKS: dict[str, Check] = {
    "python": software.check_python,
    "oneshot_ednas": software.check_package,
    "torch": software.check_torch,
    "cpu": devices.check_cpu,
    "cuda": devices.check_cuda,
    "mps": devices.check_mps,
    "memory": resources.check_memory,
    "folders": resources.check_folders,
    "processes": resources.check_processes,
    "packages": software.check_packages,
    "C++ compiler": software.check_compiler,
    "interpreter": devices.check_interpreter,
    "edge tpu": devices.check_edgetpu,
    COMPILER: devices.check_edgetpu_compiler,
}
"""By the name that a failed check is told under, in the order they are shown."""
