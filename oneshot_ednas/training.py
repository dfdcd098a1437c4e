"""What every training shares: batches, losses, evaluation, the step loop, its log and its seeds.

Random draws are functions of (seed, purpose, step), so a resumed run needs no generator state:
it draws at step n what the uninterrupted run would have drawn.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import TextColumn
from torch import Tensor, nn

from oneshot_ednas import distributed
from oneshot_ednas.data.packed import PackedSplit, batch_indices
from oneshot_ednas.data.transforms import AugmentConfig, augment, skip_samples
from oneshot_ednas.event_file import EventFile
from oneshot_ednas.guard import StepGuard, fused_adam, fused_sgd
from oneshot_ednas.progress import terminal_progress
from oneshot_ednas.reward import accuracy_product
from oneshot_ednas.store import append_text, sync_log, write_text
from oneshot_ednas.tasks import Task, lower_is_better

Batch = dict[str, Tensor]
Metrics = dict[str, dict[str, float]]
ParameterGroup = dict[str, Any]
"""Of an optimizer: `params`, and `lr_scale` where it has a factor of the learning rate."""
Precision = Literal["float32", "bfloat16"]
"""Numbers that the convolutions of a training step are computed in; weights stay float32."""

STEP_FACTOR = 3
"""Multiply-adds of a training step over those of its forward pass: a convolution's backward pass
is two more convolutions of its size, one for its input and one for its weights."""


POLY_POWER = 0.9
"""Exponent of the `poly` schedule.

Source:
    Chen et al., DeepLab, TPAMI 2018, https://arxiv.org/abs/1606.00915
"""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are trained; the defaults are Adam with a cosine, as in EDNAS section 4.1."""

    kind: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 3e-3
    weight_decay: float = 1e-5
    """Added to the gradient, times the weight."""
    momentum: float = 0.9
    """`sgd`: share of the last step that is taken again."""
    schedule: Literal["cosine", "poly"] = "cosine"
    """`cosine`: half a cosine from the learning rate down to 0; `poly`: the learning rate times
    (1 - step / steps) ** 0.9, as in BMTAS appendix A. Both run over the steps after the rise."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    clip_grad_norm: float | None = 5.0
    """Largest norm of the gradient of all weights; null leaves it as it is."""

    def __post_init__(self) -> None:
        """Rates are positive."""
        if not self.learning_rate > 0 or not self.max_norm > 0 or self.weight_decay < 0:
            raise ValueError(
                f"expected learning_rate > 0, clip_grad_norm > 0 and weight_decay >= 0, got "
                f"{self.learning_rate}, {self.clip_grad_norm} and {self.weight_decay}"
            )
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction: expected 0 to below 1, got {self.warmup_fraction}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected 0 to below 1, got {self.momentum}")

    @property
    def max_norm(self) -> float:
        """`clip_grad_norm` as a number, infinite for null."""
        return math.inf if self.clip_grad_norm is None else self.clip_grad_norm

    def build(
        self, parameters: Iterable[nn.Parameter] | Sequence[ParameterGroup]
    ) -> torch.optim.Optimizer:
        """The optimizer at step 0.

        Args:
            parameters: the weights, or groups of them; of a group with an `lr_scale`, that is a
                factor of the learning rate.

        Raises:
            ValueError: if a factor is not positive.
        """
        given: list[Any] = list(parameters)
        for group in given:
            scale = group.get("lr_scale", 1.0) if isinstance(group, dict) else 1.0
            if not 0 < scale < math.inf:
                raise ValueError(f"lr_scale: expected a positive number, got {scale}")
        rate, decay = self.learning_rate, self.weight_decay
        if self.kind == "sgd":
            return fused_sgd(given, learning_rate=rate, weight_decay=decay, momentum=self.momentum)
        return fused_adam(given, learning_rate=rate, weight_decay=decay)

    def rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of a step, before a group's factor: a linear rise, then the schedule."""
        rise = self.warmup_fraction * num_steps
        if step < rise:
            return self.learning_rate * (step + 1) / (rise + 1)
        progress = (step - rise) / max(num_steps - rise, 1)
        if self.schedule == "poly":
            return self.learning_rate * (1 - progress) ** POLY_POWER
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def apply(self, optimizer: torch.optim.Optimizer, step: int, num_steps: int) -> None:
        """Set the learning rate of a step.

        That of the first group and of those with an `lr_scale`; others, which were added after the
        weights', keep their own.
        """
        rate = self.rate_at(step, num_steps)
        for index, group in enumerate(optimizer.param_groups):
            if "lr_scale" in group:
                group["lr"] = rate * group["lr_scale"]
            elif index == 0:
                group["lr"] = rate


