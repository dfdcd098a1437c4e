"""A run that dies at any moment, in any way, goes on as if it had not."""

import itertools
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import crash
import pytest
from crash import (
    INTERVALS,
    RETRAIN_STEPS,
    SEARCH_STEPS,
    WAYS,
    Outcome,
    Point,
    Watcher,
    compared_files,
    distinct,
    named_alike,
)

from oneshot_ednas.store import append_text, sync_file, sync_folder, write_text

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for paths of files")

CONTEXT = get_context("forkserver" if sys.platform == "linux" else "spawn")
# Each run is a fork of a process that has imported what takes long, and has trained nothing.
CONTEXT.set_forkserver_preload(
    ["oneshot_ednas.pipeline", "torch._dynamo", "torch.onnx", "conftest"]
)


class Watched(NamedTuple):
    """A watched run."""

    project: Path
    blobs: Path
    points: list[Point]
    evaluated: Outcome
    whole: Outcome


@pytest.fixture(scope="module")
def watched(project, tmp_path_factory) -> Watched:
    work = tmp_path_factory.mktemp("watched")
    with CONTEXT.Pool(1) as pool:
        found = pool.apply(crash.watched_run, (project, work / "run", work / "blobs"))
    return Watched(project, work / "blobs", *found)


# The model of the disk ----------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path) -> Iterator[Watcher]:
    for name in ("watched", "blobs"):
        (tmp_path / name).mkdir()
    with Watcher(tmp_path / "watched", blobs=tmp_path / "blobs").watching() as watcher:
        yield watcher


def left(disk, way: str) -> dict[str, str | None]:
    """What a crash now leaves."""
    state = disk.states()[way]
    return {
        name: None if held is None else (disk.blobs / held[0]).read_text()
        for name, held in state.items()
    }


def test_the_model_takes_what_was_not_synced(disk):
    path = disk.folder / "a.txt"
    path.write_text("unsynced")
    assert left(disk, "killed") == {"a.txt": "unsynced"}
    assert left(disk, "torn") == {"a.txt": "unsy"}
    assert left(disk, "power cut, names kept") == {"a.txt": ""}
    assert left(disk, "power cut") == {}
    sync_file(path)
    assert left(disk, "power cut, names kept") == left(disk, "torn") == {"a.txt": "unsynced"}
    assert left(disk, "power cut") == {}
    sync_folder(disk.folder)
    assert left(disk, "power cut") == {"a.txt": "unsynced"}
    path.rename(disk.folder / "b.txt")
    assert left(disk, "power cut") == {"a.txt": "unsynced"}
    assert left(disk, "power cut, names kept") == {"b.txt": "unsynced"}
    (disk.folder / "b.txt").unlink()
    assert left(disk, "killed") == {}
    assert left(disk, "power cut") == {"a.txt": "unsynced"}
    (disk.folder / "c").mkdir()
    assert left(disk, "killed") == {"c": None}
    sync_folder(disk.folder)
    assert left(disk, "power cut") == {"c": None}


def test_the_model_tears_the_last_write_only(disk):
    path = disk.folder / "log"
    append_text(path, "first\n")
    with path.open("a") as file:
        file.write("second")
        assert left(disk, "killed") == {"log": "first\n"}  # not yet handed to the kernel
    assert left(disk, "torn") == {"log": "first\nsec"}
    assert left(disk, "power cut") == {"log": ""}
    (disk.folder / "new").write_text("12")
    assert left(disk, "torn") == {"log": "first\nsecond", "new": "1"}
    operations = [(point.operation, point.path) for point in disk.points]
    assert operations[:3] == [("open", "log"), ("write", "log"), ("fsync", ".")]


def test_a_whole_write_is_the_old_or_the_new_at_every_moment(disk):
    write_text(disk.folder / "a.txt", "old")
    begun = len(disk.points)
    write_text(disk.folder / "a.txt", "new")
    for point, way in itertools.product(disk.points[begun:], WAYS):
        digest, _ = point.states[way]["a.txt"]
        assert (disk.blobs / digest).read_text() in ("old", "new"), (point.operation, way)
    assert left(disk, "power cut") == {"a.txt": "new"}


