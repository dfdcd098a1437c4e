"""Architecture parameters: one logit per option, relaxed to gates by the Gumbel-softmax.

Gates are factorised: one vector per decision of each block, non-negative and summing to one.
Source: Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017, eq. 1-2.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.space import CHOICE_FIELDS, SearchSpace


class BlockGates(NamedTuple):
    """Gates (or probabilities) of one block, one vector per decision, in `CHOICE_FIELDS` order."""

    op: Tensor
    kernel_size: Tensor
    expand_ratio: Tensor
    filters: Tensor


Gates = tuple[BlockGates, ...]
"""One `BlockGates` per block; a decision with one option has the constant gate 1."""


class HardGates(tuple[BlockGates, ...]):
    """Gates of which exactly one per decision is not 0, with what the host knows of them."""

    architecture: Architecture
    """What they choose."""
    idle_ops: tuple[tuple[int, ...], ...]
    """Per block, the indices of the ops whose gate is 0: nothing in them has a gradient."""

    def __new__(
        cls, gates: Iterable[BlockGates], space: SearchSpace, architecture: Architecture
    ) -> "HardGates":
        """Gates of all blocks, and the architecture that they choose."""
        found = super().__new__(cls, gates)
        found.architecture = architecture
        found.idle_ops = tuple(
            tuple(index for index, op in enumerate(spec.ops) if op != block.op)
            for spec, block in zip(space.blocks, architecture.blocks, strict=True)
        )
        return found


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """How the Gumbel-softmax temperature falls during the search.

    Source: 5.0 -> 0.1, linear: BMTAS (Bruggemann et al., BMVC 2020), appendix A.
    """

    start: float = 5.0
    end: float = 0.1
    schedule: Literal["linear", "exponential", "constant"] = "linear"

    def __post_init__(self) -> None:
        """Temperatures are positive and do not rise."""
        if not 0 < self.end <= self.start:
            raise ValueError(f"expected 0 < end <= start, got start {self.start}, end {self.end}")

    def at(self, progress: float) -> float:
        """Temperature at a progress from 0 (first alpha step) to 1 (last)."""
        progress = min(max(progress, 0.0), 1.0)
        if self.schedule == "constant":
            return self.start
        if self.schedule == "exponential":
            return self.start * (self.end / self.start) ** progress
        return self.start + (self.end - self.start) * progress


def gumbel_softmax(
    logits: Float[Tensor, "*choices options"],
    temperature: float,
    *,
    hard: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*choices options"]:
    """Gates of every choice, one draw each.

    Args:
        logits: -inf where there is no option.
        temperature: positive; gates tend to one-hot as it falls.
        hard: straight-through: exactly one-hot forward, the soft gates' gradient backward.
        generator: a CPU generator; the draw does not depend on the device.

    Raises:
        ValueError: if the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    exponential = torch.empty(logits.shape).exponential_(generator=generator)
    # exponential_ may return 0 in float32, whose log is -inf; clamp to the smallest normal.
    tiny = torch.finfo(exponential.dtype).tiny
    gumbel = -exponential.clamp_min(tiny).log()
    gumbel = gumbel.to(logits.device, logits.dtype, non_blocking=True)
    soft = ((logits + gumbel) / temperature).softmax(-1)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1)
    # The bracket is exactly zero, so the forward value is exactly one-hot.
    return one_hot + (soft - soft.detach())


