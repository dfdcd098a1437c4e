"""Balancing of tasks: known optima, NumPy references, laws of the weights, exact resumption."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import CPU, FAST

from oneshot_ednas.balancing import (
    BalancingConfig,
    DynamicWeightAverage,
    UncertaintyBalancing,
    dynamic_weights,
    uncertainty_loss,
)
from oneshot_ednas.checkpoint import load_checkpoint, save_checkpoint
from oneshot_ednas.config import load_config
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.retrain import RetrainConfig, StandAloneTraining
from oneshot_ednas.tasks import TaskConfig, make_tasks
from oneshot_ednas.training import OptimizerConfig, evaluate
from oneshot_ednas.trial import StandAloneTrainer

METHODS = ("fixed", "uncertainty", "dwa")
LOSSES = st.just(0.0) | st.floats(1e-6, 100)
SAMPLES = st.lists(st.tuples(LOSSES, LOSSES), min_size=1, max_size=6)


def balancing_of(method: str, *loss_weights: float, epoch_steps: int = 4, **settings):
    tasks = {
        f"task{i}": TaskConfig(kind="segmentation", num_classes=2, loss_weight=weight)
        for i, weight in enumerate(loss_weights)
    }
    config = BalancingConfig(method=method, **settings)
    return config.build(make_tasks(tasks), epoch_steps=epoch_steps, device=CPU)


def named(*losses: float) -> dict[str, torch.Tensor]:
    return {f"task{i}": torch.tensor(loss) for i, loss in enumerate(losses)}


def numbers(weights) -> list[float]:
    return [float(weight) for weight in weights.values()]


def training(tiny, method: str, seed: int = 0, **settings) -> StandAloneTraining:
    settings = {"steps": 12, "batch_size": 8, "optimizer": FAST} | settings
    return StandAloneTraining(
        RetrainConfig(balancing=BalancingConfig(method=method), **settings),
        tiny.space,
        tiny.space.base_architecture,
        tiny.tasks,
        tiny.train.subset(range(24)),
        stage="trial",
        augmentation=AugmentConfig(flip=True, brightness=0.2),
        seed=seed,
        device=CPU,
    )


def weights_of(network) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def digest(checkpoint: Path) -> str:
    """Over every tensor and number of a checkpoint."""
    with safe_open(str(checkpoint), framework="pt") as file:
        return json.loads(file.metadata()["checkpoint"])["sha256"]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Fixed --------------------------------------------------------------------------------------


def test_fixed_is_the_sum_of_the_losses_times_their_loss_weights_bit_by_bit():
    balancing = balancing_of("fixed", 0.1, 0.7, 1 / 3)
    losses = {
        name: torch.tensor(value, requires_grad=True)
        for name, value in {"task0": 2.3, "task1": 0.9, "task2": 41.7}.items()
    }
    loss = balancing.loss(losses)
    by_hand = torch.stack([w * t for w, t in zip((0.1, 0.7, 1 / 3), losses.values(), strict=True)])
    assert torch.equal(loss, by_hand.sum())
    gradients = torch.autograd.grad(loss, list(losses.values()))
    assert [g.item() for g in gradients] == [np.float32(w).item() for w in (0.1, 0.7, 1 / 3)]
    balancing.end_step(losses)
    assert balancing.weights() == {"task0": 0.1, "task1": 0.7, "task2": 1 / 3}
    assert balancing.values() == {}


def test_fixed_adds_nothing_to_the_optimizer_and_is_the_default():
    assert RetrainConfig(steps=1, batch_size=1).balancing == BalancingConfig(method="fixed")
    optimizer = OptimizerConfig().build([torch.nn.Parameter(torch.zeros(2))])
    before = copy.deepcopy(optimizer.state_dict())
    balancing_of("fixed", 1.0).add_to(optimizer)
    balancing_of("dwa", 1.0).add_to(optimizer)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("method", ["uncertainty", "dwa"])
def test_every_method_begins_with_the_loss_weights(tiny, method):
    fixed, other = training(tiny, "fixed"), training(tiny, method)
    losses = [float(t.take_step(0)["loss/weights"]) for t in (fixed, other)]
    assert losses[0] == losses[1]
    assert equal(weights_of(fixed.network), weights_of(other.network))


# Uncertainty --------------------------------------------------------------------------------


def test_the_log_variances_descend_to_the_logarithm_of_the_weighted_loss():
    balancing = balancing_of("uncertainty", 1.0, 0.1, 4.0, learning_rate=0.05)
    optimizer = OptimizerConfig(weight_decay=0.1).build([torch.nn.Parameter(torch.zeros(1))])
    balancing.add_to(optimizer)
    losses = named(0.02, 30.0, 2.5)
    for _ in range(1000):
        optimizer.zero_grad()
        balancing.loss(losses).backward()
        optimizer.step()
    expected = torch.tensor([0.02, 0.1 * 30.0, 4.0 * 2.5])
    torch.testing.assert_close(balancing.log_variances.detach(), expected.log(), atol=1e-3, rtol=0)
    # There each factor is 1 / L, whatever its loss weight.
    assert numbers(balancing.weights()) == pytest.approx([1 / 0.02, 1 / 30.0, 1 / 2.5], rel=1e-3)
    # 1 + log(w L) per task.
    total = 3 + float(expected.log().sum())
    assert float(balancing.loss(losses).detach()) == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("log_variances", [(0.0, 0.0), (-1.5, 2.0)])
def test_the_gradients_of_the_uncertainty_loss_are_those_of_finite_differences(log_variances):
    weighted = torch.tensor([0.3, 7.0], dtype=torch.float64, requires_grad=True)
    s = torch.tensor(log_variances, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(uncertainty_loss, (weighted, s))
    of_losses, of_s = torch.autograd.grad(uncertainty_loss(weighted, s), (weighted, s))
    factors = np.exp(-np.array(log_variances))
    np.testing.assert_allclose(of_losses, factors)
    np.testing.assert_allclose(of_s, 1 - factors * np.array([0.3, 7.0]))


def test_the_uncertainty_loss_is_the_likelihood_of_a_laplace_error():
    error, s = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    laplace = torch.distributions.Laplace(torch.zeros_like(s), s.exp())
    expected = -laplace.log_prob(error).sum() - math.log(2)
    torch.testing.assert_close(uncertainty_loss(error, s), expected)


def test_a_task_without_loss_leaves_its_log_variance_alone():
    balancing = balancing_of("uncertainty", 1.0, 0.0, 2.0)
    optimizer = OptimizerConfig().build([torch.nn.Parameter(torch.zeros(1))])
    balancing.add_to(optimizer)
    for _ in range(5):  # no valid pixel in the first, no weight in the second
        optimizer.zero_grad()
        balancing.loss(named(0.0, 3.0, 3.0)).backward()
        optimizer.step()
    assert balancing.log_variances[:2].tolist() == [0, 0]
    assert balancing.log_variances[2] > 0
    assert numbers(balancing.weights())[1] == 0


def test_log_variances_have_a_learning_rate_of_their_own_and_no_weight_decay(tiny):
    run = training(tiny, "uncertainty")
    weights, own = run.optimizer.param_groups
    for step in (0, 6, 11):
        run.take_step(step)
        assert own["lr"] == 0.01
        assert weights["lr"] == FAST.rate_at(step, 12)
    assert (own["weight_decay"], weights["weight_decay"]) == (0.0, FAST.weight_decay)
    assert own["params"] == [run.balancing.log_variances]


def test_weights_for_alpha_give_no_gradient_to_the_log_variances():
    balancing = balancing_of("uncertainty", 1.0, 2.0)
    with torch.no_grad():
        balancing.log_variances.copy_(torch.tensor([0.5, -1.0]))
    expected = {"task0": math.exp(-0.5), "task1": 2 * math.exp(1)}
    for name, weight in balancing.weights().items():
        assert not weight.requires_grad
        assert float(weight) == pytest.approx(expected[name])
    values = {name: float(value) for name, value in balancing.values().items()}
    assert values == pytest.approx(
        {
            "balancing/task0": expected["task0"],
            "balancing/task1": expected["task1"],
            "log_variance/task0": 0.5,
            "log_variance/task1": -1.0,
        }
    )


# Dynamic weight average ---------------------------------------------------------------------


@given(SAMPLES, st.floats(0.1, 50))
def test_dynamic_weights_sum_to_the_number_of_tasks(pairs, temperature):
    last, before = torch.tensor(pairs).float().unbind(1)
    weights = dynamic_weights(last, before, temperature)
    assert bool((weights >= 0).all())
    assert float(weights.double().sum()) == pytest.approx(len(pairs), rel=1e-5)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.floats(0.1, 2))
def test_equal_ratios_give_weights_of_one(before, ratio):
    losses = torch.tensor(before)
    weights = dynamic_weights(ratio * losses, losses, 2.0)
    torch.testing.assert_close(weights, torch.ones(len(before)))


@given(st.floats(0.01, 2), st.floats(0.01, 2), st.floats(0.5, 10))
def test_the_task_whose_loss_falls_slower_gets_more(one, other, temperature):
    if abs(one - other) < 1e-3:
        one = other + 0.1
    scale = torch.tensor([5.0, 0.3])  # of the losses, which does not matter
    ratios = torch.tensor([one, other])
    weights = dynamic_weights(ratios * scale, scale, temperature)
    assert bool(weights[0] > weights[1]) == (one > other)
    cold = dynamic_weights(ratios * scale, scale, temperature / 2)
    assert float((cold - 1).abs().max()) > float((weights - 1).abs().max())


def test_a_loss_of_zero_the_epoch_before_counts_as_unchanged():
    weights = dynamic_weights(torch.tensor([0.0, 3.0, 2.0]), torch.tensor([0.0, 0.0, 2.0]), 2.0)
    assert weights.tolist() == [1, 1, 1]


def test_dwa_agrees_with_numpy_over_several_epochs():
    generator = np.random.default_rng(0)
    num_epochs, epoch_steps, loss_weights = 6, 5, [1.0, 0.1, 3.0]
    losses = generator.uniform(0.1, 3, (num_epochs, epoch_steps, 3)).astype(np.float32)
    balancing = balancing_of("dwa", *loss_weights, epoch_steps=epoch_steps, temperature=0.7)
    means = losses.astype(np.float64).mean(1)
    for epoch in range(num_epochs):
        expected = np.ones(3)
        if epoch >= 2:
            powers = np.exp(means[epoch - 1] / means[epoch - 2] / 0.7)
            expected = 3 * powers / powers.sum()
            assert np.abs(expected - 1).max() > 0.05
        for step in range(epoch_steps):
            weights = balancing.weights()
            assert numbers(weights) == pytest.approx(expected * np.array(loss_weights), rel=1e-4)
            values = {name: float(value) for name, value in balancing.values().items()}
            assert values == {f"balancing/{name}": float(w) for name, w in weights.items()}
            of_step = named(*losses[epoch, step].tolist())
            total = (expected * loss_weights * losses[epoch, step]).sum()
            assert float(balancing.loss(of_step)) == pytest.approx(total, rel=1e-4)
            balancing.end_step(of_step)


def test_a_step_of_several_networks_counts_with_their_mean():
    one, other = (balancing_of("dwa", 1.0, 1.0, epoch_steps=2) for _ in range(2))
    for first, second in ((4.0, 3.0), (2.0, 5.0), (1.0, 2.0), (0.5, 2.5)):
        one.end_step(named(first, second), named(3 * first, 5 * second))
        other.end_step(named(2 * first, 3 * second))
    assert numbers(one.weights()) != [1, 1]
    assert numbers(one.weights()) == numbers(other.weights())


def test_an_epoch_is_a_pass_over_the_frames(tiny):
    run = training(tiny, "dwa")  # 24 frames in batches of 8
    logged = [run.take_step(step) for step in range(12)]
    seen = np.array([[float(v[f"loss/{name}"]) for name in tiny.tasks] for v in logged])
    used = np.array([[float(v[f"balancing/{name}"]) for name in tiny.tasks] for v in logged])
    means = seen.reshape(4, 3, 2).mean(1)
    for epoch in range(4):
        expected = np.ones(2)
        if epoch >= 2:
            powers = np.exp(means[epoch - 1] / means[epoch - 2] / 2)
            expected = 2 * powers / powers.sum()
        for step in range(3 * epoch, 3 * epoch + 3):
            np.testing.assert_allclose(used[step], expected * [1.0, 0.1], rtol=1e-5)
            total = (used[step] * seen[step]).sum()
            assert float(logged[step]["loss/weights"]) == pytest.approx(total, rel=1e-5)
    assert not np.allclose(used[6], used[0])
    assert not np.allclose(used[9], used[6])


# Trainings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_training_resumed_in_an_epoch_equals_an_uninterrupted_one_bit_by_bit(
    tiny, tmp_path, method
):
    # 10 steps in epochs of 3: sittings end at the start, in the middle and at the end of epochs.
    whole, logs = training(tiny, method), ([], [])
    path = tmp_path / "x.safetensors"
    for step in range(10):
        logs[0].append({name: float(value) for name, value in whole.take_step(step).items()})
    start = 0
    for stop in (1, 5, 6, 8, 10):
        resumed = training(tiny, method)
        assert resumed.resume(path) == start
        for step in range(start, stop):
            logs[1].append({name: float(value) for name, value in resumed.take_step(step).items()})
        save_checkpoint(path, resumed.state_dict(stop))
        start = stop
    assert logs[0] == logs[1]
    save_checkpoint(tmp_path / "whole.safetensors", whole.state_dict(10))
    assert digest(path) == digest(tmp_path / "whole.safetensors")


def test_a_finished_state_does_not_change_with_the_training_that_goes_on(tiny):
    run = training(tiny, "dwa")
    run.take_step(0)
    state = copy.deepcopy(run.balancing.state_dict())
    other = training(tiny, "dwa")
    other.balancing.load_state_dict(state)
    before = state["sums"].clone()
    other.take_step(1)
    assert torch.equal(state["sums"], before)
    assert not torch.equal(other.balancing.sums, before)


@pytest.mark.parametrize("method", ["uncertainty", "dwa"])
def test_a_method_changes_the_training(tiny, method):
    fixed, other = training(tiny, "fixed"), training(tiny, method)
    for step in range(7):
        fixed.take_step(step)
        other.take_step(step)
    assert not equal(weights_of(fixed.network), weights_of(other.network))


@pytest.mark.parametrize("method", ["uncertainty", "dwa"])
def test_a_trial_trains_as_a_retraining_does(tiny, method):
    run = training(tiny, method, calibration_batches=1)
    for step in range(12):
        run.take_step(step)
    run.recalibrate()
    trainer = StandAloneTrainer(
        config=run.config,
        space=tiny.space,
        tasks=tiny.tasks,
        training=run.split,
        validation=tiny.train.subset(range(24, 32)),
        augmentation=run.augmentation,
        eval_batch_size=8,
        device=CPU,
    )
    found = trainer(run.architecture, run.seed).metrics
    expected = evaluate(run.network, trainer.validation, tiny.tasks, batch_size=8, device=CPU)
    assert found == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_another_method_is_refused_and_an_old_one_is_fixed(tiny, tmp_path, method):
    path = tmp_path / "x.safetensors"
    for held in METHODS:
        save_checkpoint(path, training(tiny, held).state_dict(0))
        if held == method:
            assert training(tiny, method).resume(path) == 0
            continue
        with pytest.raises(
            ValueError, match=rf"^the checkpoint has balancing {held}, the config {method}; .*$"
        ):
            training(tiny, method).resume(path)
    state = training(tiny, "fixed").state_dict(0)
    del state["balancing"]
    save_checkpoint(path, state)
    assert "balancing" not in load_checkpoint(path)
    if method == "fixed":
        assert training(tiny, method).resume(path) == 0
    else:
        with pytest.raises(ValueError, match="has balancing fixed"):
            training(tiny, method).resume(path)


# The search ---------------------------------------------------------------------------------


def test_a_weight_step_of_a_sandwich_moves_log_variances_by_the_mean_of_its_networks(tiny):
    search = tiny.search(
        sandwich=True, distillation=True, balancing=BalancingConfig(method="uncertainty")
    )
    assert isinstance(search.balancing, UncertaintyBalancing)
    seen, loss = [], search.balancing.loss
    search.balancing.loss = lambda losses: seen.append(losses) or loss(losses)
    search._weight_step(0, uniform=True)
    assert len(seen) == 3
    means = [np.mean([float(losses[name].detach()) for losses in seen]) for name in search.tasks]
    expected = 1 - np.array([1.0, 0.1]) * means  # at s = 0
    np.testing.assert_allclose(search.balancing.log_variances.grad, expected, rtol=1e-5)


def test_a_weight_step_of_a_sandwich_notes_the_mean_of_its_networks(tiny):
    search = tiny.search(sandwich=True, distillation=True, balancing=BalancingConfig(method="dwa"))
    assert isinstance(search.balancing, DynamicWeightAverage)
    assert search.balancing.epoch_steps == 4  # 16 frames in batches of 4
    seen, loss = [], search.balancing.loss
    search.balancing.loss = lambda losses: seen.append(losses) or loss(losses)
    values = search._weight_step(0, uniform=True)
    means = [np.mean([float(losses[name].detach()) for losses in seen]) for name in search.tasks]
    np.testing.assert_allclose(search.balancing.sums, means, rtol=1e-5)
    assert search.balancing.num_steps == 1
    assert {"balancing/segmentation", "balancing/depth"} <= values.keys()


@pytest.mark.parametrize("method", METHODS)
def test_an_alpha_step_takes_the_tasks_weights_as_constants(tiny, method):
    def moved(search):
        if method == "uncertainty":
            with torch.no_grad():
                search.balancing.log_variances.copy_(torch.tensor([2.0, -3.0]))
        if method == "dwa":
            search.balancing.lambdas = torch.tensor([0.5, 1.5])
        return search

    search = moved(tiny.search(balancing=BalancingConfig(method=method)))
    state = copy.deepcopy((search.balancing.state_dict(), search.optimizer.state_dict()))
    gates = search._gates(4)
    batch = search._batch("alpha", 4)
    losses = {
        name: task.loss(search.supernet(batch["image"], gates)[name], batch[name])
        for name, task in search.tasks.items()
    }
    factors = {
        "fixed": [1.0, 0.1],
        "uncertainty": [math.exp(-2), 0.1 * math.exp(3)],
        "dwa": [0.5, 0.15],
    }[method]
    total = sum(f * loss for f, loss in zip(factors, losses.values(), strict=True))
    (expected,) = torch.autograd.grad(total, search.alpha.logits)
    caught, update = [], search._alpha_update
    search._alpha_update = lambda *args: caught.append(args[1]) or update(*args)
    values = search._alpha_step(4)
    torch.testing.assert_close(caught[0], expected, rtol=1e-4, atol=1e-7)
    assert float(values["loss/alpha"]) == pytest.approx(float(total.detach()), rel=1e-5)
    after = search.balancing.state_dict(), search.optimizer.state_dict()
    assert str(state) == str(after)
    if method == "uncertainty":
        assert search.balancing.log_variances.grad is None


def test_a_joint_step_trains_the_log_variances_and_gives_alpha_the_gradient_of_constants(tiny):
    settings = {"mode": "joint", "warmup_fraction": 0.0}
    search = tiny.search(balancing=BalancingConfig(method="uncertainty"), **settings)
    fixed = tiny.search(**settings)
    caught = []
    for each in (search, fixed):
        update = each._alpha_update
        each._alpha_update = lambda *args, update=update: (
            caught.append(args[1].clone()) or update(*args)
        )
        each.take_step(0)
    # At s = 0 the factors are those of fixed weights, though s moves in the same step.
    assert torch.equal(caught[0], caught[1])
    assert torch.count_nonzero(search.balancing.log_variances) == 2


# Config -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["temperature", "learning_rate"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected a positive number, got {value}$"):
        BalancingConfig(**{name: value})


@pytest.mark.parametrize("part", ["search", "retrain"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("method=gradnorm", "expected one of fixed, uncertainty, dwa, got gradnorm"),
        ("temperature=0", "temperature: expected a positive number, got 0.0"),
        ("temperatur=1", "unknown key .*balancing.temperatur; did you mean temperature?"),
    ],
)
def test_a_bad_setting_in_a_config_is_refused_in_one_line(project, part, setting, message):
    with pytest.raises(ValueError, match=message) as error:
        load_config(project / "config.yaml", [f"{part}.balancing.{setting}"])
    assert f"{part}.balancing" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_chooses_the_method_of_search_and_retraining(project):
    overrides = ["search.balancing.method=dwa", "retrain.balancing.method=uncertainty"]
    config = load_config(project / "config.yaml", overrides)
    assert config.search.balancing == BalancingConfig(method="dwa", temperature=2.0)
    assert config.retrain.balancing.method == "uncertainty"
