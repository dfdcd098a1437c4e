"""The benchmark's machinery: quotients, activation memory, exponents, baseline, rows and page."""

import json
import math
import time
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import toy_table
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blocks import gates_of, randomised, spec_of
from torch import nn

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.cli import main
from oneshot_ednas.config import load_config
from oneshot_ednas.latency.operations import block_options, network_macs, relaxed_macs
from oneshot_ednas.models.blocks import ElasticBlock
from oneshot_ednas.models.layers import ElasticBatchNorm
from oneshot_ednas.models.network import leading
from oneshot_ednas.performance.growth import axes
from oneshot_ednas.performance.mixture import PathMixture
from oneshot_ednas.performance.page import BEGIN, END, update_page, with_table
from oneshot_ednas.performance.plan import Plan, Row
from oneshot_ednas.performance.run import MEASUREMENTS, measure
from oneshot_ednas.performance.shares import (
    finished_run,
    phase_shares,
    search_macs_ratio,
    weight_step_macs,
)
from oneshot_ednas.performance.timing import (
    Spread,
    activation_bytes,
    fitted_exponent,
    interleaved,
    ratio,
)
from oneshot_ednas.performance.workload import Workload, widened
from oneshot_ednas.schema import dump_yaml
from oneshot_ednas.store import write_json, write_text
from oneshot_ednas.training import training_macs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def workload(project) -> Workload:
    return Workload(config=load_config(project / "config.yaml"), device=CPU)


# Timing -------------------------------------------------------------------------------------


def test_slower_work_gives_a_ratio_above_one():
    works = {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.001)}
    seconds = interleaved(works, repeats=3, device=CPU)
    assert {name: len(values) for name, values in seconds.items()} == {"slow": 3, "fast": 3}
    assert ratio(seconds["slow"], seconds["fast"]).low > 1


def test_work_takes_turns_after_one_round_to_warm_up():
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    interleaved(works, repeats=2, device=CPU)
    assert calls == ["a", "b"] * 3
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        interleaved(works, repeats=0, device=CPU)


def test_a_ratio_is_the_median_of_the_rounds_quotients():
    # The third round was slow for both.
    found = ratio([2.0, 4.0, 300.0], [1.0, 1.0, 100.0])
    assert (found.median, found.low, found.high, found.count) == (3.0, 2.5, 3.5, 3)
    with pytest.raises(ValueError, match="at least one repeat"):
        Spread.of([])


# Memory -------------------------------------------------------------------------------------


def test_activations_of_a_linear_chain_are_its_inputs():
    chain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    x = torch.randn(10, 6)
    # Each layer keeps its input of 240 bytes; weights do not count.
    assert activation_bytes(lambda: chain(x).sum().backward(), chain) == 2 * x.nbytes
    assert activation_bytes(lambda: chain(x).sum().backward()) > 2 * x.nbytes


def test_activations_count_what_is_held_at_a_time_and_each_storage_once():
    layer, x = nn.Linear(6, 6), torch.randn(10, 6)

    def one_after_the_other() -> None:
        for _ in range(3):
            layer(x.clone()).sum().backward()

    def at_once() -> None:
        sum(layer(x.clone()).sum() for _ in range(3)).backward()

    def same_input() -> None:
        sum(layer(x).sum() for _ in range(3)).backward()

    assert activation_bytes(one_after_the_other, layer) == x.nbytes
    assert activation_bytes(at_once, layer) == 3 * x.nbytes
    assert activation_bytes(same_input, layer) == x.nbytes


# Growth -------------------------------------------------------------------------------------


@given(
    st.floats(-3, 3),
    st.floats(1e-3, 1e3),
    st.lists(st.integers(1, 99).map(float), min_size=2, unique=True),
)
def test_exponent_of_a_power_law_is_found(power, factor, sizes):
    fit = fitted_exponent(sizes, [factor * size**power for size in sizes])
    assert fit.exponent == pytest.approx(power, abs=1e-6)
    if len(sizes) > 2:
        assert fit.standard_error == pytest.approx(0, abs=1e-5)
    else:
        assert fit.standard_error is None


