"""Training from scratch: exact resumption, seeds, overfitting, refusals."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, FAST
from torch import nn

from oneshot_ednas.checkpoint import load_checkpoint
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.models.network import Network, build_network, recalibrate_bn
from oneshot_ednas.retrain import (
    NetworkTraining,
    RetrainConfig,
    compile_or_warn,
    parameter_groups,
    retrain,
    train_to_end,
)
from oneshot_ednas.training import Interrupted, LoopConfig, OptimizerConfig, calibration_images

SETTINGS = {
    "steps": 5,
    "batch_size": 4,
    "calibration_batches": 2,
    "optimizer": FAST,
    "loop": LoopConfig(log_every=1, checkpoint_every=2, max_skipped=0),
}


def train(tiny, folder, *, architecture=None, seed=0, split=None, augment=True, **settings):
    return retrain(
        RetrainConfig(**(SETTINGS | settings)),
        tiny.space,
        architecture or tiny.space.base_architecture,
        tiny.tasks,
        split or tiny.train,
        stage="retrain.seed_0",
        folder=folder,
        checkpoint=folder / "retrain.safetensors",
        augmentation=AugmentConfig(flip=augment, brightness=0.2 if augment else 0.0),
        seed=seed,
        device=CPU,
    )


def same(one: Network, other: Network) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stop_at", [0, 3])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_by_bit(
    tiny, tmp_path, monkeypatch, stop_at
):
    (tmp_path / "whole").mkdir()
    whole = train(tiny, tmp_path / "whole")
    calls, forward = [], Network.forward

    def interrupted(self, images, run=None):
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(1)
        return forward(self, images, run)

    with monkeypatch.context() as patch:
        patch.setattr(Network, "forward", interrupted)
        with pytest.raises(Interrupted, match=f"after step {stop_at + 1} of 5 in retrain.seed_0"):
            train(tiny, tmp_path)
    torch.manual_seed(99)
    resumed = train(tiny, tmp_path)
    assert same(whole, resumed)
    logs = [f / "metrics.jsonl" for f in (tmp_path, tmp_path / "whole")]
    assert logs[0].read_text() == logs[1].read_text()
    states = [load_checkpoint(f / "retrain.safetensors") for f in (tmp_path, tmp_path / "whole")]
    for one, other in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_training_is_read_back_without_a_step(tiny, tmp_path, monkeypatch):
    first = train(tiny, tmp_path)
    monkeypatch.setattr("oneshot_ednas.retrain.run_steps", None)
    assert same(first, train(tiny, tmp_path))


def test_seeds_change_the_network_and_repeat(tiny, tmp_path):
    networks = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        networks.append(train(tiny, folder, seed=seed, steps=1))
    assert same(networks[0], networks[1])
    assert not same(networks[0], networks[2])


def test_one_batch_can_be_overfitted(tiny, tmp_path):
    part = tiny.train.subset(range(4))
    train(tiny, tmp_path, split=part, steps=40, augment=False)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss/weights"] for line in lines]
    assert losses[-1] < 0.5 * losses[0]


def test_bn_statistics_are_averages_over_calibration_images(tiny, tmp_path):
    network = train(tiny, tmp_path, steps=1)
    variances = [b for name, b in network.named_buffers() if name.endswith("running_var")]
    assert len(variances) > 10
    assert not any(torch.equal(variance, torch.ones_like(variance)) for variance in variances)
    again = copy.deepcopy(network)
    images = calibration_images(tiny.train, num_batches=2, batch_size=4, seed=0, device=CPU)
    recalibrate_bn(again, images)
    assert same(network, again)
    stored = load_checkpoint(tmp_path / "retrain.safetensors")["network"]
    assert all(torch.equal(value, stored[n]) for n, value in network.state_dict().items())


def test_a_checkpoint_of_another_architecture_or_seed_is_refused(tiny, tmp_path):
    train(tiny, tmp_path, steps=1)
    other = tiny.space.sample(np.random.default_rng(0))
    for change in ({"architecture": other}, {"seed": 1}):
        with pytest.raises(
            ValueError, match="holds another training, architecture or seed; delete it"
        ):
            train(tiny, tmp_path, steps=1, **change)


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_stays(tiny, tmp_path, monkeypatch):
    calls, forward = [], Network.forward

    def poisoned(self, images, run=None):
        calls.append(1)
        outputs = forward(self, images, run)
        if len(calls) == 4:
            outputs["segmentation"] = outputs["segmentation"] * math.nan
        return outputs

    monkeypatch.setattr(Network, "forward", poisoned)
    message = r"retrain.seed_0 step 3: the loss of segmentation is not finite, architecture i3e1c8"
    with pytest.raises(RuntimeError, match=message):
        train(tiny, tmp_path)
    state = load_checkpoint(tmp_path / "retrain.safetensors")
    assert state["step"] == 2
    assert all(torch.isfinite(value).all() for value in state["network"].values())


def test_a_gradient_that_is_not_finite_stops_too(tiny, tmp_path, monkeypatch):
    def losses(tasks, outputs, batch):
        return {name: (output.sum() * 0).abs().sqrt() for name, output in outputs.items()}

    monkeypatch.setattr("oneshot_ednas.retrain.task_losses", losses)
    with pytest.raises(RuntimeError, match=r"retrain.seed_0 step 0: the gradient is not finite"):
        train(tiny, tmp_path)


@pytest.mark.parametrize("name", ["steps", "batch_size", "num_seeds", "calibration_batches"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        RetrainConfig(**(SETTINGS | {name: 0}))


# Networks of other classes ------------------------------------------------------------------


class Plain(nn.Module):
    """A trunk of torch's own layers, and a map per task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.heads = nn.ModuleDict(
            {"segmentation": nn.Conv2d(8, 10, 1), "depth": nn.Conv2d(8, 1, 1)}
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.trunk(images)
        return {task: head(features) for task, head in self.heads.items()}


