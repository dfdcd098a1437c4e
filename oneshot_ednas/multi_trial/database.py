"""A SQLite file with one writer and readers beside it: opened, journalled, let go; its errors.

While a search writes, the file has a write-ahead log: readers never keep the search from writing,
nor it them. Let go, it is one plain file again, which can be read from anywhere and copied alone.

Source:
    https://www.sqlite.org/wal.html
"""

import shutil
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeVar

from oneshot_ednas.file_systems import file_system, is_remote

R = TypeVar("R")

BUSY_SECONDS = 15.0
"""How long to wait for another process that has locked the file."""
LET_GO_SECONDS = 2.0
"""How long to wait for readers, so that the file can be left without a write-ahead log."""

_NO_SHARED_MEMORY = (
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_IOERR_SHMOPEN,
    sqlite3.SQLITE_IOERR_SHMMAP,
    sqlite3.SQLITE_IOERR_SHMLOCK,
)


def open_to_write(path: Path) -> sqlite3.Connection:
    """Open a file, or begin an empty one; `start_log` is to follow once it is known to be whole.

    Takes in what a killed process left half-written.

    Raises:
        sqlite3.Error: if it cannot be opened.
    """
    connection = _connect(path, "rwc")
    # A commit is on the disk when it returns: with a log as FULL, which NORMAL would not do;
    # without one, the end of the journal is too. The other is for the disks of macOS.
    connection.execute("PRAGMA synchronous = EXTRA")
    connection.execute("PRAGMA fullfsync = ON")
    if _is_remote(path):
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # reads a log that was left
    return connection


def start_log(path: Path, connection: sqlite3.Connection) -> None:
    """Have a write-ahead log from here on; warns where there can be none.

    Raises:
        sqlite3.Error: if the file cannot be written.
    """
    if not _is_remote(path) and _has_log(connection):
        # What is in the log alone is at most one commit: little is lost with it.
        connection.execute("PRAGMA wal_autocheckpoint = 1")
        connection.execute("SELECT count(*) FROM sqlite_master")  # begins the log's file
        return
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA locking_mode = NORMAL")
    connection.execute("SELECT count(*) FROM sqlite_master")  # lets others in again
    warnings.warn(
        f"{path}: no write-ahead log on this file system; whoever reads the trials of a search "
        f"that runs may make it wait",
        stacklevel=2,
    )


def _has_log(connection: sqlite3.Connection) -> bool:
    try:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in _NO_SHARED_MEMORY:
            return False
        raise
    return bool(mode == "wal")


def _is_remote(path: Path) -> bool:
    # A log works through memory that processes share: on one machine only.
    return is_remote(file_system(path.absolute().parent.resolve()))


def let_go(connection: sqlite3.Connection, *, waits: bool = True) -> None:
    """Close a file after the last commit, and leave it without a log.

    Where others keep it open for longer than `LET_GO_SECONDS`, the last of them takes the log in.
    """
    give_up = time.monotonic() + (LET_GO_SECONDS if waits else 0.0)
    with closing(connection):
        while True:
            with suppress(sqlite3.Error):  # others have it open, or it cannot be written
                connection.execute("PRAGMA journal_mode = DELETE")
                return
            if time.monotonic() >= give_up:
                return
            time.sleep(0.02)


def read_beside_writer(path: Path, read: Callable[[sqlite3.Connection], R]) -> R:
    """What `read` finds in a file that another process may be writing to.

    What a killed process left half-written is taken in, in a copy where nothing can be written.

    Raises:
        sqlite3.Error: if it cannot be opened, or `read` fails.
    """
    try:
        return _read(path, read)
    except sqlite3.OperationalError as error:
        if _primary(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        for end in ("-wal", "-journal"):
            with suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{end}", f"{copy}{end}")
        return _read(copy, read, original=path)


def _read(
    path: Path, read: Callable[[sqlite3.Connection], R], *, original: Path | None = None
) -> R:
    connection = _connect(path, "rw", original=original)  # read-only where it has to be
    try:
        return read(connection)
    finally:
        let_go(connection, waits=False)


def unsaved_path(path: Path) -> Path:
    """What lies beside a file while a search writes to it, and after the search was killed."""
    return path.with_name(f"{path.stem}.unsaved.jsonl")


def _connect(
    path: Path, mode: Literal["rw", "rwc"], *, original: Path | None = None
) -> sqlite3.Connection:
    """Open a file; `original` is what it is a copy of. Warns if its log is gone.

    Only SQLite may open it: closing any other handle would drop the locks of this process.
    """
    log = path.with_name(f"{path.name}-wal")
    has_lost_log = unsaved_path(original or path).exists() and not log.exists()
    address = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)
    try:
        (journal,) = connection.execute("PRAGMA journal_mode").fetchone()
    except BaseException:
        connection.close()
        raise
    if journal == "wal" and has_lost_log:
        warnings.warn(
            f"{original or path}: {log.name} is not beside it, so the last trial may be missing; "
            f"it is then done again. Copy both files of a search that runs or was killed",
            stacklevel=2,
        )
    return connection


# Errors -------------------------------------------------------------------------------------


@contextmanager
def clear_errors(path: Path, *, then: str = "go on with --resume") -> Iterator[None]:
    """SQLite's errors as one line that says what to do; what has been committed stays.

    Args:
        path: the file.
        then: what to do after the cure.

    Raises:
        RuntimeError: if the file cannot be used now.
        ValueError: if it is damaged.
    """
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise RuntimeError(
            f"{path}: another process writes trials too ({error}); let only one search run in a "
            f"folder"
        ) from None
    except sqlite3.OperationalError as error:
        raise RuntimeError(
            f"{path}: {error}; finished trials are kept; {_cure(error)}, then {then}"
        ) from None
    except sqlite3.DatabaseError as error:
        raise ValueError(damaged(path, str(error))) from None


def _primary(error: sqlite3.OperationalError) -> int:
    return error.sqlite_errorcode & 0xFF  # without the extended part


def _cure(error: sqlite3.OperationalError) -> str:
    if _primary(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "end the other process that has it open"
    if _primary(error) == sqlite3.SQLITE_FULL or (
        error.sqlite_errorcode == sqlite3.SQLITE_IOERR_SHMSIZE
    ):
        return "make room on the disk"
    return "see that folder and file can be written"


def damaged(path: Path, reason: str) -> str:
    """The message on a file that holds something else than it should."""
    return (
        f"{path}: damaged or no file of trials ({reason}); nothing was written to it; put a copy "
        f'in its place, or save what can be read with: sqlite3 {path.name} ".recover"'
    )
