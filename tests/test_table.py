"""Latency tables: operations of a network, files, and the costs laid out over a space."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    IMAGE_SIZE,
    OUT_CHANNELS,
    SMALL_SPACE,
    all_latencies,
    brute_force,
    toy_table,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oneshot_ednas.latency.operations import (
    OPERATION_KINDS,
    Operation,
    block_sizes,
    distinct_operations,
    fixed_operations,
    level_sizes,
    network_io_bytes,
    network_operations,
)
from oneshot_ednas.latency.table import LatencyTable, TableHeader, TableRow
from oneshot_ednas.models.backbone import Backbone
from oneshot_ednas.models.blocks import ElasticBlock
from oneshot_ednas.models.layers import ConvBN, SeparableConv
from oneshot_ednas.models.network import Network, build_network
from oneshot_ednas.space import SearchSpace, ednas_b0, ednas_tiny

seeds = st.integers(0, 2**31 - 1)
SMALL = SearchSpace.from_yaml(SMALL_SPACE)

# No streaming, all streamed, and caches that some architectures of the small space exceed.
STREAMING = {
    "inactive": (1e9, 1e-3),
    "active": (0.0, 1e-4),
    "straddling": (3.5e3, 2e-4),
    "tight and dear": (2.6e3, 1e-3),
}


def table_for(streaming: str, seed: int = 0) -> LatencyTable:
    cache_bytes, ms_per_byte = STREAMING[streaming]
    return toy_table(SMALL, cache_bytes=cache_bytes, streaming_ms_per_byte=ms_per_byte, seed=seed)


def by_hand(table: LatencyTable, space: SearchSpace, architecture) -> float:
    """Latency of a network from its operations one by one."""
    header, size = table.header, table.image_size
    placed = network_operations(space, architecture, size, OUT_CHANNELS)
    rows = [table.rows[operation] for _, operation in placed]
    input_bytes, output_bytes = network_io_bytes(space, size, OUT_CHANNELS)
    parameter_bytes = sum(row.parameter_bytes for row in rows)
    return (
        header.fixed_ms
        + header.input_ms_per_byte * input_bytes
        + header.output_ms_per_byte * output_bytes
        + sum(row.latency_ms for row in rows)
        + header.streaming_ms_per_byte * max(0.0, parameter_bytes - header.cache_bytes)
    )


# Operations ---------------------------------------------------------------------------------


def module_operations(network: Network, images: torch.Tensor) -> Counter:
    """What a network's modules do when it runs: kind, channels, kernel, stride and sizes."""
    found: Counter = Counter()

    def record(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        x = inputs[0]
        kernel, expand, stride, residual = 1, 1, 1, False
        if isinstance(module, ElasticBlock):
            (row,) = [a for a in inputs if hasattr(a, "expand_ratio")]
            kind, kernel, expand = row.op, row.kernel_size, row.expand_ratio
            stride = module.spec.stride
            residual = stride == 1 and x.shape == output.shape
        elif isinstance(module, SeparableConv):
            kind, kernel = "separable_conv", 3
        else:
            kind, kernel, stride = "conv", module.weight.shape[2], module.stride
        found[
            Operation(
                op=kind,
                in_channels=x.shape[1],
                out_channels=output.shape[1],
                kernel_size=kernel,
                expand_ratio=expand,
                stride=stride,
                in_height=x.shape[2],
                in_width=x.shape[3],
                out_height=output.shape[2],
                out_width=output.shape[3],
                residual=residual,
            )
        ] += 1

    pointwise = {m.pointwise for m in network.modules() if isinstance(m, SeparableConv)}
    hooks = [
        module.register_forward_hook(record)
        for module in network.modules()
        if isinstance(module, (ElasticBlock, SeparableConv, ConvBN)) and module not in pointwise
    ]
    with torch.no_grad():
        network.eval()(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("size", [(64, 128), (40, 72)])
@pytest.mark.parametrize("space", [ednas_tiny(), SMALL], ids=lambda space: space.name)
def test_the_walk_over_the_space_finds_what_the_modules_run(space, size):
    architecture = space.sample(np.random.default_rng(1))
    network = build_network(space.fix(architecture), OUT_CHANNELS)
    placed = network_operations(space, architecture, size, OUT_CHANNELS)
    run = module_operations(network, torch.zeros(1, 3, *size))
    # The classifiers are bare convolutions; the walk prices them as separable ones.
    channels = space.fusion.channels
    rows, columns = level_sizes(space, size)[0]
    for count in OUT_CHANNELS.values():
        operation = Operation(
            op="separable_conv",
            in_channels=channels,
            out_channels=count,
            kernel_size=3,
            in_height=rows,
            in_width=columns,
            out_height=rows,
            out_width=columns,
        )
        run[operation] += 1
    walked = Counter(o for _, o in placed if o.op not in ("add", "max_pool", "resize"))
    assert walked == run


@pytest.mark.parametrize("size", [(64, 128), (40, 72)])
def test_adds_pools_and_resizes_are_those_that_the_fusion_calls(size, monkeypatch):
    space = ednas_tiny()
    architecture = space.base_architecture
    network = build_network(space.fix(architecture), OUT_CHANNELS)
    called: Counter = Counter()

    def counting(kind, function):
        def wrapped(x, *args, **kwargs):
            y = function(x, *args, **kwargs)
            called[kind, x.shape[1], tuple(x.shape[2:]), tuple(y.shape[2:])] += 1
            return y

        return wrapped

    for name, kind in (("max_pool2d", "max_pool"), ("interpolate", "resize")):
        monkeypatch.setattr(nn.functional, name, counting(kind, getattr(nn.functional, name)))
    sums = []
    for module in network.modules():
        if type(module).__name__ == "FusionNode":
            module.register_forward_pre_hook(
                lambda _, inputs: sums.extend([tuple(inputs[0].shape[1:])] * (len(inputs) - 1))
            )
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, *size))
    walked: Counter = Counter()
    adds = []
    for _, o in network_operations(space, architecture, size, OUT_CHANNELS):
        if o.op in ("max_pool", "resize"):
            key = (o.op, o.in_channels, (o.in_height, o.in_width), (o.out_height, o.out_width))
            walked[key] += 1
        elif o.op == "add":
            adds.append((o.in_channels, o.in_height, o.in_width))
    assert walked == called
    assert sorted(adds) == sorted(sums)


