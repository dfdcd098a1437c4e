"""The store of trials: what it keeps, and what happens when its file cannot be used."""

import errno
import os
import resource
import shutil
import sqlite3
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.multi_trial import database, trials
from oneshot_ednas.multi_trial.trials import Trial, TrialStore, read_trials


def proposed(space, number: int, event: int) -> Trial:
    architecture = space.decode([number % len(choice.options) for choice in space.choices])
    return Trial(
        number=number,
        architecture=architecture,
        choices=space.encode(architecture),
        seed=2**63 - 1 - number,
        state="running",
        proposed=event,
        latency_ms=1.0 + number,
    )


def ended(trial: Trial, event: int, reward: float = 0.5) -> Trial:
    return replace(
        trial,
        state="done",
        ended=event,
        metrics={"depth": {"absolute_error": 0.1 + reward}},
        accuracy=0.3,
        reward=reward,
        seconds=2.5,
        cpu_seconds=2.25,
        macs=1e12,
    )


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "LET_GO_SECONDS", 0.05)
    return tmp_path / "trials.sqlite"


def fill(path, space, count: int) -> list[Trial]:
    with TrialStore(path) as store:
        for number in range(count):
            store.propose(proposed(space, number, store.num_events))
            store.end(ended(store.trials[number], store.num_events))
        return list(store.trials.values())


@settings(max_examples=8)
@given(reward=st.floats(0, 1e6), error=st.text(st.characters(codec="utf-8"), min_size=1))
def test_trials_read_back_as_they_were(small_space, tmp_path_factory, reward, error):
    path = tmp_path_factory.mktemp("trials") / "trials.sqlite"
    with TrialStore(path) as store:
        first, second = (proposed(small_space, number, number) for number in range(2))
        store.propose(first)
        store.propose(second)
        assert read_trials(path) == [first, second]
        kept = [ended(first, 3, reward), replace(second, state="failed", ended=2, error=error)]
        store.end(kept[1])
        store.end(kept[0])
        assert store.num_events == 4
        assert read_trials(path) == kept
    assert read_trials(path) == kept
    with TrialStore(path) as store:
        assert list(store.trials.values()) == kept
        assert store.num_events == 4
    assert [one.name for one in path.parent.iterdir()] == ["trials.sqlite"]


def test_a_trial_that_has_ended_is_there_at_once(small_space, path):
    # As after a kill: nothing is closed.
    store = TrialStore(path)
    store.propose(proposed(small_space, 0, 0))
    store.end(ended(store.trials[0], 1))
    assert read_trials(path)[0].state == "done"
    store.close()


def test_no_trials_are_reported_as_such(path):
    with pytest.raises(FileNotFoundError, match="no trials"):
        read_trials(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="expected trials of format 1, got 0"):
        read_trials(path)
    # A crash while the file was begun.
    TrialStore(path).close()
    assert read_trials(path) == []


@pytest.mark.parametrize("offset", [0, 4096])
def test_a_damaged_file_is_refused_and_left_as_it_is(small_space, path, offset):
    fill(path, small_space, 40)
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = b"\xff" * 200
    path.write_bytes(data)
    for use in (read_trials, TrialStore):
        with pytest.raises(ValueError, match=r"trials\.sqlite: damaged or no file of trials"):
            use(path)
    assert path.read_bytes() == data


def test_a_row_that_is_no_trial_is_refused(small_space, path):
    fill(path, small_space, 2)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE trials SET architecture = 'x9' WHERE number = 1")
    connection.close()
    with pytest.raises(ValueError, match=r"damaged.*expected blocks such as f5e6c36, got 'x9'"):
        read_trials(path)


def test_a_locked_file_stops_with_a_clear_line_and_loses_no_trial(small_space, path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    fill(path, small_space, 3)
    store = TrialStore(path)
    for number in (3, 4):
        store.propose(proposed(small_space, number, store.num_events))
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RuntimeError, match=r"database is locked; finished trials are kept; end th"):
        store.end(ended(store.trials[3], store.num_events, 0.75))
    store.end(ended(store.trials[4], store.num_events, 0.25))  # kept too, without another wait
    store.close()
    with pytest.raises(RuntimeError, match="database is locked"):
        TrialStore(path)
    # A reader does not wait.
    assert [trial.state for trial in read_trials(path)] == ["done"] * 3 + ["running"] * 2
    other.rollback()
    database.let_go(other)
    assert [trial.state for trial in read_trials(path)] == ["done"] * 3 + ["running"] * 2
    with TrialStore(path) as again:
        assert [again.trials[number].reward for number in (3, 4)] == [0.75, 0.25]
        assert again.num_events == 10
    assert [trial.state for trial in read_trials(path)] == ["done"] * 5
    assert [one.name for one in path.parent.iterdir()] == ["trials.sqlite"]


def test_a_full_file_stops_with_a_clear_line_and_loses_no_trial(small_space, path):
    fill(path, small_space, 1)
    store = TrialStore(path)
    store.propose(proposed(small_space, 1, 2))
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    long = replace(ended(store.trials[1], 3), error="x" * 20_000)
    with pytest.raises(RuntimeError, match=r"is full; finished trials are kept; make room on the"):
        store.end(long)
    store.close()
    with TrialStore(path) as again:
        assert again.trials[1] == long


