"""Branched networks: the supergraph that is searched, and the network of one branching.

Both are one class: a list of candidates per layer, and a decoder per task. In the supergraph there
are as many candidates as tasks, and gates or sampled routes say which ones a task takes; in the
network of a branching there is one candidate per group, and the routes are fixed.

Source: BMTAS (Bruggemann et al., BMVC 2020), section 3.1. Candidates that are elastic blocks, so
that blocks and branching are searched together, are this project's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.models.encoder import (
    IMAGES,
    Block,
    Encoder,
    ednas_encoder,
    output_norms,
)
from oneshot_ednas.models.layers import ElasticBatchNorm
from oneshot_ednas.models.network import fast_layout, leading
from oneshot_ednas.relaxation import BlockGates, Gates
from oneshot_ednas.sharing.branching import Branching


@dataclass(frozen=True)
class Routes:
    """What to run of a supergraph: one candidate per task and layer."""

    candidates: tuple[tuple[int, ...], ...]
    """`[tasks][layers]`"""
    options: tuple[Architecture, ...] | None = None
    """Of elastic candidates: the architecture whose blocks candidate `j` of every layer has."""

    def branching(self, tasks: Sequence[str]) -> Branching:
        """Who shares what along these routes."""
        paths = None
        if self.options is not None:
            paths = tuple(self._path(route, self.options) for route in self.candidates)
        return Branching.from_routes(tasks, self.candidates, paths)

    @staticmethod
    def _path(route: Sequence[int], options: Sequence[Architecture]) -> Architecture:
        first = options[0]
        blocks = tuple(
            options[route[index + 1]].blocks[index] for index in range(len(first.blocks))
        )
        return Architecture(blocks, space=first.space)


@dataclass(frozen=True)
class RouteGates:
    """Gates of a supergraph, or probabilities."""

    routes: Float[Tensor, "tasks layers candidates"]
    options: tuple[Gates, ...] | None = None
    """Of elastic candidates: the gates of candidate `j` of every layer."""

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        options = () if self.options is None else self.options
        return [self.routes, *(v for gates in options for block in gates for v in block)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "RouteGates":
        """The same gates with other numbers, given as `tensors` orders them."""
        rest = iter(tensors)
        routes = next(rest)
        if self.options is None:
            return RouteGates(routes)
        options = tuple(
            tuple(BlockGates(*(next(rest) for _ in block)) for block in gates)
            for gates in self.options
        )
        return RouteGates(routes, options)


class BranchedNetwork(nn.Module):
    """Candidates per layer and a decoder per task.

    Made by `supergraph` and `branched_network`.
    """

    def __init__(
        self,
        encoder: Encoder,
        layers: Sequence[Sequence[nn.Module]],
        out_channels: Mapping[str, int],
        routes: Routes | None,
    ) -> None:
        super().__init__()
        for layer, candidates in zip(encoder.layers, layers, strict=True):
            if len({id(candidate) for candidate in candidates}) < len(candidates):
                raise ValueError(
                    f"{encoder.name}: layer {layer.name}: build gives the same module each time; "
                    f"make a new one in it"
                )
        self.encoder, self.routes, self.tasks = encoder, routes, tuple(out_channels)
        self.layers = nn.ModuleList(nn.ModuleList(candidates) for candidates in layers)
        self.decoders = nn.ModuleDict(
            {task: encoder.build_decoder(count) for task, count in out_channels.items()}
        )

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        run: Routes | RouteGates | None = None,
        tasks: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Raw maps per task.

        Args:
            images: normalised images.
            run: what to run of a supergraph: routes use one candidate per task and layer and
                compute what tasks share once; gates mix all candidates. The network of a branching
                needs none.
            tasks: the tasks to run; all where not given.

        Raises:
            ValueError: if a supergraph is given neither routes nor gates.
        """
        run = self.routes if run is None else run
        if run is None:
            raise ValueError("a supergraph needs routes or gates: network(images, routes)")
        images = fast_layout(images)
        wanted = self.tasks if tasks is None else tasks
        shared: dict[tuple[int, ...], Tensor] = {}
        outputs = {}
        for task in wanted:
            number = self.tasks.index(task)
            if isinstance(run, Routes):
                features = self._routed(images, run, number, shared)
            else:
                features = self._mixed(images, run, number)
            reads = [features[index] for index in self.encoder.decoder_reads]
            outputs[task] = self.decoders[task](*reads)
        return outputs

    def _routed(
        self, images: Tensor, run: Routes, task: int, shared: dict[tuple[int, ...], Tensor]
    ) -> list[Tensor]:
        """Outputs of the layers on a task's way; what another task had on the way is not redone."""
        route, outputs = run.candidates[task], list[Tensor]()
        for index, layer in enumerate(self.encoder.layers):
            way = route[: index + 1]
            if way not in shared:
                reads = [images if i == IMAGES else outputs[i] for i in layer.reads]
                module = self.candidates(index)[route[index]]
                if run.options is not None and isinstance(module, Block):
                    option = run.options[route[index]].blocks[index - 1]
                    shared[way] = module(*reads, option)
                else:
                    shared[way] = module(*reads)
            outputs.append(shared[way])
        return outputs

    def _mixed(self, images: Tensor, run: RouteGates, task: int) -> list[Tensor]:
        """Outputs of the layers for a task, each a mixture of all candidates (BMTAS eq. 2)."""
        outputs, in_gate = list[Tensor](), images.new_ones(1)
        for index, layer in enumerate(self.encoder.layers):
            reads = [images if i == IMAGES else outputs[i] for i in layer.reads]
            gates, mixed, widths = run.routes[task, index], list[Tensor](), list[Tensor]()
            for number, module in enumerate(self.candidates(index)):
                if run.options is not None and isinstance(module, Block):
                    option = run.options[number][index - 1]
                    widths.append(gates[number] * option.filters)
                    mixed.append(gates[number] * module(*reads, option, in_gate))
                else:
                    mixed.append(gates[number] * module(*reads))
            outputs.append(sum(mixed[1:], start=mixed[0]))
            if widths:
                in_gate = torch.stack(widths).sum(0)
        return outputs

    def candidates(self, layer: int) -> nn.ModuleList:
        """The candidates of a layer; in the network of a branching, one per group."""
        return cast(nn.ModuleList, self.layers[layer])

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def num_encoder_parameters(self) -> int:
        """Trainable numbers of the layers."""
        return sum(p.numel() for p in self.layers.parameters() if p.requires_grad)


