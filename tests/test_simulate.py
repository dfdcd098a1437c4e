"""Simulated latency tables: the shipped ones come out again, and cover their spaces."""

import datetime
import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.latency.edgetpu import EdgeTpu, OutsideCalibration
from oneshot_ednas.latency.operations import OPERATION_KINDS, Operation, network_operations
from oneshot_ednas.latency.simulate import operation_layers, simulate_table
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.schema import shipped
from oneshot_ednas.space import named_space

TABLES = sorted(shipped("latency_tables").glob("edgetpu_sim_*.csv"))
loaded = functools.cache(LatencyTable.load)
CHANNELS = {"segmentation": 10, "depth": 1, "normals": 3}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_a_shipped_table_equals_a_fresh_simulation(path):
    table = LatencyTable.load(path)
    header = table.header
    fresh = simulate_table(
        named_space(header.space),
        table.image_size,
        header.out_channels,
        head_channels=range(1, 65),
        host=header.host,
        date=datetime.date.fromisoformat(header.date),
    )
    # Through the text, which rounds to six digits.
    assert fresh.to_text() == path.read_text()
    again = LatencyTable.from_text(fresh.to_text(), name=path.name)
    assert again.header == header
    assert again.rows == table.rows
    assert f"{table.image_size[0]}x{table.image_size[1]}" in path.name
    assert header.held_out_mape < 15
    assert header.held_out_spearman > 0.9
    assert header.held_out_networks == 18
    assert header.rows == len(table.rows)
    # The largest layer, of ibn k5 e6 s2 24->36 at 128x128, takes 2.81 of the 3 MiB on chip.
    assert "MiB" not in header.note
    for operation, row in table.rows.items():
        assert row.latency_ms > 0, operation
        assert row.parameter_bytes >= 0


def test_every_shipped_table_was_found():
    assert len(TABLES) >= 2
    assert {LatencyTable.load(path).header.space for path in TABLES} == {"ednas_b0", "ednas_tiny"}


@settings(max_examples=15)
@given(
    st.sampled_from(range(len(TABLES))),
    st.integers(0, 2**31 - 1),
    st.integers(1, 64),
    st.booleans(),
)
def test_a_shipped_table_prices_every_network_of_its_space(which, seed, classes, with_normals):
    table = loaded(TABLES[which])
    space = named_space(table.header.space)
    architecture = space.sample(np.random.default_rng(seed))
    channels = {"segmentation": classes} | ({"normals": 3} if with_normals else {})
    total = sum(
        table.row(placed.operation).latency_ms
        for placed in network_operations(space, architecture, table.image_size, channels)
    )
    assert 0 < total < 100


def test_a_slower_clock_makes_every_operation_slower(small_space):
    space = small_space
    fast, slow = (
        simulate_table(space, (64, 128), CHANNELS, clock_mhz=clock) for clock in (500, 250)
    )
    assert fast.rows.keys() == slow.rows.keys()
    for operation, row in fast.rows.items():
        assert slow.rows[operation].latency_ms > row.latency_ms
        assert slow.rows[operation].parameter_bytes == row.parameter_bytes
    assert slow.header.device == "Coral Edge TPU, 250 MHz"
    assert fast.header.date == datetime.date.today().isoformat()


@pytest.mark.parametrize("clock_mhz", [500, 250])
@pytest.mark.parametrize("host", EdgeTpu.load().constants.hosts)
def test_only_hosts_and_clocks_that_were_measured_have_an_error(small_space, host, clock_mhz):
    header = simulate_table(small_space, (32, 32), CHANNELS, host=host, clock_mhz=clock_mhz).header
    errors = (header.held_out_mape, header.held_out_spearman, header.held_out_networks)
    count = {"usb3-desktop": 18, "pcie-devboard": 13, "pcie-desktop": 48}.get(host)
    if count and clock_mhz == 500:
        stored = EdgeTpu.load().constants.leave_one_out["hosts"][host]
        assert errors == (stored["mape"], stored["spearman"], count)
        assert header.held_out_note == f"leave-one-out over {count} published networks on this host"
    else:
        assert errors == (None, None, None)
        expected = f"unknown: no latency is published for {host} at {clock_mhz} MHz"
        assert header.held_out_note == expected


