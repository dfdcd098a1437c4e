"""Runs that search what tasks share: figures, files, kills and resumption, baselines, commands."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import good, refused
from tiny import CPU, SIZE, new_run, write_project

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.checkpoint import load_checkpoint
from oneshot_ednas.config import TaskSharingConfig, load_config
from oneshot_ednas.data.source import load_data
from oneshot_ednas.latency.operations import network_io_bytes, network_macs, network_operations
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.models.encoder import Chain, ednas_encoder
from oneshot_ednas.models.macs import module_macs
from oneshot_ednas.models.network import build_network
from oneshot_ednas.report import RunPictures
from oneshot_ednas.retrain import NetworkTraining
from oneshot_ednas.reward import deltas
from oneshot_ednas.run_folder import RunFiles
from oneshot_ednas.schema import load_yaml, read_json
from oneshot_ednas.sharing.branched import branched_network
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.branching_search import BranchingSearch
from oneshot_ednas.sharing.operator_search import OperatorSearch
from oneshot_ednas.sharing.policy import OWN, Policy
from oneshot_ednas.sharing_methods import BranchRun, ShareRun
from oneshot_ednas.sharing_run import SharingRun
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.store import write_json
from oneshot_ednas.tasks import lower_is_better, make_tasks
from oneshot_ednas.training import evaluate

SHARING_CONFIG = """\
seed: 3
device: cpu
backbone: {name: ednas, space: space.yaml}
data:
  source: streets
  height: 32
  width: 32
  train_frames: 32
  test_frames: 6
  augment: {flip: true}
  workers: 1
tasks:
  segmentation: {kind: segmentation, num_classes: 10}
  depth: {kind: depth, loss_weight: 0.1, relative_weight: 1.0, scale: 10.0}
latency: {table: table.csv, target_ms: 8.5}
branching:
  steps: 4
  batch_size: 4
  warmup_fraction: 0.3
  objective: budget
  cycle_steps: 2
  num_candidates: 2
  optimizer: {learning_rate: 0.01}
  loop: {log_every: 1, checkpoint_every: 1}
operators:
  pretrain_steps: 1
  policy_steps: 2
  batch_size: 4
  num_candidates: 2
  optimizer: {learning_rate: 0.01}
  loop: {log_every: 1, checkpoint_every: 1}
derive: {calibration_batches: 1, batch_size: 8}
retrain:
  steps: 2
  batch_size: 4
  num_seeds: 2
  calibration_batches: 1
  optimizer: {learning_rate: 0.01}
  loop: {log_every: 1, checkpoint_every: 1}
baselines: [separate, shared]
"""
CHANNELS = {"segmentation": 10, "depth": 1}
ONLY_SHARED = ("baselines=[shared]", "retrain.num_seeds=1")
NO_LATENCY = ("latency=null", "branching.objective=weighted")
THREE_TASKS = (*NO_LATENCY, "tasks.normals={kind: normals}")
MOBILENET = (
    "backbone={name: mobilenet_v2, options: {width: 0.25, aspp_channels: 16, decoder_channels: 16}}"
)
RUNS: dict[str, type[SharingRun]] = {"branch": BranchRun, "share": ShareRun}
FOUND = {"branch": "branched", "share": "operators"}


def write_sharing_project(folder: Path, table: LatencyTable) -> Path:
    """The tiny experiment's folder with a config of task sharing."""
    write_project(folder, table)
    (folder / "sharing.yaml").write_text(SHARING_CONFIG)
    return folder


def new_sharing_run(
    kind: str, project: Path, out: Path, *overrides: str, resume: bool = False
) -> SharingRun:
    config = load_config(project / "sharing.yaml", overrides, kind=TaskSharingConfig)
    run = RUNS[kind](config, out)
    run.open(resume=resume)
    return run


def without_times(results: dict) -> dict:
    """Results without what differs from run to run."""
    kept = {k: v for k, v in results.items() if k not in ("seconds", "date", "versions")}
    search = {k: v for k, v in results["search"].items() if k != "seconds"}
    return kept | {"search": search}


@pytest.fixture(scope="session")
def sharing_project(tmp_path_factory, tiny) -> Path:
    """Config, space and table. Read only."""
    return write_sharing_project(tmp_path_factory.mktemp("sharing"), tiny.table)


