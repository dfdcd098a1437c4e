"""The command line: what goes to stdout and stderr, exit statuses, and every kind of bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from test_source import write_rooms
from tiny import CONFIG

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.checkpoint import load_checkpoint, previous_checkpoint
from oneshot_ednas.cli import main
from oneshot_ednas.latency.simulate import simulate_table
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.schema import read_json, shipped
from oneshot_ednas.space import SearchSpace, ednas_b0

COMMANDS = [
    ("run",),
    ("demo",),
    ("evolve",),
    ("benchmark",),
    ("rank",),
    ("compare",),
    ("search",),
    ("derive",),
    ("retrain",),
    ("evaluate",),
    ("branch",),
    ("share",),
    ("export",),
    ("describe",),
    ("data", "check"),
    ("data", "prepare"),
    ("data", "stats"),
    ("latency", "check"),
    ("latency", "table"),
    ("bench",),
    ("doctor",),
    ("verify-resume",),
]
SHARED_DATA = Path(
    os.environ.get("ONESHOT_EDNAS_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
)


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def good(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments: object) -> str:
    """The one line of a refusal, which wrote nothing to stdout."""
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def figures(results: dict) -> dict:
    """Results without what differs from run to run."""
    kept = {
        key: value for key, value in results.items() if key not in ("seconds", "date", "versions")
    }
    macs = {key: value for key, value in results["cost"].items() if key.endswith("_macs")}
    return kept | {"cost": macs}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Reports take seconds and have tests of their own."""
    monkeypatch.setattr("oneshot_ednas.pipeline.write_report", lambda folder, **_: folder)


@pytest.fixture
def copy(finished_run, tmp_path) -> Path:
    """A finished run to change."""
    return shutil.copytree(finished_run, tmp_path / "copy")


# Good input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example_and_the_json_option(command):
    text = " ".join(good(*command, "--help").stdout.split())
    assert f"Example: oneshot-ednas {' '.join(command)} " in text
    assert "--json" in text


def test_every_command_is_tested():
    groups = ("data", "latency")
    names = {(name,) for name in main.commands if name not in groups}
    names |= {(group, name) for group in groups for name in main.commands[group].commands}
    assert names == set(COMMANDS)


def test_the_version_is_printed():
    assert "0.1.0" in good("--version").stdout


def test_stages_one_by_one_equal_the_whole_run(project, finished_run, tmp_path):
    out = tmp_path / "run"
    result = good("search", project / "config.yaml", "--out", out, "--json")
    search = json.loads(result.stdout)
    assert search["steps"] == 6
    assert search["expected_latency_ms"] > 4
    assert "search: small" in result.stderr
    assert "steps" in good("search", out).stdout
    derived = json.loads(good("derive", out, "--json").stdout)
    assert derived["latency_ms"] <= derived["target_ms"] == 5.0
    assert derived["architecture"] == str(Architecture.load(out / "architecture.json"))
    trained = good("retrain", out)
    assert "retrain.seed_1" in trained.stdout
    assert "baseline.random" in trained.stdout
    results = json.loads(good("evaluate", out, "--json").stdout)
    assert results == read_json(out / "results.json")
    expected = read_json(finished_run / "results.json")
    assert figures(results) == figures(expected)
    for name in ("architecture.json", "metrics.jsonl", "candidates.json", "config.yaml"):
        assert (out / name).read_text() == (finished_run / name).read_text(), name


def test_a_run_prints_a_table(project, copy):
    config = project / "config.yaml"
    table = good("run", config, "--out", copy, "--resume").stdout
    results = read_json(copy / "results.json")
    for name in ("derived", "base", "random"):
        assert f" {name} " in table
    for part in ("target 5 ms", "miou", "reward", f"{results['latency_ms']:.3f}", "report.html"):
        assert part in table


