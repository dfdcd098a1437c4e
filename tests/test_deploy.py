"""A trained network as a file: what is refused, compared, measured and compiled."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CPU, SIZE

from oneshot_ednas.deploy import (
    PIXEL_RANGE,
    check_contents,
    compare,
    compiler_text,
    deploy,
    difference_text,
    latency_text,
    measure_latency,
)
from oneshot_ednas.export import export_tflite, read_contents
from oneshot_ednas.export.contents import FileOperator
from oneshot_ednas.export.edgetpu import MAX_VERSIONS
from oneshot_ednas.export.runtime import TfliteNetwork
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.measure import describe_session
from oneshot_ednas.models.network import build_network
from oneshot_ednas.schema import read_json
from oneshot_ednas.tasks import TaskConfig, make_tasks


@pytest.fixture(scope="module")
def network(tiny):
    torch.manual_seed(0)
    space = tiny.space.fix(tiny.space.base_architecture)
    return build_network(space, {"segmentation": 10, "depth": 1})


@pytest.fixture(scope="module")
def file(tiny, network, tmp_path_factory):
    """The network's file, calibrated on the training frames."""
    path = tmp_path_factory.mktemp("deploy") / "model.tflite"
    images = tiny.train.batch(range(32))["image"]
    export_tflite(network, path, calibration_images=images, input_range=PIXEL_RANGE)
    return path


def deployed(tiny, network, folder, **settings):
    return deploy(
        network,
        folder / "m.tflite",
        folder / "m.json",
        **{
            "name": "some network",
            "architecture": "a fixed one",
            "calibration": tiny.train,
            "splits": {"held out": tiny.train.subset(range(6))},
            "tasks": tiny.tasks,
            "table": tiny.table,
            "predicted_ms": 4.5,
            "device": CPU,
        }
        | settings,
    )


# The whole ----------------------------------------------------------------------------------


def test_the_report_is_that_of_the_file(tiny, network, tmp_path):
    report = deployed(tiny, network, tmp_path, batch_size=4)
    assert report == read_json(tmp_path / "m.json")
    contents = read_contents(tmp_path / "m.tflite")
    assert {name: row["count"] for name, row in report["operators"].items()} == contents.counts
    assert report["inputs"]["images"]["shape"] == [1, *SIZE, 3]
    assert set(report["outputs"]) == {"segmentation", "depth"}
    assert report["num_calibration_images"] == 32
    assert set(report["metrics"]) == {"held out"}
    assert set(report["metrics"]["held out"]["segmentation"]) == {"miou", "pixel_accuracy"}
    assert report["latency"]["measured_ms"] > 0
    assert report["unmapped"] == []
    digest = hashlib.sha256((tmp_path / "m.tflite").read_bytes()).hexdigest()
    assert report["sha256"] == digest


def test_splits_with_frames_that_were_trained_on_are_named(tiny, network, tmp_path):
    new = replace(tiny.train, sources=tuple(f"new/{name}" for name in tiny.train.sources))
    few, known = new.subset(range(2)), tiny.train.subset(range(2))
    assert deployed(tiny, network, tmp_path, splits={"test": few})["note"] is None
    note = deployed(tiny, network, tmp_path, splits={"test": few, "validation": known})["note"]
    assert note.startswith("the network was trained on frames of the validation split: ")


def test_the_choice_of_calibration_frames_is_seeded(tiny, network, tmp_path):
    def written(**settings):
        deployed(tiny, network, tmp_path, num_calibration=12, splits={}, **settings)
        return (tmp_path / "m.tflite").read_bytes()

    first = written(seed=1)
    assert written(seed=1, batch_size=5) == first
    assert written(seed=2) != first


def test_too_few_calibration_frames_are_said(tiny, network, tmp_path):
    with pytest.warns(UserWarning, match="calibrated on 9 images only"):
        deployed(tiny, network, tmp_path, num_calibration=9, splits={})
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        deployed(tiny, network, tmp_path / "none", num_calibration=0, splits={})
    assert not (tmp_path / "none").exists()


def test_what_the_device_would_not_map_is_named_before_the_file_is_written(tiny, tmp_path):
    space = tiny.space.fix(tiny.space.base_architecture)
    network = build_network(space, {"depth": 1})
    tall = torch.zeros(10, 3, 1152, 32)
    expected = "on the Edge TPU, .*may not be mapped: a resize to (144x4|288x8)$"
    with (
        pytest.warns(UserWarning, match=expected) as said,
        pytest.raises(OSError, match="Is a directory"),
    ):
        export_tflite(network, tmp_path, calibration_images=tall)
    assert len(said) == 4  # two levels of two repeats


