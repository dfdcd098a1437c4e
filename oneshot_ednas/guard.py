"""Steps whose loss or gradient is not finite change nothing, are counted, and end the run if many.

Whether a step is finite stays on the device: the fused optimizers of torch leave a step out when
their `found_inf` says so, as for gradient scaling. So the guard waits for no device but Apple's;
the host looks when it writes the log anyway. Of a network that keeps running BN statistics a
skipped step may have spoilt those: they are computed anew at the end of a training.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

Losses = Mapping[str, Tensor]
"""Loss of each task, a number."""
Network = object | Callable[[], object]
"""What names a network in messages, or gives that; called only when something is wrong."""


@dataclass(frozen=True)
class _Watched:
    step: int
    what: str
    names: list[str]
    """Of the losses; the gradient comes last and has none."""
    networks: list[Network]
    """Of each loss."""
    is_finite: Tensor
    """Of each loss and of the gradient."""


class StepGuard:
    """Takes the optimizer steps of one stage."""

    def __init__(self, stage: str, *, max_skipped: int) -> None:
        """Nothing was skipped.

        Args:
            stage: for messages.
            max_skipped: steps of the stage that may be skipped.
        """
        self.stage, self.max_skipped = stage, max_skipped
        self.num_skipped = 0
        """Up to the last `read`; belongs into the checkpoint."""
        self._watched: list[_Watched] = []

    def take(
        self,
        optimizer: Optimizer,
        norm: Tensor,
        losses: Sequence[Losses],
        *,
        step: int,
        networks: Sequence[Network],
        what: str = "",
    ) -> Bool[Tensor, ""]:
        """Step an optimizer, unless a loss or the gradient is not finite.

        Args:
            optimizer: of `fused_adam` or `fused_sgd`.
            norm: norm of the whole gradient.
            losses: of each network that the step trained.
            step: for messages.
            networks: as many as there are losses.
            what: kind of the step, for messages.

        Returns:
            On the device, whether the step was left out.
        """
        values = [value for one in losses for value in one.values()]
        numbers = torch.stack([value.detach().float() for value in (*values, norm)])
        is_finite = numbers.isfinite()
        is_skipped = ~is_finite.all()
        _fill_momentum(optimizer)
        # The optimizer reads it, but declares it for GradScaler alone.
        optimizer.found_inf = is_skipped.float()  # type: ignore[attr-defined]
        # The kernels of Apple's GPUs have not read it in all versions of torch.
        if is_skipped.device.type != "mps" or not bool(is_skipped):
            optimizer.step()
        pairs = zip(losses, networks, strict=True)
        named = [(name, network) for one, network in pairs for name in one]
        self._watched.append(
            _Watched(step, what, [n for n, _ in named], [n for _, n in named], is_finite)
        )
        return is_skipped

    def read(self) -> None:
        """Count what was skipped since the last time; waits for the device.

        Raises:
            RuntimeError: if more steps were skipped than may be; names step, task and architecture.
        """
        watched, self._watched = self._watched, []
        if not watched:
            return
        flags = iter(torch.cat([one.is_finite for one in watched]).tolist())
        skipped = set[int]()
        for one in watched:
            found = [next(flags) for _ in range(len(one.names) + 1)]
            if all(found):
                continue
            if one.step not in skipped:
                self.num_skipped += 1
                skipped.add(one.step)
            if self.num_skipped > self.max_skipped:
                raise RuntimeError(self._message(one, found))

    def _message(self, one: _Watched, is_finite: list[bool]) -> str:
        bad = [i for i, is_good in enumerate(is_finite[:-1]) if not is_good]
        part = f"the loss of {', '.join(dict.fromkeys(one.names[i] for i in bad))}"
        network = one.networks[bad[0] if bad else 0]
        named = network() if callable(network) else network
        count = self.num_skipped
        counted = f"; {count} steps were skipped, max_skipped is {self.max_skipped}"
        return (
            f"{self.stage} step {one.step}{one.what}: {part if bad else 'the gradient'} is not "
            f"finite, architecture {named}{counted if count > 1 else ''}; lower the learning rate "
            f"or check the labels"
        )


def fused_adam(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    learning_rate: float,
    weight_decay: float,
) -> Adam:
    """Adam in one kernel per device, which a `StepGuard` can keep from stepping."""
    optimizer = Adam(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    optimizer.register_load_state_dict_post_hook(_refit)
    return optimizer


def fused_sgd(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
) -> SGD:
    """SGD in one kernel per device, which a `StepGuard` can keep from stepping."""
    optimizer = SGD(
        parameters, lr=learning_rate, weight_decay=weight_decay, momentum=momentum, fused=True
    )
    optimizer.register_load_state_dict_post_hook(_refit)
    return optimizer


def _refit(optimizer: Optimizer) -> None:
    """Make a state fit the fused step; checkpoints of older versions hold that of another one."""
    for group in optimizer.param_groups:
        group |= {"fused": True, "foreach": None}
        for parameter in group["params"]:
            if "step" in optimizer.state.get(parameter, {}):
                state = optimizer.state[parameter]
                state["step"] = state["step"].to(parameter.device)


def _fill_momentum(optimizer: Optimizer) -> None:
    """Begin SGD's momentum with zeros, which give the same first step.

    Without them fused SGD fails where some weights had their first step and others had not, and
    keeps memory as it found it where the first step is left out.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] > 0 else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def finite_or(values: Tensor, others: Tensor) -> Tensor:
    """Each number, or where it is not finite the other one."""
    return torch.where(values.isfinite(), values, others)
