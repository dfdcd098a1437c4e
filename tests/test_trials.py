"""The store of trials: what it keeps, and what happens when its file cannot be used."""

import errno
import os
import shutil
import sqlite3
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.multi_trial import trials
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
def path(tmp_path):
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
    monkeypatch.setattr(trials, "BUSY_SECONDS", 0.05)
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
    with pytest.raises(RuntimeError, match="database is locked"):
        read_trials(path)
    other.close()
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