@pytest.fixture(scope="session")
def printed(sharing_project, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Folder and output of a whole run of each command. Read only."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharingRun, "export", lambda _: None)
        for kind in RUNS:
            out = tmp_path_factory.mktemp("sharing_runs") / kind
            made[kind] = out, good(kind, sharing_project / "sharing.yaml", "--out", out).stdout
    return made


@pytest.fixture(scope="session", params=list(RUNS))
def kind(request) -> str:
    return request.param


@pytest.fixture
def finished(printed, kind) -> Path:
    return printed[kind][0]


@pytest.fixture
def no_export(monkeypatch):
    """Exports take seconds and have tests of their own."""
    monkeypatch.setattr(SharingRun, "export", lambda _: None)


@pytest.fixture
def no_report(monkeypatch, no_export):
    """Reports take seconds and have tests of their own."""
    monkeypatch.setattr(SharingRun, "report", lambda run: run.files.folder / "report.html")


# What a run leaves --------------------------------------------------------------------------


def test_a_run_folder_holds_everything(finished, kind, sharing_project):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        ".lock",
        "config.yaml",
        "method.json",
        "space.yaml",
        "latency_table.csv",
        "data.json",
        "splits.json",
        "seconds.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "results.json",
        "report.html",
        "predictions.png",
        {"branch": "branching.json", "share": "policy.json"}[kind],
    }
    search = {"branch": "branching", "share": "operators"}[kind]
    networks = (FOUND[kind], "separate", "shared")
    trainings = [f"retrain.{name}.seed_{seed}" for name in networks for seed in (0, 1)]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for stage, steps in {
        search: {"branch": 4, "share": 3}[kind],
        **dict.fromkeys(trainings, 2),
    }.items():
        assert RunFiles(finished).checkpoint(stage).is_file()
        assert [x["step"] for x in lines if x["stage"] == stage] == list(range(steps))
    assert {x["stage"] for x in lines} == {search, *trainings}
    read = load_yaml(finished / "config.yaml", TaskSharingConfig)
    assert read == load_config(sharing_project / "sharing.yaml", kind=TaskSharingConfig)
    assert [path.name for path in finished.rglob(".*")] == [".lock"], "a part was left"


def test_results_have_the_keys_that_reports_and_studies_read(finished, kind):
    results = read_json(finished / "results.json")
    assert set(results) == {
        "method",
        "backbone",
        "found",
        "networks",
        "baseline",
        "target_ms",
        "search",
        "seconds",
        "memory",
        "seed",
        "versions",
        "num_frames",
        "date",
    }
    assert results["method"] == {"branch": "branching", "share": "operators"}[kind]
    assert results["found"] == FOUND[kind]
    assert list(results["networks"]) == [FOUND[kind], "separate", "shared"]
    assert (results["backbone"], results["baseline"], results["seed"]) == ("small", "separate", 3)
    # Operator sharing keeps to no latency.
    assert results["target_ms"] == {"branch": 8.5, "share": None}[kind]
    assert results["num_frames"] == {"train": 32, "test": 6}
    assert {"seconds", "expected", "unit", "alarms", "lambda"} <= set(results["search"])
    search = results["method"]
    seconds = results["seconds"]
    assert results["search"]["seconds"] == pytest.approx(seconds[search] + seconds["derive"])
    for row in results["networks"].values():
        assert set(row) == {
            "what",
            "parameters",
            "gmacs",
            "latency_ms",
            "shared_parameters",
            "metrics",
            "metrics_std",
            "delta",
            "branching",
            "seeds",
        }
        assert row["seeds"] == 2
        assert row["metrics_std"]["depth"]["absolute_error"] > 0
        assert "\n" not in row["what"]


def test_sizes_and_latencies_equal_independent_sums(finished, kind, tiny):
    networks = read_json(finished / "results.json")["networks"]
    table = LatencyTable.load(finished / "latency_table.csv")
    base = tiny.space.base_architecture
    space = tiny.space.fix(base)
    single = [{task: count} for task, count in CHANNELS.items()]
    shared, separate = networks["shared"], networks["separate"]
    assert shared["latency_ms"] == pytest.approx(table.latency_ms(space, base, CHANNELS), rel=1e-12)
    assert shared["parameters"] == build_network(space, CHANNELS).num_parameters
    assert shared["gmacs"] == pytest.approx(network_macs(space, base, SIZE, CHANNELS) / 1e9)
    assert separate["parameters"] == sum(build_network(space, c).num_parameters for c in single)
    macs = sum(network_macs(space, base, SIZE, c) for c in single)
    assert separate["gmacs"] == pytest.approx(macs / 1e9)
    # One inference, which pays for its start and its image once.
    once = table.header.fixed_ms
    once += table.header.input_ms_per_byte * network_io_bytes(space, SIZE, CHANNELS)[0]
    latency = sum(table.latency_ms(space, base, c) for c in single) - once
    assert separate["latency_ms"] == pytest.approx(latency, rel=1e-12)
    assert (shared["shared_parameters"], separate["shared_parameters"]) == (1.0, 0.0)
    assert shared["branching"] == [[0, 0]] * 6
    assert separate["branching"] == [[0, 1]] * 6


