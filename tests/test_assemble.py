"""Measurements to a table: a known truth is measured with and without noise, and found again."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import IMAGE_SIZE, OUT_CHANNELS
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.bundle.assemble import RESOLUTION_MS, Assembled, assemble_table
from oneshot_ednas.bundle.build import random_networks
from oneshot_ednas.bundle.manifest import (
    Bundle,
    ModelFile,
    NetworkModel,
    OperationModels,
)
from oneshot_ednas.bundle.measurements import read_measurements
from oneshot_ednas.bundle.models import layout_adds, layout_of
from oneshot_ednas.bundle.robust import fit_nonnegative, jackknife
from oneshot_ednas.correlation import kendall_tau, spearman
from oneshot_ednas.latency.operations import (
    Operation,
    distinct_operations,
    network_io_bytes,
    network_operations,
)
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.schema import to_plain
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.store import write_json, write_text

SPACE = SearchSpace.from_yaml("""
name: mini
stem_filters: 4
options: {ops: [ibn, fused_ibn], kernel_sizes: [3], expand_ratios: [2, 3]}
blocks:
  - {stride: 1, kernel_size: 3, filters: 4, expand_ratio: 2, options: {filters: [4, 6]}}
  - {stride: 2, kernel_size: 3, filters: 4, expand_ratio: 2, options: {filters: [4, 6]}}
fusion: {tap_blocks: [1, 2], num_levels: 3, channels: 4, num_repeats: 2}
head: {num_convs: 1}
""")
"""64 architectures."""
ROWS = distinct_operations(SPACE, IMAGE_SIZE, OUT_CHANNELS)
EXTRA = sorted({add for row in ROWS for add in layout_adds(row)}.difference(ROWS))
MANY = random_networks(SPACE, 48, seed=1)
ARCHITECTURES = MANY[:24]
PLACED = {
    architecture: [
        placed.operation
        for placed in network_operations(SPACE, architecture, IMAGE_SIZE, OUT_CHANNELS)
    ]
    for architecture in MANY
}
COPIES = (2, 8)

SESSION = {
    "type": "session",
    "format": 1,
    "unit": "ms",
    "bundle": "d" * 64,
    "device": "toy board",
    "machine": "Toy CPU 3, x86_64, Toy Linux 1",
    "host": "Toy CPU 3",
    "runtime": "ai_edge_litert",
    "runtime_version": "2.3.0",
    "python": "3.11.7",
    "numpy": "2.4.6",
    "delegate": None,
    "kernels": "default",
    "threads": 1,
    "clock_mhz": None,
    "compiler": None,
    "date": "2024-05-01",
}
EDGETPU = SESSION | {
    "device": "Coral Edge TPU",
    "delegate": "libedgetpu.so.1",
    "clock_mhz": 500,
    "compiler": "16.0.384591198",
}


# A device that is known exactly ---------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Times by the model that `assemble_table` documents."""

    rows: dict[Operation, float]
    parameter_bytes: dict[Operation, int]
    single_ms: float = 0.01
    fixed_ms: float = 0.4
    input_ms_per_byte: float = 3e-7
    output_ms_per_byte: float = 2e-6
    row_scale: float = 1.15
    streaming_ms_per_byte: float = 0.0
    cache_bytes: float = math.inf

    def streamed(self, size: float) -> float:
        return max(0.0, size - self.cache_bytes)

    def operation_ms(self, entry: OperationModels, copies: int) -> float:
        o = entry.operation
        return (
            self.single_ms
            + self.input_ms_per_byte * o.in_channels * o.in_height * o.in_width
            + self.output_ms_per_byte * o.out_channels * o.out_height * o.out_width
            + copies * self.rows[o]
            + (copies - 1) * sum(self.rows[add] for add in entry.adds)
            + self.streaming_ms_per_byte * self.streamed(copies * self.parameter_bytes[o])
        )

    def network_ms(self, network: NetworkModel) -> float:
        input_bytes, output_bytes = network_io_bytes(SPACE, IMAGE_SIZE, OUT_CHANNELS)
        return (
            self.fixed_ms
            + self.input_ms_per_byte * input_bytes
            + self.output_ms_per_byte * output_bytes
            + self.row_scale * sum(self.rows[o] for o in PLACED[network.architecture])
            + self.streaming_ms_per_byte * self.streamed(self.network_bytes(network))
        )

    def network_bytes(self, network: NetworkModel) -> int:
        return sum(self.parameter_bytes[o] for o in PLACED[network.architecture])

    def models(self, bundle: Bundle) -> dict[str, tuple[float, float]]:
        """Milliseconds and parameter bytes of every model."""
        found = {}
        for entry in bundle.operations:
            for file in entry.files:
                size = file.copies * self.parameter_bytes[entry.operation]
                found[file.model] = (self.operation_ms(entry, file.copies), size)
        for network in bundle.networks:
            found[network.model] = (self.network_ms(network), self.network_bytes(network))
        return found