class Recorder:
    """An interpreter that keeps what is set as its input."""

    def __init__(self, interpreter) -> None:
        self.interpreter, self.values = interpreter, []

    def __getattr__(self, name):
        return getattr(self.interpreter, name)

    def set_tensor(self, index, values):
        self.values.append(values)
        self.interpreter.set_tensor(index, values)


@pytest.mark.parametrize(("io", "offset"), [("int8", 128), ("uint8", 0)])
def test_8_bit_pixels_go_in_as_they_are(tiny, network, tmp_path, io, offset):
    images = tiny.train.batch(range(10))["image"]
    path = tmp_path / "m.tflite"
    export_tflite(network, path, calibration_images=images, io=io, input_range=PIXEL_RANGE)
    opened = TfliteNetwork(path)
    opened.interpreter = Recorder(opened.interpreter)
    pixels = torch.arange(3 * 32 * 32).reshape(1, 3, 32, 32) % 256
    opened(pixels.float() / 127.5 - 1)
    (entered,) = opened.interpreter.values
    assert entered.dtype == io
    np.testing.assert_array_equal(entered.astype(int) + offset, pixels.permute(0, 2, 3, 1))


# Contents -----------------------------------------------------------------------------------


def test_operators_and_types_that_the_device_lacks_are_refused(file):
    contents = read_contents(file)
    check_contents(contents, "m.tflite")

    def with_operator(name: str, version: int) -> None:
        added = FileOperator(name=name, version=version, inputs=("a",), outputs=("head/b",))
        check_contents(replace(contents, operators=(*contents.operators, added)), "m.tflite")

    with_operator("ADD", 3)  # newer than what is written here, and accepted
    with pytest.raises(RuntimeError, match=r"m.tflite: head/b is written by ADD version 4, .* 3"):
        with_operator("ADD", 4)
    with pytest.raises(RuntimeError, match=r"head/b is written by PAD .* expected no such op"):
        with_operator("PAD", 1)
    with pytest.raises(RuntimeError, match=r"by CUSTOM version 1, expected one of ADD, AVERAGE_"):
        with_operator("CUSTOM", 1)
    floats = (*contents.tensors, replace(contents.tensors[0], name="x", dtype="float32"))
    with pytest.raises(RuntimeError, match="x is float32, expected integers only"):
        check_contents(replace(contents, tensors=floats), "m.tflite")


def test_a_refused_file_does_not_stay(tiny, network, tmp_path, monkeypatch):
    deployed(tiny, network, tmp_path, splits={})
    monkeypatch.setitem(MAX_VERSIONS, "ADD", 1)
    with pytest.raises(RuntimeError, match=r"is written by ADD version 2, expected at most 1"):
        deployed(tiny, network, tmp_path, splits={})
    assert list(tmp_path.iterdir()) == []


# Comparison ---------------------------------------------------------------------------------

TASKS = make_tasks(
    {
        "segmentation": TaskConfig(kind="segmentation", num_classes=3),
        "depth": TaskConfig(kind="depth"),
    }
)


def test_shares_differ_in_points_and_errors_in_percent():
    exact = {"segmentation": {"miou": 0.4}, "depth": {"absolute_error": 2.0, "delta_1": 0.5}}
    quantized = {"segmentation": {"miou": 0.39}, "depth": {"absolute_error": 2.1, "delta_1": 0.51}}
    found = compare(exact, quantized, TASKS)
    rows = [found["segmentation"]["miou"], *found["depth"].values()]
    assert [difference_text(row) for row in rows] == ["-1.00 points", "+5.00%", "+1.00 points"]
    assert found["depth"]["absolute_error"]["int8"] == 2.1


@given(st.floats(0, 1e3), st.floats(0, 1e3))
def test_a_difference_is_finite_and_has_the_sign_of_the_change(exact, quantized):
    found = compare({"depth": {"rmse": exact}}, {"depth": {"rmse": quantized}}, TASKS)
    change = found["depth"]["rmse"]["difference"]
    assert math.isfinite(change)
    assert change * (quantized - exact) >= 0
    assert (change == 0) == (quantized == exact) or abs(quantized - exact) < 1e-300


# Latency ------------------------------------------------------------------------------------


def measured_table(table: LatencyTable, **changes) -> LatencyTable:
    """The table as if it were measured here."""
    session = describe_session({"device": None, "delegate": None})
    header = replace(
        table.header,
        source="measured",
        device="CPU",
        machine=session["machine"],
        runtime=f"{session['runtime']} {session['runtime_version']}",
        kernels="default",
        threads=1,
    )
    return LatencyTable(replace(header, **changes), table.rows, "here.csv")


