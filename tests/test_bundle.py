"""Bundles: copies of an operation compute what they should, and a folder holds all or nothing."""

import itertools
import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas import measure
from oneshot_ednas.architecture import Architecture
from oneshot_ednas.bundle.build import (
    build_bundle,
    choose_copies,
    random_networks,
)
from oneshot_ednas.bundle.compile import compile_bundle
from oneshot_ednas.bundle.manifest import (
    Bundle,
    bundle_digest,
    read_bundle,
    read_compiled,
    read_space,
)
from oneshot_ednas.bundle.models import (
    CalibratedGraph,
    layout_adds,
    layout_of,
    operation_graph,
    operation_module,
    repeated,
)
from oneshot_ednas.export.contents import read_contents
from oneshot_ednas.export.flatbuffer import write_tflite
from oneshot_ednas.export.graph import Conv, Graph
from oneshot_ednas.export.quantize import quantize
from oneshot_ednas.export.runtime import TfliteNetwork
from oneshot_ednas.latency.operations import OPERATION_KINDS, Operation, distinct_operations
from oneshot_ednas.measure import open_interpreter
from oneshot_ednas.models.network import build_network
from oneshot_ednas.schema import load_yaml
from oneshot_ednas.space import SearchSpace

SPACE = SearchSpace.from_yaml("""
name: mini
stem_filters: 4
options: {ops: [ibn, fused_ibn], kernel_sizes: [3]}
blocks:
  - {stride: 1, kernel_size: 3, filters: 4, expand_ratio: 2}
  - {stride: 2, kernel_size: 3, filters: 6, expand_ratio: 2, options: {kernel_sizes: [3, 5]}}
  - {stride: 2, kernel_size: 3, filters: 8, expand_ratio: 2}
fusion: {tap_blocks: [2, 3], num_levels: 3, channels: 4, num_repeats: 2}
head: {num_convs: 1}
""")
"""16 architectures of 20 or so operations."""
SIZE = (32, 48)
CHANNELS = {"segmentation": 3, "depth": 1}


def operation(op: str, channels: tuple[int, int], size=(6, 8), out_size=None, **settings):
    """An operation by its channels and sizes."""
    (in_height, in_width), (out_height, out_width) = size, out_size or size
    return Operation(
        op=op,
        in_channels=channels[0],
        out_channels=channels[1],
        in_height=in_height,
        in_width=in_width,
        out_height=out_height,
        out_width=out_width,
        **settings,
    )


BLOCK = {"kernel_size": 5, "expand_ratio": 3}
EXAMPLES = {
    "chain": [
        operation("ibn", (4, 4), residual=True, **BLOCK),
        operation("fused_ibn", (4, 4), residual=True, **BLOCK),
        operation("separable_conv", (4, 4), kernel_size=3),
        operation("conv", (4, 4)),
        operation("add", (4, 4)),
        operation("max_pool", (4, 4), (1, 1), kernel_size=2, stride=2),
    ],
    "sum": [
        operation("ibn", (4, 6), **BLOCK),
        operation("ibn", (4, 4), (7, 8), (4, 4), stride=2, **BLOCK),
        operation("fused_ibn", (4, 6), (7, 8), (4, 4), stride=2, **BLOCK),
        operation("separable_conv", (4, 1), kernel_size=3),
        operation("conv", (3, 8), (6, 8), (3, 4), kernel_size=3, stride=2),
        operation("conv", (4, 1)),
    ],
    "ladder": [
        operation("max_pool", (4, 4), (5, 8), (3, 4), kernel_size=2, stride=2),
        operation("resize", (4, 4), (3, 4), (5, 8)),
    ],
}
ALL = [(layout, example) for layout, examples in EXAMPLES.items() for example in examples]
WEIGHTED = [(layout, example) for layout, example in ALL if example.op in OPERATION_KINDS[:4]]
by_name = pytest.mark.parametrize(("layout", "example"), ALL, ids=lambda value: str(value))


@pytest.fixture(scope="module")
def singles() -> dict[Operation, CalibratedGraph]:
    return {example: operation_graph(example, seed=0) for _, example in ALL}