SGD = OptimizerConfig(kind="sgd", schedule="poly", learning_rate=0.1, warmup_fraction=0.0)


def plain_training(tiny, *, identity=("plain",), scales=None, **settings) -> NetworkTraining:
    return NetworkTraining(
        RetrainConfig(**(SETTINGS | {"optimizer": SGD} | settings)),
        Plain,
        tiny.tasks,
        tiny.train,
        identity=identity,
        label="plain",
        stage="plain",
        augmentation=AugmentConfig(flip=True),
        seed=0,
        device=CPU,
        lr_scales={"trunk": 0.5} if scales is None else scales,
    )


def finish(training: NetworkTraining, folder) -> nn.Module:
    return train_to_end(training, folder=folder, checkpoint=folder / "plain.safetensors")


def test_a_plain_module_is_trained_and_resumed_bit_by_bit(tiny, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = finish(plain_training(tiny), tmp_path / "whole")
    assert not torch.equal(whole.trunk[1].running_var, torch.ones(8))
    first, calls = plain_training(tiny), []

    def stop(_module, _inputs):
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(1)

    first.network.register_forward_pre_hook(stop)
    with pytest.raises(Interrupted, match="after step 4 of 5 in plain"):
        finish(first, tmp_path)
    torch.manual_seed(99)
    second = plain_training(tiny)
    assert same(whole, finish(second, tmp_path))
    states = [load_checkpoint(f / "plain.safetensors") for f in (tmp_path, tmp_path / "whole")]
    groups = [state["optimizer"]["param_groups"] for state in states]
    assert groups[0] == groups[1]
    assert [group["lr_scale"] for group in groups[0]] == [1.0, 0.5]
    for one, other in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
    monkeypatch.setattr("oneshot_ednas.retrain.run_steps", None)
    assert same(whole, finish(plain_training(tiny), tmp_path))


def test_a_checkpoint_of_another_network_is_refused(tiny, tmp_path):
    finish(plain_training(tiny, steps=1), tmp_path)
    with pytest.raises(ValueError, match="holds another training, architecture or seed"):
        finish(plain_training(tiny, steps=1, identity=("other",)), tmp_path)


def test_a_scaled_module_takes_a_step_as_much_smaller(tiny):
    scaled, whole = plain_training(tiny), plain_training(tiny, scales={})
    before = {name: value.clone() for name, value in whole.network.state_dict().items()}
    for training in (scaled, whole):
        training.take_step(0)
    after = [training.network.state_dict() for training in (scaled, whole)]
    for name, factor in {"trunk.0.weight": 0.5, "heads.depth.weight": 1.0}.items():
        steps = [state[name] - before[name] for state in after]
        assert steps[1].abs().max() > 0
        torch.testing.assert_close(steps[0], factor * steps[1], rtol=1e-4, atol=1e-7)


def test_weights_follow_the_innermost_module_that_has_a_factor():
    network = Plain()
    groups = parameter_groups(network, {"trunk": 0.5, "trunk.1": 0.25, "heads": 0.5})
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {group["lr_scale"]: [names[id(p)] for p in group["params"]] for group in groups}
    heads = [f"heads.{task}.{kind}" for task in network.heads for kind in ("weight", "bias")]
    assert found == {
        0.5: ["trunk.0.weight", "trunk.0.bias", *heads],
        0.25: ["trunk.1.weight", "trunk.1.bias"],
    }
    with pytest.raises(ValueError, match="lr_scales: the network has no module tru"):
        parameter_groups(network, {"tru": 0.5})


# Compiling ----------------------------------------------------------------------------------


COMPILED = """
import sys, torch
sys.path.insert(0, {tests!r})
from tiny import make_tiny
from test_retrain import train
from pathlib import Path
tiny, folder = make_tiny(), Path({folder!r})
for name in ("plain", "compiled"):
    (folder / name).mkdir()
plain = train(tiny, folder / "plain", steps=3)
compiled = train(tiny, folder / "compiled", steps=3, compile=True)
assert plain._compiled_call_impl is None
assert compiled._compiled_call_impl is not None
"""


@pytest.mark.slow
def test_a_compiled_training_is_the_same_training(tmp_path):
    """In a process of its own: the checks of shapes under test cannot be compiled."""
    script = COMPILED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", script], check=True)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("plain", "compiled")]
    for lines in zip(*(log.splitlines() for log in logs), strict=True):
        one, other = (json.loads(line) for line in lines)
        assert one.pop("stage") == other.pop("stage")
        assert one == pytest.approx(other, rel=2e-3)


def test_where_compiling_fails_the_training_goes_on_without(tiny, monkeypatch):
    network = build_network(
        tiny.space.fix(tiny.space.base_architecture), {"segmentation": 10, "depth": 1}
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def fails(*_, **__):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(network, "compile", lambda: setattr(network, "_compiled_call_impl", fails))
    with pytest.warns(UserWarning, match="torch.compile failed, going on without it: no C"):
        compile_or_warn(network, torch.zeros(2, 3, 32, 32), "float32")
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    network(torch.zeros(2, 3, 32, 32))
