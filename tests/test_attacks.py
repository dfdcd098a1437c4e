"""Files that attack: each is refused in one line, at once; nothing is run, written or followed."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from attacks.make_corpus import Trap, write
from click.testing import CliRunner
from conftest import SMALL_SPACE
from folders import layout, write_dataset
from torch import nn

from oneshot_ednas import measure
from oneshot_ednas.architecture import Architecture
from oneshot_ednas.bundle.manifest import Bundle, read_bundle, read_compiled
from oneshot_ednas.bundle.measurements import read_measurements
from oneshot_ednas.checkpoint import load_checkpoint
from oneshot_ednas.cli import main
from oneshot_ednas.config import load_config
from oneshot_ednas.data.files import read_array, read_json, read_matlab
from oneshot_ednas.data.layouts.nyuv2_mat import open_nyuv2_mat
from oneshot_ednas.data.manifest import open_manifest, read_frame_list
from oneshot_ednas.export.calibration import calibrate
from oneshot_ednas.export.contents import read_contents
from oneshot_ednas.export.flatbuffer import to_flatbuffer
from oneshot_ednas.export.graph import trace
from oneshot_ednas.export.quantize import QuantizedModel, quantize
from oneshot_ednas.export.runtime import TfliteNetwork
from oneshot_ednas.export.sandbox import check_model
from oneshot_ednas.latency.published import score_networks
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.multi_trial.trials import read_trials
from oneshot_ednas.report.branching_tree import branching_tree
from oneshot_ednas.report.data_sheet import data_sheet
from oneshot_ednas.report.markup import markdown_table
from oneshot_ednas.report.plots import RunLog
from oneshot_ednas.report.sharing_curves import search_curves, training_curves
from oneshot_ednas.schema import load_json, shipped
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.tasks import make_tasks

MAX_SECONDS = 1.0
MAX_MEBIBYTES = 700
"""A MATLAB file may be decompressed up to its limit, and copied once."""


def frame(read: Callable[..., Any]) -> Callable[[Path], Any]:
    """A reader of files of a frame, which knows them by root and relative path."""
    return lambda path: read(path.parent, path.name, "7")


CONFIGS = {
    "bomb": ":5: not valid YAML: more than 5000 keys and values",
    "bomb_wide": ":2: not valid YAML: more than 5000 keys and values",
    "bomb_merge": ":13: not valid YAML: more than 5000 keys and values",
    "cycle_list": ":1: not valid YAML: *a stands within what it stands for",
    "cycle_map": ":2: not valid YAML: *a stands within what it stands for",
    "cycle_deep": ":1: not valid YAML: *a stands within what it stands for",
    "python_apply": ":1: not valid YAML: tag !!python/object/apply:os.mkdir is not one of plain",
    "python_new": ":1: not valid YAML: tag !!python/object/new:os.mkdir is not one of plain",
    "python_name": ":1: not valid YAML: tag !!python/name:os.system is not one of plain values",
    "python_module": ":1: not valid YAML: tag !!python/module:antigravity is not one of plain",
    "include": ":1: not valid YAML: tag !include is not one of plain values",
    "binary": ":1: not valid YAML: tag !!binary is not one of plain values",
    "deep_flow": ":1: not valid YAML: more than 40 levels in each other",
    "deep_map": ":1: not valid YAML: more than 40 levels in each other",
    "deep_block": ":40: not valid YAML: more than 40 levels in each other",
    "large": ": 300003 bytes, more than the 262144 that are read",
    "many_keys": ":2500: not valid YAML: more than 5000 keys and values",
    "nul": ":1: not valid YAML: character U+0000 is not allowed",
    "half_pair": ":1: device: expected text, got '\\ud800'",
    "steering": ":1: file: expected a plain key, got '\\x1b]0;gotcha\\x07'",
    "no_character": ": not valid YAML: Python int too large",
    "huge_number": ":1: seed: expected a whole number, got '999999999999...9999999999999'",
    "long_number": ":1: seed: expected a whole number, got '999999999999...9999999999999'",
    "sixties": ":1: seed: expected a whole number, got '1:30:30:30:3...0:30:30:30:30'",
    "lying_tag": ":1: seed: expected a whole number, got 'abc'",
    "nan": ":1: latency.target_ms: expected a finite number, got '.nan'",
    "infinity": ":1: latency.target_ms: expected a finite number, got '1e999'",
    "twice": ":2: duplicate key seed",
    "documents": ":2: not valid YAML: but found another document",
    "undefined": ":1: not valid YAML: found undefined alias 'nothing'",
    "list": ":1: file: expected keys and values, got a list",
    "latin1": ": expected UTF-8 text, got invalid continuation byte",
    "utf16": ": expected UTF-8 text, got invalid start byte",
    "not_text": ": expected UTF-8 text, got invalid start byte",
}
ARCHITECTURES = {
    "deep": ": not valid JSON: more than 64 levels in each other",
    "deep_whole": ": not valid JSON: more than 64 levels in each other",
    "deep_objects": ": not valid JSON: more than 64 levels in each other",
    "nan": ": not valid JSON: NaN is no number",
    "infinity": ": not valid JSON: number 1e999 is too large",
    "huge_number": ": not valid JSON: number 9999999999999999999999999999999999999999... is too",
    "twice": ": not valid JSON: key 'blocks' comes twice",
    "half_pair": ": not valid JSON: text with half of a surrogate pair",
    "types": ": block 1: expected an object with keys op, kernel_size",
    "list": ': expected an object with a list "blocks"',
    "null": ': expected an object with a list "blocks"',
    "space_type": ": space: expected text, got [1]",
    "bool": ": block 1: filters: expected a whole number, got True",
    "negative": ": block 1: filters: expected 1 to 1048576, got -8",
    "many_blocks": ": expected at most 1000 blocks, got 2000",
    "steering": ": unknown key \\x1b[31m; known: blocks, format, space",
    "format": ": expected format 1, got [1]; a newer version",
    "not_text": ": expected UTF-8 text, got invalid start byte",
}
NETWORKS = {
    "op": "network 0 (m): layers[0]: unknown op ['conv']; known: conv, dw",
    "size": "network 0 (m): layers[0]: sizes must be whole numbers of 1 or more, below 2^20, got",
    "ms": "network 0 (m): measured_ms must be positive, got 1e-320",
    "bytes": "network 0 (m): input_bytes must be a number of 0 or more, got 1e+300",
    "model": "network 0 ('a': 1): model must be text, got {'a': 1}",
    "bus": "network 0 (m): bus must be USB 2, USB 3, PCIe or empty, got '<script>",
}
PICTURES = {
    "bomb.png": "could be decompression bomb",
    "large.png": "100020001 pixels or values, more than the 100000000 that are read",
    "empty.png": "no PNG or JPEG image",
    "text_bomb.png": "Decompressed data too large",
    "truncated.png": "no PNG or JPEG image",
    "truncated.jpg": "image file is truncated",
    "scans.jpg": "more than the 100 scans that are decoded",
    "gif.png": "no PNG or JPEG image",
    "tiff.png": "no PNG or JPEG image",
    "bmp.png": "no PNG or JPEG image",
    "webp.png": "no PNG or JPEG image",
    "eps.png": "no PNG or JPEG image",
    "svg.png": "no PNG or JPEG image",
    "zip.png": "no PNG or JPEG image",
    "object.npy": "expected numbers of shape",
    "pickle.npy": "the magic string is not correct",
    "archive.npy": "the magic string is not correct",
    "short.npy": "it is too short for float32 of shape (100, 100)",
    "large.npy": "1000000000000 pixels or values, more than",
    "overflow.npy": "pixels or values, more than the 100000000",
    "negative.npy": "expected numbers of shape",
    "code.npy": "malformed node or string",
    "deep.npy": "EOF in multi-line statement",
}
MATLAB = {
    "nested": "more than the 1000 arrays of cells and structures",
    "claims": "more than the 1000000 cells, structures and characters",
    "bomb": "more than the 268435456 bytes that are read",
    "truncated": "it ends within a variable",
}
TABLES = {
    "rows": ": expected 10000000 rows, as the header says, got 1; the file may be truncated",
    "formula": ":17: latency_ms: expected a number, got '=cmd|\"/c calc\"!A1'",
    "formula_key": ":6: unknown key =1+1; known: ",
    "negative": ":17: latency_ms: expected a finite number >= 0, got -0.5",
    "nan": ":17: latency_ms: expected a finite number >= 0, got nan",
    "huge": ":17: latency_ms: expected a finite number >= 0, at most 1e+12, got 1e+300",
    "digits": ":17: parameter_bytes: expected a whole number >= 0, got '999999999999...",
    "superscript": ":17: parameter_bytes: expected a whole number >= 0, got '²'",
    "quotes": ":17: expected 14 columns, got 12; the file may be truncated",
    "field": ":17: latency_ms: expected a number, got '\"xxxxxxxxxxx...",
    "python": ":6: not valid YAML: tag !!python/object/apply:os.mkdir is not one of plain values",
    "header_bomb": ":6: not valid YAML: more than 40 levels in each other",
    "large": ": 16777663 bytes, more than the 16777216 that are read",
}
CHECKPOINTS = {
    "empty": "header too small",
    "offsets": "invalid shape, data type, or offset",
    "header": "header too large",
    "shape": "overflow computing buffer size",
    "twice": "'format'",
    "deep": "maximum recursion depth exceeded",
    "header_deep": "recursion limit exceeded",
    "no_json": "Expecting property name",
    "wrong_digest": "its SHA-256 does not match",
    "no_state": "'format'",
    "torch": "header too large",
    "pickle": "header too large",
}
INTERPRETED = {
    "text": "The model is not a valid Flatbuffer",
    "identifier": "Model provided is schema version 0",
    "offsets": "The model is not a valid Flatbuffer",
    "empty": "must be specified",
}
PARSED = {
    "text": "no TFLite file: expected b'TFL3' at byte 4, got b'o'",
    "identifier": "damaged TFLite file of 208 bytes",
    "offsets": "damaged TFLite file of 208 bytes",
    "empty": "no TFLite file",
}
TRIALS = {
    "view": "expected one table, trials, and nothing else",
    "trigger": "expected one table, trials, and nothing else",
    "more": "expected one table, trials, and nothing else",
    "types": "'int' object is not iterable",
    "words": "expected blocks such as f5e6c36, got 'no'",
    "text": "file is not a database",
}
MANIFESTS = {
    "parent": ":2: image: folder: expected a path inside the data folder, got '../outside'",
    "absolute": ":2: image: folder: expected a path inside the data folder, got '/etc'",
    "split": ":1: splits.train: expected a path inside the data folder, got '../outside/list.txt'",
    "backslash": ":2: image: folder: expected a path inside the data folder, got '..\\\\outside'",
}
LISTS = {
    "parent": "frame: expected a path inside the data folder, got '../outside/b'",
    "absolute": "frame: expected a path inside the data folder, got '/etc/passwd'",
    "latin1": "not UTF-8 text (invalid continuation byte); save it as UTF-8",
}
COMPILED = {
    "parent": ":1: damaged (compiled: expected paths inside the bundle, got ../outside/a.tflite)",
    "absolute": ":1: damaged (compiled: expected paths inside the bundle, got /etc/passwd)",
    "list": ":1: damaged (",
}
MEASURED = {
    "deep": ":1: not valid JSON (more than 64 levels in each other); the file is damaged",
    "huge": ":1: not valid JSON (number 1000000000000000000000000000000000000000... is too large)",
    "list": ":1: expected an object, got [1]",
}
BUNDLES = {
    "deep": ": not valid JSON: more than 64 levels in each other",
    "code": ": format: expected a whole number, got \"__import__('...kdir('pwned')\"",
}


def rows(
    form: str, read: Callable[[Path], Any], fragments: Mapping[str, str]
) -> list[tuple[str, Callable[[Path], Any], str]]:
    return [(form.format(name), read, fragment) for name, fragment in fragments.items()]


ATTACKS = [
    *rows("{}.yaml", load_config, CONFIGS),
    *rows("{}.json", Architecture.load, ARCHITECTURES),
    *rows("networks_{}.json", score_networks, NETWORKS),
    *rows("{}", frame(read_array), PICTURES),
    *rows("{}.mat", frame(read_matlab), MATLAB),
    *rows("table_{}.csv", LatencyTable.load, TABLES),
    *rows("{}.safetensors", load_checkpoint, CHECKPOINTS),
    *rows("{}.tflite", TfliteNetwork, INTERPRETED),
    *rows("{}.tflite", read_contents, PARSED),
    *rows("{}.sqlite", read_trials, TRIALS),
    *rows("manifest_{}.yaml", lambda path: open_manifest(path.parent, path), MANIFESTS),
    *rows("frames_{}.txt", lambda path: read_frame_list(path.parent, path.name), LISTS),
    *rows("compiled_{}/compiled.jsonl", lambda path: read_compiled(path.parent), COMPILED),
    *rows("measured_{}.jsonl", lambda path: read_measurements([path]), MEASURED),
    *rows("manifest_{}.json", lambda path: load_json(path, Bundle), BUNDLES),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The files, in a folder beside which nothing may change."""
    folder = tmp_path_factory.mktemp("attacks") / "inside"
    write(folder)
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "list.txt").write_text("secret\n")
    return folder


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of all that is in a folder."""
    found = {str(path): path.lstat() for path in folder.rglob("*")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def refusal(read: Callable[[], Any]) -> str:
    """The one line that a reader refuses with, at once."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read()
    seconds = time.process_time() - start
    mebibytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 2_000
    assert seconds < MAX_SECONDS
    assert mebibytes < MAX_MEBIBYTES
    return message


