"""The command line: parse, call the package, print a table or one JSON object.

Exit status: 0 on success, 1 for a failure inside, 2 for bad input (one clear line), 130 when
stopped by the user.
"""

from oneshot_ednas.cli import describe, export, latency, runs, study
from oneshot_ednas.cli.common import main

__all__ = ["describe", "export", "latency", "main", "runs", "study"]