def noise(shape, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_single(graph: Graph, shift: int, *inputs: torch.Tensor) -> torch.Tensor:
    """One copy by itself, with the weights of copy `shift + 1`."""
    ops = [
        replace(op, weight=op.weight.roll(shift), bias=op.bias.roll(shift))
        if isinstance(op, Conv)
        else op
        for op in graph.ops
    ]
    return Graph(inputs=graph.inputs, ops=tuple(ops), outputs=graph.outputs).run(*inputs)[
        next(iter(graph.outputs.values()))
    ]


# One operation ------------------------------------------------------------------------------


@by_name
def test_the_graph_of_an_operation_computes_its_module(layout, example, singles):
    graph = singles[example].graph
    inputs = [noise(shape) for shape in graph.inputs.values()]
    expected = operation_module(example, seed=0)(*inputs)
    assert expected.shape == (1, example.out_channels, example.out_height, example.out_width)
    torch.testing.assert_close(run_single(graph, 0, *inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_examples_have_every_kind_and_the_layout_they_stand_under():
    assert {example.op for _, example in ALL} == set(OPERATION_KINDS)
    for layout, example in ALL:
        assert layout_of(example) == layout, example


def test_modules_depend_on_the_seed_alone():
    one, again, other = (
        operation_module(EXAMPLES["sum"][0], seed).state_dict() for seed in (0, 0, 1)
    )
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name])
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())
    before = torch.random.get_rng_state()
    operation_module(EXAMPLES["sum"][0], 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_activations_stay_in_range_over_every_operation(singles):
    for example, single in singles.items():
        for name, (low, high) in single.ranges.items():
            assert 0.01 < high - low < 100, (example, name)


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="no module for operation conv3d"):
        operation_module(operation("conv3d", (4, 4)), 0)


# Copies -------------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_copies_compute_the_formula_of_their_layout(layout, example, copies, singles):
    single = singles[example].graph
    many = repeated(singles[example], copies, layout).graph
    x = noise(next(iter(single.inputs.values())))
    others = [x] * (len(single.inputs) - 1)
    results = []
    source = x
    for index in range(copies):
        if layout == "ladder" and index:
            source = source + x
        results.append(run_single(single, index, source, *others))
        if layout == "chain":
            source = results[-1]
    expected = results[-1] if layout == "chain" else sum(results[1:], start=results[0])
    (output,) = many.outputs.values()
    torch.testing.assert_close(many.run(x)[output], expected, rtol=1e-4, atol=1e-4)


@by_name
@pytest.mark.parametrize("copies", [1, 2, 8])
def test_a_file_holds_the_copies_and_the_additions_that_the_table_subtracts(
    layout, example, copies, singles
):
    def count(number: int) -> int:
        one = repeated(singles[example], number, layout)
        return len(read_contents(write_tflite(one.graph, one.ranges)).operators)

    own = len(singles[example].graph.ops)
    assert count(copies) == copies * own + (copies - 1) * len(layout_adds(example))


def test_every_addition_is_at_a_shape_that_the_layout_adds(singles):
    for layout, example in ALL:
        graph = repeated(singles[example], 3, layout).graph
        own = {f"copy_{i}/{op.name}" for i in (1, 2, 3) for op in singles[example].graph.ops}
        shapes = sorted(op.shape[1:] for op in graph.ops if op.name not in own)
        adds = [(add.in_channels, add.in_height, add.in_width) for add in layout_adds(example)]
        assert shapes == sorted(adds * 2), example


def test_no_two_copies_have_the_same_weights(singles):
    for layout, example in WEIGHTED:
        many = repeated(singles[example], 4, layout)
        names = [op.name for op in singles[example].graph.ops if isinstance(op, Conv)]
        model = quantize(many.graph, many.ranges)
        data = {tensor.name: tensor.data for tensor in model.tensors}
        for name in names:
            weights = [data[f"copy_{i}/{name}/weight"].tobytes() for i in (1, 2, 3, 4)]
            assert len(set(weights)) == 4, (example, name)


def test_names_are_unique_and_ranges_cover_every_tensor(singles):
    for layout, example in ALL:
        many = repeated(singles[example], 8, layout)
        names = [*many.graph.inputs, *(op.name for op in many.graph.ops)]
        assert len(set(names)) == len(names)
        assert many.ranges.keys() == set(names)
        for low, high in many.ranges.values():
            assert np.isfinite([low, high]).all()
            assert high - low > 0.01


