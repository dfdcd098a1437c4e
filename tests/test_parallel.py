"""Work spread over processes: what happens when one dies, or the one that started them."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from oneshot_ednas.data.parallel import MAX_RETRIES, chunks, run_chunks

HERE = Path(__file__).parent
JOBS = chunks(tuple(f"f{number}" for number in range(24)), 3)


def joined(frames: tuple[str, ...]) -> str:
    return "".join(frames)


def die_at(folder: Path, frame: str, times: int, frames: tuple[str, ...]) -> str:
    """Kill this process at a frame, the first `times` times, as an out-of-memory killer does."""
    if frame in frames:
        with (folder / "deaths").open("a") as file:
            file.write("x")
        if (folder / "deaths").stat().st_size <= times:
            os.kill(os.getpid(), signal.SIGKILL)
    return joined(frames)


@pytest.mark.parametrize("frame", ["f0", "f13", "f23"])
@pytest.mark.parametrize("workers", [2, 5])
def test_frames_whose_process_dies_once_are_worked_on_again(tmp_path, frame, workers):
    seen: list[tuple[int, int]] = []
    found = run_chunks(
        partial(die_at, tmp_path, frame, 1),
        JOBS,
        workers=workers,
        progress=lambda *at: seen.append(at),
    )
    assert list(found) == list(map(joined, JOBS))
    assert seen == [(3 * number, 24) for number in range(1, 9)]


def test_a_frame_that_ends_its_process_each_time_is_named(tmp_path):
    found = []
    work = partial(die_at, tmp_path, "f13", 1000)
    message = r"the process that worked on frame the-f13 died 3 times \(killed, or out of memory\)"
    with pytest.raises(RuntimeError, match=message):
        found.extend(run_chunks(work, JOBS, workers=3, name="the-{}".format))
    # Together, thrice with its group, and alone to be named.
    assert (tmp_path / "deaths").stat().st_size == 1 + (1 + MAX_RETRIES) + 1
    assert found == list(map(joined, JOBS[:4]))  # those before it


def test_frames_that_only_together_end_their_process_are_named_together(tmp_path):
    work = partial(die_at, tmp_path, "f13", 1 + 1 + MAX_RETRIES)
    with pytest.raises(RuntimeError, match="worked on frames f12 to f14 died 3 times"):
        list(run_chunks(work, JOBS, workers=2))


def test_an_error_beside_a_death_is_raised_here(tmp_path):
    with pytest.raises(ZeroDivisionError):
        list(run_chunks(partial(die_and_fail, tmp_path), JOBS, workers=2))


def die_and_fail(folder: Path, frames: tuple[str, ...]) -> str:
    if "f9" in frames:
        raise ZeroDivisionError
    return die_at(folder, "f13", 1, frames)


def wait_for(folder: Path, frames: tuple[str, ...]) -> str:
    (folder / str(os.getpid())).touch()
    time.sleep(600)
    return joined(frames)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(tmp_path, number):
    script = (
        "import sys; from pathlib import Path; from functools import partial\n"
        "from test_parallel import JOBS, wait_for, run_chunks\n"
        "list(run_chunks(partial(wait_for, Path(sys.argv[1])), JOBS, workers=3))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=HERE)
    give_up = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < give_up:
        time.sleep(0.05)
    children = [int(one.name) for one in tmp_path.iterdir()]
    assert len(children) == 3
    parent.send_signal(number)
    parent.wait()
    while any(map(is_alive, children)) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not any(map(is_alive, children))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
