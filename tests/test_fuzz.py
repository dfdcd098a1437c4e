"""Readers under damaged and made-up input: what they take, or one line of why not, at once.

300 inputs each; `ONESHOT_EDNAS_FUZZ=10000` asks for more, and other ones each time.
"""

import copy
import gc
import json
import os
import re
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL_SPACE, toy_table
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_report import RunFolder

from oneshot_ednas import checkpoint as checkpoints
from oneshot_ednas.architecture import Architecture
from oneshot_ednas.bundle.manifest import Bundle
from oneshot_ednas.bundle.measurements import read_measurements
from oneshot_ednas.checkpoint import load_checkpoint, save_checkpoint
from oneshot_ednas.config import TaskSharingConfig, load_config
from oneshot_ednas.data.manifest import Manifest
from oneshot_ednas.export.contents import read_contents
from oneshot_ednas.latency.operations import Operation
from oneshot_ednas.latency.published import score_networks
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.report import page as report_page
from oneshot_ednas.schema import load_json, load_yaml, shipped, to_plain
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.tasks import TaskConfig, make_tasks

DEFAULT = 300
INPUTS = int(os.environ.get("ONESHOT_EDNAS_FUZZ", DEFAULT))
MAX_SECONDS = 1.0
"""Of processor time, per input."""
fuzz = settings(
    max_examples=INPUTS,
    derandomize=INPUTS == DEFAULT,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
fewer = settings(fuzz, max_examples=INPUTS // 10)
"""For what is read by the same code as another input."""

VALUES = (
    *("-1", "0", "1", "1.5", "1e999", "-1e308", "5e-324", ".nan", "nan", ".inf", "NaN", "Infinity"),
    *(
        "[]",
        "{}",
        "[[]]",
        "null",
        "~",
        "true",
        "''",
        '""',
        "x",
        "9" * 25,
        "9" * 400,
        "0x7f",
        "1:30",
    ),
    *(
        "<script>",
        "</pre>",
        "&amp;",
        "$x$",
        "\0",
        "\ud800",
        "\x1b[31m",
        "&a",
        "*a",
        "&a [*a]",
        "<<",
    ),
    *(
        "!!python/object:os.system",
        "!!int x",
        "../x",
        "/etc/passwd",
        "=1+1",
        "\u202e",
        "ß" * 9,
        "-",
    ),
    *("[" * 50, "{a: " * 50, "? ", "- ", "#", "%YAML 9.9", "--- ", "|", ">", "\t", "\n", '"', "'"),
)
TOKEN = re.compile(rb"[A-Za-z0-9_.+-]+|[^\sA-Za-z0-9_.+-]")
NUMBERS = st.integers(0, 2**20)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(
            ["flip", "cut", "drop", "double", "swap", "value", "value", "value", "move"]
        ),
        NUMBERS,
        NUMBERS,
    ),
    min_size=1,
    max_size=4,
)
TEXT = st.text(max_size=8) | st.sampled_from(VALUES)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 9)
    | st.floats()
    | TEXT
)


def edited(content: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    """Content with some bytes, lines or values changed."""
    for kind, a, b in edits:
        lines = content.split(b"\n")
        i, j = a % len(lines), b % len(lines)
        tokens = list(TOKEN.finditer(content))
        if not content or not tokens:
            break
        if kind == "flip":
            at = a % len(content)
            content = content[:at] + bytes([b % 256]) + content[at + 1 :]
        elif kind == "cut":
            content = content[: a % len(content)] + content[len(content) - b % 50 :] * (b % 2)
        elif kind == "value":
            start, end = tokens[a % len(tokens)].span()
            value = VALUES[b % len(VALUES)].encode("utf-8", "surrogatepass")
            content = content[:start] + value + content[end:]
        elif kind == "move":
            start, end = tokens[a % len(tokens)].span()
            content = content[:start] + tokens[b % len(tokens)].group() + content[end:]
        else:
            if kind == "drop":
                del lines[i]
            elif kind == "double":
                lines.insert(j, lines[i])
            else:
                lines[i], lines[j] = lines[j], lines[i]
            content = b"\n".join(lines)
    return content


def trees(keys: list[str]) -> st.SearchStrategy[Any]:
    """Nested values whose keys are mostly those that mean something."""
    names = st.sampled_from(keys) | st.text(max_size=4)
    return st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=6),
        max_leaves=12,
    )