def random_device(seed: int = 0, **terms: float) -> Device:
    generator = np.random.default_rng(seed)
    rows, sizes = {}, {}
    for operation in (*ROWS, *EXTRA):
        # Blocks, of which an architecture has a choice, cost most.
        size = {"ibn": 10, "fused_ibn": 10, "conv": 1, "separable_conv": 1}.get(operation.op, 0)
        rows[operation] = float(np.exp(generator.uniform(-4, -2))) * max(1, size)
        sizes[operation] = int(generator.integers(100, 500)) * size
    return Device(rows, sizes, **terms)


# About half of the networks exceed the cache, and so do many files with 8 copies.
STREAMING = {"streaming_ms_per_byte": 2e-5, "cache_bytes": 10_000.0}


def write_bundle(folder: Path, device: Device, architectures=ARCHITECTURES) -> Bundle:
    """A bundle whose models are empty files: assembling reads the manifest alone."""
    entries = [
        OperationModels(
            operation=operation,
            layout=layout_of(operation),
            adds=layout_adds(operation),
            files=tuple(
                ModelFile(copies=count, model=f"operations/{number:03d}_x{count}.tflite")
                for count in COPIES
            ),
            weight_bytes=device.parameter_bytes[operation],
            is_row=operation in ROWS,
        )
        for number, operation in enumerate((*ROWS, *EXTRA))
    ]
    networks = [
        NetworkModel(architecture=architecture, model=f"networks/{number:03d}.tflite")
        for number, architecture in enumerate(architectures)
    ]
    models = [file.model for entry in entries for file in entry.files]
    models += [network.model for network in networks]
    bundle = Bundle(
        digest=SESSION["bundle"],
        space=SPACE.name,
        image_height=IMAGE_SIZE[0],
        image_width=IMAGE_SIZE[1],
        out_channels=OUT_CHANNELS,
        seed=0,
        models=tuple(models),
        operations=tuple(entries),
        networks=tuple(networks),
    )
    write_json(folder / "manifest.json", bundle.to_json())
    write_text(folder / "space.yaml", SPACE.to_yaml())
    for model in models:
        (folder / model).parent.mkdir(exist_ok=True)
        (folder / model).touch()
    return bundle


def model_line(model: str, number: int, ms: float, spread_ms: float = 0.0) -> dict:
    times = {"median_ms": ms, "spread_ms": spread_ms, "min_ms": ms}
    return {"type": "model", "model": model, "round": number, "runs": 30, **times}


def measure(
    device: Device, bundle: Bundle, *, session=SESSION, rounds=1, noise=0.0, spikes=0.0, seed=0
) -> list[dict]:
    """Lines as `measure.py` writes them: noise, rare spikes, and rounds that drift."""
    generator = np.random.default_rng(seed)
    lines, models = [session], device.models(bundle)
    for number in range(rounds):
        drift = 1 + noise * generator.standard_normal()
        for model, (ms, _) in models.items():
            factor = drift * (1 + noise * generator.standard_normal())
            factor *= generator.uniform(2, 3) if generator.random() < spikes else 1
            lines.append(model_line(model, number, ms * factor, noise * ms))
    return lines


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_compiled(folder: Path, device: Device, bundle: Bundle) -> None:
    lines = []
    for model, (_, size) in device.models(bundle).items():
        off_chip = round(device.streamed(size))
        sizes = {"on_chip_bytes": size - off_chip, "off_chip_bytes": off_chip}
        kinds = {"mapped": 3, "unmapped": 0, "compiler": EDGETPU["compiler"]}
        lines.append({"model": model, "compiled": f"compiled/{model}", **sizes, **kinds})
    write_lines(folder / "compiled.jsonl", lines)


def assemble(folder: Path, lines: list[dict], **options) -> Assembled:
    return assemble_table(folder, [write_lines(folder / "measured.jsonl", lines)], **options)


@pytest.fixture
def device() -> Device:
    return random_device()


@pytest.fixture
def bundle(tmp_path, device) -> Bundle:
    return write_bundle(tmp_path, device)


def check_terms(found: Assembled, device: Device, rel: float) -> None:
    header = found.table.header
    assert header.fixed_ms == pytest.approx(device.fixed_ms, rel=rel)
    assert header.row_scale == pytest.approx(device.row_scale, rel=rel)
    for name in ("input_ms_per_byte", "output_ms_per_byte", "streaming_ms_per_byte"):
        expected = pytest.approx(getattr(device, name), rel=rel, abs=1e-15)
        assert getattr(header, name) == expected
        assert found.report.terms[name].value == getattr(header, name)
    assert found.report.terms["single_ms"].value == pytest.approx(device.single_ms, rel=rel)


# A truth without noise is found exactly -------------------------------------------------------


