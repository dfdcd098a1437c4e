"""Two processes with half the batch each come to what one comes to with the whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import SCENARIOS, different_search, new_search
from tiny import new_run, write_project
from torch import Tensor

from oneshot_ednas import distributed
from oneshot_ednas.checkpoint import load_checkpoint
from oneshot_ednas.cli.common import main
from oneshot_ednas.data.transforms import AugmentConfig, augment, skip_samples
from oneshot_ednas.pipeline import run_all
from oneshot_ednas.schema import read_json
from oneshot_ednas.training import Interrupted, task_losses

TESTS = Path(__file__).resolve().parent
COUNT = 2
EQUAL = [name for name in SCENARIOS if name not in ("different", "batch norm", "disagreement")]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def flat(state, path: str = "") -> dict[str, Tensor]:
    """Every number of a nested state, by its path."""
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, (list, tuple)):
        pairs = enumerate(state)
    elif isinstance(state, str) or state is None:
        return {}
    else:
        return {path: torch.as_tensor(state).detach().double()}
    return {name: one for key, item in pairs for name, one in flat(item, f"{path}/{key}").items()}


def largest_difference(one, other) -> tuple[float, str]:
    a, b = flat(one), flat(other)
    names = [name for name in a if "random_state" not in name]
    assert names
    assert a.keys() == b.keys()
    found = []
    for name in names:
        # Relative where numbers are large, as the multiply-adds are.
        difference = (a[name] - b[name]).abs() / a[name].abs().clamp_min(1)
        different = difference[~(a[name].isnan() & b[name].isnan())]
        found.append((float(different.max()) if different.numel() else 0.0, name))
    return max(found)


# Steps --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """What two processes came to, in a folder."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "ranks.py"), str(rank), str(COUNT), str(folder)],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(COUNT)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return folder


def of_rank(folder: Path, scenario: str, rank: int):
    return load_checkpoint(folder / f"{scenario}.{rank}.safetensors")


@pytest.mark.parametrize("scenario", EQUAL)
def test_two_processes_equal_one(ranks, scenario):
    expected = SCENARIOS[scenario]()
    for rank in range(COUNT):
        difference, name = largest_difference(expected, of_rank(ranks, scenario, rank))
        assert difference < 1e-5, (rank, name)
    # The frame without a loss comes once in three steps.
    assert expected.get("num_skipped") == (1 if scenario == "retrain skipped" else 0)


@pytest.mark.parametrize("scenario", EQUAL)
def test_the_processes_agree_in_every_bit(ranks, scenario):
    assert largest_difference(*(of_rank(ranks, scenario, rank) for rank in range(COUNT)))[0] == 0


def test_statistics_and_gradients_of_bn_are_those_of_all_frames(ranks):
    expected = SCENARIOS["batch norm"]()
    for rank in range(COUNT):
        found = of_rank(ranks, "batch norm", rank)
        assert largest_difference(expected["double"], found["double"])[0] < 1e-12
        assert largest_difference(expected["bfloat16"], found["bfloat16"])[0] < 0.01


def test_different_paths_give_the_mean_of_their_gradients(ranks):
    found = of_rank(ranks, "different", 0)
    search = different_search()
    drawn = [
        search.sample_paths(0, uniform=True, rank=rank, num_ranks=COUNT)[0] for rank in range(COUNT)
    ]
    assert drawn[0] != drawn[1]
    assert [drawn[0]] == search.sample_paths(0, uniform=True), "the first draws as one process does"
    gradients: dict[str, Tensor] = {}
    for rank, architecture in enumerate(drawn):
        search.supernet.zero_grad()
        with distributed._set(distributed._Step(COUNT, rank)):
            batch = search._batch("weights", 0)
        assert len(batch["image"]) == 2
        losses = task_losses(search.tasks, search._forward(batch, architecture), batch)
        losses["segmentation"].backward()
        for name, parameter in search.supernet.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0) + parameter.grad / COUNT
        search._count(architecture)
    unused = {n for n, _ in search.supernet.named_parameters()} - gradients.keys()
    assert unused, "some weights are in neither architecture"
    assert found["gradients"].keys() == gradients.keys()
    assert largest_difference(gradients, found["gradients"])[0] < 1e-6
    assert torch.equal(found["sampled"], search.sampled)
    one = different_search()
    one.take_step(0)
    assert found["macs"] != one.macs, "half the frames on another architecture"
    assert largest_difference(found, of_rank(ranks, "different", 1))[0] == 0


