"""The benchmark in the repository is what its config says, and can be made again."""

import itertools

import numpy as np
import pytest

from oneshot_ednas.benchmark.build import Study
from oneshot_ednas.benchmark.settings import training_differences
from oneshot_ednas.benchmark.table import Benchmark
from oneshot_ednas.config import load_config
from oneshot_ednas.correlation import kendall_tau
from oneshot_ednas.run_folder import Experiment
from oneshot_ednas.schema import shipped, to_plain
from oneshot_ednas.space import ednas_tiny
from oneshot_ednas.training import accuracy_of

CONFIG = "configs/benchmark_streets_tiny.yaml"


@pytest.fixture(scope="module")
def benchmark():
    return Benchmark.load(shipped("benchmarks/ednas_tiny_streets.json"))


def accuracies(benchmark, entries) -> np.ndarray:
    """Accuracy product of each training: [entries, seeds]."""
    return np.array(
        [[accuracy_of(benchmark.tasks, one.metrics) for one in e.trainings] for e in entries]
    )


def test_it_holds_what_its_config_asks_for(benchmark):
    config = load_config(shipped(CONFIG))
    assert training_differences(benchmark.config, config) == []
    study = to_plain(config.study)
    assert benchmark.config["study"] == study
    assert benchmark.space == ednas_tiny()
    assert len(benchmark.entries) == study["num_architectures"] >= 128
    assert len(benchmark.repeated) == study["num_repeated"] >= 16
    assert len(benchmark.repeated[0].trainings) == study["num_seeds"] >= 3
    assert len(benchmark.entries[0].trainings[0].curve) == study["num_scorings"]


def test_its_architectures_spread_further_than_its_seeds(benchmark):
    repeated = accuracies(benchmark, benchmark.repeated)
    taus = [kendall_tau(a, b) for a, b in itertools.combinations(repeated.T, 2)]
    assert np.mean(taus) > 0.7
    noise = repeated.std(axis=1, ddof=1).mean()
    everything = [e.trainings[0] for e in benchmark.entries]
    spread = np.std([accuracy_of(benchmark.tasks, one.metrics) for one in everything])
    assert spread > 4 * noise


@pytest.mark.slow
def test_two_entries_trained_anew_come_out_within_the_noise(benchmark, tmp_path):
    experiment = Experiment(load_config(shipped(CONFIG)), tmp_path / "run")
    trainer = experiment.trainer(with_test=True)
    repeated = accuracies(benchmark, benchmark.repeated)
    noise = np.sqrt(repeated.var(axis=1, ddof=1).mean())
    jobs = Study(experiment).jobs
    stored = {entry.architecture: entry.trainings for entry in benchmark.entries}
    for job in (jobs[0], jobs[-1]):
        held = next(one for one in stored[job.architecture] if one.seed == job.seed)
        outcome = trainer(job.architecture, job.seed)
        for found, kept in (
            (outcome.metrics, held.metrics),
            (outcome.test_metrics, held.test_metrics),
        ):
            difference = accuracy_of(benchmark.tasks, found) - accuracy_of(benchmark.tasks, kept)
            assert abs(difference) < 3 * noise