def test_standard_error_of_an_exponent_is_that_of_the_line():
    # By hand: x = 0, 1, 2 and y = 0, 2, 2 in logarithms to base 2. Slope 1, residuals -1/3, 2/3,
    # -1/3, so the variance is 2/3 over 1 degree of freedom, divided by sum (x - 1)^2 = 2.
    fit = fitted_exponent([1.0, 2.0, 4.0], [1.0, 4.0, 4.0])
    assert fit.exponent == pytest.approx(1)
    assert fit.standard_error == pytest.approx(math.sqrt(2 / 3 / 2))


@pytest.mark.parametrize("sizes", [[1.0], [2.0, 2.0]])
def test_an_exponent_needs_two_sizes(sizes):
    with pytest.raises(ValueError, match="two or more sizes"):
        fitted_exponent(sizes, [1.0] * len(sizes))


def test_an_exponent_needs_positive_numbers():
    with pytest.raises(ValueError, match="positive sizes and values"):
        fitted_exponent([1.0, 2.0], [0.0, 1.0])


def test_growth_changes_one_thing_at_a_time(workload):
    plan = Plan.tiny(workload)
    found = axes(plan)
    for size, one in found["image area"].items():
        assert one.image_size[0] * one.image_size[1] == size * 32 * 32
    for factor, one in found["batch"].items():
        assert one.config.search.batch_size == one.config.retrain.batch_size == 4 * factor
    assert [len(one.tasks) for one in found["tasks"].values()] == [1, 2]
    for factor, one in found["width"].items():
        assert one.space.blocks[2].filters == tuple(factor * f for f in (8, 12))
    assert widened(workload.space, 1).blocks == workload.space.blocks


# The baseline of relaxed blocks -------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_mixture_of_paths_equals_the_relaxed_block_for_one_hot_gates(stride):
    in_filters = (4, 6)
    spec = spec_of(stride=stride)
    relaxed = randomised(ElasticBlock(spec, in_filters, momentum=0.0), 0)
    mixture = PathMixture(spec, in_filters)
    assert len(mixture.paths) == 2 * 2 * 2 * 3
    x = torch.randn(2, 6, 8, 10, generator=torch.Generator().manual_seed(1))
    in_gate = torch.tensor([0.0, 1.0])  # the paths read the largest in-width
    with torch.no_grad():
        for option, path in zip(mixture.options, mixture.paths, strict=True):
            source = relaxed.branches[option.op].state_dict()
            for name, target in path.state_dict().items():
                target.copy_(leading(source[name], target))
        for option in block_options(spec):
            gates = gates_of(spec, option)
            torch.testing.assert_close(
                mixture(x, gates, in_gate), relaxed(x, gates, in_gate), rtol=1e-4, atol=1e-5
            )


def test_mixture_mixes_the_paths_by_the_products_of_their_gates():
    spec = spec_of(filters=(4, 8))
    mixture = PathMixture(spec, (3,))
    x = torch.randn(2, 3, 6, 6)
    alpha = [torch.rand(2) for _ in range(4)]
    gates = type(gates_of(spec, spec.base))(*(a / a.sum() for a in alpha))
    with torch.no_grad():
        parts = sum(
            math.prod(
                float(vector[spec.options(field).index(getattr(option, field))])
                for field, vector in zip(gates._fields, gates, strict=True)
            )
            * mixture(x, gates_of(spec, option), torch.ones(1))
            for option in block_options(spec)
        )
        mixed = mixture(x, gates, torch.ones(1))
    torch.testing.assert_close(mixed, parts, rtol=1e-4, atol=1e-5)


def test_paths_keep_no_running_statistics():
    mixture = PathMixture(spec_of(), (4,))
    layers = [one for one in mixture.modules() if isinstance(one, ElasticBatchNorm)]
    assert layers
    assert all(one.momentum == 0 for one in layers)


# Latencies of many architectures ------------------------------------------------------------


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_latencies_of_many_equal_those_of_each_to_the_last_bit(small_space, seed, count):
    costs = toy_table(small_space, cache_bytes=1e3, streaming_ms_per_byte=1e-4).costs(small_space)
    generator = np.random.default_rng(seed)
    drawn = [small_space.sample(generator) for _ in range(count)]
    found = costs.latencies_ms(drawn)
    assert found.shape == (count,)
    assert found.tolist() == [costs.latency_ms(one) for one in drawn]