def check_branched(row: dict, table: LatencyTable, space: SearchSpace) -> None:
    """A network's figures are sums over its layers, as often as it has them."""
    base = space.base_architecture
    groups = [max(labels) + 1 for labels in row["branching"]]
    encoder = ednas_encoder(space)
    layers = [sum(p.numel() for p in layer.build().parameters()) for layer in encoder.layers]
    heads = sum(p.numel() for n in CHANNELS.values() for p in encoder.build_decoder(n).parameters())
    total = sum(np.multiply(layers, groups))
    assert row["parameters"] == heads + total
    alone = sum(2 * size for size, count in zip(layers, groups, strict=True) if count == 2)
    assert row["shared_parameters"] == pytest.approx(1 - alone / total)
    latency, macs = table.latency_ms(space, base, CHANNELS), 0
    for placed in network_operations(space, base, SIZE, CHANNELS):
        where, copies = placed.where.split(".")[0], 1
        if where == "stem":
            copies = groups[0]
        elif where.startswith("block_"):
            copies = groups[int(where.removeprefix("block_"))]
        elif where == "bifpn":
            copies = groups[-1]
        latency += (copies - 1) * table.row(placed.operation).latency_ms
        macs += copies * placed.operation.macs
    assert row["latency_ms"] == pytest.approx(latency, rel=1e-12)
    assert row["gmacs"] == pytest.approx(macs / 1e9)


def test_the_found_branching_is_inside_the_target_and_priced_layer_by_layer(printed, tiny):
    out, _ = printed["branch"]
    results = read_json(out / "results.json")
    row = results["networks"]["branched"]
    base = tiny.space.base_architecture
    check_branched(row, LatencyTable.load(out / "latency_table.csv"), tiny.space.fix(base))
    assert row["latency_ms"] <= results["target_ms"]
    assert results["search"]["found"] == pytest.approx(row["latency_ms"])
    assert results["search"]["unit"] == "ms"
    found = read_json(out / "branching.json")
    assert found["layers"] == ["stem", "block_1", "block_2", "block_3", "block_4", "bifpn"]
    assert found["groupings"] == row["branching"]
    assert set(found["architectures"]) == set(CHANNELS)
    assert {Architecture.from_json(one) for one in found["architectures"].values()} == {base}
    probabilities = np.array(found["probabilities"])
    assert probabilities.shape == (2, 6, 2)
    assert probabilities.sum(-1) == pytest.approx(np.ones((2, 6)))
    assert len(found["grouping_probabilities"]) == 6
    together = 1.0
    for layer, grouping in enumerate(found["grouping_probabilities"]):
        together *= float(probabilities[0, layer] @ probabilities[1, layer])
        assert grouping == pytest.approx({"0,0": together, "0,1": 1 - together}, abs=1e-6)


def test_the_network_of_a_policy_has_the_operators_that_it_names(printed, tiny):
    out, _ = printed["share"]
    row = read_json(out / "results.json")["networks"]["operators"]
    held = read_json(out / "policy.json")
    sizes = np.array([operator["parameters"] for operator in held["operators"]])
    choices = np.array(held["policy"])
    assert choices.shape == (2, len(sizes))
    assert set(choices.flat) <= {"shared", "own", "skip"}
    assert np.array(held["probabilities"]).shape == (2, len(sizes), 3)
    assert held["num_layers"] == max(operator["depth"] for operator in held["operators"])
    encoder = ednas_encoder(tiny.space.fix(tiny.space.base_architecture))
    rest = sum(p.numel() for p in Chain(encoder).parameters()) - sizes.sum()
    heads = sum(p.numel() for n in CHANNELS.values() for p in encoder.build_decoder(n).parameters())
    copies = (choices == "shared").any(0).astype(int) + (choices == "own").sum(0)
    assert row["parameters"] == heads + rest + sizes @ copies
    by_both = rest + sizes @ (choices == "shared").all(0)
    assert row["shared_parameters"] == pytest.approx(by_both / (rest + sizes @ copies))
    assert row["latency_ms"] is None
    assert row["branching"] is None
    run = ShareRun(load_yaml(out / "config.yaml", TaskSharingConfig), out)
    macs = module_macs(run.found_plan().build(), torch.empty(1, 3, *SIZE))
    assert row["gmacs"] == pytest.approx(macs / 1e9)