# Seeds --------------------------------------------------------------------------------------


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose, for example `derived_seed(0, "augment", step)`."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in purpose]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0] >> 1)


def torch_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for one purpose."""
    return np.random.default_rng(derived_seed(seed, *purpose))


def seed_step(seed: int, stage: str, step: int) -> None:
    """Seed torch's own generators for a step.

    What draws from them, such as dropout in a backbone or a user's task, is a function of seed and
    step then, as all other draws are; and of the process, where several share the step.
    """
    number = [distributed.share()] if distributed.share() else []
    torch.manual_seed(derived_seed(seed, stage, "own", step, *number))


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        ValueError: if the device was asked for and is absent.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda, cuda:N or mps, got {name}") from None
    available = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ValueError(f"device {name} was asked for and is absent; use auto or cpu")
    return device


def training_macs(forward_macs: int, frames: int) -> float:
    """Multiply-adds of training on this many frames: the cost that methods are compared at."""
    return float(STEP_FACTOR * forward_macs * frames)


# Batches, losses, evaluation ----------------------------------------------------------------


def training_batch(
    split: PackedSplit,
    *,
    name: str,
    step: int,
    batch_size: int,
    seed: int,
    augmentation: AugmentConfig,
    device: torch.device,
) -> Batch:
    """The augmented batch of a step: a pure function of its arguments.

    Where several processes share the step, this one's part of that batch.
    """
    part = distributed.own_part(batch_size)
    indices = batch_indices(len(split), batch_size, step, derived_seed(seed, name, "order"))
    batch = split.batch(indices[part], device)
    generator = torch_generator(seed, name, "augment", step)
    skip_samples(generator, part.start)
    return augment(batch, augmentation, generator, split.kinds)


def calibration_images(
    split: PackedSplit, *, num_batches: int, batch_size: int, seed: int, device: torch.device
) -> Iterator[Tensor]:
    """Images without augmentation, for BN statistics."""
    batch_size = min(batch_size, len(split))
    for step in range(num_batches):
        indices = batch_indices(len(split), batch_size, step, derived_seed(seed, "calibration"))
        yield split.batch(indices, device)["image"]


def task_losses(
    tasks: Mapping[str, Task], outputs: Mapping[str, Tensor], batch: Batch
) -> dict[str, Tensor]:
    """Loss per task, before its weight.

    Where several processes share the step, the loss of the whole batch, whose gradient reaches the
    outputs of this one.
    """
    if distributed.shares() == 1:
        return {name: task.loss(outputs[name], batch[name]) for name, task in tasks.items()}
    found, parts, divisors = dict[str, Tensor](), dict[str, Tensor](), list[Tensor]()
    for name, task in tasks.items():
        divisor = task.loss_divisor(batch[name])
        if divisor is None:
            whole = distributed.gathered(outputs[name]), distributed.gathered(batch[name])
            found[name] = task.loss(*whole)
        else:
            parts[name] = task.loss(outputs[name], batch[name])
            divisors.append(divisor)
    if parts:
        means = distributed.weighted_mean(torch.stack([*parts.values()]), torch.stack(divisors))
        found |= dict(zip(parts, means, strict=True))
    return {name: found[name] for name in tasks}


def distillation_losses(
    tasks: Mapping[str, Task], students: Mapping[str, Tensor], teachers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Loss per task of raw outputs that learn from others, as of `task_losses`."""
    losses = {
        name: task.distillation_loss(students[name], teachers[name]) for name, task in tasks.items()
    }
    if distributed.shares() == 1:
        return losses
    values = torch.stack([*losses.values()])
    return dict(
        zip(losses, distributed.weighted_mean(values, torch.ones_like(values)), strict=True)
    )


def weighted_sum(weights: Mapping[str, float | Tensor], losses: Mapping[str, Tensor]) -> Tensor:
    """Sum over tasks of the losses, each times its weight."""
    return torch.stack([weight * losses[name] for name, weight in weights.items()]).sum()


