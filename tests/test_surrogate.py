"""The surrogate of a benchmark: known functions are found, noise is as measured, laws hold."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import SMALL_SPACE
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.benchmark.surrogate import (
    BenchmarkTrainer,
    Surrogate,
    _pair_terms,
    fit_scales,
    kernel,
)
from oneshot_ednas.benchmark.table import Benchmark, Entry, Training
from oneshot_ednas.latency.operations import network_macs
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.training import training_macs

CONFIG = {
    "data": {"height": 32, "width": 48},
    "retrain": {"batch_size": 4},
    "multi_trial": {"steps": 8},
    "tasks": {
        "segmentation": {"kind": "segmentation", "num_classes": 4},
        "depth": {"kind": "depth"},
    },
}
CHANNELS = {"segmentation": 4, "depth": 1}
NOISE = 0.02
"""Deviation of log miou between seeds; the others follow it."""


def true_logs(space, architecture) -> dict[str, float]:
    """Metrics that depend on what the options are and on what they cost."""
    size = math.log(network_macs(space, architecture, (32, 48), CHANNELS) / 1e6)
    kernels = sum(block.kernel_size == 5 for block in architecture.blocks)
    return {"miou": -1 + 0.2 * size + 0.03 * kernels, "error": 0.5 - 0.1 * size}


def metrics_of(logs, noise=0.0):
    miou, error = min(math.exp(logs["miou"] + noise), 1.0), math.exp(logs["error"] - noise / 2)
    return {
        "segmentation": {"miou": miou, "pixel_accuracy": miou**0.5},
        "depth": {"absolute_error": error, "relative_error": error / 3},
    }


def made_up(count=40, repeated=16, num_seeds=3, noise=NOISE) -> Benchmark:
    space, generator = SearchSpace.from_yaml(SMALL_SPACE), np.random.default_rng(0)
    entries = []
    for number in range(count):
        architecture = space.sample(generator)
        logs = true_logs(space, architecture)
        macs = network_macs(space, architecture, (32, 48), CHANNELS)
        rows = tuple(
            Training(
                seed=seed,
                cpu_seconds=2 + macs / 1e6,
                curve={8: metrics_of(logs, noise * generator.normal())},
                test_metrics=metrics_of(logs, noise * generator.normal()),
            )
            for seed in range(num_seeds if number < repeated else 1)
        )
        entries.append(Entry(architecture=architecture, trainings=rows))
    return Benchmark(space=space, config=CONFIG, made={}, entries=tuple(entries))


@pytest.fixture(scope="module")
def trainer():
    return BenchmarkTrainer(made_up())


@pytest.fixture(scope="module")
def fresh(trainer):
    """Architectures that the benchmark has not."""
    generator = np.random.default_rng(1)
    known = {entry.architecture for entry in trainer.benchmark.entries}
    drawn = [trainer.benchmark.space.sample(generator) for _ in range(40)]
    return [one for one in dict.fromkeys(drawn) if one not in known]


def test_a_known_function_is_predicted_within_the_noise(trainer, fresh):
    space = trainer.benchmark.space
    truth = [metrics_of(true_logs(space, one)) for one in fresh]
    found = [trainer.surrogate.predict(one) for one in fresh]
    for kind in ("metrics", "test_metrics"):
        for task, name in (("segmentation", "miou"), ("depth", "absolute_error")):
            errors = [
                math.log(getattr(one, kind)[task][name] / other[task][name])
                for one, other in zip(found, truth, strict=True)
            ]
            spread = np.std([math.log(other[task][name]) for other in truth])
            assert np.sqrt(np.mean(np.square(errors))) < NOISE
            assert np.sqrt(np.mean(np.square(errors))) < spread / 3


def test_the_seed_noise_is_that_of_the_repeated_architectures(trainer, fresh):
    architecture = fresh[0]
    drawn = [trainer(architecture, seed).metrics for seed in range(300)]
    miou, error = (
        np.log([one[task][name] for one in drawn])
        for task, name in (("segmentation", "miou"), ("depth", "absolute_error"))
    )
    # Measured on 16 x 3 trainings, whose deviation has a standard error of an eighth.
    assert miou.std() == pytest.approx(NOISE, rel=0.4)
    assert error.std() == pytest.approx(NOISE / 2, rel=0.4)
    assert np.corrcoef(miou, error)[0, 1] < -0.98
    mean = math.log(trainer.surrogate.predict(architecture).metrics["segmentation"]["miou"])
    assert miou.mean() == pytest.approx(mean, abs=4 * NOISE / math.sqrt(300))


def test_an_outcome_is_a_function_of_architecture_and_seed(trainer, fresh):
    a, b = fresh[:2]
    assert trainer(a, 1) == trainer(a, 1) == BenchmarkTrainer(made_up())(a, 1)
    assert trainer(a, 1).metrics != trainer(a, 2).metrics
    assert trainer(a, 1).test_metrics == trainer(a, 2).test_metrics
    noise = [
        trainer(one, 1).metrics["segmentation"]["miou"]
        / trainer.surrogate.predict(one).metrics["segmentation"]["miou"]
        for one in (a, b)
    ]
    assert noise[0] != pytest.approx(noise[1])


def test_what_a_trial_costs(trainer, fresh):
    for architecture in fresh[:5]:
        outcome = trainer(architecture, 0, scored_steps=(2, 4))
        macs = network_macs(trainer.benchmark.space, architecture, (32, 48), CHANNELS)
        assert outcome.macs == training_macs(macs, 8 * 4)
        assert outcome.seconds == outcome.cpu_seconds == pytest.approx(2 + macs / 1e6)
        assert outcome.curve == {8: outcome.metrics}


@given(st.integers(0, 10_000), st.integers(0, 3))
@settings(max_examples=30)
def test_figures_are_positive_finite_and_shares_at_most_one(trainer, seed, number):
    architecture = trainer.benchmark.space.sample(np.random.default_rng(seed))
    outcome = trainer(architecture, number)
    for metrics in (outcome.metrics, outcome.test_metrics):
        for values in metrics.values():
            assert all(math.isfinite(value) and value > 0 for value in values.values())
        assert max(metrics["segmentation"].values()) <= 1
    assert outcome.cpu_seconds > 0


def test_figures_stay_near_what_was_seen_even_with_a_metric_of_zero():
    held = made_up(count=12, repeated=12, num_seeds=2, noise=1.0)
    first = held.entries[0].trainings[0]
    zero = {8: {**first.metrics, "segmentation": {"miou": 0.0, "pixel_accuracy": 1.0}}}
    broken = replace(held.entries[0], trainings=(replace(first, curve=zero),) * 2)
    one = BenchmarkTrainer(replace(held, entries=(broken, *held.entries[1:])))
    for seed in range(200):
        metrics = one(held.entries[seed % 12].architecture, seed).metrics
        assert 0 < metrics["segmentation"]["miou"] <= 1
        assert math.isfinite(metrics["depth"]["absolute_error"])


def test_an_architecture_of_another_space_is_refused(trainer, fresh):
    other = replace(fresh[0], blocks=fresh[0].blocks[:-1])
    with pytest.raises(ValueError, match="architecture has 3 blocks, space small has 4"):
        trainer(other, 0)


def test_a_benchmark_without_repeated_architectures_is_refused():
    with pytest.raises(ValueError, match=r"at least 4 architectures with several seeds.* has 3"):
        Surrogate(made_up(count=10, repeated=3))


# Left out -----------------------------------------------------------------------------------


def test_held_out_figures_are_those_of_models_fitted_without_each(trainer):
    found = trainer.surrogate.held_out()
    assert set(found) == {
        "accuracy",
        "segmentation.miou",
        "segmentation.pixel_accuracy",
        "depth.absolute_error",
        "depth.relative_error",
    }
    for one in found.values():
        # A function this simple is known up to the noise.
        assert one.log_error < 1.5 * one.log_noise
        assert one.log_error < one.log_spread / 2
        assert one.kendall_tau > 0.6
        assert one.noise_ceiling == pytest.approx(one.kendall_tau, abs=0.2)
    assert found["segmentation.miou"].log_noise == pytest.approx(NOISE, rel=0.4)


@given(st.integers(0, 100))
@settings(max_examples=8)
def test_leaving_one_out_in_closed_form_is_solving_without_it(seed):
    generator = np.random.default_rng(seed)
    inputs = (generator.normal(size=(9, 4)), generator.normal(size=(9, 3)))
    target, noise = generator.normal(size=9), generator.uniform(0.05, 0.2, 9)
    scales = np.exp(generator.normal(size=4))
    whole = kernel(scales, _pair_terms(inputs, inputs))
    inverse = np.linalg.inv(whole + np.diag(noise))
    closed = target - inverse @ target / np.diag(inverse)
    for i in range(9):
        rest = np.arange(9) != i
        weights = np.linalg.solve((whole + np.diag(noise))[np.ix_(rest, rest)], target[rest])
        assert closed[i] == pytest.approx(whole[i, rest] @ weights)


# The kernel ---------------------------------------------------------------------------------


@given(st.integers(0, 100))
@settings(max_examples=10)
def test_kernels_are_covariances(seed):
    generator = np.random.default_rng(seed)
    one, other = ((generator.normal(size=(n, 5)), generator.normal(size=(n, 2))) for n in (7, 3))
    scales = np.exp(generator.normal(size=4))
    matrix = kernel(scales, _pair_terms(one, one))
    assert matrix == pytest.approx(matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > -1e-9
    cross = kernel(scales, _pair_terms(one, other))
    assert cross == pytest.approx(kernel(scales, _pair_terms(other, one)).T)
    (smooth,) = _pair_terms(one, other)[2:]
    for i, j in itertools.product(range(7), range(3)):
        parts = [(a[i] - b[j]) ** 2 for a, b in zip(one, other, strict=True)]
        assert smooth[i, j] == pytest.approx(np.concatenate(parts).mean())


def test_the_fit_tells_a_linear_target_from_a_smooth_one():
    generator = np.random.default_rng(0)
    options, costs = np.sign(generator.normal(size=(60, 8))), generator.normal(size=(60, 2))
    pairs, noise = _pair_terms((options, costs), (options, costs)), np.full(60, 0.01)
    linear = options @ generator.normal(size=8) / math.sqrt(8)
    scales = fit_scales(pairs, linear + 0.1 * generator.normal(size=60), noise)
    assert scales[0] > 3 * scales[2]
    wave = np.sin(2 * costs[:, 0]) + np.cos(2 * costs[:, 1])
    scales = fit_scales(pairs, wave + 0.1 * generator.normal(size=60), noise)
    assert scales[2] > 3 * scales[1]
    assert fit_scales(pairs, wave, noise, is_linear=True)[2] == 0