def test_gains_are_those_over_separate(finished):
    results = read_json(finished / "results.json")
    config = load_yaml(finished / "config.yaml", TaskSharingConfig)
    tasks = make_tasks(config.tasks)
    names = {name: list(task.reward_metrics) for name, task in tasks.items()}
    separate = results["networks"]["separate"]
    for row in results["networks"].values():
        found = deltas(
            row["metrics"],
            separate["metrics"],
            names=names,
            lower_is_better=lower_is_better(tasks),
        )
        assert row["delta"] == {"overall": found.overall, "tasks": found.tasks}
    assert separate["delta"]["overall"] == 0
    assert results["networks"]["shared"]["delta"]["overall"] != 0


def test_metrics_are_those_of_the_checkpoints_on_the_test_split(printed, tiny):
    out, _ = printed["branch"]
    config = load_yaml(out / "config.yaml", TaskSharingConfig)
    tasks = make_tasks(config.tasks)
    _, test = load_data(config.data, tasks)
    encoder = ednas_encoder(tiny.space.fix(tiny.space.base_architecture))
    branching = Branching.from_json(read_json(out / "branching.json"))
    network, scores = branched_network(encoder, branching, CHANNELS), []
    for seed in (0, 1):
        path = RunFiles(out).checkpoint(f"retrain.branched.seed_{seed}")
        network.load_state_dict(load_checkpoint(path)["network"])
        scores.append(evaluate(network, test, tasks, batch_size=6, device=CPU))
    row = read_json(out / "results.json")["networks"]["branched"]
    for task, values in row["metrics"].items():
        for name, value in values.items():
            both = [score[task][name] for score in scores]
            assert value == pytest.approx(np.mean(both), rel=1e-5)
            assert row["metrics_std"][task][name] == pytest.approx(
                np.std(both, ddof=1), rel=1e-3, abs=1e-6
            )


def test_the_table_shows_each_network_and_what_was_found(printed, kind):
    out, text = printed[kind]
    results = read_json(out / "results.json")
    for name, row in results["networks"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"│ {name} "))
        assert f"{row['delta']['overall']:+.2f} %" in line
        assert f"{row['metrics']['segmentation']['miou']:.3f}" in line
        assert (row["latency_ms"] is None) or f"{row['latency_ms']:.3f}" in line
    for part in ("gain over separate", "miou", "absolute_error", "report.html"):
        assert part in text
    assert ("target 8.5 ms" in text) == (kind == "branch")
    assert "rmse" not in text
    assert f"{FOUND[kind]}: {results['networks'][FOUND[kind]]['what']}" in text
    assert "<html" in (out / "report.html").read_text()


# Going on -----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("no_export")
def test_a_finished_run_resumed_writes_results_and_report_and_nothing_else(
    finished, kind, sharing_project, tmp_path, monkeypatch
):
    def refuse(*_: object) -> None:
        raise AssertionError("a step was taken")

    def report(folder: Path, **_: object) -> Path:
        (folder / "report.html").write_text("again")
        return folder / "report.html"

    for one in (BranchingSearch, OperatorSearch, NetworkTraining):
        monkeypatch.setattr(one, "take_step", refuse)
    monkeypatch.setattr("oneshot_ednas.sharing_run.write_sharing_report", report)
    copy = shutil.copytree(finished, tmp_path / "copy")
    before = contents(copy)
    (copy / "results.json").unlink()
    text = good(kind, sharing_project / "sharing.yaml", "--out", copy, "--resume", "--json").stdout
    assert text.count("\n") == 1
    results = json.loads(text)
    assert results == read_json(copy / "results.json")
    assert without_times(results) == without_times(read_json(finished / "results.json"))
    after = contents(copy)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed <= {"results.json", "report.html", "seconds.json"}
    assert after["report.html"] == b"again"


@pytest.mark.usefixtures("no_report")
def test_a_branching_changed_by_hand_is_what_is_trained(printed, sharing_project, tmp_path, tiny):
    out = shutil.copytree(printed["branch"][0], tmp_path / "copy")
    found = read_json(out / "branching.json")
    # Another than the search has found.
    shared = 2 if found["groupings"].count([0, 0]) == 3 else 3
    found["groupings"] = [[0, 0]] * shared + [[0, 1]] * (6 - shared)
    write_json(out / "branching.json", found)
    arguments = ["branch", sharing_project / "sharing.yaml", "--out", out, "--resume"]
    assert "holds another training, architecture or seed; delete it" in refused(*arguments)
    for path in (out / "checkpoints").glob("retrain.branched.*"):
        path.unlink()
    row = json.loads(good(*arguments, "--json").stdout)["networks"]["branched"]
    assert row["branching"] == found["groupings"]
    space = tiny.space.fix(tiny.space.base_architecture)
    check_branched(row, LatencyTable.load(out / "latency_table.csv"), space)
    what = f"layers 1-{shared}: all tasks; layers {shared + 1}-6: segmentation | depth"
    assert row["what"] == what
    assert 0 < row["shared_parameters"] < 1


