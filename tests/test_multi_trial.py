"""Multi-trial search: proposals, the loop, resumption, and the command evolve."""

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from test_cli import call, good
from tiny import TARGET_MS

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.benchmark.surrogate import BenchmarkTrainer
from oneshot_ednas.config import MultiTrialConfig, load_config
from oneshot_ednas.deploy import file_digest
from oneshot_ednas.multi_trial import search as search_module
from oneshot_ednas.multi_trial.proposals import Proposals
from oneshot_ednas.multi_trial.search import MultiTrialSearch, pick, search_cost
from oneshot_ednas.multi_trial.trials import TrialStore, read_trials
from oneshot_ednas.run_folder import Problem
from oneshot_ednas.schema import read_json
from oneshot_ednas.training import Interrupted
from oneshot_ednas.trial import Outcome
from oneshot_ednas.workers import SerialExecutor, Workers

SERIAL = Workers(SerialExecutor(), 1)
SETTINGS = "multi_trial={num_trials: 60, steps: 2, population_size: 10, tournament_size: 3}"


def quality(architecture: Architecture) -> float:
    """Large kernels and many channels are good."""
    return sum(block.kernel_size + block.filters for block in architecture.blocks) / 100


def outcome(architecture: Architecture, seed: int) -> Outcome:
    """In place of a training of minutes: a function of architecture and seed, as one is."""
    value = quality(architecture) + (seed % 1000) / 1e5
    metrics = {
        "segmentation": {"miou": value, "pixel_accuracy": value},
        "depth": {"absolute_error": 1 / value, "relative_error": 1 / value},
    }
    return Outcome(metrics=metrics, seconds=2.0, cpu_seconds=1.5, macs=1e6)


@pytest.fixture
def problem(project, tmp_path):
    def make(method="evolution", settings=SETTINGS, folder="run", **changes) -> Problem:
        config = load_config(project / "config.yaml", [settings])
        multi_trial = replace(config.multi_trial, **changes)
        config = replace(config, method=method, multi_trial=multi_trial)
        return Problem(config, tmp_path / folder)

    return make


def searched(problem, train=outcome, workers=SERIAL):
    problem.files.folder.mkdir(exist_ok=True)
    with TrialStore(problem.files.trials) as store:
        MultiTrialSearch(problem, store, train).run(workers)
    return read_trials(problem.files.trials)


# Proposals ----------------------------------------------------------------------------------


GOLDEN = [
    (0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1),
    (0, 1, 0, 1, 0, 1, 0, 0, 0, 1, 0),
    (1, 1, 0, 1, 1, 2, 0, 1, 1, 0, 0),
    (1, 1, 1, 1, 0, 2, 1, 1, 1, 1, 0),
]


def history(algorithm, space, seed, count=80):
    config = MultiTrialConfig(population_size=12, tournament_size=4)
    proposals = Proposals(algorithm, space, config, seed)
    found, populations = [], []
    for number in range(count):
        found.append(proposals.propose())
        proposals.feedback(number, quality(found[-1]))
        populations.append(proposals.population)
    return found, populations


@pytest.mark.parametrize("algorithm", ["evolution", "random"])
def test_a_seeded_history_reproduces(small_space, algorithm):
    one, other, another = (history(algorithm, small_space, seed)[0] for seed in (5, 5, 6))
    assert one == other
    assert one != another


def test_a_golden_history(small_space):
    # The draws of PyGlove 0.4.5 and of `SearchSpace.mutate`. A change means that stored searches
    # cannot be resumed; print `found` anew where that is meant.
    found = history("evolution", small_space, 0)[0]
    assert [small_space.encode(found[number]) for number in (0, 1, 40, 79)] == GOLDEN


def test_the_oldest_is_removed_and_children_are_mutants_of_the_population(small_space):
    found, populations = history("evolution", small_space, 1)
    for number, population in enumerate(populations):
        assert population == found[: number + 1][-12:]
    for number in range(12, 80):
        child = small_space.encode(found[number])
        distances = [
            sum(a != b for a, b in zip(small_space.encode(parent), child, strict=True))
            for parent in populations[number - 1]
        ]
        assert 1 in distances