@settings(max_examples=3)
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(0.3, 3),
    fixed_ms=st.sampled_from([0.0, 0.4, 5.0]),
    per_byte=st.sampled_from([0.0, 1e-6]),
)
def test_rows_and_terms_are_found_on_a_cpu(tmp_path_factory, seed, scale, fixed_ms, per_byte):
    device = random_device(
        seed, row_scale=scale, fixed_ms=fixed_ms, input_ms_per_byte=per_byte, single_ms=fixed_ms
    )
    folder = tmp_path_factory.mktemp("bundle")
    found = assemble(folder, measure(device, write_bundle(folder, device)), seed=seed)
    table, report = found.table, found.report
    assert sorted(table.rows) == ROWS
    for operation, row in table.rows.items():
        expected = scale * device.rows[operation]
        assert row.latency_ms == pytest.approx(expected, rel=1e-9), operation
        assert row.parameter_bytes == device.parameter_bytes[operation]
        assert row.spread_ms == 0
    header = table.header
    assert header.fixed_ms == pytest.approx(fixed_ms, rel=1e-9, abs=1e-9)
    assert header.row_scale == pytest.approx(scale, rel=1e-9)
    assert header.input_ms_per_byte == pytest.approx(per_byte, rel=1e-7, abs=1e-15)
    assert header.output_ms_per_byte == pytest.approx(2e-6, rel=1e-7)
    assert (header.streaming_ms_per_byte, header.cache_bytes) == (0, 0)
    assert report.held_out_mape < 1e-8
    assert report.fit_mape < 1e-8
    assert report.held_out_spearman == pytest.approx(1)
    assert report.held_out_kendall_tau == pytest.approx(1)
    assert (report.clamped, report.missing, report.failures) == ((), (), {})
    assert all(term.standard_error < 1e-8 for term in report.terms.values())


@pytest.mark.parametrize("seed", range(2))
def test_streaming_is_found_with_rows_and_cache(tmp_path, seed):
    device = random_device(seed, **STREAMING)
    bundle = write_bundle(tmp_path, device)
    write_compiled(tmp_path, device, bundle)
    streams = [device.streamed(device.models(bundle)[n.model][1]) > 0 for n in bundle.networks]
    assert 8 < sum(streams) < 22
    copied = [
        e for e in bundle.operations if device.parameter_bytes[e.operation] * 8 > device.cache_bytes
    ]
    assert copied
    found = assemble(tmp_path, measure(device, bundle, session=EDGETPU))
    check_terms(found, device, rel=1e-7)
    assert found.table.header.cache_bytes == pytest.approx(device.cache_bytes, abs=2)
    for operation, row in found.table.rows.items():
        expected = device.row_scale * device.rows[operation]
        # The compiler reports whole bytes.
        assert row.latency_ms == pytest.approx(expected, rel=1e-5)
        assert row.parameter_bytes == device.parameter_bytes[operation]
    assert found.report.held_out_mape < 1e-2
    header = found.table.header
    assert (header.delegate, header.clock_mhz) == ("libedgetpu.so.1", 500)
    assert header.compiler == "16.0.384591198"


def test_a_cache_that_differs_between_networks_is_taken_at_its_median(tmp_path):
    device = random_device(**STREAMING)
    bundle = write_bundle(tmp_path, device)
    write_compiled(tmp_path, device, bundle)
    path = tmp_path / "compiled.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    networks = [line for line in lines if line["model"].startswith("networks/")]
    networks.sort(key=lambda line: line["off_chip_bytes"])
    for line in networks[-2:]:
        line["off_chip_bytes"] //= 2
    write_lines(path, lines)
    found = assemble(tmp_path, measure(device, bundle, session=EDGETPU))
    assert found.table.header.cache_bytes == pytest.approx(device.cache_bytes, abs=2)


def test_the_table_prices_networks_as_the_report_says(tmp_path, device, bundle):
    found = assemble(tmp_path, measure(device, bundle, noise=0.02))
    found.table.save(tmp_path / "table.csv")
    table = LatencyTable.load(tmp_path / "table.csv")
    assert table.header == found.table.header
    assert table.rows.keys() == found.table.rows.keys()
    assert len(found.report.networks) == len(bundle.networks)
    for network, scored in zip(bundle.networks, found.report.networks, strict=True):
        assert scored.model == network.model
        expected = table.latency_ms(SPACE, network.architecture)
        assert scored.predicted_ms == pytest.approx(expected, rel=1e-5)
    kept = [network for network in found.report.networks if network.is_held_out]
    truth = np.array([network.measured_ms for network in kept])
    predicted = np.array([network.predicted_ms for network in kept])
    header = found.table.header
    assert header.held_out_mape == round(100 * np.mean(np.abs(predicted / truth - 1)), 4)
    assert header.held_out_spearman == round(spearman(predicted, truth), 4)
    assert header.held_out_kendall_tau == round(kendall_tau(predicted, truth), 4)
    assert header.held_out_spearman != header.held_out_kendall_tau
    # Half the interquartile range of both files, over six copies and all.
    entry = next(e for e in bundle.operations if e.operation.residual)
    times = [0.02 * device.operation_ms(entry, copies) for copies in COPIES]
    spread_ms = header.row_scale * math.hypot(*times) / 6
    assert found.table.rows[entry.operation].spread_ms == pytest.approx(spread_ms)


