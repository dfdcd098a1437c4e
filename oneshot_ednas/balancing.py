"""How the tasks' losses are weighed against each other while a network's weights are trained.

A `Balancing` gives each task's loss a factor. The task's `loss_weight` is always part of it; what a
method adds is learned or measured during the training, so it belongs to the checkpoint.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oneshot_ednas.guard import finite_or
from oneshot_ednas.tasks import Task
from oneshot_ednas.training import weighted_sum


@dataclass(frozen=True, kw_only=True)
class BalancingConfig:
    """The weights of the tasks in a training."""

    method: Literal["fixed", "uncertainty", "dwa"] = "fixed"
    """`fixed`: each task's `loss_weight`; `uncertainty`: learned, see `uncertainty_loss`;
    `dwa`: dynamic weight average, from the third epoch on, see `dynamic_weights`."""
    temperature: float = 2.0
    """`dwa`: T of the softmax; the higher it is, the less the weights differ."""
    learning_rate: float = 0.01
    """`uncertainty`: of the log variances; constant. Adam moves them by about as much in a step,
    and the logarithm of a loss is often some units from 0, where they start."""

    def __post_init__(self) -> None:
        """Numbers are positive."""
        for name in ("temperature", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    def build(
        self, tasks: Mapping[str, Task], *, epoch_steps: int, device: torch.device
    ) -> "Balancing":
        """The balancing of a training at step 0.

        Args:
            tasks: the tasks.
            epoch_steps: steps of one epoch of the training.
            device: where the losses are.
        """
        return METHODS[self.method](self, tasks, epoch_steps, device)


def uncertainty_loss(
    weighted: Float[Tensor, " tasks"], log_variances: Float[Tensor, " tasks"]
) -> Float[Tensor, ""]:
    """Sum over tasks of exp(-s) w L + s, of losses w L and log variances s.

    That is the negative log likelihood of a Laplace error of scale exp(s), so it is exact for L1.
    The paper has one half of it for a Gaussian error, and exp(-s) L + s / 2 for classes. Those
    halves have no place of their own: they are one half of all of it, which Adam does not see, with
    a `loss_weight` of 2 for classes.

    The optimum of s is log(w L). There the network's weights get the sum of (grad L) / L over the
    tasks: `loss_weight` cancels, and says where the factors begin, not where they end.

    A task whose loss is 0, for want of a valid pixel in the batch or by its `loss_weight`, says
    nothing about its s and has no part in the sum.

    Args:
        weighted: loss of each task times its `loss_weight`, 0 or more.
        log_variances: s of each task.

    Source:
        Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
        Geometry and Semantics, CVPR 2018, section 3.2, https://arxiv.org/abs/1705.07115
    """
    # Without its loss against it, s would fall without end.
    regularizer = torch.where(weighted.detach() > 0, log_variances, 0)
    return ((-log_variances).exp() * weighted + regularizer).sum()


def dynamic_weights(
    last: Float[Tensor, " tasks"], before: Float[Tensor, " tasks"], temperature: float
) -> Float[Tensor, " tasks"]:
    """K softmax(r / T) for K tasks; r is the last epoch's mean loss over that of the one before.

    The weights sum to K, and the task whose loss falls slowest has the largest.

    Args:
        last: mean loss of each task in the last epoch, 0 or more.
        before: in the epoch before; where it is 0, for want of a valid pixel, r is 1.
        temperature: T.

    Source:
        Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, CVPR 2019,
        section 3.3, https://arxiv.org/abs/1803.10704
    """
    ratio = torch.where(before > 0, last / before, 1)
    return len(ratio) * (ratio / temperature).softmax(0)


@dataclass(eq=False)
class Balancing:
    """Factors of the tasks' losses; here each task's `loss_weight`, throughout."""

    config: BalancingConfig
    tasks: Mapping[str, Task]
    epoch_steps: int
    device: torch.device

    def add_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer of the network's weights what is learned here."""

    def weights(self) -> Mapping[str, float | Tensor]:
        """Factor of each task's loss now, with its `loss_weight`; a constant for autograd."""
        return {name: task.loss_weight for name, task in self.tasks.items()}

    def loss(self, losses: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """What a step of the network's weights minimises, from the loss of each task."""
        return weighted_sum(self.weights(), losses)

    def values(self) -> dict[str, float | Tensor]:
        """Numbers for the log: what changes during the training."""
        return {}

    def end_step(self, *losses: Mapping[str, Tensor]) -> None:
        """Take note of a step: the loss of each task, for each network that it trained."""

    def state_dict(self) -> dict[str, Any]:
        """All state that later steps depend on, besides the optimizer's."""
        return {"method": self.config.method}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: if it is of another method.
        """
        if state["method"] != self.config.method:
            raise ValueError(
                f"the checkpoint has balancing {state['method']}, the config "
                f"{self.config.method}; go on with the first, or begin anew"
            )

    def _loss_weights(self) -> Float[Tensor, " tasks"]:
        weights = [task.loss_weight for task in self.tasks.values()]
        return torch.tensor(weights, dtype=torch.float32, device=self.device)

    def _of_tasks(self, losses: Mapping[str, Tensor]) -> Float[Tensor, " tasks"]:
        return torch.stack([losses[name] for name in self.tasks])

    def _by_task(self, values: Float[Tensor, " tasks"], group: str = "") -> dict[str, Any]:
        return {f"{group}{name}": value for name, value in zip(self.tasks, values, strict=True)}


@dataclass(eq=False)
class UncertaintyBalancing(Balancing):
    """Factors w exp(-s) with learned s, see `uncertainty_loss`."""

    def __post_init__(self) -> None:
        """Every s is 0: the first step is that of fixed weights."""
        self.base = self._loss_weights()
        self.log_variances = nn.Parameter(torch.zeros_like(self.base))

    def add_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Add s, with its own learning rate and no weight decay, which would pull it to 0."""
        rate = self.config.learning_rate
        group = {"params": [self.log_variances], "lr": rate, "weight_decay": 0.0}
        optimizer.add_param_group(group)

    def weights(self) -> Mapping[str, float | Tensor]:
        """Factors w exp(-s), without a gradient to s."""
        return self._by_task(self.base * (-self.log_variances.detach()).exp())

    def loss(self, losses: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """`uncertainty_loss`, with a gradient to s."""
        return uncertainty_loss(self.base * self._of_tasks(losses), self.log_variances)

    def values(self) -> dict[str, float | Tensor]:
        """The factors and s."""
        s = self.log_variances.detach().clone()  # the optimizer changes s in place
        factors = self._by_task(self.base * (-s).exp(), "balancing/")
        return factors | self._by_task(s, "log_variance/")

    def state_dict(self) -> dict[str, Any]:
        """With s."""
        return super().state_dict() | {"log_variances": self.log_variances.detach()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; raises as of `Balancing`."""
        super().load_state_dict(state)
        with torch.no_grad():
            self.log_variances.copy_(state["log_variances"])


@dataclass(eq=False)
class DynamicWeightAverage(Balancing):
    """Factors w lambda, with lambda from the last two epochs, see `dynamic_weights`.

    An epoch is a pass over the frames of the weight steps; in the first two, lambda is 1.
    """

    def __post_init__(self) -> None:
        """No loss was seen."""
        self.base = self._loss_weights()
        self.lambdas = torch.ones_like(self.base)
        self.last: Tensor | None = None
        """Mean loss of each task in the last full epoch; None in the first."""
        self.sums = torch.zeros_like(self.base)
        """Losses of this epoch; on the device, so that no step waits for them."""
        self.num_steps = 0
        """Steps of this epoch so far."""

    def weights(self) -> Mapping[str, float | Tensor]:
        """Factors w lambda."""
        return self._by_task(self.base * self.lambdas)

    def values(self) -> dict[str, float | Tensor]:
        """The factors."""
        return self._by_task(self.base * self.lambdas, "balancing/")

    @torch.no_grad()
    def end_step(self, *losses: Mapping[str, Tensor]) -> None:
        """Add the mean over the networks; weigh anew at the end of an epoch."""
        # A loss that is not finite belongs to a step that was skipped: the epoch's mean stays.
        mean_so_far = self.sums / max(self.num_steps, 1)
        for of_network in losses:
            self.sums += finite_or(self._of_tasks(of_network), mean_so_far) / len(losses)
        self.num_steps += 1
        if self.num_steps < self.epoch_steps:
            return
        mean = self.sums / self.num_steps
        if self.last is not None:
            self.lambdas = dynamic_weights(mean, self.last, self.config.temperature)
        self.last, self.sums, self.num_steps = mean, torch.zeros_like(mean), 0

    def state_dict(self) -> dict[str, Any]:
        """With the weights, the last epoch, and this one as far as it went."""
        return super().state_dict() | {
            "lambdas": self.lambdas,
            "last": self.last,
            "sums": self.sums,
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; raises as of `Balancing`."""
        super().load_state_dict(state)
        last = state["last"]
        self.last = None if last is None else last.to(self.device)
        self.lambdas = state["lambdas"].to(self.device)
        self.sums = state["sums"].to(self.device, copy=True)  # grows in place
        self.num_steps = state["num_steps"]


METHODS: dict[str, type[Balancing]] = {
    "fixed": Balancing,
    "uncertainty": UncertaintyBalancing,
    "dwa": DynamicWeightAverage,
}
"""The class of each method."""

FIXED: dict[str, Any] = {"method": "fixed"}
"""State of checkpoints that hold none: they were written before there was a choice."""