def forward(
    network: nn.Module, images: Tensor, *run: Any, precision: Precision = "float32"
) -> dict[str, Tensor]:
    """Raw maps of the tasks, in float32 for the losses.

    Args:
        network: of the tasks.
        images: `[batch, 3, height, width]`.
        run: what else the network takes, for example an architecture or gates.
        precision: of the convolutions. With `bfloat16` BN still takes its statistics in float32.
    """
    is_lower = precision == "bfloat16"
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=is_lower):
        outputs = network(images, *run)
    return {name: output.float() for name, output in outputs.items()}


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    split: PackedSplit,
    tasks: Mapping[str, Task],
    *,
    batch_size: int,
    device: torch.device,
) -> Metrics:
    """Metrics per task over a whole split, with the network's running BN statistics.

    Args:
        network: images to raw maps by task; a `Network`, or a file of one that runs like it.
        split: the frames.
        tasks: the tasks.
        batch_size: frames at a time.
        device: where the network is.

    Raises:
        ValueError: if a label is out of range or no pixel is valid.
    """
    network.eval()
    pooled = {name: task.new_metric() for name, task in tasks.items()}
    for start in range(0, len(split), batch_size):
        indices = np.arange(start, min(start + batch_size, len(split)))
        batch = split.batch(indices, device)
        outputs = network(batch["image"])
        for name, metric in pooled.items():
            metric.update(outputs[name], batch[name])
    return {name: metric.compute() for name, metric in pooled.items()}


def accuracy_of(tasks: Mapping[str, Task], metrics: Metrics) -> float:
    """Accuracy product (EDNAS eq. 6-7) with the tasks' reward metrics."""
    weights = {name: task.reward_metrics for name, task in tasks.items()}
    return accuracy_product(metrics, weights=weights, lower_is_better=lower_is_better(tasks))


# The step loop ------------------------------------------------------------------------------


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop and has written its checkpoint."""


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a request that the loop honours between two steps.

    A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._before: dict[int, signal.Handlers | Callable[..., object] | int | None] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_set = True
        if sys.stderr.isatty():
            # Not print, in the midst of which the signal may have come.
            os.write(2, b"\nstopping after this step; again stops at once, without a checkpoint\n")


class StageLog:
    """Log of one stage: `metrics.jsonl`, TensorBoard and a progress bar on a terminal.

    Of several processes the main one writes it.
    """

    def __init__(self, folder: Path, stage: str, *, total: int, start: int = 0) -> None:
        self.stage, self.total, self.start = stage, total, start
        self._path = folder / "metrics.jsonl"
        self.seconds = 0.0
        self._is_written = distributed.is_main()
        if not self._is_written:
            return
        _drop_lines_from(self._path, stage, start)
        self._writer = EventFile(folder / "tensorboard" / stage, start=start)
        text = TextColumn("{task.fields[text]}", markup=False)  # "E[lat]" is no style
        self._progress = terminal_progress(text)
        self._bar = self._progress.add_task(stage, total=total, completed=start, text="")

    def __enter__(self) -> "StageLog":
        self._began = time.perf_counter()
        if self._is_written:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        if self._is_written:
            self._progress.stop()
            self._writer.close()
            self.sync()

    def scalars(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Write numbers of a step; `group/name` keys group in TensorBoard."""
        if not self._is_written:
            return
        numbers = {name: float(value) for name, value in values.items()}
        # JSON has no NaN: of a number that is not finite, null.
        logged = {
            name: number if math.isfinite(number) else None for name, number in numbers.items()
        }
        line = json.dumps({"stage": self.stage, "step": step, **logged}, allow_nan=False)
        append_text(self._path, line + "\n")
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def sync(self) -> None:
        """What was logged so far outlasts a power cut; a checkpoint is never ahead of its log."""
        if self._is_written and self._path.exists():
            sync_log(self._path)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Write a histogram to TensorBoard."""
        if self._is_written:
            self._writer.add_histogram(name, values, step)

    def advance(self, step: int, text: str) -> None:
        """Move the bar to `step` finished steps."""
        if self._is_written:
            self._progress.update(self._bar, completed=step, text=text)


def _drop_lines_from(path: Path, stage: str, step: int) -> None:
    """Forget logged steps that a resumed run will do again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # What a crash left of a line is dropped, too, and so is what is no entry.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if entry["stage"] != stage or entry["step"] < step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))


