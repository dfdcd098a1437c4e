"""The comparison: what may be compared, what is averaged and what it cost, and what is claimed."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_SPACE
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from recorded import Recorder, metrics_of
from test_cli import call, good
from test_report import Page

from oneshot_ednas.comparison import compare_runs, plots
from oneshot_ednas.comparison.bootstrap import difference, resampled_means, student_quantile
from oneshot_ednas.comparison.compared import compared
from oneshot_ednas.comparison.curves import over_seeds, search_curve, trial_curve
from oneshot_ednas.comparison.methods import group
from oneshot_ednas.comparison.page import to_html, to_markdown
from oneshot_ednas.comparison.plots import _seen
from oneshot_ednas.comparison.runs import check_comparable, flatten, read_run
from oneshot_ednas.comparison.tables import result_rows, verdict
from oneshot_ednas.config import load_config
from oneshot_ednas.multi_trial.trials import Trial, read_trials
from oneshot_ednas.pipeline import run_class
from oneshot_ednas.report.plots import to_png
from oneshot_ednas.reward import accuracy_product, deltas
from oneshot_ednas.schema import read_json
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.store import write_json

FILES = {"comparison.json", "comparison.md", "comparison.html"}
FILES |= {"rewards.png", "anytime.png", "pareto.png"}


@pytest.fixture
def recorder(tiny) -> Recorder:
    return Recorder(tiny.table)


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory) -> list[Path]:
    """One-shot and evolution with three seeds, random search with two and an unfinished one."""
    out, recorder = tmp_path_factory.mktemp("recorded"), Recorder(tiny.table)
    written = [
        recorder.write(out / f"{method}_{seed}", method, seed)
        for method in ("one_shot", "evolution", "random")
        for seed in range(3)
        if (method, seed) != ("random", 2)
    ]
    return [*written, recorder.write(out / "random_2", "random", 2, is_finished=False)]


@pytest.fixture(scope="module")
def comparison(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("comparison")
    compare_runs(folders, out)
    return out


# Intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1.0, 12.7062), (2.0, 4.3027), (4.0, 2.7764), (10.0, 2.2281), (1e5, 1.96)],
)
def test_students_quantiles_are_those_of_the_tables(freedom, quantile):
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=2e-4)
    assert student_quantile(0.5, freedom) == pytest.approx(0, abs=1e-6)


def test_draws_have_the_variance_of_the_means_of_runs():
    means = np.array([3.0, 4.0, 7.5])
    draws = resampled_means(means, 40_000, np.random.default_rng(0))
    assert draws.mean() == pytest.approx(np.mean(means), abs=0.02)
    assert draws.var() == pytest.approx(np.var(means) / 3, rel=0.03)


def test_the_spread_of_trainings_counts_once_in_the_means_of_runs():
    wide = [[0.0, 2.0], [1.0, 3.0], [2.0, 4.0]]
    narrow = [[1.0], [2.0], [3.0]]
    other = [[0.1], [0.2], [0.3]]
    found = [difference("a", "b", (one, other)) for one in (wide, narrow)]
    assert found[0] == found[1]


@pytest.mark.parametrize("counts", [(3, 3, 1), (3, 3, 3), (3, 6, 1)])
def test_a_method_seldom_wins_against_itself(counts):
    rng, wins, repeats = np.random.default_rng(0), 0, 250
    first, second, trainings = counts
    for seed in range(repeats):
        one, other = (
            [list(rng.normal() + rng.normal(size=trainings) * 0.5) for _ in range(count)]
            for count in (first, second)
        )
        wins += difference("a", "b", (one, other), seed=seed, num_draws=200).winner is not None
    # 5 % and three standard errors either way; plain percentiles give 0.2.
    assert 0.009 < wins / repeats < 0.092


def test_the_interval_of_many_runs_is_that_of_normal_theory():
    rng = np.random.default_rng(0)
    one, other = rng.normal(1, 1, 200), rng.normal(0, 2, 200)
    found = difference("a", "b", (one[:, None].tolist(), other[:, None].tolist()))
    error = np.sqrt(one.var(ddof=1) / 200 + other.var(ddof=1) / 200)
    assert (found.value - found.low) / error == pytest.approx(1.96, rel=0.05)
    assert (found.high - found.value) / error == pytest.approx(1.96, rel=0.05)
    assert found.winner == "a"


rewards = st.lists(
    st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=3), min_size=2, max_size=4
)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(rewards, rewards, st.floats(0.1, 10), st.floats(-1, 1))
def test_intervals_hold_the_difference_and_follow_scale_and_shift(one, other, scale, shift):
    found = difference("a", "b", (one, other), num_draws=200)
    assert found.low <= found.value + 1e-9
    assert found.value - 1e-9 <= found.high
    assert found.winner is None or found.low * found.high > 0
    changed = [[[scale * v + shift for v in run] for run in runs] for runs in (one, other)]
    moved = difference("a", "b", (changed[0], changed[1]), num_draws=200)
    assert moved.value == pytest.approx(scale * found.value, abs=1e-6)
    assert moved.low == pytest.approx(scale * found.low, abs=1e-4)
    assert moved.high == pytest.approx(scale * found.high, abs=1e-4)
    swapped = difference("b", "a", (other, one), num_draws=200)
    assert swapped.value == pytest.approx(-found.value)
    itself = difference("a", "a", (one, one), num_draws=200)
    assert itself.winner is None


def test_one_run_has_no_interval_and_wins_nothing():
    found = difference("a", "b", ([[1.0, 1.1]], [[0.1], [0.2], [0.15]]))
    assert (found.low, found.high, found.winner) == (None, None, None)
    assert found.num_runs == (1, 3)
    assert found.value == pytest.approx(0.9)


def test_clear_differences_are_wins_either_way():
    high, low = [[0.9], [0.91], [0.92]], [[0.1], [0.12], [0.11]]
    assert difference("a", "b", (high, low)).winner == "a"
    assert difference("a", "b", (low, high)).winner == "b"


@pytest.mark.parametrize("groups", [[], [[0.1], []]])
def test_a_method_without_rewards_is_refused(groups):
    with pytest.raises(ValueError, match="b: expected at least one run with at least one reward"):
        difference("a", "b", ([[0.1]], groups))


# Curves -------------------------------------------------------------------------------------


def test_the_curve_of_trials_rises_in_the_order_in_which_they_ended(recorder, tmp_path):
    run = read_run(recorder.write(tmp_path / "run", "evolution"))
    rows = [  # ended, reward, latency, macs
        (1, 0.5, 4.9, 10.0),
        (5, 0.7, 4.9, 10.0),  # ends after the next two
        (3, 0.9, 5.1, 10.0),  # outside the target
        (4, 0.6, 5.0, 10.0),
        (6, None, 4.9, 10.0),  # failed
        (7, 0.7, 4.9, 0.0),  # a duplicate
        (None, None, 4.9, None),  # still running
    ]
    base = recorder.space.base_architecture
    trials = [
        Trial(
            number=number,
            architecture=base,
            choices=recorder.space.encode(base),
            seed=0,
            state="done",
            proposed=100 + number,
            ended=ended,
            reward=reward,
            latency_ms=latency,
            macs=macs,
            seconds=macs,
        )
        for number, (ended, reward, latency, macs) in enumerate(rows)
    ]
    points = trial_curve(replace(run, trials=tuple(trials)))
    assert [(p.cost.macs, p.reward) for p in points] == [(10, 0.5), (30, 0.6), (40, 0.7), (50, 0.7)]
    assert trial_curve(replace(run, trials=tuple(trials[2:3]))) == []


def test_supernet_points_cost_their_share_of_the_search(recorder, tmp_path):
    methods, _ = group([read_run(recorder.write(tmp_path / "run"))])
    points = search_curve(methods[0].found[0])
    assert [p.cost.macs / 1e15 for p in points] == pytest.approx([0.25, 0.75, 1.0])
    assert [p.cost.seconds for p in points] == pytest.approx([150, 450, 600])
    assert [p.reward for p in points] == pytest.approx([0.6, 0.7, 0.75])
    assert search_curve(methods[1].found[0]) == []  # a baseline searches nothing


curve = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(curve, min_size=1, max_size=3))
def test_curves_over_seeds_are_those_of_each_cost(drawn):
    curves = []
    for pairs in drawn:
        costs = np.unique([float(cost) for cost, _ in pairs])
        curves.append((costs, np.array([float(v) for _, v in pairs])[: len(costs)]))
    grid, mean, low, high = over_seeds(curves)
    for i, cost in enumerate(grid):
        held = [values[costs <= cost][-1] for costs, values in curves]
        assert (mean[i], low[i], high[i]) == (np.mean(held), min(held), max(held))
    assert grid[0] == max(costs[0] for costs, _ in curves)


# Groups -------------------------------------------------------------------------------------


def test_methods_are_grouped_and_unfinished_runs_are_not_averaged(folders):
    methods, notes = group([read_run(folder) for folder in folders])
    names = ["one_shot", "evolution", "random", "base", "random_network"]
    assert [method.name for method in methods] == names
    by_name = {method.name: method for method in methods}
    assert by_name["one_shot"].seeds == [0, 1, 2]
    assert by_name["random"].seeds == [0, 1]
    assert "random_2 is not finished" in by_name["random"].missing[2]
    # Three runs trained each baseline of a seed, which counts once.
    assert by_name["base"].seeds == [0, 1, 2]
    assert notes == []
    assert by_name["base"].found[0].search.macs == 0


def test_a_seed_without_run_is_missing(recorder, tmp_path):
    paths = [recorder.write(tmp_path / "a", seed=0), recorder.write(tmp_path / "b", "random", 1)]
    methods, _ = group([read_run(path) for path in paths])
    assert [(m.name, m.missing) for m in methods[:2]] == [
        ("one_shot", {1: "no run"}),
        ("random", {0: "no run"}),
    ]


def test_other_search_settings_are_another_method(recorder, tmp_path):
    first = recorder.write(tmp_path / "a")
    search = replace(recorder.config.search, sandwich=True)
    recorder.config = replace(recorder.config, search=search)
    second = recorder.write(tmp_path / "b")
    methods, _ = group([read_run(path) for path in (first, second)])
    assert [method.label for method in methods[:2]] == [
        "one-shot (search.sandwich=False)",
        "one-shot (search.sandwich=True)",
    ]


def test_a_seed_of_splits_makes_no_other_method(recorder, tmp_path):
    first = recorder.write(tmp_path / "a")
    search = replace(recorder.config.search, split_seed=0)
    recorder.config = replace(recorder.config, search=search)
    second = recorder.write(tmp_path / "b", seed=1)
    methods, _ = group([read_run(path) for path in (first, second)])
    assert [(one.name, one.seeds) for one in methods[:1]] == [("one_shot", [0, 1])]


def test_runs_of_other_devices_and_versions_are_noted(recorder, tmp_path):
    paths = [recorder.write(tmp_path / str(seed), seed=seed) for seed in range(3)]
    assert not any("different" in note for note in compared(paths).notes)
    for path, device in zip(paths[:2], ("cpu (x86), 1 threads", "cuda (H100)"), strict=True):
        results = read_json(path / "results.json")
        made = {"torch": "2.13", "git_revision": "", "device": device}
        write_json(path / "results.json", results | {"versions": made})
    (note,) = [note for note in compared(paths).notes if "different" in note]
    assert note == (
        "Runs were made with different device: cpu (x86), 1 threads, cuda (H100); seconds do not "
        "compare."
    )


def test_only_a_trial_that_was_picked_is_marked(recorder, tmp_path):
    path = recorder.write(tmp_path / "a", "evolution", baselines=())
    for architecture, marks in ((None, 1), ("i3e1c8", 0)):
        run = read_run(path)
        if architecture is not None:
            run = replace(run, results=run.results | {"architecture": architecture})
        methods, _ = group([run])
        axes = Figure().subplots()
        _seen(axes, methods[0].found[0], "red", "*")
        assert len(axes.lines) == 1 + marks


def test_the_same_method_and_seed_twice_is_refused(recorder, tmp_path):
    runs = [read_run(recorder.write(tmp_path / name)) for name in "ab"]
    with pytest.raises(ValueError, match=r"/a and .*/b are both one_shot with seed 0; give one"):
        group(runs)


def test_a_baseline_that_came_out_otherwise_is_noted(recorder, tmp_path):
    first = recorder.write(tmp_path / "a")
    second = recorder.write(tmp_path / "b", "random")
    results = read_json(second / "results.json")
    results["baselines"]["base"]["reward_per_seed"] = [0.123]
    write_json(second / "results.json", results)
    _, notes = group([read_run(path) for path in (first, second)])
    (note,) = notes
    assert "base network, seed 0" in note
    assert "0.123" in note


# What is refused ----------------------------------------------------------------------------


def change_config(recorder: Recorder, **settings):
    recorder.config = replace(recorder.config, **settings)


def other_target(recorder):
    change_config(recorder, latency=replace(recorder.config.latency, target_ms=5.2))


def other_tasks(recorder):
    depth = replace(recorder.config.tasks["depth"], loss_weight=0.2)
    change_config(recorder, tasks=recorder.config.tasks | {"depth": depth})


def other_reward(recorder):
    depth = replace(recorder.config.tasks["depth"], reward_weights={"rmse": 1.0})
    change_config(recorder, tasks=recorder.config.tasks | {"depth": depth})


def other_retraining(recorder):
    change_config(recorder, retrain=replace(recorder.config.retrain, steps=9))


def other_augmentation(recorder):
    augment = replace(recorder.config.data.augment, flip=False)
    change_config(recorder, data=replace(recorder.config.data, augment=augment))


def other_data(recorder):
    recorder.data = recorder.data | {"test": "c" * 64}


def other_table(recorder):
    header = replace(recorder.table.header, held_out_mape=7.0)
    recorder.table = replace(recorder.table, header=header)


def other_space(recorder):
    recorder.space = SearchSpace.from_yaml(SMALL_SPACE.replace("num_repeats: 2", "num_repeats: 1"))


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (other_target, r"latency.target_ms \(5.2 against 5.0\)"),
        (other_tasks, r"tasks.depth.loss_weight \(0.2 against 0.1\)"),
        (other_reward, r"tasks.depth.reward_weights"),
        (other_retraining, r"retrain.steps \(9 against 5\)"),
        (other_augmentation, r"data.augment.flip \(false against true\)"),
        (other_data, r"data.json.test$"),
        (other_table, r"latency_table.csv$"),
    ],
)
def test_runs_that_differ_are_refused_with_the_keys(recorder, tmp_path, change, keys):
    first = read_run(recorder.write(tmp_path / "a"))
    change(recorder)
    second = read_run(recorder.write(tmp_path / "b", "evolution", is_finished=False))
    with pytest.raises(ValueError, match=r"b cannot be compared with .*a: they differ in " + keys):
        check_comparable([first, second])


def test_another_space_and_other_sizes_of_splits_are_refused_together(recorder, tmp_path):
    first = read_run(recorder.write(tmp_path / "a"))
    path = recorder.write(tmp_path / "b", "random", is_finished=False)
    other_space(recorder)
    (path / "space.yaml").write_text(recorder.space.to_yaml())
    write_json(path / "splits.json", {"weights": ["x"], "alpha": ["y"] * 8, "validation": []})
    keys = r"space.yaml; splits.json.weights \(1 against 20\); splits.json.validation \(0 against 4"
    with pytest.raises(ValueError, match=keys):
        check_comparable([first, read_run(path)])


def test_what_may_differ_between_sittings_and_methods_is_not_looked_at(recorder, tmp_path):
    runs = [read_run(recorder.write(tmp_path / "a", seed=0))]
    loop = replace(recorder.config.retrain.loop, log_every=7)
    change_config(
        recorder,
        device="cpu",
        data=replace(recorder.config.data, workers=2),
        retrain=replace(recorder.config.retrain, loop=loop),
        multi_trial=replace(recorder.config.multi_trial, num_trials=9),
    )
    runs.append(read_run(recorder.write(tmp_path / "b", "evolution", seed=1)))
    check_comparable(runs)


def test_flattening_keeps_every_value():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}


def test_bad_folders_are_refused_and_nothing_is_written(recorder, tmp_path):
    run, out = recorder.write(tmp_path / "run"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    unfinished = recorder.write(tmp_path / "unfinished", "random", is_finished=False)
    old = recorder.write(tmp_path / "old", "evolution")
    results = read_json(old / "results.json")
    del results["method"], results["cost"]
    write_json(old / "results.json", results)
    uncounted = recorder.write(tmp_path / "uncounted", seed=5)
    results = read_json(uncounted / "results.json")
    results["cost"]["search_macs"] = None
    write_json(uncounted / "results.json", results)
    torn = recorder.write(tmp_path / "torn", seed=6)
    (torn / "results.json").write_text('{"method"')
    broken = recorder.write(tmp_path / "broken", "evolution", seed=6)
    (broken / "trials.sqlite").write_bytes(b"no database" * 100)
    cases = [
        ([tmp_path / "empty"], "empty is no run folder: it has no config.yaml"),
        ([unfinished], "none of the runs is finished"),
        ([run, run], "expected run folders, each once"),
        ([run, old], "results.json has no method, cost; another version wrote it"),
        ([uncounted], "multiply-adds of the search are not known"),
        ([torn], "results.json: not valid JSON"),
        ([broken], "trials.sqlite: damaged or no file of trials"),
    ]
    for paths, message in cases:
        found = call("compare", *map(str, paths), "--out", str(out))
        assert found.exit_code == 2, found.output
        assert message in " ".join(found.stderr.split())
    found = call("compare", str(run), "--out", str(out), "--baseline", "evolution")
    assert found.exit_code == 2
    assert "(one_shot, base, random_network), got evolution" in found.stderr
    assert not out.exists()
    found = call("compare", str(run), "--out", str(run))
    assert found.exit_code == 2
    assert "holds a run; choose another --out" in found.stderr


# What is written ----------------------------------------------------------------------------


def test_all_files_are_written_and_the_runs_are_left_alone(folders, comparison, tmp_path):
    def digest(folder: Path) -> dict[str, str]:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    before = [digest(folder) for folder in folders]
    compare_runs(folders, tmp_path)
    assert [digest(folder) for folder in folders] == before
    assert {path.name for path in comparison.iterdir()} == FILES
    for name in FILES:  # the same again
        assert (tmp_path / name).read_bytes() == (comparison / name).read_bytes()


def test_the_json_says_what_the_runs_say(folders, comparison):
    found = read_json(comparison / "comparison.json")
    results = [read_json(folder / "results.json") for folder in folders[:3]]
    one_shot = found["methods"]["one_shot"]
    mean = [np.mean(one["reward_per_seed"]) for one in results]
    assert one_shot["reward"]["mean"] == pytest.approx(np.mean(mean))
    assert one_shot["reward"]["std"] == pytest.approx(np.std(mean, ddof=1))
    assert one_shot["reward"]["per_run"] == [one["reward_per_seed"] for one in results]
    assert one_shot["cost"]["search_macs"] == {"mean": 1e15, "std": 0.0}
    assert one_shot["num_inside_target"] == 3
    mious = [one["metrics"]["segmentation"]["miou"] for one in results]
    assert one_shot["metrics"]["segmentation"]["miou"]["mean"] == pytest.approx(np.mean(mious))
    assert found["missing"] == {"random": {"2": f"{folders[-1]} is not finished"}}
    assert [run["is_finished"] for run in found["runs"]] == [True] * 8 + [False]
    pairs = [(one["one"], one["other"]) for one in found["differences"]]
    assert len(pairs) == len(set(pairs)) == 10
    evolution = found["methods"]["evolution"]["curves"][0]
    assert evolution["kind"] == "trials"
    assert evolution["final"]["macs"] == pytest.approx(8.1e15)
    rewards = [point["reward"] for point in evolution["points"]]
    assert rewards == sorted(rewards)


def test_the_accuracy_product_is_the_reward_without_latency(recorder, tmp_path):
    path = recorder.write(tmp_path / "run", quality=0.9)
    results = read_json(path / "results.json")
    base = results["baselines"]["base"]
    assert base["latency_ms"] > recorder.config.latency.target_ms
    methods, _ = group([read_run(path)])
    assert methods[0].found[0].accuracy == pytest.approx(accuracy_product(metrics_of(0.9)))
    assert methods[1].name == "base"
    assert methods[1].found[0].accuracy == pytest.approx(accuracy_product(base["metrics"]))


def test_gains_are_those_of_the_paper(folders, comparison):
    found = read_json(comparison / "comparison.json")
    results = [read_json(folder / "results.json") for folder in folders[:3]]
    used = {"segmentation": ("miou", "pixel_accuracy"), "depth": ("absolute_error",)}
    used["depth"] += ("relative_error",)
    mean = {
        task: {
            k: np.mean([r["baselines"]["base"]["metrics"][task][k] for r in results]) for k in ks
        }
        for task, ks in used.items()
    }
    each = [
        deltas({t: {k: r["metrics"][t][k] for k in ks} for t, ks in used.items()}, mean)
        for r in results
    ]
    gains = found["gains"]["one_shot"]
    assert found["baseline"] == "base"
    assert gains["overall"]["mean"] == pytest.approx(np.mean([one.overall for one in each]))
    assert gains["overall"]["std"] == pytest.approx(np.std([one.overall for one in each], ddof=1))
    depth = np.mean([one.metrics["depth"]["absolute_error"] for one in each])
    assert gains["metrics"]["depth"]["absolute_error"]["mean"] == pytest.approx(depth)
    assert gains["metrics"]["depth"].keys() == set(used["depth"])  # rmse does not count
    assert found["gains"]["base"]["overall"]["mean"] == pytest.approx(0, abs=1e-9)


def test_gains_are_relative_to_the_baseline_asked_for(folders):
    found = compared(folders, baseline="evolution")
    assert found.baseline.name == "evolution"
    assert np.mean([one.overall for one in found.gains["base"]]) < 0


def test_without_base_network_or_with_a_metric_of_0_there_are_no_gains(recorder, tmp_path):
    path = recorder.write(tmp_path / "a", baselines=())
    found = compared([path])
    assert found.gains == {}
    assert any("no run trained the base network" in note for note in found.notes)
    path = recorder.write(tmp_path / "b")
    results = read_json(path / "results.json")
    results["baselines"]["base"]["metrics"]["segmentation"]["miou"] = 0.0
    write_json(path / "results.json", results)
    found = compared([path])
    assert found.gains == {}
    assert any("No gains over base network: segmentation.miou" in note for note in found.notes)
    assert "No gains" in to_markdown(found)


def test_the_markdown_has_whole_tables_and_the_warnings(comparison):
    text = (comparison / "comparison.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(blocks) == 4
    for block in blocks:
        widths = {len(line.split(" | ")) for line in block.splitlines()}
        assert len(widths) == 1
    assert "random search, seed 2: " in text
    assert "Fewer than 3 seeds: random search (2)" in text
    assert "| Seeds | 3 (0, 1, 2) | 3 (0, 1, 2) | 2 (0, 1); missing 2 |" in text
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (comparison / name).exists()


def test_the_page_is_balanced_and_needs_nothing_else(comparison):
    page = Page((comparison / "comparison.html").read_text(encoding="utf-8"))
    sections = ["headline", "results", "differences", "gains", "anytime", "pareto", "runs"]
    assert list(page.sections) == sections
    sources = [value for key, value in page.attributes if key in ("src", "href")]
    assert len(sources) == 3
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert "://" not in page.text
    assert "not finished" in page.words("runs")


def test_names_of_folders_are_escaped(recorder, tmp_path):
    path = recorder.write(tmp_path / "<b>|a")
    found = compared([path])
    page = Page(to_html(found, dict.fromkeys(("rewards", "anytime", "pareto"), b"")))
    assert any("<b>|a" in word for word in page.sections["runs"])
    assert r"&lt;b>\|a" in to_markdown(found)


def test_the_verdict_claims_only_what_is_shown(recorder, tmp_path):
    recorder.noise = 0.0
    paths = []
    for method, quality in (("one_shot", 1.0), ("evolution", 1.0), ("random", 0.8)):
        for seed in range(3):
            name = f"{method}_{seed}"
            jitter = quality + 0.001 * seed
            paths.append(
                recorder.write(tmp_path / name, method, seed, quality=jitter, baselines=())
            )
    found = compared(paths)
    assert "shown to be better than random search" in verdict(found)
    assert "against evolution no difference is shown" in verdict(found)
    assert [one.winner for one in found.differences] == [None, "one_shot", "evolution"]


def on_benchmark(path: Path) -> Path:
    """The run as a benchmark's: predicted trials, no retraining, no data."""
    results = read_json(path / "results.json")
    results |= {"benchmark": {"file": "b.json"}}
    results["cost"] |= {"retrain_macs": 0.0, "retrain_seconds": 0.0}
    write_json(path / "results.json", results)
    write_json(path / "data.json", {"benchmark": "d" * 64})
    (path / "splits.json").unlink()
    return path