def keys_of(tree: Any) -> list[str]:
    """Every key in a tree."""
    if isinstance(tree, dict):
        return [str(k) for k in tree] + [key for item in tree.values() for key in keys_of(item)]
    return [key for item in tree for key in keys_of(item)] if isinstance(tree, list) else []


def places_of(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a tree with every key or index of it."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places_of(tree[key])


def altered(tree: Any, changes: list[tuple[int, int, Any]]) -> Any:
    """A tree some of whose values are others, gone, or in each other's places."""
    tree = copy.deepcopy(tree)
    for where, kind, value in changes:
        places = list(places_of(tree))
        if not places:
            break
        holder, key = places[where % len(places)]
        if kind == 0:
            del holder[key]
        elif kind == 1:
            other, there = places[value_index(value) % len(places)]
            holder[key] = copy.deepcopy(other[there])
        elif kind == 2 and isinstance(holder, dict):
            holder[str(value)] = holder[key]
        else:
            holder[key] = value
    return tree


def value_index(value: Any) -> int:
    return abs(hash(str(value)[:3])) if isinstance(value, str) else 7


def inputs(content: bytes, tree: Any) -> st.SearchStrategy[bytes]:
    """Damaged content, a tree with other values, and trees made up."""
    keys = sorted(set(keys_of(tree)))
    made = trees(keys)
    changes = st.lists(st.tuples(NUMBERS, st.integers(0, 6), made), min_size=1, max_size=3)
    return (
        EDITS.map(lambda edits: edited(content, edits))
        | changes.map(lambda some: text_of(altered(tree, some)))
        | made.map(text_of)
    )


def text_of(value: Any) -> bytes:
    """JSON, which is YAML too; what JSON lacks is written as Python does."""
    return json.dumps(value, default=str).encode()


class SlowError(AssertionError):
    """An input took too long."""


def too_slow(number: int, stack: object) -> None:
    raise SlowError(f"more than {MAX_SECONDS} s of processor time")


@contextmanager
def timed() -> Iterator[None]:
    """End what takes longer than any input may."""
    before = signal.signal(signal.SIGVTALRM, too_slow)
    # After thousands of inputs Hypothesis itself holds so much that one collection takes seconds.
    gc.disable()
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        gc.enable()


def taken(read: Callable[[], Any]) -> Any:
    """What a reader makes of an input; None if it refuses it, in one line."""
    try:
        with timed():
            return read()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 2_500
    return None


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A file to write inputs to."""
    return tmp_path_factory.mktemp("fuzz") / "input"


def read_from(path: Path, content: bytes, read: Callable[[Path], Any]) -> Any:
    path.write_bytes(content)
    return taken(lambda: read(path))


# Configs ------------------------------------------------------------------------------------

DEMO = shipped("configs/demo.yaml").read_bytes()
SHARING = shipped("configs/bmtas_pascal.yaml").read_bytes()
DATA = shipped("configs/datasets/nyuv2_256x192.yaml").read_bytes()


@fuzz
@given(content=inputs(DEMO, yaml.safe_load(DEMO)))
def test_configs(path, content):
    config = read_from(path.with_suffix(".yaml"), content, load_config)
    if config is not None:
        taken(lambda: make_tasks(config.tasks))


@fewer
@given(content=inputs(SHARING, yaml.safe_load(SHARING)))
def test_configs_of_sharing(path, content):
    read_from(
        path.with_suffix(".yaml"), content, lambda at: load_config(at, kind=TaskSharingConfig)
    )


KEYS = sorted(set(keys_of(yaml.safe_load(DEMO))))


@fuzz
@given(
    overrides=st.lists(
        st.builds(
            lambda parts, sign, value: ".".join(parts) + sign + value,
            st.lists(st.sampled_from(KEYS) | TEXT, max_size=4),
            st.sampled_from(["=", "=", "=", "", "=="]),
            TEXT | trees(KEYS).map(lambda tree: text_of(tree).decode()),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_overrides(overrides):
    taken(lambda: load_config(shipped("configs/demo.yaml"), overrides))


@fuzz
@given(content=inputs(DATA, yaml.safe_load(DATA)))
def test_manifests(path, content):
    read_from(path.with_suffix(".yaml"), content, lambda at: load_yaml(at, Manifest))


@fewer
@given(content=inputs(SMALL_SPACE.encode(), yaml.safe_load(SMALL_SPACE)))
def test_spaces(path, content):
    space = read_from(path.with_suffix(".yaml"), content, SearchSpace.load)
    if space is not None:
        assert SearchSpace.from_yaml(space.to_yaml()) == space


# Architectures, tables and networks ---------------------------------------------------------

SMALL = SearchSpace.from_yaml(SMALL_SPACE)
ARCHITECTURE = SMALL.base_architecture
BLOCKS = ARCHITECTURE.to_text().encode()


@fuzz
@given(content=inputs(BLOCKS, ARCHITECTURE.to_json()))
def test_architectures(path, content):
    found = read_from(path, content, Architecture.load)
    if found is not None:
        assert Architecture.from_json(json.loads(found.to_text())) == found
        taken(lambda: SMALL.check(found))


TABLE = toy_table(SMALL)
TABLE_LINES = TABLE.to_text().encode().split(b"\n")
ROWS = b"\n".join(TABLE_LINES[:40]) + b"\n"
HEADER = to_plain(TABLE.header)


@fuzz
@given(
    content=EDITS.map(lambda edits: edited(ROWS, edits))
    | inputs(b"", HEADER).map(lambda header: b"# " + header + b"\n" + b"\n".join(TABLE_LINES[-3:]))
    | st.lists(st.lists(SCALARS.map(str) | TEXT, min_size=13, max_size=15), max_size=3).map(
        lambda rows: ROWS + "\n".join(",".join(row) for row in rows).encode("utf-8", "replace")
    )
)
def test_tables(path, content):
    table = read_from(path, content, LatencyTable.load)
    if table is not None:
        again = LatencyTable.from_text(table.to_text(), name="again")
        assert again.rows.keys() == table.rows.keys()
        assert np.isfinite(sum(row.latency_ms for row in table.rows.values()))


NETWORK = {
    "group": "g",
    "model": "m",
    "device": "Coral USB Accelerator",
    "host": "PC",
    "bus": "USB 3",
    "measured_ms": 1.0,
    "input_bytes": 100,
    "output_bytes": 10,
    "offchip_param_bytes": 0,
    "layers": [["conv", 32, 32, 3, 16, 16, 8, 3, 3, 2], ["dw", 16, 16, 8, 16, 16, 8, 3, 3, 1]],
}
PUBLISHED = {"networks": [NETWORK, NETWORK | {"bus": "", "measured_ms": 2.5}]}


def finite(value: Any) -> bool:
    """Whether every number in a tree is."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(finite, value))
    return not isinstance(value, float) or bool(np.isfinite(value))


@fuzz
@given(content=inputs(json.dumps(PUBLISHED, indent=1).encode(), PUBLISHED))
def test_published_networks(path, content):
    scores = read_from(path, content, score_networks)
    assert finite(scores)


OPERATION = to_plain(next(iter(TABLE.rows)))
MODELS = [f"operations/{name}.tflite" for name in "abcd"]
BUNDLE = {
    "format": 1,
    "digest": "0" * 64,
    "space": "small",
    "image_height": 32,
    "image_width": 48,
    "out_channels": {"segmentation": 4, "depth": 1},
    "seed": 0,
    "models": [*MODELS[:2], "networks/0.tflite"],
    "operations": [
        {
            "operation": OPERATION,
            "layout": "chain",
            "adds": [],
            "files": [{"copies": 2 + 6 * i, "model": MODELS[i]} for i in range(2)],
            "weight_bytes": 10,
            "is_row": True,
        }
    ],
    "networks": [{"architecture": to_plain(ARCHITECTURE), "model": "networks/0.tflite"}],
}


@fewer
@given(content=inputs(json.dumps(BUNDLE, indent=1).encode(), BUNDLE))
def test_bundles(path, content):
    bundle = read_from(path, content, lambda at: load_json(at, Bundle))
    if bundle is not None:
        for model in bundle.models:
            assert Path("/bundle", model).resolve().is_relative_to("/bundle")


def test_the_bundle_that_is_damaged_is_a_good_one(path):
    assert read_from(path, json.dumps(BUNDLE).encode(), lambda at: load_json(at, Bundle)).models
    assert isinstance(Operation(**OPERATION), Operation)


SESSION = {
    "type": "session",
    "format": 1,
    "unit": "ms",
    "bundle": "0" * 64,
    "device": "cpu",
    "machine": "m",
    "host": "h",
    "runtime": "r",
    "runtime_version": "1",
    "delegate": None,
    "kernels": "default",
    "threads": 1,
    "clock_mhz": None,
    "compiler": None,
    "date": "2024-01-01",
}
TIME = {
    "type": "model",
    "model": "a.tflite",
    "round": 0,
    "median_ms": 1.0,
    "spread_ms": 0.1,
    "runs": 3,
}
LINES = [SESSION, TIME, TIME | {"round": 1}, {"type": "failure", "model": "b", "error": "x"}]


LINE_TEXT = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)
LINE_CHANGES = st.lists(
    st.tuples(NUMBERS, st.integers(0, 6), trees(sorted(set(keys_of(LINES))))),
    min_size=1,
    max_size=3,
)


