"""What a network is and costs, against the papers' figures and against itself."""

import numpy as np
import pytest
import torch
from conftest import OUT_CHANNELS, toy_table
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.describe import describe_network, describe_space, multiply_adds
from oneshot_ednas.latency.operations import network_io_bytes
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.models.network import build_network
from oneshot_ednas.schema import shipped
from oneshot_ednas.space import ednas_b0

BOTH = {"segmentation": 19, "depth": 1}
SIZE = (256, 256)


def test_the_base_network_has_the_papers_size():
    space = ednas_b0()
    figures = describe_network(space, space.base_architecture, out_channels=BOTH, image_size=SIZE)
    assert round(figures["parameters"] / 1e6, 1) == 3.4
    assert round(figures["gflops"], 1) == 1.2
    assert figures["gflops"] == 2 * figures["gmacs"]
    assert figures["latency_ms"] is None
    assert all(row["latency_ms"] is None for row in figures["rows"])


def test_two_single_task_networks_take_the_expected_multiply_adds():
    space = ednas_b0()
    gflops = [
        describe_network(
            space, space.base_architecture, out_channels={name: count}, image_size=SIZE
        )["gflops"]
        for name, count in BOTH.items()
    ]
    assert round(sum(gflops), 1) == 2.3


def test_table_6_has_the_expected_size_and_its_rows_sum_to_the_network():
    space = ednas_b0()
    table = LatencyTable.load(shipped("latency_tables/edgetpu_sim_256x256.csv"))
    architecture = Architecture.load(shipped("configs/architectures/ednas_table6.json"))
    figures = describe_network(space, architecture, out_channels=BOTH, image_size=SIZE, table=table)
    check_sums(table, space, architecture, figures, BOTH)
    assert round(figures["parameters"] / 1e6, 1) == 12.7
    assert round(figures["gflops"], 1) == 6.7
    rows = {row["name"]: row for row in figures["rows"]}
    assert list(rows) == ["stem", *(f"block_{i}" for i in range(1, 17)), "bifpn", "head"]
    assert (
        rows["block_2"].items()
        >= {
            "op": "ibn",
            "stride": 2,
            "kernel_size": 5,
            "filters": 36,
            "expand_ratio": 6,
        }.items()
    )
    assert min(row["gmacs"] for row in rows.values()) > 0


@settings(max_examples=4)
@given(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 1e-6]))
def test_rows_sum_to_the_network_over_random_architectures(small_space, seed, streaming):
    table = toy_table(small_space, cache_bytes=1e3, streaming_ms_per_byte=streaming)
    architecture = small_space.sample(np.random.default_rng(seed))
    figures = describe_network(
        small_space,
        architecture,
        out_channels=OUT_CHANNELS,
        image_size=table.image_size,
        table=table,
    )
    check_sums(table, small_space, architecture, figures, OUT_CHANNELS)
    for row, block in zip(figures["rows"][1:], architecture.blocks, strict=False):
        assert row["filters"] == block.filters
        assert row["op"] == block.op


def check_sums(table, space, architecture, figures, channels):
    rows, header = figures["rows"], table.header
    assert sum(row["gmacs"] for row in rows) == pytest.approx(figures["gmacs"], rel=1e-12)
    assert sum(row["parameters"] for row in rows) == figures["parameters"]
    costs = table.costs(space, channels)
    _, size = costs.totals(architecture)
    input_bytes, output_bytes = network_io_bytes(space, table.image_size, channels)
    fixed = header.fixed_ms + header.input_ms_per_byte * input_bytes
    fixed += header.output_ms_per_byte * output_bytes
    streaming = header.streaming_ms_per_byte * max(0.0, size - header.cache_bytes)
    total = sum(row["latency_ms"] for row in rows) + fixed + streaming
    assert figures["latency_ms"] == pytest.approx(total, rel=1e-9)
    assert figures["latency_ms"] == table.latency_ms(space, architecture, channels)


def test_counting_leaves_mode_and_statistics_alone(small_space):
    network = build_network(small_space.fix(small_space.base_architecture), OUT_CHANNELS).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    counts = multiply_adds(network, (32, 48))
    assert network.training
    assert all(torch.equal(before[n], value) for n, value in network.state_dict().items())
    # The 3x3 stride-2 stem on 32x48 pixels, by hand.
    assert counts["backbone.stem"] == 16 * 24 * 8 * 3 * 9
    assert counts[""] > counts["backbone"] > counts["backbone.stem"]


def test_a_space_is_described_by_its_size_and_its_latency_range(small_space):
    table = toy_table(small_space)
    figures = describe_space(small_space, out_channels=OUT_CHANNELS, table=table)
    costs = table.costs(small_space, OUT_CHANNELS)
    assert figures == {
        "num_architectures": "3072",
        "min_latency_ms": costs.min_latency_ms,
        "max_latency_ms": costs.max_latency_ms,
    }
    without = describe_space(ednas_b0(), out_channels=BOTH)
    assert without["num_architectures"] == str(2**79)
    assert without["min_latency_ms"] is without["max_latency_ms"] is None


def test_what_cannot_be_described_is_refused(small_space):
    table = toy_table(small_space)
    base = small_space.base_architecture
    with pytest.raises(ValueError, match=r"toy.csv is for images of 32x48, got 32x32"):
        describe_network(
            small_space, base, out_channels=OUT_CHANNELS, image_size=(32, 32), table=table
        )
    with pytest.raises(ValueError, match=r"no row in toy.csv for separable_conv k3 8->7"):
        describe_network(
            small_space, base, out_channels={"depth": 7}, image_size=(32, 48), table=table
        )
    with pytest.raises(ValueError, match="architecture has 16 blocks, space small has 4"):
        describe_network(
            small_space,
            ednas_b0().base_architecture,
            out_channels=OUT_CHANNELS,
            image_size=(32, 48),
        )
