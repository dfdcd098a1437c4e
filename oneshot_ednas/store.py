"""Files that must last: written whole or not at all, read back, and found after a power cut.

Whatever the package keeps goes through here, but the trials (SQLite has a journal of its own). A
file is written under another name, synced, read back and compared by its SHA-256, and then put in
its place in one step; the folder is synced last. So at every moment each name stands for a whole
file, the old or the new one. docs/durability.md says what that gives on which file systems.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

if sys.platform == "darwin":
    import fcntl

T = TypeVar("T")

PARTIAL = ".partial"
"""What the names of unfinished files and folders end in."""
LOCK = ".lock"
"""File of a folder that is locked while a process works in it."""
RETRY_SECONDS = (0.1, 1.0, 5.0)
"""Waits before a failed write is tried again."""

_TRANSIENT = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EINTR,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
"""Errors that may pass by themselves."""
_CURES = {
    errno.EACCES: "see that the folder can be written",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files",
    errno.ENOSPC: "make room on the disk",
    errno.EPERM: "see that the folder can be written",
    errno.EROFS: "mount the file system writable",
    errno.EXDEV: "see that the file is no mount of its own",
}
_NO_LINKS = {errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}
"""What file systems without hard links answer."""
_NO_FOLDER_SYNC = {errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What file systems that cannot sync a folder answer."""
_UNWRITTEN = "not written, what was there before is kept"
_UNSAFE = "written, but a power cut may bring back what was there before"


# Whole files --------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes, *, previous: Path | None = None) -> None:
    """Replace a file by new content: readers, and what a crash leaves, have the old or the new.

    What failed and may pass, such as a full disk, is tried again for some seconds.

    Args:
        path: the file; its folder is made where it is missing.
        data: the content.
        previous: where to keep the file that is there now.

    Raises:
        OSError: if it could not be written and read back; what was there stays as it was.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        path.write_bytes(data)  # a pipe or a device such as /dev/stdout is no file to replace
        return
    _persist(path, lambda: _write(path, data, previous))
    # Apart, since a second `_write` would keep the new file as the previous one.
    _persist(path, lambda: sync_folder(path.parent), _UNSAFE)


def _persist(path: Path, act: Callable[[], None], outcome: str = _UNWRITTEN) -> None:
    """Do what writes a file, again after errors that may pass; `outcome` is what they lead to."""
    for wait in (*RETRY_SECONDS, None):
        try:
            act()
        except OSError as error:
            if wait is None or error.errno not in _TRANSIENT:
                raise _not_written(path, error, outcome) from None
            time.sleep(wait)
        else:
            return


def _write(path: Path, data: bytes, previous: Path | None) -> None:
    make_folder(path.parent)
    temporary = _partial(path)
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        try:
            write_all(handle, data)
            _sync(handle)
            _drop_cached(handle)
        finally:
            os.close(handle)
        _check_written(temporary, data)
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_all(handle: int, data: bytes) -> None:
    """Write to an open file; the system may take less at a time.

    Raises:
        OSError: if it could not be written; a part of it may be.
    """
    view = memoryview(data)
    while view:
        taken = os.write(handle, view)
        if taken == 0:
            raise OSError(errno.EIO, "nothing more can be written")
        view = view[taken:]


def _partial(path: Path) -> Path:
    """A new name beside a file, until it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")


def _drop_cached(handle: int) -> None:
    """Let the check read what the disk holds, where the system can be told so."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _check_written(path: Path, data: bytes) -> None:
    with path.open("rb") as file:
        held = hashlib.file_digest(file, "sha256")
    if held.digest() != hashlib.sha256(data).digest():
        raise OSError(errno.EIO, "what was read back is not what was written")


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name, which another file may have had."""
    temporary = _partial(previous)
    try:
        try:
            os.link(path, temporary)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copyfile(path, temporary)
            sync_file(temporary)
        os.replace(temporary, previous)
    finally:
        # Where both names were those of one file already, replacing does nothing.
        temporary.unlink(missing_ok=True)


