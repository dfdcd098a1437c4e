"""Supernet scores against stand-alone trainings: the command, its files, and what it refuses."""

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
from test_cli import call, good, refused

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.benchmark.table import Benchmark, Entry
from oneshot_ednas.config import load_config
from oneshot_ednas.correlation import kendall_tau
from oneshot_ednas.latency.operations import network_macs
from oneshot_ednas.rank_study import (
    markdown,
    open_search,
    rank_results,
    write_rank,
)
from oneshot_ednas.ranking import score_with_supernet
from oneshot_ednas.run_folder import Experiment, RunFiles
from oneshot_ednas.schema import read_json

STUDY = (
    "multi_trial.steps=2",
    "study.num_architectures=6",
    "study.num_repeated=4",
    "study.num_seeds=2",
    "study.num_scorings=1",
)
"""Ten trainings of two steps."""
SETTINGS = [word for setting in STUDY for word in ("--set", setting)]
SCORED = {"run": "run", "search_step": 1, "search_steps": 2, "benchmark": None}
TARGETS = {
    "accuracy",
    "reward",
    "segmentation.miou",
    "segmentation.pixel_accuracy",
    "depth.absolute_error",
    "depth.relative_error",
}


@pytest.fixture(scope="module")
def searched(project, tmp_path_factory):
    """A run folder with a finished search. Read only."""
    out = tmp_path_factory.mktemp("search") / "run"
    good("search", project / "config.yaml", "--out", out)
    return out


@pytest.fixture(scope="module")
def ranked(project, searched, tmp_path_factory):
    """The folder of a finished rank study, and what the command printed. Read only."""
    before = {path: path.read_bytes() for path in searched.rglob("*") if path.is_file()}
    out = tmp_path_factory.mktemp("rank") / "rank"
    result = rank(project, searched, out)
    assert {path: path.read_bytes() for path in searched.rglob("*") if path.is_file()} == before
    return out, result.stdout


def rank(project, run, out, *more, call=good):
    arguments = ("rank", project / "config.yaml", "--run", run, "--out", out, *SETTINGS, *more)
    return call(*arguments)


def open_experiment(project, folder, *overrides) -> Experiment:
    return Experiment(load_config(project / "config.yaml", (*STUDY, *overrides)), folder)


def table(results, kind, target) -> np.ndarray:
    return np.array([row[kind][target] for row in results["architectures"]])


