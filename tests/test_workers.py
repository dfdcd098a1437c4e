"""Workers: jobs here, in processes, on Ray; what happens when a process dies."""

import importlib.util
import os
import sys
import time
from pathlib import Path

import jobs
import pytest

from oneshot_ednas.workers import MAX_RETRIES, open_workers


@pytest.fixture(autouse=True)
def importable_jobs(monkeypatch):
    """Other processes find `jobs` too."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


def check_workers(workers, folder):
    futures = [workers.executor.submit(jobs.square, number) for number in range(4)]
    refused = workers.executor.submit(jobs.refuse)
    once = workers.executor.submit(jobs.die, folder / "once", 1)
    always = workers.executor.submit(jobs.die, folder / "always", 99)
    assert [future.result() for future in futures] == [0, 1, 4, 9]
    with pytest.raises(ValueError, match="bad input"):
        refused.result()
    assert once.result() == "lived"
    with pytest.raises(RuntimeError, match="its process died 3 times"):
        always.result()
    assert (folder / "always").stat().st_size == 1 + MAX_RETRIES
    # Afterwards it works as before.
    assert workers.executor.submit(jobs.square, 5).result() == 25


def test_processes_run_jobs_and_survive_deaths(tmp_path):
    with open_workers("2") as workers:
        assert workers.count == 2
        check_workers(workers, tmp_path)
        assert workers.executor.submit(jobs.process_id, 0).result() != os.getpid()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_ray_runs_jobs_and_survives_deaths(tmp_path):
    with open_workers("ray:2") as workers:
        assert workers.count == 2
        check_workers(workers, tmp_path)


def run_until_an_error() -> None:
    with open_workers("2") as workers:
        assert workers.executor.submit(jobs.square, 3).result() == 9
        workers.executor.submit(jobs.sleep, 300)
        raise KeyError("stop")


def test_an_error_ends_running_jobs():
    began = time.perf_counter()
    with pytest.raises(KeyError, match="stop"):
        run_until_an_error()
    assert time.perf_counter() - began < 120


def test_one_worker_is_this_process():
    with open_workers("1") as workers:
        future = workers.executor.submit(jobs.process_id, 0)
        assert future.done()
        assert future.result() == os.getpid()
        assert isinstance(workers.executor.submit(jobs.refuse).exception(), ValueError)


@pytest.mark.parametrize("text", ["0", "-1", "two", "ray:0", "ray:", "ray:x", "rays", "", "1.5"])
def test_workers_of_another_form_are_refused(text):
    message = "--workers: expected N, ray or ray:N, with N of at least 1"
    with pytest.raises(ValueError, match=message), open_workers(text):
        pass


def test_ray_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    message = r"Ray is not installed; pip install 'oneshot-ednas\[ray\]'"
    with pytest.raises(ValueError, match=message), open_workers("ray"):
        pass