class ArchitectureParameters(nn.Module):
    """Alpha: the logits of every option of every choice, zeros at the start.

    All logits live in one vector, so that a step costs a handful of kernels however many
    choices there are. Choices with a single option have no logits.
    """

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space
        sizes = [len(choice.options) for choice in space.choices]
        width = max(sizes, default=1)
        index = torch.zeros(len(sizes), width, dtype=torch.long)
        is_option = torch.zeros(len(sizes), width, dtype=torch.bool)
        start = 0
        for row, size in enumerate(sizes):
            index[row, :size] = torch.arange(start, start + size)
            is_option[row, :size] = True
            start += size
        self.logits = nn.Parameter(torch.zeros(start))
        self.index: Tensor
        self.is_option: Tensor
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("is_option", is_option, persistent=False)

    def padded_logits(self) -> Float[Tensor, "choices options"]:
        """Logits per choice; -inf where a choice has fewer options than the largest."""
        return torch.where(self.is_option, self.logits[self.index], -math.inf)

    def probabilities(self) -> Gates:
        """softmax(alpha) per choice, with gradient."""
        return self._split(self.padded_logits().softmax(1))

    def gates(
        self,
        temperature: float,
        *,
        hard: bool = False,
        generator: torch.Generator | None = None,
    ) -> Gates:
        """Gumbel-softmax gates; hard ones are `HardGates`, for which the host waits once.

        Args:
            temperature: positive; gates tend to one-hot as it falls.
            hard: straight-through: exactly one-hot forward, the soft gates' gradient backward.
            generator: a CPU generator; the draw does not depend on the device.

        Raises:
            ValueError: if the temperature is not positive.
        """
        logits = self.padded_logits()
        gates = gumbel_softmax(logits, temperature, hard=hard, generator=generator)
        if not hard:
            return self._split(gates)
        chosen = self.space.decode(gates.detach().argmax(1).tolist())
        return HardGates(self._split(gates), self.space, chosen)

    def log_probability(self, architecture: Architecture) -> Float[Tensor, ""]:
        """Log of the probability of an architecture under softmax(alpha), with gradient.

        Raises:
            ValueError: if the architecture is not in the space.
        """
        indices = torch.tensor(self.space.encode(architecture), device=self.logits.device)
        log_p = self.padded_logits().log_softmax(1)
        return log_p.gather(1, indices.view(-1, 1)).sum()

    def log_probabilities(self) -> Gates:
        """Log softmax(alpha) per choice in float64, without gradient."""
        rows = self.padded_logits().detach().cpu().double().log_softmax(1)
        # The constant gate of a decision without a choice is 1; its log is 0.
        return tuple(
            BlockGates(*(v.log() if v.numel() == 1 else v for v in block))
            for block in self._split(rows)
        )

    def argmax(self) -> Architecture:
        """The most probable architecture, whatever it costs (see `derive` for a budget)."""
        indices = self.padded_logits().argmax(1).tolist()
        return self.space.decode(indices)

    def entropies(self) -> dict[str, float]:
        """Entropy of each choice in nats, by the choice's name."""
        values = self._entropy_per_choice().tolist()
        names = [choice.name for choice in self.space.choices]
        return dict(zip(names, values, strict=True))

    def entropy(self) -> Float[Tensor, ""]:
        """Sum of the choices' entropies in nats, with gradient; sum(log n) for zero alpha."""
        return self._entropy_per_choice().sum()

    def _entropy_per_choice(self) -> Float[Tensor, " choices"]:
        log_p = self.padded_logits().log_softmax(1)
        # Padding has p = 0 and log p = -inf, whose product would be NaN.
        return -(log_p.exp() * torch.where(self.is_option, log_p, 0.0)).sum(1)

    def _split(self, rows: Float[Tensor, "choices options"]) -> Gates:
        given = {
            (choice.block, choice.field): rows[row, : len(choice.options)]
            for row, choice in enumerate(self.space.choices)
        }
        one = rows.new_ones(1)
        return tuple(
            BlockGates(*(given.get((number, field), one) for field in CHOICE_FIELDS))
            for number in range(1, len(self.space.blocks) + 1)
        )


def largest_gates(space: SearchSpace, gates: Gates) -> Architecture:
    """The architecture of each choice's largest gate: the one that hard gates run."""
    if isinstance(gates, HardGates):
        return gates.architecture
    largest = [getattr(gates[choice.block - 1], choice.field).argmax() for choice in space.choices]
    # One transfer for all.
    return space.decode(torch.stack(largest).tolist())


def one_hot_gates(
    space: SearchSpace,
    architecture: Architecture,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Gates:
    """Exact one-hot gates of an architecture.

    Raises:
        ValueError: if the architecture is not in the space.
    """
    space.check(architecture)
    rows = []
    for spec, block in zip(space.blocks, architecture.blocks, strict=True):
        vectors = []
        for field in CHOICE_FIELDS:
            options = spec.options(field)
            gate = torch.zeros(len(options), dtype=dtype, device=device)
            gate[options.index(getattr(block, field))] = 1
            vectors.append(gate)
        rows.append(BlockGates(*vectors))
    return tuple(rows)