def test_room_for_trials_is_reserved_and_given_back(small_space, path):
    with TrialStore(path):
        reserve = path.parent / "trials.unsaved.jsonl"
        assert reserve.stat().st_size == trials.RESERVE_BYTES
        assert not reserve.read_text().strip()
    assert not reserve.exists()


def test_a_disk_without_room_for_them_is_told_and_the_file_let_go(small_space, path, monkeypatch):
    fill(path, small_space, 2)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RuntimeError, match=r"unsaved\.jsonl: No space left .*; make room for"):
            TrialStore(path)
    with TrialStore(path) as store:
        assert len(store.trials) == 2


def test_what_a_killed_search_left_half_written_is_undone_by_a_reader(small_space, path, tmp_path):
    kept = fill(path, small_space, 2)
    writer = sqlite3.connect(path)
    writer.execute("PRAGMA cache_size = 1")  # so that pages reach the file before the commit
    writer.execute("UPDATE trials SET error = ?", ("x" * 50_000,))
    journal = path.with_name("trials.sqlite-journal")
    killed = tmp_path / "killed"
    killed.mkdir()
    for one in (path, journal):
        shutil.copy(one, killed)
    writer.rollback()
    writer.close()
    assert (killed / path.name).read_bytes() != path.read_bytes()
    assert read_trials(killed / path.name) == kept
    assert [one.name for one in killed.iterdir()] == ["trials.sqlite"]


def test_a_damaged_line_beside_the_file_is_named(small_space, path):
    fill(path, small_space, 1)
    path.with_name("trials.unsaved.jsonl").write_text('{"number": 0}\n')
    with pytest.raises(ValueError, match=r"unsaved\.jsonl:1: damaged .*delete this line"):
        TrialStore(path)


def test_two_searches_in_one_folder_are_noticed(small_space, path):
    one, other = TrialStore(path), TrialStore(path)
    one.propose(proposed(small_space, 0, 0))
    with pytest.raises(RuntimeError, match="another process writes trials too"):
        other.propose(proposed(small_space, 0, 0))
    one.end(ended(one.trials[0], 1))
    one.close()
    other.close()
    with TrialStore(path) as late, TrialStore(path) as later:
        late.propose(proposed(small_space, 1, 2))
        later.trials[1] = late.trials[1]
        late.end(ended(late.trials[1], 3))
        with pytest.raises(RuntimeError, match="trial 1 has been ended by another process"):
            later.end(ended(later.trials[1], 3))
    assert read_trials(path)[1].reward == 0.5


# The write-ahead log ------------------------------------------------------------------------


def test_a_file_of_before_the_log_goes_on_and_ends_as_one_plain_file(small_space, path):
    kept = fill(path, small_space, 3)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()
    with TrialStore(path) as store:
        assert list(store.trials.values()) == kept
        assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store._connection.execute("PRAGMA synchronous").fetchone() == (3,)
        store.propose(proposed(small_space, 3, store.num_events))
        assert path.with_name("trials.sqlite-wal").exists()
    assert [one.name for one in path.parent.iterdir()] == ["trials.sqlite"]
    assert path.read_bytes()[18:20] == b"\x01\x01"


def killed_search(path, space) -> list[Trial]:
    """A file as a search leaves it that is killed, moved to where no process has it open."""
    search = path.with_name("search")
    search.mkdir()
    store = TrialStore(search / path.name)
    # What is committed lies in the log alone.
    store._connection.execute("PRAGMA wal_autocheckpoint = 0")
    for number in range(3):
        store.propose(proposed(space, number, store.num_events))
    store.end(ended(store.trials[1], store.num_events))
    for one in search.iterdir():
        shutil.copy(one, path.with_name(one.name))
    kept = list(store.trials.values())
    store.close()
    shutil.rmtree(search)
    return kept


def test_the_log_that_a_kill_leaves_is_taken_in_by_a_search(small_space, path):
    kept = killed_search(path, small_space)
    assert path.with_name("trials.sqlite-wal").stat().st_size
    with TrialStore(path) as store:
        assert list(store.trials.values()) == kept
    assert [one.name for one in path.parent.iterdir()] == ["trials.sqlite"]


def test_the_log_that_a_kill_leaves_is_taken_in_by_a_reader(small_space, path):
    kept = killed_search(path, small_space)
    assert read_trials(path) == kept
    assert {one.name for one in path.parent.iterdir()} == {"trials.sqlite", "trials.unsaved.jsonl"}
    assert read_trials(path) == kept


def test_a_copy_without_the_log_is_told(small_space, path):
    kept = killed_search(path, small_space)
    for end in ("-wal", "-shm"):
        path.with_name(f"trials.sqlite{end}").unlink()
    message = (
        r"trials\.sqlite: trials\.sqlite-wal is not beside it, so the last trial may be missing"
    )
    with pytest.warns(UserWarning, match=message):
        found = read_trials(path)
    assert found == kept[: len(found)]
    # Where the log is kept short, little is missing.
    with TrialStore(path) as store:
        assert len(store.trials) == len(found)


