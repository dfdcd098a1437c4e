"""The ratios that have bounds: what the supernet's two ways to run cost beside plain networks."""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from oneshot_ednas.derive import derive_architectures, pareto_front
from oneshot_ednas.latency.operations import block_sizes
from oneshot_ednas.models.blocks import ElasticBlock
from oneshot_ednas.performance.mixture import PathMixture
from oneshot_ednas.performance.plan import Plan, Row
from oneshot_ednas.performance.timing import (
    MIB,
    Spread,
    Work,
    activation_bytes,
    clock_of,
    interleaved,
    peak_device_bytes,
    ratio,
)
from oneshot_ednas.performance.workload import Workload
from oneshot_ednas.relaxation import ArchitectureParameters, HardGates
from oneshot_ednas.search import OneShotSearch
from oneshot_ednas.space import CHOICE_FIELDS
from oneshot_ednas.training import numpy_generator, torch_generator

MAX_STEP_RATIO = 1.10
MAX_STEP_MEMORY_RATIO = 1.15
MIN_MIXTURE_RATIO = 8.0
MAX_EXPECTED_LATENCY_PERCENT = 1.0
MAX_LATENCIES_MS = 50.0
MAX_DERIVATION_S = 2.0
ALPHA_SCALE = 1.0
"""Standard deviation of the logits that stand for a search's alpha."""


def random_alpha(workload: Workload) -> ArchitectureParameters:
    """Architecture parameters as after some search, always the same."""
    alpha = ArchitectureParameters(workload.space).to(workload.device)
    noise = torch.randn(alpha.logits.shape, generator=torch_generator(0, "bench", "alpha"))
    alpha.logits.data.copy_(ALPHA_SCALE * noise)
    return alpha


# A sliced step ------------------------------------------------------------------------------


def supernet_step(plan: Plan) -> list[Row]:
    """A sliced step of the supernet against the step of the stand-alone network.

    Both are the whole step of search or retraining: batch, forward, losses, backward, clip,
    optimizer.
    """
    workload, device = plan.steps.warm_up_only(), plan.device
    search = workload.search()
    times, memory, each, peaks = [], [], [], []
    for step in range(plan.num_architectures):
        (architecture,) = search.sample_paths(step, uniform=True)
        training = workload.training(architecture)
        works = {
            "supernet": partial(search.take_step, step),
            "alone": partial(training.take_step, step),
        }
        seconds = interleaved(works, repeats=plan.repeats, device=device)
        held = {
            "supernet": activation_bytes(works["supernet"], search.supernet),
            "alone": activation_bytes(works["alone"], training.network),
        }
        times.append(ratio(seconds["supernet"], seconds["alone"]).median)
        memory.append(held["supernet"] / held["alone"])
        peaks.append(peak_device_bytes(works["supernet"], device))
        each.append(
            {
                "architecture": str(architecture),
                "seconds": {name: Spread.of(values).median for name, values in seconds.items()},
                "time_ratio": times[-1],
                "activation_mib": {name: count / MIB for name, count in held.items()},
                "peak_device_mib": None if peaks[-1] is None else peaks[-1] / MIB,
            }
        )
    what = f"sliced supernet step over the stand-alone network's, {workload.size}"
    return [
        Row(
            name="supernet_step.time",
            what=f"{what}: time, {len(times)} random architectures",
            measured=Spread.of(times),
            unit="x",
            bound=MAX_STEP_RATIO,
            details={"architectures": each},
        ),
        Row(
            name="supernet_step.memory",
            what=f"{what}: activations held for the backward pass",
            measured=Spread.of(memory),
            unit="x",
            bound=MAX_STEP_MEMORY_RATIO,
        ),
    ]


# A relaxed step -----------------------------------------------------------------------------


class _RelaxedWork:
    """Forward and backward of one block for its gates and its input, as in an alpha step."""

    def __init__(
        self,
        module: ElasticBlock | PathMixture,
        x: Tensor,
        alpha: ArchitectureParameters,
        index: int,
    ) -> None:
        self.module, self.x, self.alpha, self.index = module, x, alpha, index
        module.requires_grad_(False)

    def __call__(self) -> None:
        gates = self.alpha.gates(1.0, hard=True, generator=torch_generator(0, "bench", "gates"))
        first = self.x.new_ones(1)
        in_gate = gates[self.index - 1].filters if self.index else first
        # As the supernet's backbone does; the mixture knows nothing of idle ops.
        assert isinstance(gates, HardGates)
        is_elastic = isinstance(self.module, ElasticBlock)
        idle = (gates.idle_ops[self.index],) if is_elastic else ()
        y = self.module(self.x, gates[self.index], in_gate, *idle)
        # No gradient of the weights, and of the input only where a block before needs it.
        wanted = [self.alpha.logits, self.x] if self.index else [self.alpha.logits]
        torch.autograd.grad(y.square().sum(), wanted)