def test_a_run_can_be_opened_from_another_folder(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert json.loads(good("derive", "copy", "--json").stdout)["stage"] == "derive"


def test_demo_is_the_shipped_config(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr("oneshot_ednas.cli.runs._start", lambda *a, **k: started.append((a, k)))
    monkeypatch.setattr("oneshot_ednas.cli.runs.run_all", lambda one: {})
    monkeypatch.setattr("oneshot_ednas.cli.runs.print_results", lambda *a, **k: None)
    good("demo", "--out", tmp_path, "--resume")
    assert started == [(("configs/demo.yaml", tmp_path, None, ()), {"resume": True})]


def test_describe_reads_spaces_architectures_configs_and_runs(project, finished_run, tmp_path):
    def described(*arguments):
        return json.loads(good("describe", *arguments, "--json").stdout)

    base = tmp_path / "base.json"
    ednas_b0().base_architecture.save(base)
    b0 = described(base, "--tasks", "segmentation=19,depth=1", "--image-size", 64, 64)
    assert round(b0["parameters"] / 1e6, 1) == 3.4
    assert "num_architectures" not in b0
    assert b0["latency_ms"] is None
    space = described("ednas_tiny", "--table", "latency_tables/edgetpu_sim_64x128.csv")
    assert space["image_size"] == [64, 128]
    assert space["num_architectures"] == str(space_size("ednas_tiny"))
    assert space["min_latency_ms"] < space["latency_ms"] < space["max_latency_ms"]
    own = described(project / "space.yaml", "--image-size", 32, 32, "--tasks", "depth=1")
    assert own["num_architectures"] == "3072"
    config = described(project / "config.yaml")
    assert config["out_channels"] == {"segmentation": 10, "depth": 1}
    run = described(finished_run)
    results = read_json(finished_run / "results.json")
    assert run["architecture"] == results["architecture"]
    assert run["latency_ms"] == pytest.approx(results["latency_ms"])
    assert run["parameters"] == results["parameters"]
    assert run["gmacs"] == pytest.approx(results["gmacs"])


def space_size(name: str) -> int:
    return SearchSpace.load(shipped(f"configs/spaces/{name}.yaml")).num_architectures


def test_describe_prints_one_row_per_block(finished_run):
    text = good("describe", finished_run).stdout
    for row in ("stem", "block_1", "block_4", "bifpn", "head", "IBN", "parameters", "latency"):
        assert row in text


def test_a_latency_table_is_written_and_loads(tmp_path, project, small_space):
    out = tmp_path / "table.csv"
    arguments = ["latency", "table", project / "space.yaml", "--image-size", 32, 32]
    arguments += ["--tasks", "segmentation=10,depth=1", "--out", out, "--clock-mhz", 250]
    text = good(*arguments).stdout
    table = LatencyTable.load(out)
    assert f"{len(table.rows)} operations" in text
    fresh = simulate_table(
        small_space,
        (32, 32),
        {"segmentation": 10, "depth": 1},
        head_channels=range(1, 65),
        clock_mhz=250,
    )
    assert out.read_text() == fresh.to_text()
    as_json = json.loads(good(*arguments, "--json").stdout)
    assert as_json == {"table": str(out), "operations": len(table.rows)}
    costs = table.costs(small_space, {"segmentation": 64, "depth": 1})
    assert costs.min_latency_ms > 0


def networks(**changes) -> dict:
    conv = ["conv", 32, 32, 16, 32, 32, 32, 3, 3, 1]
    rows = [
        {
            "group": group,
            "model": f"net{count}",
            "device": "Coral USB Accelerator",
            "host": "desktop",
            "bus": "USB 3",
            "measured_ms": 0.5 * count,
            "input_bytes": 3072,
            "output_bytes": 10,
            "layers": [conv] * count * 4,
        }
        for group, count in (("a", 1), ("a", 2), ("b", 3))
    ]
    rows[0] |= changes
    return {"networks": rows}


def test_latency_check_scores_the_simulator(tmp_path):
    path = tmp_path / "networks.json"
    path.write_text(json.dumps(networks()))
    scores = json.loads(good("latency", "check", path, "--json").stdout)
    assert set(scores["groups"]) == {"a", "b"}
    assert (scores["all"]["n"], scores["groups"]["a"]["n"]) == (3, 2)
    assert set(scores["all"]) == {"n", "mape", "median_ape", "max_ape", "spearman"}
    assert scores["all"]["spearman"] == pytest.approx(1)
    assert scores["groups"]["b"]["spearman"] is None
    text = good("latency", "check", path).stdout
    for part in ("MAPE", "Spearman", " all ", " a ", " b "):
        assert part in text


@pytest.mark.shared_data
@pytest.mark.skipif(
    not (SHARED_DATA / "edgetpu/networks.json").exists(), reason="no published latencies here"
)
def test_the_simulator_meets_its_targets_on_published_networks():
    path = SHARED_DATA / "edgetpu/networks.json"
    scores = json.loads(good("latency", "check", path, "--json").stdout)
    assert scores["all"]["mape"] <= 9
    assert scores["groups"]["coral"]["mape"] <= 9
    assert scores["all"]["spearman"] >= 0.985
    assert scores["leave_one_out"]["all"]["mape"] < 15


# A process of its own -----------------------------------------------------------------------


def test_ctrl_c_ends_a_search_with_130_and_a_checkpoint(project, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "oneshot_ednas", "search", str(project / "config.yaml")]
    process = subprocess.Popen(
        [*command, "--out", str(out), "--set", "search.steps=3000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log, deadline = out / "metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stderr = ""
    while "go on with" not in stderr:
        stderr += (part := process.stderr.readline())
        assert part, stderr
    while process.poll() is None:  # nor does more of it change how it ends
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    stdout, rest = process.communicate(timeout=60)
    stderr += rest
    assert (process.returncode, stdout) == (130, "")
    line = stderr.splitlines()[-1]
    step = load_checkpoint(out / "checkpoints" / "search.safetensors")["step"]
    assert line == f"stopped after step {step} of 3000 in search; go on with --resume"
    assert "Traceback" not in stderr
    refusal = refused("derive", out)
    assert f"the search is at step {step} of 3000; finish it with oneshot-ednas se" in refusal


# Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed: 3", "sead: 3", "config.yaml:1: unknown key sead; did you mean seed?"),
        ("  steps: 6", "  stepz: 6", "config.yaml:17: unknown key search.stepz; did you mean ste"),
        ("seed: 3", "seed: 3\nseed: 3", "config.yaml:2: duplicate key seed"),
        ("  steps: 6", "  steps: six", "config.yaml:17: search.steps: expected a whole number"),
        ("target_ms: 5.0", "target_ms: 1.0", "is 1 ms, below the minimum of space small: 4.363 ms"),
        ("width: 32", "width: 64", "table.csv is for images of 32x32, got 32x64; build one with"),
        ("num_classes: 10", "num_classes: 12", "no row in table.csv for separable_conv k3 8->12"),
        ("device: cpu", "device: cuda", "device cuda was asked for and is absent"),
        ("  batch_size: 4", "  batch_size: 20", "search.batch_size is 20, the smaller"),
        ("table.csv", "gone.csv", "no file gone.csv"),
        ("space.yaml", "gone.yaml", "no file gone.yaml"),
        ("space.yaml", "ednas_teeny", "no search space ednas_teeny; shipped: ednas_b0"),
        ("data:\n", "data: [\n", "config.yaml"),
    ],
)
def test_a_bad_config_gets_one_line_and_leaves_no_folder(
    project, tmp_path, monkeypatch, old, new, message
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    folder = shutil.copytree(project, tmp_path / "project")
    assert old in CONFIG
    (folder / "config.yaml").write_text(CONFIG.replace(old, new, 1))
    for command in ("run", "search"):
        line = refused(command, folder / "config.yaml", "--out", tmp_path / "runs" / "run")
        assert message in line
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml", "--out", "OUT"], "no file nowhere.yaml"),
        (["run", "CONFIG", "--out", "OUT", "--set", "search.stepz=1"], "unknown key search.stepz"),
        (["run", "CONFIG", "--out", "OUT", "--set", "steps"], "--set steps: expected key=value"),
        (["run", "CONFIG", "--out", "OUT", "--data", "OUT"], "belongs to source folder, not to st"),
        (["run", "configs/nyuv2_256x192.yaml", "--out", "OUT"], "name it with --data DIR"),
        (
            ["run", "configs/nyuv2_256x192.yaml", "--out", "OUT", "--data", "gone"],
            "no data folder ",
        ),
        (["run", "CONFIG", "--out", "PROJECT"], "already holds a run of another config"),
        (["run", "CONFIG", "--out", "FOREIGN"], "is not empty and holds no run"),
        (["run", "CONFIG", "--out", "FINISHED"], "already holds this run; go on with --resume"),
        (
            ["run", "CONFIG", "--out", "FINISHED", "--resume", "--set", "seed=4"],
            "already holds a run of another config (seed: 3 against 4)",
        ),
        (["search", "CONFIG"], "search from a config needs --out DIR"),
        (["derive", "PROJECT/none"], "is no run folder: it has no config.yaml"),
        (["describe", "ednas_b9"], "no search space ednas_b9; shipped: ednas_b0, ednas_tiny"),
        (["describe", "gone.json"], "no file gone.json"),
        (["describe", "ednas_tiny", "--tasks", "depth"], "expected name=channels"),
        (["describe", "ednas_tiny", "--tasks", "depth=1,depth=1"], "depth is given twice"),
        (
            ["describe", "ednas_tiny", "--image-size", 32, 32, "--table", "TABLE"],
            "edgetpu_sim_64x128.csv is for images of 64x128, got 32x32",
        ),
        (["describe", "ednas_b0", "--table", "TABLE"], "no row in edgetpu_sim_64x128.csv for"),
        (["describe", "ednas_b0", "--table", "gone.csv"], "no file gone.csv"),
        (["latency", "check", "gone.json"], "no file gone.json"),
        (
            ["latency", "table", "ednas_tiny", "--image-size", 8, 8, "--out", "OUT"],
            "--image-size: expected at least 16 16",
        ),
        (
            ["latency", "table", "ednas_b0", "--image-size", 64, 64, "--host", "x", "--out", "OUT"],
            "unknown Edge TPU host 'x'",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_arguments_get_one_line_and_leave_nothing(
    project, finished_run, tmp_path, arguments, message
):
    names = {
        "OUT": tmp_path / "out",
        "CONFIG": project / "config.yaml",
        "PROJECT": project,
        "PROJECT/none": project / "none",
        "FINISHED": finished_run,
        "FOREIGN": finished_run.parent,
        "TABLE": "latency_tables/edgetpu_sim_64x128.csv",
    }
    assert message in refused(*(names.get(argument, argument) for argument in arguments))
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_that_is_not_in_its_space_is_named_by_block_and_option(tmp_path):
    path = tmp_path / "architecture.json"
    content = read_json(shipped("configs/architectures/ednas_table6.json"))
    content["blocks"][4]["filters"] = 41
    path.write_text(json.dumps(content))
    line = refused("describe", path)
    assert "architecture is not in space ednas_b0: block 5 has filters 41" in line
    assert "the options are [20, 30, 40, 60]" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", 'non-empty list "networks"'),
        (json.dumps(networks(measured_ms=0)), "network 0 (net1): measured_ms must be positive"),
        (json.dumps(networks(bus="ISA")), "network 0 (net1): bus must be USB 2"),
        (json.dumps(networks(layers=[["warp"] + [1] * 9])), "unknown op 'warp'"),
    ],
)
def test_published_networks_that_make_no_sense_are_refused(tmp_path, text, message):
    path = tmp_path / "networks.json"
    path.write_text(text)
    assert message in refused("latency", "check", path)


@pytest.mark.parametrize("stage", ["search", "retrain.seed_0"])
def test_a_corrupted_checkpoint_gives_way_to_the_one_before(copy, stage):
    path = copy / "checkpoints" / f"{stage}.safetensors"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) * 3 // 4] ^= 0x10
    command = "search" if stage == "search" else "retrain"
    for data in (bytes(flipped), whole[: len(whole) // 2], b""):
        path.write_bytes(data)
        with warnings.catch_warnings(action="always"):
            result = good(command, copy)
        assert f"warning: {path}: the checkpoint is damaged" in result.stderr
        assert "going on from the one before it" in result.stderr
        assert path.read_bytes() == whole
    for one in (path, previous_checkpoint(path)):
        one.write_bytes(b"")
    assert f"so is {previous_checkpoint(path)}; delete both" in refused(command, copy)


# Data folders -------------------------------------------------------------------------------

ROOMS_CONFIG = """\
device: cpu
space: space.yaml
data: {source: folder, height: 32, width: 32, workers: 1}
tasks:
  segmentation: {kind: segmentation, num_classes: 3}
  depth: {kind: depth}
latency: {table: table.csv, target_ms: 5.0, allow_uncalibrated: true}
search: {steps: 1, batch_size: 2, num_validations: 0}
derive: {num_candidates: 1, num_samples: 0, calibration_batches: 1, num_budgets: 1}
retrain: {steps: 1, batch_size: 2, calibration_batches: 1}
"""


@pytest.fixture
def rooms(tmp_path, small_space) -> Path:
    """A folder with `data`, and a config, a space and a table for it."""
    write_rooms(tmp_path / "data", frames=12)
    channels = {"segmentation": 3, "depth": 1}
    simulate_table(small_space, (32, 32), channels).save(tmp_path / "table.csv")
    (tmp_path / "space.yaml").write_text(small_space.to_yaml())
    (tmp_path / "config.yaml").write_text(ROOMS_CONFIG)
    return tmp_path


def rooms_arguments(rooms: Path) -> list[object]:
    arguments = ["run", rooms / "config.yaml", "--data", rooms / "data"]
    return [*arguments, "--out", rooms / "runs" / "run"]


def too_large(data: Path) -> None:
    Image.new("L", (33, 24)).save(data / "label/3.png")


def missing(data: Path) -> None:
    (data / "depth/11.png").unlink()


def unknown_label(data: Path) -> None:
    labels = np.zeros((24, 32), dtype=np.uint8)
    labels[3, 4] = 7
    Image.fromarray(labels).save(data / "label/0.png")


def no_split(data: Path) -> None:
    (data / "test.txt").unlink()


def not_an_image(data: Path) -> None:
    (data / "rgb/2.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (too_large, "frame 3: segmentation is 33x24, expected the image's 32x24"),
        (missing, "frame 11: no file "),
        (unknown_label, "frame 0: label/0.png: labels 7 in 1 pixels lie outside the 3 "),
        (no_split, "no file test.txt for a split in "),
        (not_an_image, "frame 2: "),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_data_is_named_by_frame_and_leaves_no_folder(rooms, spoil, message, workers):
    spoil(rooms / "data")
    line = refused(*rooms_arguments(rooms), "--set", f"data.workers={workers}")
    assert message in line
    assert not (rooms / "runs").exists()
    # Nothing half-packed either.
    cache = Path(os.environ["ONESHOT_EDNAS_CACHE"])
    assert not list(cache.glob(".rooms-*"))


def test_a_frame_without_valid_depth_is_counted_and_the_run_goes_on(rooms):
    Image.fromarray(np.zeros((24, 32), dtype=np.uint16)).save(rooms / "data/depth/1.png")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = good(*rooms_arguments(rooms), "--json")
    assert result.stdout.count("\n") == 1
    results = json.loads(result.stdout)
    assert results == read_json(rooms / "runs/run/results.json")
    assert np.isfinite(results["metrics"]["depth"]["absolute_error"])
    line = "warning: 1 of 10 frames of rooms-train have no valid depth; they are kept, and count "
    assert line in result.stderr
    assert [text for text in result.stderr.splitlines() if "Warning" in text] == []
    # Later stages find the data by themselves.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        derived = good("derive", rooms / "runs/run", "--json")
    assert json.loads(derived.stdout)["stage"] == "derive"


def test_a_test_split_without_a_valid_pixel_of_a_task_is_refused_before_training(rooms):
    for number in (rooms / "data/test.txt").read_text().split():
        invalid = np.full((24, 32), 255, dtype=np.uint8)
        Image.fromarray(invalid).save(rooms / f"data/label/{number}.png")
    line = refused(*rooms_arguments(rooms))
    assert re.search(r"none of the \d+ test frames has a valid pixel of segmentation", line)
    assert not (rooms / "runs").exists()


def test_a_failure_inside_gets_status_1_and_debug_the_traceback(project, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("search step 3: the loss of depth\nis not finite")

    monkeypatch.setattr("oneshot_ednas.pipeline.OneShotRun.search", broken)
    arguments = ["run", project / "config.yaml", "--out", tmp_path / "run"]
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: search step 3: the loss of depth is not finite\n"
    with pytest.raises(RuntimeError, match="search step 3"):
        call("--debug", *arguments, "--resume")


def test_a_run_folder_takes_neither_set_nor_out(finished_run, tmp_path):
    for extra in (["--set", "search.steps=9"], ["--out", str(tmp_path / "other")]):
        assert "a run folder keeps its config" in refused("search", finished_run, *extra)


def test_an_architecture_of_ones_own_space_is_described_with_it(project, finished_run):
    architecture = finished_run / "architecture.json"
    assert "no search space" in refused("describe", architecture)
    command = ["describe", architecture, "--space", project / "space.yaml", "--tasks", "depth=1"]
    figures = json.loads(good(*command, "--json").stdout)
    assert figures["parameters"] > 0
    assert "--space is for an architecture" in refused("describe", "ednas_b0", "--space", "x")
