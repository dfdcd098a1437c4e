"""What older versions left on disk loads in this one, and their runs go on."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import good
from torch import Tensor

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.checkpoint import load_checkpoint
from oneshot_ednas.config import TaskSharingConfig, load_config
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.multi_trial.trials import read_trials
from oneshot_ednas.schema import read_json
from oneshot_ednas.space import SearchSpace

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.parent for path in GOLDEN.glob("*/facts.json"))
OUT_CHANNELS = {"segmentation": 10, "depth": 1}

assert VERSIONS


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def golden(request) -> Path:
    return request.param


@pytest.fixture
def facts(golden) -> dict[str, Any]:
    return read_json(golden / "facts.json")


@pytest.fixture
def copy(golden, tmp_path) -> Path:
    """A copy to change: a run, and a search by trials."""
    made = shutil.copytree(golden, tmp_path / "golden")
    for config in made.rglob("config.yaml"):
        text = config.read_text()
        assert "GOLDEN/" in text
        config.write_text(text.replace("GOLDEN/", f"{made}/"))
    return made


def test_no_artefact_names_a_place_of_the_machine_that_made_it(golden):
    for path in golden.rglob("*"):
        if path.suffix in (".yaml", ".json", ".jsonl", ".csv"):
            assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr)/", path.read_text()), path


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for one in value for t in tensors_in(one)] if isinstance(value, list) else []


def assert_metrics(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for task, metrics in expected.items():
        assert got[task] == pytest.approx(metrics, rel=1e-5, abs=1e-5)


def test_checkpoints_hold_the_same_tensors(golden, facts):
    found = {}
    for path in sorted((golden / "run" / "checkpoints").iterdir()):
        parts = [hashlib.sha256(t.numpy().tobytes()) for t in tensors_in(load_checkpoint(path))]
        digests = sorted(part.hexdigest() for part in parts)
        found[path.stem] = hashlib.sha256("".join(digests).encode()).hexdigest()
    assert len(found) == 3
    assert found == facts["checkpoints"]


def test_space_table_and_architectures_are_the_same(golden, facts):
    space = SearchSpace.load(golden / "space.yaml")
    costs = LatencyTable.load(golden / "latency_table.csv").costs(space, OUT_CHANNELS)
    base = costs.latency_ms(space.base_architecture)
    assert base == pytest.approx(facts["base_latency_ms"], abs=1e-9)
    for kind, results in facts["results"].items():
        architecture = Architecture.load(golden / kind / "architecture.json")
        space.check(architecture)
        assert str(architecture) == results["architecture"]
        assert costs.latency_ms(architecture) == pytest.approx(results["latency_ms"], abs=1e-9)


def test_configs_are_read(golden):
    settings = load_config(golden / "experiment.yaml")
    spelled_out = load_config(golden / "run" / "config.yaml")
    # The run's has absolute paths.
    assert replace(settings, space="", latency=spelled_out.latency) == replace(
        spelled_out, space=""
    )
    sharing = load_config(golden / "sharing.yaml", kind=TaskSharingConfig)
    assert (sharing.branching.steps, sharing.operators.policy_steps) == (4, 2)


def test_trials_are_read(golden, facts, tmp_path):
    path = shutil.copy(golden / "evolve" / "trials.sqlite", tmp_path)
    trials = read_trials(Path(path))
    assert len(trials) == facts["num_trials"] == 4
    best = max(trials, key=lambda trial: trial.reward)
    assert str(best.architecture) == facts["results"]["evolve"]["architecture"]


def test_a_run_goes_on_in_every_stage(copy, facts):
    run = copy / "run"
    assert json.loads(good("search", run, "--json").stdout)["steps"] == 4
    for name in ("architecture.json", "candidates.json", "checkpoints/baseline.base.safetensors"):
        (run / name).unlink()
    good("derive", run)
    expected = facts["results"]["run"]
    assert str(Architecture.load(run / "architecture.json")) == expected["architecture"]
    good("retrain", run)
    results = json.loads(good("evaluate", run, "--json").stdout)
    assert results["architecture"] == expected["architecture"]
    assert results["reward"] == pytest.approx(expected["reward"], abs=1e-5)
    assert_metrics(results["metrics"], expected["metrics"])
    assert (run / "report.html").is_file()


def test_a_search_by_trials_goes_on(copy, facts):
    run = copy / "evolve"
    for name in ("architecture.json", "results.json"):
        (run / name).unlink()
    # The networks are left out of the folder: they are trained again.
    arguments = ("evolve", run / "config.yaml", "--out", run, "--resume", "--json")
    results = json.loads(good(*arguments).stdout)
    expected = facts["results"]["evolve"]
    assert results["architecture"] == expected["architecture"]
    assert results["reward"] == pytest.approx(expected["reward"], abs=1e-4)
    assert results["trials"]["proposed"] == facts["num_trials"]


def test_runs_are_compared(golden, facts, tmp_path):
    arguments = ("compare", golden / "run", golden / "evolve", "--out", tmp_path, "--json")
    found = json.loads(good(*arguments).stdout)
    rewards = [run["reward"] for run in facts["results"].values()]
    text = json.dumps(found)
    assert [reward for reward in rewards if str(reward)[:8] not in text] == []


@pytest.mark.slow
def test_runs_are_verified(copy):
    good("verify-resume", copy / "run", "--steps", "4", "--kills", "1")


def test_the_artefacts_are_small_and_hold_no_pickle(golden):
    files = [path for path in golden.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    for path in files:
        assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")
