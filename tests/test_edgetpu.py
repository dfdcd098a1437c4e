import csv
import importlib.util
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.latency.edgetpu import (
    OPS,
    EdgeTpu,
    EdgeTpuConstants,
    HostConstants,
    Layer,
    split_units,
    work,
)
from oneshot_ednas.latency.published import read_networks, score_networks, spearman

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / os.environ.get("ONESHOT_EDNAS_SHARED_DATA", "../shared/data") / "edgetpu"
NETWORKS = DATA / "networks.json"
needs_networks = pytest.mark.skipif(not NETWORKS.is_file(), reason="no published networks here")
laws = settings(deadline=None, derandomize=True, max_examples=60)
sizes = st.integers(1, 70)
CONSTANTS = EdgeTpuConstants.load()


def conv(size, in_channels, channels, *, kernel=1, stride=1, op="conv"):
    out = math.ceil(size / stride)
    return Layer(op, size, size, in_channels, out, out, channels, kernel, kernel, stride)


def ibn(size, in_channels, channels, *, expand, kernel, stride):
    hidden, out = in_channels * expand, math.ceil(size / stride)
    return [
        conv(size, in_channels, hidden),
        conv(size, hidden, hidden, kernel=kernel, stride=stride, op="dw"),
        conv(out, hidden, channels),
    ]


def fused_ibn(size, in_channels, channels, *, expand, kernel, stride):
    hidden, out = in_channels * expand, math.ceil(size / stride)
    return [
        conv(size, in_channels, hidden, kernel=kernel, stride=stride),
        conv(out, hidden, channels),
    ]


def network(**changes):
    values = {
        "group": "a",
        "model": "tiny",
        "measured_ms": 1.0,
        "device": "USB Accelerator",
        "host": "desktop",
        "bus": "USB 3",
        "input_bytes": 100,
        "output_bytes": 10,
        "offchip_param_bytes": 0,
        "layers": [["conv", 8, 8, 4, 8, 8, 16, 3, 3, 1]],
    }
    return {"networks": [{k: v for k, v in {**values, **changes}.items() if v is not ...}]}


# ---- one op


@laws
@given(sizes, sizes, st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 3, 5]))
def test_convolution_units_are_the_best_of_all_tile_partitions(height, width, ins, outs, kernel):
    best = min(
        # The busiest tile: its rows, its columns, its groups of 16 channels.
        len(range(0, height, y)) * len(range(0, width, x)) * len(range(0, math.ceil(outs / 16), z))
        for y in range(1, 17)
        for x in range(1, 17)
        for z in range(1, 17)
        if y * x * z == 16 and {y, x} <= {1, 2, 4}
    )
    layer = Layer("conv", height, width, ins, height, width, outs, kernel, kernel, 1)
    assert work(layer).conv_units == best * kernel * kernel * math.ceil(ins / 4)


def test_units_of_known_ops_match_hand_computed_ones():
    # 64x64 over 4x4 tiles is 256 pixels; 7 groups of 16 channels; 9 taps; 25 groups of 4 inputs.
    assert work(conv(64, 100, 100, kernel=3)).conv_units == 256 * 7 * 9 * 25
    # One pixel: the 16 tiles can only share channels.
    assert work(Layer("fc", 1, 1, 1024, 1, 1, 1000, 1, 1, 1)).conv_units == 256 * math.ceil(63 / 16)
    assert work(conv(64, 32, 32, kernel=3, op="dw")).depthwise_units == 3 * 256 * 8
    assert work(conv(64, 32, 32, kernel=3, stride=2, op="dw")).depthwise_units == 5 * 64 * 8
    assert work(conv(8, 16, 32, kernel=2, op="tconv")).conv_units == 4 * 4 * 4 * 2
    assert work(Layer("pool", 7, 7, 64, 1, 1, 64, 7, 7, 1)).depthwise_units == 0
    assert work(conv(8, 16, 16, op="add")).activation_bytes == 3 * 8 * 8 * 16


@pytest.mark.skipif(not (DATA / "estimated_cycles.csv").is_file(), reason="no estimates here")
def test_units_equal_the_compilers_cycles_on_pure_convolution_chains():
    rows = list(csv.DictReader((DATA / "estimated_cycles.csv").read_text().splitlines()))
    chains = {
        int(r["model"].rpartition("x")[2]): r for r in rows if r["model"].startswith("model_conv")
    }
    assert sorted(chains) == [10, 25, 50, 75]
    for depth, row in chains.items():
        layers = [conv(128, 3 if i == 0 else 32, 32, kernel=7) for i in range(depth)]
        layers.append(Layer("conv", 128, 128, 32, 1, 1, 3, 1, 1, 128))
        units = sum(work(layer).conv_units for layer in layers)
        assert units == pytest.approx(int(row["compiler_estimated_cycles_64bit"]), abs=8)