# Runs ---------------------------------------------------------------------------------------


def test_a_run_has_hundreds_of_moments_to_die_at(watched):
    assert watched.points[-1].number >= 500
    assert [point.number for point in watched.points] == list(range(len(watched.points)))
    assert {"model.tflite", "report.html", "metrics.jsonl"} <= set(watched.whole.files)
    assert watched.whole.steps == watched.evaluated.steps == SEARCH_STEPS + 2 * RETRAIN_STEPS


def failures(watched: Watched, chosen: list[tuple[Point, str]], work: Path, every: int) -> dict:
    """What was not as in the uninterrupted run, by point and way.

    Args:
        watched: the run.
        chosen: moments and ways to die.
        work: a folder to work in.
        every: how many of those that go on to the evaluation come on one that goes on to the end.
            At the evaluation the folder equals that of the uninterrupted run, so that the rest has
            been seen.
    """
    exported = next(one.number for one in watched.points if "model.tflite" in one.path)
    jobs = []
    for index, (point, way) in enumerate(chosen):
        is_whole = index % every == 0 or point.number >= exported
        state = point.states[way]
        jobs.append((watched.project, work / f"{index}", watched.blobs, state, is_whole))
    found = {}
    with CONTEXT.Pool(1, maxtasksperchild=1) as pool:
        results = [pool.apply_async(crash.resumed_state, job) for job in jobs]
        for (point, way), job, result in zip(chosen, jobs, results, strict=True):
            outcome = result.get()
            wrong = wrongs(outcome, watched.whole if job[-1] else watched.evaluated, point)
            if wrong:
                found[point.number, point.operation, point.path, way] = wrong
    return found


def wrongs(outcome: Outcome, expected: Outcome, point: Point) -> list[str]:
    """What a resumed run has that the uninterrupted one has not, and the other way round."""
    if outcome.error:
        return [outcome.error]
    changed = dict(outcome.files.items() ^ expected.files.items())
    # The step that was begun, and those of the interval before it.
    interval = INTERVALS[point.steps > SEARCH_STEPS]
    repeated = point.steps + outcome.steps - expected.steps
    found = [f"not equal: {name}" for name in sorted(changed)]
    return found + [f"{repeated} steps repeated"] * (not 0 <= repeated <= interval)


def test_a_run_that_dies_goes_on_as_if_it_had_not(watched, tmp_path):
    chosen = list(distinct(watched.points).values())
    sample = chosen[:: len(chosen) // 12]
    assert {way for _, way in sample} == set(WAYS)
    assert failures(watched, sample, tmp_path, every=12) == {}


@pytest.mark.slow
def test_a_run_that_dies_at_any_operation_goes_on_as_if_it_had_not(watched, tmp_path):
    chosen = list(distinct(watched.points).values())
    print(f"{len(watched.points)} points, {len(chosen)} states", Counter(w for _, w in chosen))
    assert failures(watched, chosen, tmp_path, every=20) == {}


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_really_dying_leaves_what_the_model_says(watched, tmp_path, share):
    die_at = int(share * watched.points[-1].number)
    process = CONTEXT.Process(
        target=crash.killed_run, args=(watched.project, tmp_path / "real", die_at)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    point = next(point for point in watched.points if point.number == die_at)
    crash.restore(point.states["killed"], watched.blobs, tmp_path / "model")
    real, model = (
        named_alike(compared_files(tmp_path / name / "run")) for name in ("real", "model")
    )
    assert real == model
    with CONTEXT.Pool(1) as pool:
        outcome = pool.apply(
            crash.resumed_run, (watched.project, tmp_path / "real"), {"is_whole": False}
        )
    assert wrongs(outcome, watched.evaluated, point) == []
