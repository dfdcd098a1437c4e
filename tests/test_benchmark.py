"""Stratified architectures, the study that trains them, and the benchmark file."""

import json
import math
import shutil
from concurrent.futures import Executor, Future
from dataclasses import replace

import numpy as np
import pytest
from conftest import IMAGE_SIZE, OUT_CHANNELS, SMALL_SPACE
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import call, good, refused

from oneshot_ednas.benchmark.build import Job, Study, given_by
from oneshot_ednas.benchmark.settings import training_differences
from oneshot_ednas.benchmark.stratify import stratified_sample
from oneshot_ednas.benchmark.table import Benchmark, Entry, Training
from oneshot_ednas.config import load_config
from oneshot_ednas.latency.operations import network_macs
from oneshot_ednas.run_folder import Experiment
from oneshot_ednas.schema import read_json, to_plain
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.training import Interrupted
from oneshot_ednas.trial_job import run_trial
from oneshot_ednas.workers import Workers, open_workers

STUDY = (
    "multi_trial.steps=2",
    "study.num_architectures=5",
    "study.num_repeated=2",
    "study.num_seeds=2",
    "study.num_scorings=2",
)
"""Seven trainings of two steps."""
SETTINGS = [word for setting in STUDY for word in ("--set", setting)]


def stratified(space, count, seed=0):
    generator = np.random.default_rng(seed)
    return stratified_sample(
        space, count, image_size=IMAGE_SIZE, out_channels=OUT_CHANNELS, generator=generator
    )


def log_macs(space, architectures) -> np.ndarray:
    return np.log([network_macs(space, one, IMAGE_SIZE, OUT_CHANNELS) for one in architectures])


# Stratified architectures -------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(0, 100))
@settings(max_examples=4)
def test_a_sample_is_distinct_in_the_space_and_seeded(count, seed):
    space = SearchSpace.from_yaml(SMALL_SPACE)
    found = stratified(space, count, seed)
    assert len(set(found)) == len(found) == count
    assert all(one in space for one in found)
    assert stratified(space, count, seed) == found


@pytest.fixture(scope="module")
def sample(small_space):
    return stratified(small_space, 24)


def test_a_sample_is_spread_over_the_sizes_as_uniform_draws_are_not(small_space, sample):
    generator = np.random.default_rng(0)
    sizes = log_macs(small_space, sample)
    uniform = log_macs(small_space, [small_space.sample(generator) for _ in range(24)])
    # About as many in each quarter of the range, where uniform draws crowd in the middle.
    quarters, crowded = (np.histogram(values, 4)[0] for values in (sizes, uniform))
    assert quarters.min() >= 4
    assert quarters.std() < crowded.std() / 2
    assert np.ptp(sizes) > np.ptp(uniform)
    # Random order: a part of the sample is spread as the whole is.
    assert np.ptp(sizes[:12]) > 0.8 * np.ptp(sizes)
    assert abs(np.corrcoef(np.arange(24), sizes)[0, 1]) < 0.5


def test_every_option_is_in_a_sample_often_enough_to_see_its_bias(small_space, sample):
    chosen = np.array([small_space.encode(one) for one in sample])
    for column, choice in zip(chosen.T, small_space.choices, strict=True):
        counts = np.bincount(column, minlength=len(choice.options))
        assert counts.min() >= 3, choice.name


def test_a_whole_space_can_be_asked_for_and_no_more(small_space):
    blocks = tuple(
        replace(block, ops=(block.base.op,), filters=(block.base.filters,))
        for block in small_space.blocks
    )
    space = replace(small_space, blocks=blocks)
    count = space.num_architectures
    assert count == 32
    assert len(set(stratified(space, count))) == count
    with pytest.raises(ValueError, match="has 32 architectures, 33 distinct ones were asked for"):
        stratified(space, count + 1)


# The study ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study_folder(project, tmp_path_factory):
    """A finished study. Read only."""
    out = tmp_path_factory.mktemp("study") / "study"
    good("benchmark", project / "config.yaml", "--out", out, *SETTINGS)
    return out


def open_study(project, folder, overrides=STUDY, given_trainings=None) -> Study:
    experiment = Experiment(load_config(project / "config.yaml", overrides), folder)
    experiment.open(resume=folder.exists())
    return Study(experiment, given_trainings or {})


def test_jobs_are_those_of_the_config(project, tmp_path):
    study = open_study(project, tmp_path / "study")
    jobs = study.jobs
    assert jobs == open_study(project, tmp_path / "study").jobs
    architectures = list(dict.fromkeys(job.architecture for job in jobs))
    assert len(architectures) == 5
    seeds = [[job.seed for job in jobs if job.architecture == one] for one in architectures]
    assert seeds == [[3, 4], [3, 4], [3], [3], [3]]  # from the config's seed 3 on
    assert study.scored_steps() == (1, 2)