def test_processes_that_disagree_are_told_so(ranks):
    for rank in range(COUNT):
        message = of_rank(ranks, "disagreement", rank)["message"]
        assert message.startswith("the processes do not agree on their numbers")


def test_fair_draws_of_several_processes_deal_the_same_cards():
    settings = {"path_sampling": "fair", "paths_per_rank": "different"}
    search = new_search(**settings)
    together = [
        search.sample_paths(step, uniform=True, rank=rank, num_ranks=3)[0]
        for step in range(2)
        for rank in range(3)
    ]
    assert together == [search.sample_paths(step, uniform=True)[0] for step in range(6)]


def test_a_part_of_a_batch_is_augmented_as_in_the_whole(tiny):
    config = AugmentConfig(flip=True, scale=(0.7, 1.4), brightness=0.3, contrast=0.2, colour=0.2)
    frames = list(range(8))
    whole = augment(
        tiny.train.batch(frames), config, torch.Generator().manual_seed(5), tiny.train.kinds
    )
    for start in (0, 2, 4, 6):
        generator = torch.Generator().manual_seed(5)
        skip_samples(generator, start)
        part = tiny.train.batch(frames[start : start + 2])
        part = augment(part, config, generator, tiny.train.kinds)
        assert all(torch.equal(part[name], whole[name][start : start + 2]) for name in whole)