def relaxed_step(plan: Plan) -> list[Row]:
    """A relaxed block against the mixture of its options as modules of their own."""
    workload, device = plan.blocks, plan.device
    space, batch_size = workload.space, workload.config.search.batch_size
    alpha = random_alpha(workload)
    each, held = [], {"relaxed": 0, "mixture": 0}
    totals = {name: np.zeros(plan.repeats) for name in held}
    for index, (spec, (height, width)) in enumerate(
        zip(space.blocks, block_sizes(space, workload.image_size), strict=True)
    ):
        in_filters = space.in_filters(index)
        x = torch.randn(
            (batch_size, max(in_filters), height, width),
            generator=torch_generator(0, "bench", "block", index),
        )
        x = x.to(device).contiguous(memory_format=torch.channels_last).requires_grad_(index > 0)
        modules: dict[str, ElasticBlock | PathMixture] = {
            "relaxed": ElasticBlock(spec, in_filters, momentum=0.0).to(device),
            "mixture": PathMixture(spec, in_filters).to(device),
        }
        works = {name: _RelaxedWork(module, x, alpha, index) for name, module in modules.items()}
        seconds = interleaved(works, repeats=plan.repeats, device=device)
        memory = {
            name: activation_bytes(work, modules[name], alpha) for name, work in works.items()
        }
        for name in held:
            totals[name] += seconds[name]
            held[name] += memory[name]
        each.append(
            {
                "block": index + 1,
                "paths": math.prod(len(spec.options(name)) for name in CHOICE_FIELDS),
                "in_size": [height, width],
                "seconds": {name: Spread.of(values).median for name, values in seconds.items()},
                "time_ratio": ratio(seconds["mixture"], seconds["relaxed"]).median,
                "activation_mib": {name: count / MIB for name, count in memory.items()},
                "memory_ratio": memory["mixture"] / memory["relaxed"],
            }
        )
    what = (
        f"mixture of all options as modules of their own over relaxed blocks, forward and "
        f"backward for gates and input, sum over the blocks, {workload.size}"
    )
    return [
        Row(
            name="relaxed_step.time",
            what=f"{what}: time",
            measured=ratio(list(totals["mixture"]), list(totals["relaxed"])),
            unit="x",
            bound=MIN_MIXTURE_RATIO,
            is_least=True,
            details={"blocks": each},
        ),
        Row(
            name="relaxed_step.memory",
            what=f"{what}: activations held for the backward pass",
            measured=Spread.exactly(held["mixture"] / held["relaxed"]),
            unit="x",
            bound=MIN_MIXTURE_RATIO,
            is_least=True,
        ),
    ]


# Latency ------------------------------------------------------------------------------------


class _ExpectedLatency:
    """Expected latency and its gradient, as in an alpha step."""

    def __init__(self, search: OneShotSearch) -> None:
        self.search = search

    def __call__(self) -> None:
        torch.autograd.grad(self.search.expected_latency(), self.search.alpha.logits)


def expected_latency_share(plan: Plan) -> list[Row]:
    """Expected latency, forward and backward, as a share of an alpha step."""
    search = plan.steps.search()
    works: dict[str, Work] = {
        "latency": _ExpectedLatency(search),
        "alpha": partial(search._alpha_step, 0),
    }
    seconds = interleaved(works, repeats=plan.repeats, device=plan.device)
    share = ratio([100 * value for value in seconds["latency"]], seconds["alpha"])
    return [
        Row(
            name="expected_latency",
            what=f"expected latency, forward and backward, of an alpha step, {plan.steps.size}",
            measured=share,
            unit="%",
            bound=MAX_EXPECTED_LATENCY_PERCENT,
            details={name: Spread.of(values).median for name, values in seconds.items()},
        )
    ]


def latencies(plan: Plan) -> list[Row]:
    """Latencies of many architectures in one call."""
    workload = plan.steps
    costs = workload.table.costs(workload.space, workload.out_channels)
    generator = numpy_generator(0, "bench", "architectures")
    drawn = [workload.space.sample(generator) for _ in range(plan.num_latencies)]
    seconds = interleaved(
        {"latencies": partial(costs.latencies_ms, drawn)},
        repeats=max(plan.repeats, 5),
        device=plan.device,
    )
    return [
        Row(
            name="latencies",
            what=f"latencies of {len(drawn):,} architectures of {workload.space.name} in one call",
            measured=Spread.of([1e3 * value for value in seconds["latencies"]]),
            unit="ms",
            bound=MAX_LATENCIES_MS,
        )
    ]


def derivation(plan: Plan) -> list[Row]:
    """The k best architectures inside a budget, and the whole Pareto front."""
    workload = plan.steps
    target_ms = workload.target_ms
    clock = clock_of(plan.device)
    alpha, taken, parts = random_alpha(workload), list[float](), list[dict[str, float]]()
    for _ in range(max(plan.repeats, 3)):
        began = clock()
        derive_architectures(
            alpha,
            workload.table,
            workload.space,
            target_ms=target_ms,
            k=plan.num_candidates,
            out_channels=workload.out_channels,
        )
        between = clock()
        front = pareto_front(
            alpha, workload.table, workload.space, out_channels=workload.out_channels
        )
        taken.append(clock() - began)
        parts.append({"k_best": between - began, "front": taken[-1] - (between - began)})
    return [
        Row(
            name="derivation",
            what=f"exact derivation, {workload.space.name}: the {plan.num_candidates} best inside "
            f"{target_ms:.3g} ms and the whole Pareto front of {len(front)}",
            measured=Spread.of(taken),
            unit="s",
            bound=MAX_DERIVATION_S,
            details={"repeats": parts},
        )
    ]