def test_evolution_begins_like_random_search_and_ends_better(small_space):
    evolved, drawn = (history(one, small_space, 2)[0] for one in ("evolution", "random"))
    assert evolved[:12] == drawn[:12]
    assert evolved[12:] != drawn[12:]
    mean = [sum(map(quality, found[-20:])) / 20 for found in (evolved, drawn)]
    assert mean[0] > mean[1] + 0.02


def test_a_space_without_choices_is_refused(small_space):
    fixed = small_space.fix(small_space.base_architecture)
    with pytest.raises(ValueError, match="space small is one network: nothing to search"):
        Proposals("random", fixed, MultiTrialConfig(), 0)


# The loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["evolution", "random"])
def test_each_architecture_is_trained_once(problem, method):
    trained = []

    def train(architecture, seed):
        trained.append((architecture, seed))
        return outcome(architecture, seed)

    one = problem(method)
    trials = searched(one, train)
    assert [trial.number for trial in trials] == list(range(60))
    by_state = {state: [t for t in trials if t.state == state] for state in ("done", "duplicate")}
    assert len(by_state["done"]) + len(by_state["duplicate"]) == 60
    assert [(trial.architecture, trial.seed) for trial in by_state["done"]] == trained
    assert max(Counter(architecture for architecture, _ in trained).values()) == 1
    assert len({trial.seed for trial in trials}) == 60
    first = {trial.architecture: trial for trial in reversed(trials)}
    for trial in by_state["duplicate"]:
        assert (trial.reward, trial.metrics) == (
            first[trial.architecture].reward,
            first[trial.architecture].metrics,
        )
        assert (trial.macs, trial.seconds) == (0, 0)
    for trial in trials:
        assert trial.latency_ms == one.costs.latency_ms(trial.architecture)
        assert trial.reward == one.reward(trial.architecture, trial.metrics)
        assert trial.choices == one.space.encode(trial.architecture)
    assert search_cost(trials) == (1e6 * len(trained), 2.0 * len(trained))


def test_an_interrupted_search_ends_as_the_uninterrupted_one(problem):
    whole = searched(problem(folder="whole"))
    stops = [3, 4, 17, 40]
    calls = []

    def train(architecture, seed):
        calls.append(seed)
        if stops and len(calls) - 1 == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        return outcome(architecture, seed)

    one = problem()
    while stops:
        with pytest.raises(Interrupted, match=r"stopped after .* of 60 trials"):
            searched(one, train)
        assert read_trials(one.files.trials)[-1].state == "running"
    assert searched(one, train) == whole
    calls.clear()
    assert searched(one, train) == whole  # nothing is left to do
    assert calls == []


def test_random_search_on_many_workers_finds_the_same(problem):
    serial = searched(problem("random", folder="serial"))
    with ThreadPoolExecutor(4) as executor:
        parallel = searched(problem("random"), workers=Workers(executor, 4))
    keys = ("number", "architecture", "seed", "state", "metrics", "reward")
    rows = [[[getattr(one, key) for key in keys] for one in ts] for ts in (serial, parallel)]
    assert rows[0] == rows[1]


def test_evolution_on_many_workers_is_rebuilt_from_its_events(problem):
    one = problem()
    with ThreadPoolExecutor(4) as executor:
        parallel = searched(one, workers=Workers(executor, 4))
    assert sorted(
        [trial.proposed for trial in parallel] + [trial.ended for trial in parallel]
    ) == list(range(120))
    assert searched(one) == parallel  # replayed, each proposal compared


def test_trials_of_another_search_are_refused(problem):
    searched(problem(num_trials=20))
    for other in (problem("random", num_trials=20), problem(num_trials=20, tournament_size=9)):
        with pytest.raises(ValueError, match=r"trial 1\d has choices .* choose another --out"):
            searched(other)


