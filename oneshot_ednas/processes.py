"""What processes of this machine have in common; without torch, for readers of data."""

import multiprocessing
import os
import sys
import threading


def num_cores() -> int:
    """Processors that this process may use; in a container these are not all of the machine's."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent() -> None:
    """End this process with the one that started it, however that ends.

    A job whose submitter was killed has nobody left to tell, and forked processes hold each other's
    pipes open, so these alone would not tell it.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