def test_one_process_exchanges_nothing():
    assert (distributed.count(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    with distributed.shared_step(sync_bn=True):
        assert distributed.shares() == 1
        assert not distributed.is_bn_synced()
    assert distributed.own_part(6) == slice(0, 6)
    assert "lightning_fabric" not in sys.modules


def test_statistics_stay_with_a_process_where_it_is_alone():
    with distributed._set(distributed._Step(2, 0, True)):
        with distributed.own_statistics(False):
            assert distributed.is_bn_synced()
        with distributed.own_statistics(True):
            assert not distributed.is_bn_synced()
            assert distributed.shares() == 2
        assert distributed.is_bn_synced()
    assert distributed.shares() == 1


# torchrun -----------------------------------------------------------------------------------

SETTINGS = (
    "search.optimizer.kind=sgd",
    "retrain.optimizer.kind=sgd",
    "retrain.num_seeds=1",
    "retrain.steps=3",
    "baselines=[base]",
)


def launched(folder: Path, *arguments: str) -> subprocess.Popen:
    """`oneshot-ednas` in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(COUNT)]
    command += ["--standalone", "-m", "oneshot_ednas", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen, timeout: float = 240) -> tuple[str, str]:
    try:
        return process.communicate(timeout=timeout)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), tiny.table)


@pytest.fixture(scope="module")
def reference(project) -> dict:
    """Results of one process."""
    return run_all(new_run(project, project / "one", overrides=SETTINGS))


def check_against(reference: dict, out: Path) -> None:
    results = read_json(out / "results.json")
    assert results["architecture"] == reference["architecture"]
    assert results["cost"]["search_macs"] == reference["cost"]["search_macs"]
    for figures, expected in [
        (results["metrics"], reference["metrics"]),
        *(
            (results["baselines"][n]["metrics"], b["metrics"])
            for n, b in reference["baselines"].items()
        ),
    ]:
        assert largest_difference(expected, figures)[0] < 1e-4
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [(x["stage"], x["step"]) for x in lines if "loss/weights" in x]
    assert len(logged) == len(set(logged)), "one process writes"
    assert len([stage for stage, _ in logged if stage == "search"]) == 6


def test_a_run_of_one_process_goes_on_in_two(project, reference):
    out = project / "two"
    run = new_run(project, out, overrides=SETTINGS)
    run.one_shot.take_step = stopping(run.one_shot, 3)
    with pytest.raises(Interrupted):
        run_all(run)
    run._lock.release()
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    process = launched(project, "run", "config.yaml", "--out", "two", "--resume", "--json", *sets)
    told, errors = output_of(process)
    assert process.returncode == 0, errors
    assert json.loads(told) == read_json(out / "results.json"), "told once"
    assert errors.count("derive: ") == 1
    assert read_json(out / "results.json")["versions"]["device"].endswith("2 processes")
    check_against(reference, out)


def stopping(search, at: int):
    """`take_step` that asks the run to stop."""
    take_step = type(search).take_step

    def stop_at(step: int):
        if step == at:
            signal.raise_signal(signal.SIGTERM)
        return take_step(search, step)

    return stop_at


@pytest.mark.slow
def test_a_run_that_is_stopped_in_two_processes_goes_on_in_one(project):
    longer = (*SETTINGS, "search.steps=60", "search.loop.checkpoint_every=60")
    sets = [word for setting in longer for word in ("--set", setting)]
    out = project / "stopped"
    process = launched(project, "run", "config.yaml", "--out", "stopped", *sets)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = output_of(process, 60)
    assert errors.count("stopped after step") == 1, errors
    done = load_checkpoint(out / "checkpoints" / "search.safetensors")["step"]
    assert 0 < done < 60
    run_all(new_run(project, out, overrides=longer, resume=True))
    expected = run_all(new_run(project, project / "unstopped", overrides=longer))
    results = read_json(out / "results.json")
    assert results["architecture"] == expected["architecture"]
    assert largest_difference(expected["metrics"], results["metrics"])[0] < 1e-4


BROKEN = """\
import os
from dataclasses import replace
from oneshot_ednas import distributed
from oneshot_ednas.tasks.kinds import TASK_KINDS

steps = []

def loss(pred, target, config):
    steps.extend([0] * (distributed.shares() > 1))
    if os.environ["RANK"] == "1" and len(steps) == 4:
        raise RuntimeError("this disk is tired")
    return TASK_KINDS["depth"].loss(pred, target, config)

KIND = replace(TASK_KINDS["depth"], loss=loss)
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_one_message(project):
    (project / "broken.py").write_text(BROKEN)
    sets = ("--set", "tasks.depth.kind=broken:KIND", "--set", "search.steps=1000")
    process = launched(project, "run", "config.yaml", "--out", "broken", *sets)
    _, errors = output_of(process, 60)
    assert process.returncode != 0
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, errors
    assert "this disk is tired; search ended: its last checkpoint is kept, of 2 steps" in told[0]


@pytest.fixture
def under_torchrun(monkeypatch):
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    variables = {
        "TORCHELASTIC_RUN_ID": "x",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_LAST_WORD_SECONDS", 0.0)
    yield
    assert not distributed.is_first_to_fail(), "the message was told"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["branch", "x"], "branch runs in one process"),
        (["evolve", "x"], "evolve runs in one process"),
        (["run", "config.yaml", "--out", "x", "--set", "method=evolution"], "method evolution has"),
        (["run", "config.yaml", "--out", "x", "--set", "device=mps"], "device"),
        (["run", "config.yaml", "--out", "x", "--set", "device=cpu:0"], "each process has its own"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    project, under_torchrun, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_joint_steps_have_no_paths_to_differ_in():
    with pytest.raises(ValueError, match="leave the others, and paths_per_rank"):
        new_search(mode="joint", paths_per_rank="different")


def test_batches_must_divide(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 3)
    with pytest.raises(ValueError, match=r"search.batch_size is 4, which 3 processes cannot"):
        distributed.check_batch_size("search.batch_size", 4)
    distributed.check_batch_size("search.batch_size", 6)