def test_block_and_level_sizes_are_those_of_the_features():
    space, size = ednas_tiny(), (40, 72)
    network = build_network(space.fix(space.base_architecture), OUT_CHANNELS).eval()
    seen = []
    for module in network.backbone.blocks:
        module.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    with torch.no_grad():
        taps = Backbone.forward(network.backbone, torch.zeros(1, 3, *size), space.base_architecture)
    assert seen == block_sizes(space, size)
    assert [tuple(x.shape[2:]) for x in taps] == level_sizes(space, size)[: len(taps)]


@pytest.mark.parametrize("space", [ednas_b0(), ednas_tiny(), SMALL], ids=lambda space: space.name)
@settings(max_examples=10)
@given(seed=seeds)
def test_distinct_operations_cover_every_architecture(space, seed):
    every = DISTINCT[space.name]
    architecture = space.sample(np.random.default_rng(seed))
    for _, operation in network_operations(space, architecture, (64, 96), OUT_CHANNELS):
        assert operation in every


DISTINCT = {
    space.name: set(distinct_operations(space, (64, 96), OUT_CHANNELS))
    for space in (ednas_b0(), ednas_tiny(), SMALL)
}


def test_distinct_operations_are_no_more_than_the_architectures_hold():
    held = set()
    # Every fifth: five shares no factor with the option counts, so all pairs still occur.
    for architecture in brute_force(SMALL)[0][::5]:
        held.update(o for _, o in network_operations(SMALL, architecture, IMAGE_SIZE, OUT_CHANNELS))
    listed = distinct_operations(SMALL, IMAGE_SIZE, OUT_CHANNELS)
    assert set(listed) == held
    assert listed == sorted(held)
    assert {operation.op for operation in listed} == set(OPERATION_KINDS)