def test_every_file_of_the_corpus_has_a_reader(corpus):
    made = {str(path.relative_to(corpus)) for path in corpus.rglob("*") if path.is_file()}
    assert made == {name for name, _, _ in ATTACKS}
    assert len(made) >= 30


@pytest.mark.parametrize(
    ("name", "read", "fragment"), ATTACKS, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(ATTACKS)]
)
def test_an_attack_is_one_line_and_changes_nothing(corpus, monkeypatch, name, read, fragment):
    monkeypatch.chdir(corpus)
    before = state(corpus.parent)
    message = refusal(lambda: read(corpus / name))
    assert fragment in message
    assert Path(name).name in message or read in (score_networks, read_contents)
    assert state(corpus.parent) == before


def test_the_trap_of_the_corpus_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, arguments = Trap().__reduce__()
    make(*arguments)
    assert (tmp_path / "pwned").is_dir()


def test_the_corpus_is_the_same_each_time(corpus, tmp_path):
    write(tmp_path)
    for path in corpus.rglob("*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(corpus)).read_bytes() == path.read_bytes()


# Commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("describe", "bomb.yaml"), "more than 5000 keys and values"),
        (("describe", "python_apply.yaml"), "tag !!python/object/apply:os.mkdir"),
        (("describe", "large.yaml"), "more than the 262144 that are read"),
        (("describe", "deep.json"), "more than 64 levels"),
        (("describe", "steering.json"), "unknown key \\x1b[31m"),
        (("describe", "ednas_tiny", "--table", "table_formula.csv"), "expected a number, got '=c"),
        (("latency", "check", "networks_size.json"), "sizes must be whole numbers"),
        (("run", "cycle_map.yaml", "--out", "run"), "*a stands within what it stands for"),
        (("run", "twice.yaml", "--out", "run"), "duplicate key seed"),
        (("data", "check", ".", "--manifest", "manifest_parent.yaml"), "inside the data folder"),
    ],
)
def test_a_command_refuses_an_attack_with_exit_status_2(corpus, monkeypatch, arguments, fragment):
    monkeypatch.chdir(corpus)
    before = state(corpus.parent)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert fragment in result.stderr
    assert not result.stdout
    assert state(corpus.parent) == before


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("seed=&a [*a]", "--set seed:1: not valid YAML: *a stands within"),
        ("seed=!!python/object/apply:os.mkdir [pwned]", "--set seed:1: not valid YAML: tag !!pyth"),
        (f"seed={'[' * 100_000}", "--set seed:1: not valid YAML: more than 40 levels"),
        (f"seed={'9' * 5_000}", "--set seed:1: seed: expected a whole number"),
        (f"{'a.' * 50_000}b=1", "--set: expected a key of at most 40 parts, got 50001"),
        ("seed.deep=1", "seed has no keys"),
        ("=1", "expected key=value"),
        ("\x1b[31m=1", "expected a plain key, got '\\x1b[31m'"),
        ("device=\0", "character U+0000 is not allowed"),
    ],
)
def test_settings_that_attack_are_refused(override, fragment):
    path = shipped("configs/demo.yaml")
    assert fragment in refusal(lambda: load_config(path, [override]))


