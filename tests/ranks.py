"""What test_distributed runs in one process and, as a script, in each of two: the same steps.

`python ranks.py RANK COUNT FOLDER` joins the others through a file in the folder and writes what
each scenario came to as `SCENARIO.RANK.safetensors`.
"""

import datetime
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tiny import CPU, TARGET_MS, make_tiny

from oneshot_ednas import distributed
from oneshot_ednas.balancing import BalancingConfig
from oneshot_ednas.checkpoint import save_checkpoint
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.retrain import RetrainConfig, StandAloneTraining
from oneshot_ednas.search import OneShotSearch, SearchConfig
from oneshot_ednas.tasks import TaskConfig, make_tasks
from oneshot_ednas.tasks.kinds import TASK_KINDS
from oneshot_ednas.training import LoopConfig, OptimizerConfig

# Not Adam, which blows up gradients that are nothing but rounding.
SGD = OptimizerConfig(kind="sgd", learning_rate=0.05, warmup_fraction=0.0)
PLAIN = replace(SGD, momentum=0.0, clip_grad_norm=None, weight_decay=0.0)
AUGMENT = AugmentConfig(flip=True, scale=(0.8, 1.3), brightness=0.2)
FAR = 5000.0
"""A depth that `FRAGILE` has no finite loss for."""


def fragile_loss(pred: torch.Tensor, target: torch.Tensor, config: TaskConfig) -> torch.Tensor:
    loss = TASK_KINDS["depth"].loss(pred, target, config)
    return loss * torch.where((target > FAR / 2).any(), torch.nan, 1.0)


WHOLE = replace(TASK_KINDS["depth"], divisor=lambda target, config: None)
FRAGILE = replace(TASK_KINDS["depth"], loss=fragile_loss)


def uneven(split: PackedSplit) -> PackedSplit:
    """Frames of which some have few valid pixels, and one has none."""
    arrays = {name: np.array(array) for name, array in split.arrays.items()}
    generator = np.random.default_rng(0)
    for row in range(len(arrays["image"])):
        share = 0.1 + 0.8 * generator.random()
        hidden = generator.random(arrays["segmentation"][row].shape) < share
        arrays["segmentation"][row][hidden] = 255
        arrays["depth"][row][hidden] = 0
    arrays["depth"][3] = 0
    return replace(split, arrays=arrays)


def all_labelled(split: PackedSplit) -> PackedSplit:
    labels = np.array(split.arrays["segmentation"])
    labels[labels == 255] = 0
    return replace(split, arrays={**split.arrays, "segmentation": labels})


def tasks_of(depth: str = "depth") -> dict[str, Any]:
    weights = tuple(0.5 + 0.1 * i for i in range(10))
    return make_tasks(
        {
            "segmentation": TaskConfig(kind="segmentation", num_classes=10, class_weights=weights),
            "depth": TaskConfig(kind=depth, loss_weight=0.1, relative_weight=1.0, scale=10.0),
        }
    )


def new_search(**settings: Any) -> OneShotSearch:
    tiny = make_tiny()
    given = {"steps": 4, "batch_size": 4, "optimizer": SGD, "sandwich": False, **settings}
    train = uneven(tiny.train)
    return OneShotSearch(
        SearchConfig(**given),
        tiny.space,
        tasks_of(),
        tiny.table,
        target_ms=TARGET_MS,
        splits={"weights": train.subset(range(16)), "alpha": train.subset(range(16, 24))},
        augmentation=AUGMENT,
        seed=0,
        device=CPU,
    )


def search_steps(num_steps: int = 3, **settings: Any) -> dict[str, Any]:
    search = new_search(**settings)
    logged = {}
    for step in range(num_steps):
        values = search.take_step(step)
        logged |= {f"{step} {name}": float(value) for name, value in values.items()}
        # A ratio to a gradient that may be next to nothing.
        logged.pop(f"{step} alpha/latency_to_task_gradient", None)
    search.guard.read()
    return {**search.state_dict(), "logged": logged}


def training_steps(*, depth: str = "depth", has_far: bool = False) -> dict[str, Any]:
    tiny = make_tiny()
    train = uneven(tiny.train)
    if has_far:
        train.arrays["depth"][7, 4] = FAR
    config = RetrainConfig(
        steps=4,
        batch_size=4,
        optimizer=SGD,
        calibration_batches=2,
        loop=LoopConfig(max_skipped=4),
    )
    training = StandAloneTraining(
        config,
        tiny.space,
        tiny.space.base_architecture,
        tasks_of(depth),
        train.subset(range(12)),
        stage="retrain",
        augmentation=AUGMENT,
        seed=1,
        device=CPU,
    )
    logged = {}
    for step in range(4):
        values = training.take_step(step)
        logged |= {f"{step} {name}": float(value) for name, value in values.items()}
    training.guard.read()
    in_training = {name: b.clone() for name, b in training.network.named_buffers()}
    training.recalibrate()
    return {**training.state_dict(4), "logged": logged, "in_training": in_training}


