"""What the Edge TPU would not map, and what its compiler says."""

import re
import stat
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from oneshot_ednas.export.edgetpu import (
    MAPPED,
    CompilerReport,
    OperationCount,
    compile_model,
    compiled_path,
    find_compiler,
    parse_report,
    unmapped_ops,
)
from oneshot_ednas.export.graph import trace
from oneshot_ednas.models.network import build_network
from oneshot_ednas.space import ednas_b0, ednas_tiny

OTHER_SUBGRAPH = "More than one subgraph is not supported"
WHOLE = [("ADD", 11, MAPPED), ("CONV_2D", 52, MAPPED), ("DEPTHWISE_CONV_2D", 21, MAPPED)]
PART = [
    ("QUANTIZE", 1, "Operation is otherwise supported, but not mapped due to some unspecified lim"),
    ("RESIZE_BILINEAR", 1, "Operation version not supported"),
    ("CONV_2D", 30, MAPPED),
    ("CONV_2D", 4, OTHER_SUBGRAPH),
]


def printed(
    rows,
    *,
    version="16.0.384591198",
    on_chip="3.75MiB",
    off_chip="0.00B",
    subgraphs=1,
    total=None,
):
    """A report in the compiler's layout."""
    lines = [f"Edge TPU Compiler version {version}"]
    if version.startswith("16"):
        lines += ["Started a compilation timeout timer of 180 seconds.", ""]
    lines += [
        "",
        "Model compiled successfully in 941 ms.",
        "",
        "Input model: net.tflite",
        "Input size: 961.05KiB",
        "Output model: net_edgetpu.tflite",
        "Output size: 1.08MiB",
        f"On-chip memory used for caching model parameters: {on_chip}",
        "On-chip memory remaining for caching model parameters: 4.06MiB",
        f"Off-chip memory used for streaming uncached model parameters: {off_chip}",
        f"Number of Edge TPU subgraphs: {subgraphs}",
        f"Total number of operations: {sum(row[1] for row in rows) if total is None else total}",
        "Operation log: net_edgetpu.log",
        "",
    ]
    cpu = sum(count for _, count, status in rows if status != MAPPED)
    if cpu:
        lines += [
            "Model successfully compiled but not all operations are supported by the Edge TPU. "
            "A percentage of the model will instead run on the CPU, which is slower.",
            f"Number of operations that will run on Edge TPU: {sum(r[1] for r in rows) - cpu}",
            f"Number of operations that will run on CPU: {cpu}",
            "",
        ]
    lines += ["Operator                       Count      Status", ""]
    lines += [f"{name:<30} {count:<10} {status}" for name, count, status in rows]
    if version.startswith("16"):
        lines += ["Compilation child process completed within timeout period."]
        lines += ["Compilation succeeded! "]
    return "\n".join(lines) + "\n"


# The report ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["14.1.317412892", "15.0.340273435", "16.0.384591198"])
def test_a_report_of_a_wholly_mapped_model_is_read(version):
    report = parse_report(printed(WHOLE, version=version))
    assert report == CompilerReport(
        version=version,
        on_chip_bytes=3_932_160,
        off_chip_bytes=0,
        subgraphs=1,
        operations=tuple(
            OperationCount(name=name, count=count, status=status) for name, count, status in WHOLE
        ),
    )
    assert (report.mapped, report.unmapped) == (84, 0)


def test_a_report_of_a_partly_mapped_model_keeps_the_reasons():
    report = parse_report(printed(PART, on_chip="5.75KiB", off_chip="7.03MiB"))
    assert (report.mapped, report.unmapped) == (30, 6)
    assert (report.on_chip_bytes, report.off_chip_bytes) == (5888, 7_371_489)
    reasons = {row.name: row.status for row in report.operations if row.status != MAPPED}
    assert reasons["RESIZE_BILINEAR"] == "Operation version not supported"
    assert reasons["CONV_2D"] == OTHER_SUBGRAPH
    assert report.operations[0].status == PART[0][2]


def test_a_model_of_which_nothing_is_mapped_has_no_subgraph():
    rows = [("CONV_2D", 70, "Operation is working on an unsupported data type")]
    report = parse_report(printed(rows, on_chip="0.00B", subgraphs=0))
    assert (report.subgraphs, report.mapped, report.unmapped) == (0, 0, 70)


