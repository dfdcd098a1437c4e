"""Methods compared over seeds: what finished runs found, what it cost, and what may be claimed."""

from oneshot_ednas.comparison.page import compare_runs

__all__ = ["compare_runs"]