def test_the_header_says_where_the_times_are_from(tmp_path, device, bundle):
    lines = measure(device, bundle, rounds=2)
    lines.insert(20, SESSION | {"date": "2024-05-02", "python": "3.12.1"})
    header = assemble(tmp_path, lines).table.header
    assert (header.source, header.unit, header.device) == ("measured", "ms", "toy board")
    assert (header.machine, header.host) == (SESSION["machine"], "Toy CPU 3")
    assert (header.runtime, header.kernels, header.threads) == (
        "ai_edge_litert 2.3.0",
        "default",
        1,
    )
    assert (header.delegate, header.clock_mhz, header.compiler) == (None, None, None)
    assert (header.date, header.runs, header.rows) == ("2024-05-02", 60, len(ROWS))
    assert (header.space, header.out_channels) == ("mini", OUT_CHANNELS)
    assert (header.held_out_networks, header.fit_networks) == (12, 12)


# Noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "streaming"), [(0, {}), (1, STREAMING)], ids=["cpu", "streams"])
def test_two_percent_of_noise_and_spikes_leave_a_small_error(tmp_path, seed, streaming):
    device = random_device(seed, **streaming)
    bundle = write_bundle(tmp_path, device)
    session = SESSION
    if streaming:
        write_compiled(tmp_path, device, bundle)
        session = EDGETPU
    noisy = {"rounds": 5, "noise": 0.02, "spikes": 0.02, "seed": seed}
    found = assemble(tmp_path, measure(device, bundle, session=session, **noisy))
    report = found.report
    assert report.held_out_mape < 2.0
    assert report.held_out_kendall_tau > 0.9
    scale = report.terms["row_scale"].value
    off = [
        row.latency_ms / (scale * device.rows[operation]) - 1
        for operation, row in found.table.rows.items()
    ]
    assert np.median(np.abs(off)) < 0.03
    for name in ("fixed_ms", "row_scale", "streaming_ms_per_byte"):
        term = report.terms[name]
        error = abs(term.value - getattr(device, name))
        assert error <= 4 * term.standard_error
    spreads = report.spread_percent
    assert spreads.keys() == {operation.op for operation in ROWS}
    # sqrt(T8^2 + T2^2) / 6 of 2 %, for T8 of somewhat more than 8 rows.
    assert all(2 < spread < 12 for spread in spreads.values())


def test_a_round_full_of_spikes_changes_nothing(tmp_path, device, bundle):
    lines = measure(device, bundle, rounds=3)
    clean = assemble(tmp_path, lines)
    spoiled = [
        line | {"median_ms": 3 * line["median_ms"]} if line.get("round") == 1 else line
        for line in lines
    ]
    assert assemble(tmp_path, spoiled).table.to_text() == clean.table.to_text()


def test_a_few_odd_times_do_not_sway_the_terms(tmp_path, device, bundle):
    lines = measure(device, bundle)
    # Calls that cost more whatever the number of copies, and a network that was disturbed.
    more = {file.model: 5.0 for entry in bundle.operations[::9] for file in entry.files}
    networks = assemble(tmp_path, lines).report.networks
    more[next(network.model for network in networks if not network.is_held_out)] = 3.0
    odd = [
        line | {"median_ms": line["median_ms"] + more.get(line["model"], 0)}
        if line["type"] == "model"
        else line
        for line in lines
    ]
    check_terms(assemble(tmp_path, odd), device, rel=1e-6)


def test_a_slower_clock_scales_the_table_and_keeps_its_error(tmp_path, device, bundle):
    factor = 1000.0
    lines = measure(device, bundle, noise=0.02, rounds=2)
    keys = ("median_ms", "spread_ms", "min_ms")
    slow = [
        line | {key: factor * line[key] for key in keys} if line["type"] == "model" else line
        for line in lines
    ]
    one, other = assemble(tmp_path, lines), assemble(tmp_path, slow)
    assert other.report.held_out_mape == pytest.approx(one.report.held_out_mape, rel=1e-6)
    assert other.table.header.fixed_ms == pytest.approx(factor * one.table.header.fixed_ms)
    assert other.table.header.row_scale == pytest.approx(one.table.header.row_scale)
    for operation, row in one.table.rows.items():
        got = other.table.rows[operation]
        assert got.latency_ms == pytest.approx(factor * row.latency_ms, rel=1e-6)
        assert got.spread_ms == pytest.approx(factor * row.spread_ms, rel=1e-6)


def test_lines_may_come_in_any_order_and_from_several_files(tmp_path, device, bundle):
    session, *lines = measure(device, bundle, noise=0.02, rounds=3)
    expected = assemble(tmp_path, [session, *lines]).table.to_text()
    assert assemble(tmp_path, [session, *reversed(lines)]).table.to_text() == expected
    parts = [
        write_lines(tmp_path / "a.jsonl", [session, *lines[:200], session, *lines[200:300]]),
        write_lines(tmp_path / "b.jsonl", [session, *lines[300:]]),
    ]
    assert assemble_table(tmp_path, parts).table.to_text() == expected


