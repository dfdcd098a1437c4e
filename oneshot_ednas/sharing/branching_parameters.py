"""Alpha of a branching search: each task's candidate per layer, and each candidate's blocks."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.models.encoder import Encoder
from oneshot_ednas.relaxation import ArchitectureParameters, gumbel_softmax
from oneshot_ednas.sharing.branched import RouteGates, Routes


class BranchingParameters(nn.Module):
    """Alpha: logits of each task's candidate per layer, and of each candidate's blocks."""

    def __init__(self, encoder: Encoder, num_tasks: int) -> None:
        super().__init__()
        self.space = encoder.space
        self.routes = nn.Parameter(torch.zeros(num_tasks, len(encoder.layers), num_tasks))
        has_choices = encoder.space is not None and not encoder.space.is_fixed
        self.options = nn.ModuleList(
            ArchitectureParameters(encoder.space)  # type: ignore[arg-type]
            for _ in range(num_tasks if has_choices else 0)
        )

    @property
    def candidates(self) -> list[ArchitectureParameters]:
        """Parameters of the blocks of candidate `j` of every layer; none where blocks are fixed."""
        return [one for one in self.options if isinstance(one, ArchitectureParameters)]

    def probabilities(self) -> RouteGates:
        """Softmax(alpha), with gradient."""
        options = tuple(one.probabilities() for one in self.candidates)
        return RouteGates(self.routes.softmax(-1), options or None)

    def gates(
        self, temperature: float, *, hard: bool = False, generator: torch.Generator | None = None
    ) -> RouteGates:
        """Gumbel-softmax gates (BMTAS eq. 2); arguments as of `relaxation.gumbel_softmax`."""
        routes = gumbel_softmax(self.routes, temperature, hard=hard, generator=generator)
        options = tuple(
            one.gates(temperature, hard=hard, generator=generator) for one in self.candidates
        )
        return RouteGates(routes, options or None)

    def argmax(self) -> Routes:
        """The most probable candidates, whatever they cost."""
        rows = self.routes.detach().argmax(-1).tolist()
        options = tuple(one.argmax() for one in self.candidates)
        return Routes(tuple(map(tuple, rows)), options or None)

    def sample(self, generator: np.random.Generator, *, exploration: float) -> Routes:
        """Candidates and blocks drawn by alpha, a share of the draws uniform."""
        rows = self.routes.detach().cpu().double().softmax(-1).numpy()
        num_tasks, num_layers, count = rows.shape
        rows = (1 - exploration) * rows + exploration / count
        # Inverse transform: one draw per task and layer.
        draws = generator.random((num_tasks, num_layers, 1))
        routes = (rows.cumsum(-1)[..., :-1] < draws).sum(-1).tolist()
        options = tuple(self._drawn(one, generator, exploration) for one in self.candidates)
        return Routes(tuple(map(tuple, routes)), options or None)

    @staticmethod
    def _drawn(
        one: ArchitectureParameters, generator: np.random.Generator, exploration: float
    ) -> Architecture:
        rows = one.padded_logits().detach().cpu().double().softmax(1).numpy()
        indices = []
        for row, choice in zip(rows, one.space.choices, strict=True):
            count = len(choice.options)
            weights = (1 - exploration) * row[:count] + exploration / count
            indices.append(int(generator.choice(count, p=weights / weights.sum())))
        return one.space.decode(indices)

    def entropy(self) -> Tensor:
        """Sum of the entropies of all choices in nats, with gradient."""
        log_p = self.routes.log_softmax(-1)
        total = -(log_p.exp() * log_p).sum()
        return sum((one.entropy() for one in self.candidates), start=total)

    @property
    def max_entropy(self) -> float:
        """Of uniform probabilities."""
        num_tasks, num_layers, count = self.routes.shape
        blocks = sum(
            math.log(len(choice.options)) for one in self.candidates for choice in one.space.choices
        )
        return num_tasks * num_layers * math.log(count) + blocks
