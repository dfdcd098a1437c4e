"""Published image classifiers without their classifiers: ResNet, MobileNetV2, MNasNet.

Plain torch modules only, so that every convolution and every BN is a module of its own. The last
stages dilate where the output stride asks for finer features, with the same weights.

Sources: He et al., CVPR 2016, table 1, with the stride of a bottleneck in its 3x3 convolution as
is usual since; Sandler et al., CVPR 2018, table 2; Tan et al., CVPR 2019, MNasNet-B1. Atrous
stages: Chen et al., "Rethinking atrous convolution", 2017, section 3.1.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

from torch import Tensor, nn

BLOCK_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}


class Sampling(NamedTuple):
    """How a block samples: by its published stride, or by that stride's dilation instead."""

    stride: int
    """As published. A block with a stride has no plain shortcut, whether it dilates or not."""
    step: int
    """The stride it takes: `stride`, or 1 where it dilates."""
    dilation: int
    """Of its convolutions up to and with the one that strides."""
    next_dilation: int
    """Of its convolutions after that one, and of the blocks that follow."""


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """A classifier's stem and blocks, one after the other."""

    builds: tuple[Callable[[], nn.Module], ...]
    """Stem first; each makes a new copy."""
    channels: tuple[int, ...]
    """That each of them gives."""
    strides: tuple[int, ...]
    """Of each one's output against the images."""

    @property
    def low_level(self) -> int:
        """Index of the last layer at stride 4: what a DeepLabv3+ decoder takes beside the ASPP."""
        return len(self.strides) - 1 - self.strides[::-1].index(4)


class _Growing:
    """A trunk while blocks are appended; past the output stride they dilate."""

    def __init__(
        self, stem: Callable[[], nn.Module], channels: int, stride: int, output_stride: int
    ) -> None:
        self.builds, self.channels, self.strides = [stem], [channels], [stride]
        self.output_stride, self.dilation = output_stride, 1

    def append(self, block: Callable[..., nn.Module], channels: int, stride: int) -> None:
        """Add `block(in_channels, channels, sampling)`."""
        dilation, step = self.dilation, stride
        if self.strides[-1] * stride > self.output_stride:
            self.dilation, step = dilation * stride, 1
        sampling = Sampling(stride, step, dilation, self.dilation)
        self.builds.append(partial(block, self.channels[-1], channels, sampling))
        self.channels.append(channels)
        self.strides.append(self.strides[-1] * step)

    def done(self) -> Trunk:
        return Trunk(
            builds=tuple(self.builds), channels=tuple(self.channels), strides=tuple(self.strides)
        )