def supergraph(encoder: Encoder, out_channels: Mapping[str, int]) -> BranchedNetwork:
    """As many candidates per layer as there are tasks, none of which shares parameters.

    BN uses batch statistics and keeps none: they would mix branchings. The last BN of a candidate
    has no scale and shift, so that candidates come in at one scale (BMTAS appendix A).
    """
    layers = [[layer.build() for _ in out_channels] for layer in encoder.layers]
    network = BranchedNetwork(encoder, layers, out_channels, None)
    for module in network.modules():
        if isinstance(module, ElasticBatchNorm | nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    for candidates in layers:
        for candidate in candidates:
            for norm in output_norms(candidate):
                for parameter in norm.parameters():
                    parameter.requires_grad_(False)
    return network


def branched_network(
    encoder: Encoder, branching: Branching, out_channels: Mapping[str, int]
) -> BranchedNetwork:
    """The network of one branching: a layer per group.

    Args:
        encoder: the backbone; of a space with choices, the branching has the paths.
        branching: who shares what.
        out_channels: output channels per task.

    Raises:
        ValueError: if the branching is of other tasks or another number of layers.
    """
    check_branching(encoder, branching, tuple(out_channels))
    per_task = [_encoder_of(encoder, branching, task) for task in range(len(branching.tasks))]
    layers = [
        [
            per_task[branching.first_task(layer, group)].layers[layer].build()
            for group in range(count)
        ]
        for layer, count in enumerate(branching.num_groups)
    ]
    routes = Routes(tuple(zip(*branching.groupings, strict=True)))
    return BranchedNetwork(per_task[0], layers, out_channels, routes)


def check_branching(encoder: Encoder, branching: Branching, tasks: Sequence[str]) -> None:
    """Refuse a branching of something else.

    Raises:
        ValueError: naming what differs.
    """
    if branching.tasks != tuple(tasks):
        raise ValueError(
            f"expected a branching of {', '.join(tasks)}, got one of {', '.join(branching.tasks)}"
        )
    if branching.num_layers != len(encoder.layers):
        raise ValueError(
            f"{encoder.name} has {len(encoder.layers)} layers, the branching {branching.num_layers}"
        )
    if branching.paths is not None:
        if encoder.space is None:
            raise ValueError(f"{encoder.name} has no choice of blocks, the branching has paths")
        for path in branching.paths:
            encoder.space.check(path)
    elif encoder.space is not None and not encoder.space.is_fixed:
        raise ValueError(
            f"{encoder.name} has choices; the branching needs an architecture per task"
        )


def _encoder_of(encoder: Encoder, branching: Branching, task: int) -> Encoder:
    if encoder.space is None or branching.paths is None:
        return encoder
    return ednas_encoder(encoder.space.fix(branching.paths[task]))


@torch.no_grad()
def inherit_branched(
    network: BranchedNetwork,
    supernet: BranchedNetwork,
    candidates: tuple[tuple[int, ...], ...],
    branching: Branching,
) -> None:
    """Copy what routes take of a supergraph into the network of their branching.

    Args:
        network: the network of the branching.
        supernet: the supergraph.
        candidates: the routes, `[tasks][layers]`.
        branching: that of the routes, with the blocks on each path where they vary.

    Raises:
        ValueError: if the network is of another branching.
    """
    labels = tuple(zip(*branching.groupings, strict=True))
    if network.routes is None or network.routes.candidates != labels:
        raise ValueError(
            f"expected the network of {branching}; make it by branched_network of these routes"
        )
    for layer, count in enumerate(branching.num_groups):
        for group in range(count):
            task = branching.first_task(layer, group)
            source = supernet.candidates(layer)[candidates[task][layer]]
            _inherit(network.candidates(layer)[group], source, branching, layer, task)
    for name, decoder in supernet.decoders.items():
        network.decoders[name].load_state_dict(decoder.state_dict())


def _inherit(
    target: nn.Module, source: nn.Module, branching: Branching, layer: int, task: int
) -> None:
    held = source.state_dict()
    if isinstance(source, Block) and branching.paths is not None:
        blocks = branching.paths[task].blocks
        width = source.elastic.in_filters[0] if layer == 1 else blocks[layer - 2].filters
        own = source.elastic.own_weights(width, blocks[layer - 1])
        held |= {f"elastic.{name}": tensor for name, tensor in own.items()}
    for name, tensor in target.state_dict().items():
        tensor.copy_(leading(held[name], tensor))


def learning_rate_scales(branching: Branching) -> dict[str, float]:
    """By a layer's name, 1 / the number of tasks that share it (BMTAS appendix A)."""
    return {
        f"layers.{layer}.{group}": 1 / branching.sharing_tasks(layer, group)
        for layer, count in enumerate(branching.num_groups)
        for group in range(count)
    }