@fewer
@given(
    content=EDITS.map(lambda edits: edited(LINE_TEXT, edits))
    | LINE_CHANGES.map(lambda some: b"\n".join(map(text_of, altered(LINES, some))))
)
@pytest.mark.filterwarnings("ignore:.*the last line was cut off")
def test_measurements(path, content):
    found = read_from(path, content + b"\n{}\n", lambda at: read_measurements([at]))
    if found is not None:
        assert all(finite(time.ms) and finite(time.error_ms) for time in found.times.values())


# Checkpoints and models ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A checkpoint."""
    path = tmp_path_factory.mktemp("fuzz") / "whole.safetensors"
    save_checkpoint(path, {"step": 3, "weights": {"a": torch.ones(2, 2)}, "list": [1, "x", {}]})
    return path.read_bytes()


TREE = {"dict": [["step", 3], ["weights", {"dict": [["a", {"tensor": "0/weights/a"}]]}]]}
WORDS = ["dict", "tensor", "0/weights/a", "__metadata__", "format", "state", "sha256", "dtype"]
WORDS += ["shape", "data_offsets", "F32", "I64", "BF16", "checkpoint"]


@fuzz
@given(edits=EDITS, at=st.integers(0, 600), value=trees(WORDS), kind=st.integers(0, 2))
@example(edits=[("flip", 0, 0)] * 2, at=2, value=None, kind=2)  # null for a name
def test_headers_of_checkpoints(path, whole, edits, at, value, kind):
    (size,) = struct.unpack("<Q", whole[:8])
    header, data = whole[8 : 8 + size], whole[8 + size :]
    if kind == 0:
        header = edited(header, edits)
    elif kind == 1:
        header = text_of(altered(json.loads(header), [(at, len(edits), value)]))
    else:  # a good digest over another state
        tree = altered(TREE, [(at, len(edits), value)])
        tensors = {"0/weights/a": torch.ones(2, 2)}
        held = {"format": checkpoints.FORMAT, "state": tree}
        try:
            held["sha256"] = checkpoints._digest(tensors, tree, checkpoints.FORMAT)
        except ValueError:  # text that no file can hold
            held["sha256"] = ""
        entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
        meta = {"__metadata__": {"checkpoint": json.dumps(held)}}
        header, data = text_of(meta | {"0/weights/a": entry}), bytes(np.ones(4, "<f4"))
    content = struct.pack("<Q", len(header) + (at == 0)) + header + data
    found = read_from(path.with_suffix(".safetensors"), content, load_checkpoint)
    assert found is None or all(isinstance(name, str) for name in found)