def test_an_alias_is_a_copy_that_a_setting_changes_alone(tmp_path):
    text = shipped("configs/demo.yaml").read_text()
    plain = yaml.safe_load(text)
    plain["search"]["optimizer"] = plain["retrain"]["optimizer"] = {"learning_rate": 0.01}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(plain))
    assert "*id001" in (tmp_path / "a.yaml").read_text()
    config = load_config(tmp_path / "a.yaml", ["search.optimizer.learning_rate=0.5"])
    assert config.search.optimizer.learning_rate == 0.5
    assert config.retrain.optimizer.learning_rate == 0.01


def test_code_that_a_config_names_is_the_user_s_own_and_is_checked(tmp_path):
    plain = yaml.safe_load(shipped("configs/demo.yaml").read_text())
    for kind, message in (
        ("os:system", "task kind os:system: expected an oneshot_ednas.tasks"),
        ("os.path:join", "task kind os.path:join: expected an oneshot_ednas.tasks"),
        ("no_such_module:x", "cannot import no_such_module"),
        ("os:system('x')", "expected package.module:NAME"),
    ):
        plain["tasks"]["depth"]["kind"] = kind
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(plain))
        found = refusal(lambda: make_tasks(load_config(tmp_path / "a.yaml").tasks))
        assert message in found