def test_fixed_operations_are_in_every_network():
    fixed = Counter(o for _, o in fixed_operations(SMALL, IMAGE_SIZE, OUT_CHANNELS))
    for seed in range(3):
        architecture = SMALL.sample(np.random.default_rng(seed))
        placed = network_operations(SMALL, architecture, IMAGE_SIZE, OUT_CHANNELS)
        assert fixed <= Counter(operation for _, operation in placed)
        assert [where for where, _ in placed][:2] == ["stem", "block_1"]


def test_bytes_that_cross_the_bus_are_the_int8_image_and_maps():
    assert network_io_bytes(ednas_b0(), (256, 512), {"a": 19, "b": 1}) == (
        3 * 256 * 512,
        20 * 32 * 64,
    )


def test_an_operation_reads_like_the_paper_s_row():
    block = Operation(
        op="fused_ibn",
        in_channels=112,
        out_channels=168,
        kernel_size=5,
        expand_ratio=6,
        stride=2,
        in_height=16,
        in_width=16,
        out_height=8,
        out_width=8,
    )
    assert str(block) == "fused_ibn k5 e6 s2 112->168 at 16x16"
    resize = Operation(
        op="resize",
        in_channels=8,
        out_channels=8,
        in_height=4,
        in_width=4,
        out_height=8,
        out_width=8,
    )
    assert str(resize) == "resize k1 8->8 at 4x4 to 8x8"


def test_operations_refuse_a_foreign_architecture():
    with pytest.raises(ValueError, match="architecture has 8 blocks, space small has 4"):
        network_operations(SMALL, ednas_tiny().base_architecture, IMAGE_SIZE, OUT_CHANNELS)


# Costs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", STREAMING)
@settings(max_examples=20)
@given(seed=seeds)
def test_latency_is_the_sum_over_the_operations_and_the_terms_paid_once(streaming, seed):
    table = TABLES[streaming]
    architecture = SMALL.sample(np.random.default_rng(seed))
    expected = by_hand(table, SMALL, architecture)
    assert table.latency_ms(SMALL, architecture) == pytest.approx(expected, rel=1e-12)


TABLES = {streaming: table_for(streaming) for streaming in STREAMING}


@pytest.mark.parametrize("space", [ednas_b0(), ednas_tiny()], ids=lambda space: space.name)
def test_latency_is_the_sum_over_the_operations_in_the_shipped_spaces(space):
    table = toy_table(space, (64, 96), cache_bytes=5e4, streaming_ms_per_byte=1e-5)
    for seed in range(5):
        architecture = space.sample(np.random.default_rng(seed))
        expected = by_hand(table, space, architecture)
        assert table.latency_ms(space, architecture) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("streaming", STREAMING)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_least_and_largest_latency_are_what_brute_force_finds(streaming, seed):
    costs = table_for(streaming, seed).costs(SMALL)
    every = all_latencies(costs)
    for i in (0, 1000, 3071):
        assert every[i] == pytest.approx(costs.latency_ms(brute_force(SMALL)[0][i]), rel=1e-14)
    assert costs.min_latency_ms == pytest.approx(min(every), rel=1e-14)
    assert costs.max_latency_ms == pytest.approx(max(every), rel=1e-12)
    assert max(every) > 1.1 * min(every)


def test_the_straddling_caches_do_straddle():
    costs = TABLES["straddling"].costs(SMALL)
    sizes = [costs.totals(architecture)[1] for architecture in brute_force(SMALL)[0][::7]]
    for streaming in ("straddling", "tight and dear"):
        assert min(sizes) < STREAMING[streaming][0] < max(sizes)


def test_the_bounds_of_the_paper_s_space_hold_over_samples():
    table = toy_table(ednas_b0(), (64, 64), cache_bytes=1.2e6, streaming_ms_per_byte=1e-6)
    costs = table.costs(ednas_b0())
    generator = np.random.default_rng(0)
    drawn = [costs.latency_ms(ednas_b0().sample(generator)) for _ in range(200)]
    assert costs.min_latency_ms < min(drawn) < max(drawn) < costs.max_latency_ms


