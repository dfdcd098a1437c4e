"""What `doctor` finds on this machine, and on machines made up by paths, programs and settings."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from oneshot_ednas.cli import doctor as command
from oneshot_ednas.cli import main
from oneshot_ednas.doctor import CHECKS, devices, diagnose, finding, resources, software
from oneshot_ednas.doctor.finding import good, note, problem
from oneshot_ednas.measure import MissingRuntime

GIB = 2**30
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells")


def program(folder: Path, name: str, *lines: str) -> None:
    """A program of that name, first on the path."""
    path = folder / name
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def only(check) -> finding.Finding:
    (found,) = check()
    return found


def test_this_machine_is_described_in_time_and_without_starting_cuda(monkeypatch, tmp_path):
    monkeypatch.setenv("ONESHOT_EDNAS_CACHE", str(tmp_path / "not" / "made"))
    findings = diagnose()
    assert {"python", "oneshot_ednas", "torch", "cpu", "cache folder"} <= {f.name for f in findings}
    for one in findings:
        assert one.found
        assert one.seconds < 5
        assert "the check failed" not in one.found, one
        assert (one.cure is None) == (one.state == "ok")
    assert not torch.cuda.is_initialized()
    assert not (tmp_path / "not").exists()  # looking makes nothing
    states = {one.name: one.state for one in findings}
    assert states["shipped files"] == states["pyglove"] == states["python"] == "ok"


def test_a_check_that_fails_is_a_finding_and_the_others_go_on():
    def broken():
        yield good("first", "half of it")
        raise KeyError("proc")

    findings = diagnose({"one": broken, "two": software.check_python})
    assert [(f.name, f.state) for f in findings] == [("one", "problem"), ("python", "ok")]
    assert findings[0].found == "the check failed: KeyError: 'proc'"


def test_a_finding_that_is_not_right_must_have_a_cure():
    with pytest.raises(AssertionError, match="one: note"):
        finding.Finding(name="one", state="note", found="something")


def test_a_program_that_hangs_is_given_up(programs, monkeypatch):
    monkeypatch.setattr(finding, "LIMIT_S", 0.2)
    program(programs, "edgetpu_compiler", "exec sleep 30")
    (found,) = diagnose({"edgetpu_compiler": CHECKS["edgetpu_compiler"]})
    assert found.state == "problem"
    assert "edgetpu_compiler did not answer within 0.2 s" in found.found
    assert found.seconds < 5


def test_the_edge_tpu_compiler_tells_its_version(programs):
    program(programs, "edgetpu_compiler", 'echo "Edge TPU Compiler version 16.0.384591198"')
    found = only(devices.check_edgetpu_compiler)
    assert found.state == "ok"
    assert found.found.startswith("Edge TPU Compiler version 16.0.384591198 (")


def test_programs_that_are_not_there_are_notes(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert only(devices.check_edgetpu_compiler).state == "note"
    compiler = only(software.check_compiler)
    assert compiler.state == "note"
    assert compiler.found.startswith("none of g++, clang++, c++")


def test_the_compiler_of_the_environment_comes_first(programs, monkeypatch):
    program(programs, "own-cxx", "echo own 1.2")
    monkeypatch.setenv("CXX", "own-cxx")
    assert only(software.check_compiler).found.endswith("own 1.2")


GPU = "NVIDIA H100 80GB HBM3, 550.54.15, 81559, 80000, 9.0"


@pytest.mark.parametrize(
    ("build", "visible", "count", "state", "word"),
    [
        (None, None, 0, "problem", "built without CUDA"),
        ("12.4", "", 0, "problem", "CUDA_VISIBLE_DEVICES='' hides it"),
        ("12.4", None, 0, "problem", "driver is too old for CUDA 12.4"),
        ("12.4", None, 1, "ok", None),
    ],
)
def test_why_a_gpu_is_not_used(programs, monkeypatch, build, visible, count, state, word):
    program(programs, "nvidia-smi", f'echo "{GPU}"')
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = only(devices.check_cuda)
    assert (found.name, found.state) == ("cuda:0", state)
    assert "H100 80GB HBM3, driver 550.54.15, 80000 of 81559 MiB free, bfloat16" in found.found
    assert found.cure is None if word is None else word in found.cure


def test_a_driver_that_does_not_answer_is_told_in_its_words(programs):
    said = "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."
    program(programs, "nvidia-smi", f'echo "{said}"', "exit 9")
    (found,) = diagnose({"cuda": devices.check_cuda})
    assert found.state == "problem"
    assert said in found.found


def test_an_older_gpu_has_no_fast_bfloat16(programs):
    program(programs, "nvidia-smi", 'echo "Tesla T4, 550.54.15, 15360, 15000, 7.5"')
    assert "no fast bfloat16" in only(devices.check_cuda).found


def test_more_threads_than_cores_are_noted(monkeypatch):
    monkeypatch.setattr(software, "num_cores", lambda: torch.get_num_threads() - 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    _, threads = software.check_torch()
    assert threads.state == "note"
    assert "OMP_NUM_THREADS 64" in threads.found


def test_an_old_torch_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.3.1+cu121")
    build, _ = software.check_torch()
    assert (build.state, build.cure) == ("problem", "install torch 2.4 or newer")


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(software, "version_of", lambda package: None)
    found = {one.name: one for one in software.check_packages()}
    assert [found[name].state for name in ("pyglove", "ray", "h5py")] == ["problem", "note", "note"]
    assert found["ray"].cure == "pip install 'oneshot-ednas[ray]'"


def test_files_that_did_not_come_along_are_a_problem(monkeypatch):
    monkeypatch.setattr(software, "is_shipped", lambda name: name != "benchmarks")
    *_, files = software.check_package()
    assert (files.state, files.found) == ("problem", "missing: benchmarks")


def test_without_an_interpreter_the_cure_is_the_one_of_measuring(monkeypatch):
    def none():
        raise MissingRuntime("no TFLite interpreter is installed: pip install ai-edge-litert")

    monkeypatch.setattr(devices, "find_runtime", none)
    found = only(devices.check_interpreter)
    assert found.state == "note"
    assert "pip install ai-edge-litert" in found.cure


def device(folder: Path, **words: str) -> None:
    folder.mkdir(parents=True)
    for name, word in words.items():
        (folder / name).write_text(f"{word}\n")


def test_edge_tpus_are_found_by_their_numbers(tmp_path):
    usb, pci = tmp_path / "usb", tmp_path / "pci"
    assert devices.coral_devices(usb, pci) == []
    device(usb / "1-1", idVendor="1d6b", idProduct="0002", speed="480")
    device(usb / "2-1", idVendor="1a6e", idProduct="089a", speed="480")
    device(usb / "2-2", idVendor="18d1", idProduct="9302", speed="5000")
    device(usb / "2-0:1.0")
    device(pci / "0000:01:00.0", vendor="0x1ac1", device="0x089a")
    slow, fast, module = devices.coral_devices(usb, pci)
    assert slow.startswith("USB Accelerator, not yet initialised (USB 2")
    assert (fast, module) == ("USB Accelerator, initialised", "PCIe module")


@pytest.mark.parametrize(("plugged", "state"), [([], "note"), (["PCIe module"], "problem")])
def test_an_edge_tpu_without_its_library_is_a_problem(monkeypatch, plugged, state):
    monkeypatch.setattr(devices, "coral_devices", lambda: plugged)
    monkeypatch.setattr(devices, "EDGETPU_LIBRARY", "libedgetpu-of-nobody.so.1")
    found = only(devices.check_edgetpu)
    assert found.state == state
    assert "libedgetpu-of-nobody.so.1: cannot open shared object" in found.found


@on_linux
def test_a_library_that_is_no_delegate_opens_no_edge_tpu(monkeypatch):
    monkeypatch.setattr(devices, "EDGETPU_LIBRARY", "libm.so.6")
    monkeypatch.setattr(devices, "coral_devices", list)
    assert "loads; no Edge TPU" in only(devices.check_edgetpu).found
    monkeypatch.setattr(devices, "coral_devices", lambda: ["PCIe module"])
    found = only(devices.check_edgetpu)
    assert found.state == "problem"
    assert "libm.so.6 is no delegate" in found.found


@pytest.mark.parametrize(
    ("kind", "free", "state", "word"),
    [
        ("ext4", 10 * GIB, "ok", None),
        ("ext4", GIB, "note", "set X"),
        ("ext4", 2**20, "problem", "free some space"),
        ("nfs4", 10 * GIB, "note", "local disk"),
        (None, 10 * GIB, "ok", None),
    ],
)
def test_folders_need_room_and_locks(monkeypatch, tmp_path, kind, free, state, word):
    monkeypatch.setattr(resources, "file_system", lambda path: kind)
    monkeypatch.setattr(
        resources.shutil, "disk_usage", lambda path: SimpleNamespace(free=free, total=free, used=0)
    )
    found = resources.check_folder("cache folder", tmp_path / "new", "set X")
    assert found.state == state
    assert "(not made yet)" in found.found
    assert found.cure is None if word is None else word in found.cure
    assert list(tmp_path.iterdir()) == []


@on_linux
def test_a_folder_that_cannot_be_written_is_a_problem(monkeypatch):
    monkeypatch.setenv("ONESHOT_EDNAS_CACHE", "/proc/nobody/cache")
    cache, _ = resources.check_folders()
    assert cache.state == "problem"
    assert "cannot be written" in cache.found
    assert "ONESHOT_EDNAS_CACHE" in cache.cure


@pytest.mark.parametrize(
    ("free", "state"), [(None, "note"), (GIB // 2, "problem"), (2 * GIB, "note"), (9 * GIB, "ok")]
)
def test_memory_is_enough_or_not(monkeypatch, free, state):
    monkeypatch.setattr(resources, "free_memory", lambda device: free)
    assert only(resources.check_memory).state == state


def test_few_open_files_are_noted(monkeypatch):
    monkeypatch.setattr(resources.resource, "getrlimit", lambda which: (256, 10**6))
    files, processes = resources.check_processes()
    assert (files.state, files.cure) == ("note", "ulimit -n 4096 for many workers")
    assert processes.state == "ok"


def test_the_command_prints_one_object_and_fails_for_a_problem_only(monkeypatch):
    rows = [good("python", "3.11"), note("ray", "not there", "pip install [ray]")]
    monkeypatch.setattr(command, "diagnose", lambda: rows)
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["counts"] == {"ok": 1, "note": 1, "problem": 0}
    assert told["findings"][1] == {
        "name": "ray",
        "state": "note",
        "found": "not there",
        "cure": "pip install [ray]",
        "seconds": 0.0,
    }
    rows.append(problem("memory", "none", "buy some"))
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1
    assert "pip install [ray]" in done.stdout  # no markup
    assert done.stdout.splitlines()[-1] == "1 problems, 1 notes, 1 ok"