def test_a_byte_order_mark_is_no_attack(tmp_path):
    space = shipped("configs/spaces/ednas_tiny.yaml")
    (tmp_path / "a.yaml").write_text(space.read_text(), "utf-8-sig")
    assert SearchSpace.load(tmp_path / "a.yaml") == SearchSpace.load(space)
    (tmp_path / "a.json").write_text('{"blocks": []}', "utf-8-sig")
    assert Architecture.load(tmp_path / "a.json") == Architecture(())


# Links, pipes and parts of files in others --------------------------------------------------


def test_links_and_pipes_in_a_data_folder_are_not_followed(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret.json").write_text('{"a": 1}')
    (outside / "list.txt").write_text("secret\n")
    (root / "link.json").symlink_to(outside / "secret.json")
    (root / "folder").symlink_to(outside)
    (root / "list.txt").symlink_to(outside / "list.txt")
    (root / "loop.json").symlink_to("loop.json")
    os.mkfifo(root / "pipe.json")
    (root / "zero.json").symlink_to("/dev/zero")
    for name, fragment in (
        ("link.json", "is a link that leaves the data folder"),
        ("folder/secret.json", "is a link that leaves the data folder"),
        ("loop.json", "no file loop.json"),
        ("pipe.json", "no file pipe.json"),
        ("zero.json", "no file zero.json"),
        ("../outside/secret.json", "expected a path inside the data folder"),
        (str(outside / "secret.json"), "expected a path inside the data folder"),
    ):
        assert fragment in refusal(lambda name=name: read_json(root, name, "7"))
    assert "leaves the data folder" in refusal(lambda: read_frame_list(root, "list.txt"))


def test_pipes_and_devices_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        for read in (Architecture.load, LatencyTable.load, SearchSpace.load):
            assert str(path) in refusal(lambda read=read, path=path: read(path))


def test_arrays_of_an_hdf5_file_lie_in_it(tmp_path):
    h5py = pytest.importorskip("h5py")
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "w") as file:
        file["images"] = h5py.ExternalLink(str(tmp_path / "pipe"), "images")
        file["soft"] = h5py.SoftLink("/images")
        outside = [(str(tmp_path / "pipe"), 0, 96)]
        file.create_dataset("raw", (2, 3, 4, 4), "u1", external=outside)
        layout = h5py.VirtualLayout((2, 3, 4, 4), "u1")
        layout[:] = h5py.VirtualSource(str(tmp_path / "pipe"), "images", (2, 3, 4, 4))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("good", (2, 3, 4, 4), "u1", chunks=(2, 3, 4, 4), maxshape=(None,) * 4)
        wide = (1, 3, 2**13, 2**13)
        file.create_dataset("wide", wide, "u1", chunks=wide, compression="gzip")
        file["text"] = "a"
        file.create_group("group")
    for stack in ("images", "soft", "raw", "virtual", "group", "nothing", "group/a", "text/a"):
        message = refusal(lambda stack=stack: read_array(tmp_path, path.name, "0", stack=stack))
        assert f"it has no array {stack}" in message
    read = lambda: read_array(tmp_path, path.name, "0", stack="wide")  # noqa: E731
    assert "201326592 pixels or values, more than" in refusal(read)
    assert read_array(tmp_path, path.name, "0", stack="good").shape == (4, 4, 3)
    assert "expected images of frames x 3 x width x height" in refusal(
        lambda: open_nyuv2_mat(tmp_path)
    )