@fewer
@given(content=st.data())
def test_models_read_back(model_bytes, content):
    edits = content.draw(EDITS)
    taken(lambda: read_contents(edited(model_bytes, edits)))


@pytest.fixture(scope="module")
def model_bytes() -> bytes:
    """A small model for the device."""
    from oneshot_ednas.export.calibration import calibrate
    from oneshot_ednas.export.flatbuffer import write_tflite
    from oneshot_ednas.export.graph import trace

    graph = trace(torch.nn.Conv2d(3, 4, 3, padding=1), (1, 3, 8, 8))
    return write_tflite(graph, calibrate(graph, [torch.randn(2, 3, 8, 8)]))


# Reports ------------------------------------------------------------------------------------

VOID = {"meta", "img", "link", "br", "hr", "input"}
HTML = st.text(max_size=12) | st.sampled_from(
    [
        *(
            "<script>alert(1)</script>",
            "</script>",
            "</pre><script>",
            "<img src=x onerror=alert(1)>",
        ),
        *("<!--", "-->", "]]>", "&lt;script&gt;", "&#60;script&#62;", "</title><script>", '"><b>'),
        *(
            "' onmouseover='x",
            "javascript:alert(1)",
            "<svg/onload=x>",
            "${title}",
            "$sections",
            "\0",
        ),
        *(
            "\u2028",
            "[link](javascript:x)",
            "| a | b |",
            "<style>",
            "</style>",
            "\r\n",
            "{0}",
            "%s",
        ),
    ]
)