@laws
@given(st.sampled_from(OPS), sizes, st.integers(1, 200), st.sampled_from([1, 3, 5]))
def test_every_op_takes_time_at_least_its_overhead(op, size, channels, kernel):
    time = EdgeTpu(CONSTANTS).layer_ms(conv(size, channels, channels, kernel=kernel, op=op))
    overheads = CONSTANTS.compute_overhead_ns, CONSTANTS.elementwise_overhead_ns
    assert time > min(overheads) * 1e-6


@laws
@given(
    st.sampled_from(["conv", "dw", "pool", "add", "tconv"]),
    st.tuples(sizes, sizes),
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])),
)
def test_a_larger_op_is_never_faster_nor_smaller(op, size, channels, kernel):
    small = conv(min(size), min(channels), min(channels), kernel=min(kernel), op=op)
    large = conv(max(size), max(channels), max(channels), kernel=max(kernel), op=op)
    tpu = EdgeTpu(CONSTANTS)
    assert tpu.layer_ms(small) <= tpu.layer_ms(large)
    assert tpu.parameter_bytes(small) <= tpu.parameter_bytes(large)


@laws
@given(sizes, sizes, st.integers(1, 60))
def test_a_split_lies_between_an_even_share_and_the_whole(height, width, depth):
    total = height * width * depth
    assert math.ceil(total / 16) <= split_units(height, width, depth) <= total


def test_parameters_are_padded_as_the_compiler_reports_them():
    # Five 3x3 convolutions of 72 filters on RGB: the compiler reports 0.32568359375 MiB on chip.
    chain = [conv(64, 3 if i == 0 else 72, 72, kernel=3) for i in range(5)]
    assert sum(map(EdgeTpu(CONSTANTS).parameter_bytes, chain)) == 0.32568359375 * 2**20
    depthwise = conv(8, 96, 96, kernel=3, op="dw")
    assert EdgeTpu(CONSTANTS).parameter_bytes(depthwise) == 128 * (9 + 8)
    assert EdgeTpu(CONSTANTS).parameter_bytes(conv(8, 96, 96, op="add")) == 0


@pytest.mark.parametrize(
    ("size", "channels", "out_channels", "stride", "low", "high"),
    [
        (128, 16, 24, 2, 0.2, 0.3),
        (64, 24, 24, 1, 0.5, 0.65),
        (32, 40, 40, 1, 0.75, 0.9),
        (16, 80, 80, 1, 1.1, 1.5),
        (8, 192, 192, 1, 1.5, 2.8),
    ],
)
def test_fused_blocks_win_on_large_maps_and_lose_on_small_ones(
    size, channels, out_channels, stride, low, high
):
    tpu = EdgeTpu(CONSTANTS)
    for kernel in (3, 5):
        for expand in (3, 6):
            options = {"expand": expand, "kernel": kernel, "stride": stride}
            plain, fused = (
                sum(map(tpu.layer_ms, block(size, channels, out_channels, **options)))
                for block in (ibn, fused_ibn)
            )
            assert low <= fused / plain <= high


# ---- a network


def test_network_time_is_its_terms_added_once():
    tpu = EdgeTpu(CONSTANTS)
    layers = [conv(32, 16, 16, kernel=3), conv(32, 16, 16, op="add")]
    time = tpu.network_ms(
        layers, input_bytes=1000, output_bytes=100, offchip_parameter_bytes=10_000
    )
    host = CONSTANTS.hosts["usb3-desktop"]
    transfers_ns = 1000 * host.input_ns_per_byte + 100 * host.output_ns_per_byte
    transfers_ns += 10_000 * host.streaming_ns_per_byte
    ops_ms = tpu.layer_ms(layers[0]) + tpu.layer_ms(layers[1])
    assert time == pytest.approx(host.fixed_ms + transfers_ns * 1e-6 + ops_ms)


