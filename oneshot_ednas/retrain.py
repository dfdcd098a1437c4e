"""Train one network from scratch: a derived one, the base network, any architecture or module."""

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oneshot_ednas import distributed
from oneshot_ednas.architecture import Architecture
from oneshot_ednas.balancing import FIXED, BalancingConfig
from oneshot_ednas.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.determinism import random_state, set_random_state
from oneshot_ednas.guard import StepGuard
from oneshot_ednas.models.network import Network, build_network, recalibrate_bn
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.tasks import Task
from oneshot_ednas.training import (
    LoopConfig,
    OptimizerConfig,
    ParameterGroup,
    Precision,
    StageLog,
    calibration_images,
    forward,
    run_steps,
    seed_step,
    task_losses,
    torch_generator,
    training_batch,
)


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """Training from scratch."""

    steps: int
    batch_size: int
    num_seeds: int = 1
    """Trainings of the derived network; results are averaged. The first has the run's seed, the
    others seeds derived from it, so that runs of seeds 0, 1, ... have no training in common."""
    optimizer: OptimizerConfig = OptimizerConfig()
    balancing: BalancingConfig = BalancingConfig()
    """The weights of the tasks' losses; those of trials, too."""
    calibration_batches: int = 16
    """Batches behind the final BN statistics, which a running average of few steps gets wrong."""
    precision: Precision = "float32"
    """Of the convolutions in training; networks are scored in float32."""
    sync_bn: bool = True
    """In several processes: BN statistics over the frames of all of them."""
    compile: bool = False
    """Compile the network's training step with `torch.compile`; where that fails, go on without."""
    loop: LoopConfig = LoopConfig()

    def __post_init__(self) -> None:
        """Counts are positive."""
        for name in ("steps", "batch_size", "num_seeds", "calibration_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


class NetworkTraining:
    """A network for tasks, trained from scratch step by step."""

    def __init__(
        self,
        config: RetrainConfig,
        build: Callable[[], nn.Module],
        tasks: Mapping[str, Task],
        split: PackedSplit,
        *,
        identity: object,
        label: object,
        stage: str,
        augmentation: AugmentConfig,
        seed: int,
        device: torch.device,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        """Build network and optimizer at step 0.

        Args:
            config: the training.
            build: makes the network with new weights, drawn from torch's generator on the CPU:
                `network(images) -> {task: raw map}`. Its forward pass draws nothing at random.
            tasks: the tasks.
            split: the training set.
            identity: what tells the network from others of this stage, as JSON has it: a checkpoint
                of another is refused.
            label: names the network in messages.
            stage: name in messages, for example `retrain.seed_0`.
            augmentation: of the batches.
            seed: of weights, order and augmentation.
            device: where to train.
            lr_scales: factors of the learning rate by the name of a module of the network, for all
                weights in it; 1 for the others.

        Raises:
            ValueError: if the network has no module of a name in `lr_scales`.
        """
        self.config, self.label, self.tasks = config, label, dict(tasks)
        self.identity: object = json.loads(json.dumps(identity))  # as a checkpoint gives it back
        self.split, self.stage, self.augmentation = split, stage, augmentation
        self.seed, self.device = seed, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_generator(seed, "network").initial_seed())
            self.network = build().to(device)
        self.optimizer = config.optimizer.build(parameter_groups(self.network, lr_scales or {}))
        self.balancing = config.balancing.build(
            tasks, epoch_steps=len(split) // config.batch_size, device=device
        )
        self.balancing.add_to(self.optimizer)
        self.guard = StepGuard(stage, max_skipped=config.loop.max_skipped)
        self.network.train()

    def take_step(self, step: int) -> dict[str, float | Tensor]:
        """One step; returns numbers to log."""
        with distributed.shared_step(sync_bn=self.config.sync_bn):
            return self._take_step(step)

    def _take_step(self, step: int) -> dict[str, float | Tensor]:
        config = self.config
        seed_step(self.seed, "retrain", step)
        config.optimizer.apply(self.optimizer, step, config.steps)
        batch = training_batch(
            self.split,
            name="retrain",
            step=step,
            batch_size=config.batch_size,
            seed=self.seed,
            augmentation=self.augmentation,
            device=self.device,
        )
        self.optimizer.zero_grad(set_to_none=True)
        outputs = forward(self.network, batch["image"], precision=config.precision)
        losses = task_losses(self.tasks, outputs, batch)
        loss, balance = self.balancing.loss(losses), self.balancing.values()
        loss.backward()
        distributed.sum_gradients(self.network.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.optimizer.max_norm)
        self.guard.take(self.optimizer, norm, [losses], step=step, networks=[self.label])
        self.balancing.end_step(losses)
        values = {f"loss/{name}": value.detach() for name, value in losses.items()}
        return {"loss/weights": loss.detach(), **values, **balance}

    def recalibrate(self) -> None:
        """Recompute the BN statistics; training goes on as if nothing had happened."""
        images = calibration_images(
            self.split,
            num_batches=self.config.calibration_batches,
            batch_size=self.config.batch_size,
            seed=self.seed,
            device=self.device,
        )
        recalibrate_bn(self.network, images)

    def state_dict(self, step: int) -> dict[str, Any]:
        """All state that later steps depend on."""
        return {
            "stage": "retrain",
            "step": step,
            "seed": self.seed,
            "num_skipped": self.guard.num_skipped,
            "architecture": self.identity,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "balancing": self.balancing.state_dict(),
            **random_state(self.device),
        }

    def resume(self, checkpoint: Path) -> int:
        """Continue from a checkpoint file where there is one; returns the finished steps.

        Raises:
            ValueError: if it is damaged, or of another training or balancing.
        """
        if not has_checkpoint(checkpoint):
            return 0
        state = load_checkpoint(checkpoint)
        held = (state.get("stage"), state.get("architecture"), state.get("seed"))
        if held != ("retrain", self.identity, self.seed):
            raise ValueError(
                f"{checkpoint}: holds another training, architecture or seed; "
                f"delete it, and the one before it, to train anew"
            )
        self.balancing.load_state_dict(state.get("balancing", FIXED))
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.num_skipped = state.get("num_skipped", 0)
        set_random_state(state, self.device)
        return int(state["step"])


class StandAloneTraining(NetworkTraining):
    """An architecture's network, trained from scratch: what retraining and every trial do."""

    network: Network

    def __init__(
        self,
        config: RetrainConfig,
        space: SearchSpace,
        architecture: Architecture,
        tasks: Mapping[str, Task],
        split: PackedSplit,
        *,
        stage: str,
        augmentation: AugmentConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        """Build network and optimizer at step 0.

        Args:
            config: the training.
            space: the search space of the architecture.
            architecture: what to train.
            tasks: the tasks.
            split: the training set.
            stage: name in messages, for example `retrain.seed_0`.
            augmentation: of the batches.
            seed: of weights, order and augmentation.
            device: where to train.

        Raises:
            ValueError: if the architecture is not in the space.
        """
        self.architecture = architecture
        channels = {name: task.out_channels for name, task in tasks.items()}
        super().__init__(
            config,
            partial(build_network, space.fix(architecture), channels),
            tasks,
            split,
            identity=architecture.to_json()["blocks"],
            label=architecture,
            stage=stage,
            augmentation=augmentation,
            seed=seed,
            device=device,
        )


def compile_or_warn(network: nn.Module, images: Tensor, precision: Precision) -> None:
    """Compile a network in place with `torch.compile`; where that fails, warn and go on without.

    Args:
        network: in training mode; its weights and BN statistics stay as they are.
        images: of the size that it will train on.
        precision: that it will train in.
    """
    held = {name: value.clone() for name, value in network.named_buffers()}
    try:
        network.compile()
        outputs = forward(network, images, precision=precision)
        torch.stack([output.sum() for output in outputs.values()]).sum().backward()
    except Exception as error:  # what a compiler fails with has no common class
        network._compiled_call_impl = None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"torch.compile failed, going on without it: {reason}", stacklevel=2)
    network.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, value in network.named_buffers():
            value.copy_(held[name])


Watch = Callable[[NetworkTraining, int], AbstractContextManager[None]]
"""From a training and the number of its steps that are left to what they run in."""


def unwatched(_training: NetworkTraining, _num_steps: int) -> AbstractContextManager[None]:
    """Nothing around the steps."""
    return nullcontext()


def parameter_groups(network: nn.Module, lr_scales: Mapping[str, float]) -> list[ParameterGroup]:
    """The weights of a network by the factor of their learning rate.

    Args:
        network: the network.
        lr_scales: factors by the name of a module, for all weights in it; of nested modules the
            inner one's holds, and 1 for weights in none of them.

    Raises:
        ValueError: if the network has no module of that name.
    """
    if not lr_scales:
        return [{"params": list(network.parameters())}]
    modules = dict(network.named_modules())
    for name in lr_scales:
        if name not in modules:
            raise ValueError(f"lr_scales: the network has no module {name}")
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in network.named_parameters():
        # From the whole name on, one module less at a time.
        ends = [len(name), *(i for i, sign in enumerate(name) if sign == ".")]
        inside = [name[:end] for end in sorted(ends, reverse=True) if name[:end] in lr_scales]
        scale = lr_scales[inside[0]] if inside else 1.0
        groups.setdefault(scale, []).append(parameter)
    return [{"params": group, "lr_scale": scale} for scale, group in groups.items() if group]


def retrain(
    config: RetrainConfig,
    space: SearchSpace,
    architecture: Architecture,
    tasks: Mapping[str, Task],
    split: PackedSplit,
    *,
    stage: str,
    folder: Path,
    checkpoint: Path,
    augmentation: AugmentConfig,
    seed: int,
    device: torch.device,
    on_save: Callable[[], None] = lambda: None,
    watch: Watch = unwatched,
) -> Network:
    """Train an architecture's network from scratch, or go on from its checkpoint.

    Args:
        config: the training.
        space: the search space of the architecture.
        architecture: what to train.
        tasks: the tasks.
        split: the whole training set.
        stage: name in the log, for example `retrain.seed_0`.
        folder: the run folder, for the log.
        checkpoint: the checkpoint file.
        augmentation: of the batches.
        seed: of weights, order and augmentation.
        device: where to train.
        on_save: called after each checkpoint.
        watch: what the steps run in, for example `RunFolder.watched`.

    Returns:
        The trained network with recalibrated BN statistics.

    Raises:
        Interrupted: after Ctrl-C, once the checkpoint is written.
        RuntimeError: if a loss is not finite.
        ValueError: if the checkpoint is damaged or of another training.
    """
    training = StandAloneTraining(
        config,
        space,
        architecture,
        tasks,
        split,
        stage=stage,
        augmentation=augmentation,
        seed=seed,
        device=device,
    )
    train_to_end(training, folder=folder, checkpoint=checkpoint, on_save=on_save, watch=watch)
    return training.network


def train_to_end(
    training: NetworkTraining,
    *,
    folder: Path,
    checkpoint: Path,
    on_save: Callable[[], None] = lambda: None,
    watch: Watch = unwatched,
) -> nn.Module:
    """Take the steps of a new training that are left, from its checkpoint on where there is one.

    Args:
        training: the training, at step 0.
        folder: the run folder, for the log.
        checkpoint: the checkpoint file.
        on_save: called after each checkpoint.
        watch: what the steps run in, for example `RunFolder.watched`.

    Returns:
        The trained network with recalibrated BN statistics.

    Raises:
        Interrupted: after Ctrl-C, once the checkpoint is written.
        RuntimeError: if a loss is not finite.
        ValueError: if the checkpoint is damaged or of another training.
    """
    config = training.config
    start = training.resume(checkpoint)
    if start == config.steps:
        return training.network

    if config.compile:
        with distributed.shared_step(sync_bn=config.sync_bn):
            part = distributed.own_part(config.batch_size)
            frames = training.split.batch([0] * (part.stop - part.start), training.device)
            compile_or_warn(training.network, frames["image"], config.precision)

    def save(done: int) -> None:
        if done == config.steps:
            training.recalibrate()
        if distributed.is_main():
            save_checkpoint(checkpoint, training.state_dict(done))
            on_save()

    def describe(values: Mapping[str, float]) -> str:
        return "  ".join(
            [f"loss {values['loss/weights']:.3f}"]
            + [f"{name} {values[f'loss/{name}']:.3f}" for name in training.tasks]
        )

    with (
        watch(training, config.steps - start),
        StageLog(folder, training.stage, total=config.steps, start=start) as log,
    ):
        run_steps(log, training.take_step, save, describe, config.loop, training.guard)
    return training.network