def different_search() -> OneShotSearch:
    """One whose processes draw for themselves; every pixel has a label."""
    tiny = make_tiny()
    train = all_labelled(tiny.train)
    return OneShotSearch(
        SearchConfig(
            steps=4, batch_size=4, optimizer=PLAIN, sandwich=False, paths_per_rank="different"
        ),
        tiny.space,
        make_tasks({"segmentation": TaskConfig(kind="segmentation", num_classes=10)}),
        tiny.table,
        target_ms=TARGET_MS,
        splits={"weights": train.subset(range(16)), "alpha": train.subset(range(16, 24))},
        augmentation=AugmentConfig(flip=True),
        seed=0,
        device=CPU,
    )


def different_paths() -> dict[str, Any]:
    search = different_search()
    search.take_step(0)  # of the warm-up
    gradients = {n: p.grad for n, p in search.supernet.named_parameters() if p.grad is not None}
    return {"gradients": gradients, "sampled": search.sampled, "macs": search.macs}


def batch_norm() -> dict[str, Any]:
    """A synced layer on this process's part of a batch; in one process, torch's on the whole."""
    found = {}
    for name, dtype in (("double", torch.float64), ("bfloat16", torch.bfloat16)):
        generator = torch.Generator().manual_seed(2)
        whole = torch.randn(4, 5, 3, 2, generator=generator, dtype=torch.float64) * 3 + 20
        gradient = torch.randn(4, 5, 3, 2, generator=generator, dtype=torch.float64)
        full = torch.float64 if dtype == torch.float64 else torch.float32
        weight = torch.arange(1.0, 6.0, dtype=full).requires_grad_()
        bias = torch.arange(5.0, dtype=full).requires_grad_()
        statistics = torch.zeros(5, dtype=full), torch.ones(5, dtype=full)
        with distributed.shared_step(sync_bn=True):
            part = distributed.own_part(4)
            x = whole[part].to(dtype).requires_grad_()
            if distributed.is_bn_synced():
                y = distributed.synced_batch_norm(
                    x, weight, bias, *statistics, momentum=0.1, eps=1e-3
                )
            else:
                y = F.batch_norm(x, *statistics, weight, bias, True, 0.1, 1e-3)
            y.backward(gradient[part].to(dtype))
            assert x.grad is not None
            found[name] = {
                "y": torch.cat(distributed._gathered(y)) if distributed.shares() > 1 else y,
                "x": distributed.gathered(x.grad) if distributed.shares() > 1 else x.grad,
                "weight": distributed.total(weight.grad),
                "bias": distributed.total(bias.grad),
                "statistics": statistics,
            }
            assert y.dtype == x.grad.dtype == dtype
    return found


def disagreement() -> dict[str, Any]:
    with distributed.shared_step(sync_bn=True):
        distributed.check_agreement("the same", "a word")
        try:
            distributed.check_agreement(distributed.rank(), "their numbers")
        except RuntimeError as error:
            return {"message": str(error)}
    return {"message": ""}


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    # Two epochs of two steps, then one that has weights of its own.
    "warm-up": partial(
        search_steps,
        5,
        steps=6,
        batch_size=8,
        warmup_fraction=0.9,
        num_paths=2,
        path_sampling="fair",
        balancing=BalancingConfig(method="dwa"),
    ),
    "sandwich": partial(search_steps, warmup_fraction=0.0, sandwich=True, distillation=True),
    "alternating": partial(
        search_steps,
        warmup_fraction=0.0,
        checkpoint_activations=True,
        balancing=BalancingConfig(method="uncertainty"),
    ),
    "joint": partial(search_steps, warmup_fraction=0.0, mode="joint"),
    # One step: in the next ones the order of the frames alone decides more than 1e-5.
    "soft gates": partial(search_steps, 1, warmup_fraction=0.0, mode="joint", gates="soft"),
    "retrain": training_steps,
    "retrain whole": partial(training_steps, depth="ranks:WHOLE"),
    "retrain skipped": partial(training_steps, depth="ranks:FRAGILE", has_far=True),
    "different": different_paths,
    "batch norm": batch_norm,
    "disagreement": disagreement,
}


def main(rank: int, count: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=120),
    )
    for name, scenario in SCENARIOS.items():
        save_checkpoint(folder / f"{name}.{rank}.safetensors", scenario())
    distributed.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