def test_streaming_starts_at_the_cache_and_is_continuous():
    tpu = EdgeTpu(CONSTANTS)
    layer = conv(1, 1024, 1024, op="fc")
    each = tpu.parameter_bytes(layer)
    fitting = int(tpu.cache_bytes // each)
    times = [
        tpu.network_ms([layer] * n, input_bytes=0, output_bytes=0)
        - tpu.fixed_ms
        - n * tpu.layer_ms(layer)
        for n in (fitting, fitting + 1, fitting + 2)
    ]
    assert times[0] == pytest.approx(0, abs=1e-12)
    excess = (fitting + 1) * each - tpu.cache_bytes
    assert times[1] == pytest.approx(tpu.streaming_ms_per_byte * excess)
    assert times[2] - times[1] == pytest.approx(tpu.streaming_ms_per_byte * each)


def test_half_the_clock_doubles_the_ops_and_leaves_the_bus():
    fast, slow = EdgeTpu.load(), EdgeTpu.load(clock_mhz=250)
    layer = conv(32, 16, 16, kernel=3)
    assert slow.layer_ms(layer) == pytest.approx(2 * fast.layer_ms(layer))
    assert slow.network_ms([], input_bytes=7, output_bytes=5) == fast.network_ms(
        [], input_bytes=7, output_bytes=5
    )


def test_usb2_is_the_slowest_host_for_a_network_beyond_the_cache():
    layers = [conv(1, 4096, 4096, op="fc")]
    times = {
        host: EdgeTpu.load(host).network_ms(layers, input_bytes=150_528, output_bytes=1000)
        for host in CONSTANTS.hosts
    }
    assert set(times) == {"usb3-desktop", "pcie-devboard", "pcie-desktop", "usb2-raspberry-pi"}
    assert max(times, key=times.__getitem__) == "usb2-raspberry-pi"
    assert EdgeTpu.load("usb2-raspberry-pi").streaming_ms_per_byte == pytest.approx(31e-6)


# ---- published networks and scores


@needs_networks
def test_the_simulator_reproduces_the_published_latencies():
    report = score_networks(NETWORKS)
    assert report["all"]["n"] == len(report["networks"]) == 79
    assert report["all"]["mape"] <= 9
    assert report["groups"]["coral"]["mape"] <= 9
    assert report["all"]["spearman"] >= 0.985
    assert report["leave_one_out"]["all"]["mape"] <= 9
    stored = json.loads((ROOT / "latency_tables/edgetpu_constants.json").read_text())
    assert report["all"]["mape"] == pytest.approx(stored["fit"]["all"]["mape"], rel=1e-3)


@needs_networks
def test_the_fits_array_formula_equals_the_packages():
    spec = importlib.util.spec_from_file_location("fit_edgetpu", ROOT / "tools/fit_edgetpu.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    start = {name: value for name, (value, _, _) in tool.BOUNDS.items()}
    networks = read_networks(NETWORKS)
    constants = tool.constants_from(start)
    expected = [tool.predict_ms(network, constants) for network in networks]
    np.testing.assert_allclose(tool.Features(networks).predict(start), expected, rtol=1e-12)


def test_a_score_holds_known_errors():
    fits, misses = network()["networks"][0], network(group="b")["networks"][0]
    layers = [Layer(*layer) for layer in fits["layers"]]
    time = EdgeTpu(CONSTANTS).network_ms(layers, input_bytes=100, output_bytes=10)
    report = score_networks({"networks": [
        {**fits, "measured_ms": time}, {**misses, "measured_ms": 2 * time},
    ]})  # fmt: skip
    assert report["groups"]["a"]["mape"] == pytest.approx(0, abs=1e-9)
    assert report["groups"]["b"]["max_ape"] == pytest.approx(50)
    assert report["all"]["mape"] == report["all"]["median_ape"] == pytest.approx(25)
    assert report["groups"]["a"]["spearman"] is None
    assert report["networks"][1]["predicted_ms"] == pytest.approx(time)
    json.dumps(report, allow_nan=False)


def test_spearman_averages_ties():
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 90.0])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1)
    # Ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    tied = spearman(np.array([7.0, 7.0, 8.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert tied == pytest.approx(math.sqrt(0.9))
    assert spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) is None


@pytest.mark.parametrize(
    ("device", "bus", "host"),
    [
        ("USB Accelerator", "USB 3", "usb3-desktop"),
        ("USB Accelerator", "USB2", "usb2-raspberry-pi"),
        ("Coral Dev Board", "PCIe", "pcie-devboard"),
        ("Edge TPU", "", "pcie-devboard"),
        ("Edge TPU", "PCIe (inferred)", "pcie-desktop"),
    ],
)
def test_a_published_bus_names_the_simulated_host(device, bus, host):
    assert read_networks(network(device=device, bus=bus))[0].host == host


