"""Checks of room: folders, memory, open files, processes."""

import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from oneshot_ednas.data.cache import CACHE_VARIABLE, default_cache_dir
from oneshot_ednas.doctor.finding import Finding, ask, good, note, problem
from oneshot_ednas.file_systems import file_system, is_remote
from oneshot_ednas.peak_memory import GIB, free_memory, gib

MIN_MEMORY, GOOD_MEMORY = GIB, 3 * GIB
"""Below these there is a problem, or a note."""
MIN_DISK, GOOD_DISK = GIB // 4, 2 * GIB
MIN_FILES = 512


def check_folders() -> Iterator[Finding]:
    """The cache folder and the folder where one is."""
    yield check_folder(
        "cache folder", default_cache_dir(), f"set {CACHE_VARIABLE} to another folder"
    )
    yield check_folder("this folder", Path.cwd(), "choose an --out on another disk")


def check_folder(name: str, folder: Path, cure: str) -> Finding:
    """Whether a folder can be written, has room, and keeps locks.

    A folder that is not there is not made: its first parent that is there is looked at.
    """
    folder = folder.absolute()
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    kind = file_system(existing.resolve())
    said = f"{folder}{'' if existing == folder else ' (not made yet)'} on {kind or 'unknown'}"
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
            os.fsync(file.fileno())
    except OSError as error:
        return problem(name, f"{said}: cannot be written ({error.strerror})", cure)
    free = shutil.disk_usage(existing).free
    said += f", {gib(free)} free"
    if free < MIN_DISK:
        return problem(name, said, f"free some space, or {cure}")
    if is_remote(kind):
        return note(
            name,
            f"{said}: locks and SQLite's write-ahead log are not safe there with several machines",
            f"keep runs on a local disk, above all those of evolve; {cure}",
        )
    if free < GOOD_DISK:
        return note(name, said, f"a run with many checkpoints may need more; {cure}")
    return good(name, said)


def check_memory() -> Iterator[Finding]:
    """Free memory of the host."""
    free = free_memory(torch.device("cpu"))
    if free is None:
        yield note("memory", "the system does not tell what is free", "look yourself: 3 GiB do")
    elif free < MIN_MEMORY:
        yield problem("memory", f"{gib(free)} free", "end other programs: the demo takes 1 GiB")
    elif free < GOOD_MEMORY:
        yield note("memory", f"{gib(free)} free", "enough for the demo; use small batches")
    else:
        yield good("memory", f"{gib(free)} free")


def check_processes() -> Iterator[Finding]:
    """Open files, and whether new processes can be started."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        yield note("open files", f"at most {soft}", f"ulimit -n {min(4096, hard)} for many workers")
    else:
        yield good("open files", f"at most {'any' if soft == resource.RLIM_INFINITY else soft}")
    methods = ", ".join(multiprocessing.get_all_start_methods())
    ask(sys.executable, "-c", "pass")
    yield good(
        "processes",
        f"{methods}; workers come from a fork server, readers of data are forked on Linux",
    )