def bundle_folder(folder: Path, model: str) -> Path:
    """A bundle of one model, which `measure.py` would open."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"digest": "x", "models": [model]}))
    return folder


@pytest.mark.parametrize("model", ["../outside.tflite", "/etc/passwd", "link.tflite", "a\0b"])
def test_a_bundle_names_no_model_outside_of_it(tmp_path, model):
    folder = bundle_folder(tmp_path / "bundle", model)
    (tmp_path / "outside.tflite").write_bytes(b"secret")
    (folder / "link.tflite").symlink_to(tmp_path / "outside.tflite")
    message = refusal(lambda: measure.read_bundle(folder, "*", None))
    assert "expected paths and links inside the bundle" in message
    line = {"model": "a.tflite", "compiled": model}
    (folder / "compiled.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "manifest.json").write_text(json.dumps({"digest": "x", "models": ["a.tflite"]}))
    message = refusal(lambda: measure.read_bundle(folder, "*", "libedgetpu.so.1"))
    assert "expected paths and links inside the bundle" in message


def test_a_bundle_holds_no_link_that_leaves_it(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(MINIMAL))
    space = tmp_path / "space.yaml"
    space.write_text("")
    (folder / "space.yaml").symlink_to(space)
    assert "space.yaml is a link that leaves the bundle" in refusal(lambda: read_bundle(folder))


MINIMAL = {
    "digest": "x",
    "space": "small",
    "image_height": 32,
    "image_width": 32,
    "out_channels": {"depth": 1},
    "seed": 0,
    "models": [],
    "operations": [],
    "networks": [],
}


# Models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    """A small network, quantized."""
    torch.manual_seed(0)
    graph = trace(nn.Sequential(nn.Conv2d(3, 32, 5, padding=2), nn.ReLU6()), (1, 3, 16, 16))
    return quantize(graph, calibrate(graph, [torch.randn(2, 3, 16, 16)]))


def resized(model: QuantizedModel, side: int) -> bytes:
    """The file of a network that takes and gives maps of that side."""
    tensors = [
        replace(tensor, shape=(tensor.shape[0], side, side, tensor.shape[3]))
        if tensor.data is None
        else tensor
        for tensor in model.tensors
    ]
    return to_flatbuffer(replace(model, tensors=tensors))


def test_a_model_of_huge_maps_is_refused_where_it_is_tried(model, tmp_path):
    path = tmp_path / "m.tflite"
    for side in (2**15, 2**30):
        path.write_bytes(resized(model, side))
        start = time.monotonic()
        message = refusal(lambda: TfliteNetwork(path))
        assert f"{path}: the TFLite interpreter cannot run it (" in message
        assert time.monotonic() - start < 30
    path.write_bytes(resized(model, 24))
    assert TfliteNetwork(path).image_size == (24, 24)


def test_a_model_that_takes_too_much_memory_is_refused(model):
    large = resized(model, 1200)
    message = refusal(lambda: check_model(large, mebibytes=16))
    assert "model: the TFLite interpreter cannot run it (" in message
    assert "took" not in message


def test_a_model_that_takes_too_long_is_ended(model):
    start = time.monotonic()
    message = refusal(lambda: check_model(resized(model, 2000), kernels="reference", seconds=2.0))
    assert "it was not opened and run in 2 s" in message
    assert time.monotonic() - start < 30


def test_a_crash_of_the_interpreter_is_one_error(model, monkeypatch, tmp_path):
    # A real child that dies by a real signal: the interpreter's module ends its process.
    package = tmp_path / "tflite_runtime"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '2.16'\n")
    (package / "interpreter.py").write_text(
        "import os, signal\nclass OpResolverType: AUTO = 0\n"
        "def Interpreter(**_): os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    message = refusal(lambda: check_model(resized(model, 16), name="a.tflite"))
    assert message.startswith("a.tflite: the TFLite interpreter cannot run it (its process ended ")
    assert "with signal SIGSEGV" in message


def test_any_damage_of_a_model_is_parsed_or_refused(model):
    whole = resized(model, 16)
    for number in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[number] ^= 0xFF
        try:
            read_contents(bytes(damaged))
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_the_child_of_measure_has_a_bound_on_its_memory():
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import measure\n"
        "measure._limit_memory()\n"
        "assert resource.getrlimit(resource.RLIMIT_DATA)[0] == measure.MEMORY_BYTES\n"
        "try: bytearray(3 * 2**30)\n"
        "except MemoryError: print('refused')"
    )
    folder = str(Path(measure.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
    )
    assert done.stdout == "refused\n"


# Names --------------------------------------------------------------------------------------

NAMES = ("$\\frac{", "$x$ & $y$", "[/red]", "_hidden", "\u6f22\u5b57", "<b>", ":smile:", "[red]x")


@pytest.fixture
def named(tmp_path):
    """A data set whose classes have such names."""
    labels = {"kind": "labels", "folder": "label", "suffix": ".png", "classes": list(NAMES)}
    return write_dataset(tmp_path / "data", manifest=layout(targets={"segmentation": labels}))


def test_names_are_but_names_in_pictures(named):
    sheet = data_sheet(named, [("train", "a")], {"segmentation": range(len(NAMES))})
    assert sheet.startswith(b"\x89PNG")
    log = RunLog(
        [
            {"stage": f"{stage}{name}", "step": step, "loss/weights": 1.0, f"loss/{name}": 2.0}
            for name in NAMES
            for stage in ("", "branching")
            for step in range(3)
        ]
    )
    curves = training_curves(log)
    assert curves is not None
    assert curves.startswith(b"\x89PNG")
    assert search_curves(log, NAMES, f"branching{NAMES[0]}").startswith(b"\x89PNG")
    tree = branching_tree(NAMES[:3], ["$x$", "b"], [[0, 0, 0], [0, 1, 1]], None, None)
    assert tree.startswith(b"\x89PNG")


def test_names_are_but_names_in_the_terminal(named):
    result = CliRunner().invoke(main, ["data", "check", str(named.root), "--workers", "1"])
    assert result.exit_code == 0, result.output
    for name in NAMES[:3]:  # the labels 0 to 2
        assert name in result.stdout


def test_names_are_but_names_in_markdown():
    cell = "<script>|[a](javascript:b)\n&lt;"
    table = markdown_table(["", "x"], [[cell, "1"]])
    assert len(table.splitlines()) == 3
    assert "| &lt;script>\\|[a]\\(javascript:b) &amp;lt; | 1 |" in table


def test_a_message_cannot_steer_the_terminal(tmp_path):
    path = tmp_path / "\x1b[31mred\x07.json"
    path.write_text("[")
    result = CliRunner().invoke(main, ["describe", str(path)])
    assert result.exit_code == 2
    assert "\x1b" not in result.stderr
    assert "\\x1b[31mred\\x07.json: not valid JSON" in result.stderr


@pytest.mark.parametrize(
    ("old", "new", "fragment"),
    [
        ("num_levels: 3", "num_levels: 1000000000", "fusion.num_levels: expected at most 100"),
        ("num_repeats: 2", "num_repeats: 1000000000", "fusion.num_repeats: expected at most 100"),
        ("num_convs: 1", "num_convs: 1000000000", "head.num_convs: expected at most 100"),
        ("stem_filters: 8", "stem_filters: 4611686018427387904", "stem_filters: expected at most"),
        ("channels: 8", "channels: 4611686018427387904", "fusion.channels: expected at most 1048"),
        ("[4, 8, 12]", "[4, 8, 4611686018427387904]", "filters: expected ascending positive opt"),
        (
            "filters: [4, 8, 12]",
            "filter_multipliers: [1, 1.0e+308]",
            "1e+308 = inf is not a whole n",
        ),
    ],
)
def test_spaces_of_which_no_network_could_be_built_are_refused(old, new, fragment):
    assert SMALL_SPACE.count(old) == 1
    text = SMALL_SPACE.replace(old, new)
    assert fragment in refusal(lambda: SearchSpace.from_yaml(text))
