"""One training in several processes, each with its part of every batch, under `torchrun`.

Each process runs the same program. Inside `shared_step` a batch is divided among them, losses are
those of the whole batch, and gradients are added up, so that a step comes out as in one process but
for rounding. Outside of it nothing is exchanged but what is called for, so that the main process
may score and write while the others wait. With one process every function here does nothing.

Tensors go through torch.distributed, on the device they are on; Lightning Fabric brings the
processes together. DDP takes gradients in one backward pass through one module, and a step of a
supernet has several, some of them of alpha alone.
"""

import datetime
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

TIMEOUT = datetime.timedelta(days=7)
"""For processes that wait while the main one derives, scores and exports. One that ends is noticed
at once, whatever the timeout is."""
_LAST_WORD_SECONDS = 1.0
"""Time for the message of the first process that failed, before torchrun ends it."""


# Processes ----------------------------------------------------------------------------------


def is_launched() -> bool:
    """Whether torchrun started this process as one of several."""
    is_launched = dist.is_available() and dist.is_torchelastic_launched()
    return is_launched and int(os.environ["WORLD_SIZE"]) > 1


def start(device: torch.device) -> None:
    """Join the other processes, where torchrun started several.

    Args:
        device: kind of the device to train on; each process has one of its own.

    Raises:
        ValueError: if they cannot train on it.
    """
    if not is_launched() or _has_joined():
        return
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise ValueError(
            f"device {device}: under torchrun each process has its own; use auto, cuda or cpu"
        )
    if device.type == "cuda" and per_node > torch.cuda.device_count():
        raise ValueError(
            f"torchrun started {per_node} processes, this machine has {torch.cuda.device_count()} "
            f"GPUs; lower --nproc-per-node, or use device: cpu"
        )
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy
    except ModuleNotFoundError:
        raise ValueError(
            "training in several processes needs lightning-fabric; "
            "pip install 'oneshot-ednas[distributed]', or start without torchrun"
        ) from None
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    # Flags and waits go through the CPU, so that no GPU waits for them.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    Fabric(
        accelerator=device.type,
        devices=per_node,
        num_nodes=int(os.environ["WORLD_SIZE"]) // per_node,
        strategy=DDPStrategy(process_group_backend=backend, timeout=TIMEOUT),
    ).launch()


def finish() -> None:
    """Wait for the others and part from them."""
    if count() > 1:
        barrier()
        dist.destroy_process_group()


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if _has_joined() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _has_joined() else 0


def _has_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def own_device(device: torch.device) -> torch.device:
    """This process's device of a kind."""
    if count() > 1 and device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def described(device: torch.device) -> str:
    """A device in words, with how many processes share the work."""
    return f"{device} in {count()} processes" if count() > 1 else str(device)


def is_first_to_fail() -> bool:
    """Whether no other process of the run has asked this before: one of them tells the reason.

    The others only fail since that one did, or for the same reason. They are kept here for a
    moment, since torchrun ends all when one ends.
    """
    if not is_launched():
        return True
    key = f"oneshot_ednas/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=5),
        )
        is_first: bool = store.add(key, 1) == 1
    except RuntimeError:  # the store has gone with its process: rather twice than never
        return True
    if not is_first:
        time.sleep(_LAST_WORD_SECONDS)
    return is_first


# Agreements, through the CPU ----------------------------------------------------------------


def barrier() -> None:
    """Wait until all processes are here.

    Raises:
        RuntimeError: if another one has ended.
    """
    any_of(False)


@contextmanager
def main_first() -> Iterator[None]:
    """The main process does the block before the others, which find what it made."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def any_of(flag: bool) -> bool:
    """Whether it is set in any process.

    Raises:
        RuntimeError: if another process has ended.
    """
    if count() == 1:
        return flag
    return bool(_reduced(torch.tensor(flag, dtype=torch.int64), dist.ReduceOp.MAX))


def check_agreement(value: object, what: str) -> None:
    """Assert that something is the same in all processes of a step.

    Args:
        value: compared as `str` has it.
        what: names it in the message.

    Raises:
        RuntimeError: if it is not, or another process has ended.
    """
    if shares() == 1:
        return
    digest = zlib.crc32(str(value).encode())
    high, low = _reduced(torch.tensor([digest, -digest]), dist.ReduceOp.MAX).tolist()
    if high != -low:
        raise RuntimeError(
            f"the processes do not agree on {what}; they need the same software, data and files"
        )


# Steps that all processes share -------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    count: int = 1
    rank: int = 0
    is_bn_synced: bool = False


# Of the process: the backward pass may run in a thread of its own.
_step = _Step()


@contextmanager
def shared_step(*, sync_bn: bool) -> Iterator[None]:
    """In the block, which all processes run, batches are divided among them.

    Args:
        sync_bn: whether BN takes its statistics over the frames of all processes.
    """
    with _set(_Step(count(), rank(), sync_bn and count() > 1)):
        yield


@contextmanager
def own_statistics(is_on: bool) -> Iterator[None]:
    """In the block, BN has statistics of this process alone, where `is_on`."""
    with _set(replace(_step, is_bn_synced=_step.is_bn_synced and not is_on)):
        yield


@contextmanager
def _set(step: _Step) -> Iterator[None]:
    global _step
    before, _step = _step, step
    try:
        yield
    finally:
        _step = before


def shares() -> int:
    """Processes that divide the current step's batch; 1 outside of a step."""
    return _step.count


