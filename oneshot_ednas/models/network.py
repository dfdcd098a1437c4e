"""The only builder: a supernet from a space, a derived network from a fixed space."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.models.backbone import Backbone
from oneshot_ednas.models.bifpn import BiFPN
from oneshot_ednas.models.blocks import SharingConfig
from oneshot_ednas.models.heads import Head
from oneshot_ednas.models.layers import BN_MOMENTUM, ElasticBatchNorm
from oneshot_ednas.relaxation import Gates
from oneshot_ednas.space import SearchSpace


class Network(nn.Module):
    """Backbone, BiFPN and one head per task. Made by `build_network`."""

    def __init__(
        self,
        space: SearchSpace,
        out_channels: Mapping[str, int],
        sharing: SharingConfig = SharingConfig(),
    ) -> None:
        super().__init__()
        self.space = space
        self.out_channels = dict(out_channels)
        # Running statistics of a supernet would be shared between architectures.
        momentum = BN_MOMENTUM if space.is_fixed else 0.0
        self.backbone = Backbone(
            space,
            momentum=momentum,
            # One architecture has nothing to share, and its network is always the same.
            sharing=SharingConfig() if space.is_fixed else sharing,
        )
        self.bifpn = BiFPN(space, momentum=momentum)
        self.heads = nn.ModuleDict(
            {task: Head(space, count, momentum=momentum) for task, count in out_channels.items()}
        )

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        run: Architecture | Gates | None = None,
    ) -> dict[str, Tensor]:
        """Raw maps per task, at stride `space.output_stride`.

        Args:
            images: normalised images.
            run: what to run of a supernet: an `Architecture` uses only its slices (the cost of
                the stand-alone network), gates mix all options. A derived network needs none.

        Raises:
            ValueError: if a supernet is given neither, or the architecture is not in the space.
        """
        if run is None:
            if not self.space.is_fixed:
                raise ValueError(
                    "a supernet needs an architecture or gates: network(images, architecture)"
                )
            run = self.space.base_architecture
        if isinstance(run, Architecture):
            self.space.check(run)
        elif len(run) != len(self.space.blocks):
            raise ValueError(f"expected gates for {len(self.space.blocks)} blocks, got {len(run)}")
        # Thin layers are memory-bound: channels-last runs them 1.4 times faster on a CPU, and it is
        # what tensor cores want.
        images = images.contiguous(memory_format=torch.channels_last)
        fused = self.bifpn(self.backbone(images, run))
        return {task: head(fused) for task, head in self.heads.items()}

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())


def build_network(
    space: SearchSpace,
    out_channels: Mapping[str, int],
    *,
    sharing: SharingConfig = SharingConfig(),
) -> Network:
    """A supernet, or, from a fixed space, the network of its one architecture.

    Args:
        space: the search space; `space.fix(architecture)` for a derived network.
        out_channels: output channels per task, for example `{"segmentation": 19, "depth": 1}`.
        sharing: what the options of a supernet's block share; without effect on a derived network.

    Raises:
        ValueError: if there are no tasks, or a task has no channels.
    """
    if not out_channels:
        raise ValueError("out_channels: expected at least one task")
    for task, count in out_channels.items():
        if count < 1:
            raise ValueError(f"out_channels: task {task} needs at least 1 channel, got {count}")
    return Network(space, out_channels, sharing)


@torch.no_grad()
def inherit_weights(network: Network, supernet: Network, architecture: Architecture) -> None:
    """Copy an architecture's slices of the supernet's weights into its derived network.

    Every tensor of the derived network is the leading channels and, for kernels, the centre of
    the supernet's tensor of the same name, or of what a block's `own_weights` puts in its place.

    Raises:
        ValueError: if the network is not the one of this architecture, or has other tasks.
    """
    if not network.space.is_fixed or network.space.base_architecture != architecture:
        raise ValueError("network must be built from space.fix(architecture)")
    if network.out_channels != supernet.out_channels:
        raise ValueError(
            f"expected a network with tasks {supernet.out_channels}, got {network.out_channels}"
        )
    supernet.space.check(architecture)
    own = supernet.backbone.own_weights(architecture)
    source = supernet.state_dict() | {f"backbone.{name}": tensor for name, tensor in own.items()}
    for name, target in network.state_dict().items():
        target.copy_(_leading(source[name], target))


def _leading(source: Tensor, target: Tensor) -> Tensor:
    index = [slice(size) for size in target.shape]
    for axis in range(2, target.dim()):
        margin = (source.shape[axis] - target.shape[axis]) // 2
        index[axis] = slice(margin, margin + target.shape[axis])
    return source[tuple(index)]


@torch.no_grad()
def recalibrate_bn(
    network: Network,
    batches: Iterable[Tensor],
    architecture: Architecture | None = None,
) -> None:
    """Reset the BN statistics and recompute them as averages over batches.

    Args:
        network: a derived network, or a supernet together with an architecture; a supernet's
            statistics then hold for that architecture only.
        batches: images `[batch, 3, height, width]`, on the network's device.
        architecture: what to run of a supernet.

    Raises:
        ValueError: if there is no batch.
    """
    if architecture is None and not network.space.is_fixed:
        raise ValueError("a supernet's BN is recalibrated for one architecture: name it")
    layers = [layer for layer in network.modules() if isinstance(layer, ElasticBatchNorm)]
    count = 0
    with _training_with_own_momentum(network, layers):
        for count, images in enumerate(batches, start=1):
            for layer in layers:
                if count == 1:
                    layer.running_mean.zero_()
                    layer.running_var.fill_(1)
                layer.momentum = 1 / count
            network(images, architecture)
    if count == 0:
        raise ValueError("recalibrating BN needs at least one batch of images")


@contextmanager
def _training_with_own_momentum(network: Network, layers: list[ElasticBatchNorm]) -> Iterator[None]:
    """Training mode for a while; mode and the layers' momentum are restored at the end."""
    was_training = network.training
    before = [layer.momentum for layer in layers]
    network.train()
    try:
        yield
    finally:
        network.train(was_training)
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum


def derived_network(supernet: Network, architecture: Architecture) -> Network:
    """The architecture's stand-alone network with inherited weights, on the supernet's device."""
    network = build_network(supernet.space.fix(architecture), supernet.out_channels)
    network = network.to(cast(Tensor, next(supernet.parameters())).device)
    inherit_weights(network, supernet, architecture)
    return network