def test_streamed_bytes_not_published_are_derived_from_the_cache():
    wide = [["fc", 1, 1, 4096, 1, 1, 4096, 1, 1, 1]]
    (published,) = score_networks(network(layers=wide))["networks"]
    (derived,) = score_networks(network(layers=wide, offchip_param_bytes=...))["networks"]
    assert derived["predicted_ms"] > published["predicted_ms"] + 10


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ...}, r"network 0 \(no model\): model must be text, got None"),
        ({"measured_ms": ...}, r"\(tiny\): measured_ms must be a number of 0 or more, got None"),
        ({"measured_ms": -1.0}, r"measured_ms must be a number of 0 or more, got -1.0"),
        ({"measured_ms": 0}, r"measured_ms must be positive, got 0"),
        ({"input_bytes": math.nan}, r"input_bytes must be a number of 0 or more, got nan"),
        ({"output_bytes": True}, r"output_bytes must be a number of 0 or more, got True"),
        ({"offchip_param_bytes": "3"}, r"offchip_param_bytes must be a number .* got '3'"),
        ({"bus": "SPI"}, r"\(tiny\): bus must be USB 2, USB 3, PCIe or empty, got 'SPI'"),
        ({"layers": []}, r"layers must be a non-empty list, got \[\]"),
        ({"layers": [["conv", 1, 1]]}, r"\(tiny\): layers\[0\]: expected 10 values"),
        ({"layers": [["gelu", *[1] * 9]]}, r"layers\[0\]: unknown op 'gelu'; known: conv, dw"),
        ({"layers": [["conv", 0, *[1] * 8]]}, r"layers\[0\]: sizes must be whole numbers of 1"),
    ],
)
def test_a_wrong_network_is_refused_by_name_and_field(changes, message):
    with pytest.raises(ValueError, match=message):
        score_networks(network(**changes))


def test_files_that_hold_no_networks_are_refused(tmp_path):
    path = tmp_path / "networks.json"
    with pytest.raises(FileNotFoundError, match=r"no file .*networks.json"):
        score_networks(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"networks.json: not valid JSON"):
        score_networks(path)
    path.write_text('{"networks": []}')
    with pytest.raises(ValueError, match='a JSON object with a non-empty list "networks"'):
        score_networks(path)
    with pytest.raises(ValueError, match="network 0: expected an object, got 3"):
        score_networks({"networks": [3]})


def test_unknown_ops_hosts_clocks_and_negative_bytes_are_refused():
    tpu = EdgeTpu(CONSTANTS)
    with pytest.raises(ValueError, match="unknown Edge TPU op 'lstm'; known: conv, dw, fc"):
        tpu.layer_ms(conv(8, 8, 8, op="lstm"))
    with pytest.raises(
        ValueError, match="unknown Edge TPU host 'usb3-desk'; did you mean usb3-desktop"
    ):
        EdgeTpu.load("usb3-desk")
    with pytest.raises(ValueError, match="runs at 500 or 250 MHz, got 400"):
        EdgeTpu.load(clock_mhz=400)
    with pytest.raises(ValueError, match="off-chip bytes of 0 or more, got -1, 0 and 0"):
        tpu.network_ms([], input_bytes=-1, output_bytes=0)


def test_constants_out_of_range_or_incomplete_are_refused(tmp_path):
    with pytest.raises(ValueError, match="host constant fixed_ms must be 0 or more, got -1"):
        HostConstants(
            fixed_ms=-1.0,
            input_ns_per_byte=1.0,
            output_ns_per_byte=1.0,
            streaming_ns_per_byte=1.0,
        )
    path = tmp_path / "constants.json"
    values = json.loads((ROOT / "latency_tables/edgetpu_constants.json").read_text())
    path.write_text(json.dumps({**values, "chip": {**values["chip"], "cache_bytes": 0.0}}))
    with pytest.raises(ValueError, match="Edge TPU constant cache_bytes must be positive, got 0"):
        EdgeTpuConstants.load(path)
    path.write_text(json.dumps({"chip": values["chip"]}))
    with pytest.raises(ValueError, match=r"expected Edge TPU constants \('hosts'\); refit with"):
        EdgeTpuConstants.load(path)


def test_shipped_constants_tell_where_they_come_from():
    assert CONSTANTS.provenance["num_networks"] == 79
    assert {"data", "date", "method", "script", "units"} <= set(CONSTANTS.provenance)
    assert CONSTANTS.leave_one_out["all"]["n"] == 79