@pytest.mark.parametrize(
    ("layout", "example"), [(a, b) for a, b in ALL if a != "chain"], ids=lambda value: str(value)
)
def test_int8_copies_come_close_to_the_float_ones(layout, example, singles):
    """The ranges are good ones, not only valid ones: within 5 % of the output's range."""
    many = repeated(singles[example], 4, layout)
    x = noise(next(iter(many.graph.inputs.values())), seed=0)
    ((name, output),) = many.graph.outputs.items()
    expected = many.graph.run(x)[output]
    actual = TfliteNetwork(write_tflite(many.graph, many.ranges))(x)[name]
    assert (actual - expected).abs().mean() < 0.05 * (expected.max() - expected.min())


def test_wrong_copies_and_layouts_are_refused(singles):
    with pytest.raises(ValueError, match="copies: expected at least 1, got 0"):
        repeated(singles[EXAMPLES["sum"][0]], 0, "sum")
    with pytest.raises(ValueError, match=r"a chain needs equal shapes, got \(1, 4, 6, 8\) and"):
        repeated(singles[EXAMPLES["sum"][0]], 2, "chain")


@given(st.integers(0, 20_000_000), st.integers(1, 4), st.integers(1, 12), st.integers(1, 2**22))
def test_heavy_operations_get_fewer_copies(weight_bytes, few, more, limit):
    copies = (few, few + more)
    low, high = choose_copies(weight_bytes, copies, limit)
    assert 1 <= low < high
    assert low <= few
    assert high <= max(2, few + more)
    if (low, high) == copies:
        assert high * weight_bytes <= limit or copies == (1, 2)
    else:
        assert copies[1] * weight_bytes > limit
        assert high == 2 or high * weight_bytes <= limit


# Random networks ----------------------------------------------------------------------------


@settings(max_examples=10)
@given(st.integers(0, 20), st.integers(0, 2**31 - 1))
def test_random_networks_are_distinct_and_of_the_space(count, seed):
    drawn = random_networks(SPACE, count, seed)
    assert len(set(drawn)) == len(drawn)
    assert all(architecture in SPACE for architecture in drawn)
    assert drawn == random_networks(SPACE, count, seed)
    # In 20 draws per network, all but surely all 16 turn up.
    assert len(drawn) == count if count <= 4 else len(drawn) >= min(count, 12)
    assert len(drawn) <= SPACE.num_architectures