def test_hosts_change_what_a_network_pays_once(small_space):
    headers = {
        host: simulate_table(small_space, (32, 32), CHANNELS, host=host).header
        for host in ("usb3-desktop", "usb2-raspberry-pi", "pcie-devboard")
    }
    per_byte = {host: header.input_ms_per_byte for host, header in headers.items()}
    assert per_byte["usb2-raspberry-pi"] > per_byte["usb3-desktop"]
    assert len({header.output_ms_per_byte for header in headers.values()}) == 3
    assert len({header.streaming_ms_per_byte for header in headers.values()}) == 3
    assert {host: header.host for host, header in headers.items()} == {h: h for h in headers}


def test_a_table_with_layers_beyond_the_on_chip_memory_says_so_once(small_space):
    with pytest.warns(OutsideCalibration) as warned:
        table = simulate_table(small_space, (1024, 1024), CHANNELS)
    (message,) = (str(one.message) for one in warned)
    layers = {layer for operation in table.rows for layer in operation_layers(operation)}
    large = {
        layer
        for layer in layers
        if layer.in_height * layer.in_width * layer.in_channels
        + layer.out_height * layer.out_width * layer.out_channels
        > 3 * 2**20
    }
    assert large
    assert message.startswith(f"input + output of {len(large)} of {len(layers)} distinct layers")
    assert table.header.note.endswith(f"; {message}")
    assert "\n" not in message
    again = LatencyTable.from_text(table.to_text(), name="table.csv")
    assert again.header == table.header


def test_an_unknown_host_or_clock_is_refused(small_space):
    with pytest.raises(ValueError, match="unknown Edge TPU host 'toaster'"):
        simulate_table(small_space, (64, 128), CHANNELS, host="toaster")
    with pytest.raises(ValueError, match="500 or 250 MHz, got 750"):
        simulate_table(small_space, (64, 128), CHANNELS, clock_mhz=750)


def operation(op="ibn", **changes) -> Operation:
    values = {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "expand_ratio": 4}
    values |= {"in_height": 15, "in_width": 20, "out_height": 15, "out_width": 20}
    return Operation(op=op, **(values | changes))


def test_blocks_compile_to_the_ops_that_they_are_made_of():
    def names(op):
        return [layer.op for layer in operation_layers(op)]

    assert names(operation()) == ["conv", "dw", "conv"]
    assert names(operation(residual=True)) == ["conv", "dw", "conv", "add"]
    assert names(operation(expand_ratio=1)) == ["dw", "conv"]
    assert names(operation("fused_ibn")) == ["conv", "conv"]
    assert names(operation("separable_conv")) == ["dw", "conv"]
    assert names(operation("max_pool")) == ["pool"]
    assert names(operation("resize")) == ["resize"]
    halved = operation(stride=2, out_height=8, out_width=10)
    expand, depthwise, project = operation_layers(halved)
    assert expand[1:] == (15, 20, 8, 15, 20, 32, 1, 1, 1)
    assert depthwise[1:] == (15, 20, 32, 8, 10, 32, 3, 3, 2)
    assert project[1:] == (8, 10, 32, 8, 10, 8, 1, 1, 1)


@pytest.mark.parametrize("op", OPERATION_KINDS)
def test_no_operation_is_free(op):
    tpu = EdgeTpu.load("usb3-desktop", 500)
    layers = operation_layers(operation(op))
    assert layers
    assert all(tpu.layer_ms(layer) > 0 for layer in layers)
    assert math.isfinite(sum(tpu.layer_ms(layer) for layer in layers))
    is_weightless = op in ("add", "max_pool", "resize")
    assert (sum(tpu.parameter_bytes(layer) for layer in layers) == 0) == is_weightless