class Killed(BaseException):
    """A kill, which nothing catches."""


def record(
    patch: pytest.MonkeyPatch, owner: type, taken: list[tuple[str, int]], kill: tuple[str, int]
) -> None:
    """Note the steps that are taken, by stage, and stop before one of them."""
    take_step = owner.take_step

    def recorded(self: object, step: int) -> dict:
        place = self.stage if isinstance(self, NetworkTraining) else "search", step
        if place == kill:
            raise Killed
        taken.append(place)
        return take_step(self, step)

    patch.setattr(owner, "take_step", recorded)


@pytest.mark.usefixtures("no_report")
def test_a_run_killed_in_search_and_trainings_ends_as_if_it_had_not_been(
    finished, kind, sharing_project, tmp_path, monkeypatch
):
    out, search = tmp_path / "run", {"branch": BranchingSearch, "share": OperatorSearch}[kind]
    kills, taken = [("search", 2), (f"retrain.{FOUND[kind]}.seed_1", 1)], list[tuple[str, int]]()
    for number, kill in enumerate([*kills, ("none", 0)]):
        with monkeypatch.context() as patch:
            for owner in (search, NetworkTraining):
                record(patch, owner, taken, kill)
            run = new_sharing_run(kind, sharing_project, out, resume=number > 0)
            if number < len(kills):
                with pytest.raises(Killed):
                    run.run_all()
                assert not run.files.results.exists()
            else:
                results = run.run_all()
    # No step is lost or done twice.
    expected = [("search", step) for step in range({"branch": 4, "share": 3}[kind])]
    for name in (FOUND[kind], "separate", "shared"):
        expected += [(f"retrain.{name}.seed_{seed}", step) for seed in (0, 1) for step in (0, 1)]
    assert taken == expected
    assert without_times(results) == without_times(read_json(finished / "results.json"))
    found = {"branch": "branching.json", "share": "policy.json"}[kind]
    for name in (found, "metrics.jsonl", "splits.json", "config.yaml"):
        assert (out / name).read_text() == (finished / name).read_text(), name


@pytest.mark.parametrize("command", ["evaluate", "derive", "retrain"])
def test_the_stages_of_other_runs_name_the_command(finished, command):
    line = refused(command, finished)
    assert "on with: oneshot-ednas branch or share CONFIG" in line
    assert "model.tflite" in line


def test_a_folder_of_this_run_needs_resume_and_of_another_is_refused(
    finished, kind, sharing_project, project, tmp_path
):
    config, before = sharing_project / "sharing.yaml", contents(finished)
    assert "already holds this run; go on with --resume" in refused(kind, config, "--out", finished)
    line = refused(kind, config, "--out", finished, "--resume", "--set", "latency.target_ms=8")
    assert "already holds a run of another config (latency.target_ms: 8.5 against 8.0)" in line
    line = refused("run", project / "config.yaml", "--out", finished)
    assert "already holds a run of another kind" in line
    assert contents(finished) == before
    new_run(project, tmp_path / "one_shot")
    line = refused(kind, config, "--out", tmp_path / "one_shot")
    assert "already holds a run of another kind" in line
    assert "choose another --out" in line


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("data.json", "the data has changed"),
        ("splits.json", "the data, or how it is split, has changed"),
        ("latency_table.csv", "the latency table has changed"),
        ("space.yaml", "the search space has changed"),
    ],
)
def test_what_changed_since_the_run_began_is_refused(
    finished, kind, sharing_project, tmp_path, name, what
):
    copy = shutil.copytree(finished, tmp_path / "copy")
    path = copy / name
    text = path.read_text()
    digit = next(i for i in range(len(text) - 1, 0, -1) if text[i].isdigit())
    path.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    before = contents(copy)
    line = refused(kind, sharing_project / "sharing.yaml", "--out", copy, "--resume")
    assert what in line
    assert "restore it, or start anew with another --out" in line
    assert contents(copy) == before


# Other searches -----------------------------------------------------------------------------


