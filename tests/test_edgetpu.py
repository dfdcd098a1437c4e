import csv
import importlib.util
import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.latency.edgetpu import (
    CLOCKS_MHZ,
    ON_CHIP_BYTES,
    OPS,
    WINDOW_OPS,
    EdgeTpu,
    EdgeTpuConstants,
    HostConstants,
    Layer,
    OutsideCalibration,
    activation_bytes,
    beyond_memory,
    split_units,
    work,
)
from oneshot_ednas.latency.published import read_networks, score, score_networks

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / os.environ.get("ONESHOT_EDNAS_SHARED_DATA", "../shared/data") / "edgetpu"
NETWORKS = DATA / "networks.json"
needs_networks = pytest.mark.skipif(not NETWORKS.is_file(), reason="no published networks here")
laws = settings(deadline=None, derandomize=True, max_examples=60)
sizes = st.integers(1, 70)
CONSTANTS = EdgeTpuConstants.load()
# Round numbers, so that times can be worked out by hand.
ROUND = EdgeTpu(
    EdgeTpuConstants(
        conv_ns_per_unit=1.0,
        depthwise_ns_per_unit=8.0,
        bytes_per_ns=16.0,
        window_overhead_ns=20_000.0,
        cache_bytes=1000.0,
        hosts={
            "usb3-desktop": HostConstants(
                fixed_ms=0.5,
                input_ns_per_byte=2.0,
                output_ns_per_byte=10.0,
                streaming_ns_per_byte=3.0,
            )
        },
    )
)


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


@pytest.mark.parametrize(
    ("layer", "units", "moved"),
    [
        # 64x64 over 4x4 tiles is 256 pixels; 7 groups of 16 channels; 9 taps; 25 groups of 4.
        (conv(64, 100, 100, kernel=3), (256 * 7 * 9 * 25, 0), 2 * 4096 * 100),
        # 32x32 over the tiles is 64 pixels; 3 channels are stored as 4.
        (conv(64, 3, 32, kernel=3, stride=2), (64 * 2 * 9, 0), 4096 * 4 + 1024 * 32),
        # One pixel: the tiles share the 63 groups of channels, 4 each; weights padded to 64.
        (Layer("fc", 1, 1, 1024, 1, 1, 1000, 1, 1, 1), (256 * 4, 0), 2024 + 1024 * 1024),
        (Layer("fc", 1, 1, 6, 1, 1, 3, 1, 1, 1), (2, 0), 8 + 4 + 8 * 64),
        # 3 units a pixel at 3x3, 5 at stride 2; 25 / 3 and 25 / 1.8 rounded up at 5x5.
        (conv(64, 32, 32, kernel=3, op="dw"), (0, 3 * 256 * 8), 2 * 4096 * 32),
        (conv(64, 32, 32, kernel=3, stride=2, op="dw"), (0, 5 * 64 * 8), 5120 * 32),
        (conv(64, 32, 32, kernel=5, op="dw"), (0, 9 * 256 * 8), 2 * 4096 * 32),
        (conv(64, 32, 32, kernel=5, stride=2, op="dw"), (0, 14 * 64 * 8), 5120 * 32),
        # 4 inputs, each spread over 2x2 outputs.
        (conv(8, 16, 32, kernel=2, op="tconv"), (4 * 4 * 4 * 2, 0), 64 * 48),
        (conv(16, 24, 24, kernel=3, stride=2, op="pool"), (0, 5 * 4 * 6), 320 * 24),
        (Layer("pool", 7, 7, 64, 1, 1, 64, 7, 7, 1), (0, 0), 50 * 64),
        (conv(8, 16, 16, op="add"), (0, 0), 3 * 64 * 16),
        (conv(8, 16, 16, op="mul"), (0, 0), 2 * 64 * 16),
        (Layer("resize", 8, 8, 30, 16, 16, 30, 1, 1, 1), (0, 0), (64 + 256) * 32),
        (Layer("concatenation", 8, 8, 48, 8, 8, 48, 1, 1, 1), (0, 0), 2 * 64 * 48),
    ],
    ids=str,
)
def test_work_of_known_ops_matches_hand_computed(layer, units, moved):
    assert work(layer) == (*units, moved)