def test_a_file_system_without_a_log_is_told_once_and_serves(small_space, path, monkeypatch):
    kept = killed_search(path, small_space)
    monkeypatch.setattr(database, "file_system", lambda _: "nfs4")
    with pytest.warns(UserWarning, match="no write-ahead log on this file system") as told:
        store = TrialStore(path)
    assert len(told) == 1
    assert list(store.trials.values()) == kept
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    store.end(ended(store.trials[0], store.num_events))
    assert read_trials(path) == list(store.trials.values())  # others are let in
    store.close()
    assert [one.name for one in path.parent.iterdir()] == ["trials.sqlite"]


def test_sqlite_that_refuses_a_log_is_told_and_serves(small_space, path, monkeypatch):
    connect = sqlite3.connect

    def without_shared_memory(address, **settings):
        return connect(f"{address}&vfs=unix-dotfile", **settings)

    monkeypatch.setattr(database.sqlite3, "connect", without_shared_memory)
    with pytest.warns(UserWarning, match="no write-ahead log on this file system"):
        kept = fill(path, small_space, 2)
    monkeypatch.undo()
    assert read_trials(path) == kept


# Faults of the disk -------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """Mount a file system of so many bytes; gives its folder and what makes it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a file system")

    mount("size=256k")
    yield folder, lambda mode: mount("remount", mode)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_up(path) -> None:
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def test_a_disk_that_is_full_stops_the_search_and_loses_no_trial(small_space, disk):
    folder, _ = disk
    path, other = folder / "trials.sqlite", folder / "other"
    store = TrialStore(path)
    for number in range(4):
        store.propose(proposed(small_space, number, store.num_events))
    fill_up(other)
    one = replace(ended(store.trials[0], store.num_events), error="x" * 9000)
    with pytest.raises(RuntimeError, match=r"is full; finished trials are kept; make room on"):
        store.end(one)
    second = ended(store.trials[1], store.num_events)
    store.end(second)  # kept as well, without another word
    store.close()
    fill_up(other)  # also what the log had taken
    # A reader is served, a search is not.
    assert [trial.state for trial in read_trials(path)] == ["running"] * 4
    with pytest.raises(RuntimeError, match="make room"):
        TrialStore(path)
    other.unlink()
    with TrialStore(path) as store:
        assert [store.trials[0], store.trials[1]] == [one, second]
        assert [trial.state for trial in store.trials.values()][2:] == ["running"] * 2


def test_a_disk_that_turns_read_only_stops_the_search_with_one_line(small_space, disk):
    folder, remount = disk
    path = folder / "trials.sqlite"
    kept = fill(path, small_space, 2)
    remount("ro")
    assert read_trials(path) == kept
    with pytest.raises(
        RuntimeError, match=r"readonly database; .* see that folder and file can be"
    ):
        TrialStore(path)
    remount("rw")
    with TrialStore(path) as store:
        assert list(store.trials.values()) == kept


def test_a_killed_search_is_read_where_nothing_can_be_written(small_space, disk, tmp_path):
    folder, remount = disk
    killed = tmp_path / "killed"
    killed.mkdir()
    kept = killed_search(killed / "trials.sqlite", small_space)
    for one in killed.iterdir():
        if not one.name.endswith("-shm"):
            shutil.copy(one, folder)
    remount("ro")
    assert read_trials(folder / "trials.sqlite") == kept


def test_an_error_of_the_disk_stops_the_search_and_loses_no_trial(small_space, path):
    store = TrialStore(path)
    for number in range(30):
        store.propose(proposed(small_space, number, store.num_events))
    one = ended(store.trials[0], store.num_events)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))  # writing behind it fails
    try:
        with pytest.raises(RuntimeError, match=r"disk I/O error; finished trials are kept; see th"):
            store.end(one)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    store.close()
    with TrialStore(path) as store:
        assert store.trials[0] == one


def test_a_trial_that_can_be_written_nowhere_is_told(small_space, path):
    store = TrialStore(path)
    store.propose(proposed(small_space, 0, store.num_events))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(RuntimeError, match=r"trial 0 has just ended and can be written nowhe"):
            store.end(ended(store.trials[0], store.num_events))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    store.close()
    with TrialStore(path) as store:
        assert store.trials[0].state == "running"


def test_a_folder_of_somebody_else_is_told(small_space):
    with tempfile.TemporaryDirectory() as name:  # not in a folder that only root may enter
        folder = Path(name)
        kept = fill(folder / "trials.sqlite", small_space, 1)
        (folder / "trials.sqlite").chmod(0o444)
        folder.chmod(0o555)
        is_root = os.geteuid() == 0
        try:
            if is_root:
                os.seteuid(65534)
            assert read_trials(folder / "trials.sqlite") == kept
            with pytest.raises(RuntimeError, match="see that folder and file can be written"):
                TrialStore(folder / "trials.sqlite")
            with pytest.raises(
                RuntimeError, match=r"unable to open database file; .* see that fol"
            ):
                TrialStore(folder / "more.sqlite")
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)
        assert read_trials(folder / "trials.sqlite") == kept