@pytest.mark.usefixtures("no_report")
def test_searched_blocks_and_branching_stay_inside_the_target(sharing_project, tmp_path, tiny):
    target = 6.5
    overrides = ["backbone.architecture=search", "branching.gates=hard", *ONLY_SHARED]
    overrides += [f"latency.target_ms={target}", "branching.warmup_fraction=0.3"]
    run = new_sharing_run("branch", sharing_project, tmp_path / "run", *overrides)
    results = run.run_all()
    row = results["networks"]["branched"]
    assert row["latency_ms"] <= target
    branching = Branching.from_json(read_json(run.files.branching))
    assert branching.paths is not None
    for path in branching.paths:
        tiny.space.check(path)
    network = branched_network(run.encoder, branching, CHANNELS)
    assert row["parameters"] == sum(p.numel() for p in network.parameters())
    assert row["gmacs"] == pytest.approx(module_macs(network, torch.empty(1, 3, *SIZE)) / 1e9)
    # Without `separate` there are no gains.
    assert results["baseline"] == "branched"
    assert row["delta"] is None
    shared = results["networks"]["shared"]["latency_ms"]
    table = LatencyTable.load(tmp_path / "run" / "latency_table.csv")
    base = tiny.space.base_architecture
    assert shared == pytest.approx(table.latency_ms(tiny.space, base, CHANNELS), rel=1e-12)


@pytest.mark.usefixtures("no_report")
def test_a_search_by_macs_needs_no_latency(sharing_project, tmp_path):
    out, sets = tmp_path / "run", []
    for override in (*NO_LATENCY, *ONLY_SHARED, "branching.resource_weight=0.2"):
        sets += ["--set", override]
    text = good("branch", sharing_project / "sharing.yaml", "--out", out, *sets).stdout
    assert "test split, small" in text
    assert "target" not in text
    results = read_json(out / "results.json")
    assert (results["target_ms"], results["search"]["unit"]) == (None, "GMACs")
    assert results["search"]["lambda"] == 0.2
    assert not (out / "latency_table.csv").exists()
    for row in results["networks"].values():
        assert row["latency_ms"] is None
    found = read_json(out / "branching.json")
    routes = np.array(found["probabilities"]).argmax(-1)
    expected = Branching.from_routes(list(CHANNELS), routes.tolist())
    assert found["groupings"] == [list(labels) for labels in expected.groupings]


def test_weighted_latency_counts_in_milliseconds(sharing_project, tmp_path):
    overrides = ["branching.objective=weighted", "branching.resource=latency"]
    run = new_sharing_run("branch", sharing_project, tmp_path / "run", *overrides)
    assert run.search.costs.unit == "ms"
    assert run.search.shared_cost == pytest.approx(run.latencies.of(run.search._shared()))


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("kind", list(RUNS))
def test_a_published_backbone_with_a_decoder_per_task(kind, sharing_project, tmp_path):
    overrides = [*NO_LATENCY, *ONLY_SHARED, MOBILENET]
    overrides += ["branching.steps=2", "operators.policy_steps=1", "operators.num_candidates=1"]
    overrides += ["retrain.steps=1", "operators.pretrain_steps=0"]
    run = new_sharing_run(kind, sharing_project, tmp_path / "run", *overrides)
    results = run.run_all()
    assert results["backbone"] == "mobilenet_v2"
    assert not run.files.space.exists()
    for name, plan in run.plans.items():
        row, network = results["networks"][name], plan.build()
        assert row["parameters"] == sum(p.numel() for p in network.parameters())
        macs = module_macs(network, torch.empty(1, 3, *SIZE))
        assert row["gmacs"] == pytest.approx(macs / 1e9)
        assert row["latency_ms"] is None
    chain = sum(p.numel() for p in Chain(run.encoder).parameters())
    decoders = sum(
        p.numel() for n in CHANNELS.values() for p in run.encoder.build_decoder(n).parameters()
    )
    assert results["networks"]["shared"]["parameters"] == chain + decoders
    if kind == "branch":
        assert read_json(run.files.branching)["architectures"] is None
    else:
        kinds = {one["kind"] for one in read_json(run.files.policy)["operators"]}
        assert kinds == {"Conv2d", "BatchNorm2d"}


# Baselines ----------------------------------------------------------------------------------


TREE = ((0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 1, 2), (0, 1, 2))


@pytest.fixture
def planned(sharing_project, tmp_path) -> Callable[..., BranchRun]:
    """A run of three tasks that has found a tree."""

    def make(*overrides: str) -> BranchRun:
        run = new_sharing_run("branch", sharing_project, tmp_path / "run", *THREE_TASKS, *overrides)
        assert isinstance(run, BranchRun)
        path = run.encoder.space.base_architecture
        tree = Branching(tuple(run.tasks), TREE, (path,) * 3)
        write_json(run.files.branching, tree.to_json())
        return run

    return make


