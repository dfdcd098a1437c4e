"""Reward and delta metrics: hand-made cases, laws, and the tables that EDNAS prints."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.reward import (
    SMALLEST_ERROR,
    accuracy_product,
    delta_metric,
    delta_overall,
    delta_task,
    deltas,
    reward,
)
from oneshot_ednas.tasks import LOWER_IS_BETTER

laws = settings(deadline=None, derandomize=True, max_examples=100)
values = st.floats(0.01, 10)

# The metric and delta columns of Vu et al., Toward Edge-Efficient Dense Predictions with
# Synergistic Multi-Task Neural Architecture Search (WACV 2023), as printed. A row without deltas is
# the baseline of the rows below it; "." marks a delta that is not printed.
CITYSCAPES: dict[str, tuple[str, ...]] = {
    "segmentation": ("miou", "pixel_accuracy"),
    "depth": ("absolute_error", "relative_error"),
}
NYUV2 = CITYSCAPES | {"normals": ("mean_angle_deg", "within_11", "within_22", "within_30")}

ALL_COLUMNS = "miou pixel_accuracy absolute_error relative_error segmentation depth overall"

TABLES: dict[str, tuple[dict[str, tuple[str, ...]], str, str]] = {
    "table 2": (
        CITYSCAPES,
        ALL_COLUMNS,
        """
        ST baseline       | 40.20 74.70 .0170 .330 |
        MT baseline       | 37.70 73.80 .0180 .340 | -6.2 -1.2 -5.9 -3.0 -3.7 -4.5 -4.1
        Cross-Stitch      | 40.30 74.30 .0150 .300 | +0.2 -0.5 +11.8 +9.1 -0.1 +10.4 +5.1
        Sluice            | 39.80 74.20 .0160 .310 | -1.0 -0.7 5.9 6.1 -0.8 +6.0 +2.6
        NDDR-CNN          | 41.50 74.20 .0170 .310 | 3.2 -0.7 0.0 6.1 +1.3 +3.0 +2.2
        MTAN              | 40.80 74.30 .0150 .320 | +1.5 -0.5 +11.8 +3.0 +0.5 +7.4 +3.9
        DEN               | 38.00 74.20 .0170 .370 | -5.5 -0.7 0.0 -12.1 -3.1 -6.1 -4.6
        AdaShare          | 41.50 74.90 .0160 .330 | 3.2 0.3 5.9 0.0 +1.8 +2.9 +2.3
        ST edge baseline  | 40.04 88.68 .0157 .340 |
        MT edge baseline  | 38.64 88.49 .0171 .354 | -3.5 -0.2 -8.5 -4.1 -1.9 -6.3 -4.1
        EDNAS             | 46.52 90.61 .0143 .316 | +16.2 +2.2 +8.9 +6.9 +9.2 +7.9 +8.5
        EDNAS+JAReD       | 46.11 90.47 .0143 .281 | +15.1 +2.0 +9.1 +17.4 +8.6 +13.3 +10.9
        """,
    ),
    # the baselines are single-task networks
    "table 3": (
        NYUV2,
        "overall",
        """
        ST edge | 23.1 58.3 0.50 0.20 13.8 50.8 81.2 90.8 |
        MT edge | 19.5 54.8 0.55 0.22 16.5 41.9 73.0 85.1 | -11.3
        ST      | 27.5 58.9 0.62 0.25 17.5 34.9 73.3 85.7 |
        MT      | 24.1 57.2 0.58 0.23 16.6 42.5 73.2 84.6 | +2.0
        MT edge to ST | 19.5 54.8 0.55 0.22 16.5 41.9 73.0 85.1 | -0.1
        """,
    ),
    # the baselines are multi-task networks
    "table 4": (
        NYUV2,
        "segmentation depth normals overall",
        """
        MT baseline      | 24.1 57.2 0.58 0.23 16.6 42.5 73.2 84.6 |
        Cross-Stitch     | 25.4 57.6 0.58 0.23 17.2 41.4 70.5 82.9 | +3.0 +0.0 -3.0 +0.0
        Sluice           | 23.8 56.9 0.58 0.24 17.2 38.9 71.8 83.9 | -0.9 -2.2 -3.7 -2.3
        NDDR-CNN         | 21.6 53.9 0.66 0.26 17.1 37.4 73.7 85.6 | -8.1 -13.4 -3.3 -8.3
        MTAN             | 26.0 57.2 0.57 0.25 16.6 43.7 73.3 84.4 | +3.9 -3.5 +0.7 +0.4
        DEN              | 23.9 54.9 0.97 0.31 17.1 36.0 73.4 85.9 | -2.4 -51.0 -4.1 -19.2
        AdaShare         | 30.2 62.4 0.55 0.20 16.6 45.0 71.7 83.0 | +17.2 +9.1 +0.5 +8.9
        MT edge baseline | 19.5 54.8 0.55 0.22 16.5 41.9 73.0 85.1 |
        EDNAS            | 22.1 57.7 0.51 0.20 14.3 49.5 79.2 89.4 | +9.3 +8.2 +11.3 +9.6
        EDNAS+JAReD      | 22.1 58.1 0.51 0.20 12.6 56.1 83.9 92.4 | +9.7 +8.2 +20.3 +12.7
        """,
    ),
    # the overall deltas stand in the text of section 4.2: +20.3, "+30% stronger" and +3.3
    "table 5": (
        CITYSCAPES,
        ALL_COLUMNS,
        """
        ST edge baseline       | 40.04 88.68 .0157 .340 |
        ST edge+maxLR          | 55.02 92.29 .0121 .288 | +37.4 +4.1 +23.2 +15.3 +20.7 +19.3 +20.3
        ST edge+maxLR+JAReD    | 55.02 92.29 .0116 .168 | +37.4 +4.1 +26.7 +50.5 +20.7 +38.6 +30
        ST baseline of the rest | 55.02 92.29 .0116 .168 |
        MT edge+maxLR+JAReD    | 53.80 91.94 .0124 .159 | -2.2 -0.4 -7.4 +5.7 -1.3 -0.9 .
        Transfer: NAS-Seg      | 58.17 92.78 .0118 .156 | +5.4 +0.5 -2.9 +6.2 +3.1 +2.8 .
        Transfer: NAS-Dep      | 57.97 92.73 .0119 .158 | +5.7 +0.5 -1.8 +7.4 +2.9 +1.6 .
        EDNAS+maxLR+JAReD      | 58.54 92.78 .0117 .156 | +6.4 +0.5 -1.3 +7.4 +3.5 +3.1 +3.3
        """,
    ),
    "table 9": (
        CITYSCAPES,
        "segmentation depth overall",
        """
        Single-task       | 40.04 88.68 0.0157 0.340 |
        L1 1.000 RE 0.000 | 38.64 88.49 0.0171 0.354 | -1.9 -6.3 -4.1
        L1 0.999 RE 0.001 | 46.78 90.62 0.0149 0.323 | +9.5 +5.1 +7.3
        L1 0.990 RE 0.010 | 46.83 90.56 0.0144 0.304 | +9.5 +9.5 +9.5
        L1 0.950 RE 0.050 | 46.11 90.47 0.0143 0.281 | +8.6 +13.3 +10.9
        L1 0.900 RE 0.010 | 46.41 90.56 0.0146 0.300 | +9.0 +9.5 +9.3
        """,
    ),
}

KNOWN_INCONSISTENT = {
    # The paper's text has +20.3 where its own table has (20.7 + 19.3) / 2 = 20.0.
    ("table 5", "ST edge+maxLR", "overall"): ("+20.3", 19.93),
    # The metric deltas of the two transfer rows stand in each other's row (their task deltas do
    # not): see test_table_5_swaps_the_metric_deltas_of_its_transfer_rows.
    ("table 5", "Transfer: NAS-Seg", "miou"): ("+5.4", 5.73),
    ("table 5", "Transfer: NAS-Seg", "absolute_error"): ("-2.9", -1.72),
    ("table 5", "Transfer: NAS-Seg", "relative_error"): ("+6.2", 7.14),
    ("table 5", "Transfer: NAS-Dep", "miou"): ("+5.7", 5.36),
    ("table 5", "Transfer: NAS-Dep", "relative_error"): ("+7.4", 5.95),
}
"""(table, row, column) of a printed delta that no unrounded metrics can give, and its value from
the printed metrics."""


@dataclass(frozen=True)
class Row:
    """A printed row: numbers as text, since their digits say how far they are rounded."""

    name: str
    metrics: dict[str, dict[str, str]]
    baseline: dict[str, dict[str, str]]
    printed: dict[str, str]


def read_table(title: str) -> list[Row]:
    tasks, columns, text = TABLES[title]
    names = [name for metrics in tasks.values() for name in metrics]
    rows: list[Row] = []
    baseline: dict[str, dict[str, str]] = {}
    for line in text.strip().splitlines():
        name, metrics_text, deltas_text = (part.strip() for part in line.split("|"))
        numbers = dict(zip(names, metrics_text.split(), strict=True))
        metrics = {task: {m: numbers[m] for m in tasks[task]} for task in tasks}
        if not deltas_text:
            baseline = metrics
            continue
        printed = dict(zip(columns.split(), deltas_text.split(), strict=True))
        rows.append(Row(name, metrics, baseline, {k: v for k, v in printed.items() if v != "."}))
    return rows


def half_unit(printed: str) -> float:
    """Half a unit of the last printed digit."""
    return 0.5 * 10.0 ** -len(printed.partition(".")[2])


def bounds(printed: str) -> tuple[float, float]:
    return float(printed) - half_unit(printed), float(printed) + half_unit(printed)


def possible_deltas(row: Row) -> dict[str, tuple[float, float]]:
    """Lowest and highest delta that the unrounded metrics of a row can have, per column.

    A delta is monotone in the value and in the baseline, so its extremes lie at corners; no two
    metrics of a row share a number, so the extremes of a mean are the means of the extremes.
    """
    found: dict[str, tuple[float, float]] = {}
    for task, metrics in row.metrics.items():
        for name, printed in metrics.items():
            corners = [
                delta_metric(value, baseline, lower_is_better=name in LOWER_IS_BETTER)
                for value in bounds(printed)
                for baseline in bounds(row.baseline[task][name])
            ]
            found[name] = min(corners), max(corners)
        lows, highs = zip(*(found[name] for name in metrics), strict=True)
        found[task] = delta_task(lows), delta_task(highs)
    lows, highs = zip(*(found[task] for task in row.metrics), strict=True)
    found["overall"] = delta_overall(lows), delta_overall(highs)
    return found


def is_consistent(printed: str, possible: tuple[float, float]) -> bool:
    low, high = bounds(printed)
    return possible[0] <= high + 1e-9 and low - 1e-9 <= possible[1]


def as_floats(metrics: dict[str, dict[str, str]]) -> dict[str, dict[str, float]]:
    return {task: {m: float(v) for m, v in row.items()} for task, row in metrics.items()}


def recomputed(row: Row) -> dict[str, float]:
    """Every delta column from the printed metrics, by name."""
    found = deltas(as_floats(row.metrics), as_floats(row.baseline))
    per_metric = {m: gain for gains in found.metrics.values() for m, gain in gains.items()}
    return {**per_metric, **found.tasks, "overall": found.overall}


@pytest.mark.parametrize("title", TABLES)
def test_printed_deltas_follow_from_printed_metrics_but_for_the_known_cells(title: str) -> None:
    inconsistent = {
        (title, row.name, column): printed
        for row in read_table(title)
        for column, printed in row.printed.items()
        if not is_consistent(printed, possible_deltas(row)[column])
    }
    known = {cell: p for cell, (p, _) in KNOWN_INCONSISTENT.items() if cell[0] == title}
    assert inconsistent == known


def test_known_inconsistent_cells_have_the_listed_values() -> None:
    for (title, name, column), (printed, value) in KNOWN_INCONSISTENT.items():
        (row,) = (row for row in read_table(title) if row.name == name)
        assert row.printed[column] == printed
        assert recomputed(row)[column] == pytest.approx(value, abs=0.005)


@pytest.mark.parametrize("title", TABLES)
def test_deltas_from_printed_metrics_lie_among_the_possible_ones(title: str) -> None:
    for row in read_table(title):
        possible = possible_deltas(row)
        for column, value in recomputed(row).items():
            assert possible[column][0] < value < possible[column][1]


def test_table_5_swaps_the_metric_deltas_of_its_transfer_rows() -> None:
    rows = {row.name: row for row in read_table("table 5")}
    seg, dep = rows["Transfer: NAS-Seg"], rows["Transfer: NAS-Dep"]
    for row, other in ((seg, dep), (dep, seg)):
        for column in ("miou", "pixel_accuracy", "absolute_error", "relative_error"):
            assert is_consistent(other.printed[column], possible_deltas(row)[column])
        for column in ("segmentation", "depth"):
            assert is_consistent(row.printed[column], possible_deltas(row)[column])


def test_a_slip_of_one_digit_in_a_table_is_noticed() -> None:
    row = read_table("table 2")[-1]
    assert row.printed["overall"] == "+10.9"
    possible = possible_deltas(row)["overall"]
    assert is_consistent("+10.9", possible)
    assert not is_consistent("+11.9", possible)
    assert not is_consistent("-10.9", possible)


def test_delta_metric_by_hand() -> None:
    assert delta_metric(30.0, 40.0, lower_is_better=False) == -25
    assert delta_metric(30.0, 40.0, lower_is_better=True) == 25


def test_deltas_leave_out_diagnostics_and_further_baselines() -> None:
    metrics = {"depth": {"absolute_error": 0.5, "relative_error": 0.2, "rmse": 9.0}}
    baselines = {
        "depth": {"absolute_error": 1.0, "relative_error": 0.2},
        "normals": {"mean_angle_deg": 20.0},
    }
    found = deltas(metrics, baselines)
    assert found.metrics == {"depth": {"absolute_error": 50, "relative_error": 0}}
    assert found.tasks == {"depth": 25}
    assert found.overall == 25


def test_deltas_of_named_metrics_leave_none_of_them_out() -> None:
    metrics = {"depth": {"absolute_error": 0.5, "relative_error": 0.2, "rmse": 9.0}}
    baselines = {"depth": {"absolute_error": 1.0, "relative_error": 0.2, "rmse": 10.0}}
    found = deltas(metrics, baselines, names={"depth": ("absolute_error", "rmse")})
    assert found.metrics == {"depth": {"absolute_error": 50, "rmse": pytest.approx(10)}}
    assert found.overall == pytest.approx(30)


def test_deltas_weigh_tasks_equally_whatever_their_number_of_metrics() -> None:
    metrics = {"a": {"x": 2.0}, "b": {"x": 1.0, "y": 1.0, "z": 1.0}}
    baselines = {"a": {"x": 1.0}, "b": {"x": 1.0, "y": 1.0, "z": 1.0}}
    assert deltas(metrics, baselines).overall == 50


@laws
@given(numbers=st.lists(values, min_size=4, max_size=4))
def test_a_network_has_no_gain_over_itself(numbers: list[float]) -> None:
    metrics = as_metrics(numbers)
    found = deltas(metrics, metrics)
    assert found.overall == 0
    assert set(found.tasks.values()) == {0}


@laws
@given(value=values, baseline=values, scale=st.floats(0.01, 100))
def test_a_delta_does_not_depend_on_the_unit(value: float, baseline: float, scale: float) -> None:
    found = delta_metric(value * scale, baseline * scale, lower_is_better=True)
    assert found == pytest.approx(delta_metric(value, baseline, lower_is_better=True), abs=1e-6)
    assert found == -delta_metric(value * scale, baseline * scale, lower_is_better=False)


def as_metrics(numbers: list[float]) -> dict[str, dict[str, float]]:
    a, b, c, d = numbers
    return {
        "segmentation": {"miou": a, "pixel_accuracy": b},
        "depth": {"absolute_error": c, "relative_error": d},
    }


def test_accuracy_product_by_hand() -> None:
    metrics = {
        "segmentation": {"miou": 0.25, "pixel_accuracy": 1.0},
        "depth": {"absolute_error": 0.5, "relative_error": 0.125, "rmse": 77.0, "delta_1": 0.3},
    }
    # sqrt(0.25 * 1) = 0.5; sqrt(1/0.5 * 1/0.125) = 4; sqrt(0.5 * 4)
    assert accuracy_product(metrics) == pytest.approx(math.sqrt(2))


def test_weights_choose_and_weigh_the_metrics() -> None:
    metrics = {"depth": {"absolute_error": 0.5, "rmse": 4.0, "delta_1": 0.5}}
    weights = {"depth": {"rmse": 1.0, "delta_1": 3.0, "absolute_error": 0.0}}
    # (1/4 * 0.5^3)^(1/4) = 2^(-5/4)
    assert accuracy_product(metrics, weights=weights) == pytest.approx(2**-1.25)


def test_a_task_without_known_metrics_enters_with_all_of_them() -> None:
    metrics = {"edges": {"f_score": 0.5, "loss": 2.0}}
    assert accuracy_product(metrics) == pytest.approx(1.0)
    assert accuracy_product(metrics, lower_is_better={"loss"}) == pytest.approx(0.5)


def test_a_perfect_error_counts_as_the_smallest_and_a_zero_score_as_zero() -> None:
    metrics = {"depth": {"absolute_error": 0.0}}
    assert accuracy_product(metrics) == pytest.approx(1 / SMALLEST_ERROR)
    better = {"depth": {"absolute_error": SMALLEST_ERROR}}
    assert accuracy_product(better) == accuracy_product(metrics)
    assert accuracy_product(as_metrics([0.0, 0.5, 0.5, 0.5])) == 0


@laws
@given(numbers=st.lists(values, min_size=4, max_size=4))
def test_accuracy_product_lies_between_its_smallest_and_largest_factor(
    numbers: list[float],
) -> None:
    a, b, c, d = numbers
    factors = (a, b, 1 / c, 1 / d)
    product = accuracy_product(as_metrics(numbers))
    assert min(factors) * (1 - 1e-9) <= product <= max(factors) * (1 + 1e-9)


@laws
@given(numbers=st.lists(values, min_size=4, max_size=4), scale=st.floats(0.1, 10))
def test_a_change_of_unit_changes_every_accuracy_product_by_one_factor(
    numbers: list[float], scale: float
) -> None:
    scaled = as_metrics(numbers)
    scaled["depth"]["absolute_error"] *= scale
    expected = accuracy_product(as_metrics(numbers)) * scale ** (-1 / 4)
    assert accuracy_product(scaled) == pytest.approx(expected)


@laws
@given(
    numbers=st.lists(values, min_size=4, max_size=4),
    weights=st.lists(st.floats(0.1, 5), min_size=2, max_size=2),
    scale=st.floats(0.1, 10),
)
def test_only_the_ratio_of_weights_counts(
    numbers: list[float], weights: list[float], scale: float
) -> None:
    metrics = as_metrics(numbers)
    w = {task: dict(zip(row, weights, strict=True)) for task, row in metrics.items()}
    scaled = {task: {m: x * scale for m, x in row.items()} for task, row in w.items()}
    found = accuracy_product(metrics, weights=w)
    assert accuracy_product(metrics, weights=scaled) == pytest.approx(found)
    ones = {task: dict.fromkeys(row, scale) for task, row in metrics.items()}
    assert accuracy_product(metrics, weights=ones) == pytest.approx(accuracy_product(metrics))


@laws
@given(numbers=st.lists(values, min_size=4, max_size=4), which=st.integers(0, 3))
def test_a_better_metric_gives_a_larger_product(numbers: list[float], which: int) -> None:
    better = list(numbers)
    better[which] *= 1.1 if which < 2 else 1 / 1.1
    assert accuracy_product(as_metrics(better)) > accuracy_product(as_metrics(numbers))


def test_reward_by_hand() -> None:
    assert reward(0.8, 5.0, 10.0) == 0.8
    assert reward(0.8, 10.0, 10.0) == 0.8
    assert reward(0.8, 20.0, 10.0) == pytest.approx(0.8 * 2**-0.07)
    assert reward(0.8, 5.0, 10.0, p=-0.07) == pytest.approx(0.8 * 2**0.07)
    assert reward(0.8, 20.0, 10.0, q=-1.0) == pytest.approx(0.4)


@laws
@given(
    accuracies=st.tuples(values, values),
    latencies=st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)),
    target=values,
)
def test_reward_grows_with_accuracy_and_falls_with_latency(
    accuracies: tuple[float, float], latencies: tuple[float, float], target: float
) -> None:
    (a, b), (fast, slow) = sorted(accuracies), sorted(latencies)
    assert reward(a, fast, target) <= reward(b, fast, target)
    assert reward(a, fast, target) >= reward(a, slow, target)
    assert (reward(a, slow, target) < a) == (slow > target) or slow == pytest.approx(target)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_a_metric_that_is_no_number_is_refused_by_task_and_metric(bad: float) -> None:
    metrics = as_metrics([0.5, 0.5, bad, 0.5])
    with pytest.raises(ValueError, match=r"depth\.absolute_error must be finite and not negative"):
        accuracy_product(metrics)


def test_a_bad_diagnostic_does_not_matter() -> None:
    metrics = {"depth": {"absolute_error": 0.5, "rmse": math.nan}}
    assert accuracy_product(metrics) == pytest.approx(2)


def test_weights_that_do_not_fit_are_refused() -> None:
    metrics = {"depth": {"absolute_error": 0.5}}
    with pytest.raises(ValueError, match=r"weights for the tasks depth, got normals"):
        accuracy_product(metrics, weights={"normals": {"within_11": 1.0}})
    with pytest.raises(ValueError, match=r"depth\.rmse has a weight but no value"):
        accuracy_product(metrics, weights={"depth": {"rmse": 1.0}})
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"weight of depth\.absolute_error must be finite"):
            accuracy_product(metrics, weights={"depth": {"absolute_error": bad}})
    for empty in ({"absolute_error": 0.0}, {}):
        with pytest.raises(ValueError, match="task depth needs at least one metric with a weight"):
            accuracy_product(metrics, weights={"depth": empty})


def test_an_accuracy_product_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="metrics of at least one task, got none"):
        accuracy_product({})
    with pytest.raises(ValueError, match="task depth needs at least one metric"):
        accuracy_product({"depth": {}})


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_reward_needs_positive_latencies_and_an_accuracy(bad: float) -> None:
    with pytest.raises(ValueError, match="latency_ms must be finite and above 0"):
        reward(0.5, bad, 1.0)
    with pytest.raises(ValueError, match="target_ms must be finite and above 0"):
        reward(0.5, 1.0, bad)
    if bad != 0:
        with pytest.raises(ValueError, match="accuracy must be finite and not negative"):
            reward(bad, 1.0, 1.0)


def test_deltas_that_cannot_be_formed_are_refused() -> None:
    metrics = {"depth": {"absolute_error": 0.5}}
    with pytest.raises(ValueError, match=r"no baseline for depth\.absolute_error; evaluate one"):
        deltas(metrics, {"normals": {"within_11": 0.5}})
    message = r"depth\.absolute_error: expected a finite value and a baseline above 0"
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=message):
            deltas(metrics, {"depth": {"absolute_error": bad}})
    with pytest.raises(ValueError, match="got nan and 1"):
        delta_metric(math.nan, 1.0, lower_is_better=True)
    with pytest.raises(ValueError, match="at least one metric delta, got none"):
        delta_task([])
    with pytest.raises(ValueError, match="at least one task delta, got none"):
        delta_overall([])
