"""The branching search: weight steps on the supergraph, alpha steps on its gates, in cycles.

Phases: warm-up (candidate `t` of every layer learns task `t`, which assigns it softly), then cycles
of alpha steps on their split and weight steps on theirs. Where the blocks vary, the same alpha
steps choose them too, for each candidate on its own: blocks and branching in one search.

Source: BMTAS (Bruggemann et al., BMVC 2020), section 3 and appendix A. Blocks in the same search,
and the budget in place of lambda, are this project's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from oneshot_ednas.balancing import BalancingConfig
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.guard import Losses, Network, StepGuard, fused_adam
from oneshot_ednas.models.encoder import Encoder
from oneshot_ednas.relaxation import TemperatureConfig
from oneshot_ednas.search import LatencyLossConfig
from oneshot_ednas.sharing.branched import RouteGates, Routes, supergraph
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.branching_parameters import BranchingParameters
from oneshot_ednas.sharing.costs import BranchCosts
from oneshot_ednas.sharing.resumable import ResumableSearch
from oneshot_ednas.tasks import Task
from oneshot_ednas.training import (
    LoopConfig,
    OptimizerConfig,
    numpy_generator,
    task_losses,
    torch_generator,
    training_macs,
    weighted_sum,
)

TARGET_FALL = 0.7
"""Progress of the search at which the objective `budget` arrives at its target."""


@dataclass(frozen=True, kw_only=True)
class BranchingConfig:
    """The search for a branching."""

    steps: int
    """Weight steps, the warm-up's included; alpha steps come on top."""
    batch_size: int
    warmup_fraction: float = 0.05
    """Share of the steps in which each candidate learns its own task (2,000 of 42,000 in BMTAS)."""
    gates: Literal["soft", "hard"] = "soft"
    """`soft`: alpha steps and weight steps mix all candidates, as BMTAS does; `hard`: alpha steps
    have straight-through gates, and weight steps run drawn routes, at the cost of their network."""
    alpha_share: float = 0.2
    """Alpha steps among all steps after the warm-up; their data are those of the split `alpha`."""
    cycle_steps: int | None = None
    """Weight steps between two phases of alpha steps; null is a pass over their split."""
    objective: Literal["weighted", "budget"] = "weighted"
    """`weighted`: resource_weight times the expected cost (BMTAS eq. 4), then argmax; `budget`: the
    latency term of the one-shot search, then the most probable network inside the target."""
    resource: Literal["macs", "latency"] = "macs"
    """What `weighted` counts: multiply-adds, or the latency table's milliseconds."""
    resource_weight: float = 0.05
    """lambda: of the expected cost, in units of that of the fully shared network."""
    latency: LatencyLossConfig = LatencyLossConfig()
    """mu of `budget`."""
    optimizer: OptimizerConfig = OptimizerConfig()
    balancing: BalancingConfig = BalancingConfig()
    alpha_learning_rate: float = 0.01
    alpha_weight_decay: float = 5e-5
    temperature: TemperatureConfig = TemperatureConfig()
    exploration: float = 0.2
    """With hard gates: share of uniform draws among the routes and blocks of weight steps."""
    sandwich: bool = True
    """Where blocks vary, with hard gates: train the smallest and the largest blocks of the drawn
    routes in each weight step too."""
    num_candidates: int = 8
    """With `budget`: how many branched networks inside the target are ranked on validation data."""
    splits: dict[str, float] = field(
        default_factory=lambda: {"weights": 0.65, "alpha": 0.2, "validation": 0.15}
    )
    """Shares of the training set for `weights`, `alpha` and `validation`."""
    split_seed: int | None = None
    """Seed of these splits; null is that of the run."""
    loop: LoopConfig = LoopConfig()

    def __post_init__(self) -> None:
        """Check ranges."""
        if set(self.splits) != {"weights", "alpha", "validation"}:
            raise ValueError(
                f"splits: expected weights, alpha and validation, got {', '.join(self.splits)}"
            )
        for name in ("steps", "batch_size", "num_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.cycle_steps is not None and self.cycle_steps < 1:
            raise ValueError(f"cycle_steps: expected at least 1 or null, got {self.cycle_steps}")
        if not 0 <= self.warmup_fraction < 1 or not 0 <= self.exploration <= 1:
            raise ValueError(
                f"expected warmup_fraction in 0..1 (below 1) and exploration in 0..1, got "
                f"{self.warmup_fraction} and {self.exploration}"
            )
        if not 0 < self.alpha_share < 1:
            raise ValueError(f"alpha_share: expected above 0 and below 1, got {self.alpha_share}")
        if not (math.isfinite(self.resource_weight) and self.resource_weight >= 0):
            raise ValueError(
                f"resource_weight (lambda): expected a finite number >= 0, got "
                f"{self.resource_weight}"
            )
        if not self.alpha_learning_rate > 0 or self.alpha_weight_decay < 0:
            raise ValueError(
                f"expected alpha_learning_rate > 0 and alpha_weight_decay >= 0, got "
                f"{self.alpha_learning_rate} and {self.alpha_weight_decay}"
            )

    @property
    def warmup_steps(self) -> int:
        """Weight steps before the first alpha step."""
        return int(self.warmup_fraction * self.steps)

    def progress(self, step: int) -> float:
        """0 at the first step after the warm-up, 1 at the last."""
        return (step - self.warmup_steps) / max(self.steps - self.warmup_steps - 1, 1)


class BranchingSearch(ResumableSearch):
    """A supergraph, its parameters, and everything that a checkpoint must hold."""

    stage = "branching"
    kept = ("mu", "macs", "num_alpha_steps")
    config: BranchingConfig

    def __init__(
        self,
        config: BranchingConfig,
        encoder: Encoder,
        tasks: Mapping[str, Task],
        *,
        costs: BranchCosts,
        macs: BranchCosts,
        target: float | None,
        splits: Mapping[str, PackedSplit],
        augmentation: AugmentConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        """Build everything at step 0.

        Args:
            config: the search.
            encoder: the backbone.
            tasks: the tasks.
            costs: what the search weighs or keeps inside the target.
            macs: multiply-adds, for the cost of the search itself.
            target: in the unit of `costs`, for the objective `budget`.
            splits: the splits `weights` and `alpha`.
            augmentation: of the batches.
            seed: of weights, order, augmentation and draws.
            device: where to train.

        Raises:
            ValueError: if the objective is `budget` and there is no target.
        """
        if config.objective == "budget" and target is None:
            raise ValueError("objective budget needs a latency target; or use objective: weighted")
        self.config, self.encoder, self.tasks = config, encoder, dict(tasks)
        self.costs, self.target = costs, target
        self.splits, self.augmentation = splits, augmentation
        self.seed, self.device = seed, device
        channels = {name: task.out_channels for name, task in tasks.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_generator(seed, "supergraph").initial_seed())
            self.network = supergraph(encoder, channels).to(device)
        self.parameters = BranchingParameters(encoder, len(tasks)).to(device)
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = config.optimizer.build(trainable)
        self.balancing = config.balancing.build(
            tasks, epoch_steps=len(splits["weights"]) // config.batch_size, device=device
        )
        self.balancing.add_to(self.optimizer)
        self.alpha_optimizer = fused_adam(
            self.parameters.parameters(),
            learning_rate=config.alpha_learning_rate,
            weight_decay=config.alpha_weight_decay,
        )
        self.guard = StepGuard(self.stage, max_skipped=config.loop.max_skipped)
        self.mu = config.latency.weight if config.latency.schedule != "ramp" else 0.0
        self.num_alpha_steps = 0
        self.macs = 0.0
        """Multiply-adds of the training so far, see `training_macs`."""
        self._mac_costs = macs
        self._mixed_macs = mixed_macs(macs, len(tasks))
        self.shared_cost = costs.of(self._shared())
        """Of the fully shared network with the base blocks: the unit of `resource_weight`."""
        self.first_cost = float(self.expected_cost().detach())
        """Under uniform alpha."""
        self.step = 0
        self.network.train()

    def _shared(self) -> Branching:
        space = self.encoder.space
        path = None if space is None else space.base_architecture
        return Branching.shared(list(self.tasks), len(self.encoder.layers), path)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Supergraph and alpha."""
        return {"network": self.network, "alpha": self.parameters}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One of each."""
        return {"optimizer": self.optimizer, "alpha_optimizer": self.alpha_optimizer}

    def phase(self, values: Mapping[str, float]) -> str:
        """The expected cost, and the temperature."""
        is_warm_up = values["temperature"] == 0
        word = "warm-up" if is_warm_up else f"T {values['temperature']:.2f}"
        return f"E[cost] {values['cost/expected']:.3f} {self.costs.unit}  {word}"

    def logits(self) -> dict[str, Tensor]:
        """Those of the routes."""
        return {"alpha/routes": self.parameters.routes}

    # Steps ----------------------------------------------------------------------------------

    def take_step(self, step: int) -> dict[str, float | Tensor]:
        """One weight step, before it the alpha steps of a new cycle; returns numbers to log."""
        config = self.config
        config.optimizer.apply(self.optimizer, step, config.steps)
        cycle = config.cycle_steps or max(len(self.splits["weights"]) // config.batch_size, 1)
        place = (step - config.warmup_steps) % cycle
        if step < config.warmup_steps:
            values = self._routed_step(step, self._own_routes(step))
            return values | self._cost_values() | {"temperature": 0.0}
        alpha_values: dict[str, float | Tensor] = {}
        if place == 0:
            share = config.alpha_share / (1 - config.alpha_share)
            for _ in range(max(round(share * cycle), 1)):
                alpha_values = self._alpha_step(step)
            # The branching has changed: the momentum is of others (BMTAS appendix A). So would be
            # running BN statistics, but the supergraph keeps none.
            self._reset_momentum()
        self._correct_bias(step, place)
        if config.gates == "soft":
            values = self._mixed_step(step)
        else:
            generator = numpy_generator(self.seed, "routes", step)
            routes = self.parameters.sample(generator, exploration=config.exploration)
            values = self._routed_step(step, routes)
        return (
            values | self._cost_values() | alpha_values | {"temperature": self._temperature(step)}
        )

    def _own_routes(self, step: int) -> Routes:
        """Each task along its own candidates, with blocks drawn uniformly."""
        routes = self.parameters.sample(
            numpy_generator(self.seed, "warm-up", step), exploration=1.0
        )
        num_tasks, num_layers, _ = self.parameters.routes.shape
        return Routes(tuple((task,) * num_layers for task in range(num_tasks)), routes.options)

    def _routed_step(self, step: int, routes: Routes) -> dict[str, float | Tensor]:
        """Train the network of some routes and, where blocks vary, its largest and smallest."""
        batch = self._batch("weights", step)
        self.optimizer.zero_grad(set_to_none=True)
        runs = [routes]
        if routes.options is not None and self.config.sandwich:
            runs = [self._extreme(routes, largest=True), routes]
            runs.append(self._extreme(routes, largest=False))
        trained, balance = list[dict[str, Tensor]](), self.balancing.values()
        logged = batch["image"].new_zeros(())
        for run in runs:
            losses = task_losses(self.tasks, self.network(batch["image"], run), batch)
            branching = run.branching(list(self.tasks))
            loss = self.balancing.loss(losses)
            (loss / len(runs)).backward()
            trained.append({name: value.detach() for name, value in losses.items()})
            if run is routes:
                logged = loss.detach()
            self._spend(self._mac_costs.of(branching) * 1e9, batch)
        self._update(step, trained, [run.branching(list(self.tasks)) for run in runs])
        self.balancing.end_step(*trained)
        losses = trained[runs.index(routes)]
        return {"loss/weights": logged, **_named(losses), **balance}

    def _mixed_step(self, step: int) -> dict[str, float | Tensor]:
        """Train all candidates by soft gates, one task after the other."""
        batch = self._batch("weights", step)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            gates = self._gates(step, "weights")
        weights, balance = self.balancing.weights(), self.balancing.values()
        losses = {}
        for name, task in self.tasks.items():
            output = self.network(batch["image"], gates, (name,))[name]
            loss = task.loss(output, batch[name])
            # At once, so that one task's activations are held at a time.
            (weights[name] * loss).backward()
            losses[name] = loss.detach()
        balanced = self.balancing.loss(losses)
        if balanced.requires_grad:  # what the balancing learns
            balanced.backward()
        self._spend(self._mixed_macs, batch)
        self._update(step, [losses], ["mixture"])
        self.balancing.end_step(losses)
        return {"loss/weights": balanced.detach(), **_named(losses), **balance}

    def _update(self, step: int, losses: Sequence[Losses], networks: Sequence[Network]) -> None:
        trainable = [p for p in self.network.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trainable, self.config.optimizer.max_norm)
        self.guard.take(self.optimizer, norm, losses, step=step, networks=networks)

    def _reset_momentum(self) -> None:
        for parameter in self.optimizer.param_groups[0]["params"]:
            state = self.optimizer.state[parameter]
            for name in ("exp_avg", "momentum_buffer"):
                if state.get(name) is not None:
                    state[name].zero_()

    def _correct_bias(self, step: int, place: int) -> None:
        """Make up for Adam's momentum being an average over the steps since its reset.

        Adam divides it by 1 - beta^t, t counting all steps; since the reset there were fewer, and
        the steps after it would be too short by that much.
        """
        group = self.optimizer.param_groups[0]
        if "betas" in group:
            beta = group["betas"][0]
            group["lr"] *= (1 - beta ** (step + 1)) / (1 - beta ** (place + 1))

    def _alpha_step(self, step: int) -> dict[str, float | Tensor]:
        """One step of alpha by the tasks' losses and the expected cost."""
        number = self.num_alpha_steps
        batch = self._batch("alpha", number)
        gates = self._gates(number, "alpha", step)
        # The tasks' gradients meet at the gates, so one task's activations are held at a time.
        held = [t.detach().requires_grad_(t.requires_grad) for t in gates.tensors]
        leaves = [t for t in held if t.requires_grad]
        gradients = [torch.zeros_like(t) for t in leaves]
        cut, weights, losses = gates.with_tensors(held), self.balancing.weights(), {}
        for name, task in self.tasks.items():
            output = self.network(batch["image"], cut, (name,))[name]
            loss = task.loss(output, batch[name])
            found = torch.autograd.grad(weights[name] * loss, leaves, allow_unused=True)
            for total, part in zip(gradients, found, strict=True):
                if part is not None:
                    total += part
            losses[name] = loss.detach()
        parameters = list(self.parameters.parameters())
        outputs = [t for t in gates.tensors if t.requires_grad]
        task_gradients = torch.autograd.grad(outputs, parameters, gradients)
        self._spend(self._mixed_macs, batch)
        values = self._alpha_update(step, task_gradients, losses)
        self.num_alpha_steps += 1
        return values | {"loss/alpha": weighted_sum(weights, losses)}

    def _alpha_update(
        self, step: int, task_gradients: tuple[Tensor, ...], losses: Losses
    ) -> dict[str, float | Tensor]:
        config, parameters = self.config, list(self.parameters.parameters())
        if config.objective == "budget" and config.latency.schedule == "ramp":
            self.mu = config.latency.weight * min(2 * config.progress(step), 1.0)
        expected = self.expected_cost()
        term, weight = self._cost_term(expected, step)
        found = torch.autograd.grad(weight * term, parameters, allow_unused=True)
        cost_gradients = [
            torch.zeros_like(p) if part is None else part
            for p, part in zip(parameters, found, strict=True)
        ]
        norms = [_norm(task_gradients), _norm(cost_gradients)]
        for parameter, *parts in zip(parameters, task_gradients, cost_gradients, strict=True):
            parameter.grad = parts[0] + parts[1]
        is_skipped = self.guard.take(
            self.alpha_optimizer,
            norms[0] + norms[1],
            [losses],
            step=step,
            networks=["mixture"],
            what=" (alpha)",
        )
        is_dual = config.objective == "budget" and config.latency.schedule == "dual"
        if is_dual and not bool(is_skipped):
            ratio = math.log(float(expected.detach()) / self.target_at(step))
            self.mu = max(0.0, self.mu + config.latency.dual_rate * ratio)
        return {
            "cost/weight": weight,
            "alpha/cost_to_task_gradient": norms[1] / norms[0].clamp_min(1e-12),
        }

    def _cost_term(self, expected: Tensor, step: int) -> tuple[Tensor, float]:
        """What the objective adds to the tasks' losses, and its weight."""
        if self.config.objective == "weighted":
            return expected / self.shared_cost, self.config.resource_weight
        return (expected / self.target_at(step)).log().relu(), self.mu

    def target_at(self, step: int) -> float:
        """The target that a step is held to: down from the first expected cost to the target.

        Sharing feeds on itself: what later layers are worth sharing depends on the earlier ones.
        Held to the target at once, an undecided search is driven far past it, to full sharing.
        """
        assert self.target is not None
        share = min(self.config.progress(step) / TARGET_FALL, 1.0)
        return self.target + (1 - share) * max(self.first_cost - self.target, 0.0)

    def _cost_values(self) -> dict[str, float | Tensor]:
        with torch.no_grad():
            return {
                "cost/expected": self.expected_cost(),
                "alpha/entropy": self.parameters.entropy(),
            }

    def expected_cost(self) -> Tensor:
        """E[cost] under softmax(alpha) in the unit of `costs`, with gradient."""
        probabilities = self.parameters.probabilities()
        return self.costs.expected(probabilities.routes, probabilities.options)

    def _temperature(self, step: int) -> float:
        return self.config.temperature.at(self.config.progress(step))

    def _gates(self, number: int, purpose: str, step: int | None = None) -> RouteGates:
        generator = torch_generator(self.seed, "gumbel", purpose, number)
        temperature = self._temperature(number if step is None else step)
        hard = self.config.gates == "hard"
        return self.parameters.gates(temperature, hard=hard, generator=generator)

    def _extreme(self, routes: Routes, *, largest: bool) -> Routes:
        space, drawn = self.encoder.space, routes.options
        assert space is not None
        assert drawn is not None
        options = tuple(space.extreme(one, largest=largest) for one in drawn)
        return Routes(routes.candidates, options)

    def _spend(self, forward_macs: float, batch: Mapping[str, Tensor]) -> None:
        self.macs += training_macs(int(forward_macs), len(batch["image"]))

    def alarms(self) -> list[str]:
        """What looks wrong with the search, in words; empty if nothing does."""
        found = []
        entropy, maximum = float(self.parameters.entropy().detach()), self.parameters.max_entropy
        if self.step >= self.config.steps and entropy > 0.95 * maximum:
            found.append(
                f"alpha is still almost uniform (entropy {entropy:.1f} of {maximum:.1f} nats); "
                f"raise branching.alpha_learning_rate or search longer"
            )
        expected = float(self.expected_cost().detach())
        if (
            self.config.objective == "budget"
            and self.target is not None
            and self.step >= self.config.steps
            and expected > 1.1 * self.target
        ):
            found.append(
                f"E[cost] {expected:.3g} {self.costs.unit} ends above the target "
                f"{self.target:.3g}; raise branching.latency.weight or search longer"
            )
        return found


def mixed_macs(costs: BranchCosts, num_tasks: int) -> float:
    """Multiply-adds of all tasks' mixtures: each runs every candidate of every layer, in full."""
    layers = float(costs.layers[:, 0].sum())
    for prices in costs.blocks:
        # Every op once, at the largest kernel, expansion and widths.
        layers += float(prices[-1, :, -1, -1, -1, 0].sum())
    layers += sum(float(prices[-1, 0]) for prices in costs.laterals.values())
    return 1e9 * (num_tasks**2 * layers + float(costs.constant[0]))


def _named(losses: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
    return {f"loss/{name}": value for name, value in losses.items()}


def _norm(gradients: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients]).norm()
