"""The command export: from a run folder or a checkpoint to a checked file, and bad input."""

import json
import os
import shutil
import sys
import warnings

import pytest
from test_cli import call, good, refused

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.checkpoint import load_checkpoint
from oneshot_ednas.export import read_contents
from oneshot_ednas.export.runtime import TfliteNetwork
from oneshot_ednas.run_folder import RunFiles
from oneshot_ednas.schema import read_json


@pytest.fixture
def unchanged(finished_run):
    """Checks that a command leaves the run's own results alone."""
    names = ("model.tflite", "export.json", "results.json", "report.html", "config.yaml")
    before = {name: (finished_run / name).read_bytes() for name in names}
    yield
    assert {name: (finished_run / name).read_bytes() for name in names} == before


# Good input ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchanged")
def test_frames_that_the_network_was_trained_on_are_said_to_be(finished_run, tmp_path):
    def exported(*arguments):
        text = good("export", finished_run, "--out", tmp_path / "net.tflite", *arguments).stdout
        return text, read_json(tmp_path / "net.json")["note"]

    text, note = exported()
    assert note.startswith("the network was trained on frames of the validation split: ")
    assert f"\nnote: {note}\n" in text
    text, note = exported("--split", "test")
    assert note is None
    assert "note:" not in text
    shown = " ".join(good("export", "--help").stdout.split())
    assert "the network was retrained on those of validation, too." in shown


@pytest.mark.usefixtures("unchanged")
def test_a_run_is_exported_with_its_report_beside_it(finished_run, tmp_path):
    out = tmp_path / "new" / "net.tflite"
    report = json.loads(good("export", finished_run, "--out", out, "--json").stdout)
    assert report == read_json(tmp_path / "new" / "net.json")
    assert report["file"] == "net.tflite"
    assert set(report["metrics"]) == {"validation"}
    own = read_json(finished_run / "export.json")
    for key in ("network", "architecture", "operators", "size_bytes", "inputs", "outputs"):
        assert report[key] == own[key]
    assert report["metrics"]["validation"] == own["metrics"]["validation"]
    assert out.read_bytes() == (finished_run / "model.tflite").read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == ["net.json", "net.tflite"]


def test_the_table_tells_all_that_the_report_holds(finished_run, tmp_path):
    out = tmp_path / "net.tflite"
    text = good("export", finished_run, "--out", out, "--split", "test").stdout
    report = read_json(tmp_path / "net.json")
    architecture = str(Architecture.load(finished_run / "architecture.json"))
    assert text.startswith(f"net.tflite: retrain.seed_0, {architecture}\n")
    row = report["metrics"]["test"]["segmentation"]["miou"]
    for part in (
        "CONV_2D",
        "test split",
        f"{row['int8']:.4f}",
        "MiB, all integers, int8 in and out, calibrated on 32 training frames",
        "ms predicted for toy, none (simulated); ",
        "so the one says nothing of the other",
        "Edge TPU compiler: not compiled: edgetpu_compiler is not on PATH",
        str(out),
        str(tmp_path / "net.json"),
    ):
        assert part in text, part


def test_a_seed_or_a_checkpoint_or_a_baseline_is_exported(finished_run, tmp_path, monkeypatch):
    out = tmp_path / "net.tflite"

    def exported(*arguments):
        report = json.loads(good("export", *arguments, "--out", out, "--json").stdout)
        assert report == read_json(tmp_path / "net.json")  # overwrites the one before
        return out.read_bytes(), report

    second, report = exported(finished_run, "--seed", 1)
    assert report["network"] == "retrain.seed_1"
    assert second != (finished_run / "model.tflite").read_bytes()
    monkeypatch.chdir(finished_run / "checkpoints")
    assert exported("retrain.seed_1.safetensors")[0] == second
    _, report = exported(finished_run, "--baseline", "base")
    results = read_json(finished_run / "results.json")["baselines"]["base"]
    assert report["network"] == "baseline.base"
    assert report["architecture"] == results["architecture"]
    assert report["latency"]["predicted_ms"] == results["latency_ms"]


def test_uint8_takes_pixels_and_few_calibration_frames_are_warned_of(finished_run, tmp_path):
    out = tmp_path / "net.tflite"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = good("export", finished_run, "--out", out, "--io", "uint8", "--num-calibration", 9)
    assert "warning: calibrated on 9 images only; 10 or more" in result.stderr
    contents = read_contents(out)
    assert {t.dtype for t in (*contents.inputs, *contents.outputs)} == {"uint8"}
    assert contents.counts["QUANTIZE"] == 3
    (image,) = contents.inputs
    assert image.scale[0] == pytest.approx(1 / 127.5)
    assert TfliteNetwork(out).image_size == (32, 32)
    assert read_json(tmp_path / "net.json")["num_calibration_images"] == 9