def test_latencies_refuse_an_architecture_of_another_space(small_space):
    costs = toy_table(small_space).costs(small_space)
    good = small_space.base_architecture
    wrong = Architecture.from_short(str(good).replace("c12", "c99"))
    with pytest.raises(ValueError, match="block 4 has filters 99"):
        costs.latencies_ms([good, wrong])
    with pytest.raises(ValueError, match="architecture has 3 blocks"):
        costs.latencies_ms([good, Architecture(good.blocks[:3])])


# The whole search ---------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"sandwich": True}, {"num_paths": 2}])
def test_counted_multiply_adds_are_those_that_the_search_counts(workload, settings):
    one = workload.resized(**settings)
    search = one.search()
    search.take_step(0)
    assert search.macs == training_macs(weight_step_macs(one, search, 0), 4)


def test_phases_are_weighted_by_their_shares(workload):
    assert phase_shares(workload.search()) == (1 / 6, 5 / 6)
    sparse = workload.resized(steps=8, warmup_fraction=0.25, alpha_every=4)
    # Weight steps 2 to 7, of which 4 has an alpha step.
    assert phase_shares(sparse.search()) == (2 / 8, 1 / 8)


def test_alpha_steps_add_relaxed_multiply_adds_to_a_search(workload):
    sparse = workload.resized(alpha_every=5)
    many, few = (search_macs_ratio(one, num_draws=2) for one in (workload, sparse))
    # Weight steps 1 to 5 have an alpha step, or 5 alone.
    assert (phase_shares(workload.search()), phase_shares(sparse.search())) == (
        (1 / 6, 5 / 6),
        (1 / 6, 1 / 6),
    )
    sizes = workload.space, workload.image_size, workload.out_channels
    derived = [network_macs(sizes[0], one, *sizes[1:]) for one in workload.derived(2)]
    assert many - few == pytest.approx(4 / 6 * relaxed_macs(*sizes) / np.mean(derived))
    assert search_macs_ratio(workload.resized(sandwich=True), num_draws=2) > many


def test_results_of_a_search_are_inside_its_target(workload):
    assert workload.target_ms <= workload.costs.max_latency_ms
    for one in workload.derived(3):
        assert workload.costs.latency_ms(one) <= workload.target_ms


# Rows and page ------------------------------------------------------------------------------


def row(**changes) -> Row:
    given = {"name": "a", "what": "b", "measured": Spread.exactly(2.0), "unit": "x", "bound": 2.5}
    return Row(**(given | changes))


def test_a_bound_holds_from_its_own_side():
    assert row().holds
    assert not row(is_least=True).holds
    assert row(bound=2.0).holds
    assert row(bound=2.0, is_least=True).holds
    assert row(bound=None).holds is None


RESULTS = {
    "command": "oneshot-ednas bench",
    "environment": {
        "date": "2026-01-02",
        "torch": "2.9",
        "threads": 1,
        "device": "cpu",
        "machine": "some machine",
    },
    "rows": [row().to_json(), row(name="c", bound=1.5, unit="ms").to_json()],
}