@pytest.mark.parametrize(
    ("layer", "time_us"),
    [
        (conv(64, 100, 100, kernel=3), 403.2),  # its units
        (conv(64, 4, 4), 2 * 4096 * 4 / 16e3),  # bound by what it moves: 256 units are less
        (conv(64, 32, 32, kernel=3, op="dw"), 8 * 6.144 + 20),
        (conv(16, 24, 24, kernel=3, stride=2, op="pool"), 8 * 0.12 + 20),
        (Layer("pool", 7, 7, 64, 1, 1, 64, 7, 7, 1), 3200 / 16e3 + 20),
        (conv(8, 16, 16, op="add"), 3072 / 16e3),
        (Layer("resize", 8, 8, 30, 16, 16, 30, 1, 1, 1), 10240 / 16e3),
        (Layer("fc", 1, 1, 1024, 1, 1, 1000, 1, 1, 1), (2024 + 1024 * 1024) / 16e3),
    ],
    ids=str,
)
def test_times_of_known_ops_match_hand_computed(layer, time_us):
    assert ROUND.layer_ms(layer) == pytest.approx(time_us * 1e-3)


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


@pytest.mark.skipif(not (DATA / "estimated_cycles.csv").is_file(), reason="no estimates here")
def test_units_of_mobilenet_v2_are_the_compilers_cycles_within_a_thousandth():
    rows = csv.DictReader((DATA / "estimated_cycles.csv").read_text().splitlines())
    (row,) = (r for r in rows if r["model"] == "model_mobilenet_v2_wo_fc_256x256x3")
    # Table 2 of Sandler et al. 2018: expansion, channels, repeats, stride of the first block.
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
    table += [(6, 160, 3, 2), (6, 320, 1, 1)]
    layers = [conv(256, 3, 32, kernel=3, stride=2)]
    size, channels = 128, 32
    for expand, out_channels, repeats, first_stride in table:
        for stride in [first_stride] + [1] * (repeats - 1):
            block = ibn(size, channels, out_channels, expand=expand, kernel=3, stride=stride)
            layers += block if expand > 1 else block[1:]
            size, channels = size // stride, out_channels
    layers.append(conv(size, channels, 1280))
    assert size == 8
    units = [sum(column) for column in zip(*map(work, layers), strict=True)]
    assert units[:2] == [int(row["conv_units"]), int(row["dw_units"])]
    cycles = int(row["compiler_estimated_cycles_64bit"])
    assert cycles == 528_640
    assert units[0] + units[1] == pytest.approx(cycles, rel=1e-3)


@laws
@given(st.sampled_from(OPS), sizes, st.integers(1, 200), st.sampled_from([1, 3, 5]))
def test_every_op_takes_time_more_than_its_overhead(op, size, channels, kernel):
    time = EdgeTpu(CONSTANTS).layer_ms(conv(size, channels, channels, kernel=kernel, op=op))
    assert time > (CONSTANTS.window_overhead_ns * 1e-6 if op in WINDOW_OPS else 0)


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
    ("size", "channels", "out_channels", "stride", "typical", "all_of_them"),
    [
        (128, 16, 24, 2, (0.2, 0.3), (0.2, 0.3)),
        (64, 24, 24, 1, (0.5, 0.65), (0.5, 0.65)),
        (32, 40, 40, 1, (0.75, 0.85), (0.65, 0.9)),
        (16, 80, 80, 1, (1.1, 1.4), (0.95, 1.5)),
        (8, 192, 192, 1, (1.5, 2.7), (1.5, 2.9)),
    ],
)
def test_fused_blocks_win_on_large_maps_and_lose_on_small_ones(
    size, channels, out_channels, stride, typical, all_of_them
):
    ratios = []
    for kernel in (3, 5):
        for expand in (3, 6):
            options = {"expand": expand, "kernel": kernel, "stride": stride}
            plain, fused = (
                sum(
                    map(EdgeTpu(CONSTANTS).layer_ms, block(size, channels, out_channels, **options))
                )
                for block in (ibn, fused_ibn)
            )
            ratios.append(fused / plain)
    assert typical[0] <= np.median(ratios) <= typical[1]
    assert all_of_them[0] <= min(ratios) <= max(ratios) <= all_of_them[1]


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