def test_the_command_writes_its_files_and_prints_a_table(ranked):
    out, text = ranked
    results = read_json(out / "rank.json")
    assert (results["search_step"], results["search_steps"], results["steps"]) == (6, 6, 2)
    assert (results["num_architectures"], results["num_repeated"]) == (6, 4)
    assert set(results["targets"]) == TARGETS
    for found in results["targets"].values():
        for name in (
            "supernet",
            "noise_ceiling",
            "supernet_over_expected_ceiling",
            "multiply_adds",
        ):
            assert set(found[name]["kendall_tau"]) == {"value", "low", "high"}
    for name in ("rank_scatter.png", "rank_bias.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "noise ceiling" in text
    assert "search step 6 of 6" in text
    page = (out / "rank.md").read_text()
    assert page == markdown(results)
    tau = results["targets"]["reward"]["supernet"]["kendall_tau"]
    row = f"| reward | supernet | {tau['value']:.2f} [{tau['low']:.2f}, {tau['high']:.2f}] |"
    assert row in page


def test_scores_are_those_of_the_supernet_with_statistics_of_its_own(project, searched, ranked):
    out, _ = ranked
    experiment = open_experiment(project, out)
    search = open_search(experiment, searched)
    rows = [json.loads(x) for x in (out / "supernet_scores.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    row = rows[2]
    metrics = score_with_supernet(
        search.supernet,
        Architecture.from_short(row["architecture"]),
        experiment.tasks,
        calibration=experiment.part("weights"),
        validation=experiment.part("validation"),
        config=experiment.config.derive,
        seed=3,
        device=experiment.device,
    )
    assert row["metrics"] == metrics
    results = read_json(out / "rank.json")
    (shown,) = [x for x in results["architectures"] if x["architecture"] == row["architecture"]]
    # Errors are negated, so that higher is better everywhere.
    assert shown["supernet"]["depth.absolute_error"] == -metrics["depth"]["absolute_error"]
    assert shown["supernet"]["segmentation.miou"] == metrics["segmentation"]["miou"]


def test_statistics_are_those_of_the_first_seed_in_the_order_of_the_study(project, ranked):
    out, _ = ranked
    results, experiment = read_json(out / "rank.json"), open_experiment(project, out)
    for target in TARGETS:
        tau = kendall_tau(table(results, "supernet", target), table(results, "stand_alone", target))
        found = results["targets"][target]["supernet"]["kendall_tau"]["value"]
        assert found is None if tau is None else found == pytest.approx(tau)
    for row in results["architectures"]:
        architecture = Architecture.from_short(row["architecture"])
        channels, size = experiment.out_channels, experiment.config.data.image_size
        assert row["multiply_adds"] == network_macs(experiment.space, architecture, size, channels)
        assert row["latency_ms"] == experiment.costs.latency_ms(architecture)
        assert row["parameters"] > 1000
        assert row["seeds"][0] == 3


def made_up(project, out, noise: float):
    """A benchmark whose seeds differ by so much, and perfect or spoilt scores of it."""
    experiment = open_experiment(project, out)
    generator = np.random.default_rng(0)
    drawn = (experiment.space.sample(generator) for _ in range(14))
    architectures = list(dict.fromkeys(drawn))  # in order: that of a set is another in each process
    trainings = Benchmark.load(out / "benchmark.json").entries[0].trainings

    def training(seed, quality):
        metrics = {
            "segmentation": {"miou": quality, "pixel_accuracy": quality},
            "depth": {"absolute_error": 1 / quality, "relative_error": 1 / quality},
        }
        return replace(trainings[0], seed=seed, curve={2: metrics}, test_metrics=metrics)

    truth = {one: 0.3 + 0.02 * i for i, one in enumerate(architectures)}
    entries = tuple(
        Entry(
            architecture=one,
            trainings=tuple(
                training(seed, quality + noise * generator.normal()) for seed in range(3)
            ),
        )
        for one, quality in truth.items()
    )
    held = Benchmark.load(out / "benchmark.json")
    scores = {one: training(0, quality).metrics for one, quality in truth.items()}
    return experiment, replace(held, entries=entries), scores


def test_a_perfect_supernet_is_found_perfect(project, ranked):
    experiment, held, scores = made_up(project, ranked[0], noise=0.0)
    results = rank_results(held, scores, experiment, scored=SCORED)
    for target in TARGETS - {"reward"}:
        found = results["targets"][target]
        for name in ("supernet", "noise_ceiling", "expected_ceiling_of_all"):
            for statistic in ("kendall_tau", "spearman", "top_25_percent"):
                assert found[name][statistic]["value"] == pytest.approx(1)
        ratio = found["supernet_over_expected_ceiling"]
        # The best few are drawn with too much chance for a ratio.
        assert ratio.keys() == {"kendall_tau", "spearman"}
        assert all(one["value"] == pytest.approx(1) for one in ratio.values())
    for row in results["bias"]:
        assert row["value"] == 0
        assert row["count"] > 0
    assert results["mean_accuracy"]["supernet"] == results["mean_accuracy"]["stand_alone"]


def test_noise_lowers_the_ceiling_and_a_noiseless_score_passes_it(project, ranked):
    experiment, held, scores = made_up(project, ranked[0], noise=0.06)
    found = rank_results(held, scores, experiment, scored=SCORED)["targets"]["accuracy"]
    ceiling = found["noise_ceiling"]["kendall_tau"]["value"]
    assert 0.3 < ceiling < found["supernet"]["kendall_tau"]["value"] < 0.9
    # The mean of three seeds has less noise than one.
    assert (
        found["supernet_on_mean_of_seeds"]["kendall_tau"]["value"]
        > found["supernet"]["kendall_tau"]["value"]
    )
    expected = found["expected_ceiling_of_all"]["kendall_tau"]
    assert expected["low"] < expected["value"] < expected["high"]
    over = found["supernet_over_expected_ceiling"]["kendall_tau"]
    tau = found["supernet"]["kendall_tau"]["value"]
    assert over["value"] == pytest.approx(tau / expected["value"])
    assert over["low"] < over["value"] < over["high"]


def test_an_option_that_the_supernet_overrates_is_named(project, ranked):
    experiment, held, scores = made_up(project, ranked[0], noise=0.0)
    for architecture, metrics in scores.items():
        if architecture.blocks[1].op == "fused_ibn":
            metrics["segmentation"]["miou"] *= 3
    bias = rank_results(held, scores, experiment, scored=SCORED)["bias"]
    overrated, other = (
        next(x for x in bias if (x["block"], x["field"], x["option"]) == (2, "op", option))
        for option in ("fused_ibn", "ibn")
    )
    assert overrated["low"] > 0 > other["high"]
    shares = sum(row["count"] * row["value"] for row in (overrated, other))
    assert shares == pytest.approx(0)


def test_without_repeated_architectures_there_is_no_ceiling(project, ranked, tmp_path):
    experiment, held, scores = made_up(project, ranked[0], noise=0.0)
    single = tuple(replace(entry, trainings=entry.trainings[:1]) for entry in held.entries)
    results = rank_results(replace(held, entries=single), scores, experiment, scored=SCORED)
    assert "noise_ceiling" not in results["targets"]["accuracy"]
    assert (results["num_repeated"], results["num_seeds"]) == (0, 1)
    write_rank(results, tmp_path)
    assert "so there is no noise ceiling" in (tmp_path / "rank.md").read_text()
    with pytest.raises(ValueError, match="expected at least 4 architectures to rank, got 3"):
        rank_results(replace(held, entries=single[:3]), scores, experiment, scored=SCORED)


def test_a_benchmark_is_not_trained_again(project, searched, ranked, tmp_path, monkeypatch):
    held, _ = ranked
    monkeypatch.setattr("oneshot_ednas.benchmark.build.run_trial", None)
    out = tmp_path / "rank"
    more = ("--benchmark", held / "benchmark.json", "--json")
    result = rank(project, searched, out, *more)
    assert f"rank: 10 of 10 trainings are given by {held / 'benchmark.json'}" in result.stderr
    found = json.loads(result.stdout)
    kept, given = (Benchmark.load(folder / "benchmark.json") for folder in (out, held))
    assert kept.made == given.made
    assert found == read_json(out / "rank.json")
    assert found["benchmark"] == "benchmark.json"
    before = read_json(held / "rank.json")
    for target in TARGETS:
        for name in ("supernet", "noise_ceiling"):
            tau, other = (
                x["targets"][target][name]["kendall_tau"]["value"] for x in (found, before)
            )
            assert tau == pytest.approx(other)


def test_scoring_goes_on_where_it_was_cut(project, searched, ranked, tmp_path, monkeypatch):
    held, _ = ranked
    out = shutil.copytree(held, tmp_path / "rank")
    scores = out / "supernet_scores.jsonl"
    lines = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join(lines[:2]) + lines[2][:40])
    calls = []

    def stopping(*arguments, **settings):
        calls.append(arguments[1])
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return score_with_supernet(*arguments, **settings)

    monkeypatch.setattr("oneshot_ednas.rank_study.score_with_supernet", stopping)
    stopped = rank(project, searched, out, "--resume", call=call)
    assert stopped.exit_code == 130
    assert stopped.stderr == ("stopped with 4 of 6 architectures scored; go on with --resume\n")
    rank(project, searched, out, "--resume")
    assert len(calls) == 4
    assert scores.read_text() == "".join(lines)
    assert read_json(out / "rank.json") == read_json(held / "rank.json")


def test_scores_of_an_earlier_checkpoint_are_not_taken(project, searched, ranked, tmp_path):
    held, _ = ranked
    out = shutil.copytree(held, tmp_path / "rank")
    run = shutil.copytree(searched, tmp_path / "run")
    checkpoint = RunFiles(run).checkpoint("search")
    checkpoint.write_bytes(checkpoint.with_suffix(".previous.safetensors").read_bytes())
    rank(project, run, out, "--resume")
    results = read_json(out / "rank.json")
    assert results["search_step"] < 6
    lines = (out / "supernet_scores.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert len({json.loads(line)["sha256"] for line in lines}) == 2
    before = read_json(held / "rank.json")
    assert (table(results, "supernet", "accuracy") != table(before, "supernet", "accuracy")).any()


# Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.train_frames=31", "data"),
        ("search.splits={weights: 0.5, alpha: 0.25, validation: 0.25}", "splits"),
        ("seed=4", "splits"),
        ("tasks.depth.relative_weight=2.0", "tasks"),
    ],
)
def test_a_run_of_another_experiment_is_refused(project, searched, tmp_path, override, key):
    out = tmp_path / "rank"
    message = refused(
        *("rank", project / "config.yaml", "--run", searched, "--out", out, *SETTINGS),
        "--set",
        override,
    )
    assert f"{searched} and the study differ in {key}" in message
    assert not out.exists()


def test_a_run_of_another_space_is_refused(project, searched, tmp_path):
    run = shutil.copytree(searched, tmp_path / "run")
    path = RunFiles(run).space
    path.write_text(path.read_text().replace("name: small", "name: other"))
    experiment = open_experiment(project, tmp_path / "rank")
    with pytest.raises(ValueError, match="differ in space; scores are comparable only where"):
        open_search(experiment, run)


def test_a_folder_without_a_supernet_is_refused(project, searched, tmp_path):
    out = tmp_path / "rank"
    message = rank(project, tmp_path, out, call=refused)
    assert "has no supernet" in message
    assert "config.yaml is missing; train one with oneshot-ednas search" in message
    run = shutil.copytree(searched, tmp_path / "run")
    RunFiles(run).checkpoint("search").unlink()
    assert "search.safetensors is missing" in rank(project, run, out, call=refused)
    message = rank(project, searched, out, "--benchmark", tmp_path / "b.json", call=refused)
    assert "b.json" in message
    assert not out.exists()