def test_a_fixed_space_has_one_latency():
    architecture = SMALL.sample(np.random.default_rng(2))
    fixed = SMALL.fix(architecture)
    for table in TABLES.values():
        costs = table.costs(fixed)
        expected = table.latency_ms(SMALL, architecture)
        assert costs.min_latency_ms == pytest.approx(expected, rel=1e-12)
        assert costs.max_latency_ms == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("space", [ednas_b0(), ednas_tiny(), SMALL], ids=lambda space: space.name)
def test_no_option_is_free_of_cost(space):
    costs = toy_table(space, (64, 96)).costs(space)
    for ms, size in zip(costs.block_ms, costs.block_bytes, strict=True):
        assert (ms > 0).all()
        assert (size > 0).all()


def test_an_option_of_zero_milliseconds_is_refused():
    table = toy_table(SMALL)
    block = next(o for o in table.rows if o.op == "ibn" and o.in_channels == 8 and o.stride == 2)
    rows = dict(table.rows) | {block: TableRow(latency_ms=0.0, parameter_bytes=1)}
    with pytest.raises(ValueError, match=r"block 2 has an option of 0 ms; no operation is free"):
        LatencyTable(table.header, rows).costs(SMALL)


@pytest.mark.parametrize("kind", OPERATION_KINDS)
def test_a_missing_row_is_an_error_that_names_the_row_and_the_cure(kind):
    table = toy_table(SMALL)
    missing = next(operation for operation in sorted(table.rows) if operation.op == kind)
    rows = {operation: row for operation, row in table.rows.items() if operation != missing}
    broken = LatencyTable(table.header, rows, "mine.csv")
    cure = r"build a table for your space and tasks with oneshot-ednas latency table SPACE "
    cure += r"--image-size 32 48 --tasks NAME=CHANNELS"
    with pytest.raises(ValueError, match=cure) as caught:
        broken.costs(SMALL)
    assert f"no row in mine.csv for {missing};" in str(caught.value)
    with pytest.raises(ValueError, match=cure):
        broken.row(missing)
    with pytest.raises(ValueError, match=cure):
        broken.latency_ms(SMALL, SMALL.base_architecture)


def test_other_tasks_are_priced_by_their_own_heads():
    more = {**OUT_CHANNELS, "normals": 3}
    table = toy_table(SMALL, out_channels=more)
    base = SMALL.base_architecture
    assert table.latency_ms(SMALL, base) == table.latency_ms(SMALL, base, more)
    assert table.latency_ms(SMALL, base, OUT_CHANNELS) < table.latency_ms(SMALL, base)
    with pytest.raises(ValueError, match=r"no row in toy\.csv for separable_conv k3 8->7 at 8x12"):
        table.latency_ms(SMALL, base, {"edges": 7})


def test_costs_refuse_a_foreign_architecture():
    costs = toy_table(SMALL).costs(SMALL)
    foreign = ednas_tiny().base_architecture
    for use in (costs.latency_ms, costs.totals):
        with pytest.raises(ValueError, match="architecture has 8 blocks, space small has 4"):
            use(foreign)


# Files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", STREAMING)
def test_a_saved_table_loads_with_the_same_header_rows_and_latencies(tmp_path, streaming):
    table = table_for(streaming)
    table.save(tmp_path / "t.csv")
    got = LatencyTable.load(tmp_path / "t.csv")
    assert got.name == "t.csv"
    assert got.header == table.header
    assert got.rows.keys() == table.rows.keys()
    for operation, row in table.rows.items():
        # Six digits for times, three for their spread.
        assert got.rows[operation].latency_ms == pytest.approx(row.latency_ms, rel=1e-5)
        assert got.rows[operation].spread_ms == pytest.approx(row.spread_ms, rel=1e-2)
        assert got.rows[operation].parameter_bytes == row.parameter_bytes
    base = SMALL.base_architecture
    assert got.latency_ms(SMALL, base) == pytest.approx(table.latency_ms(SMALL, base), rel=1e-5)
    got.save(str(tmp_path / "again.csv"))
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "t.csv").read_bytes()