@pytest.mark.parametrize(
    ("steps", "count", "scored"),
    [(400, 4, (100, 200, 300, 400)), (10, 3, (3, 6, 10)), (2, 5, (1, 2)), (7, 1, (7,))],
)
def test_scorings_are_spread_and_end_with_the_last_step(project, tmp_path, steps, count, scored):
    settings = (*STUDY, f"multi_trial.steps={steps}", f"study.num_scorings={count}")
    assert open_study(project, tmp_path / "study", settings).scored_steps() == scored


def test_a_benchmark_holds_what_its_trainings_returned(study_folder, project):
    held = Benchmark.load(study_folder / "benchmark.json")
    assert [len(entry.trainings) for entry in held.entries] == [2, 2, 1, 1, 1]
    assert held.repeated == held.entries[:2]
    assert (held.steps, held.batch_size, held.image_size) == (2, 4, (32, 32))
    assert list(held.tasks) == ["segmentation", "depth"]
    entry = held.entries[1]
    again = run_trial(study_folder, entry.architecture, 4, (1, 2), True)
    training = entry.trainings[1]
    assert training.seed == 4
    assert list(training.curve) == [1, 2]
    for stored, value in (
        (training.metrics, again.metrics),
        (training.curve[1], again.curve[1]),
        (training.test_metrics, again.test_metrics),
    ):
        assert stored.keys() == value.keys()
        for task in stored:
            assert stored[task] == pytest.approx(value[task], rel=1e-5)
    # Two seeds differ, or there would be no noise to measure.
    assert training.metrics != entry.trainings[0].metrics


