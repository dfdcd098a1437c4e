"""The same seed, machine and number of threads give the same run, file for file."""

import os
import subprocess
import sys
from pathlib import Path

import crash
import pytest


def fresh_run(project: Path, out: Path, *, hash_seed: int, settings=()) -> dict[str, str]:
    """SHA-256 of the files of a run in a process of its own; those before the newest, too."""
    command = [sys.executable, "-m", "oneshot_ednas", "run", project / "config.yaml", "--out", out]
    for setting in settings:
        command += ["--set", setting]
    # The order of sets differs between processes, unless the seed of hashes is given.
    environment = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | environment)
    return crash.compared_files(out)


def assert_equal_runs(one: dict[str, str], other: dict[str, str]) -> None:
    assert len([name for name in one if name.startswith("checkpoints/")]) >= 4
    assert {"architecture.json", "results.json", "metrics.jsonl", "model.tflite"} <= one.keys()
    assert {name for name in one | other if one.get(name) != other.get(name)} == set()


def test_a_run_in_a_fresh_process_is_that_of_a_process_that_did_much_else(
    project, finished_run, tmp_path
):
    found = fresh_run(project, tmp_path / "run", hash_seed=1)
    assert_equal_runs(found, crash.compared_files(finished_run))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("deterministic=true", "search.sandwich=true")])
def test_two_fresh_processes_give_equal_runs(project, tmp_path, settings):
    settings = (*crash.SMALLEST, *settings)
    one, other = (
        fresh_run(project, tmp_path / str(seed), hash_seed=seed, settings=settings)
        for seed in (1, 2)
    )
    assert_equal_runs(one, other)


@pytest.mark.slow
def test_another_seed_gives_another_run(project, tmp_path):
    settings = (*crash.SMALLEST, "search.split_seed=0")
    one, other = (
        fresh_run(project, tmp_path / str(s), hash_seed=1, settings=(*settings, f"seed={s}"))
        for s in (0, 1)
    )
    equal = {name for name in one if one[name] == other[name]}
    assert "data.json" in equal
    assert not [name for name in equal if name.startswith("checkpoints/")]
