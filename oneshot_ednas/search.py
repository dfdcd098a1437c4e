"""The one-shot search: weight steps on sampled subnets, alpha steps on relaxed gates.

Phases: warm-up (weights only, architectures drawn uniformly), then alternating weight and alpha
steps on disjoint splits (or both at once in `joint` mode). The alpha loss is aligned with the
reward: in logs, EDNAS eq. 4 is log Acc - 0.07 max(0, log(latency / target)), so latency enters as
mu * relu(log(E[latency] / target)).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from oneshot_ednas import distributed
from oneshot_ednas.architecture import Architecture
from oneshot_ednas.balancing import FIXED, BalancingConfig
from oneshot_ednas.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.determinism import random_state, set_random_state
from oneshot_ednas.guard import Losses, Network, StepGuard, fused_adam
from oneshot_ednas.latency.expected import expected_latency
from oneshot_ednas.latency.operations import network_macs, relaxed_macs
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.models.blocks import SharingConfig
from oneshot_ednas.models.network import build_network
from oneshot_ednas.relaxation import (
    ArchitectureParameters,
    BlockGates,
    Gates,
    HardGates,
    TemperatureConfig,
    largest_gates,
)
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.tasks import Task
from oneshot_ednas.training import (
    Batch,
    LoopConfig,
    OptimizerConfig,
    Precision,
    StageLog,
    distillation_losses,
    forward,
    numpy_generator,
    run_steps,
    seed_step,
    task_losses,
    torch_generator,
    training_batch,
    training_macs,
    weighted_sum,
)

COLLAPSED_ENTROPY = 0.1
"""Share of a choice's largest entropy below which it counts as decided."""