def is_tree(groupings: tuple[tuple[int, ...], ...]) -> bool:
    """Whether no two tasks that a layer has apart are together later."""
    pairs = itertools.combinations(range(len(groupings[0])), 2)
    return all(
        [labels[a] == labels[b] for labels in groupings]
        == sorted((labels[a] == labels[b] for labels in groupings), reverse=True)
        for a, b in pairs
    )


def test_permuted_networks_cost_the_same_and_never_join_parted_tasks(planned):
    run = planned("baselines=[separate, permuted]", "num_permutations=7", "retrain.num_seeds=3")
    # Of three tasks one leaves first; the found tree is not among the others.
    names = ["permuted_1", "permuted_2"]
    assert list(run.plans) == ["branched", "separate", *names]
    found = run.plans["branched"]
    assert (found.num_seeds, run.plans["separate"].num_seeds) == (3, 3)
    sizes = sum(p.numel() for p in found.build().parameters())
    seen = set()
    for name in names:
        plan = run.plans[name]
        assert plan.num_seeds == 1
        assert is_tree(plan.branching.groupings)
        assert plan.branching.num_groups == (1, 1, 2, 2, 3, 3)
        assert run.macs.of(plan.branching) == pytest.approx(run.macs.of(found.branching))
        assert sum(p.numel() for p in plan.build().parameters()) == sizes
        seen.add(plan.branching.groupings)
    assert len({*seen, found.branching.groupings}) == 3
    assert not is_tree(((0, 0, 0), (0, 0, 1), (0, 0, 0)))


def test_vanilla_and_random_are_nearest_to_the_cost_of_the_found_tree(planned):
    run = planned("baselines=[vanilla, random]")
    wanted, tasks = run.macs.of(run.plans["branched"].branching), list(run.tasks)
    path = run.encoder.space.base_architecture
    vanilla = run.plans["vanilla"].branching
    gaps = [
        abs(run.macs.of(Branching.vanilla(tasks, 6, count, path)) - wanted) for count in range(1, 6)
    ]
    assert abs(run.macs.of(vanilla) - wanted) == min(gaps)
    assert set(vanilla.groupings) <= {(0, 0, 0), (0, 1, 2)}
    drawn = run.plans["random"].branching
    assert is_tree(drawn.groupings)
    # Trees with the found one's cost exist: the found one itself, with other tasks at its ends.
    assert run.macs.of(drawn) == pytest.approx(wanted)


def test_baselines_of_a_policy_are_nearest_in_macs(sharing_project, tmp_path):
    overrides = ["baselines=[vanilla, random]"]
    run = new_sharing_run("share", sharing_project, tmp_path / "run", *overrides)
    assert isinstance(run, ShareRun)
    assert run.latencies is not None
    supermodel = run.search.supermodel
    policy = Policy.uniform(supermodel.tasks, supermodel.operator_names, OWN)
    write_json(run.files.policy, policy.to_json())
    # All operators of its own: as large as separate networks. Vanilla shares the first layer.
    assert run.plans["vanilla"].branching.num_groups == (1, *(2,) * 5)
    assert run.plans["random"].branching.num_groups == (2,) * 6


def test_an_operator_search_divides_the_data_by_its_split_seed(sharing_project, tmp_path):
    def weights(name: str, *overrides: str) -> list[int]:
        run = new_sharing_run("share", sharing_project, tmp_path / name, *overrides)
        return run.frames.indices["weights"]

    assert weights("a", "seed=9", "operators.split_seed=3") == weights("b", "seed=3")
    assert weights("c", "seed=9") != weights("b2", "seed=3")


# Training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "setting", "divides"),
    [
        ("sgd", "null", True),
        ("adam", "null", False),
        ("sgd", "false", False),
        ("adam", "true", True),
    ],
)
def test_the_learning_rate_of_shared_layers_is_divided(
    planned, monkeypatch, kind, setting, divides
):
    trained = []
    monkeypatch.setattr(
        "oneshot_ednas.sharing_run.train_to_end",
        lambda training, **_: trained.append(training) or training.network,
    )
    run = planned(f"retrain.optimizer.kind={kind}", f"divide_learning_rate={setting}")
    assert run.config.divides_learning_rate is divides
    run._train(run.plans["branched"], "retrain.branched.seed_0", 0)
    (training,) = trained
    run.config.retrain.optimizer.apply(training.optimizer, 1, 2)
    rates = {
        id(p): group["lr"] for group in training.optimizer.param_groups for p in group["params"]
    }
    full = run.config.retrain.optimizer.rate_at(1, 2)
    seen = set()
    for name, parameter in training.network.named_parameters():
        sharing = 1
        if divides and name.startswith("layers."):
            layer, group = (int(part) for part in name.split(".")[1:3])
            sharing = TREE[layer].count(group)
        assert rates[id(parameter)] == pytest.approx(full / sharing), name
        seen.add(sharing)
    assert seen == ({1, 2, 3} if divides else {1})