@given(
    st.lists(st.tuples(st.sampled_from(["ADD", "PAD", "MAX_POOL_2D"]), st.integers(1, 500))),
    st.sampled_from([("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30)]),
    st.integers(0, 102_399),
)
def test_counts_and_sizes_survive_being_printed(rows, unit, hundredths):
    name, factor = unit
    rows = [(op, count, MAPPED if count % 2 else OTHER_SUBGRAPH) for op, count in rows]
    report = parse_report(printed(rows, off_chip=f"{hundredths / 100:.2f}{name}"))
    assert report.mapped == sum(count for _, count, _ in rows if count % 2)
    assert report.mapped + report.unmapped == sum(count for _, count, _ in rows)
    assert report.off_chip_bytes == round(hundredths / 100 * factor)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Edge TPU Compiler version 15.0.340273435\n\nInternal compiler error. Aborting! \n",
            "reports no success: Internal compiler error. Aborting!",
        ),
        ("", "reports no success: it said nothing"),
        (printed(WHOLE, on_chip="3.75MB"), "expected a number of B, KiB, MiB, GiB, got 3.75MB"),
        (printed(WHOLE, total=85), "expected a table of 85 operations, got 84; this version print"),
        (printed(WHOLE).replace("subgraphs: 1", "subgraphs: -"), "expected 'Number of Edge TPU su"),
    ],
)
def test_a_report_that_is_not_understood_is_a_failure(text, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        parse_report(text)


# The call -----------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A shell script named `edgetpu_compiler` on PATH.

    The real compiler is a closed x86-64 program that is not at hand, so these tests cover our side
    of the call only: arguments, exit status, timeout and output.
    """
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    monkeypatch.setenv("PATH", str(bin_folder), prepend=":")

    def install(script: str) -> Path:
        path = bin_folder / "edgetpu_compiler"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return install


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "net.tflite"
    path.write_bytes(b"model")
    return path


def succeeding(text: str) -> str:
    """Keeps its arguments, and writes what the compiler writes."""
    return (
        'echo "$@" > "$(dirname "$0")/arguments"\n'
        'test "$1 $2" = "-s -o" || exit 3\n'
        'cp "$4" "$3/$(basename "$4" .tflite)_edgetpu.tflite"\n'
        f"cat <<'END'\n{text}END\n"
    )


def test_the_compiler_is_called_and_its_report_read(stand_in, model, tmp_path):
    path = stand_in(succeeding(printed(WHOLE, off_chip="41.75KiB")))
    assert find_compiler() == str(path)
    folder = tmp_path / "new" / "compiled"
    report = compile_model(model, folder)
    assert (report.mapped, report.unmapped, report.off_chip_bytes) == (84, 0, 42_752)
    assert (path.parent / "arguments").read_text().split() == ["-s", "-o", str(folder), str(model)]
    assert compiled_path(model, folder).read_bytes() == b"model"


@pytest.mark.parametrize("status", [0, 1])
def test_a_failure_is_told_in_the_compilers_words(stand_in, model, tmp_path, status):
    stand_in(
        "cat <<'END'\n"
        "Edge TPU Compiler version 16.0.384591198\n"
        "Started a compilation timeout timer of 180 seconds.\n"
        "ERROR: Restored original execution plan after delegate application failure.\n"
        "Compilation failed: Compilation failed due to large activation tensors in model.\n"
        "Compilation child process completed within timeout period.\n"
        f"Compilation failed! \nEND\nexit {status}\n"
    )
    words = (
        f"(exit status {status}): "
        "ERROR: Restored original execution plan after delegate application failure. | "
        "Compilation failed: Compilation failed due to large activation tensors in model. | "
        "Compilation failed!"
    )
    with pytest.raises(RuntimeError, match=re.escape(words) + "$"):
        compile_model(model, tmp_path)


def test_a_failure_that_exits_with_0_is_seen_beside_an_earlier_success(stand_in, model, tmp_path):
    stand_in(succeeding(printed(WHOLE)))
    compile_model(model, tmp_path)
    stand_in(f"cat <<'END'\n{printed(WHOLE)}END\n")
    with pytest.raises(RuntimeError, match=r"failed on .*net.tflite \(exit status 0\)"):
        compile_model(model, tmp_path)
    assert not compiled_path(model, tmp_path).exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\x7fELF of another machine", "Exec format error"), (b"#!/gone/sh\n", "No such file or d")],
)
def test_a_compiler_that_cannot_be_run_is_a_failure(stand_in, model, tmp_path, content, reason):
    stand_in("").write_bytes(content)
    with pytest.raises(RuntimeError, match=rf"bin/edgetpu_compiler cannot be run \({reason}"):
        compile_model(model, tmp_path)


def test_a_compiler_that_hangs_is_stopped(stand_in, model, tmp_path):
    stand_in("exec sleep 20\n")
    with pytest.raises(RuntimeError, match=r"took more than 0.2 s for .*net.tflite"):
        compile_model(model, tmp_path, timeout_s=0.2)


def test_no_compiler_or_no_model_is_said(stand_in, model, tmp_path, monkeypatch):
    stand_in("exit 0\n")
    with pytest.raises(FileNotFoundError, match=r"no model .*gone\.tflite"):
        compile_model(tmp_path / "gone.tflite", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() is None
    with pytest.raises(FileNotFoundError, match="no edgetpu_compiler on PATH; it runs on x86-64 L"):
        compile_model(model, tmp_path)


# Before the file is written -----------------------------------------------------------------


def verdicts(module: nn.Module, *shape: int) -> list[str]:
    return unmapped_ops(trace(module, (1, *shape)))  # type: ignore[arg-type]


class Up(nn.Module):
    """A resize by two."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, x):
        return F.interpolate(x, scale_factor=2, **self.settings)


@pytest.mark.parametrize("space", [ednas_tiny(), ednas_b0()], ids=lambda space: space.name)
def test_the_base_networks_are_mapped_wholly(space):
    network = build_network(space.fix(space.base_architecture), {"segmentation": 19, "depth": 1})
    size = (64, 128) if space.name == "ednas_tiny" else (256, 256)
    assert verdicts(network, 3, *size) == []


def test_a_grouped_convolution_is_named():
    (line,) = verdicts(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 3, groups=2)), 8, 9, 9)
    assert line.startswith("1 is not mapped: a convolution in 2 groups")
    assert verdicts(nn.Conv2d(8, 8, 3, groups=8), 8, 9, 9) == []
    assert verdicts(nn.Conv2d(8, 16, 3, groups=8), 8, 9, 9) != []


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        ({"mode": "nearest"}, 24, None),
        ({"mode": "nearest"}, 64, None),
        ({"mode": "bilinear", "align_corners": True}, 24, None),
        (
            {"mode": "bilinear", "align_corners": False},
            24,
            "is not mapped: bilinear resize wit",
        ),
        ({"mode": "nearest"}, 65, "may not be mapped: a resize to 130x130"),
        ({"mode": "bilinear", "align_corners": True}, 255, "may not be mapped: a resize to 510x51"),
        ({"mode": "nearest"}, 256, "is not mapped: a resize to 512x512; leave it to the host"),
    ],
)
def test_resizes_are_mapped_by_kind_and_size(settings, size, expected):
    lines = verdicts(Up(**settings), 2, size, size)
    assert len(lines) == (expected is not None)
    assert all(line.startswith(f"resize {expected}") for line in lines)


def test_activations_beyond_the_devices_memory_are_doubted():
    # 512 x 512 x (4 + 8) bytes are 3 MiB exactly.
    conv = nn.Conv2d(4, 8, 1)
    assert verdicts(conv, 4, 512, 512) == []
    (line,) = verdicts(conv, 4, 512, 520)
    assert "may not be mapped: its input and output take 3.0 MiB of the 3 MiB" in line


class Twice(nn.Module):
    """A sum of a map with itself: one input, not two."""

    def forward(self, x):
        return x + x


def test_a_map_that_is_read_twice_takes_its_memory_once():
    assert verdicts(Twice(), 6, 512, 512) == []
    assert len(verdicts(Twice(), 6, 513, 513)) == 1


def test_lines_come_in_order_of_execution():
    torch.manual_seed(0)
    module = nn.Sequential(
        Up(mode="bilinear"), nn.Conv2d(4, 8, 1, groups=2), Up(mode="nearest"), nn.Conv2d(8, 8, 1)
    )
    lines = verdicts(module, 4, 60, 60)
    assert [re.sub(r" (is|may) not.*", "", line) for line in lines] == ["0/resize", "1", "2/resize"]