def measured_header(**values) -> TableHeader:
    """The toy table's header as a measurement would fill it."""
    every = {
        "source": "measured",
        "machine": "Toy CPU 3, x86_64, Toy Linux 1",
        "delegate": "libtoy.so.1",
        "kernels": "default",
        "threads": 1,
        "clock_mhz": 250.0,
        "compiler": "16.0",
        "unit": "ms",
        "rows": len(toy_table(SMALL).rows),
        "row_scale": 1.25,
        "held_out_mape": 3.5,
        "held_out_spearman": 0.99,
        "held_out_kendall_tau": 0.93,
        "held_out_networks": 30,
        "fit_networks": 31,
    }
    return replace(toy_table(SMALL).header, **(every | values))


def test_a_measured_table_says_on_what_and_survives_its_file():
    header = measured_header()
    text = LatencyTable(header, toy_table(SMALL).rows).to_text()
    assert LatencyTable.from_text(text, name="t.csv").header == header
    for line in ("# unit: ms", "# clock_mhz: 250.0", "# held_out_kendall_tau: 0.93"):
        assert f"{line}\n" in text


def test_keys_that_hold_nothing_are_left_out_of_the_file():
    assert " null" not in TEXT
    assert "''" not in TEXT
    keys = [line[2:].split(":")[0] for line in LINES[: FIRST - 1] if not line.startswith("#  ")]
    unset = {"machine", "delegate", "unit", "rows", "row_scale", "note", "held_out_mape"}
    assert not unset & set(keys)
    assert keys[:2] == ["format", "device"]


@settings(max_examples=30)
@given(
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), max_size=150),
    st.none() | st.floats(0, 100),
)
def test_any_note_and_error_survive_the_header(note, mape):
    table = toy_table(SMALL)
    header = replace(table.header, note=note, held_out_mape=mape, held_out_note=note + "\n" + note)
    got = LatencyTable.from_text(LatencyTable(header, table.rows).to_text(), name="t.csv")
    assert got.header == header


TEXT = toy_table(SMALL).to_text()
LINES = TEXT.splitlines()
FIRST = next(i for i, line in enumerate(LINES) if not line.startswith("#")) + 1


def with_cell(column: str, value: str) -> str:
    """The table's text with one cell of its first row replaced."""
    cells = LINES[FIRST].split(",")
    cells[LINES[FIRST - 1].split(",").index(column)] = value
    return "\n".join([*LINES[:FIRST], ",".join(cells), *LINES[FIRST + 1 :], ""])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\n".join(LINES[:-3]) + "\n" + LINES[-3][:10] + "\n",
            r"columns, got \d+; the file may be trunc",
        ),
        (TEXT[:-2], r"^t\.csv:\d+: no end of line; the file may be truncated"),
        ("\n".join(LINES[: FIRST - 1]), r"expected op,in_channels,.*, got the end of the file"),
        (
            TEXT.replace("op,in_channels", "op,channels"),
            r"expected op,in_channels,.*, got op,channels",
        ),
        (with_cell("latency_ms", "-1"), r"latency_ms: expected a finite number >= 0, got -1"),
        (with_cell("latency_ms", "nan"), r"latency_ms: expected a finite number >= 0, got nan"),
        (with_cell("latency_ms", "inf"), r"latency_ms: expected a finite number >= 0, got inf"),
        (with_cell("latency_ms", ""), r"latency_ms: expected a number, got ''"),
        (with_cell("spread_ms", "-0.1"), r"spread_ms: expected a finite number >= 0, got -0\.1"),
        (
            with_cell("parameter_bytes", "1.5"),
            r"parameter_bytes: expected a whole number >= 0, got '1\.5'",
        ),
        (with_cell("in_channels", "-8"), r"in_channels: expected a whole number >= 0, got '-8'"),
        (with_cell("op", "mbconv"), r"op: expected one of conv, ibn, .*, got mbconv"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        LatencyTable.load(path)
    assert str(caught.value).startswith("t.csv:")
    if "latency_ms: " in message or "op: " in message:
        assert f"t.csv:{FIRST + 1}: " in str(caught.value)


def test_a_second_row_for_an_operation_is_refused():
    text = TEXT + LINES[-1] + "\n"
    message = rf"t\.csv:{len(LINES) + 1}: a second row for separable_conv k3"
    with pytest.raises(ValueError, match=message):
        LatencyTable.from_text(text, name="t.csv")


def test_a_file_cut_off_between_two_rows_is_refused():
    text = LatencyTable(measured_header(), toy_table(SMALL).rows).to_text()
    count = len(toy_table(SMALL).rows)
    for left_out in (1, 5):
        cut = "\n".join(text.splitlines()[:-left_out]) + "\n"
        message = rf"t\.csv: expected {count} rows, .* got {count - left_out}; .* truncated"
        with pytest.raises(ValueError, match=message):
            LatencyTable.from_text(cut, name="t.csv")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_off_anywhere_is_refused(cut):
    text = LatencyTable(measured_header(), toy_table(SMALL).rows).to_text()
    with pytest.raises(ValueError, match=r"^t\.csv"):
        LatencyTable.from_text(text[: int(cut * len(text))], name="t.csv")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"machine": None}, "machine: a measured table names it, got nothing"),
        ({"runtime": ""}, "runtime: a measured table names it, got nothing"),
        ({"unit": "us"}, "unit: expected ms, got us"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"row_scale": -1.0}, r"row_scale: expected a finite number >= 0, got -1\.0"),
        ({"held_out_mape": -1.0}, r"held_out_mape: expected a finite number >= 0, got -1\.0"),
        ({"held_out_spearman": 1.5}, r"held_out_spearman: expected a number from -1 to 1, got 1"),
        ({"held_out_spearman": -1.5}, r"held_out_spearman: expected a number from -1 to 1, got -1"),
        ({"held_out_kendall_tau": float("nan")}, "held_out_kendall_tau: .* from -1 to 1, got nan"),
        ({"rows": -1}, "rows: expected a finite number >= 0, got -1"),
    ],
)
def test_a_bad_header_of_a_measured_table_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        measured_header(**values)