@pytest.mark.parametrize("terms", [{}, STREAMING], ids=["cpu", "streams"])
def test_networks_kept_back_take_no_part_in_the_table(tmp_path, terms):
    device = random_device(**terms)
    bundle = write_bundle(tmp_path, device)
    session = EDGETPU if terms else SESSION
    if terms:
        write_compiled(tmp_path, device, bundle)
    lines = measure(device, bundle, session=session, noise=0.02)
    one = assemble(tmp_path, lines)
    kept = {network.model for network in one.report.networks if network.is_held_out}
    slower = [
        line | {"median_ms": 1.5 * line["median_ms"]} if line.get("model") in kept else line
        for line in lines
    ]
    if terms:
        path = tmp_path / "compiled.jsonl"
        compiled = [json.loads(line) for line in path.read_text().splitlines()]
        more = {"on_chip_bytes": 10, "off_chip_bytes": 5000}
        write_lines(path, [line | more if line["model"] in kept else line for line in compiled])
    other = assemble(tmp_path, slower)
    assert other.table.rows == one.table.rows
    assert other.report.terms == one.report.terms
    assert other.table.header.cache_bytes == one.table.header.cache_bytes
    assert (one.table.header.cache_bytes > 0) == bool(terms)
    assert other.report.fit_mape == one.report.fit_mape
    assert other.report.held_out_mape > 25 > one.report.held_out_mape
    again = assemble(tmp_path, slower, seed=7).report
    assert {network.model for network in again.networks if network.is_held_out} != kept


def test_a_cache_that_holds_every_network_of_the_fit_holds_the_largest(tmp_path):
    device = random_device(**STREAMING)
    bundle = write_bundle(tmp_path, device)
    # Only files with many copies exceed it.
    largest = max(device.network_bytes(network) for network in bundle.networks)
    device = replace(device, cache_bytes=float(largest))
    write_compiled(tmp_path, device, bundle)
    found = assemble(tmp_path, measure(device, bundle, session=EDGETPU))
    check_terms(found, device, rel=1e-6)
    assert 0.8 * largest < found.table.header.cache_bytes <= largest
    # A network that is kept back may have more parameters than those of the fit.
    assert found.report.held_out_mape < 1


def test_a_row_below_its_noise_is_not_free(tmp_path):
    free = next(operation for operation in ROWS if operation.op == "fused_ibn")
    device = random_device()
    device.rows[free] = 0.0
    bundle = write_bundle(tmp_path, device)
    lines = measure(device, bundle)
    # Without noise the clock's resolution is what is left.
    found = assemble(tmp_path, lines)
    assert found.report.clamped == (free,)
    expected = device.row_scale * RESOLUTION_MS
    assert found.table.rows[free].latency_ms == pytest.approx(expected, rel=1e-6)
    # Fewer than none: eight copies faster than two.
    model = next(e for e in bundle.operations if e.operation == free).files[1].model
    faster = [
        line | {"median_ms": 0.5 * line["median_ms"]} if line.get("model") == model else line
        for line in lines
    ]
    found = assemble(tmp_path, faster)
    assert found.report.clamped == (free,)
    assert found.table.rows[free].latency_ms > 0
    # Two calm rounds of one model prove little where all others vary.
    models = {file.model for e in bundle.operations for file in e.files if e.operation == free}
    calm = [
        line | {"spread_ms": 0.0, "median_ms": device.models(bundle)[line["model"]][0]}
        if line.get("model") in models
        else line
        for line in measure(device, bundle, noise=0.02, rounds=2)
    ]
    assert assemble(tmp_path, calm).table.rows[free].latency_ms > 20 * RESOLUTION_MS
    noisy = measure(device, bundle, noise=0.02, rounds=3)
    found = assemble(tmp_path, noisy)
    usual = np.median([row.latency_ms for row in found.table.rows.values()])
    assert 0 < found.table.rows[free].latency_ms < 0.2 * usual


def test_a_row_that_is_all_streaming_is_not_free(tmp_path):
    device = random_device(**STREAMING)
    free = max(device.parameter_bytes, key=device.parameter_bytes.__getitem__)
    device.rows[free] = -1e-9  # what the compiler reports is rounded
    bundle = write_bundle(tmp_path, device)
    write_compiled(tmp_path, device, bundle)
    found = assemble(tmp_path, measure(device, bundle, session=EDGETPU))
    assert free in found.report.clamped
    expected = found.table.header.row_scale * RESOLUTION_MS
    assert found.table.rows[free].latency_ms == pytest.approx(expected)