def test_a_prediction_is_judged_only_by_the_same_machine_and_runtime(tiny, file):
    def report(table: LatencyTable) -> dict:
        predicted = {"predicted_ms": 1.0, "predicted_for": "x"}
        return {"latency": predicted | measure_latency(file, table.header, 1.0)}

    same = report(measured_table(tiny.table))
    ms = same["latency"]["measured_ms"]
    assert same["latency"]["error_percent"] == pytest.approx(100 * (1 - ms) / ms)
    assert "The prediction is off by +" in latency_text(same)
    assert same["latency"]["runs"] == 50
    assert "default kernels, 1 thread" in same["latency"]["measured_on"]
    others = [
        tiny.table,
        measured_table(tiny.table, runtime="tflite_runtime 2.5.0"),
        measured_table(tiny.table, machine="Raspberry Pi 4"),
        measured_table(tiny.table, delegate="libedgetpu.so.1"),
        measured_table(tiny.table, kernels="of another runtime"),
        measured_table(tiny.table, kernels=None),
        measured_table(tiny.table, threads=None),
    ]
    for table in others:
        other = report(table)
        assert other["latency"]["error_percent"] is None
        assert "so the one says nothing of the other" in latency_text(other)


def test_a_file_is_timed_with_the_kernels_and_threads_of_the_table(tiny, file):
    table = measured_table(tiny.table, kernels="builtin", threads=2)
    found = measure_latency(file, table.header, 1.0)
    assert found["measured_on"].endswith("builtin kernels, 2 threads")
    assert found["error_percent"] is not None


# Compiler -----------------------------------------------------------------------------------

COMPILER = """\
#!/bin/sh
# In place of the Edge TPU compiler, which is a closed program: it covers our side of the call.
cp "$4" "$3/$(basename "$4" .tflite)_edgetpu.tflite"
cat <<'END'
Edge TPU Compiler version 16.0.384591198
Model compiled successfully in 3 ms.
On-chip memory used for caching model parameters: 1.50MiB
Off-chip memory used for streaming uncached model parameters: 512.00KiB
Number of Edge TPU subgraphs: 1
Total number of operations: 7
CONV_2D    5   Mapped to Edge TPU
ADD        2   More than one subgraph is not supported
END
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Puts a script in the compiler's place."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def install(script: str) -> None:
        (folder / "edgetpu_compiler").write_text(script)
        (folder / "edgetpu_compiler").chmod(0o755)

    return install


def test_the_compilers_verdict_is_in_the_report(tiny, network, tmp_path, compiler):
    compiler(COMPILER)
    report = deployed(tiny, network, tmp_path, splits={})
    assert report["not_compiled"] is None
    assert (report["compiler"]["mapped"], report["compiler"]["unmapped"]) == (5, 2)
    compiled = tmp_path / report["compiler"]["file"]
    assert compiled.read_bytes() == (tmp_path / "m.tflite").read_bytes()
    assert compiler_text(report) == (
        "5 operations mapped, 2 left to the CPU, 1.50 MiB of parameters on the chip, 0.50 MiB "
        "streamed (version 16.0.384591198); 2 ADD: More than one subgraph is not supported"
    )


def test_a_failing_compiler_loses_neither_file_nor_report(tiny, network, tmp_path, compiler):
    compiler("#!/bin/sh\necho 'Internal compiler error. Aborting! '\nexit 1\n")
    report = deployed(tiny, network, tmp_path)
    assert report["compiler"] is None
    assert "(exit status 1): Internal compiler error. Aborting!" in report["not_compiled"]
    assert report["metrics"]
    assert report == read_json(tmp_path / "m.json")


def test_a_compiler_that_cannot_be_run_loses_neither(tiny, network, tmp_path, compiler):
    compiler("\x7fELF of another machine")
    report = deployed(tiny, network, tmp_path, splits={})
    assert "cannot be run (Exec format error)" in report["not_compiled"]
    assert report == read_json(tmp_path / "m.json")


def test_the_report_is_there_while_the_compiler_runs(tiny, network, tmp_path, compiler):
    compiler('#!/bin/sh\ncp "${4%.tflite}.json" "$4.seen"\nexit 1\n')
    report = deployed(tiny, network, tmp_path, splits={})
    seen = read_json(tmp_path / "m.tflite.seen")
    assert seen["not_compiled"] == "edgetpu_compiler has not come to its end"
    assert {key for key in report if report[key] != seen[key]} == {"not_compiled"}


def test_a_compiled_file_of_an_earlier_file_does_not_stay(
    tiny, network, tmp_path, compiler, monkeypatch
):
    compiler(COMPILER)
    deployed(tiny, network, tmp_path, splits={})
    assert (tmp_path / "m_edgetpu.tflite").is_file()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert deployed(tiny, network, tmp_path, splits={})["compiler"] is None
    assert not (tmp_path / "m_edgetpu.tflite").exists()


def test_no_compiler_is_said(tiny, network, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    report = deployed(tiny, network, tmp_path, splits={})
    assert "edgetpu_compiler is not on PATH; compile m.tflite where it is" in compiler_text(report)
