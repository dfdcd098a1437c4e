"""Memory of a device: what is free, what this process holds, and the most it took in a while."""

import os
import re
import resource
import sys
import threading
from pathlib import Path

import torch

GIB = 2**30
_SAMPLE_SECONDS = 0.05


def gib(size: int) -> str:
    """A size in GiB or, if it is small, MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had there; None where nobody tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has reserved and does not use is ours too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min(
        (size for size in (_available(), _container_room()) if size is not None), default=None
    )


def resident_memory() -> int:
    """Bytes of this process in memory; where the system does not tell, its largest so far."""
    return _status_bytes("VmRSS") or _largest_of_life()


def _status_bytes(name: str) -> int | None:
    path = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.M) if path.exists() else None
    return int(found[1]) * 1024 if found else None


def _largest_of_life() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _available() -> int | None:
    path = Path("/proc/meminfo")
    found = (
        re.search(r"^MemAvailable:\s+(\d+) kB", path.read_text(), re.M) if path.exists() else None
    )
    if found:
        return int(found[1]) * 1024
    if "SC_PHYS_PAGES" in os.sysconf_names:  # macOS does not tell what is free of it
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container_room() -> int | None:
    """What the container's limit leaves, where there is one (cgroup v2)."""
    folder = Path("/sys/fs/cgroup")
    limit, used = folder / "memory.max", folder / "memory.current"
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return None
    return int(limit.read_text()) - int(used.read_text())


class PeakMemory:
    """The most memory that was taken inside a `with` block.

    On CUDA that is what torch allocated; on MPS what the driver did, sampled; on a CPU what the
    process held, all of it. Only on Linux can that be asked of a part of a process's life;
    elsewhere it is that of its whole life.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is measured before the block."""
        self.device = device
        self.peak = 0
        """Bytes; known after the block."""
        self._is_over = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "mps":
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        else:
            _forget_peak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        elif self._sampler is not None:
            self._is_over.set()
            self._sampler.join()
        else:
            self.peak = _status_bytes("VmHWM") or _largest_of_life()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, torch.mps.driver_allocated_memory())
            if self._is_over.wait(_SAMPLE_SECONDS):
                return


def _forget_peak() -> None:
    """Let Linux count the peak from now on; where that is denied it stays that of the life."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