def test_the_table_takes_the_place_of_the_one_before(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n\n{BEGIN}\nstale\n{END}\n\nbelow\n")
    update_page(page, RESULTS)
    once = page.read_text()
    assert once.startswith("above\n\n")
    assert once.endswith("\n\nbelow\n")
    assert "stale" not in once
    assert "| a | b | 2x |  | <= 2.5x | yes |" in once
    assert "| c | b | 2 ms |  | <= 1.5 ms | no |" in once
    assert "`oneshot-ednas bench` on 2026-01-02: some machine (cpu), torch 2.9, 1 thread." in once
    update_page(page, RESULTS)
    assert page.read_text() == once


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_page_without_a_place_for_the_table_is_refused(text):
    with pytest.raises(ValueError, match="page: expected one line"):
        with_table(text, RESULTS, source="page")


# End to end ---------------------------------------------------------------------------------


def check_rows(rows: list[Row], names: Collection[str]) -> dict[str, Row]:
    found = {one.name: one for one in rows}
    assert len(found) == len(rows)
    assert {name.partition(".")[0] for name in found} == set(names)
    for one in rows:
        figures = json.loads(json.dumps(one.to_json(), allow_nan=False))
        assert math.isfinite(figures["measured"])
        assert figures["low"] <= figures["measured"] <= figures["high"]
    return found


def test_steps_are_measured_on_a_tiny_space(workload):
    names = ("supernet_step", "relaxed_step", "expected_latency", "data_loading")
    plan, seen = replace(Plan.tiny(workload), num_architectures=1), list[str]()
    rows = check_rows(measure(plan, names, lambda one: seen.append(one.name)), names)
    assert seen == list(rows)
    # What does not depend on the clock. A slice's activations are those of the network alone.
    assert rows["supernet_step.memory"].measured.median == pytest.approx(1)
    assert rows["relaxed_step.memory"].measured.median > 1


@pytest.mark.slow
def test_every_measurement_runs_on_a_tiny_space(workload):
    rows = check_rows(measure(Plan.tiny(workload)), MEASUREMENTS)
    assert rows["growth.batch.weight_step.memory"].measured.median == pytest.approx(1, abs=0.1)
    assert rows["growth.tasks.weight_step.memory"].measured.median < 1


def test_small_sizes_are_not_held_against_bounds(workload):
    (row,) = measure(Plan.tiny(workload), ["latencies"])
    assert row.holds is None
    (row,) = measure(replace(Plan.tiny(workload), is_judged=True), ["latencies"])
    assert row.holds is not None


def test_the_search_of_a_run_is_held_against_one_retraining_as_long_and_as_run(project, tmp_path):
    config = load_config(project / "config.yaml")
    search = replace(config.search, steps=50)
    retrain = replace(config.retrain, steps=100, num_seeds=3)
    write_text(tmp_path / "config.yaml", dump_yaml(replace(config, search=search, retrain=retrain)))
    cost = {"search_macs": 80, "retrain_macs": 120, "search_seconds": 4.0, "retrain_seconds": 3.0}
    write_json(tmp_path / "results.json", {"method": "one_shot", "cost": cost})
    rows = {row.name: (row.measured.median, row.holds) for row in finished_run(tmp_path)}
    assert rows == {
        "whole_search.run.macs": (2.0, True),
        "whole_search.run.time": (4.0, False),
        "whole_search.step.macs": (4.0, False),
        "whole_search.step.time": (8.0, False),
    }


def test_what_is_no_finished_run_has_no_cost(tmp_path):
    with pytest.raises(ValueError, match="expected a finished one-shot run"):
        finished_run(tmp_path)


def test_an_unknown_measurement_is_refused(workload):
    with pytest.raises(ValueError, match="no measurement speed; there are supernet_step, "):
        measure(Plan.tiny(workload), ["speed"])


def test_the_command_writes_figures_and_page(tmp_path):
    page, out = tmp_path / "page.md", tmp_path / "bench.json"
    page.write_text(f"{BEGIN}\n{END}\n")
    arguments = ["bench", "--quick", "--only", "latencies", "--repeats", "2", "--json"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(out), "--page", str(page)])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == json.loads(out.read_text())
    assert [one["name"] for one in found["rows"]] == ["latencies"]
    assert found["command"].startswith("oneshot-ednas bench --only latencies --repeats 2 --quick")
    assert found["environment"]["threads"] == 1
    assert "| latencies |" in page.read_text()
    wrong = CliRunner().invoke(main, ["bench", "--quick", "--only", "speed"])
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "no measurement speed" in wrong.stderr
    both = CliRunner().invoke(main, ["bench", "--quick", "--profile", "--only", "latencies"])
    assert (both.exit_code, both.stdout) == (2, "")
    assert "--profile measures nothing" in both.stderr


@pytest.mark.slow
def test_the_command_profiles_both_kinds_of_steps(tmp_path):
    arguments = ["bench", "--quick", "--profile", "--json", "--out", str(tmp_path / "out.json")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    tables = json.loads(result.stdout)
    assert tables == json.loads((tmp_path / "out.json").read_text())
    assert [name.partition(",")[0] for name in tables] == ["weight step", "alpha step"]
    assert all("aten::convolution_backward" in text for text in tables.values())
