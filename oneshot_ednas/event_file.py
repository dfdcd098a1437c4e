"""Curves for TensorBoard: a file of events, which a run can do without.

All that it holds is in `metrics.jsonl` too, or drawn by the report. So an event file is never
synced, and one that cannot be written ends no run. TensorBoard's own writer has a thread, whose
errors come later, elsewhere and as a traceback.
"""

import io
import itertools
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from oneshot_ednas.store import make_folder, write_all

_NUMBERS = itertools.count()


class EventFile:
    """A new file of events; the first error is told by a warning, and ends the file."""

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        """Begin the file.

        Args:
            folder: of the files that TensorBoard shows as one run.
            start: step from which on this file replaces those before it.
        """
        # TensorBoard reads files in the order of their names: seconds first.
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._path = folder / f"events.out.tfevents.{name}"
        self._handle: int | None = None
        try:
            make_folder(folder)
            self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            self._give_up(error)
        self._add(start, file_version="brain.Event:2")
        self._add(start, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, number: float, step: int) -> None:
        """Add a number of a step."""
        self._add(step, summary=summary.scalar(name, number))

    def add_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Add the distribution of numbers at a step."""
        self._add(step, summary=summary.histogram(name, values.detach().cpu(), bins="auto"))

    def close(self) -> None:
        """Nothing more comes."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        try:
            os.close(handle)
        except OSError as error:
            self._give_up(error)

    def _add(self, step: int, **content: Any) -> None:
        if self._handle is None:
            return
        record = io.BytesIO()
        event = Event(wall_time=time.time(), step=step, **content)
        RecordWriter(record).write(event.SerializeToString())
        try:
            write_all(self._handle, record.getvalue())
        except OSError as error:
            self._give_up(error)
            self.close()

    def _give_up(self, error: OSError) -> None:
        warnings.warn(
            f"{self._path}: {error.strerror or error}; TensorBoard will lack what follows, "
            f"metrics.jsonl has all of it, and the run goes on",
            stacklevel=3,
        )
