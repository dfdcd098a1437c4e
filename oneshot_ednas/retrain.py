"""Train one network from scratch: a derived one, the base network, any architecture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.models.network import Network, build_network, recalibrate_bn
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.store import load_checkpoint, save_checkpoint
from oneshot_ednas.tasks import Task
from oneshot_ednas.training import (
    LoopConfig,
    OptimizerConfig,
    StageLog,
    calibration_images,
    check_finite,
    check_gradient,
    run_steps,
    task_losses,
    torch_generator,
    training_batch,
    weighted_sum,
)


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """Training from scratch."""

    steps: int
    batch_size: int
    num_seeds: int = 1
    """Trainings of the derived network, with seeds seed, seed + 1, ...; results are averaged."""
    optimizer: OptimizerConfig = OptimizerConfig()
    calibration_batches: int = 16
    """Batches behind the final BN statistics, which a running average of few steps gets wrong."""
    loop: LoopConfig = LoopConfig()

    def __post_init__(self) -> None:
        """Counts are positive."""
        for name in ("steps", "batch_size", "num_seeds", "calibration_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


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
) -> tuple[Network, float]:
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

    Returns:
        The trained network with recalibrated BN statistics, and the seconds of this call.

    Raises:
        Interrupted: after Ctrl-C, once the checkpoint is written.
        RuntimeError: if a loss is not finite.
        ValueError: if the checkpoint is damaged or of another training.
    """
    channels = {name: task.out_channels for name, task in tasks.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_generator(seed, "network").initial_seed())
        network = build_network(space.fix(architecture), channels).to(device)
    optimizer = config.optimizer.build(network.parameters())
    start = 0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        held = (state.get("stage"), state.get("architecture"), state.get("seed"))
        if held != ("retrain", architecture.to_json()["blocks"], seed):
            raise ValueError(
                f"{checkpoint}: holds another training, architecture or seed; "
                f"delete it to train anew"
            )
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    def take_step(step: int) -> dict[str, float | Tensor]:
        config.optimizer.apply(optimizer, step, config.steps)
        batch = training_batch(
            split,
            name="retrain",
            step=step,
            batch_size=config.batch_size,
            seed=seed,
            augmentation=augmentation,
            device=device,
        )
        optimizer.zero_grad(set_to_none=True)
        losses = task_losses(tasks, network(batch["image"]), batch)
        check_finite(losses, where=f"{stage} step {step}", run=lambda: architecture)
        loss = weighted_sum(tasks, losses)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip_grad_norm)
        check_gradient(norm, where=f"{stage} step {step}", run=lambda: architecture)
        optimizer.step()
        values = {f"loss/{name}": value.detach() for name, value in losses.items()}
        return {"loss/weights": loss.detach(), **values}

    def save(done: int) -> None:
        if done == config.steps:
            images = calibration_images(
                split,
                num_batches=config.calibration_batches,
                batch_size=config.batch_size,
                seed=seed,
                device=device,
            )
            recalibrate_bn(network, images)
        save_checkpoint(
            checkpoint,
            {
                "stage": "retrain",
                "step": done,
                "seed": seed,
                "architecture": architecture.to_json()["blocks"],
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
        )

    def describe(values: Mapping[str, float]) -> str:
        return "  ".join(
            [f"loss {values['loss/weights']:.3f}"]
            + [f"{name} {values[f'loss/{name}']:.3f}" for name in tasks]
        )

    network.train()
    if start == config.steps:
        return network, 0.0
    with StageLog(folder, stage, total=config.steps, start=start) as log:
        run_steps(log, take_step, save, describe, config.loop)
    return network, log.seconds