@dataclass(frozen=True, kw_only=True)
class LatencyLossConfig:
    """Weight mu of the latency term in the alpha loss."""

    schedule: Literal["fixed", "ramp", "dual"] = "dual"
    """`fixed`: mu from the first alpha step; `ramp`: from 0 to mu over the first half;
    `dual`: ascent, mu rises while E[latency] is above the target and falls below it."""
    weight: float = 1.0
    """mu, or its start for `dual`."""
    dual_rate: float = 0.05
    """Step of the dual ascent, per alpha step and unit of log(E[latency] / target)."""

    def __post_init__(self) -> None:
        """Weights are not negative."""
        if self.weight < 0 or self.dual_rate < 0:
            raise ValueError(
                f"expected weight and dual_rate >= 0, got {self.weight} and {self.dual_rate}"
            )


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The one-shot search."""

    steps: int
    """Weight steps; alpha steps come on top, one per `alpha_every` weight steps after warm-up."""
    batch_size: int
    warmup_fraction: float = 0.25
    """Share of the steps that train weights only, with architectures drawn uniformly."""
    mode: Literal["alternating", "joint"] = "alternating"
    """`joint` updates weights and alpha in one step on both splits together, after the warm-up;
    then `exploration` has no part."""
    gates: Literal["hard", "soft"] = "hard"
    """Gates of an alpha step: `hard` are straight-through, exactly one option forward."""
    alpha_every: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    balancing: BalancingConfig = BalancingConfig()
    """The weights of the tasks' losses. Weight steps learn or measure them, on their own split;
    alpha steps take them as they are, so that the alpha split decides on alpha alone."""
    alpha_learning_rate: float = 0.01
    alpha_weight_decay: float = 5e-5
    temperature: TemperatureConfig = TemperatureConfig()
    latency: LatencyLossConfig = LatencyLossConfig()
    exploration: float = 0.2
    """Share of uniform draws, per choice, among the architectures of weight steps."""
    path_sampling: Literal["uniform", "fair"] = "uniform"
    """How uniform draws are made: `fair` deals each choice's options in random order, so that a
    choice of n options has each of them once in n paths.
    Source: strict fairness of FairNAS (Chu et al., ICCV 2021, section 3.2)."""
    num_paths: int = 1
    """Architectures drawn per weight step; the weights move by their mean gradient."""
    paths_per_rank: Literal["same", "different"] = "same"
    """In several processes: `same` draws `num_paths` for all, and a step comes out as in one;
    `different` draws them for each, so that a step trains more architectures on fewer frames
    each, with BN statistics of each process's frames."""
    sync_bn: bool = True
    """In several processes: BN statistics over the frames of all of them, where they run the same
    architecture."""
    sandwich: bool = True
    """Train the smallest and the largest architecture in each weight step too: of all trainings
    that were compared, such a supernet ranks architectures best (docs/supernet_ranking.md).
    Source: Yu and Huang, Universally Slimmable Networks, ICCV 2019."""
    distillation: bool = False
    """With `sandwich`: the others learn from the largest's outputs in place of the labels."""
    num_validations: int = 3
    """How often the best architecture inside the target is scored during the search, for the
    log; 0 is never."""
    splits: dict[str, float] = field(
        default_factory=lambda: {"weights": 0.6, "alpha": 0.25, "validation": 0.15}
    )
    """Shares of the training set for `weights`, `alpha` and `validation`."""
    split_seed: int | None = None
    """Seed of these splits; null is that of the run. Runs with other seeds on the same splits can
    be held against the same stand-alone trainings."""
    sharing: SharingConfig = SharingConfig()
    """What the options of a block share in the supernet."""
    precision: Precision = "float32"
    """Of the convolutions in weight and alpha steps; candidates are scored in float32."""
    checkpoint_activations: bool = False
    """Compute the activations inside a block again for the backward pass instead of keeping them:
    less memory for one more forward pass."""
    loop: LoopConfig = LoopConfig()

    def __post_init__(self) -> None:
        """Check ranges."""
        if set(self.splits) != {"weights", "alpha", "validation"}:
            raise ValueError(
                f"splits: expected weights, alpha and validation, got {', '.join(self.splits)}"
            )
        if self.num_validations < 0:
            raise ValueError(f"num_validations: expected 0 or more, got {self.num_validations}")
        for name in ("steps", "batch_size", "alpha_every", "num_paths"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_fraction < 1 or not 0 <= self.exploration <= 1:
            raise ValueError(
                f"expected warmup_fraction in 0..1 (below 1) and exploration in 0..1, got "
                f"{self.warmup_fraction} and {self.exploration}"
            )
        if not self.alpha_learning_rate > 0 or self.alpha_weight_decay < 0:
            raise ValueError(
                f"expected alpha_learning_rate > 0 and alpha_weight_decay >= 0, got "
                f"{self.alpha_learning_rate} and {self.alpha_weight_decay}"
            )
        if self.mode == "joint" and (
            self.sandwich
            or (self.alpha_every, self.num_paths, self.paths_per_rank) != (1, 1, "same")
        ):
            raise ValueError(
                "mode joint has no weight steps of its own: sandwich, distillation, num_paths and "
                "alpha_every belong to mode alternating; set sandwich: false and leave the others, "
                "and paths_per_rank"
            )
        if self.distillation and not self.sandwich:
            raise ValueError("distillation needs sandwich: true, whose largest network teaches")

    @property
    def warmup_steps(self) -> int:
        """Weight steps before the first alpha step."""
        return int(self.warmup_fraction * self.steps)

    @property
    def validation_steps(self) -> set[int]:
        """Steps after which the log gets validation metrics, evenly spaced after the warm-up."""
        length = self.steps - self.warmup_steps
        count = min(self.num_validations, length)
        return {self.warmup_steps + length * i // count - 1 for i in range(1, count + 1)}

    def progress(self, step: int) -> float:
        """0 at the first step after the warm-up, 1 at the last."""
        return (step - self.warmup_steps) / max(self.steps - self.warmup_steps - 1, 1)


class OneShotSearch:
    """A supernet, its architecture parameters, and everything that a checkpoint must hold."""

    def __init__(
        self,
        config: SearchConfig,
        space: SearchSpace,
        tasks: Mapping[str, Task],
        table: LatencyTable,
        *,
        target_ms: float,
        splits: Mapping[str, PackedSplit],
        augmentation: AugmentConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        """Build everything at step 0.

        Raises:
            ValueError: if the target is below the space's minimum, or a table row is missing.
        """
        self.config, self.space, self.tasks = config, space, dict(tasks)
        self.table, self.target_ms = table, target_ms
        self.splits, self.augmentation = splits, augmentation
        self.seed, self.device = seed, device
        self.out_channels = {name: task.out_channels for name, task in tasks.items()}
        if space.is_fixed:
            raise ValueError(f"space {space.name} is one network: there is nothing to search")
        check_target(table, space, self.out_channels, target_ms)
        # The weights' first values depend on the seed alone, not on what ran before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_generator(seed, "supernet").initial_seed())
            self.supernet = build_network(space, self.out_channels, sharing=config.sharing)
            self.supernet.to(device)
        self.supernet.backbone.checkpoint_activations = config.checkpoint_activations
        self.alpha = ArchitectureParameters(space)
        self._option_index = self.alpha.index.clone()  # stays on the CPU, where options are counted
        self.alpha.to(device)
        self.optimizer = config.optimizer.build(self.supernet.parameters())
        self.balancing = config.balancing.build(
            tasks, epoch_steps=len(splits["weights"]) // config.batch_size, device=device
        )
        self.balancing.add_to(self.optimizer)
        self.alpha_optimizer = fused_adam(
            self.alpha.parameters(),
            learning_rate=config.alpha_learning_rate,
            weight_decay=config.alpha_weight_decay,
        )
        self.guard = StepGuard("search", max_skipped=config.loop.max_skipped)
        # On the device, where the dual ascent moves it without a wait.
        self.mu = torch.zeros((), device=device)
        if config.latency.schedule != "ramp":
            self.mu += config.latency.weight
        self.sampled = torch.zeros_like(self.alpha.logits, dtype=torch.long, device="cpu")
        """How often each option was trained."""
        self.collapsed: dict[str, int] = {}
        """Choices that lost their entropy in the first half of the search, with the step."""
        self.macs = 0.0
        """Multiply-adds of training and validation so far, see `training_macs`; NaN after a
        checkpoint that did not count."""
        self._relaxed_macs = relaxed_macs(space, self._image_size, self.out_channels)
        self.step = 0
        self.supernet.train()

    # Checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All state that later steps depend on."""
        return {
            "stage": "search",
            "step": self.step,
            "seed": self.seed,
            "mu": float(self.mu),
            "num_skipped": self.guard.num_skipped,
            "macs": self.macs,
            "sampled": self.sampled,
            "collapsed": self.collapsed,
            "supernet": self.supernet.state_dict(),
            "alpha": self.alpha.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "balancing": self.balancing.state_dict(),
            **random_state(self.device),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: if the state is of another seed, network or balancing.
        """
        if state.get("stage") != "search":
            raise ValueError(f"the checkpoint is of {state.get('stage')}, not of a search")
        if state["seed"] != self.seed:
            raise ValueError(f"checkpoint has seed {state['seed']}, the config {self.seed}")
        try:
            self.supernet.load_state_dict(state["supernet"])
            self.alpha.load_state_dict(state["alpha"])
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"the checkpoint is of another network: {first}") from None
        self.balancing.load_state_dict(state.get("balancing", FIXED))
        self.optimizer.load_state_dict(state["optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.step, self.mu = state["step"], self.mu.new_tensor(state["mu"])
        self.guard.num_skipped = state.get("num_skipped", 0)
        self.sampled, self.collapsed = state["sampled"], state["collapsed"]
        self.macs = state.get("macs", math.nan)
        set_random_state(state, self.device)

    def run(
        self,
        folder: Path,
        checkpoint: Path,
        validate: Callable[[], tuple[Mapping[str, float], float]],
        on_save: Callable[[], None] = lambda: None,
    ) -> None:
        """Search from the current step to the end.

        Args:
            folder: the run folder, for the log.
            checkpoint: the checkpoint file to write.
            validate: scores the current alpha on held-out data, and gives the multiply-adds of
                that too; called `num_validations` times after the warm-up, for the log alone.
            on_save: called after each checkpoint.

        Raises:
            Interrupted: after Ctrl-C, once the checkpoint is written.
            RuntimeError: if a loss is not finite.
        """

        def take_step(step: int) -> dict[str, float | Tensor]:
            values = self.take_step(step)
            self.step = step + 1
            if step % (10 * self.config.loop.log_every) == 0:
                log.histogram(step, "alpha/logits", self.alpha.logits)
            if step in validated and distributed.is_main():
                self.guard.read()  # what it scores would not be worth the name
                try:
                    scores, macs = validate()
                except ValueError as error:
                    raise RuntimeError(
                        f"search step {step}: the supernet cannot be scored ({error}); lower "
                        f"search.optimizer.learning_rate or check the labels"
                    ) from error
                self.macs += macs
                log.scalars(step, {**scores, "validation/macs": self.macs})
                # Batch statistics again: scoring must leave no trace but its cost.
                self.supernet.train()
            return values

        def save(_: int) -> None:
            if distributed.is_main():
                save_checkpoint(checkpoint, self.state_dict())
                on_save()

        validated = self.config.validation_steps

        with StageLog(folder, "search", total=self.config.steps, start=self.step) as log:
            run_steps(
                log,
                take_step,
                save,
                self._describe,
                self.config.loop,
                self.guard,
            )

    def _describe(self, values: Mapping[str, float]) -> str:
        parts = [f"loss {values['loss/weights']:.3f}"]
        parts += [f"{name} {values[f'loss/{name}']:.3f}" for name in self.tasks]
        parts.append(f"E[lat] {values['latency/expected_ms']:.3f}/{self.target_ms:g} ms")
        phase = "warm-up" if values["temperature"] == 0 else f"T {values['temperature']:.2f}"
        return "  ".join([*parts, phase])

    # Steps ----------------------------------------------------------------------------------

    def take_step(self, step: int) -> dict[str, float | Tensor]:
        """One weight step and, after the warm-up, its alpha step; returns numbers to log."""
        with distributed.shared_step(sync_bn=self.config.sync_bn):
            return self._take_step(step)

    def _take_step(self, step: int) -> dict[str, float | Tensor]:
        seed_step(self.seed, "search", step)
        self.config.optimizer.apply(self.optimizer, step, self.config.steps)
        is_warm_up = step < self.config.warmup_steps
        if self.config.mode == "joint" and not is_warm_up:
            return self._joint_step(step)
        with distributed.own_statistics(self.config.paths_per_rank == "different"):
            values = self._weight_step(step, uniform=is_warm_up)
        if not is_warm_up and step % self.config.alpha_every == 0:
            values |= self._alpha_step(step)
        else:
            values |= self._latency_values()
        values["temperature"] = 0.0 if is_warm_up else self._temperature(step)
        return values

    def _weight_step(self, step: int, *, uniform: bool) -> dict[str, float | Tensor]:
        batch = self._batch("weights", step)
        self.optimizer.zero_grad(set_to_none=True)
        drawn = self._paths_of_all(step, uniform=uniform)
        distributed.check_agreement(drawn, "the architectures of a step")
        paths = drawn[distributed.share() % len(drawn)]
        runs = self._with_extremes(paths)
        first: dict[str, Tensor] | None = None
        total, logged = torch.zeros(()), dict[str, Tensor]()
        balance, trained = self.balancing.values(), list[dict[str, Tensor]]()
        for architecture in runs:
            outputs = self._forward(batch, architecture)
            if first is not None and self.config.distillation:
                losses = distillation_losses(self.tasks, outputs, first)
            else:
                losses = task_losses(self.tasks, outputs, batch)
            loss = self.balancing.loss(losses)
            (loss / len(runs)).backward()
            trained.append({name: value.detach() for name, value in losses.items()})
            if first is None:
                first = {name: output.detach() for name, output in outputs.items()}
            if architecture is paths[0]:
                total, logged = loss.detach(), trained[-1]
        # Of all processes: each has the whole account.
        for architecture in [one for of_rank in drawn for one in self._with_extremes(of_rank)]:
            self._count(architecture)
            macs = network_macs(self.space, architecture, self._image_size, self.out_channels)
            self._spend(macs, self.config.batch_size // len(drawn))
        self._weights_update(step, trained, runs)
        self.balancing.end_step(*trained)
        values: dict[str, float | Tensor] = {"loss/weights": total}
        values |= {f"loss/{name}": loss for name, loss in logged.items()}
        return values | balance

    def _paths_of_all(self, step: int, *, uniform: bool) -> list[list[Architecture]]:
        """What each process trains; one list where it is the same."""
        count = distributed.shares() if self.config.paths_per_rank == "different" else 1
        return [
            self.sample_paths(step, uniform=uniform, rank=rank, num_ranks=count)
            for rank in range(count)
        ]

    def _with_extremes(self, paths: list[Architecture]) -> list[Architecture]:
        if not self.config.sandwich:
            return paths
        largest = self.space.extreme(paths[0], largest=True)
        return [largest, *paths, self.space.extreme(paths[-1], largest=False)]

    def _forward(self, batch: Batch, run: Architecture | Gates) -> dict[str, Tensor]:
        return forward(self.supernet, batch["image"], run, precision=self.config.precision)

    def _weights_update(
        self, step: int, losses: Sequence[Losses], networks: Sequence[Network], what: str = ""
    ) -> None:
        distributed.sum_gradients(self.supernet.parameters())
        norm = torch.nn.utils.clip_grad_norm_(
            self.supernet.parameters(), self.config.optimizer.max_norm
        )
        self.guard.take(self.optimizer, norm, losses, step=step, networks=networks, what=what)

    def _alpha_step(self, step: int) -> dict[str, float | Tensor]:
        batch = self._batch("alpha", step)
        gates = self._gates(step)
        run = self._named(gates)
        # Of alpha only: so nothing is kept for the gradients of weights that no gate mixes.
        self.supernet.requires_grad_(False)
        losses = task_losses(self.tasks, self._forward(batch, gates), batch)
        loss = weighted_sum(self.balancing.weights(), losses)
        (task_gradient,) = torch.autograd.grad(loss, self.alpha.logits)
        self.supernet.requires_grad_(True)
        # Counted in full, although the gradient of the projections' weights is left out.
        self._spend(self._relaxed_macs, self.config.batch_size)
        values = self._alpha_update(step, task_gradient, losses, run)
        values["loss/alpha"] = loss.detach()
        return values

    def _joint_step(self, step: int) -> dict[str, float | Tensor]:
        halves = [self._batch("weights", step), self._batch("alpha", step)]
        batch = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
        self.optimizer.zero_grad(set_to_none=True)
        self.alpha_optimizer.zero_grad(set_to_none=True)
        gates = self._gates(step)
        run = self._named(gates)
        losses = task_losses(self.tasks, self._forward(batch, gates), batch)
        # One backward pass serves weights, alpha and what the balancing learns. The tasks' weights
        # are constants to alpha here, too: they do not depend on it.
        loss, balance = self.balancing.loss(losses), self.balancing.values()
        loss.backward()
        self._weights_update(step, [losses], [run], " (joint)")
        self.balancing.end_step(losses)
        self._count(run())
        self._spend(self._relaxed_macs, 2 * self.config.batch_size)
        assert self.alpha.logits.grad is not None
        values = self._alpha_update(step, self.alpha.logits.grad, losses, run)
        values |= {"temperature": self._temperature(step), "loss/weights": loss.detach()}
        values |= {f"loss/{name}": value.detach() for name, value in losses.items()}
        return values | balance

    @property
    def _image_size(self) -> tuple[int, int]:
        return self.splits["weights"].height, self.splits["weights"].width

    def _spend(self, forward_macs: int, num_frames: int) -> None:
        self.macs += training_macs(forward_macs, num_frames)

    def _temperature(self, step: int) -> float:
        return self.config.temperature.at(self.config.progress(step))

    def _gates(self, step: int) -> Gates:
        generator = torch_generator(self.seed, "gumbel", step)
        hard = self.config.gates == "hard"
        return self.alpha.gates(self._temperature(step), hard=hard, generator=generator)

    def _named(self, gates: Gates) -> Callable[[], Architecture]:
        """What gives the architecture of the largest gates, without holding their graph."""
        if isinstance(gates, HardGates):
            architecture = gates.architecture
            return lambda: architecture
        held = tuple(BlockGates(*(gate.detach() for gate in block)) for block in gates)
        return partial(largest_gates, self.space, held)

    def _alpha_update(
        self, step: int, task_gradient: Tensor, losses: Losses, run: Network
    ) -> dict[str, float | Tensor]:
        """Add the latency term's gradient, step alpha, move mu."""
        task_gradient = distributed.total(task_gradient)
        latency = self.config.latency
        if latency.schedule == "ramp":
            self.mu.fill_(latency.weight * min(2 * self.config.progress(step), 1.0))
        expected = self.expected_latency()
        log_ratio = (expected / self.target_ms).log()
        (latency_gradient,) = torch.autograd.grad(self.mu * log_ratio.relu(), self.alpha.logits)
        norms = task_gradient.norm(), latency_gradient.norm()
        self.alpha.logits.grad = task_gradient + latency_gradient
        is_skipped = self.guard.take(
            self.alpha_optimizer,
            norms[0] + norms[1],
            [losses],
            step=step,
            networks=[run],
            what=" (alpha)",
        )
        if latency.schedule == "dual":
            raised = (self.mu + latency.dual_rate * log_ratio.detach()).clamp_min(0)
            self.mu = torch.where(is_skipped, self.mu, raised)
        if self.config.progress(step) < 0.5 and step % self.config.loop.log_every == 0:
            self._watch_for_collapse(step)
        return {
            "latency/expected_ms": expected.detach(),
            "latency/mu": self.mu,
            "alpha/entropy": self.alpha.entropy().detach(),
            "alpha/latency_to_task_gradient": norms[1] / norms[0].clamp_min(1e-12),
        }

    def _latency_values(self) -> dict[str, float | Tensor]:
        with torch.no_grad():
            return {
                "latency/expected_ms": self.expected_latency(),
                "latency/mu": self.mu,
                "alpha/entropy": self.alpha.entropy(),
            }

    def expected_latency(self) -> Tensor:
        """E[latency] under softmax(alpha), in milliseconds, with gradient."""
        return expected_latency(
            self.table, self.space, self.alpha.probabilities(), self.out_channels
        )

    def _batch(self, split: str, step: int) -> dict[str, Tensor]:
        return training_batch(
            self.splits[split],
            name=f"search.{split}",
            step=step,
            batch_size=self.config.batch_size,
            seed=self.seed,
            augmentation=self.augmentation,
            device=self.device,
        )

    # Architectures --------------------------------------------------------------------------

    def sample_paths(
        self, step: int, *, uniform: bool, rank: int = 0, num_ranks: int = 1
    ) -> list[Architecture]:
        """The architectures that a weight step draws: from softmax(alpha), in part uniform.

        Args:
            step: the step.
            uniform: whether all draws are uniform.
            rank: whose draws, of processes that draw for themselves.
            num_ranks: how many these are.
        """
        generator = numpy_generator(self.seed, "path", step, *([rank] if rank else []))
        count = self.config.num_paths
        first = (step * num_ranks + rank) * count
        is_fair = self.config.path_sampling == "fair"
        dealt = [self._dealt(first + number) if is_fair else None for number in range(count)]
        if uniform:
            return [
                self.space.sample(generator) if indices is None else self.space.decode(indices)
                for indices in dealt
            ]
        rows = self.alpha.padded_logits().detach().cpu().double().softmax(1).numpy()
        return [self._drawn_by_alpha(rows, indices, generator) for indices in dealt]

    def _drawn_by_alpha(
        self, rows: np.ndarray, dealt: list[int] | None, generator: np.random.Generator
    ) -> Architecture:
        share, indices = self.config.exploration, []
        for position, choice in enumerate(self.space.choices):
            count = len(choice.options)
            weights = rows[position, :count]
            if dealt is None:
                weights = (1 - share) * weights + share / count
            elif generator.random() < share:
                indices.append(dealt[position])
                continue
            indices.append(int(generator.choice(count, p=weights / weights.sum())))
        return self.space.decode(indices)

    def _dealt(self, number: int) -> list[int]:
        """The fair options of a path: per choice of n, a new order of its options every n paths."""
        indices = []
        for position, choice in enumerate(self.space.choices):
            deal, place = divmod(number, len(choice.options))
            generator = numpy_generator(self.seed, "deal", position, deal)
            indices.append(int(generator.permutation(len(choice.options))[place]))
        return indices

    def _count(self, architecture: Architecture) -> None:
        rows = torch.tensor(self.space.encode(architecture))
        self.sampled[self._option_index.gather(1, rows.view(-1, 1)).view(-1)] += 1

    # Alarms ---------------------------------------------------------------------------------

    def _watch_for_collapse(self, step: int) -> None:
        """Note the choices that are almost decided while the gates are still warm."""
        entropies = self.alpha.entropies()
        for choice in self.space.choices:
            floor = COLLAPSED_ENTROPY * math.log(len(choice.options))
            if entropies[choice.name] < floor:
                self.collapsed.setdefault(choice.name, step)

    def alarms(self) -> list[str]:
        """What looks wrong with the search, in words; empty if nothing does."""
        found = []
        if self.guard.num_skipped:
            found.append(
                f"{self.guard.num_skipped} steps were skipped, since a loss or a gradient was not "
                f"finite; lower the learning rate or check the labels"
            )
        never = int((self.sampled == 0).sum())
        if never:
            found.append(
                f"{never} of {len(self.sampled)} options were never trained; search longer or "
                f"raise exploration"
            )
        maximum = sum(math.log(len(choice.options)) for choice in self.space.choices)
        entropy = float(self.alpha.entropy().detach())
        if self.step >= self.config.steps and entropy > 0.95 * maximum:
            found.append(
                f"alpha is still almost uniform (entropy {entropy:.1f} of {maximum:.1f} nats); "
                f"raise alpha_learning_rate or search longer"
            )
        if self.collapsed:
            named = ", ".join(f"{name} by step {step}" for name, step in self.collapsed.items())
            found.append(
                f"{len(self.collapsed)} of {len(self.space.choices)} choices collapsed in the "
                f"first half of the search ({named}); lower alpha_learning_rate or warm up longer"
            )
        expected = float(self.expected_latency().detach())
        if self.step >= self.config.steps and expected > 1.1 * self.target_ms:
            found.append(
                f"E[latency] {expected:.3g} ms ends above the target {self.target_ms:.3g} ms; "
                f"raise latency.weight or use the dual schedule"
            )
        return found


def check_target(
    table: LatencyTable,
    space: SearchSpace,
    out_channels: Mapping[str, int],
    target_ms: float,
) -> None:
    """Refuse a target that no architecture meets.

    Raises:
        ValueError: naming the target and the space's minimum and maximum.
    """
    costs = table.costs(space, out_channels)
    if not target_ms >= costs.min_latency_ms:
        raise ValueError(
            f"latency.target_ms is {target_ms:.4g} ms, below the minimum of space {space.name}: "
            f"{costs.min_latency_ms:.4g} ms (maximum {costs.max_latency_ms:.4g} ms)"
        )


def resume_search(search: OneShotSearch, checkpoint: Path) -> None:
    """Continue from a checkpoint file where there is one.

    Raises:
        ValueError: if it is damaged or of another run.
    """
    if has_checkpoint(checkpoint):
        search.load_state_dict(load_checkpoint(checkpoint))
