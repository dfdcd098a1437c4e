"""Encoders as chains of layers: what tasks can share, whatever the backbone.

A layer reads the outputs of earlier layers on the same task's path and gives one tensor. Two tasks
that take the same layers from the image on compute them once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from torch import Tensor, nn

from oneshot_ednas.architecture import BlockArchitecture
from oneshot_ednas.models.bifpn import BiFPN, BiFPNLayer, FusionNode
from oneshot_ednas.models.blocks import ElasticBlock, SharingConfig
from oneshot_ednas.models.heads import Head
from oneshot_ednas.models.layers import BN_MOMENTUM, ConvBN, ElasticBatchNorm
from oneshot_ednas.relaxation import BlockGates
from oneshot_ednas.space import SearchSpace

IMAGES = -1
"""What a layer reads that reads the images."""


@dataclass(frozen=True, kw_only=True)
class EncoderLayer:
    """One layer that tasks share or not: a block, or a whole ASPP module or BiFPN."""

    name: str
    reads: tuple[int, ...]
    """Indices of the layers whose outputs it takes, in this order; `IMAGES` for the images."""
    build: Callable[[], nn.Module]
    """Makes a new copy: `module(*features) -> Tensor`. Its BN layers whose output nothing
    normalises again are its `output_norms`."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A backbone with what tasks may share of its decoding, and a decoder that each has alone."""

    name: str
    layers: tuple[EncoderLayer, ...]
    decoder_reads: tuple[int, ...]
    """Indices of the layers whose outputs the decoders take."""
    build_decoder: Callable[[int], nn.Module]
    """From output channels: `module(*features) -> Tensor`, the raw map."""
    space: SearchSpace | None = None
    """Of an EDNAS backbone: what its blocks may be; layer `l` is block `l`, layer 0 the stem."""

    def __post_init__(self) -> None:
        """Layers read what comes before them, and go by names of their own.

        Raises:
            ValueError: naming the layer.
        """
        names = [layer.name for layer in self.layers]
        for name in names:
            if not name or "." in name or names.count(name) > 1:
                raise ValueError(
                    f"{self.name}: expected layers with names of their own, without a dot, got "
                    f"{', '.join(map(repr, names))}"
                )
        for index, layer in enumerate(self.layers):
            if not layer.reads or not all(IMAGES <= read < index for read in layer.reads):
                raise ValueError(
                    f"{self.name}: layer {layer.name} reads {layer.reads}; expected indices from "
                    f"{IMAGES} (the images) to {index - 1}"
                )
        if not all(0 <= read < len(self.layers) for read in self.decoder_reads):
            raise ValueError(
                f"{self.name}: decoders read {self.decoder_reads} of {len(self.layers)} layers"
            )


class Chain(nn.Module):
    """The layers of an encoder once, one after the other: the backbone of a single network."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.reads = [layer.reads for layer in encoder.layers]
        self.decoder_reads = encoder.decoder_reads
        self.layers = nn.ModuleDict({layer.name: layer.build() for layer in encoder.layers})

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the decoders read."""
        outputs: list[Tensor] = []
        for layer, reads in zip(self.layers.values(), self.reads, strict=True):
            outputs.append(layer(*(images if i == IMAGES else outputs[i] for i in reads)))
        return tuple(outputs[index] for index in self.decoder_reads)


class Block(nn.Module):
    """An elastic block as a layer of its own: of a fixed space it needs no choice."""

    def __init__(
        self,
        space: SearchSpace,
        index: int,
        *,
        momentum: float,
        sharing: SharingConfig = SharingConfig(),
    ) -> None:
        super().__init__()
        spec = space.blocks[index]
        self.only = space.base_architecture.blocks[index] if space.is_fixed else None
        self.elastic = ElasticBlock(
            spec, space.in_filters(index), momentum=momentum, sharing=sharing
        )

    @property
    def output_norms(self) -> list[ElasticBatchNorm]:
        """The BN of each op's projection."""
        branches = self.elastic.branches.values()
        return [cast(ElasticBatchNorm, branch.project_bn) for branch in branches]

    def forward(
        self,
        x: Tensor,
        run: BlockArchitecture | BlockGates | None = None,
        in_gate: Tensor | None = None,
    ) -> Tensor:
        """As of `ElasticBlock`; `run` may be left out where there is one option."""
        run = self.only if run is None else run
        assert run is not None
        return self.elastic(x, run, in_gate)


class Stem(nn.Module):
    """The 3x3 stride-2 convolution on the images."""

    def __init__(self, space: SearchSpace, *, momentum: float) -> None:
        super().__init__()
        self.conv = ConvBN(3, space.stem_filters, kernel_size=3, stride=2, momentum=momentum)

    @property
    def output_norms(self) -> list[ElasticBatchNorm]:
        """Its BN."""
        return [self.conv.bn]

    def forward(self, images: Tensor) -> Tensor:
        """Features at half the size."""
        return self.conv(images)


class Fusion(nn.Module):
    """The BiFPN as a layer that reads the tapped blocks."""

    def __init__(self, space: SearchSpace, *, momentum: float) -> None:
        super().__init__()
        self.bifpn = BiFPN(space, momentum=momentum)

    @property
    def output_norms(self) -> list[ElasticBatchNorm]:
        """The BN of the node at the finest level."""
        last = cast(BiFPNLayer, self.bifpn.layers[-1])
        return [cast(FusionNode, last.top_down[-1]).conv.pointwise.bn]

    def forward(self, *taps: Tensor) -> Tensor:
        """The finest fused map."""
        return self.bifpn(list(taps))


def ednas_encoder(space: SearchSpace, *, sharing: SharingConfig = SharingConfig()) -> Encoder:
    """Stem, blocks and BiFPN of a space; a fixed one needs no choices when it runs.

    Args:
        space: the search space; `space.fix(architecture)` for one architecture.
        sharing: what the options of a block share, without effect on a fixed space.
    """
    momentum = BN_MOMENTUM if space.is_fixed else 0.0
    options = SharingConfig() if space.is_fixed else sharing
    layers = [
        EncoderLayer(name="stem", reads=(IMAGES,), build=partial(Stem, space, momentum=momentum))
    ]
    for index in range(len(space.blocks)):
        build = partial(Block, space, index, momentum=momentum, sharing=options)
        layers.append(EncoderLayer(name=f"block_{index + 1}", reads=(index,), build=build))
    layers.append(
        EncoderLayer(
            name="bifpn",
            reads=tuple(space.fusion.tap_blocks),
            build=partial(Fusion, space, momentum=momentum),
        )
    )
    return Encoder(
        name=space.name,
        layers=tuple(layers),
        decoder_reads=(len(layers) - 1,),
        build_decoder=partial(Head, space, momentum=momentum),
        space=space,
    )


def output_norms(module: nn.Module) -> Sequence[nn.Module]:
    """BN layers of a layer's output; none where the module names none."""
    return getattr(module, "output_norms", ())