def take_in_log(folder: Path, part: Path, stage: str) -> None:
    """Move the lines of a stage that another process logged in a folder of its own.

    TensorBoard finds its files where they are. A last line torn by a crash is left out.
    """
    logged = part / "metrics.jsonl"
    lines = logged.read_text(encoding="utf-8")
    lines = lines[: lines.rfind("\n") + 1]
    if lines:
        _drop_lines_from(folder / "metrics.jsonl", stage, json.loads(lines.splitlines()[0])["step"])
        append_text(folder / "metrics.jsonl", lines, is_synced=True)
    logged.unlink()


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How often a step loop writes."""

    log_every: int = 20
    """Steps between entries of the log."""
    checkpoint_every: int = 200
    """Steps between checkpoints: the most that a crash can lose."""
    max_skipped: int = 10
    """Steps of a stage that may be left out because a loss or a gradient is not finite; they change
    nothing. One more ends the run."""

    def __post_init__(self) -> None:
        """Intervals are positive."""
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped: expected 0 or more, got {self.max_skipped}")
        if self.log_every < 1 or self.checkpoint_every < 1:
            raise ValueError(
                f"expected log_every and checkpoint_every of at least 1, got "
                f"{self.log_every} and {self.checkpoint_every}"
            )


def run_steps(
    log: StageLog,
    take_step: Callable[[int], Mapping[str, float | Tensor]],
    save: Callable[[int], None],
    describe: Callable[[Mapping[str, float]], str],
    config: LoopConfig,
    guard: StepGuard,
) -> None:
    """Take the steps that are left, log, save, and stop between steps when asked to.

    Of several processes all stop after the same step.

    Args:
        log: the stage's log; knows first and last step.
        take_step: does one step and returns numbers for the log.
        save: writes a checkpoint that holds this many finished steps.
        describe: a short text for the progress bar.
        config: intervals.
        guard: takes the optimizer steps; read before each log entry and checkpoint.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, once the checkpoint is written.
        RuntimeError: if a step fails, or too many are not finite; names the last checkpoint.
    """
    saved = log.start
    with StopRequest() as stop:
        for step in range(log.start, log.total):
            done = step + 1
            is_last = done == log.total
            is_logged = step % config.log_every == 0 or is_last
            with _naming_the_checkpoint(log.stage, saved):
                values = take_step(step)
                if is_logged:
                    guard.read()
            if is_logged:
                numbers = {name: float(value) for name, value in values.items()}
                if guard.num_skipped:
                    numbers["skipped_steps"] = float(guard.num_skipped)
                log.scalars(step, numbers)
                log.advance(done, describe(numbers))
            # Read once: a signal between two readings would stop without a checkpoint.
            is_asked_to_stop = distributed.any_of(stop.is_set)
            if done % config.checkpoint_every == 0 or is_last or is_asked_to_stop:
                with _naming_the_checkpoint(log.stage, saved):
                    guard.read()
                    log.sync()
                    save(done)
                distributed.barrier()  # the others read the file, or end, once it is there
                saved = done
            if is_asked_to_stop:
                raise Interrupted(f"stopped after step {done} of {log.total} in {log.stage}")


@contextlib.contextmanager
def _naming_the_checkpoint(stage: str, saved: int) -> Iterator[None]:
    """Errors of a step also say what is left of the stage: a checkpoint of so many steps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        kept = f"its last checkpoint is kept, of {saved} steps" if saved else "it has no checkpoint"
        raise RuntimeError(f"{_reason(error)}; {stage} ended: {kept}") from error


def _reason(error: RuntimeError | MemoryError) -> str:
    text = str(error) or type(error).__name__
    # torch has a class of its own for GPUs alone; on a CPU only the words tell.
    is_full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if is_full or "can't allocate memory" in text:
        return (
            f"out of memory ({text.splitlines()[0]}); lower batch_size, or set "
            f"search.checkpoint_activations or precision: bfloat16"
        )
    return text


def note(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    if distributed.is_main():
        print(text, file=sys.stderr, flush=True)
