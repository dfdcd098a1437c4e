"""Real kills: a run that gets SIGKILL at random moments ends as the one that got none."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crash import SMALLEST, compared_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for processes")

LONGER = ("search.steps=30", "retrain.steps=30", "search.loop.checkpoint_every=5")
"""More moments to be killed at than in the smallest run."""


def started(project: Path, out: Path, cache: Path, *settings: str) -> subprocess.Popen:
    """A run as a user starts it, in a session of its own: its processes can be told."""
    command = [sys.executable, "-m", "oneshot_ednas", "run", str(project / "config.yaml")]
    for setting in (*SMALLEST, *settings):
        command += ["--set", setting]
    return subprocess.Popen(
        [*command, "--out", str(out), "--resume"],
        env=os.environ | {"ONESHOT_EDNAS_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for the process alone; what it had started has to end by itself."""
    process.kill()
    process.communicate()
    until = time.monotonic() + 10
    while left := in_session(process.pid):
        assert time.monotonic() < until, f"orphans: {left}"
        time.sleep(0.05)


def in_session(session: int) -> list[str]:
    """Processes of a session, each as its line in /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            line = path.read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        state, _parent, _group, its_session = line.rpartition(")")[2].split()[:4]
        if int(its_session) == session and state != "Z":
            found.append(line)
    return found


def wait_for(process: subprocess.Popen, seconds: float) -> bool:
    """Whether a process still runs after this time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def is_begun(out: Path, process: subprocess.Popen) -> bool:
    """Wait until a process works in the run folder."""
    before = changed(out)
    while process.poll() is None and changed(out) == before:
        time.sleep(0.01)
    return process.poll() is None


def changed(out: Path) -> int:
    """When the config was written, which each sitting does first; 0 before the first."""
    config = out / "config.yaml"
    return config.stat().st_mtime_ns if config.exists() else 0


def killed_runs(
    project: Path, work: Path, expected: dict[str, str], seconds: float, most: int
) -> tuple[list[int], int]:
    """Kill a run until it comes to its end, which is compared.

    Args:
        project: config, space and table.
        work: a folder to work in.
        expected: files of the uninterrupted run.
        seconds: that the uninterrupted run took from its first file on.
        most: kills after which it is left alone.

    Returns:
        Lines in the log at each kill, and how many kills came in a resume.
    """
    moments = random.Random(work.name)
    kills, num_resumes = list[int](), 0
    out = work / "run"
    while True:
        process = started(project, out, work / "cache", *LONGER)
        if len(kills) == most:
            is_alive = False
        elif kills and moments.random() < 0.25:
            # Of a resume: imports, data, the folder's check, reading back.
            is_alive = wait_for(process, moments.uniform(0, 4))
            num_resumes += is_alive
        else:
            is_alive = is_begun(out, process)
            is_alive = is_alive and wait_for(process, moments.uniform(0, seconds * 2 / 3))
        if not is_alive:
            finish(process)
            assert compared_files(out) == expected
            return kills, num_resumes
        kill(process)
        log = out / "metrics.jsonl"
        kills.append(log.read_text().count("\n") if log.exists() else 0)


@pytest.fixture(scope="module")
def uninterrupted(project, tmp_path_factory) -> tuple[dict[str, str], float]:
    """Files of a run that nobody kills, and its seconds from the first file on."""
    work = tmp_path_factory.mktemp("uninterrupted")
    process = started(project, work / "run", work / "cache", *LONGER)
    is_begun(work / "run", process)
    began = time.monotonic()
    finish(process)
    return compared_files(work / "run"), time.monotonic() - began


def test_a_run_killed_a_few_times_ends_as_the_uninterrupted_one(project, uninterrupted, tmp_path):
    kills, _ = killed_runs(project, tmp_path, *uninterrupted, most=3)
    assert kills


@pytest.mark.slow
def test_runs_killed_50_times_end_as_the_uninterrupted_one(project, uninterrupted, tmp_path):
    kills, num_resumes, number = list[int](), 0, 0
    while len(kills) < 50:
        (tmp_path / str(number)).mkdir()
        some, resumes = killed_runs(project, tmp_path / str(number), *uninterrupted, most=50)
        kills, num_resumes, number = kills + some, num_resumes + resumes, number + 1
    print(f"{len(kills)} kills, {num_resumes} of them in a resume, in {number} runs, at {kills}")
    assert num_resumes >= len(kills) // 8


def test_no_loader_survives_the_process_that_started_it(project, tmp_path):
    settings = ("data.workers=2", "data.train_frames=4000")
    process = started(project, tmp_path / "run", tmp_path / "cache", *settings)
    while len(in_session(process.pid)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    kill(process)
    assert not (tmp_path / "run").exists()
