"""The only builder: a supernet from a space, a derived network from a fixed space."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
        images = fast_layout(images)
        fused = self.bifpn(self.backbone(images, run))
        return {task: head(fused) for task, head in self.heads.items()}

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())


def fast_layout(images: Tensor) -> Tensor:
    """Images as the device's convolutions like them."""
    # Apple's channels-last convolutions are refused, wrong or slow in torch up to 2.13.
    if images.device.type == "mps":
        return images.contiguous()
    # Thin layers are memory-bound: channels-last runs them 1.4 times faster on a CPU, and it is
    # what tensor cores want.
    return images.contiguous(memory_format=torch.channels_last)


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
        target.copy_(leading(source[name], target))


def leading(source: Tensor, target: Tensor) -> Tensor:
    """The leading channels, and the centre of kernels, that fill a tensor."""
    index = [slice(size) for size in target.shape]
    for axis in range(2, target.dim()):
        margin = (source.shape[axis] - target.shape[axis]) // 2
        index[axis] = slice(margin, margin + target.shape[axis])
    return source[tuple(index)]


@torch.no_grad()
def recalibrate_bn(
    network: nn.Module,
    batches: Iterable[Tensor],
    architecture: object = None,
) -> None:
    """Reset the BN statistics and recompute them as averages over all that comes to each layer.

    Everything but BN is in evaluation mode meanwhile; all modes are restored.

    Args:
        network: a derived network, a supernet together with an architecture, or another module
            with layers of `ElasticBatchNorm` or torch's own BN; the statistics of a network with
            several paths then hold for that architecture only.
        batches: images `[batch, 3, height, width]`, on the network's device.
        architecture: what to run of a network with several paths: its forward's second argument.

    Raises:
        ValueError: if there is no batch, or a supernet comes without an architecture.
    """
    if architecture is None and isinstance(network, Network) and not network.space.is_fixed:
        raise ValueError("a supernet's BN is recalibrated for one architecture: name it")
    count = 0
    with _averaging_bn(network) as averages:
        for count, images in enumerate(batches, start=1):
            if count == 1:
                for average in averages:
                    average.reset()
            network(*((images,) if architecture is None else (images, architecture)))
    if count == 0:
        raise ValueError("recalibrating BN needs at least one batch of images")


class _BNAverage:
    """A BN layer whose running statistics are the averages over its runs."""

    def __init__(self, layer: ElasticBatchNorm | _BatchNorm) -> None:
        self.layer = layer
        self.momentum = layer.momentum
        self.num_runs = 0
        self.hook = layer.register_forward_pre_hook(self._before_run)

    def _before_run(self, *_: object) -> None:
        # Of the layer, not of the network: one may run it for some tasks only, or for each.
        self.num_runs += 1
        self.layer.momentum = 1 / self.num_runs

    def reset(self) -> None:
        """Forget the statistics; a layer that never runs keeps mean 0 and variance 1."""
        if isinstance(self.layer, _BatchNorm):
            self.layer.reset_running_stats()
        else:
            self.layer.running_mean.zero_()
            self.layer.running_var.fill_(1)

    def close(self) -> None:
        """Leave the layer as it was, but for its statistics."""
        self.hook.remove()
        self.layer.momentum = self.momentum


@contextmanager
def _averaging_bn(network: nn.Module) -> Iterator[list[_BNAverage]]:
    """BN layers that average for a while; modes and momenta are restored at the end."""
    modes = [(module, module.training) for module in network.modules()]
    averages = [
        _BNAverage(module)
        for module in network.modules()
        if isinstance(module, (ElasticBatchNorm, _BatchNorm)) and module.running_mean is not None
    ]
    network.eval()
    for average in averages:
        average.layer.train()
    try:
        yield averages
    finally:
        for average in averages:
            average.close()
        for module, was_training in modes:
            module.training = was_training


def derived_network(supernet: Network, architecture: Architecture) -> Network:
    """The architecture's stand-alone network with inherited weights, on the supernet's device."""
    network = build_network(supernet.space.fix(architecture), supernet.out_channels)
    network = network.to(cast(Tensor, next(supernet.parameters())).device)
    inherit_weights(network, supernet, architecture)
    return network