def test_what_is_missing_from_a_measured_table_is_to_be_measured():
    rows = dict(toy_table(SMALL).rows)
    del rows[min(rows)]
    table = LatencyTable(measured_header(rows=None), rows, "mine.csv")
    with pytest.raises(ValueError, match=r"tasks with tools/build_latency_table\.py$"):
        table.costs(SMALL)
    with pytest.raises(ValueError, match=r"build one with tools/build_latency_table\.py$"):
        table.check_image_size(48, 32)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# device: toy", "# unit: us\n# device: toy", r"t\.csv:1: unit: expected ms, got us"),
        ("# device: toy", "# devise: toy", r"t\.csv:2: unknown key devise; did you mean device\?"),
        ("# device: toy\n", "", r"t\.csv:1: missing key device"),
        ("# format: 1", "# format: 2", r"format: expected 1, got 2; another version"),
        ("source: simulated", "source: guessed", r"source: expected one of simulated, measured"),
        ("fixed_ms: 0.4", "fixed_ms: -0.4", r"fixed_ms: expected a finite number >= 0, got -0\.4"),
        ("fixed_ms: 0.4", "fixed_ms: nan", r"fixed_ms: expected a finite number, got 'nan'"),
        ("cache_bytes: 1000000000.0", "cache_bytes: inf", r"cache_bytes: expected a finite number"),
        ("image_height: 32", "image_height: 0", r"image_height: expected at least 1, got 0"),
        ("runs: 1", "runs: 0", r"runs: expected at least 1, got 0"),
    ],
)
def test_a_bad_header_is_refused(old, new, message):
    assert old in TEXT
    with pytest.raises(ValueError, match=message) as caught:
        LatencyTable.from_text(TEXT.replace(old, new, 1), name="t.csv")
    assert str(caught.value).startswith("t.csv:")


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no latency table .*none\.csv; build one with onesh"
    ):
        LatencyTable.load(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"b\.csv: expected UTF-8 text"):
        LatencyTable.load(tmp_path / "b.csv")


def test_images_of_another_size_are_refused():
    table = toy_table(SMALL)
    table.check_image_size(*IMAGE_SIZE)
    message = r"toy\.csv is for images of 32x48, got 48x32; build one with .* --image-size 48 32"
    with pytest.raises(ValueError, match=message):
        table.check_image_size(48, 32)
