"""A policy: which tasks share which operators. Its distribution, its draws, what pulls at it.

Source: AutoMTL (Zhang et al., NeurIPS 2022, section 3.2), https://arxiv.org/abs/2110.13076
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from oneshot_ednas.relaxation import gumbel_softmax

SHARED, OWN, SKIP = 0, 1, 2
"""What a task takes at an operator: the shared one, a copy of its own, or none."""
CHOICES = ("shared", "own", "skip")
"""Their names, in this order."""


@dataclass(frozen=True)
class Policy:
    """What each task takes at each operator of a backbone."""

    tasks: tuple[str, ...]
    operators: tuple[str, ...]
    """Names, in the order in which the backbone runs them."""
    choices: tuple[tuple[int, ...], ...]
    """Per task and operator: `SHARED`, `OWN` or `SKIP`."""

    def __post_init__(self) -> None:
        """One choice per task and operator."""
        for name, names in (("tasks", self.tasks), ("operators", self.operators)):
            if not names or len(set(names)) != len(names):
                raise ValueError(
                    f"policy: expected {name} with names of their own, got {list(names)}"
                )
        if len(self.choices) != len(self.tasks):
            raise ValueError(
                f"policy: expected a row for each of {len(self.tasks)} tasks, got "
                f"{len(self.choices)}"
            )
        for task, row in zip(self.tasks, self.choices, strict=True):
            if len(row) != len(self.operators) or not set(row) <= {SHARED, OWN, SKIP}:
                raise ValueError(
                    f"policy of {task}: expected {len(self.operators)} choices of 0 (shared), "
                    f"1 (own) and 2 (skip), got {list(row)}"
                )

    @classmethod
    def uniform(cls, tasks: Sequence[str], operators: Sequence[str], choice: int) -> "Policy":
        """The same choice for every task and operator."""
        return cls(tuple(tasks), tuple(operators), ((choice,) * len(operators),) * len(tasks))

    @classmethod
    def all_shared(cls, tasks: Sequence[str], operators: Sequence[str]) -> "Policy":
        """One backbone for all tasks."""
        return cls.uniform(tasks, operators, SHARED)

    @classmethod
    def all_own(cls, tasks: Sequence[str], operators: Sequence[str]) -> "Policy":
        """A backbone for each task."""
        return cls.uniform(tasks, operators, OWN)

    @classmethod
    def random(
        cls, tasks: Sequence[str], operators: Sequence[str], generator: torch.Generator
    ) -> "Policy":
        """Each choice drawn uniformly.

        Args:
            tasks: their names.
            operators: their names.
            generator: on the CPU.
        """
        drawn = torch.randint(len(CHOICES), (len(tasks), len(operators)), generator=generator)
        return cls.of(tasks, operators, drawn)

    @classmethod
    def of(cls, tasks: Sequence[str], operators: Sequence[str], choices: Tensor) -> "Policy":
        """From whole numbers `[tasks, operators]`."""
        return cls(tuple(tasks), tuple(operators), tuple(tuple(row) for row in choices.tolist()))

    def one_hot(self) -> Float[Tensor, "tasks operators 3"]:
        """Gates that are 1 for each choice and 0 elsewhere."""
        return F.one_hot(torch.tensor(self.choices), len(CHOICES)).float()

    def shares(self) -> dict[str, float]:
        """Share of each choice among all, by its name."""
        taken = [choice for row in self.choices for choice in row]
        return {name: taken.count(index) / len(taken) for index, name in enumerate(CHOICES)}

    def __str__(self) -> str:
        """For example `shared 63%, own 32%, skip 5%`."""
        return ", ".join(f"{name} {share:.0%}" for name, share in self.shares().items())

    def to_json(self) -> dict[str, Any]:
        """Names and, per task and operator, the choice as a word."""
        return {
            "tasks": list(self.tasks),
            "operators": list(self.operators),
            "policy": [[CHOICES[choice] for choice in row] for row in self.choices],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Policy":
        """From what `to_json` gives; operators may also be objects with a `name`.

        Raises:
            ValueError: if something is missing or no such choice.
        """
        try:
            operators = [
                entry if isinstance(entry, str) else entry["name"] for entry in data["operators"]
            ]
            choices = tuple(tuple(CHOICES.index(word) for word in row) for row in data["policy"])
            return cls(tuple(data["tasks"]), tuple(operators), choices)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"policy: expected tasks, operators, and for each a word of "
                f"{', '.join(CHOICES)}, got {type(error).__name__}: {error}"
            ) from None


class PolicyParameters(nn.Module):
    """The logits of each task's choice at each operator, zeros at the start."""

    def __init__(self, tasks: Sequence[str], operators: Sequence[str]) -> None:
        super().__init__()
        self.tasks, self.operators = tuple(tasks), tuple(operators)
        self.logits = nn.Parameter(torch.zeros(len(tasks), len(operators), len(CHOICES)))

    def probabilities(self) -> Float[Tensor, "tasks operators 3"]:
        """pi: softmax of the logits, with gradient."""
        return self.logits.softmax(-1)

    def gates(
        self,
        temperature: float,
        *,
        hard: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "tasks operators 3"]:
        """One draw of the Gumbel-softmax (eq. 1).

        Losses and regularisation of a step take the same draw: pass these gates to both.

        Args:
            temperature: positive; gates tend to one-hot as it falls.
            hard: straight-through: exactly one-hot forward, the soft gates' gradient backward.
            generator: a CPU generator; the draw does not depend on the device.

        Raises:
            ValueError: if the temperature is not positive.
        """
        # Logits stand for log pi: they differ by a number that the softmax takes out again.
        return gumbel_softmax(self.logits, temperature, hard=hard, generator=generator)

    def argmax(self) -> Policy:
        """The most probable policy."""
        return policy_of_gates(self.tasks, self.operators, self.logits)

    def sample(self, generator: torch.Generator) -> Policy:
        """A policy drawn from pi, by a CPU generator."""
        rows = self.probabilities().detach().cpu().double().flatten(0, 1)
        drawn = torch.multinomial(rows, 1, generator=generator).view(self.logits.shape[:2])
        return Policy.of(self.tasks, self.operators, drawn)

    def entropy(self) -> Float[Tensor, ""]:
        """Mean over tasks and operators of the choice's entropy, in nats; log 3 at the start."""
        log_p = self.logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean()