def test_without_an_interpreter_the_file_is_written_and_said_to_be_unverified(
    finished_run, tmp_path, monkeypatch
):
    for name in ("tflite_runtime", "ai_edge_litert"):
        monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "net.tflite"
    text = good("export", finished_run, "--out", out).stdout
    assert "not verified: no TFLite interpreter is installed" in text
    assert "pip install ai-edge-litert" in text
    assert "; not measured here" in text
    assert "validation" not in text
    assert out.read_bytes() == (finished_run / "model.tflite").read_bytes()


def test_a_failing_compiler_is_a_failure_that_keeps_the_file(finished_run, tmp_path, monkeypatch):
    # In place of the Edge TPU compiler, which is a closed program.
    script = tmp_path / "bin" / "edgetpu_compiler"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho 'Internal compiler error. Aborting! '\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    result = call("export", finished_run, "--out", tmp_path / "net.tflite", "--json")
    assert result.exit_code == 1
    assert "Internal compiler error. Aborting!" in json.loads(result.stdout)["not_compiled"]
    assert result.stderr.splitlines()[-1].startswith("error: edgetpu_compiler failed on ")
    assert (tmp_path / "net.tflite").read_bytes()[4:8] == b"TFL3"


# Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "no run folder and no checkpoint gone"),
        (["PROJECT"], "is no run folder with trained networks: it has no checkpoints"),
        (
            ["RUN", "--seed", 2],
            "trains no retrain.seed_2; it has retrain.seed_0, retrain.seed_1, ba",
        ),
        (
            ["RUN", "--baseline", "bace"],
            "trains no baseline.bace; it has retrain.seed_0, retrain.se",
        ),
        (["RUN", "--seed", 0, "--baseline", "base"], "--seed and --baseline exclude each other"),
        (["SEED", "--seed", 0], "is one training; --seed and --baseline are for a run folder"),
        (["SEARCH"], "holds a supernet: derive and retrain first (oneshot-ednas derive "),
        (
            ["RUN/config.yaml"],
            "expected a run folder, or a file such as RUN/checkpoints/retrain.se",
        ),
        (
            ["RUN", "--num-calibration", 0],
            "calibration_images: expected at least one image, got no",
        ),
        (["RUN", "--data", "PROJECT"], "root belongs to source folder, not to streets"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_exported_gets_one_line_and_leaves_nothing(
    project, finished_run, tmp_path, arguments, message
):
    checkpoint = RunFiles(finished_run).checkpoint
    names = {
        "PROJECT": project,
        "RUN": finished_run,
        "SEED": checkpoint("retrain.seed_0"),
        "SEARCH": checkpoint("search"),
        "RUN/config.yaml": finished_run / "config.yaml",
    }
    line = refused(
        "export",
        *(names.get(argument, argument) for argument in arguments),
        "--out",
        tmp_path / "new" / "net.tflite",
    )
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["net.tf", "net", "folder.tflite"])
def test_another_suffix_or_a_folder_is_no_file_to_write(finished_run, tmp_path, name):
    (tmp_path / "folder.tflite").mkdir()
    line = refused("export", finished_run, "--out", tmp_path / name)
    assert "--out: expected a file named *.tflite, got" in line


@pytest.mark.usefixtures("unchanged")
def test_the_runs_own_export_is_not_overwritten(finished_run, monkeypatch):
    monkeypatch.chdir(finished_run.parent)
    line = refused("export", finished_run, "--baseline", "base", "--out", "finished/model.tflite")
    assert "finished/model.tflite is the run's own export, which oneshot-ednas evaluate" in line
    assert line.endswith("; choose another file")


def test_a_report_does_not_overwrite_something_else(finished_run, tmp_path):
    out = shutil.copytree(finished_run, tmp_path / "run")
    results = (out / "results.json").read_text()
    line = refused("export", out, "--out", out / "results.tflite")
    assert f"the report would overwrite {out / 'results.json'}; choose another --out" in line
    assert (out / "results.json").read_text() == results
    assert not (out / "results.tflite").exists()


def test_an_unfinished_training_is_refused_with_the_command_to_run(finished_run, tmp_path):
    out = shutil.copytree(finished_run, tmp_path / "run")
    checkpoint = RunFiles(out).checkpoint("retrain.seed_0")
    previous = checkpoint.with_name("retrain.seed_0.previous.safetensors")
    assert load_checkpoint(previous)["step"] < load_checkpoint(checkpoint)["step"]
    line = refused("export", previous, "--out", tmp_path / "net.tflite")
    assert "trains no retrain.seed_0.previous" in line
    shutil.copy(previous, checkpoint)
    for what in (out, checkpoint):
        line = refused("export", what, "--out", tmp_path / "net.tflite")
        assert f"seed_0 is not trained to its end; run oneshot-ednas retrain {out}" in line
    (out / "architecture.json").unlink()
    line = refused("export", out, "--out", tmp_path / "net.tflite")
    assert f"has no derived architecture yet; run oneshot-ednas derive {out}" in line
    assert not (tmp_path / "net.tflite").exists()
