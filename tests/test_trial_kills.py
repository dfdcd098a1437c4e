"""Searches by trials whose processes are killed: nothing lost, nothing twice, nobody left."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_trials import ended, proposed
from watched_evolve import Rebuilt, draws, row

from oneshot_ednas.multi_trial import database
from oneshot_ednas.multi_trial.trials import Trial, TrialStore, read_trials
from oneshot_ednas.schema import read_json
from oneshot_ednas.workers import MAX_RETRIES

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
HERE = Path(__file__).parent
PATIENCE_S = 300.0
"""For what takes seconds on a machine that does nothing else."""


def alive(session: int) -> dict[int, str]:
    """Command lines of the processes of a session, but those that wait to be collected."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, of_session = (
                    (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                )
                if int(of_session) == session and state != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except (OSError, ValueError):  # it has just ended
                continue
    return found


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has just ended
        return 0


def wait_until(is_so, what: str):
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        if value := is_so():
            return value
        time.sleep(0.05)
    raise AssertionError(f"no {what} in {PATIENCE_S} s")


class Evolution:
    """An `evolve` in a session of its own."""

    def __init__(self, project: Path, folder: Path, *, trials: int, seed: int = 3, workers=2):
        self.project, self.folder, self.out = project, folder, folder / "run"
        self.log, self.noise = folder / "known.jsonl", folder / "stderr.txt"
        folder.mkdir(exist_ok=True)
        settings = (
            f"multi_trial={{num_trials: {trials}, steps: 1, population_size: 5, "
            f"tournament_size: 2}}",
            f"seed={seed}",
            "retrain.num_seeds=1",
            "retrain.steps=1",
            "baselines=[]",
        )
        self.command = [sys.executable, HERE / "watched_evolve.py", self.log, "evolve"]
        self.command += [project / "config.yaml", "--out", self.out, "--workers", str(workers)]
        self.command += [part for setting in settings for part in ("--set", setting)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> int:
        """Begin, or go on; returns the session."""
        resume = ["--resume"] if (self.out / "config.yaml").exists() else []
        with self.noise.open("ab") as noise:
            self.process = subprocess.Popen(
                [*map(str, self.command), *resume],
                stdout=subprocess.DEVNULL,
                stderr=noise,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        return self.process.pid

    def workers(self) -> list[int]:
        """Processes that train."""
        servers = [p for p, text in alive(self.process.pid).items() if "forkserver" in text]
        return [pid for pid in servers if parent_of(pid) in servers]

    def read(self) -> list[Trial]:
        return read_trials(self.out / "trials.sqlite")

    def num_lines(self) -> int:
        """Events so far, in all sittings."""
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0

    def is_over(self) -> bool:
        """Whether there are no more trials to come."""
        return self.process.poll() is not None or (self.out / "architecture.json").exists()

    def num_ended(self) -> int:
        if not (self.out / "trials.sqlite").exists():
            return 0
        return sum(trial.ended is not None for trial in self.read())

    def nobody_is_left(self) -> None:
        wait_until(lambda: not alive(self.process.pid), "end of all processes")

    def finish(self) -> None:
        if self.process is None or self.process.poll() is not None:
            self.start()
        assert self.process.wait(PATIENCE_S) == 0, self.noise.read_text()
        self.nobody_is_left()


def check(one: Evolution, seen: dict[int, Trial]) -> list[Trial]:
    """Whatever happened, the trials of a finished search are as they should be."""
    trials = one.read()
    assert sorted(one.out.glob("trials*")) == [one.out / "trials.sqlite"]  # no log, no reserve
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert all(trial.state in ("done", "failed", "duplicate") for trial in trials)
    events = [trial.proposed for trial in trials] + [trial.ended for trial in trials]
    assert sorted(events) == list(range(2 * len(trials)))
    assert all(trial.ended > trial.proposed for trial in trials)
    # What had ended is as it was, whoever looked at it.
    for number, trial in seen.items():
        assert trials[number] == trial
    lines = [json.loads(line) for line in one.log.read_text().splitlines()]
    for line in lines:
        if "ended" in line:
            assert row(trials[line["ended"]["number"]]) == line["ended"]
    for trial in trials:
        if trial.state == "duplicate":
            before = [t for t in trials[: trial.number] if t.architecture == trial.architecture]
            assert trial.reward in [t.reward for t in before]
            assert trial.macs == trial.seconds == 0
        if trial.state == "failed":
            assert (
                trial.error
                == f"its process died {1 + MAX_RETRIES} times (killed, or out of memory)"
            )
    done = [trial.architecture for trial in trials if trial.state == "done"]
    assert len(done) == len(set(done))
    counts = read_json(one.out / "results.json")["trials"]
    assert counts["proposed"] == len(trials)
    for state in ("done", "failed", "duplicate"):
        assert counts[state] == sum(trial.state == state for trial in trials)
    # The log of the run has a line for each trial, in the order of their ends.
    rows = map(json.loads, (one.out / "metrics.jsonl").read_text().splitlines())
    logged = [row for row in rows if row["stage"] == "search"]
    assert [row["step"] for row in logged] == list(range(len(trials)))
    by_end = sorted(trials, key=lambda trial: trial.ended)
    assert [row.get("reward") for row in logged] == [trial.reward for trial in by_end]
    check_algorithm(one, lines)
    return trials


def check_algorithm(one: Evolution, lines: list) -> None:
    """What the trials alone rebuild is what each search knew, at each of its events."""
    copy = one.folder / "copy.sqlite"
    shutil.copy(one.out / "trials.sqlite", copy)
    with TrialStore(copy) as store:
        rebuilt = Rebuilt(one.out, store)
    assert len(rebuilt.known) == store.num_events
    assert len(rebuilt.known[-1]["random"]) >= 3
    for line in lines:
        if "draws" not in line:
            assert line["known"] == rebuilt.known[line["events"] - 1]
    # A search that was killed after its last trial comes to its end once more.
    ends, expected = [line["draws"] for line in lines if "draws" in line], draws(rebuilt)
    assert ends
    assert all(end == expected for end in ends)


@pytest.mark.parametrize(
    ("kills", "num_trials"),
    [pytest.param(*kills, marks=pytest.mark.slow) for kills in ((5, 40), (100, 150))],
)
def test_no_trial_is_lost_or_counted_twice_when_processes_are_killed(
    project, tmp_path, kills, num_trials
):
    generator = random.Random(kills)
    done = {"workers": 0, "searches": 0}
    rounds: list[list[Trial]] = []
    while not rounds or done["workers"] < kills:
        number = len(rounds)
        one = Evolution(
            project,
            tmp_path / str(number),
            trials=num_trials,
            seed=number,
            workers=2 + number % 2,
        )
        rounds.append(kill_at_random(one, generator, kills, done))
        print(f"{done} after {len(rounds)} searches", flush=True)
    trials = [trial for found in rounds for trial in found]
    states = {state: sum(t.state == state for t in trials) for state in ("done", "failed")}
    print(f"{done} killed in {len(rounds)} searches: {len(trials)} trials, {states}")
    assert done["workers"] >= kills
    assert states["done"] > len(trials) / 2


def kill_at_random(one: Evolution, generator, kills: int, done: dict[str, int]) -> list[Trial]:
    """A search until its end, with kills of some of its processes, or of itself and a resumption.

    Most kills wait for an event, so that some trials end on a slow machine too; then, and else,
    they come at any moment.
    """
    seen: dict[int, Trial] = {}
    one.start()
    while one.process.poll() is None:
        if generator.random() < 0.8:
            before = one.num_lines()
            wait_until(lambda b=before: one.num_lines() > b or one.is_over(), "event")
        time.sleep(generator.uniform(0.0, 0.7))
        if one.num_ended():
            found = {trial.number: trial for trial in one.read() if trial.ended is not None}
            assert {number: found[number] for number in seen} == seen
            seen = found
        if done["workers"] >= kills or one.is_over():
            one.process.wait(PATIENCE_S)
        elif generator.random() < 0.85:
            victims = one.workers()
            chosen = generator.sample(victims, generator.randint(0, len(victims)))
            done["workers"] += sum(map(_killed, chosen))
        elif one.num_ended():
            done["searches"] += _killed(one.process.pid)
            one.process.wait()
            one.nobody_is_left()
            one.start()
    one.finish()
    return check(one, seen)


def _killed(pid: int) -> int:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1


@pytest.mark.slow
def test_searches_that_are_killed_again_and_again_end_as_if_they_had_not_been(project, tmp_path):
    generator, num_kills, number = random.Random(25), 0, 0
    while num_kills < 25:
        one = Evolution(project, tmp_path / f"{number}", trials=70, seed=number, workers=1)
        some, seen = kill_again_and_again(one, generator, most=25 - num_kills)
        one.finish()
        trials = check(one, seen)
        whole = Evolution(project, tmp_path / f"{number}_whole", trials=70, seed=number, workers=1)
        whole.finish()
        times = {"seconds": None, "cpu_seconds": None}
        assert [replace(t, **times) for t in trials] == [replace(t, **times) for t in whole.read()]
        num_kills, number = num_kills + some, number + 1
    print(f"{num_kills} kills of {number} searches")


def kill_again_and_again(one: Evolution, generator, *, most: int) -> tuple[int, dict[int, Trial]]:
    """Kills of a search, up to some or until it ends, and the trials that had ended at the last."""
    seen: dict[int, Trial] = {}
    for kills in range(most):
        one.start()
        before = one.num_ended()
        if generator.random() < 0.75:  # the others anywhere, also before the first event
            wait_until(lambda before=before: one.num_ended() > before or one.is_over(), "trial")
            time.sleep(generator.uniform(0.0, 0.5))
        else:
            time.sleep(generator.uniform(0.5, 8.0))
        if one.process.poll() is not None:
            return kills, seen
        one.process.kill()
        one.process.wait()
        one.nobody_is_left()
        found = {t.number: t for t in one.read() if t.ended is not None} if before else {}
        assert {number: found[number] for number in seen} == seen
        seen = found
    return most, seen


@pytest.mark.parametrize(
    ("number", "times"),
    [
        (signal.SIGINT, 2),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
)
def test_a_search_that_is_asked_to_stop_leaves_nobody_and_goes_on(project, tmp_path, number, times):
    one = Evolution(project, tmp_path / "run", trials=40)
    one.start()
    wait_until(lambda: one.num_ended() >= 2, "trial")
    seen = {trial.number: trial for trial in one.read() if trial.ended is not None}
    for _ in range(times):
        if number == signal.SIGINT:
            os.killpg(one.process.pid, number)  # as a terminal does
        else:
            one.process.send_signal(number)
        time.sleep(0.1)
    assert one.process.wait(PATIENCE_S) == 130
    one.nobody_is_left()
    lines = one.noise.read_text().splitlines()
    assert "go on with --resume" in lines[-1]
    assert "Traceback" not in one.noise.read_text()
    now = {trial.number: trial for trial in one.read()}
    assert {number: now[number] for number in seen} == seen
    if times == 1:
        one.finish()
        check(one, seen)


def write_until_killed(path: Path, space, log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with TrialStore(path) as store:
        for trial in [one for one in store.trials.values() if one.ended is None]:
            store.end(ended(trial, store.num_events, trial.number / 7))
        for number in range(len(store.trials), 100_000):
            store.propose(proposed(space, number, store.num_events))
            store.end(ended(store.trials[number], store.num_events, number / 7))
            os.write(handle, f"{number}\n".encode())


def test_kills_in_the_middle_of_writing_lose_no_event(small_space, tmp_path, monkeypatch):
    path, log = tmp_path / "trials.sqlite", tmp_path / "ended.txt"
    monkeypatch.setattr(database, "LET_GO_SECONDS", 0.05)
    generator = random.Random(0)
    for _ in range(25):
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(path, small_space, log)
            finally:
                os._exit(1)
        if generator.random() < 0.7:  # the others while it opens the file
            before = log.stat().st_size if log.exists() else 0
            wait_until(lambda before=before: log.exists() and log.stat().st_size > before, "trial")
        time.sleep(generator.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        told = [int(line) for line in log.read_text().splitlines()] if log.exists() else []
        if generator.random() < 0.5:
            continue  # the next search takes in what is left, not a reader
        if told:
            trials = read_trials(path)
            assert all(trials[number].reward == number / 7 for number in told)
    with TrialStore(path) as store:
        trials = list(store.trials.values())
        events = store.num_events
    assert len(told) > 15
    assert [trial.number for trial in trials] == list(range(len(trials)))
    places = [trial.proposed for trial in trials]
    places += [trial.ended for trial in trials if trial.ended is not None]
    assert sorted(places) == list(range(events))
    assert sum(trial.ended is None for trial in trials) <= 1
    assert all(
        trials[number]
        == ended(
            proposed(small_space, number, trials[number].proposed), trials[number].ended, number / 7
        )
        for number in told
    )
    assert [one.name for one in tmp_path.glob("trials*")] == ["trials.sqlite"]