def test_a_failed_trial_is_recorded_and_the_search_goes_on(problem):
    def train(architecture, seed):
        if seed % 3 == 0:
            raise RuntimeError("trial step 3: the loss of depth\nis not finite")
        if seed % 7 == 0:
            value = outcome(architecture, seed)
            return replace(
                value,
                metrics=value.metrics
                | {"depth": {"absolute_error": float("nan"), "relative_error": 1.0}},
            )
        return outcome(architecture, seed)

    one = problem()
    trials = searched(one, train)
    failed = [trial for trial in trials if trial.state == "failed"]
    assert {trial.error for trial in failed if trial.seed % 3 == 0} == {
        "trial step 3: the loss of depth is not finite"
    }
    unscored = [trial for trial in failed if trial.seed % 3]
    assert unscored
    assert all("no reward: depth.absolute_error must be finite" in t.error for t in unscored)
    for trial in failed:
        assert trial.reward is None
        # Two steps of four frames, three times the forward pass.
        assert trial.macs == one.macs(trial.architecture) * 2 * 4 * 3
    assert pick(trials, TARGET_MS).chosen.state == "done"
    assert searched(one, train) == trials


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "MemoryError"),
        (OSError(5, "read error"), "OSError: [Errno 5] read error"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_any_failure_of_a_training_is_that_of_its_trial(problem, error, text):
    calls = []

    def train(architecture, seed):
        calls.append(seed)
        if len(calls) == 2:
            raise error
        return outcome(architecture, seed)

    trials = searched(problem("random", num_trials=4), train)
    assert [trial.state for trial in trials] == ["done", "failed", "done", "done"]
    assert trials[1].error == text


def test_bad_input_stops_the_search_and_loses_no_trial_beside_it(problem):
    calls = []

    def train(architecture, seed):
        calls.append(seed)
        if len(calls) == 1:
            raise ValueError("its data has gone")
        return outcome(architecture, seed)

    one = problem("random", num_trials=4)
    with pytest.raises(ValueError, match="its data has gone"):
        searched(one, train, Workers(SerialExecutor(), 2))
    assert [trial.state for trial in read_trials(one.files.trials)] == ["running", "done"]
    assert [trial.state for trial in searched(one)] == ["done"] * 4


def test_an_architecture_whose_trial_failed_may_have_another(problem):
    one = problem("random")
    blocks = tuple(
        replace(block, ops=(block.base.op,), filters=(block.base.filters,))
        for block in one.space.blocks
    )
    one.space = replace(one.space, blocks=blocks)  # 32 architectures for 60 trials
    one.costs = one.table.costs(one.space, one.out_channels)
    tried = []

    def train(architecture, seed):
        tried.append(architecture)
        if tried.count(architecture) == 1:
            raise RuntimeError("by chance")
        return outcome(architecture, seed)

    trials = searched(one, train)
    seen = Counter()
    for trial in trials:
        expected = ("failed", "done", "duplicate")[min(seen[trial.architecture], 2)]
        assert trial.state == expected
        seen[trial.architecture] += 1
        assert (trial.reward is None) is (trial.state == "failed")
    assert {trial.state for trial in trials} == {"failed", "done", "duplicate"}
    assert searched(one, train) == trials


def test_a_search_whose_trials_all_fail_stops(problem, monkeypatch):
    def train(architecture, seed):
        raise RuntimeError("no memory")

    monkeypatch.setattr(search_module, "MAX_FAILURES_IN_A_ROW", 4)
    one = problem("random")
    with pytest.raises(RuntimeError, match=r"4 trials failed one after the other, .*: no memory;"):
        searched(one, train)
    assert [trial.state for trial in read_trials(one.files.trials)] == ["failed"] * 4
    with pytest.raises(RuntimeError, match="no trial has finished"):
        pick(read_trials(one.files.trials), TARGET_MS)


def test_multiply_adds_bound_the_search(problem):
    one = problem("random")
    macs = [one.macs(trial.architecture) * 24 for trial in searched(one) if trial.macs]
    bounded = searched(problem("random", folder="bounded", max_macs=float(sum(macs[:7]) - 1)))
    assert sum(trial.state == "done" for trial in bounded) == 7


def test_the_pick_is_inside_the_target_where_a_trial_is(problem):
    trials = searched(problem("random"))
    picks = pick(trials, TARGET_MS)
    inside = [trial for trial in trials if trial.latency_ms <= TARGET_MS]
    assert picks.chosen.reward == max(trial.reward for trial in inside)
    assert picks.best.reward == max(trial.reward for trial in trials)
    none = pick(trials, 0.1)
    assert none.best_inside_target is None
    assert none.chosen == picks.best


# The command --------------------------------------------------------------------------------

FEW = "multi_trial={num_trials: 5, steps: 2, population_size: 3, tournament_size: 2}"


@pytest.fixture(scope="module")
def evolved(project, tmp_path_factory):
    """The folder of a finished evolution. Read only."""
    out = tmp_path_factory.mktemp("evolve") / "run"
    good("evolve", project / "config.yaml", "--out", out, "--set", FEW)
    return out


def test_evolve_leaves_a_run_folder_like_that_of_a_one_shot_run(evolved, finished_run):
    results, one_shot = (read_json(folder / "results.json") for folder in (evolved, finished_run))
    assert set(one_shot) - set(results) == {"supernet"}
    assert set(results) - set(one_shot) == {"trials"}
    assert (results["method"], one_shot["method"]) == ("evolution", "one_shot")
    assert set(results["cost"]) == set(one_shot["cost"])
    trials = read_trials(evolved / "trials.sqlite")
    chosen = pick(trials, TARGET_MS).chosen
    assert Architecture.load(evolved / "architecture.json") == chosen.architecture
    assert results["architecture"] == str(chosen.architecture)
    assert results["trials"]["proposed"] == 5
    assert results["trials"]["best_inside_target"]["reward"] == chosen.reward
    macs, seconds = search_cost(trials)
    assert (results["cost"]["search_macs"], results["cost"]["search_seconds"]) == (macs, seconds)
    lines = [json.loads(line) for line in (evolved / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "search"] == list(range(5))


def test_an_evolution_goes_on_and_refuses_what_it_is_not(project, evolved, tmp_path):
    out = shutil.copytree(evolved, tmp_path / "run")
    command = ("evolve", project / "config.yaml", "--out", out, "--set", FEW)
    assert "go on with --resume" in call(*command).stderr
    (out / "architecture.json").unlink()
    good(*command, "--resume")
    assert read_trials(out / "trials.sqlite") == read_trials(evolved / "trials.sqlite")
    assert (
        "method: evolution against random"
        in call(*command, "--resume", "--algorithm", "random").stderr
    )
    result = call("derive", out)
    assert result.exit_code == 2
    assert "is a run of method evolution, without a supernet" in result.stderr
    (out / "architecture.json").unlink()
    text = call("retrain", out).stderr
    assert f"no derived architecture yet; run oneshot-ednas evolve CONFIG --out {out} --res" in text
    (out / "trials.sqlite").write_bytes(b"no database, but some text" * 100)
    result = call(*command, "--resume")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 2)
    assert "damaged or no file of trials (file is not a database)" in result.stderr


def test_a_run_whose_method_is_evolution_trains_several_at_a_time(project, evolved, tmp_path):
    out = tmp_path / "run"
    command = ("run", project / "config.yaml", "--set", FEW, "--set", "method=evolution")
    results = json.loads(good(*command, "--out", out, "--workers", "2", "--json").stdout)
    assert set(results) == set(read_json(evolved / "results.json"))
    assert results["method"] == "evolution"
    trials = read_trials(out / "trials.sqlite")
    assert {trial.state for trial in trials} <= {"done", "duplicate"}
    # A second one was proposed before the first had ended.
    assert [trial.proposed for trial in trials[:2]] == [0, 1]
    # The first trials are drawn and trained as by one worker.
    for one, serial in zip(trials[:3], read_trials(evolved / "trials.sqlite"), strict=False):
        assert (one.architecture, one.metrics) == (serial.architecture, serial.metrics)
    good("evolve", project / "config.yaml", "--set", FEW, "--out", out, "--resume")
    assert read_trials(out / "trials.sqlite") == trials


# On a benchmark -----------------------------------------------------------------------------

MANY = "multi_trial={num_trials: 150, steps: 2, population_size: 20, tournament_size: 5}"


@pytest.fixture(scope="module")
def benchmark_file(project, tmp_path_factory):
    """A benchmark of ten trainings of two steps. Read only."""
    out = tmp_path_factory.mktemp("study") / "study"
    study = "study={num_architectures: 6, num_repeated: 4, num_seeds: 2, num_scorings: 1}"
    arguments = ("--set", "multi_trial.steps=2", "--set", study)
    good("benchmark", project / "config.yaml", "--out", out, *arguments)
    return out / "benchmark.json"


@pytest.fixture
def on_benchmark(project, benchmark_file, monkeypatch):
    """The command, where nothing can be trained and no data read."""
    monkeypatch.setattr("oneshot_ednas.retrain.StandAloneTraining.take_step", None)
    monkeypatch.setattr("oneshot_ednas.run_folder.load_data", None)
    return ("evolve", project / "config.yaml", "--benchmark", benchmark_file, "--set", MANY)


def test_a_search_on_a_benchmark_trains_nothing(on_benchmark, benchmark_file, tmp_path):
    out = tmp_path / "run"
    results = json.loads(good(*on_benchmark, "--out", out, "--json").stdout)
    assert results == read_json(out / "results.json")
    digest = file_digest(benchmark_file)
    assert results["benchmark"] == {"file": "benchmark.json", "sha256": digest}
    trials = read_trials(out / "trials.sqlite")
    assert len(trials) == results["trials"]["proposed"] == 150
    chosen = pick(trials, TARGET_MS).chosen
    assert results["architecture"] == str(chosen.architecture)
    assert results["latency_ms"] <= TARGET_MS
    macs, seconds = search_cost(trials)
    assert results["cost"] == {
        "search_macs": macs,
        "search_seconds": seconds,
        "retrain_macs": 0,
        "retrain_seconds": 0,
    }
    assert macs == pytest.approx(sum(trial.macs for trial in trials if trial.state == "done"))
    assert "go on with --resume" in call(*on_benchmark, "--out", out).stderr
    good(*on_benchmark, "--out", out, "--resume")
    assert read_trials(out / "trials.sqlite") == trials
    result = call("retrain", out)
    assert result.exit_code == 2
    assert "is a search on a benchmark, which trains no networks" in result.stderr


def test_a_search_on_a_benchmark_goes_on_where_it_was_stopped(on_benchmark, tmp_path, monkeypatch):
    command = (*on_benchmark, "--algorithm", "random")  # few of its trials are duplicates
    good(*command, "--out", tmp_path / "whole")
    score, calls = BenchmarkTrainer.__call__, []

    def stopped(self, architecture, seed):
        calls.append(seed)
        if len(calls) == 110:  # after the first commit
            raise KeyboardInterrupt
        return score(self, architecture, seed)

    with monkeypatch.context() as patch:
        patch.setattr(BenchmarkTrainer, "__call__", stopped)
        result = call(*command, "--out", tmp_path / "cut")
    assert result.exit_code == 130
    assert "go on with --resume" in result.stderr
    good(*command, "--out", tmp_path / "cut", "--resume")
    whole, cut = (read_trials(tmp_path / name / "trials.sqlite") for name in ("whole", "cut"))
    assert cut == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workers", "2"), "--benchmark trains nothing: leave out --workers and --data"),
        (("--data", "."), "--benchmark trains nothing: leave out --workers and --data"),
        (("--set", "multi_trial.steps=3"), "multi_trial.steps"),
        (("--set", "retrain.batch_size=5"), "retrain.batch_size"),
    ],
)
def test_a_benchmark_of_other_trials_is_refused(on_benchmark, tmp_path, arguments, message):
    result = call(*on_benchmark, *arguments, "--out", tmp_path / "run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not (tmp_path / "run").exists()