# A whole bundle -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A bundle. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("bundles") / "mini"
    seen = []
    build_bundle(
        SPACE,
        SIZE,
        CHANNELS,
        folder,
        num_networks=3,
        max_weight_bytes=2000,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    return folder


@pytest.fixture(scope="module")
def bundle(built) -> Bundle:
    return read_bundle(built)


@pytest.fixture
def copied(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def test_a_bundle_times_every_operation_of_the_space(built, bundle):
    rows = [entry.operation for entry in bundle.operations if entry.is_row]
    assert rows == distinct_operations(SPACE, SIZE, CHANNELS)
    helpers = {entry.operation for entry in bundle.operations if not entry.is_row}
    needed = {add for row in rows for add in layout_adds(row)}
    assert helpers == needed - set(rows)
    assert helpers  # this space lacks some of them
    assert len(bundle.networks) == 3
    assert read_space(built) == SPACE
    assert bundle.image_size == SIZE
    assert {file.copies for entry in bundle.operations for file in entry.files} > {2, 8}


def test_every_file_of_a_bundle_runs_with_the_shapes_of_its_operation(built, bundle):
    for entry in bundle.operations:
        o = entry.operation
        for file in entry.files:
            interpreter = open_interpreter(built / file.model)
            (before,), (after,) = interpreter.get_input_details(), interpreter.get_output_details()
            assert tuple(before["shape"]) == (1, o.in_height, o.in_width, o.in_channels), file
            assert tuple(after["shape"]) == (1, o.out_height, o.out_width, o.out_channels), file
            pixels = np.random.default_rng(0).integers(-128, 128, before["shape"], dtype=np.int8)
            interpreter.set_tensor(before["index"], pixels)
            interpreter.invoke()
            assert np.unique(interpreter.get_tensor(after["index"])).size > 1, file
            contents = read_contents(built / file.model)
            assert contents.is_integer
            weights = [t for t in contents.tensors if t.num_bytes and "/size" not in t.name]
            assert sum(t.num_bytes for t in weights) == file.copies * entry.weight_bytes


def test_whole_networks_of_a_bundle_compute_varied_maps(built, bundle):
    for entry in bundle.networks:
        maps = TfliteNetwork(built / entry.model)(noise((1, 3, *SIZE)))
        assert {name: tuple(value.shape) for name, value in maps.items()} == {
            name: (1, count, 8, 12) for name, count in CHANNELS.items()
        }
        for value in maps.values():
            assert value.unique().numel() > 10
        network = build_network(SPACE.fix(entry.architecture), CHANNELS)
        constants = [t for t in read_contents(built / entry.model).tensors if "/weight" in t.name]
        convs = [p for p in network.parameters() if p.dim() == 4]
        assert sum(t.num_bytes for t in constants) == sum(p.numel() for p in convs)


def test_the_files_of_an_operation_are_timed_side_by_side_and_networks_in_between(bundle):
    position = {model: i for i, model in enumerate(bundle.models)}
    for entry in bundle.operations:
        first, second = (position[file.model] for file in entry.files)
        assert second == first + 1
    places = [position[network.model] for network in bundle.networks]
    steps = np.diff([-1, *places, len(bundle.models)])
    assert steps.max() < len(bundle.models) / 2


def test_a_bundle_is_ready_to_be_copied_to_a_device(built):
    assert (built / "measure.py").read_bytes() == Path(measure.__file__).read_bytes()
    text = (built / "README.txt").read_text()
    assert "python3 measure.py . --out measured.jsonl" in text
    assert "mini" in text
    assert 'pip install "tflite-runtime<=2.9.1" "numpy<2"' in text
    assert "{" not in text


def test_the_manifest_survives_a_round_trip(built, bundle):
    data = json.loads((built / "manifest.json").read_text())
    assert data == json.loads(json.dumps(bundle.to_json()))
    assert data["models"] == list(bundle.models)
    assert isinstance(bundle.networks[0].architecture, Architecture)
    assert bundle_digest(bundle, built) == bundle.digest


@settings(max_examples=5)
@given(st.data())
def test_the_digest_notices_any_change(built, bundle, data):
    model = built / data.draw(st.sampled_from((*bundle.models, "space.yaml")))
    content = model.read_bytes()
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    try:
        model.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
        )
        assert bundle_digest(bundle, built) != bundle.digest
    finally:
        model.write_bytes(content)


def test_the_digest_covers_the_manifest(built, bundle):
    assert bundle_digest(replace(bundle, digest="other"), built) == bundle.digest
    assert bundle_digest(replace(bundle, seed=bundle.seed + 1), built) != bundle.digest


def test_a_build_depends_on_its_seed_alone(tmp_path):
    fusion = replace(SPACE.fusion, tap_blocks=(2,), num_levels=2, num_repeats=1)
    space = SPACE.fix(SPACE.base_architecture)
    space = replace(space, blocks=space.blocks[:2], fusion=fusion)
    one, again = (
        build_bundle(space, (16, 16), {"depth": 1}, tmp_path / name, num_networks=2, seed=3)
        for name in ("one", "again")
    )
    assert one == again
    assert one.seed == 3
    assert len(one.networks) == 1  # the space has no more


# What a folder may hold ---------------------------------------------------------------------


def test_nothing_is_overwritten(built, tmp_path):
    with pytest.raises(ValueError, match="mini exists and is not empty; give a new folder"):
        build_bundle(SPACE, SIZE, CHANNELS, built)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file exists and is not empty"):
        build_bundle(SPACE, SIZE, CHANNELS, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupted_build_leaves_nothing(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_bundle(SPACE, SIZE, CHANNELS, tmp_path / "new" / "bundle", progress=interrupt)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("size", "arguments", "message"),
    [
        ((8, 64), {}, "image size: expected at least 16x16, got 8x64"),
        (SIZE, {"copies": (2, 2)}, r"copies: expected two ascending numbers, got \(2, 2\)"),
        (SIZE, {"num_networks": -1}, "networks: expected at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(size, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_bundle(SPACE, size, CHANNELS, tmp_path / "bundle", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_from_a_bundle_is_named(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no bundle folder .*; make one with"):
        read_bundle(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no manifest.json"):
        read_bundle(tmp_path / "empty")
    model = read_bundle(copied).models[5]
    (copied / model).unlink()
    with pytest.raises(FileNotFoundError, match=f"{model} is missing, though manifest.json"):
        read_bundle(copied)


def _set(data, value, *path):
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "format: expected 1, got 2; another version"),
        (lambda d: d.update(sead=2), "unknown key sead; did you mean seed?"),
        (lambda d: d.pop("digest"), "missing key digest"),
        (lambda d: d.update(image_height="64px"), "image_height: expected a whole number"),
        (lambda d: d.update(image_width=0), "image_width: expected at least 1, got 0"),
        (lambda d: d["models"].pop(), "models: expected each of the .* models of operations"),
        (lambda d: d["models"].append(d["models"][0]), "models: expected each of the"),
        (lambda d: d["operations"].append(d["operations"][0]), "once, got"),
        (lambda d: _set(d, "ring", "operations", 3, "layout"), r"operations\[3\].layout: .* ring"),
        (
            lambda d: _set(d, "conv3d", "operations", 1, "operation", "op"),
            r"operations\[1\]: op: expected one of conv, .*, got conv3d",
        ),
        (
            lambda d: _set(d, 9, "operations", 1, "files", 0, "copies"),
            r"operations\[1\]: files: expected two or more of ascending copies, got \[9, 8\]",
        ),
        (
            lambda d: _set(d, -1, "operations", 0, "weight_bytes"),
            r"operations\[0\]: weight_bytes: expected at least 0",
        ),
        (lambda d: _set(d, 7.5, "operations", 1, "operation", "stride"), "expected a whole number"),
        (
            lambda d: _set(d, None, "networks", 0, "architecture", "blocks", 2, "filters"),
            r"networks\[0\].architecture.blocks\[2\].filters: expected a whole number, got nothing",
        ),
        (
            lambda d: next(e for e in d["operations"] if e["adds"])["adds"][0].update(in_width=99),
            "needs .*, which is missing",
        ),
    ],
)
def test_a_damaged_manifest_is_refused_with_the_key(built, tmp_path, change, message):
    data = json.loads((built / "manifest.json").read_text())
    change(data)
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"manifest.json(:\d+)?: .*{message}"):
        read_bundle(tmp_path)


def test_a_manifest_is_read_like_yaml_without_its_slow_parser(built, bundle, monkeypatch):
    assert load_yaml(built / "manifest.json", Bundle) == bundle
    monkeypatch.setattr("yaml.SafeLoader", None)
    assert read_bundle(built) == bundle


@pytest.mark.parametrize("text", ["", '{"format": 1', "[]", "3", '{"format": 1, "format": 1}'])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json(:1)?: (not valid|file: |dupl|missing)"):
        read_bundle(tmp_path)


def test_models_outside_the_bundle_are_refused(bundle):
    entry = bundle.networks[0]
    for path in ("../elsewhere.tflite", "/elsewhere.tflite"):
        models = tuple(path if model == entry.model else model for model in bundle.models)
        networks = (replace(entry, model=path), *bundle.networks[1:])
        with pytest.raises(ValueError, match=f"expected paths inside the bundle, got {path}"):
            replace(bundle, models=models, networks=networks)


def test_an_operation_listed_twice_is_refused(bundle):
    files = tuple(replace(f, model=f"again/{f.model}") for f in bundle.operations[0].files)
    again = replace(bundle.operations[0], files=files)
    with pytest.raises(ValueError, match="operations: expected distinct ones, got one twice"):
        Bundle(
            **{name: getattr(bundle, name) for name in bundle.__dataclass_fields__}
            | {
                "operations": (*bundle.operations, again),
                "models": (*bundle.models, *(file.model for file in files)),
            }
        )


# Compiling ----------------------------------------------------------------------------------

REPORT = """\
Edge TPU Compiler version {version}

Model compiled successfully in 9 ms.

On-chip memory used for caching model parameters: 2.50KiB
Off-chip memory used for streaming uncached model parameters: 0.00B
Number of Edge TPU subgraphs: 1
Total number of operations: 3

Operator                       Count      Status

CONV_2D                        2          Mapped to Edge TPU
ADD                            1          {status}
"""
MAPPED = "Mapped to Edge TPU"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A stand-in on PATH for the closed compiler: it copies the model, or fails on some names."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def install(*, version="16.0.1", status=MAPPED, fails_on="nothing") -> Path:
        path = folder / "edgetpu_compiler"
        report = REPORT.format(version=version, status=status)
        path.write_text(
            "#!/bin/sh\n"
            f'echo "$4" >> "{folder}/calls"\n'
            f'case "$4" in *{fails_on}*) echo "Internal compiler error"; exit 1;; esac\n'
            'cp "$4" "$3/$(basename "$4" .tflite)_edgetpu.tflite"\n'
            f"cat <<'END'\n{report}END\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        (folder / "calls").write_text("")
        return folder / "calls"

    return install


def calls(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_every_model_is_compiled_once(copied, compiler):
    log, bundle = compiler(), read_bundle(copied)
    seen = []
    summary = compile_bundle(copied, progress=lambda done, total: seen.append(done))
    assert summary.num_models == len(bundle.models) == calls(log) == seen[-1]
    assert (summary.failures, summary.partly_mapped, summary.streaming) == ({}, (), ())
    assert summary.compiler == "16.0.1"
    compiled = read_compiled(copied)
    assert list(compiled) == list(bundle.models)
    for model, entry in compiled.items():
        assert (copied / entry.compiled).read_bytes() == (copied / model).read_bytes()
        assert (entry.mapped, entry.unmapped, entry.on_chip_bytes) == (3, 0, 2560)
    assert compile_bundle(copied) == summary
    assert calls(log) == len(bundle.models)


def test_a_stopped_compilation_goes_on(copied, compiler):
    log = compiler(status="Operation version not supported")

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_bundle(copied, progress=interrupt)
    assert len(read_compiled(copied)) == 4
    path = copied / "compiled.jsonl"
    path.write_bytes(path.read_bytes()[:-7])  # as a power cut would leave it
    assert len(read_compiled(copied)) == 3
    first = next(iter(read_compiled(copied).values()))
    (copied / first.compiled).unlink()
    summary = compile_bundle(copied)
    assert calls(log) == 4 + 2 + (summary.num_models - 4)
    assert list(read_compiled(copied)) == list(read_bundle(copied).models)
    assert len(summary.partly_mapped) == summary.num_models


def test_a_model_that_fails_is_recorded_and_tried_again(copied, compiler):
    compiler(fails_on="fused_ibn")
    failed = [model for model in read_bundle(copied).models if "fused_ibn" in model]
    summary = compile_bundle(copied)
    assert list(summary.failures) == failed
    assert "Internal compiler error" in summary.failures[failed[0]]
    assert not read_compiled(copied).keys() & set(failed)
    records = [json.loads(line) for line in (copied / "compiled.jsonl").read_text().splitlines()]
    assert [record["model"] for record in records if "error" in record] == failed
    log = compiler()
    assert compile_bundle(copied).failures == {}
    assert calls(log) == len(failed)
    assert len(read_compiled(copied)) == summary.num_models


def test_two_compilers_do_not_mix(copied, compiler):
    compiler(version="15.0.9", fails_on="x8.tflite")
    compile_bundle(copied)
    compiler(version="16.0.1")
    with pytest.raises(ValueError, match=r"is of edgetpu_compiler 15.0.9, this is 16.0.1.* delete"):
        compile_bundle(copied)


def test_an_absent_compiler_and_a_damaged_bundle_are_said(copied, compiler, tmp_path, monkeypatch):
    compiler()
    model = copied / read_bundle(copied).models[0]
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged: its files do not have the digest"):
        compile_bundle(copied)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no edgetpu_compiler on PATH.*x86-64 Debian"):
        compile_bundle(copied)
    assert not (copied / "compiled.jsonl").exists()


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"model": "a"}',
        '{"model": "a", "compiled": "b", "on_chip_bytes": -1, "off_chip_bytes": 0, "mapped": 1, '
        '"unmapped": 0, "compiler": "16"}',
    ],
)
def test_a_damaged_line_of_the_compilers_results_is_named(copied, line):
    (copied / "compiled.jsonl").write_text('{"model": "a", "error": "no"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"compiled.jsonl:2: damaged .*; delete it and compile"):
        read_compiled(copied)


def test_operations_of_every_shape_are_exportable():
    """Odd sizes, single pixels and single channels, of every kind."""
    for channels, size in itertools.product(((1, 1), (3, 5)), ((1, 1), (5, 3))):
        for op, stride in (("conv", 2), ("ibn", 2), ("fused_ibn", 1), ("separable_conv", 1)):
            out = tuple(-(-side // stride) for side in size)
            one = operation(op, channels, size, out, kernel_size=3, stride=stride, expand_ratio=2)
            single = operation_graph(one, 0)
            many = repeated(single, 2, layout_of(one))
            interpreter = open_interpreter(write_tflite(many.graph, many.ranges))
            interpreter.invoke()