@pytest.mark.parametrize("clock_mhz", CLOCKS_MHZ)
@pytest.mark.parametrize("host", CONSTANTS.hosts)
def test_every_host_and_clock_prices_the_same_ops_with_its_own_bus(host, clock_mhz):
    tpu, bus = EdgeTpu.load(host, clock_mhz), CONSTANTS.hosts[host]
    layers = [conv(16, 64, 64, kernel=3), conv(16, 64, 64, kernel=3, op="dw")]
    time = tpu.network_ms(layers, input_bytes=7, output_bytes=5, offchip_parameter_bytes=11)
    ops_ms = sum(map(EdgeTpu.load().layer_ms, layers)) * 500 / clock_mhz
    bus_ns = 7 * bus.input_ns_per_byte + 5 * bus.output_ns_per_byte + 11 * bus.streaming_ns_per_byte
    assert time == pytest.approx(bus.fixed_ms + ops_ms + bus_ns * 1e-6)


def test_a_networks_time_matches_a_hand_computed_one():
    # 4 units; 4 x 4 weights, padded to 64 outputs, and 64 x 8 bytes of biases: 768 bytes each.
    layers = [conv(8, 4, 4), conv(8, 4, 4)]
    assert ROUND.parameter_bytes(layers[0]) == 64 * (4 + 8) == 768
    # 2 x 64 x 4 bytes moved take 32 ns; 536 bytes exceed the cache.
    expected_ns = 500_000 + 2 * 192 + 10 * 256 + 3 * (2 * 768 - 1000) + 2 * 32
    time = ROUND.network_ms(layers, input_bytes=192, output_bytes=256)
    assert time == pytest.approx(expected_ns * 1e-6)


def test_layers_beyond_the_on_chip_memory_are_warned_of_once():
    full = conv(128, 96, 96)  # 128 x 128 x 192 bytes are the 3 MiB
    assert activation_bytes(full) == ON_CHIP_BYTES
    beyond, more = conv(128, 97, 96), conv(128, 110, 96)
    layers = [full, beyond, more, beyond]
    message = (
        "input + output of 2 of 3 distinct layers pass the 3 MiB on chip, outside the calibrated "
        "range; the largest, conv k1 s1 110->96 at 128x128, has 3.25 MiB"
    )
    with pytest.warns(OutsideCalibration) as warned:
        EdgeTpu(CONSTANTS).network_ms(layers, input_bytes=0, output_bytes=0)
    assert [str(one.message) for one in warned] == [message]
    assert beyond_memory([full]) == beyond_memory([]) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EdgeTpu(CONSTANTS).network_ms([full], input_bytes=0, output_bytes=0)


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
    assert report["all"]["mape"] <= 6
    assert report["groups"]["coral"]["mape"] <= 4
    assert report["all"]["spearman"] >= 0.99
    left_out = report["leave_one_out"]
    assert left_out["all"]["mape"] <= 7
    assert left_out["groups"]["coral"]["mape"] <= 5
    assert left_out["groups"]["coral"]["spearman"] >= 0.99
    stored = json.loads((ROOT / "latency_tables/edgetpu_constants.json").read_text())
    assert report["all"]["mape"] == pytest.approx(stored["fit"]["all"]["mape"], rel=1e-3)


