"""The whole chain on a small space: export, compile, measure, assemble."""

import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from oneshot_ednas.bundle.manifest import read_bundle, read_space
from oneshot_ednas.latency.operations import distinct_operations
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.space import SearchSpace

TOOL = Path(__file__).resolve().parents[1] / "tools" / "build_latency_table.py"
SPACE = """
name: smallest
stem_filters: 4
options: {ops: [ibn, fused_ibn], kernel_sizes: [3, 5], filter_multipliers: [1.0, 4.0]}
blocks:
  - {stride: 1, kernel_size: 3, filters: 4, expand_ratio: 1}
  - {stride: 2, kernel_size: 3, filters: 8, expand_ratio: 2}
fusion: {tap_blocks: [2], num_levels: 2, channels: 8, num_repeats: 1}
head: {num_convs: 1}
"""
"""64 architectures, the largest many times as slow as the smallest."""
EXPORT = ("export", "space.yaml", "--image-size", "64", "96", "--tasks", "segmentation=4,depth=1")
QUICK = ("--rounds", "2", "--runs", "5", "--warmup", "1", "--min-seconds", "0")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("build_latency_table", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def call(tool, monkeypatch):
    """Call the tool; standard output and error apart."""
    # The tool prints warnings in one line by replacing this; put it back after the test.
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(tool, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="module")
def exported(tool, tmp_path_factory) -> Path:
    """A folder with the space and its bundle. Read only."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "space.yaml").write_text(SPACE)
    space = SearchSpace.from_yaml(SPACE)
    (folder / "fixed.yaml").write_text(space.fix(space.base_architecture).to_yaml())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        arguments = [*EXPORT, "--out", "bundle", "--networks", "16", "--json"]
        result = CliRunner().invoke(tool, arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    bundle = read_bundle(folder / "bundle")
    assert summary["digest"] == bundle.digest
    assert summary["models"] == len(bundle.models)
    assert summary["networks"] == 16
    assert summary["bytes"] == sum((folder / "bundle" / m).stat().st_size for m in bundle.models)
    return folder


def test_the_whole_chain_makes_a_table_of_this_machine(exported, call, tmp_path):
    bundle, measured = exported / "bundle", tmp_path / "measured.jsonl"
    result = call("measure", bundle, "--out", measured, *QUICK)
    assert result.exit_code == 0, result.output
    manifest = read_bundle(bundle)
    records = [json.loads(line) for line in measured.read_text().splitlines()]
    assert records[0]["bundle"] == manifest.digest
    times = [record for record in records if record["type"] == "model"]
    assert [record["model"] for record in times] == [*manifest.models] * 2

    out = tmp_path / "cpu_litert_64x96.csv"
    result = call("assemble", bundle, measured, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    table, space = LatencyTable.load(out), read_space(bundle)
    assert table.rows.keys() == set(distinct_operations(space, (64, 96), manifest.out_channels))
    assert all(row.latency_ms > 0 for row in table.rows.values())
    assert table.header.source == "measured"
    assert table.header.held_out_networks == 8
    assert table.header.held_out_mape == pytest.approx(report["held_out_mape"], abs=1e-4)
    # Ten runs on a busy machine say little; still, it is a time of the right size.
    for network in report["networks"]:
        assert 0.2 < network["predicted_ms"] / network["measured_ms"] < 5
    text = call("assemble", bundle, measured, "--out", out).stdout
    assert text.startswith(f"{out}: {len(table.rows)} rows\n8 networks kept back: MAPE")


def test_an_absent_compiler_is_said_and_nothing_is_lost(exported, call, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = call("compile", exported / "bundle")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no edgetpu_compiler on PATH; it is Google's compiler ")
    assert "go on with measure" in result.stderr
    assert result.stderr.count("\n") == 1
    read_bundle(exported / "bundle")


def test_a_second_export_keeps_the_first(exported, call, monkeypatch):
    monkeypatch.chdir(exported)
    before = read_bundle(exported / "bundle")
    result = call(*EXPORT, "--out", "bundle")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: bundle exists and is not empty; give a new folder, or go on with compile or "
        "measure if it is the bundle that you want\n"
    )
    assert read_bundle(exported / "bundle") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "nothing", *EXPORT[2:], "--out", "x"), "no search space nothing; shipped: "),
        ((*EXPORT[:5], "--tasks", "depth", "--out", "x"), "--tasks: expected name=channels"),
        ((*EXPORT[:3], "8", "8", "--out", "x"), "image size: expected at least 16x16, got 8x8"),
        ((*EXPORT, "--out", "x", "--networks", "15"), "at least 16 whole ones, got 15"),
        ((*EXPORT, "--out", "x", "--networks", "-1"), "at least 16 whole ones, got -1"),
        (
            ("export", "fixed.yaml", *EXPORT[2:], "--out", "x"),
            "at least 16 whole ones, got 1 in the whole space",
        ),
        (("compile", "nothing"), "no bundle folder nothing; make one with"),
        (("measure", "nothing", "--out", "x"), "nothing is no bundle"),
        (("assemble", "nothing", "x.jsonl", "--out", "x.csv"), "no bundle folder nothing; make"),
        (("assemble", "bundle", "x.jsonl", "--out", "x.csv"), "x.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(exported, call, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(exported)
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (exported / "x").exists()
    assert not (exported / "x.csv").exists()


def test_no_networks_are_exported_with_a_warning(exported, call, tmp_path, monkeypatch):
    monkeypatch.chdir(exported)
    arguments = ["export", "fixed.yaml", *EXPORT[2:], "--networks", "0", "--out", tmp_path / "x"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "warning: without whole networks no table can be assembled\n"
    assert read_bundle(tmp_path / "x").networks == ()


def test_a_model_that_runs_in_part_on_the_host_is_named(exported, call, tmp_path, monkeypatch):
    compiler = tmp_path / "edgetpu_compiler"
    compiler.write_text(
        '#!/bin/sh\ncp "$4" "$3/$(basename "$4" .tflite)_edgetpu.tflite"\necho "'
        "Edge TPU Compiler version 16.0\nModel compiled successfully in 9 ms.\n"
        "On-chip memory used for caching model parameters: 2.50KiB\n"
        "Off-chip memory used for streaming uncached model parameters: 0.00B\n"
        "Number of Edge TPU subgraphs: 1\nTotal number of operations: 3\n"
        "Operator  Count  Status\nCONV_2D  2  Mapped to Edge TPU\n"
        'ADD  1  Operation version not supported"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    bundle = shutil.copytree(exported / "bundle", tmp_path / "bundle")
    result = call("compile", bundle)
    assert result.exit_code == 0, result.stderr
    models = read_bundle(bundle).models
    assert f"{len(models)} run in part on the host (such as {models[0]})" in result.stdout


def test_models_that_do_not_compile_end_in_exit_1(exported, call, tmp_path, monkeypatch):
    compiler = tmp_path / "edgetpu_compiler"
    compiler.write_text("#!/bin/sh\necho 'Internal compiler error'; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    result = call("compile", exported / "bundle", "--json")
    (exported / "bundle" / "compiled.jsonl").unlink()
    assert result.exit_code == 1
    summary = json.loads(result.stdout)
    assert len(summary["failures"]) == summary["num_models"]
    assert "models were not compiled, the first is operations/000001_" in result.stderr


@pytest.mark.parametrize("step", [[], ["export"], ["compile"], ["measure"], ["assemble"]])
def test_every_help_has_an_example(call, step):
    result = call(*step, "--help")
    assert result.exit_code == 0
    assert "xample: " in result.stdout


def test_the_tool_runs_as_a_script(tmp_path):
    done = subprocess.run(
        [sys.executable, TOOL, "--debug", "compile", tmp_path / "none"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "FileNotFoundError: no bundle folder" in done.stderr