def test_a_study_goes_on_where_it_was_cut(study_folder, project, tmp_path, monkeypatch):
    out = shutil.copytree(study_folder, tmp_path / "study")
    path = out / "trainings.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:50])  # as a crash leaves it
    (out / "benchmark.json").unlink()
    message = refused("benchmark", project / "config.yaml", "--out", out, *SETTINGS)
    assert "already holds this run; go on with --resume" in message
    done = []

    def stop_at_the_second(folder, architecture, seed, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(Job(architecture, seed))
        return run_trial(folder, architecture, seed, *rest)

    monkeypatch.setattr("oneshot_ednas.benchmark.build.run_trial", stop_at_the_second)
    stopped = call("benchmark", project / "config.yaml", "--out", out, *SETTINGS, "--resume")
    assert stopped.exit_code == 130
    assert stopped.stderr == "stopped with 5 of 7 trainings finished; go on with --resume\n"
    assert not (out / "benchmark.json").exists()
    done.clear()
    monkeypatch.undo()
    result = good("benchmark", project / "config.yaml", "--out", out, *SETTINGS, "--resume")
    assert result.stdout.strip() == str(out / "benchmark.json")
    held = [Benchmark.load(folder / "benchmark.json") for folder in (out, study_folder)]
    assert without_times(held[0]) == without_times(held[1])


def without_times(benchmark: Benchmark) -> list:
    return [
        (entry.architecture, [replace(one, cpu_seconds=0.0) for one in entry.trainings])
        for entry in benchmark.entries
    ]


def test_a_benchmark_says_how_it_was_made(study_folder, project, tmp_path):
    held = Benchmark.load(study_folder / "benchmark.json")
    settings = " ".join(f"--set {setting}" for setting in STUDY)
    assert held.made["command"] == f"oneshot-ednas benchmark config.yaml {settings}"
    assert {"torch", "numpy", "python", "git_revision"} <= set(held.made["versions"])
    assert held.made["data"] == read_json(study_folder / "data.json")
    assert held.config["space"] == "space.yaml"
    assert str(project) not in (study_folder / "benchmark.json").read_text()
    # Each line says by what it was made; those of an older version do not.
    out = shutil.copytree(study_folder, tmp_path / "study")
    rows = [json.loads(line) for line in (out / "trainings.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["made"] == {"date": held.made["date"], "versions": held.made["versions"]}
    del rows[0]["made"]
    for number, row in enumerate(rows[1:]):
        row["made"]["date"] = f"2001-01-0{1 + number}"
        row["made"]["versions"]["git_revision"] = "abc" if number < 2 else "def"
    (out / "trainings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = open_study(project, out).benchmark("command").made
    assert made["versions"]["git_revision"] == "not recorded, abc, def"
    assert made["versions"]["torch"] == held.made["versions"]["torch"]
    assert (made["date"], made["command"]) == ("2001-01-06", "command")


def test_a_training_that_is_done_is_kept_where_another_failed(project, tmp_path, monkeypatch):
    class Both(Executor):
        """Has all of its jobs done together."""

        def submit(self, fn, /, *args):
            future = Future()
            jobs.append(future)
            if len(jobs) == 2:
                jobs[0].set_exception(RuntimeError("diverged"))
                jobs[1].set_result(run_trial(*args))
            return future

    jobs, study = [], open_study(project, tmp_path / "study")
    with pytest.raises(RuntimeError, match="diverged"):
        study.run(Workers(Both(), 2))
    assert list(study.finished()) == [study.jobs[1]]


def test_a_damaged_line_is_named(study_folder, project, tmp_path):
    out = shutil.copytree(study_folder, tmp_path / "study")
    path = out / "trainings.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace('"curve"', '"curves"') + lines[2])
    message = refused("benchmark", project / "config.yaml", "--out", out, *SETTINGS, "--resume")
    assert f"{path}:2: damaged: KeyError('curve'); delete that line" in message


def test_an_unfinished_study_gives_no_benchmark(study_folder, project, tmp_path):
    out = shutil.copytree(study_folder, tmp_path / "study")
    path = out / "trainings.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    with pytest.raises(
        ValueError, match=r"1 of 7 trainings in .* are not finished; go on with --r"
    ):
        open_study(project, out).benchmark("")


def test_trainings_that_are_given_are_not_done_again(study_folder, project, tmp_path, monkeypatch):
    held = Benchmark.load(study_folder / "benchmark.json")
    experiment = Experiment(load_config(project / "config.yaml", STUDY), tmp_path / "other")
    experiment.open(resume=False)
    known = given_by(held, experiment)
    assert len(known) == 7
    kept = dict(list(known.items())[:-1])
    done = []

    def counted(folder, architecture, seed, *rest):
        done.append(Job(architecture, seed))
        return run_trial(folder, architecture, seed, *rest)

    monkeypatch.setattr("oneshot_ednas.benchmark.build.run_trial", counted)
    study = Study(experiment, kept, held.made)
    with open_workers("1") as workers:
        study.run(workers)
    assert done == list(known)[-1:]
    made = study.benchmark("command").made
    assert (made["command"], made["given"]) == ("command", held.made)
    assert [e.architecture for e in study.benchmark("").entries] == [
        e.architecture for e in held.entries
    ]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=4", "seed"),
        ("search.split_seed=7", "search.split_seed"),
        ("retrain.optimizer.weight_decay=0.5", "retrain.optimizer.weight_decay"),
        ("data.train_frames=31", "data.train_frames"),
        ("tasks.depth.loss_weight=0.2", "tasks.depth.loss_weight"),
        ("retrain.batch_size=5", "retrain.batch_size"),
        ("multi_trial.steps=3", "multi_trial.steps"),
        ("search.splits={weights: 0.5, alpha: 0.25, validation: 0.25}", "search.splits.weights"),
    ],
)
def test_a_benchmark_of_other_trainings_is_refused(study_folder, project, tmp_path, override, key):
    held = Benchmark.load(study_folder / "benchmark.json")
    config = load_config(project / "config.yaml", [*STUDY, override])
    with pytest.raises(ValueError, match=rf"made with other settings:.* {key}[,;]"):
        given_by(held, Experiment(config, tmp_path / "other"))


def test_other_data_under_the_same_settings_is_refused(study_folder, project, tmp_path):
    held = Benchmark.load(study_folder / "benchmark.json")
    experiment = Experiment(load_config(project / "config.yaml", STUDY), tmp_path / "other")
    other = replace(held, made=held.made | {"data": held.made["data"] | {"test": "0" * 64}})
    with pytest.raises(ValueError, match=r"made with other settings: data \(its content\);"):
        given_by(other, experiment)
    older = replace(held, made={}, config=without(held.config, "search", "split_seed"))
    assert len(given_by(older, experiment)) == 7  # an older file does not tell


def without(config, *keys):
    first, *rest = keys
    if rest:
        return config | {first: without(config[first], *rest)}
    return {key: value for key, value in config.items() if key != first}


@pytest.mark.parametrize(
    ("keys", "override", "expected"),
    [
        (("retrain", "augmentation"), "seed=3", []),
        (("data", "augment", "brightness"), "data.augment.brightness=0", []),
        (("data", "augment", "brightness"), "seed=3", ["data.augment.brightness"]),
        (("tasks", "depth"), "seed=3", ["tasks.depth"]),
        (("data", "height"), "seed=3", ["data.height"]),
        (("multi_trial",), "seed=3", ["multi_trial.steps"]),
        (("retrain",), "seed=3", ["retrain"]),
    ],
)
def test_what_a_stored_config_lacks_had_its_default(project, keys, override, expected):
    stored = to_plain(load_config(project / "config.yaml"))
    now = load_config(project / "config.yaml", [override])
    assert training_differences(without(stored, *keys), now) == expected


def test_a_setting_that_is_no_more_is_a_difference(project):
    config = load_config(project / "config.yaml")
    stored = json.loads(json.dumps(to_plain(config)))  # with lists for tuples, as in a file
    assert training_differences(stored, config) == []
    stored["retrain"]["old"] = 1
    assert training_differences(stored, config) == ["retrain.old"]


def test_what_trials_do_not_depend_on_may_differ(study_folder, project, tmp_path):
    held = Benchmark.load(study_folder / "benchmark.json")
    settings = ("retrain.steps=9", "retrain.num_seeds=1", "search.steps=9", "latency.target_ms=5.1")
    settings += ("search.split_seed=3",)  # that of the run
    config = load_config(project / "config.yaml", [*STUDY, *settings])
    assert len(given_by(held, Experiment(config, tmp_path / "other"))) == 7


# The file -----------------------------------------------------------------------------------


def made_up(values) -> Benchmark:
    """A benchmark of the small space with any figures."""
    space = SearchSpace.from_yaml(SMALL_SPACE)
    generator = np.random.default_rng(0)
    entries = []
    for trainings in values:
        rows = tuple(
            Training(
                seed=seed,
                cpu_seconds=1.5,
                curve={4: {"depth": {"rmse": 2 * value}}, 8: {"depth": {"rmse": value}}},
                test_metrics={"depth": {"rmse": value / 2}},
            )
            for seed, value in enumerate(trainings)
        )
        entries.append(Entry(architecture=space.sample(generator), trainings=rows))
    return Benchmark(space=space, config={"seed": 0}, made={}, entries=tuple(entries))


figures = st.floats(1e-3, 1e6)


@given(st.lists(st.lists(figures, min_size=1, max_size=3), min_size=1, max_size=4))
@settings(max_examples=12)
def test_a_file_keeps_six_digits(tmp_path_factory, values):
    one = made_up(values)
    path = tmp_path_factory.mktemp("file") / "benchmark.json"
    one.save(path)
    held = Benchmark.load(path)
    assert held.space == one.space
    for a, b in zip(held.entries, one.entries, strict=True):
        assert a.architecture == b.architecture
        for x, y in zip(a.trainings, b.trainings, strict=True):
            assert (x.seed, x.cpu_seconds) == (y.seed, y.cpu_seconds)
            assert list(x.curve) == [4, 8]
            assert math.isclose(
                x.metrics["depth"]["rmse"], y.metrics["depth"]["rmse"], rel_tol=1e-5
            )
    # What was read writes the same file.
    again = path.with_name("again.json")
    held.save(again)
    assert again.read_text() == path.read_text()


def test_only_entries_with_most_seeds_show_the_noise():
    assert made_up([[1.0], [2.0]]).repeated == ()
    one = made_up([[1.0], [2.0, 2.1], [3.0, 3.1, 3.2], [4.0, 4.1, 4.2]])
    assert one.repeated == one.entries[2:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "expected a benchmark of format 1"),
        (lambda d: d.pop("columns"), r"not a benchmark: KeyError\('columns'\)"),
        (lambda d: d["entries"][1].update(architecture="i3e1c8"), "entry 2: architecture has 1 bl"),
        (lambda d: d["entries"][1].update(trainings=[]), "entry 2: has no training, or one with"),
        (lambda d: d["entries"][0]["trainings"][0].update(test=[]), "entry 1: expected 1 finite"),
        (
            lambda d: d["entries"][0]["trainings"][0].update(test=[math.nan]),
            "not valid JSON: NaN is no number",
        ),
        (lambda d: d["entries"][0].pop("trainings"), r"not a benchmark: KeyError"),
        (
            lambda d: d["entries"][0]["trainings"][0].update(curve={}),
            "entry 1: has no training, or one without",
        ),
    ],
)
def test_a_damaged_file_is_refused_with_the_entry(tmp_path, change, message):
    path = tmp_path / "benchmark.json"
    made_up([[1.0], [2.0]]).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        Benchmark.load(path)
    assert str(caught.value).startswith(str(path))
    with pytest.raises(FileNotFoundError):
        Benchmark.load(tmp_path / "absent.json")


def test_an_interrupt_tells_how_far_it_got(study_folder, project, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("oneshot_ednas.benchmark.build.run_trial", interrupt)
    study = open_study(project, tmp_path / "study")
    with (
        open_workers("1") as workers,
        pytest.raises(Interrupted, match="stopped with 0 of 7 train"),
    ):
        study.run(workers)