class Balanced(HTMLParser):
    """Elements and attributes of a page, all of which are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Iterator[tuple[Any, list[str]]]:
    """A run without pictures, and the elements of its page."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("search_plots", "outcome_plots", "prediction_mosaic"):
            patch.setattr(report_page, name, lambda *_, **__: b"png")
        folder = RunFolder(tmp_path_factory.mktemp("report"))
        tags = Balanced(folder.write()).tags
        whole_run = report_page._Run(
            config=folder.config,
            config_text="",
            results=folder.results,
            candidates=folder.candidates,
            seconds=folder.seconds,
            export=folder.export,
            log=report_page.RunLog(folder.log),
            tasks=folder.tasks,
            space=folder.space,
        )
        yield whole_run, tags


def word_places(tree: Any) -> list[tuple[Any, Any]]:
    """Places of texts that a report shows as they are."""
    return [(holder, key) for holder, key in places_of(tree) if isinstance(holder[key], str)]


@fuzz
@given(
    words=st.lists(st.tuples(NUMBERS, HTML), min_size=1, max_size=6),
    classes=st.lists(HTML, max_size=3),
    task=HTML.filter(bool),
    baseline=HTML,
)
def test_texts_of_a_report(report, words, classes, task, baseline):
    whole_run, tags = report
    results, export = copy.deepcopy(whole_run.results), copy.deepcopy(whole_run.export)
    places = word_places(results) + word_places(export)
    for at, word in words:
        holder, key = places[at % len(places)]
        holder[key] = word
    results["baselines"][baseline] = results["baselines"].pop("random")
    renamed = {"segmentation": task}
    for held in (results, results["supernet"], *results["baselines"].values()):
        held["metrics"] = {renamed.get(n, n): row for n, row in held["metrics"].items()}
    for split in export["metrics"].values():
        split[task] = split.pop("segmentation")
    tasks = {
        task: TaskConfig(kind="segmentation", num_classes=3),
        "depth": TaskConfig(kind="depth"),
        "normals": TaskConfig(kind="normals"),
    }
    run = replace(
        whole_run,
        config_text=" ".join(word for _, word in words),
        results=results,
        seconds={task: 1.0, baseline: 2.0},
        export=export,
        tasks=make_tasks(tasks),
    )
    with timed():
        text = report_page.report_text(run, b"png", {task: classes})
    found = Balanced(text)
    assert not {"script", "svg", "iframe", "object"} & {*found.tags}
    assert found.tags.count("style") == tags.count("style")
    assert found.tags.count("img") == tags.count("img")
    assert not any(name.startswith("on") for name in found.names)
    assert all(link.startswith(("data:image/png;base64,", "#gap")) for link in found.links)