# Parameter bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["compiler", "delegate"])
def test_compiled_models_need_what_the_compiler_said(tmp_path, device, bundle, key):
    lines = measure(device, bundle, session=SESSION | {key: EDGETPU[key]})
    message = r"holds no compiled\.jsonl.*; bring it back beside manifest\.json from where the"
    with pytest.raises(FileNotFoundError, match=message):
        assemble(tmp_path, lines)
    write_compiled(tmp_path, device, bundle)
    if key == "compiler":
        assert sorted(assemble(tmp_path, lines).table.rows) == ROWS


def test_what_another_compiler_said_is_refused(tmp_path, device, bundle):
    write_compiled(tmp_path, device, bundle)
    lines = measure(device, bundle, session=EDGETPU | {"compiler": "15.0"})
    message = r"compiled\.jsonl is of edgetpu_compiler 16\.0\.384591198, the .* are of 15\.0; bring"
    with pytest.raises(ValueError, match=message):
        assemble(tmp_path, lines)


def test_models_that_ran_in_part_on_the_host_are_warned_of(tmp_path, device, bundle):
    write_compiled(tmp_path, device, bundle)
    path, names = tmp_path / "compiled.jsonl", [bundle.models[5], bundle.models[9]]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [line | {"unmapped": int(line["model"] in names)} for line in lines])
    text = f"2 of {len(bundle.models)} models ran in part on the host"
    with pytest.warns(UserWarning, match=f"{text}, such as {', '.join(names)}: these times are"):
        found = assemble(tmp_path, measure(device, bundle, session=EDGETPU))
    assert found.report.partly_mapped == tuple(names)
    assert "2 ran in part on the host" in found.report.text()
    assert found.table.header.note == text


def test_what_the_compiler_said_does_not_matter_to_a_cpu(tmp_path, device, bundle):
    lines = measure(device, bundle)
    expected = assemble(tmp_path, lines).table.to_text()
    write_compiled(tmp_path, random_device(3, **STREAMING), bundle)
    assert assemble(tmp_path, lines).table.to_text() == expected


# What is missing ------------------------------------------------------------------------------


def without(lines: list[dict], models: set[str]) -> list[dict]:
    return [line for line in lines if line.get("model") not in models]


def test_operations_without_a_time_are_refused_or_left_out(tmp_path, device, bundle):
    entry = next(e for e in bundle.operations if e.operation.op == "fused_ibn")
    model = entry.files[1].model
    lines = without(measure(device, bundle), {model})
    message = rf"no times of 1 operations \(such as {entry.operation}\), which 1 rows need; start"
    with pytest.raises(ValueError, match=f"{message}.* with --allow-missing"):
        assemble(tmp_path, lines)
    lines.append({"type": "failure", "model": model, "round": 0, "error": "delegate failed"})
    with pytest.raises(ValueError, match=rf"1 models failed \(such as {model}: delegate failed\)"):
        assemble(tmp_path, lines)
    with pytest.warns(UserWarning, match=rf"such as {entry.operation}\).*will say so"):
        found = assemble(tmp_path, lines, allow_missing=True)
    assert found.report.missing == (entry.operation,)
    assert found.report.failures == {model: "delegate failed"}
    assert sorted(found.table.rows) == [row for row in ROWS if row != entry.operation]
    # Networks with that operation can be neither fitted nor scored.
    assert len(found.report.networks) < len(bundle.networks)
    check_terms(found, device, rel=1e-6)
    with pytest.raises(ValueError, match=rf"no row in .* for {entry.operation}; .*build_latency"):
        found.table.costs(SPACE)


def test_a_missing_addition_takes_along_what_it_is_subtracted_from(tmp_path, device):
    bundle = write_bundle(tmp_path, device, MANY)
    add = next(add for add in EXTRA if str(add) == "add k1 6->6 at 16x24")
    entry = next(e for e in bundle.operations if e.operation == add)
    lines = without(measure(device, bundle), {entry.files[0].model})
    needing = {e.operation for e in bundle.operations if add in e.adds}
    assert needing
    message = rf"no times of 1 operations \(such as {add}\), which {len(needing)} rows need"
    with pytest.warns(UserWarning, match=message):
        found = assemble(tmp_path, lines, allow_missing=True)
    assert set(found.report.missing) == needing


def test_a_model_that_ran_in_a_later_round_has_not_failed(tmp_path, device, bundle):
    lines = measure(device, bundle)
    lines.insert(1, {"type": "failure", "model": lines[1]["model"], "round": 0, "error": "hung"})
    assert assemble(tmp_path, lines).report.failures == {}


def test_too_few_networks_are_refused(tmp_path, device, bundle):
    models = {network.model for network in bundle.networks[15:]}
    message = r"at least 16 whole networks .* got 15 of the bundle's 24; start measure\.py again"
    with pytest.raises(ValueError, match=message):
        assemble(tmp_path, without(measure(device, bundle), models))
    models.pop()
    report = assemble(tmp_path, without(measure(device, bundle), models)).report
    assert (report.fit_networks, report.held_out_networks) == (8, 8)