@needs_networks
def test_networks_of_the_fit_are_scored_without_warnings():
    assert any(beyond_memory(network.layers) for network in read_networks(NETWORKS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_networks(NETWORKS)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("fit_edgetpu", ROOT / "tools/fit_edgetpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def features(tool):
    return tool.Features(read_networks(NETWORKS))


@needs_networks
def test_the_fits_array_formula_equals_the_packages(tool, features):
    start = {name: value for name, (value, _, _) in tool.BOUNDS.items()}
    constants = tool.constants_from(start)
    expected = [tool.predict_ms(network, constants) for network in read_networks(NETWORKS)]
    np.testing.assert_allclose(features.predict(start), expected, rtol=1e-12)


@needs_networks
def test_a_fresh_fit_gives_the_shipped_constants(tool, features):
    fitted = {name: float(f"{value:.4g}") for name, value in tool.fit(features).items()}
    constants = tool.constants_from(fitted)
    for name in ("conv_ns_per_unit", "depthwise_ns_per_unit", "bytes_per_ns", "window_overhead_ns"):
        assert getattr(constants, name) == pytest.approx(getattr(CONSTANTS, name), rel=1e-3)
    for host, values in CONSTANTS.hosts.items():
        assert vars(constants.hosts[host]) == pytest.approx(vars(values), rel=1e-3)


@needs_networks
@settings(deadline=None, derandomize=True, max_examples=5)
@given(st.data())
def test_the_fit_ends_at_one_optimum_from_any_start(tool, features, data):
    start = {
        name: low * (high / low) ** data.draw(st.floats(0, 1), label=name)
        for name, (_, low, high) in tool.BOUNDS.items()
    }
    best, found = tool.fit(features), tool.fit(features, start=start)
    losses = [
        np.hypot(features.predict(p) / features.measured - 1, tool.SMOOTHING)
        @ features.weight(np.ones(79))
        for p in (best, found)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert all(low <= found[name] <= high for name, (_, low, high) in tool.BOUNDS.items())


@needs_networks
def test_leaving_each_network_out_gives_the_shipped_errors(tool, features):
    networks = read_networks(NETWORKS)
    found = score(networks, tool.leave_one_out(features).tolist())
    assert found["hosts"].keys() == set(tool.FITTED_HOSTS)
    stored = CONSTANTS.leave_one_out
    assert found["all"] == pytest.approx(stored["all"], rel=1e-3)
    for part in ("groups", "hosts"):
        assert found[part].keys() == stored[part].keys()
        for name, errors in found[part].items():
            assert errors == pytest.approx(stored[part][name], rel=1e-3), name


@needs_networks
def test_a_network_without_a_vote_is_not_in_the_fit(tool, features):
    networks = read_networks(NETWORKS)
    votes = np.ones(79)
    votes[3] = 0
    rest = tool.fit(tool.Features([*networks[:3], *networks[4:]]))
    assert tool.fit(features, votes) == pytest.approx(rest, rel=1e-6)
    # Two votes are two copies.
    votes[3] = 2
    twice = tool.fit(tool.Features([*networks, networks[3]]))
    assert tool.fit(features, votes) == pytest.approx(twice, rel=1e-6)


@needs_networks
def test_bootstrap_ranges_repeat_and_lie_in_the_bounds(tool, features, monkeypatch):
    monkeypatch.setattr(tool, "REFITS", 4)
    ranges = tool.bootstrap_ranges(features)
    assert ranges == tool.bootstrap_ranges(features)
    assert ranges.keys() == tool.BOUNDS.keys() == CONSTANTS.ranges.keys()
    for name, (low, high) in ranges.items():
        assert tool.BOUNDS[name][1] * (1 - 1e-9) <= low <= high <= tool.BOUNDS[name][2] * (1 + 1e-9)
    assert any(low < high for low, high in ranges.values())


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
    path.write_text(json.dumps({**values, "ranges": {"bytes_per_ns": [3.0, 2.0]}}))
    with pytest.raises(
        ValueError, match=r"range of bytes_per_ns must be \[low, high\], got \[3.0, 2"
    ):
        EdgeTpuConstants.load(path)
    path.write_text(json.dumps({**values, "ranges": {"bytes_per_ns": 3.0}}))
    with pytest.raises(ValueError, match=r"constants.json: expected Edge TPU constants"):
        EdgeTpuConstants.load(path)
    path.write_text(json.dumps({"chip": values["chip"]}))
    with pytest.raises(ValueError, match=r"expected Edge TPU constants \('hosts'\); refit with"):
        EdgeTpuConstants.load(path)


def test_shipped_constants_tell_where_they_come_from():
    assert CONSTANTS.provenance["num_networks"] == 79
    assert {"data", "date", "method", "script", "units"} <= set(CONSTANTS.provenance)
    assert CONSTANTS.leave_one_out["all"]["n"] == 79


def test_shipped_constants_lie_in_their_ranges():
    assert len(CONSTANTS.ranges) == 12
    for name, (low, high) in CONSTANTS.ranges.items():
        host, _, constant = name.rpartition(".")
        value = getattr(CONSTANTS.hosts[host] if host else CONSTANTS, constant)
        assert low <= value <= high, name
