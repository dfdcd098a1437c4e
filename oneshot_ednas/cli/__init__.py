"""The command line: parse, call the package, print a table or one JSON object.

Exit status: 0 on success, 1 for a failure inside, 2 for bad input (one clear line), 130 when
stopped by the user.
"""

from oneshot_ednas.cli import (
    bench,
    compare,
    data,
    describe,
    doctor,
    export,
    latency,
    multi_trial,
    runs,
    sharing,
    study,
    verify,
)
from oneshot_ednas.cli.common import main

__all__ = [
    "bench",
    "compare",
    "data",
    "describe",
    "doctor",
    "export",
    "latency",
    "main",
    "multi_trial",
    "runs",
    "sharing",
    "study",
    "verify",
]