def test_networks_that_the_rows_do_not_explain_are_refused(tmp_path, device, bundle):
    models = {network.model for network in bundle.networks}
    lines = [
        line | {"median_ms": 10 - line["median_ms"]} if line.get("model") in models else line
        for line in measure(device, bundle)
    ]
    with pytest.raises(ValueError, match="do not grow with those of their operations"):
        assemble(tmp_path, lines)


def test_measurements_of_another_bundle_are_refused(tmp_path, device, bundle):
    lines = measure(device, bundle, session=SESSION | {"bundle": "e" * 64})
    with pytest.raises(ValueError, match=r"of the bundle e{12}, .* is d{12}; name the bundle"):
        assemble(tmp_path, lines)
    lines = [*measure(device, bundle), model_line("networks/none.tflite", 0, 1.0)]
    with pytest.raises(ValueError, match=r"measured networks/none\.tflite, which .* does not list"):
        assemble(tmp_path, lines)


def test_a_model_that_the_compiler_did_not_report_is_refused(tmp_path):
    device = random_device(**STREAMING)
    bundle = write_bundle(tmp_path, device)
    write_compiled(tmp_path, device, bundle)
    path = tmp_path / "compiled.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=f"{bundle.models[0]} was measured, but compiled.jsonl"):
        assemble(tmp_path, measure(device, bundle, session=EDGETPU))


def test_the_report_reads_well(tmp_path, device, bundle):
    text = assemble(tmp_path, measure(device, bundle, noise=0.02)).report.text()
    for part in ("12 networks kept back: MAPE", "Kendall tau 0.", "fixed_ms: 0.", "row_scale: 1."):
        assert part in text
    assert f"{len(ROWS)} rows; 0 not above their noise, 0 operations without a row" in text
    json.dumps(to_plain(assemble(tmp_path, measure(device, bundle)).report.terms))


# Reading measurements -------------------------------------------------------------------------

GOOD = [SESSION, model_line("a.tflite", 0, 1.0, 0.1), model_line("b.tflite", 0, 2.0, 0.1)]


def read(tmp_path, text: str):
    (tmp_path / "m.jsonl").write_text(text)
    return read_measurements([tmp_path / "m.jsonl"])


def as_text(lines) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_rounds_are_pooled_by_their_median(tmp_path):
    times = {0: 1.0, 1: 9.0, 2: 1.2, 3: 1.1, 4: 1.3}
    lines = [SESSION, *(model_line("a", number, ms, 0.01) for number, ms in times.items())]
    measured = read(tmp_path, as_text(lines))
    time = measured.times["a"]
    assert (time.ms, time.spread_ms, time.runs) == (1.2, 0.01, 150)
    # Rounds differ by more than runs: 1.2533 * 1.4826 * MAD / sqrt(5).
    assert time.error_ms == pytest.approx(1.2533 * 1.4826 * 0.1 / math.sqrt(5))
    single = read(tmp_path, as_text([SESSION, model_line("a", 0, 1.0, 0.01)])).times["a"]
    assert single.error_ms == pytest.approx(1.2533 * 1.4826 * 0.01 / math.sqrt(30))


def test_the_error_of_a_median_is_about_right(tmp_path):
    generator = np.random.default_rng(0)
    lines = [SESSION]
    for model in range(200):
        lines += [
            model_line(str(model), number, float(1 + 0.02 * generator.standard_normal()))
            for number in range(9)
        ]
    times = read(tmp_path, as_text(lines)).times.values()
    off = np.array([time.ms - 1 for time in times])
    stated = np.array([time.error_ms for time in times])
    assert 0.7 < np.sqrt((off**2).mean()) / np.median(stated) < 1.3


def test_a_last_line_that_was_cut_off_is_left_out_with_a_warning(tmp_path):
    whole = as_text(GOOD)
    for cut in range(1, len(json.dumps(GOOD[-1]))):
        with pytest.warns(UserWarning, match=r"m\.jsonl:3: the last line was cut off"):
            measured = read(tmp_path, whole[: -1 - cut])
        assert measured.times.keys() == {"a.tflite"}
    # All that is missing is the end of line.
    assert read(tmp_path, whole[:-1]) == read(tmp_path, whole)