def test_pictures_are_evenly_spaced_frames_of_the_split(tiny):
    space = tiny.space.fix(tiny.space.base_architecture)
    network = build_network(space, CHANNELS)
    split = tiny.train.subset(range(10, 20))
    taken = RunPictures.taken(network, split, tiny.tasks, num_pictures=4, device=CPU)
    rows = [10, 13, 16, 19]
    assert len(taken.images) == 4
    for image, row in zip(taken.images, rows, strict=True):
        assert np.array_equal(image, tiny.train.frame(row)["image"])
    batch = tiny.train.batch(np.array(rows), CPU)
    for name, task in tiny.tasks.items():
        assert np.array_equal(np.stack(taken.targets[name]), batch[name].numpy(), equal_nan=True)
        with torch.inference_mode():
            predicted = task.predict(network.eval()(batch["image"])[name], SIZE)
        assert np.array_equal(np.stack(taken.predictions[name]), predicted.numpy())
    few = RunPictures.taken(network, split.subset(range(2)), tiny.tasks, num_pictures=4, device=CPU)
    assert len(few.images) == 2


# The other method, a run per lambda, the file for the device --------------------------------


def test_a_folder_of_the_other_method_is_refused(sharing_project, tmp_path):
    new_sharing_run("branch", sharing_project, tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run of branching, not of operators; choose an"):
        new_sharing_run("share", sharing_project, tmp_path / "run", resume=True)


@pytest.mark.usefixtures("no_report")
def test_a_run_per_lambda(sharing_project, tmp_path):
    config, out = sharing_project / "sharing.yaml", tmp_path / "sweep"
    command = ("branch", config, "--out", out, "--lambdas", "0,0.5", "--json")
    settings = ("--set", "baselines=[separate]", "--set", "retrain.num_seeds=1")
    results = json.loads(good(*command, *settings).stdout)
    assert list(results["networks"]) == ["separate", "lambda 0", "lambda 0.5"]
    assert results["networks"]["separate"]["delta"]["overall"] == 0
    assert read_json(out / "sweep.json") == results
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    for value, name in ((0.0, "lambda_0"), (0.5, "lambda_0.5")):
        held = load_yaml(out / name / "config.yaml", TaskSharingConfig)
        assert held.branching is not None
        assert (held.branching.objective, held.branching.resource_weight) == ("weighted", value)
        row = results["networks"][f"lambda {value:g}"]
        assert (
            row["metrics"]
            == read_json(out / name / "results.json")["networks"]["branched"]["metrics"]
        )
    # The baselines are trained once.
    assert set(read_json(out / "lambda_0.5/results.json")["networks"]) == {"branched"}
    again = json.loads(good(*command, *settings, "--resume").stdout)
    assert without_times(again) == without_times(results)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("0.1,x", "--lambdas: expected numbers as"),
        ("0.1,0.1", "--lambdas: expected different values"),
        ("-1,0", "resource_weight (lambda): expected a finite number >= 0, got -1"),
        ("nan", "resource_weight (lambda): expected a finite number >= 0, got nan"),
    ],
)
def test_lambdas_out_of_range_are_refused_before_the_first_run(
    sharing_project, tmp_path, values, message
):
    config, out = sharing_project / "sharing.yaml", tmp_path / "sweep"
    assert message in refused("branch", config, "--out", out, f"--lambdas={values}")
    assert not out.exists()


def test_the_found_network_is_exported(sharing_project, tmp_path):
    run = new_sharing_run(
        "branch", sharing_project, tmp_path / "run", "baselines=[]", "retrain.num_seeds=1"
    )
    run.find()
    run.retrain()
    report = run.export()
    assert report is not None
    assert report == read_json(run.files.export)
    branching = Branching.from_json(read_json(run.files.branching))
    assert report["architecture"] == str(branching)
    assert run.latencies is not None
    assert report["latency"]["predicted_ms"] == run.latencies.of(branching)
    assert run.files.model.exists()
    assert set(report["metrics"]) == {"test"}
