"""The stand-alone measuring file, on real interpreters: times, resuming, and what goes wrong."""

import ast
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oneshot_ednas import measure
from oneshot_ednas.export.calibration import calibrate
from oneshot_ednas.export.flatbuffer import write_tflite
from oneshot_ednas.export.graph import trace

SOURCE = Path(measure.__file__)
NAMES = ["operations/conv_x2.tflite", "operations/conv_x8.tflite", "networks/small.tflite"]
DIGEST = "0123abcd" * 8
FAST = ["--runs", "5", "--warmup", "1", "--min-seconds", "0"]

NO_DELEGATE = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
/* Takes no operation over; refuses graphs of some size, and crashes on larger ones. */
typedef struct Context { size_t num_tensors; } Context;
typedef struct Delegate {
  void *data;
  int (*prepare)(Context *, struct Delegate *);
  void *copy_from, *copy_to, *free_handle;
  int64_t flags;
  void *builder;
} Delegate;
static int prepare(Context *context, Delegate *delegate) {
  if (context->num_tensors > 20) {
    if (getenv("SULKS")) {
      FILE *left = fopen(getenv("SULKS"), "w");
      fputs(getenv("TRIES"), left);
      fclose(left);
    }
    abort();
  }
  return context->num_tensors > 8;
}
Delegate *tflite_plugin_create_delegate(char **keys, char **values, size_t count,
                                        void (*report)(const char *)) {
  if (getenv("NO_DEVICE")) return NULL;
  if (getenv("SULKS") && access(getenv("SULKS"), F_OK) == 0) { /* upset by a crash */
    FILE *left = fopen(getenv("SULKS"), "r+");
    int tries = getc(left) - '0';
    rewind(left);
    putc('0' + tries - 1, left);
    fclose(left);
    if (tries > 0) return NULL;
    unlink(getenv("SULKS"));
  }
  Delegate *delegate = calloc(1, sizeof(Delegate));
  delegate->prepare = prepare;
  return delegate;
}
void tflite_plugin_destroy_delegate(Delegate *delegate) { free(delegate); }
"""


def model(copies: int, channels: int = 8, size: int = 16) -> bytes:
    generator = torch.Generator().manual_seed(copies)
    layers = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(copies)]
    shape = (1, channels, size, size)
    graph = trace(nn.Sequential(*layers).eval(), shape)
    return write_tflite(graph, calibrate(graph, [torch.randn(shape, generator=generator)]))


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return dict(zip(NAMES, [model(2), model(8), model(1, channels=3)], strict=True))


@pytest.fixture
def bundle(tmp_path, models) -> Path:
    folder = tmp_path / "bundle"
    for name, content in models.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps({"digest": DIGEST, "models": NAMES}))
    shutil.copy(SOURCE, folder / "measure.py")
    return folder


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pairs(path: Path, kind: str = "model") -> list[tuple[int, str]]:
    return [(r["round"], r["model"]) for r in records(path) if r["type"] == kind]


def run(bundle: Path, out: Path, *more: str) -> int:
    return measure.main([str(bundle), "--out", str(out), *FAST, *more])


def started(bundle: Path, out: Path, *more: str) -> subprocess.Popen:
    """The bundle's own copy, measuring; it is waited for until it has written a few lines."""
    process = subprocess.Popen(
        [sys.executable, "measure.py", ".", "--out", str(out), "--rounds", "400", *more],
        cwd=bundle,
        stderr=subprocess.PIPE,
        text=True,
        # A job in a shell's background is born deaf to Ctrl-C, and so would its children be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    return process


def test_its_syntax_is_of_python_3_7_and_it_imports_numpy_alone():
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 7))
    imported = set()
    for node in ast.walk(tree):
        assert not isinstance(node, ast.NamedExpr | ast.Match)
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported <= {*sys.stdlib_module_names, "numpy"}
    # numpy comes with the interpreter packages: without either, the message must still appear.
    assert not any(isinstance(node, ast.Import) and "numpy" in ast.dump(node) for node in tree.body)


@pytest.mark.skipif("ONESHOT_EDNAS_OLD_PYTHON" not in os.environ, reason="no old Python named")
def test_an_old_python_with_its_own_runtime_measures_a_bundle(bundle, tmp_path):
    out = tmp_path / "times.jsonl"
    python = os.environ["ONESHOT_EDNAS_OLD_PYTHON"]
    command = [python, "measure.py", ".", "--out", str(out), "--rounds", "1", *FAST]
    subprocess.run(command, cwd=bundle, check=True)
    assert pairs(out) == [(0, name) for name in NAMES]
    major, minor = (int(part) for part in records(out)[0]["python"].split(".")[:2])
    assert (3, 7) <= (major, minor) < sys.version_info[:2]