def policy_of_gates(
    tasks: Sequence[str], operators: Sequence[str], gates: Float[Tensor, "tasks operators 3"]
) -> Policy:
    """The policy of the largest gates: the one that hard gates run."""
    return Policy.of(tasks, operators, gates.detach().argmax(-1).cpu())


def policy_regularization(
    probabilities: Float[Tensor, "tasks operators 3"], depths: Sequence[int]
) -> Float[Tensor, ""]:
    """L_reg, which pulls towards shared operators, most of all near the images (eq. 2).

    The sum over tasks and operators of (L - l) / L times
    softplus(p_own - p_shared) + softplus(p_skip - p_shared). L is the largest depth, so that the
    last operator is left to the task losses.

    Args:
        probabilities: gates of a draw, or pi.
        depths: l of each operator, counted from 1 at the images.

    Raises:
        ValueError: if there is not one depth, from 1 on, per operator.
    """
    if len(depths) != probabilities.shape[1] or min(depths) < 1:
        raise ValueError(
            f"depths: expected a number from 1 on for each of {probabilities.shape[1]} "
            f"operators, got {list(depths)}"
        )
    largest = max(depths)
    weights = torch.tensor([(largest - depth) / largest for depth in depths]).to(probabilities)
    shared, own, skip = probabilities.unbind(-1)
    return (weights * (F.softplus(own - shared) + F.softplus(skip - shared))).sum()


def task_correlation(
    probabilities: Float[Tensor, "tasks operators 3"],
) -> Float[Tensor, "tasks tasks"]:
    """Cosine similarity of the tasks' policies (appendix G): 1 on the diagonal, 0 or more."""
    rows = F.normalize(probabilities.detach().flatten(1), dim=1)
    return rows @ rows.T