def _not_written(path: Path, error: OSError, outcome: str = _UNWRITTEN) -> OSError:
    reason = error.strerror or str(error)
    cure = _CURES.get(error.errno or 0, "see that it can be written")
    return OSError(
        error.errno,
        f"{reason}; {outcome}; {cure}, then go on",
        str(path),
    )


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """`write_bytes` for JSON; non-finite numbers are an error, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


# Logs ---------------------------------------------------------------------------------------


def append_text(path: Path, text: str, *, is_synced: bool = False) -> None:
    """Add to a file.

    Args:
        path: the file; it and its folder are made where they are missing.
        text: what to add.
        is_synced: outlast a power cut from now on; without it, from the next `sync_log` on.

    Raises:
        OSError: if it could not be written.
    """
    _persist(path, lambda: _append(path, text.encode("utf-8")))
    if is_synced:
        sync_log(path)


def _append(path: Path, data: bytes) -> None:
    make_folder(path.parent)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        held = os.fstat(handle).st_size
        try:
            write_all(handle, data)
            if held == 0:  # it is new
                sync_folder(path.parent)
        except OSError:
            with suppress(OSError):  # the first error tells what is wrong
                os.ftruncate(handle, held)
            raise
    finally:
        os.close(handle)


def sync_log(path: Path) -> None:
    """What was added to a log outlasts a power cut.

    Raises:
        OSError: if it could not be written.
    """
    unsynced: list[bytes] = []

    def sync() -> None:
        if unsynced:
            # A second sync would tell nothing: after the first one the kernel may take for written
            # what it could not write. So all goes to a new file.
            _write(path, unsynced[0], None)
            sync_folder(path.parent)
            return
        with path.open("rb+") as file:
            try:
                _sync(file.fileno())
            except OSError:
                unsynced.append(file.read())
                raise

    _persist(path, sync)


def append_json_line(path: Path, row: object) -> None:
    """Add a line to a file of JSON lines; what a crash left of a line is cut off first.

    Raises:
        ValueError: for a non-finite number, as of `write_json`.
        OSError: if it could not be written.
    """
    line = json.dumps(row, allow_nan=False) + "\n"
    if path.exists():
        held = path.read_bytes()
        if held and not held.endswith(b"\n"):
            write_bytes(path, held[: held.rfind(b"\n") + 1])
    append_text(path, line, is_synced=True)


def read_json_lines(path: Path, read: Callable[[Any], T]) -> list[T]:
    """The rows of a file of JSON lines; none if there is no file.

    What follows the last line end was torn by a crash and is left out.

    Args:
        path: the file.
        read: from the value of a line to what it stands for.

    Raises:
        ValueError: if a line is no JSON, or `read` does not take it; names file and line.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            rows.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: damaged: {error!r}; delete that line") from None
    return rows


# Folders ------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Make a folder, with those above it, that outlasts a power cut."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def _sync(handle: int) -> None:
    """What an open file or folder holds outlasts a power cut.

    Source:
        fsync(2) of macOS, on F_FULLFSYNC
    """
    if sys.platform == "darwin":  # its fsync may leave all in the cache of the drive
        with suppress(OSError):  # of file systems that know nothing else
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def sync_file(path: Path) -> None:
    """What was added to a file outlasts a power cut."""
    handle = os.open(path, os.O_RDWR)
    try:
        _sync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """New names in a folder outlast a power cut, where the file system can do that."""
    if os.name == "nt":  # Windows has no handle of a folder to sync
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _sync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left unfinished; no other process may be writing there."""
    for path in folder.rglob(f".*{PARTIAL}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def lock_folder(folder: Path) -> FileLock:
    """Lock a folder for this process, until the lock is let go or the process ends.

    Asking again in the same process gives the same lock.

    Raises:
        ValueError: if another process has it.
        OSError: if the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False, is_singleton=True)
    try:
        make_folder(folder)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another process works on {folder}; wait for it or stop it, or choose another --out"
        ) from None
    except OSError as error:
        raise _not_written(folder, error) from None
    return lock