def test_runs_on_a_benchmark_are_compared_with_each_other_alone(recorder, tmp_path):
    live = recorder.write(tmp_path / "live", baselines=())
    paths = [
        on_benchmark(recorder.write(tmp_path / str(i), "random", i, baselines=())) for i in range(2)
    ]
    found = compared(paths)
    assert (
        found.notes[0] == "No network was trained: all figures are those of the benchmark b.json."
    )
    kinds = r"metrics of .*/0 are predicted by a benchmark, the networks of .*/live are trained"
    for mixed in ([live, *paths], [*paths, live]):
        with pytest.raises(ValueError, match=kinds):
            compared(mixed)


def texts_of(figure: Figure) -> list[str]:
    """Legend, titles and axis labels of a picture."""
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        labels += [axes.get_title("left"), axes.get_xlabel()]
    return labels


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The pictures of a comparison before they become PNG: rewards, anytime, pareto."""
    drawn: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        drawn.append(figure)
        return to_png(figure)

    monkeypatch.setattr(plots, "to_png", keep)
    return drawn


def test_nothing_is_called_trained_that_a_benchmark_predicts(recorder, figures, tmp_path):
    paths = [
        on_benchmark(recorder.write(tmp_path / f"{method}_{i}", method, i, baselines=()))
        for method in ("evolution", "random")
        for i in range(2)
    ]
    called = good("compare", *map(str, paths), "--out", str(tmp_path / "out"))
    written = (tmp_path / "out/comparison.md").read_text(encoding="utf-8")
    page = (tmp_path / "out/comparison.html").read_text(encoding="utf-8")
    labels = "\n".join(label for figure in figures for label in texts_of(figure))
    for text in (called.stdout, written, page, labels):
        assert "retrain" not in text
        assert "trained from scratch" not in text
        assert "predicted" in text
        assert "would have taken" in text
    for text in (called.stdout, written, page):
        assert "predicted by the benchmark" in text
        assert "Search, time" not in text
    assert read_json(tmp_path / "out/comparison.json")["is_predicted"]
    for name in ("device", "torch"):  # predicted seconds do not depend on the device
        for i, path in enumerate(paths):
            results = read_json(path / "results.json") | {"versions": {name: str(i)}}
            write_json(path / "results.json", results)
        (note,) = [note for note in compared(paths).notes if "different" in note]
        assert note.endswith("figures may differ by that.")


def test_trained_networks_are_not_called_predicted(comparison):
    for name in ("comparison.md", "comparison.html"):
        text = (comparison / name).read_text(encoding="utf-8")
        assert "predicted" not in text
        assert "would have taken" not in text
        assert "trained from scratch" in text
    assert read_json(comparison / "comparison.json")["is_predicted"] is False


def test_legends_and_captions_list_what_is_drawn(recorder, figures, tmp_path):
    one_shot = recorder.write(tmp_path / "a", baselines=())
    evolution = recorder.write(tmp_path / "b", "evolution", baselines=())
    recorder.num_trials = 1  # one point, which is no line
    single = recorder.write(tmp_path / "c", "random", baselines=())
    unlogged = recorder.write(tmp_path / "d", seed=1, baselines=())
    (unlogged / "metrics.jsonl").unlink()
    (unlogged / "candidates.json").unlink()
    line, dotted, trial = "best trial so far", "with supernet weights", "trial"
    cases = [  # runs, lists of anytime plot and of Pareto plot, words of the caption
        ([one_shot, evolution], {line, dotted}, {trial, dotted}, {"Lines:", "Dotted:"}),
        ([one_shot], {dotted}, {dotted}, {"Dotted:"}),
        ([evolution], {line}, {trial}, {"Lines:"}),
        ([single], set(), {trial}, set()),
        ([unlogged], set(), set(), set()),
    ]
    kinds, words = {line, dotted, trial}, {"Lines:", "Dotted:", "Marks:"}
    for number, (paths, anytime, pareto, caption) in enumerate(cases):
        figures.clear()
        found = compare_runs(paths, tmp_path / f"out{number}")
        assert kinds & set(texts_of(figures[1])) == anytime
        assert kinds & set(texts_of(figures[2])) == pareto
        assert "retrained, test split" in texts_of(figures[1])
        assert "target, 5 ms" in texts_of(figures[2])
        text = to_markdown(found)
        assert {word for word in words if word in text} == caption | {"Marks:"}


@pytest.mark.parametrize(
    ("search_macs", "power", "shown"),
    [(1e15, 15, "1.000"), (2.88e11, 9, "288.0"), (9.999e8, 6, "999.9"), (2.2e13, 12, "22.00")],
)
def test_tables_and_pictures_count_multiply_adds_in_one_unit(
    recorder, figures, tmp_path, search_macs, power, shown
):
    path = recorder.write(tmp_path / "a", baselines=())
    dear = recorder.write(tmp_path / "b", "evolution", baselines=())
    for run, factor in ((path, 1), (dear, 40)):
        results = read_json(run / "results.json")
        results["cost"]["search_macs"] = factor * search_macs
        write_json(run / "results.json", results)
    found = compare_runs([path, dear], tmp_path / "out")
    (row,) = [row for row in result_rows(found) if row[0] == f"Search, 10^{power} multiply-adds"]
    assert row[1] == shown
    axes = figures[1].axes[0]
    assert axes.get_xlabel() == f"$10^{{{power}}}$ multiply-adds"
    figures[1].canvas.draw()
    ticks = [text.get_text() for text in axes.get_xticklabels(which="both")]
    assert any(ticks)
    assert not any("^" in tick for tick in ticks)


def test_one_method_has_no_differences(recorder, figures, tmp_path):
    paths = [recorder.write(tmp_path / str(i), "random", i, baselines=()) for i in range(2)]
    called = good("compare", *map(str, paths), "--out", str(tmp_path / "out"))
    written = (tmp_path / "out/comparison.md").read_text(encoding="utf-8")
    page = (tmp_path / "out/comparison.html").read_text(encoding="utf-8")
    for text in (called.stdout, written, page):
        assert "Only random search has finished runs." in text
        assert "ifference" not in text
        assert "every pair" not in text
    sections = ["headline", "results", "rewards", "anytime", "pareto", "runs"]
    assert list(Page(page).sections) == sections
    assert len(figures[0].axes) == 1


def test_a_comparison_of_other_runs_is_not_overwritten(recorder, tmp_path):
    runs = [str(recorder.write(tmp_path / str(i), seed=i)) for i in range(2)]
    unfinished = recorder.write(tmp_path / "2", "random", is_finished=False)
    out = tmp_path / "out"
    call_of = ("--out", str(out))
    good("compare", *runs, str(unfinished), *call_of)
    before = {path: path.read_bytes() for path in out.iterdir()}
    for others in (runs, runs[:1]):
        found = call("compare", *others, *call_of)
        assert found.exit_code == 2
        (line,) = found.stderr.strip().splitlines()
        assert "expected an empty folder or a comparison of these runs or some of them" in line
        assert {path: path.read_bytes() for path in out.iterdir()} == before
    # The same runs in another order, one of them finished now.
    shutil.rmtree(unfinished)
    recorder.write(unfinished, "random")
    good("compare", str(unfinished), *runs, *call_of)
    assert "random" in read_json(out / "comparison.json")["methods"]
    # One more seed.
    good("compare", str(unfinished), *runs, str(recorder.write(tmp_path / "3", seed=5)), *call_of)
    write_json(out / "comparison.json", [])
    assert call("compare", *runs, *call_of).exit_code == 2
    (out / "comparison.json").unlink()
    good("compare", *runs, *call_of)


def test_pictures_are_drawn_of_whatever_there_is(recorder, comparison, tmp_path):
    for name in ("rewards", "anytime", "pareto"):
        with Image.open(comparison / f"{name}.png") as picture:
            width, height = picture.size
        assert width > 1500
        assert height > 300
    # No trial inside the target, no log, no candidates, no baselines.
    recorder.num_trials = 1
    trials = recorder.write(tmp_path / "a", "evolution", baselines=())
    plain = recorder.write(tmp_path / "b", baselines=())
    (plain / "metrics.jsonl").unlink()
    (plain / "candidates.json").unlink()
    found = compare_runs([trials, plain], tmp_path / "out")
    assert [method.name for method in found.methods] == ["one_shot", "evolution"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_the_command_prints_tables_and_warnings(folders, tmp_path):
    found = good("compare", *map(str, folders), "--out", str(tmp_path / "out"))
    assert "one-shot against evolution" in found.stdout
    assert "Highest mean reward: one-shot" in found.stdout
    assert "warning: random search, seed 2" in found.stderr


def finished_as(project: Path, out: Path, *overrides: str) -> Path:
    """A run up to its results: without export and report, which a comparison does not read."""
    config = load_config(project / "config.yaml", ["baselines=[base]", *overrides])
    run = run_class(config)(config, out)
    run.open(resume=False)
    run.find()
    run.retrain()
    run.evaluate()
    return out


def test_real_runs_are_compared(project, finished_run, tmp_path):
    few = ["method=evolution", "multi_trial.num_trials=4", "multi_trial.steps=2"]
    few += ["multi_trial.population_size=3", "multi_trial.tournament_size=2"]
    second = finished_as(project, tmp_path / "second", "seed=4")
    evolved = finished_as(project, tmp_path / "evolved", *few)
    runs = map(str, (finished_run, second, evolved))
    out = tmp_path / "out"
    found = json.loads(good("compare", *runs, "--out", str(out), "--json").stdout)
    assert found == read_json(out / "comparison.json")
    assert found["methods"]["one_shot"]["seeds"] == [3, 4]
    assert found["methods"]["evolution"]["seeds"] == [3]
    assert found["missing"]["evolution"] == {"4": "no run"}
    results = read_json(finished_run / "results.json")
    curve = found["methods"]["one_shot"]["curves"][0]
    assert curve["final"]["reward"] == pytest.approx(results["reward"])
    assert curve["final"]["macs"] > curve["points"][-1]["macs"] > 0
    assert len(curve["points"]) == 3
    trials = read_trials(evolved / "trials.sqlite")
    macs = sum(trial.macs for trial in trials)
    assert found["methods"]["evolution"]["cost"]["search_macs"]["mean"] == pytest.approx(macs)
    assert found["methods"]["evolution"]["curves"][0]["points"][-1]["macs"] == pytest.approx(macs)
    # The baseline of seed 3 was trained by two runs, and came out the same.
    assert found["methods"]["base"]["seeds"] == [3, 4]
    assert not any("counts" in note for note in found["notes"])
