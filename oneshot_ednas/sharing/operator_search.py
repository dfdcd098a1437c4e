"""The search for a policy: pre-train all operators, then train policy and weights in turns.

Source: AutoMTL (Zhang et al., NeurIPS 2022, section 3.2), https://arxiv.org/abs/2110.13076
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from oneshot_ednas.balancing import BalancingConfig
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.guard import StepGuard, fused_adam
from oneshot_ednas.models.network import recalibrate_bn
from oneshot_ednas.relaxation import TemperatureConfig
from oneshot_ednas.sharing.operators import PLAIN_OPERATORS, OperatorTypes, compile_supermodel
from oneshot_ednas.sharing.policy import (
    CHOICES,
    SKIP,
    Policy,
    PolicyParameters,
    policy_of_gates,
    policy_regularization,
)
from oneshot_ednas.sharing.resumable import ResumableSearch
from oneshot_ednas.tasks import Task
from oneshot_ednas.training import (
    LoopConfig,
    Metrics,
    OptimizerConfig,
    accuracy_of,
    calibration_images,
    evaluate,
    task_losses,
    torch_generator,
    weighted_sum,
)

DRAWS_PER_CANDIDATE = 10
"""Draws after which a peaked policy is left with fewer candidates than asked for."""
UNDECIDED_ENTROPY = 0.95
"""Share of the largest entropy above which a trained policy counts as undecided."""


@dataclass(frozen=True, kw_only=True)
class OperatorSharingConfig:
    """The search for what each task shares, copies and skips."""

    pretrain_steps: int
    """Steps that train all weights, on the mean of each operator's three outputs; 0 is none."""
    policy_steps: int
    """Weight steps after that; policy steps come on top, one per `alternation` of them."""
    batch_size: int
    optimizer: OptimizerConfig = OptimizerConfig()
    """Of the weights; one schedule over both stages."""
    balancing: BalancingConfig = BalancingConfig()
    """The weights of the tasks' losses. Weight steps learn or measure them; policy steps take them
    as they are."""
    policy_learning_rate: float = 0.01
    regularization: float = 5e-4
    """lambda_reg of eq. 3, which pulls towards shared operators; 0 is none. Its term is a sum over
    tasks and operators."""
    temperature: TemperatureConfig = TemperatureConfig()
    gates: Literal["soft", "hard"] = "soft"
    """`soft` mixes the three outputs of each operator by the draw; `hard` takes the drawn one,
    straight-through in policy steps."""
    alternation: int = 1
    """Weight steps per policy step."""
    discretize: Literal["sample", "argmax"] = "sample"
    """Candidates: `argmax` is the most probable policy alone, `sample` that one and draws."""
    num_candidates: int = 8
    """How many policies `sample` gives, to be ranked on validation frames."""
    splits: dict[str, float] = field(
        default_factory=lambda: {"weights": 0.6, "alpha": 0.25, "validation": 0.15}
    )
    """Shares of the training set for weight steps, policy steps (`alpha`) and `validation`."""
    split_seed: int | None = None
    """Seed of these splits; null is that of the run."""
    loop: LoopConfig = LoopConfig()

    def __post_init__(self) -> None:
        """Check ranges."""
        if set(self.splits) != {"weights", "alpha", "validation"}:
            raise ValueError(
                f"splits: expected weights, alpha and validation, got {', '.join(self.splits)}"
            )
        if self.pretrain_steps < 0:
            raise ValueError(f"pretrain_steps: expected 0 or more, got {self.pretrain_steps}")
        for name in ("policy_steps", "batch_size", "alternation", "num_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.policy_learning_rate < math.inf or not 0 <= self.regularization < math.inf:
            raise ValueError(
                f"expected policy_learning_rate > 0 and regularization >= 0, both finite, got "
                f"{self.policy_learning_rate} and {self.regularization}"
            )

    @property
    def steps(self) -> int:
        """Weight steps of both stages."""
        return self.pretrain_steps + self.policy_steps

    def progress(self, step: int) -> float:
        """0 at the first step after pre-training, 1 at the last."""
        return (step - self.pretrain_steps) / max(self.policy_steps - 1, 1)


class OperatorSearch(ResumableSearch):
    """A supermodel, its policy parameters, and everything that a checkpoint must hold."""

    stage = "operators"
    config: OperatorSharingConfig

    def __init__(
        self,
        config: OperatorSharingConfig,
        make_backbone: Callable[[], nn.Module],
        make_decoder: Callable[[int], nn.Module],
        tasks: Mapping[str, Task],
        *,
        splits: Mapping[str, PackedSplit],
        augmentation: AugmentConfig,
        seed: int,
        device: torch.device,
        operator_types: OperatorTypes = PLAIN_OPERATORS,
    ) -> None:
        """Build everything at step 0.

        Args:
            config: the search.
            make_backbone: makes the backbone, for example `partial(Chain, encoder)`.
            make_decoder: makes a decoder of so many output channels, `encoder.build_decoder`.
            tasks: the tasks.
            splits: `weights` and `alpha`.
            augmentation: of both.
            seed: of all draws.
            device: where to compute.
            operator_types: classes of modules that become operators.

        Raises:
            ValueError: if the backbone cannot be compiled, see `compile_supermodel`.
        """
        self.config, self.tasks = config, dict(tasks)
        self.splits, self.augmentation = splits, augmentation
        self.seed, self.device = seed, device
        example = torch.zeros(1, 3, splits["weights"].height, splits["weights"].width)
        # The weights' first values depend on the seed alone, not on what ran before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_generator(seed, "supermodel").initial_seed())
            backbone = make_backbone()
            decoders = {name: make_decoder(task.out_channels) for name, task in tasks.items()}
        self.supermodel = compile_supermodel(backbone, decoders, example, operator_types)
        self.supermodel.to(device)
        self.policy = PolicyParameters(self.supermodel.tasks, self.supermodel.operator_names)
        self.policy.to(device)
        self.optimizer = config.optimizer.build(self.supermodel.parameters())
        self.balancing = config.balancing.build(
            tasks, epoch_steps=len(splits["weights"]) // config.batch_size, device=device
        )
        self.balancing.add_to(self.optimizer)
        self.policy_optimizer = fused_adam(
            self.policy.parameters(), learning_rate=config.policy_learning_rate, weight_decay=0.0
        )
        self.guard = StepGuard(self.stage, max_skipped=config.loop.max_skipped)
        self.step = 0
        self.supermodel.train()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Supermodel and policy."""
        return {"supermodel": self.supermodel, "policy": self.policy}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One of each."""
        return {"optimizer": self.optimizer, "policy_optimizer": self.policy_optimizer}

    def phase(self, values: Mapping[str, float]) -> str:
        """Share of the shared operators, and the temperature."""
        is_pretraining = values["temperature"] == 0
        word = "pre-train" if is_pretraining else f"T {values['temperature']:.2f}"
        return f"shared {values['policy/shared']:.2f}  {word}"

    def logits(self) -> dict[str, Tensor]:
        """Those of the policy."""
        return {"policy/logits": self.policy.logits}

    # Steps ----------------------------------------------------------------------------------

    def take_step(self, step: int) -> dict[str, float | Tensor]:
        """One weight step and, after pre-training, its policy step; returns numbers to log."""
        self.config.optimizer.apply(self.optimizer, step, self.config.steps)
        is_pretraining = step < self.config.pretrain_steps
        values = self._weight_step(step)
        if (
            not is_pretraining
            and (step - self.config.pretrain_steps) % self.config.alternation == 0
        ):
            values |= self._policy_step(step)
        means = self.policy.probabilities().detach().mean((0, 1))
        values |= {f"policy/{name}": mean for name, mean in zip(CHOICES, means, strict=True)}
        values["policy/entropy"] = self.policy.entropy().detach()
        values["temperature"] = 0.0 if is_pretraining else self._temperature(step)
        return values

    def _weight_step(self, step: int) -> dict[str, float | Tensor]:
        batch = self._batch("weights", step)
        self.optimizer.zero_grad(set_to_none=True)
        run: Tensor | Policy = self.supermodel.pretraining_gates()
        if step >= self.config.pretrain_steps:
            gates = self._gates("weights", step).detach()
            # Of hard gates only the operators that they choose are run.
            run = self._policy_of(gates) if self.config.gates == "hard" else gates
        losses = task_losses(self.tasks, self.supermodel(batch["image"], run), batch)
        loss, balance = self.balancing.loss(losses), self.balancing.values()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(
            self.supermodel.parameters(), self.config.optimizer.max_norm
        )
        self.guard.take(self.optimizer, norm, [losses], step=step, networks=[self._mean_choices])
        losses = {task: value.detach() for task, value in losses.items()}
        self.balancing.end_step(losses)
        values: dict[str, float | Tensor] = {"loss/weights": loss.detach()}
        return values | {f"loss/{task}": value for task, value in losses.items()} | balance

    def _policy_step(self, step: int) -> dict[str, float | Tensor]:
        batch = self._batch("alpha", step)
        # One draw for losses and regularisation.
        gates = self._gates("policy", step)
        losses = task_losses(self.tasks, self.supermodel(batch["image"], gates), batch)
        regularization = policy_regularization(gates, self.supermodel.depths)
        loss = weighted_sum(self.balancing.weights(), losses)
        loss = loss + self.config.regularization * regularization
        # Gradients of the policy only: autograd leaves out those of the weights.
        (gradient,) = torch.autograd.grad(loss, self.policy.logits)
        self.policy.logits.grad = gradient
        self.guard.take(
            self.policy_optimizer,
            gradient.norm(),
            [losses],
            step=step,
            networks=[self._mean_choices],
            what=" (policy)",
        )
        return {"loss/policy": loss.detach(), "policy/regularization": regularization.detach()}

    def _mean_choices(self) -> dict[str, float]:
        """Probability of each choice, mean over tasks and operators."""
        means = self.policy.probabilities().detach().mean((0, 1))
        return dict(zip(CHOICES, means.tolist(), strict=True))

    def _temperature(self, step: int) -> float:
        return self.config.temperature.at(self.config.progress(step))

    def _gates(self, purpose: str, step: int) -> Tensor:
        generator = torch_generator(self.seed, "gumbel", purpose, step)
        hard = self.config.gates == "hard"
        return self.policy.gates(self._temperature(step), hard=hard, generator=generator)

    def _policy_of(self, gates: Tensor) -> Policy:
        return policy_of_gates(self.policy.tasks, self.policy.operators, gates)

    # Results --------------------------------------------------------------------------------

    def candidates(self) -> list[Policy]:
        """Distinct policies to choose from, the most probable first.

        A policy that is almost decided may give fewer than `num_candidates`.
        """
        found = [self.policy.argmax()]
        if self.config.discretize == "argmax":
            return found
        for number in range(DRAWS_PER_CANDIDATE * self.config.num_candidates):
            if len(found) == self.config.num_candidates:
                break
            drawn = self.policy.sample(torch_generator(self.seed, "candidate", number))
            if drawn not in found:
                found.append(drawn)
        return found

    def alarms(self) -> list[str]:
        """What looks wrong with the search, in words; empty if nothing does."""
        found = []
        entropy, largest = float(self.policy.entropy().detach()), math.log(len(CHOICES))
        if self.step >= self.config.steps and entropy > UNDECIDED_ENTROPY * largest:
            found.append(
                f"the policy is still almost uniform (entropy {entropy:.2f} of {largest:.2f} nats "
                f"per choice); raise operators.policy_learning_rate or search longer"
            )
        policy = self.policy.argmax()
        for task, row in zip(policy.tasks, policy.choices, strict=True):
            if set(row) == {SKIP}:
                found.append(
                    f"{task} skips every operator: its decoder sees the images alone; search "
                    f"longer or raise operators.regularization"
                )
        return found


@dataclass(frozen=True, kw_only=True)
class RankedPolicy:
    """A policy and its score with the supermodel's weights."""

    policy: Policy
    metrics: Metrics
    accuracy: float


def rank_policies(
    search: OperatorSearch,
    policies: Sequence[Policy],
    *,
    calibration: PackedSplit,
    validation: PackedSplit,
    calibration_batches: int,
    batch_size: int,
) -> list[RankedPolicy]:
    """Policies by the accuracy of their networks with inherited weights, best first.

    Args:
        search: a finished search.
        policies: such as `search.candidates()`.
        calibration: images for the BN statistics of each network: the weight split.
        validation: what is scored on.
        calibration_batches: batches behind the BN statistics.
        batch_size: of both.
    """
    ranked = []
    for policy in policies:
        network = search.supermodel.standalone(policy)
        images = calibration_images(
            calibration,
            num_batches=calibration_batches,
            batch_size=batch_size,
            seed=search.seed,
            device=search.device,
        )
        recalibrate_bn(network, images)
        metrics = evaluate(
            network, validation, search.tasks, batch_size=batch_size, device=search.device
        )
        accuracy = accuracy_of(search.tasks, metrics)
        ranked.append(RankedPolicy(policy=policy, metrics=metrics, accuracy=accuracy))
    return sorted(ranked, key=lambda one: -one.accuracy)
