"""The check that a user's run goes on exactly after a kill."""

import json
import os
import shutil
import textwrap

import pytest
import torch
from crash import SMALLEST
from test_cli import call, good, refused
from test_sharing_run import new_sharing_run, write_sharing_project
from tiny import new_run

from oneshot_ednas.config import load_config
from oneshot_ednas.pipeline import MultiTrialRun
from oneshot_ednas.training import Interrupted
from oneshot_ednas.verify_resume import first_difference, stages_to_check, verify_resume

NOISY_KIND = """
    import dataclasses
    import os
    from oneshot_ednas.tasks import TASK_KINDS

    ROW = TASK_KINDS["depth"]

    def loss(output, target, config):
        return ROW.loss(output, target, config) * (1 + int.from_bytes(os.urandom(2)) / 2**20)

    NOISY = dataclasses.replace(ROW, loss=loss)
"""


def stopped_run(project, out, *overrides, after=5):
    """A run whose search stops after some steps, with a checkpoint."""
    run = new_run(project, out, overrides=[*SMALLEST, *overrides])
    take_step = run.one_shot.take_step

    def stopping(step):
        if step + 1 == after:
            os.kill(os.getpid(), 15)
        return take_step(step)

    run.one_shot.take_step = stopping
    with pytest.raises(Interrupted, match=f"stopped after step {after} of 10"):
        run.search()
    return out


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_is_killed_and_goes_on_is_found_equal(project, tmp_path):
    out = stopped_run(project, tmp_path / "run")
    before = contents(out)
    result = good("verify-resume", out, "--steps", 4, "--kills", 1, "--json")
    assert contents(out) == before
    (stage,) = json.loads(result.stdout)["stages"]
    # Intervals of two steps.
    assert (stage["stage"], stage["first_step"], stage["last_step"]) == ("search", 5, 10)
    assert len(stage["kills"]) == 1
    assert stage["cause"] is None
    parts = {part["name"]: part for part in stage["parts"]}
    assert {"supernet", "alpha", "optimizer", "alpha_optimizer", "balancing", "log"} <= set(parts)
    for part in parts.values():
        assert part["difference"] is None
        assert part["uninterrupted"] == part["killed"]


@pytest.mark.slow
def test_all_stages_of_a_finished_run_are_checked_from_the_checkpoint_before(
    finished_run, tmp_path
):
    out = shutil.copytree(finished_run, tmp_path / "run")
    text = good("verify-resume", out, "--steps", 3, "--kills", 2).stdout
    assert "search: steps 4 to 6, killed at" in text
    assert "baseline.random: steps 4 to 5, killed at" in text
    assert " no " not in text


@pytest.mark.slow
def test_a_step_that_is_not_repeatable_is_found(project, tmp_path, monkeypatch):
    name = f"noisy_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(NOISY_KIND))
    monkeypatch.syspath_prepend(tmp_path)
    out = stopped_run(project, tmp_path / "run", f"tasks.depth.kind={name}:NOISY")
    result = call("verify-resume", out, "--steps", 2, "--kills", 1)
    assert result.exit_code == 1
    assert "search does not end as without kills: " in result.stderr
    assert "two uninterrupted runs differ, too (" in result.stderr
    assert "numbers differ, by up to" in result.stdout
    assert " no " in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["branch", "share"])
def test_searches_of_what_tasks_share_are_checked(kind, tiny, tmp_path):
    project = write_sharing_project(tmp_path, tiny.table)
    run = new_sharing_run(kind, project, tmp_path / "run")
    (check,) = verify_resume(run.files.folder, num_steps=3, num_kills=1)
    assert (check.stage, check.first_step, check.last_step) == (run.method, 0, 3)
    assert check.difference is None


def test_runs_without_a_training_to_resume_are_refused(project, tmp_path):
    assert "is no run folder: it has no config.yaml" in refused("verify-resume", tmp_path)
    config = load_config(project / "config.yaml", ["method=evolution"])
    run = MultiTrialRun(config, tmp_path / "run")
    run.open(resume=False)
    with pytest.raises(ValueError, match="of method evolution without a retraining yet: finished"):
        stages_to_check(run)
    assert "at least 1 step and 1 kill, got 0 and 3" in refused(
        "verify-resume", run.files.folder, "--steps", 0
    )


def test_the_first_difference_is_told_by_name():
    x = torch.zeros(2, 3)
    one = {"a": {"b": [1, x]}, "c": "text"}
    assert first_difference(one, {"a": {"b": [1, x.clone()]}, "c": "text"}, "net") is None
    y = x.clone()
    y[1, 2] = 0.5
    other = {"a": {"b": [1, y]}, "c": "text"}
    assert first_difference(one, other, "net") == ("net/a/b/1: 1 of 6 numbers differ, by up to 0.5")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"a": [1], "c": "text"}, "net/a: [1, 2] against [1]"),
        ({"a": [1, 2], "c": "other"}, "net/c: text against other"),
        ({"a": [1, 2]}, "net: {'a': [1, 2], 'c': 'text'} against {'a': [1, 2]}"),
        ({"a": [1, 2.0], "c": "text"}, "net/a/1: 2 against 2.0"),
    ],
)
def test_other_values_and_shapes_are_differences(other, words):
    assert first_difference({"a": [1, 2], "c": "text"}, other, "net") == words
    shapes = first_difference(torch.zeros(2), torch.zeros(2, 1), "x")
    assert shapes == "x: (2,) torch.float32, not (2, 1) torch.float32"