def changed(number: int, **values) -> str:
    return as_text([line | values if i == number else line for i, line in enumerate(GOOD)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (as_text(GOOD).replace('"median_ms": 1.0', '"median_ms": 1.'), r":2: not valid JSON"),
        (as_text(GOOD).replace('"type": "model"', "", 1), r":2: not valid JSON"),
        (as_text([SESSION, 3, GOOD[1]]), r":2: expected an object, got 3"),
        (as_text(GOOD[1:]), r":1: type: expected session first, got model"),
        (changed(1, type="rest"), r":2: type: expected session, model or failure, got rest"),
        (changed(1, type=None), r":2: type: expected text, got None"),
        (as_text([*GOOD, GOOD[1]]), r":4: a second line for round 0 of a\.tflite"),
        (changed(0, unit="us"), r":1: unit: expected ms, got us"),
        (changed(0, unit=None), r":1: unit: expected ms, got None"),
        (changed(0, format=2), r":1: format: expected 1, got 2"),
        (changed(0, machine=None), r":1: machine: expected text, got None"),
        (changed(0, threads="1"), r":1: threads: expected int, got '1'"),
        (changed(0, threads=True), r":1: threads: expected int, got True"),
        (changed(1, median_ms=0), r":2: median_ms: expected a finite time > 0 in ms, got 0"),
        (changed(1, median_ms=-1.0), r":2: median_ms: expected a finite time > 0 in ms, got -1\.0"),
        (changed(1, median_ms=math.nan), r":2: not valid JSON \(NaN is no number\)"),
        (changed(1, median_ms=math.inf), r":2: not valid JSON \(Infinity is no number\)"),
        (changed(1, median_ms="1.0"), r":2: median_ms: expected .*, got '1\.0'"),
        (changed(1, median_ms=True), r":2: median_ms: expected .*, got True"),
        (changed(1, spread_ms=-0.1), r":2: spread_ms: expected a finite time >= 0 in ms, got -0"),
        (changed(1, runs=0), r":2: runs: expected a whole number >= 1, got 0"),
        (changed(1, round=-1), r":2: round: expected a whole number >= 0, got -1"),
        (changed(1, model=""), r":2: model: expected text, got ''"),
        (as_text([SESSION]), r"no model is timed in .*m\.jsonl"),
        ("", r":1: not valid JSON"),
    ],
)
def test_damaged_measurements_are_refused_with_their_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("machine", "Other CPU, x86_64, Toy Linux 1"),
        ("runtime", "tflite_runtime"),
        ("runtime_version", "2.9.1"),
        ("delegate", "libedgetpu.so.1"),
        ("kernels", "builtin"),
        ("threads", 2),
        ("clock_mhz", 250),
        ("compiler", "15.0"),
        ("device", "another board"),
        ("bundle", "e" * 64),
    ],
)
def test_sessions_that_differ_are_refused_and_both_are_named(tmp_path, key, value):
    one = write_lines(tmp_path / "one.jsonl", GOOD)
    other = write_lines(tmp_path / "other.jsonl", [SESSION | {key: value}, GOOD[1]])
    message = rf"other\.jsonl:1: {key} is {value!r}, in the sessions before {SESSION[key]!r}"
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read_measurements([one, other])
    both = write_lines(tmp_path / "both.jsonl", [*GOOD, SESSION | {key: value}])
    with pytest.raises(ValueError, match=rf"both\.jsonl:4: {key} is"):
        read_measurements([both])


def test_files_that_are_missing_or_named_twice_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no measurements .*none\.jsonl; make them on the"):
        read_measurements([tmp_path / "none.jsonl"])
    with pytest.raises(ValueError, match="expected at least one file"):
        read_measurements([])
    path = write_lines(tmp_path / "one.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"each file once, got .*one\.jsonl"):
        read_measurements([path, tmp_path / "." / "one.jsonl"])


# Robust fits ----------------------------------------------------------------------------------


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), terms=st.integers(1, 4))
def test_the_fit_is_the_least_squares_one_among_those_without_a_negative(seed, terms):
    generator = np.random.default_rng(seed)
    columns = generator.normal(size=(12, terms))
    target = columns @ generator.normal(size=terms)  # some true coefficients are negative
    deviation = np.ones(12)
    found = fit_nonnegative(columns, columns @ np.abs(generator.normal(size=terms)), deviation)
    assert (found > 0).all()
    found = fit_nonnegative(columns, target, deviation)
    assert (found >= 0).all()
    # No small step that stays non-negative makes Huber's loss smaller.
    scale = 1.4826 * np.median(np.abs(target - columns @ found))

    def loss(coefficients: np.ndarray) -> float:
        size = np.abs(target - columns @ coefficients) / max(scale, 1e-12)
        k = 1.345
        return float(np.where(size < k, size**2 / 2, k * size - k * k / 2).sum())

    for term in range(terms):
        for step in (-1e-4, 1e-4):
            moved = found.copy()
            moved[term] = max(0.0, moved[term] + step)
            assert loss(moved) >= loss(found) - 1e-6 * loss(found) - 1e-12


def test_outliers_sway_a_fit_little_and_a_column_of_zeros_gets_nothing():
    x = np.linspace(1, 2, 40)
    target = 2 + 3 * x
    target[::10] *= 5
    columns = np.column_stack([np.ones(40), x, np.zeros(40)])
    found = fit_nonnegative(columns, target, np.ones(40))
    np.testing.assert_allclose(found, [2, 3, 0], atol=1e-6)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=20)
    error = jackknife(lambda part: values[part].mean(keepdims=True), 20)
    assert error[0] == pytest.approx(values.std(ddof=1) / math.sqrt(20))
    many = np.random.default_rng(1).normal(size=(2000, 1))
    error = jackknife(lambda part: many[part].mean(axis=0), 2000)
    assert error[0] == pytest.approx(1 / math.sqrt(2000), rel=0.5)
