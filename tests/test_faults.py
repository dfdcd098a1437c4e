"""Faults of disk, memory, processes and clock: a run goes on as if nothing had happened, or ends
with one clear line and loses nothing.

Faults of a database are in test_trials.py, deaths at each file operation in test_crash.py.
"""

import errno
import json
import math
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import crash
import numpy as np
import pytest
import test_cli
import torch
from faults import failing
from safetensors.torch import save as save_tensors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import call, rooms_arguments
from tiny import new_run

from oneshot_ednas import store
from oneshot_ednas.checkpoint import _digest, _pack, load_checkpoint, save_checkpoint
from oneshot_ednas.event_file import EventFile
from oneshot_ednas.retrain import NetworkTraining
from oneshot_ednas.schema import read_json
from oneshot_ednas.search import OneShotSearch
from oneshot_ednas.store import append_text, lock_folder, sync_log, write_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for paths of files")

STAGES = ("search", "derive", "retrain", "evaluate", "export", "report")
SETTINGS = (*crash.SMALLEST, "search.steps=4", "retrain.steps=3")
"""Checkpoints are made every 2 steps of the search, and each step of a retraining."""
CONTEXT = get_context("forkserver" if sys.platform == "linux" else "spawn")
# Each process is a fork of one that has imported what takes long, and has trained nothing.
CONTEXT.set_forkserver_preload(
    ["oneshot_ednas.pipeline", "torch._dynamo", "torch.onnx", "torch.utils.tensorboard", "conftest"]
)
COMMANDS = {"evaluate": "evaluate", "export": "evaluate", "report": "evaluate"}
"""Of the stages that have none of their own."""


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 of all files but those before the newest, which tell where a run was cut."""
    files = crash.compared_files(folder)
    return {name: digest for name, digest in files.items() if ".previous" not in name}


@pytest.fixture(scope="module")
def run(project, tmp_path_factory) -> tuple[dict[str, Path], dict[str, dict[str, str]]]:
    """By stage, the folder of a run before it, and what it had come to afterwards."""
    before, after = {}, {}
    work = tmp_path_factory.mktemp("stages")
    one = new_run(project, work / "run", overrides=SETTINGS)
    for stage in STAGES:
        before[stage] = shutil.copytree(work / "run", work / f"before-{stage}")
        getattr(one, stage)()
        after[stage] = files_of(work / "run")
    return before, after


class Trial:
    """A run that is to meet a fault in a stage."""

    def __init__(self, before: Path, folder: Path, stage: str, after: dict[str, str]) -> None:
        self.folder = shutil.copytree(before, folder)
        self.stage, self.after = stage, after
        self.command = COMMANDS.get(stage, stage)

    def go_on(self) -> None:
        """The stage runs, and is what it is in the undisturbed run."""
        result = call(self.command, self.folder)
        assert result.exit_code == 0, result.stderr
        self.is_as_undisturbed()

    def is_as_undisturbed(self) -> None:
        assert files_of(self.folder) == self.after
        assert not [path.name for path in self.folder.rglob("*.partial")]

    def ends(self, status: int, then: Callable[[], object] = lambda: None) -> str:
        """The stage ends with an exit status; gives the last line of stderr."""
        try:
            result = call(self.command, self.folder)
        finally:
            then()
        assert (result.exit_code, result.stdout) == (status, ""), result.stderr
        assert "Traceback" not in result.stderr
        assert not [path.name for path in self.folder.rglob("*.partial")]
        return result.stderr.splitlines()[-1]

    @property
    def step(self) -> int:
        """Steps in the checkpoint of the search."""
        return load_checkpoint(self.folder / "checkpoints" / "search.safetensors")["step"]


@pytest.fixture
def trial(run, tmp_path) -> Callable[[str], Trial]:
    def make(stage: str) -> Trial:
        # Evaluation, export and report are one command.
        end = "report" if stage in COMMANDS else stage
        return Trial(run[0][stage], tmp_path / "run", stage, run[1][end])

    return make


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(store, "RETRY_SECONDS", (0.0, 0.0, 0.0))


def at_step(monkeypatch, number: int, act: Callable[[], None]) -> None:
    """Do something once, at the start of a step of any training."""
    is_done = False

    def wrapped(take_step):
        def call(training, step):
            nonlocal is_done
            if step == number and not is_done:
                is_done = True
                act()
            return take_step(training, step)

        return call

    for kind in (OneShotSearch, NetworkTraining):
        monkeypatch.setattr(kind, "take_step", wrapped(kind.take_step))


# Disk ---------------------------------------------------------------------------------------

FAULTS = [
    ("open", errno.EACCES, "see that the folder can be written"),
    ("open", errno.EROFS, "mount the file system writable"),
    ("open", errno.EMFILE, r"raise the limit of open files (ulimit -n)"),
    ("write", errno.ENOSPC, "make room on the disk"),
    ("write", errno.EDQUOT, "make room in your quota"),
    ("write", errno.EFBIG, "raise the limit of file sizes (ulimit -f)"),
    ("write", errno.EIO, "check the disk"),
    ("write", "altered", "check the disk"),
    ("fsync", errno.EIO, "check the disk"),
    ("replace", errno.EXDEV, "see that the file is no mount of its own"),
]
PASSING = [
    ("open", errno.EMFILE),
    ("write", errno.ENOSPC),
    ("write", errno.EIO),
    ("write", "short"),
    ("write", "altered"),
    ("fsync", errno.EIO),
    ("fsync", errno.ENOSPC),
    ("replace", errno.EIO),
    ("link", errno.EIO),
    ("link", errno.EXDEV),
]
PLACES = {
    "checkpoint": ("search", "search.safetensors"),
    "log": ("search", "metrics.jsonl"),
}
OTHER_PLACES = {
    "times": ("search", "seconds.json"),
    "architecture": ("derive", "architecture.json"),
    "training": ("retrain", "retrain.seed_0.safetensors"),
    "results": ("evaluate", "results.json"),
    "model": ("export", "model.tflite"),
    "report of the model": ("export", "export.json"),
    "pictures": ("report", "predictions.png"),
    "report": ("report", "report.html"),
}
"""With a few of the faults in the default tests."""
FEW = (("write", errno.ENOSPC), ("fsync", errno.EIO))


def is_met(name: str, function: str, way: int | str) -> bool:
    """Whether a stage does the operation on the file, and the fault matters there."""
    if name == "log":  # is added to, and not read back
        return function in ("open", "write", "fsync") and way != "altered"
    return function != "link" or name in ("checkpoint", "training")


def pairs(faults) -> list:
    """Places with faults; most of them are slow."""
    found = []
    for name, (stage, file) in (PLACES | OTHER_PLACES).items():
        for fault in faults:
            is_quick = name in PLACES or (stage not in COMMANDS and fault[:2] in FEW)
            if is_met(name, *fault[:2]):
                marks = [] if is_quick else [pytest.mark.slow]
                label = f"{name}-{fault[0]}-{named(fault[1])}"
                found.append(pytest.param(stage, file, *fault, id=label, marks=marks))
    return found


def named(way: int | str) -> str:
    return way if isinstance(way, str) else errno.errorcode[way]


@pytest.mark.parametrize(
    ("stage", "file", "function", "way"),
    pairs(PASSING),
)
def test_a_fault_that_passes_leaves_no_trace(trial, stage, file, function, way):
    one = trial(stage)
    times = 1 if way in (errno.EXDEV, "short") else 2
    with failing(function, way, of=file, times=times) as fault:
        one.go_on()
    assert fault.hits == times


@pytest.mark.parametrize(
    ("stage", "file", "function", "way", "cure"),
    pairs(FAULTS),
)
def test_a_fault_that_stays_ends_the_run_and_loses_nothing(trial, stage, file, function, way, cure):
    one = trial(stage)
    with failing(function, way, of=file) as fault:
        line = one.ends(2)
    assert fault.hits
    path = next(p for p in line.split(": ") if p.endswith(file))
    assert Path(path).is_relative_to(one.folder)
    reason = "what was read back is not" if way == "altered" else os.strerror(way)
    assert line.startswith(f"error: {path}: {reason}")
    assert line.endswith(f"; not written, what was there before is kept; {cure}, then go on")
    one.go_on()


def test_a_full_disk_in_the_last_stages_ends_the_run_and_loses_nothing(trial):
    one = trial("evaluate")
    for file in ("results.json", "model.tflite", "report.html"):
        with failing("write", errno.ENOSPC, of=file):
            assert f"{file}: No space left on device; not written" in one.ends(2)
    one.go_on()


def test_short_writes_are_made_whole(tmp_path):
    data = bytes(range(256)) * 9
    with failing("write", "short", of="a") as fault:
        write_bytes(tmp_path / "a", data)
        append_text(tmp_path / "a.log", "one line\n")
    assert fault.hits > 10
    assert (tmp_path / "a").read_bytes() == data
    assert (tmp_path / "a.log").read_text() == "one line\n"


def test_a_system_that_takes_nothing_is_an_error_and_no_endless_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda *_: 0)
    with pytest.raises(OSError, match="nothing more can be written; not written"):
        write_bytes(tmp_path / "a", b"x")


def test_a_log_line_is_there_once_or_not_at_all(tmp_path):
    path = tmp_path / "a.log"
    append_text(path, "first\n")
    # A part is written before the disk is full.
    with (
        failing("write", errno.ENOSPC, of="a.log"),
        failing("write", "short", of="a.log", times=1),
        pytest.raises(OSError, match="No space left on device; not written"),
    ):
        append_text(path, "second\n")
    assert path.read_text() == "first\n"
    with failing("write", errno.EIO, of="a.log", times=3):
        append_text(path, "second\n")
    assert path.read_text() == "first\nsecond\n"


def test_a_log_that_cannot_be_synced_is_written_anew(tmp_path):
    path = tmp_path / "a.log"
    append_text(path, "first\n")
    before = path.stat().st_ino
    with failing("fsync", errno.EIO, of="a.log", times=1):
        sync_log(path)
    assert path.read_text() == "first\n"
    assert path.stat().st_ino != before
    with failing("fsync", errno.EIO, of="a.log"), pytest.raises(OSError, match="check the disk"):
        sync_log(path)
    assert path.read_text() == "first\n"


def test_a_folder_that_cannot_be_synced_costs_no_previous_checkpoint(tmp_path, monkeypatch):
    path, previous = tmp_path / "a", tmp_path / "b"
    for data in (b"1", b"2"):
        write_bytes(path, data, previous=previous)
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) and not failed:
            failed.append(handle)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(handle)

    failed: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        write_bytes(path, b"3", previous=previous)
    assert failed
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    message = "Input/output error; written, but a power cut may bring back what was there before"
    monkeypatch.setattr(store, "sync_folder", lambda _: raising(OSError(5, "Input/output error"))())
    with pytest.raises(OSError, match=message):
        write_bytes(path, b"4", previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"4", b"3")


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A file system of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_really_full_ends_the_run_and_loses_nothing(trial, run, tmp_path):
    one, disk = trial("search"), tmp_path / "disk"
    # Room for the first checkpoint, and half of the second.
    checkpoint = (run[0]["derive"] / "checkpoints" / "search.safetensors").stat().st_size
    with mounted(disk, 2**15 + 3 * checkpoint // 2):
        one.folder = shutil.copytree(one.folder, disk / "run")
        line = one.ends(2)
        assert "search.safetensors: No space left on device; not written" in line
        assert one.step == 2
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        one.go_on()


@pytest.mark.parametrize("passes", [True, False])
def test_a_real_limit_of_open_files(trial, monkeypatch, passes):
    one = trial("search")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(count: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))

    at_step(monkeypatch, 3, lambda: allow(3))
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if passes:
            allow(soft)

    monkeypatch.setattr(store.time, "sleep", sleep)
    if passes:
        one.go_on()
        assert len(waits) == 1
        return
    line = one.ends(2, lambda: allow(soft))
    assert len(waits) == 6  # of the line, and of the log's end
    assert "Too many open files; not written, what was there before is kept; raise the li" in line
    assert one.step == 2
    one.go_on()


def test_a_real_limit_of_file_sizes(trial, monkeypatch):
    one = trial("search")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 3, lambda: limit((100_000, hard)))
    line = one.ends(2, lambda: limit((soft, hard)))
    assert "search.safetensors: File too large; not written, what was th" in line
    assert line.endswith("raise the limit of file sizes (ulimit -f), then go on")
    assert one.step == 2
    one.go_on()


@pytest.mark.parametrize(("function", "way"), [("open", errno.EMFILE), ("open", errno.EACCES)])
def test_a_folder_that_cannot_be_locked_is_refused(tmp_path, function, way):
    folder = tmp_path / "new"
    message = f"{os.strerror(way)}; not written.*, then go on"
    with failing(function, way, of=".lock"), pytest.raises(OSError, match=message):
        lock_folder(folder)
    lock_folder(folder)


def test_a_checkpoint_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    for step in (1, 2):
        save_checkpoint(path, {"step": step})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            load_checkpoint(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert load_checkpoint(path) == {"step": 2}


# TensorBoard --------------------------------------------------------------------------------


def events(folder: Path) -> list[tuple[str, int, float]]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return [(tag, e.step, e.value) for tag in tags for e in accumulator.Scalars(tag)]


def test_tensorboard_reads_an_event_file(tmp_path):
    one = EventFile(tmp_path)
    one.add_scalar("loss", 1.5, 0)
    one.add_scalar("loss", 0.5, 1)
    one.add_histogram("alpha", torch.arange(6.0).reshape(2, 3), 0)
    assert events(tmp_path) == [("loss", 0, 1.5), ("loss", 1, 0.5)]  # nothing waits for the end
    one.close()
    one.close()
    one.add_scalar("loss", 0.0, 2)
    again = EventFile(tmp_path, start=1)  # takes step 1 again
    again.add_scalar("loss", 0.25, 1)
    again.close()
    assert events(tmp_path) == [("loss", 0, 1.5), ("loss", 1, 0.25)]
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    (histogram,) = accumulator.Histograms("alpha")
    assert (histogram.step, histogram.histogram_value.num) == (0, 6)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("function", "way", "times"),
    [
        ("open", errno.EACCES, None),
        ("open", errno.EMFILE, 1),
        ("write", errno.ENOSPC, None),
        ("write", errno.EIO, 1),
        ("write", "short", None),
    ],
)
def test_a_run_goes_on_without_tensorboard_and_says_so_once(trial, function, way, times):
    one = trial("search")
    with failing(function, way, of="tfevents", times=times) as fault:
        result = call("search", one.folder)
    assert result.exit_code == 0
    assert fault.hits
    lines = [line for line in result.stderr.splitlines() if "TensorBoard" in line]
    assert len(lines) == (way != "short")
    for line in lines:
        assert line.startswith("warning: ")
        assert os.strerror(way) in line
        assert "metrics.jsonl has all of it, and the run goes on" in line
    one.is_as_undisturbed()


# Memory -------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("search", MemoryError()),
        ("search", MemoryError("Unable to allocate 9.3 GiB for an array with shape (9, 9)")),
        ("search", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")),
        ("retrain", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")),
    ],
)
def test_a_step_without_memory_ends_the_run_and_loses_nothing(trial, monkeypatch, stage, error):
    one = trial(stage)
    at_step(monkeypatch, 2, raising(error))
    line = one.ends(1)
    assert line.startswith("error: out of memory (")
    assert "; lower batch_size, or set search.checkpoint_activations or precision: bf" in line
    assert line.endswith(" ended: its last checkpoint is kept, of 2 steps")
    one.go_on()


def test_a_stage_without_steps_and_memory_ends_the_run_and_loses_nothing(trial, monkeypatch):
    one = trial("derive")
    with monkeypatch.context() as patch:
        error = MemoryError("Unable to allocate 9.3 GiB")
        patch.setattr("oneshot_ednas.pipeline.BudgetSearch", lambda *_: raising(error)())
        line = one.ends(1)
    assert line == "error: out of memory (Unable to allocate 9.3 GiB); lower the batch sizes"
    one.go_on()


def starved(folder: Path, allocate: Callable[[int], object]) -> tuple[int, str]:
    """A search in a process that may not have more memory, and asks for it; its last line."""
    torch.set_num_threads(1)
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def ask() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**26
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        allocate(2**28)

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, ask)
        result = call("search", folder)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    return result.exit_code, result.stderr.splitlines()[-1]


@pytest.mark.parametrize("allocate", [torch.ones, np.ones, bytearray])
def test_a_process_that_really_has_no_memory_ends_and_loses_nothing(trial, allocate):
    one = trial("search")
    with CONTEXT.Pool(1) as pool:
        status, line = pool.apply(starved, (one.folder, allocate))
    assert status == 1
    assert line.startswith("error: out of memory (")
    assert line.endswith("search ended: its last checkpoint is kept, of 2 steps")
    one.go_on()


# Signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["search", "retrain"])
def test_a_signal_ends_the_step_and_the_run(trial, monkeypatch, stage, number):
    one = trial(stage)
    at_step(monkeypatch, 0, partial(signal.raise_signal, number))
    line = one.ends(130)
    assert re.fullmatch(r"stopped after step 1 of \d in \S+; go on with .*", line)
    name = "search" if stage == "search" else "retrain.seed_0"
    assert load_checkpoint(one.folder / "checkpoints" / f"{name}.safetensors")["step"] == 1
    one.go_on()


def twice() -> None:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once_and_costs_one_interval(trial, monkeypatch):
    one = trial("search")
    at_step(monkeypatch, 3, twice)
    assert one.ends(130).startswith("stopped; go on with ")
    assert one.step == 2
    one.go_on()


def test_two_ctrl_c_while_a_checkpoint_is_written_leave_the_one_before(trial, monkeypatch):
    one, real = trial("search"), os.fsync
    files = []

    def fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        files.extend([path] if "search.safetensors" in path else [])
        if len(files) == 2:
            files.append("")
            twice()
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert one.ends(130).startswith("stopped; go on with ")
    assert one.step == 2
    one.go_on()


def test_sigterm_ends_a_stage_without_steps(trial, monkeypatch):
    one = trial("derive")
    with monkeypatch.context() as patch:
        terminate = partial(signal.raise_signal, signal.SIGTERM)
        patch.setattr("oneshot_ednas.pipeline.BudgetSearch", lambda *_: terminate())
        assert one.ends(130).startswith("stopped; go on with ")
    one.go_on()


# Data ---------------------------------------------------------------------------------------


rooms = test_cli.rooms


@pytest.fixture
def other_cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ONESHOT_EDNAS_CACHE", str(folder))
    return folder


def test_a_run_goes_on_when_its_cached_frames_are_deleted_under_it(trial, other_cache, monkeypatch):
    one = trial("search")
    at_step(monkeypatch, 1, lambda: shutil.rmtree(other_cache))
    one.go_on()
    assert not other_cache.exists()


def test_frames_that_were_deleted_between_two_sittings_are_made_again(
    trial, other_cache, monkeypatch
):
    one = trial("search")
    at_step(monkeypatch, 1, partial(signal.raise_signal, signal.SIGTERM))
    one.ends(130)
    shutil.rmtree(other_cache)
    one.go_on()
    assert other_cache.exists()


def test_a_data_folder_that_moved_is_named_and_found_again(rooms, other_cache, monkeypatch):
    arguments = rooms_arguments(rooms)
    settings = ("--set", "search.steps=3", "--set", "search.loop.checkpoint_every=1")
    # Away in the middle of a step, which reads the packed frames.
    at_step(monkeypatch, 1, lambda: (rooms / "data").rename(rooms / "moved"))
    at_step(monkeypatch, 2, partial(signal.raise_signal, signal.SIGTERM))
    assert call(*arguments, *settings).exit_code == 130
    out = rooms / "runs" / "run"
    result = call("search", out)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: no data folder {rooms / 'data'}")
    result = call("search", out, "--data", rooms / "moved")
    assert result.exit_code == 0, result.stderr
    assert load_checkpoint(out / "checkpoints" / "search.safetensors")["step"] == 3


# Clock --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_jumps_changes_nothing(trial, monkeypatch, hours):
    one, real, shift = trial("search"), time.time, []
    monkeypatch.setattr(time, "time", lambda: real() + sum(shift))
    at_step(monkeypatch, 2, lambda: shift.append(3600.0 * hours))
    began = time.perf_counter()
    one.go_on()
    spent = read_json(one.folder / "seconds.json")["search"]
    assert 0 < spent < time.perf_counter() - began


# Two runs on one folder ---------------------------------------------------------------------


def second_run(folder: Path) -> tuple[int, str]:
    result = call("search", folder)
    return result.exit_code, result.stderr


def test_a_second_run_on_a_folder_is_refused_and_the_first_undisturbed(trial, monkeypatch):
    one, found = trial("search"), []
    with CONTEXT.Pool(1) as pool:
        at_step(monkeypatch, 2, lambda: found.append(pool.apply(second_run, (one.folder,))))
        one.go_on()
    ((status, said),) = found
    assert status == 2
    assert said == (
        f"error: another process works on {one.folder}; wait for it or stop it, or choose another "
        f"--out\n"
    )


def die_with_the_lock(folder: Path) -> None:
    lock_folder(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_lock_of_a_dead_process_holds_nobody_up(trial):
    one = trial("search")
    process = CONTEXT.Process(target=die_with_the_lock, args=(one.folder,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (one.folder / store.LOCK).exists()
    one.go_on()


# Checkpoints of other versions --------------------------------------------------------------


def rewrite(path: Path, form: int, *, without: tuple[str, ...] = ()) -> None:
    """Write a checkpoint as another version would."""
    state = {key: value for key, value in load_checkpoint(path).items() if key not in without}
    tensors: dict[str, torch.Tensor] = {}
    tree = _pack(state, "", tensors)
    header = {"format": form, "sha256": _digest(tensors, tree, form), "state": tree}
    if form < 2:
        metadata = {key: v if isinstance(v, str) else json.dumps(v) for key, v in header.items()}
    else:
        metadata = {"checkpoint": json.dumps(header)}
    path.write_bytes(save_tensors(tensors, metadata=metadata))


def stopped(one: Trial, monkeypatch) -> Path:
    """The checkpoint of a stopped search."""
    at_step(monkeypatch, 1, partial(signal.raise_signal, signal.SIGTERM))
    one.ends(130)
    return one.folder / "checkpoints" / "search.safetensors"


def test_a_checkpoint_of_format_1_goes_on(trial, monkeypatch):
    one = trial("search")
    rewrite(stopped(one, monkeypatch), 1)
    one.go_on()


@pytest.mark.parametrize("form", [0, 99])
def test_a_checkpoint_of_an_unknown_format_is_refused_and_kept(trial, monkeypatch, form):
    one = trial("search")
    path = stopped(one, monkeypatch)
    rewrite(path, form)
    held = path.read_bytes()
    line = one.ends(2)
    assert line == (
        f"error: {path}: expected checkpoint format 1 to 2, got {form}; another version of "
        f"oneshot_ednas wrote it: go on with that one, or start anew with another --out"
    )
    assert path.read_bytes() == held


def test_a_checkpoint_without_what_older_versions_did_not_keep_goes_on(trial, monkeypatch):
    one = trial("search")
    rewrite(stopped(one, monkeypatch), 1, without=("balancing", "macs", "num_skipped"))
    # All is as undisturbed but the cost, which is not known.
    result = call("search", one.folder)
    assert result.exit_code == 0, result.stderr
    path = one.folder / "checkpoints" / "search.safetensors"
    state = load_checkpoint(path)
    assert math.isnan(state["macs"])
    files = files_of(one.folder)
    differing = {name for name in files if files[name] != one.after[name]}
    assert differing == {"checkpoints/search.safetensors", "metrics.jsonl"}


def test_an_export_is_told_by_what_it_is_of_and_not_by_the_clock(trial):
    one = trial("report")  # exported; then the clock was wrong
    for name, hours in (("export.json", -5), ("model.tflite", -5)):
        moment = time.time() + 3600 * hours
        os.utime(one.folder / name, (moment, moment))
    inode = (one.folder / "model.tflite").stat().st_ino
    one.go_on()
    assert (one.folder / "model.tflite").stat().st_ino == inode  # not made again
    # A network that was trained anew is exported anew, even by a clock that went back.
    path = one.folder / "checkpoints" / "retrain.seed_0.safetensors"
    state = load_checkpoint(path)
    save_checkpoint(path, state | {"seed_of_a_test": 1})
    os.utime(path, (0, 0))
    assert call("evaluate", one.folder).exit_code == 0
    assert (one.folder / "model.tflite").stat().st_ino != inode