def share() -> int:
    """Which of them this is, from 0."""
    return _step.rank


def is_bn_synced() -> bool:
    """Whether BN takes its statistics over the frames of all processes."""
    return _step.is_bn_synced


def check_batch_size(setting: str, batch_size: int) -> None:
    """Refuse batches that do not divide evenly.

    Raises:
        ValueError: naming the setting.
    """
    if batch_size % count():
        raise ValueError(
            f"{setting} is {batch_size}, which {count()} processes cannot divide evenly; take a "
            f"multiple of {count()}"
        )


def own_part(batch_size: int) -> slice:
    """Frames of the step's batch that are this process's."""
    assert batch_size % shares() == 0, (batch_size, shares())
    size = batch_size // shares()
    return slice(size * share(), size * (share() + 1))


def total(tensor: Tensor) -> Tensor:
    """Sum over the processes of a step, without gradient."""
    return tensor if shares() == 1 else _reduced(tensor.detach().clone(), dist.ReduceOp.SUM)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes.

    A parameter without a gradient here counts as 0 where another process has one; without any it
    stays without, so that an optimizer leaves it alone.
    """
    if shares() == 1:
        return
    listed = list(parameters)
    has_gradient = torch.tensor([one.grad is not None for one in listed], dtype=torch.uint8)
    used = _reduced(has_gradient, dist.ReduceOp.MAX).tolist()
    by_type: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for one, is_used in zip(listed, used, strict=True):
        if is_used:
            by_type.setdefault((one.dtype, one.device), []).append(one)
    for group in by_type.values():
        assert all(one.is_contiguous() for one in group)
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in group]
        flat = _reduced(torch.cat([one.flatten() for one in gradients]), dist.ReduceOp.SUM)
        pieces = flat.split([one.numel() for one in group])
        for one, piece in zip(group, pieces, strict=True):
            one.grad = piece.view_as(one)


def weighted_mean(
    values: Float[Tensor, " values"], weights: Float[Tensor, " values"]
) -> Float[Tensor, " values"]:
    """Means over the processes of a step; a gradient reaches this process's part.

    So the gradients of all processes add up to that of the mean.

    Args:
        values: of this process.
        weights: 0 or more; where all processes have 0, the mean is 0.
    """
    mean: Tensor = _WeightedMean.apply(values, weights)
    return mean


def gathered(part: Shaped[Tensor, "part ..."]) -> Shaped[Tensor, "batch ..."]:
    """The parts of all processes of a step; a gradient reaches this process's part."""
    whole: Tensor = _Gathered.apply(part)
    return whole


@torch.compiler.disable
def synced_batch_norm(
    x: Float[Tensor, "part channels height width"],
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"],
    running_mean: Float[Tensor, " channels"] | None,
    running_var: Float[Tensor, " channels"] | None,
    *,
    momentum: float,
    eps: float,
) -> Float[Tensor, "part channels height width"]:
    """Batch normalisation by the frames of all processes of a step, which have as many each.

    torch's own SyncBatchNorm is for GPUs alone. Arguments are as of `F.batch_norm` in training; the
    statistics are in float32 at least.
    """
    y, mean, var = _SyncedBatchNorm.apply(x, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        size = shares() * x.numel() // x.shape[1]
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (size / max(size - 1, 1)), momentum)
    normalised: Tensor = y
    return normalised


class _WeightedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor) -> Tensor:
        # What has no weight is 0, and not 0 times what it is.
        weighted = torch.where(weights > 0, values * weights, 0)
        sums, weight = _reduced(torch.stack([weighted, weights]), dist.ReduceOp.SUM)
        weight = torch.where(weight > 0, weight, 1)
        ctx.save_for_backward(weights / weight)
        return sums / weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (own,) = ctx.saved_tensors
        return gradients[0] * own, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        ctx.size = len(part)
        return torch.cat(_gathered(part))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # All processes have the same gradient of the whole.
        return gradients[0].narrow(0, ctx.size * share(), ctx.size)


class _SyncedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        own_var, own_mean = torch.var_mean(_full(x), dim=(0, 2, 3), correction=0)
        means, variances = torch.stack(_gathered(torch.stack([own_mean, own_var]))).unbind(1)
        mean = means.mean(0)
        # Not E[x^2] - E[x]^2, which cancels.
        var = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale = ctx.saved_tensors
        gradient, shape = _full(gradients[0]), (1, -1, 1, 1)
        centred = _full(x) - mean.view(shape)
        own = torch.stack([(gradient * centred).sum((0, 2, 3)) * scale, gradient.sum((0, 2, 3))])
        of_weight, of_bias = total(own) / (shares() * x.numel() // x.shape[1])
        of_x = gradient - of_bias.view(shape) - centred * (scale * of_weight).view(shape)
        of_x *= (weight * scale).view(shape)
        return of_x.to(x.dtype), own[0], own[1], None


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gathered(part: Tensor) -> list[Tensor]:
    part = part.detach().contiguous()
    parts = [torch.empty_like(part) for _ in range(shares())]
    with _others():
        dist.all_gather(parts, part)
    return parts


def _reduced(tensor: Tensor, operation: Any) -> Tensor:
    """Reduce a tensor over all processes, in place."""
    with _others():
        dist.all_reduce(tensor, operation)
    return tensor


@contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"another process of this run has ended, or is out of reach "
            f"({str(error).splitlines()[0]})"
        ) from error