def scaled(channels: int, width: float) -> int:
    """Channels times a width multiplier, to a multiple of 8 and never below 9 tenths of it.

    The rounding of MobileNetV2; published widths come out as they are at 1.
    """
    rounded = max(8, int(channels * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * width else rounded


def convolution(
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 1,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    has_bias: bool = False,
) -> nn.Conv2d:
    """Convolution with symmetric padding, drawn by He's rule over the fan-out.

    At stride `s` it gives `ceil(size / s)` pixels, at the input's pixels 0, s, 2s, ...: its dilated
    form gives the same numbers there and others between.
    """
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        groups=groups,
        bias=has_bias,
    )
    # A depthwise kernel's fan-out is its area; nn.init's rules would take all channels for it.
    nn.init.normal_(conv.weight, std=math.sqrt(2.0 * groups / (kernel_size**2 * out_channels)))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class ClassifierStem(nn.Module):
    """Stride-2 convolution on the images with BN, activation and, in ResNets, max-pooling."""

    def __init__(
        self, channels: int, *, kernel_size: int, activation: str, has_pooling: bool = False
    ) -> None:
        super().__init__()
        self.conv = convolution(3, channels, kernel_size=kernel_size, stride=2)
        self.bn = nn.BatchNorm2d(channels)
        self.activation = BLOCK_ACTIVATIONS[activation]()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if has_pooling else None

    @property
    def output_norms(self) -> list[nn.BatchNorm2d]:
        """Its BN."""
        return [self.bn]

    def forward(self, images: Tensor) -> Tensor:
        """Features at half the size, a quarter with pooling."""
        x = self.activation(self.bn(self.conv(images)))
        return x if self.pool is None else self.pool(x)


class InvertedResidual(nn.Module):
    """1x1 expansion (none at ratio 1), depthwise convolution, linear 1x1 projection."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        sampling: Sampling,
        *,
        expand_ratio: int,
        kernel_size: int,
        activation: str,
    ) -> None:
        super().__init__()
        make, inner = BLOCK_ACTIVATIONS[activation], in_channels * expand_ratio
        parts = OrderedDict[str, nn.Module]()
        if expand_ratio != 1:
            parts["expand"] = convolution(in_channels, inner)
            parts["expand_bn"] = nn.BatchNorm2d(inner)
            parts["expand_activation"] = make()
        parts["depthwise"] = convolution(
            inner,
            inner,
            kernel_size=kernel_size,
            stride=sampling.step,
            dilation=sampling.dilation,
            groups=inner,
        )
        parts["depthwise_bn"] = nn.BatchNorm2d(inner)
        parts["depthwise_activation"] = make()
        parts["project"] = convolution(inner, out_channels)
        parts["project_bn"] = nn.BatchNorm2d(out_channels)
        self.branch = nn.Sequential(parts)
        self.has_residual = sampling.stride == 1 and in_channels == out_channels

    @property
    def output_norms(self) -> list[nn.BatchNorm2d]:
        """The BN of the projection."""
        return [cast(nn.BatchNorm2d, self.branch.project_bn)]

    def forward(self, x: Tensor) -> Tensor:
        """Features of the block."""
        y = self.branch(x)
        return x + y if self.has_residual else y


class ResidualBlock(nn.Module):
    """ResNet's block: a branch of convolutions beside a shortcut, then ReLU.

    Its `output_norms` are the branch's last BN alone. BMTAS takes the affine part off "the last"
    BN of an operation, one per operation; the shortcut's projection keeps its own, so that the
    block can still weigh the branch against the shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        sampling: Sampling,
        *,
        inner_channels: int | None = None,
    ) -> None:
        """Build it.

        Args:
            in_channels: that come in.
            out_channels: that it gives.
            sampling: strides and dilations.
            inner_channels: of the bottleneck's 3x3 convolution; none for a block of two 3x3
                convolutions.
        """
        super().__init__()
        strided = partial(
            convolution, kernel_size=3, stride=sampling.step, dilation=sampling.dilation
        )
        if inner_channels is None:
            convs = [
                strided(in_channels, out_channels),
                convolution(
                    out_channels, out_channels, kernel_size=3, dilation=sampling.next_dilation
                ),
            ]
        else:
            convs = [
                convolution(in_channels, inner_channels),
                strided(inner_channels, inner_channels),
                convolution(inner_channels, out_channels),
            ]
        parts = OrderedDict[str, nn.Module]()
        for number, conv in enumerate(convs, start=1):
            parts[f"conv{number}"] = conv
            parts[f"bn{number}"] = nn.BatchNorm2d(conv.out_channels)
            if number < len(convs):
                parts[f"activation{number}"] = nn.ReLU()
        self.branch = nn.Sequential(parts)
        self.shortcut = None
        if sampling.stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                OrderedDict(
                    conv=convolution(in_channels, out_channels, stride=sampling.step),
                    bn=nn.BatchNorm2d(out_channels),
                )
            )
        self.activation = nn.ReLU()

    @property
    def output_norms(self) -> list[nn.BatchNorm2d]:
        """The last BN of the branch."""
        return [cast(nn.BatchNorm2d, self.branch[-1])]

    def forward(self, x: Tensor) -> Tensor:
        """Features of the block."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.activation(self.branch(x) + shortcut)


def resnet_trunk(
    blocks: Sequence[int], *, has_bottlenecks: bool, width: float, output_stride: int
) -> Trunk:
    """Stem with pooling and four stages of residual blocks.

    Args:
        blocks: number in each stage.
        has_bottlenecks: whether blocks are bottlenecks, which give 4 times their inner channels.
        width: multiplier of all channels.
        output_stride: of the last features; later stages dilate.
    """
    channels = scaled(64, width)
    stem = partial(ClassifierStem, channels, kernel_size=7, activation="relu", has_pooling=True)
    trunk = _Growing(stem, channels, 4, output_stride)
    for stage, count in enumerate(blocks):
        inner = scaled(64 * 2**stage, width)
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            if has_bottlenecks:
                trunk.append(partial(ResidualBlock, inner_channels=inner), 4 * inner, stride)
            else:
                trunk.append(ResidualBlock, inner, stride)
    return trunk.done()


class Row(NamedTuple):
    """A line of a paper's table of inverted residual blocks."""

    expand_ratio: int
    kernel_size: int
    channels: int
    blocks: int
    stride: int


MOBILENET_V2 = (
    Row(1, 3, 16, 1, 1),
    Row(6, 3, 24, 2, 2),
    Row(6, 3, 32, 3, 2),
    Row(6, 3, 64, 4, 2),
    Row(6, 3, 96, 3, 1),
    Row(6, 3, 160, 3, 2),
    Row(6, 3, 320, 1, 1),
)
MNASNET_B1 = (
    Row(1, 3, 16, 1, 1),
    Row(3, 3, 24, 3, 2),
    Row(3, 5, 40, 3, 2),
    Row(6, 5, 80, 3, 2),
    Row(6, 3, 96, 2, 1),
    Row(6, 5, 192, 4, 2),
    Row(6, 3, 320, 1, 1),
)


def inverted_residual_trunk(
    rows: Sequence[Row], *, activation: str, width: float, output_stride: int
) -> Trunk:
    """Stem of 32 channels and inverted residual blocks.

    The 1x1 convolution to 1280 channels before the classifier is left out: the ASPP reads the
    last block.

    Args:
        rows: of the paper's table; a row's first block strides.
        activation: "relu" or "relu6".
        width: multiplier of all channels.
        output_stride: of the last features; later stages dilate.
    """
    channels = scaled(32, width)
    stem = partial(ClassifierStem, channels, kernel_size=3, activation=activation)
    trunk = _Growing(stem, channels, 2, output_stride)
    for row in rows:
        block = partial(
            InvertedResidual,
            expand_ratio=row.expand_ratio,
            kernel_size=row.kernel_size,
            activation=activation,
        )
        for index in range(row.blocks):
            trunk.append(block, scaled(row.channels, width), row.stride if index == 0 else 1)
    return trunk.done()