def test_every_model_is_timed_in_every_round(bundle, tmp_path, capsys):
    out = tmp_path / "deep" / "times.jsonl"
    assert run(bundle, out, "--rounds", "2", "--device", "a desk", "--clock-mhz", "250") == 0
    session, *times = records(out)
    runtime = measure.find_runtime()
    assert pairs(out) == [(r, name) for r in range(2) for name in NAMES]
    expected = {
        "type": "session",
        "format": 1,
        "unit": "ms",
        "bundle": DIGEST,
        "device": "a desk",
        "clock_mhz": 250,
        "delegate": None,
        "compiler": None,
        "kernels": "default",
        "threads": 1,
        "runtime": runtime.name,
        "runtime_version": runtime.version,
        "numpy": np.__version__,
    }
    assert expected.items() <= session.items()
    assert os.uname().nodename not in json.dumps(session)
    for line in times:
        assert line["runs"] == 5
        assert 0 < line["min_ms"] <= line["median_ms"] < 1000
        assert line["spread_ms"] >= 0
    best = {line["model"]: line["min_ms"] for line in times}
    assert best[NAMES[1]] > best[NAMES[0]]
    assert "6 of 6 measured, 0 failed" in capsys.readouterr().err


def test_what_is_there_is_not_measured_again(bundle, tmp_path, capsys):
    out = tmp_path / "times.jsonl"
    assert run(bundle, out, "--rounds", "1", "--models", "operations/*") == 0
    assert pairs(out) == [(0, NAMES[0]), (0, NAMES[1])]
    before = out.read_bytes()
    assert run(bundle, out, "--rounds", "2") == 0
    assert out.read_bytes().startswith(before)
    assert pairs(out)[2:] == [(0, NAMES[2])] + [(1, name) for name in NAMES]
    assert [r["type"] for r in records(out)].count("session") == 2
    before = out.read_bytes()
    assert run(bundle, out, "--rounds", "2") == 0
    assert out.read_bytes() == before
    assert "nothing to do" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory, models) -> tuple[Path, dict]:
    """A file of measurements with two sessions, and the session that may go on."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "m.tflite").write_bytes(models[NAMES[0]])
    manifest = {"digest": DIGEST, "models": ["m.tflite"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for rounds in ("2", "4"):
        assert run(folder, folder / "times.jsonl", "--rounds", rounds) == 0
    return folder / "times.jsonl", records(folder / "times.jsonl")[0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_file_cut_at_any_byte_goes_on_from_its_whole_lines(finished, data):
    path, session = finished
    content = path.read_bytes()
    cut = path.with_name("cut.jsonl")
    cut.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    done, failed, size = measure.read_done(cut, session)
    assert failed == set()
    whole = content[:size]
    assert cut.read_bytes().rpartition(b"\n")[0] == whole.rpartition(b"\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    assert done == {(r["model"], r["round"]) for r in lines if r["type"] == "model"}


def test_a_torn_last_line_is_dropped_and_measured_again(bundle, tmp_path):
    out = tmp_path / "times.jsonl"
    assert run(bundle, out, "--rounds", "1") == 0
    out.write_bytes(out.read_bytes()[:-20])
    assert run(bundle, out, "--rounds", "1") == 0
    assert sorted(pairs(out)) == sorted((0, name) for name in NAMES)


def test_a_killed_one_leaves_no_process_and_goes_on(bundle, tmp_path):
    out = tmp_path / "times.jsonl"
    process = started(bundle, out)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    kept = pairs(out)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert run(bundle, out, "--rounds", "6") == 0
    assert pairs(out)[: len(kept)] == kept
    assert pairs(out) == [(r, name) for r in range(6) for name in NAMES]


def test_ctrl_c_says_how_to_go_on(bundle, tmp_path):
    out = tmp_path / "times.jsonl"
    process = started(bundle, out)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith(f"stopped: {out} keeps")
    assert out.read_bytes().endswith(b"\n")
    count = len(pairs(out))
    assert 3 <= count < 1200
    assert pairs(out) == [(r, name) for r in range(400) for name in NAMES][:count]


def test_two_that_write_to_one_file_are_told(bundle, tmp_path):
    out = tmp_path / "times.jsonl"
    process = started(bundle, out)
    assert run(bundle, out, "--rounds", "9", "--models", "networks/*") in (0, 1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.splitlines()[-1] == f"error: another process writes to {out}: end one of the two"


def test_a_model_that_does_not_open_costs_its_own_lines_only(bundle, tmp_path, capsys):
    out = tmp_path / "times.jsonl"
    good = (bundle / NAMES[1]).read_bytes()
    (bundle / NAMES[1]).write_bytes(good[: len(good) // 2])
    (bundle / NAMES[2]).unlink()
    assert run(bundle, out, "--rounds", "2") == 1
    assert pairs(out) == [(0, NAMES[0]), (1, NAMES[0])]
    assert pairs(out, "failure") == [(r, name) for r in range(2) for name in NAMES[1:]]
    reasons = [r["error"] for r in records(out) if r["type"] == "failure"]
    assert "ValueError" in reasons[0]
    assert NAMES[2] in reasons[1]
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: 4 of 6 measurements failed, first {NAMES[1]}: ValueError")
    # Once it is whole again, the same command makes good for it.
    (bundle / NAMES[1]).write_bytes(good)
    assert run(bundle, out, "--rounds", "2", "--models", "operations/*") == 0
    assert pairs(out)[2:] == [(0, NAMES[1]), (1, NAMES[1])]


@pytest.fixture
def process(bundle):
    options = {"bundle": "", "compiler": None, "clock_mhz": None, "device": None}
    options |= {"delegate": None, "kernels": "default", "threads": 1}
    process = measure.InterpreterProcess(options)
    yield process
    process.close()


TIMING = {"runs": 3, "warmup": 1, "min_seconds": 0.0, "max_seconds": 0.0}


def test_a_crash_is_named_and_the_next_model_runs(bundle, process):
    crash = threading.Timer(0.5, os.kill, (process._process.pid, signal.SIGSEGV))
    crash.start()
    endless = {**TIMING, "runs": 10**9, "max_seconds": 60.0}
    with pytest.raises(measure.Failure, match="ended with signal SIGSEGV"):
        process.measure(bundle / NAMES[0], endless)
    crash.join()
    assert process.measure(bundle / NAMES[0], TIMING)["runs"] == 1


def test_a_process_that_died_between_two_models_is_replaced(bundle, process):
    process._process.kill()
    process._process.wait()
    assert process.measure(bundle / NAMES[0], TIMING)["runs"] == 1


def test_a_hanging_process_is_ended(bundle, process, monkeypatch):
    os.kill(process._process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "TIME_LIMIT_S", 0.2)
        with pytest.raises(measure.Failure, match="no answer in 0 s"):
            process.measure(bundle / NAMES[0], TIMING)
    assert process.measure(bundle / NAMES[0], TIMING)["runs"] == 1


def test_no_edge_tpu_library_is_one_clear_line(bundle, tmp_path, capfd):
    out = tmp_path / "times.jsonl"
    assert run(bundle, out, "--edgetpu") == 2
    assert "an Edge TPU runs compiled models only" in capfd.readouterr().err
    (bundle / "compiled.jsonl").write_text("")
    assert run(bundle, out, "--edgetpu") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot open the delegate ({measure.EDGETPU_LIBRARY}")
    assert "libedgetpu1-std" in line
    assert run(bundle, out, "--delegate", "libm.so.6") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: libm.so.6 is no delegate")
    assert not out.exists()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A delegate that upsets the device and refuses models, see `NO_DELEGATE`."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("library")
    (folder / "delegate.c").write_text(NO_DELEGATE)
    library = folder / "libedgetpu_of_test.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(folder / "delegate.c")]
    subprocess.run(command, check=True)
    return library


def compile_all(bundle: Path, models: list[str], *, uncompiled: tuple[str, ...] = ()) -> None:
    """Say that the models as they are come from the compiler."""
    (bundle / "manifest.json").write_text(json.dumps({"digest": DIGEST, "models": models}))
    lines = [{"model": m, "error": "not mapped"} for m in uncompiled]
    good = [m for m in models if m not in uncompiled]
    lines += [{"model": m, "compiled": m, "compiler": "16.0"} for m in good]
    (bundle / "compiled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


CRASHES, REFUSED, RUNS = NAMES[1], NAMES[0], NAMES[2]


def test_a_delegate_that_fails_or_crashes_on_a_model_leaves_the_others(
    bundle, tmp_path, capfd, monkeypatch, library
):
    missing = "operations/uncompiled.tflite"
    compile_all(bundle, [CRASHES, missing, REFUSED, RUNS], uncompiled=(missing,))
    out = tmp_path / "times.jsonl"
    assert run(bundle, out, "--delegate", str(library), "--rounds", "1") == 1
    session, *rest = records(out)
    assert session["device"] == "Coral Edge TPU"
    assert session["delegate"] == str(library)
    assert session["compiler"] == "16.0"
    assert [r["model"] for r in rest] == [CRASHES, REFUSED, RUNS, missing]
    assert pairs(out) == [(0, RUNS)]
    assert "signal SIGABRT" in rest[0]["error"]
    assert "RuntimeError" in rest[1]["error"]
    assert "compiled.jsonl" in rest[3]["error"]
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.endswith("; 1 models are not compiled: run the step compile on the bundle")

    monkeypatch.setenv("NO_DEVICE", "1")
    assert run(bundle, out, "--delegate", str(library)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"Failed to load delegate from {library}: is the Edge TPU plugged in" in line


@pytest.mark.parametrize("tries", [2, 9])
def test_a_device_that_a_crash_has_upset_is_waited_for(
    bundle, tmp_path, capfd, monkeypatch, library, tries
):
    monkeypatch.setattr(measure, "RESTART_PAUSES_S", (0.0, 0.01, 0.01))
    monkeypatch.setenv("SULKS", str(tmp_path / "upset"))
    monkeypatch.setenv("TRIES", str(tries))
    compile_all(bundle, [CRASHES, RUNS])
    out = tmp_path / "times.jsonl"
    command = (bundle, out, "--delegate", str(library), "--rounds", "1")
    if tries < 3:
        assert run(*command) == 1
        assert pairs(out) == [(0, RUNS)]
        return
    assert run(*command) == 2
    assert "is the Edge TPU plugged in" in capfd.readouterr().err.splitlines()[-1]
    assert pairs(out) == []
    (tmp_path / "upset").unlink()
    # Plugged in anew, the same command measures the others before it tries that model again.
    assert run(*command) == 1
    assert [r["model"] for r in records(out) if "model" in r] == [CRASHES, RUNS, CRASHES]
    assert pairs(out) == [(0, RUNS)]


def test_a_delegate_that_runs_nothing_stops_early_with_the_cure(bundle, tmp_path, capfd, library):
    names = [f"operations/refused_{number:02d}.tflite" for number in range(12)]
    for name in names:
        shutil.copy(bundle / REFUSED, bundle / name)
    compile_all(bundle, names)
    out = tmp_path / "times.jsonl"
    command = (bundle, out, "--delegate", str(library), "--rounds", "1")
    assert run(*command) == 1
    assert pairs(out, "failure") == [(0, name) for name in names[:10]]
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: none of the first 10 models runs, the last is {names[9]}: ")
    assert 'Python 3.7 to 3.9 and pip install "tflite-runtime<=2.9.1" "numpy<2"' in said
    # Where one ran, the others may fail as they like.
    compile_all(bundle, [RUNS, *names])
    out.unlink()
    assert run(*command) == 1
    assert pairs(out) == [(0, RUNS)]
    assert len(pairs(out, "failure")) == 12
    assert run(*command) == 1
    assert len(pairs(out, "failure")) == 24


def test_a_line_that_is_written_in_parts_is_whole(tmp_path):
    class Slow(io.FileIO):
        def write(self, data) -> int:
            return super().write(bytes(data[:7]))

    with Slow(tmp_path / "times.jsonl", "wb") as file:
        measure._append(file, {"type": "model", "model": NAMES[0]})
        measure._append(file, {"type": "model", "model": NAMES[1]})
    assert [r["model"] for r in records(tmp_path / "times.jsonl")] == NAMES[:2]


@pytest.mark.parametrize(
    ("name", "value"),
    [("machine", "a Raspberry Pi"), ("runtime_version", "2.9.1"), ("bundle", "f" * 64)],
)
def test_another_machine_runtime_or_bundle_is_refused(bundle, tmp_path, capsys, name, value):
    out = tmp_path / "times.jsonl"
    assert run(bundle, out, "--rounds", "1") == 0
    session, *rest = records(out)
    lines = [session | {name: value}, *rest]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = out.read_bytes()
    assert run(bundle, out, "--rounds", "1") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{name} {value!r}" in said
    assert repr(session[name]) in said
    assert out.read_bytes() == before


def test_a_newer_python_or_numpy_may_go_on(finished):
    path, session = finished
    done, _, size = measure.read_done(path, session | {"python": "4.0", "numpy": "9", "date": ""})
    assert len(done) == 4
    assert size == path.stat().st_size


def test_what_is_no_bundle_or_file_of_measurements_is_refused(bundle, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert measure.main(list(arguments)) == 2
        return capsys.readouterr().err

    out = str(tmp_path / "times.jsonl")
    assert "is no bundle" in refused(str(tmp_path), "--out", out)
    assert "no model of" in refused(str(bundle), "--out", out, "--models", "other/*")
    manifest = bundle / "manifest.json"
    before = manifest.read_bytes()
    assert "no file of measurements" in refused(str(bundle), "--out", str(manifest))
    assert manifest.read_bytes() == before
    manifest.write_text("{")
    assert "no manifest of a bundle" in refused(str(bundle), "--out", out)
    assert not Path(out).exists()


def test_a_damaged_line_is_named(finished):
    path, session = finished
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = path.with_name("damaged.jsonl")
    damaged.write_bytes(b"".join([*lines[:2], b"{oops\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"damaged.jsonl:3: expected JSON"):
        measure.read_done(damaged, session)


def isolated(bundle: Path, path: Path) -> str:
    """What `find_runtime` says in a Python without installed packages, but those in a folder."""
    code = "import measure\ntry: print(measure.find_runtime())\nexcept ValueError as e: print(e)"
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=bundle,
        env={**os.environ, "PYTHONPATH": str(path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_without_an_interpreter_the_message_says_what_to_install(bundle, tmp_path):
    said = isolated(bundle, tmp_path / "nothing")
    assert said.startswith("no TFLite interpreter is installed")
    assert "pip install ai-edge-litert" in said
    assert '"tflite-runtime<=2.9.1"' in said


@pytest.mark.skipif(np.__version__ < "2", reason="needs numpy 2")
def test_numpy_2_beside_tflite_runtime_is_told_before_it_crashes(bundle, tmp_path):
    installed = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        (tmp_path / name).symlink_to(installed / name)
    (tmp_path / "tflite_runtime").mkdir()
    (tmp_path / "tflite_runtime" / "__init__.py").write_text('__version__ = "2.14.0"\n')
    said = isolated(bundle, tmp_path)
    assert f"tflite_runtime 2.14.0 does not work with numpy {np.__version__}" in said
    assert 'pip install "numpy<2"' in said


def test_time_invocations_counts_and_bounds(models):
    interpreter = measure.open_interpreter(models[NAMES[0]])
    measure.fill_inputs(interpreter)
    assert len(measure.time_invocations(interpreter, runs=7, warmup=0)) == 7
    assert len(measure.time_invocations(interpreter, runs=7, max_seconds=0.0)) == 1
    times = measure.time_invocations(interpreter, runs=1, min_seconds=0.02)
    assert len(times) > 1
    assert sum(times) >= 20 > sum(times[:-1])
    assert gc.isenabled()
    summary = measure.summarize([4.0, 1.0, 2.0, 3.0, 100.0])
    assert summary == {"runs": 5, "median_ms": 3.0, "spread_ms": 1.0, "min_ms": 1.0}


def test_kernels_agree_and_inputs_repeat(models, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(models[NAMES[0]])
    outputs = []
    for source, kernels in (
        (path, "default"),
        (str(path), "builtin"),
        (models[NAMES[0]], "reference"),
    ):
        interpreter = measure.open_interpreter(source, kernels=kernels, threads=2)
        measure.fill_inputs(interpreter, seed=3)
        (image,) = interpreter.get_input_details()
        values = interpreter.get_tensor(image["index"]).copy()
        assert values.min() < -120
        assert values.max() > 120
        interpreter.invoke()
        (output,) = interpreter.get_output_details()
        outputs.append((values, interpreter.get_tensor(output["index"]).astype(int)))
    for values, result in outputs[1:]:
        np.testing.assert_array_equal(values, outputs[0][0])
        assert np.abs(result - outputs[0][1]).max() <= 1
    with pytest.raises(ValueError, match="expected one of default, builtin, reference, got 'fast'"):
        measure.open_interpreter(path, kernels="fast")
