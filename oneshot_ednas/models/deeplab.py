"""DeepLabv3+ on published backbones: encoders whose layers tasks share, a decoder per task.

The layers are those of BMTAS (Bruggemann et al., BMVC 2020, section 4.1 and figure 3): the stem,
each block and the whole ASPP module. Decoder: Chen et al., ECCV 2018, section 3.1; reduced ASPP:
Sandler et al., CVPR 2018, section 6.3. Nothing is downloaded; weights are drawn anew.
"""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneshot_ednas.models.backbones import (
    BLOCK_ACTIVATIONS,
    MNASNET_B1,
    MOBILENET_V2,
    Row,
    Trunk,
    convolution,
    inverted_residual_trunk,
    resnet_trunk,
)
from oneshot_ednas.models.encoder import IMAGES, Encoder, EncoderLayer

OUTPUT_STRIDES = (8, 16, 32)
ATROUS_RATES = (6, 12, 18)
"""At output stride 16; their reach in pixels of the image is the same at the others."""


class Channels(NamedTuple):
    """Of what follows the backbone; see `mobilenet_v2`."""

    aspp: int
    low_level: int
    decoder: int


def conv_bn(
    in_channels: int, out_channels: int, *, activation: str, kernel_size: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Convolution, BN and activation."""
    return nn.Sequential(
        OrderedDict(
            conv=convolution(in_channels, out_channels, kernel_size=kernel_size, dilation=dilation),
            bn=nn.BatchNorm2d(out_channels),
            activation=BLOCK_ACTIVATIONS[activation](),
        )
    )


def separable_conv_bn(in_channels: int, out_channels: int, *, activation: str) -> nn.Sequential:
    """Depthwise 3x3 and 1x1 convolution, each with BN and activation."""
    return nn.Sequential(
        OrderedDict(
            depthwise=convolution(in_channels, in_channels, kernel_size=3, groups=in_channels),
            depthwise_bn=nn.BatchNorm2d(in_channels),
            depthwise_activation=BLOCK_ACTIVATIONS[activation](),
            pointwise=convolution(in_channels, out_channels),
            pointwise_bn=nn.BatchNorm2d(out_channels),
            pointwise_activation=BLOCK_ACTIVATIONS[activation](),
        )
    )


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, atrous 3x3 and image-pooling branches, then 1x1.

    Without rates it is the reduced one. The image-pooling branch has one value per channel and
    image for its BN, so training needs batches of 2 or more; torch's BN refuses one of 1.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, rates: tuple[int, ...], activation: str
    ) -> None:
        super().__init__()
        self.point = conv_bn(in_channels, out_channels, activation=activation)
        self.atrous = nn.ModuleList(
            conv_bn(in_channels, out_channels, activation=activation, kernel_size=3, dilation=rate)
            for rate in rates
        )
        self.image = conv_bn(in_channels, out_channels, activation=activation)
        self.project = conv_bn((2 + len(rates)) * out_channels, out_channels, activation=activation)

    @property
    def output_norms(self) -> list[nn.BatchNorm2d]:
        """The BN of the projection."""
        return [cast(nn.BatchNorm2d, self.project.bn)]

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same size."""
        image = self.image(x.mean((2, 3), keepdim=True)).expand(-1, -1, x.shape[2], x.shape[3])
        branches = [self.point(x), *(branch(x) for branch in self.atrous), image]
        return self.project(torch.cat(branches, 1))


class Decoder(nn.Module):
    """Joins the ASPP's output to low-level features and classifies each pixel."""

    def __init__(
        self,
        out_channels: int,
        *,
        low_level: tuple[int, int],
        aspp_channels: int,
        decoder_channels: int,
        is_separable: bool,
        activation: str,
    ) -> None:
        """Build it.

        Args:
            out_channels: of the task's raw map.
            low_level: channels of the low-level features as they come, and as they are joined.
            aspp_channels: of the ASPP's output.
            decoder_channels: of the two 3x3 convolutions.
            is_separable: whether these are depthwise and 1x1.
            activation: "relu" or "relu6".
        """
        super().__init__()
        joined = aspp_channels + low_level[1]
        self.reduce = conv_bn(*low_level, activation=activation)
        conv = separable_conv_bn if is_separable else partial(conv_bn, kernel_size=3)
        self.convs = nn.Sequential(
            conv(joined, decoder_channels, activation=activation),
            conv(decoder_channels, decoder_channels, activation=activation),
        )
        self.classifier = convolution(decoder_channels, out_channels, has_bias=True)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, low: Tensor, pooled: Tensor) -> Tensor:
        """Raw map `[batch, out_channels, height, width]` of the low-level features' size."""
        pooled = F.interpolate(pooled, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return self.classifier(self.convs(torch.cat([self.reduce(low), pooled], 1)))


def mobilenet_v2(
    width: float = 1.0,
    *,
    output_stride: int = 16,
    aspp_channels: int = 128,
    low_level_channels: int = 48,
    decoder_channels: int = 128,
) -> Encoder:
    """MobileNetV2 with reduced ASPP; decoders of separable convolutions.

    Args:
        width: multiplier of the backbone's channels.
        output_stride: of the backbone's last features: 8, 16 or 32.
        aspp_channels: of each branch of the ASPP and of its output.
        low_level_channels: to which a decoder reduces the features at stride 4.
        decoder_channels: of a decoder's 3x3 convolutions. BMTAS does not state the channels; with
            these defaults five tasks at 512 x 512 come to its multiply-adds, about 1 percent more.

    Raises:
        ValueError: an option is out of range.
    """
    return _light(
        "mobilenet_v2",
        MOBILENET_V2,
        "relu6",
        width,
        output_stride,
        Channels(aspp_channels, low_level_channels, decoder_channels),
    )


def mnasnet(
    width: float = 1.0,
    *,
    output_stride: int = 16,
    aspp_channels: int = 128,
    low_level_channels: int = 48,
    decoder_channels: int = 128,
) -> Encoder:
    """MNasNet-B1 with reduced ASPP; decoders of separable convolutions.

    The options are those of `mobilenet_v2`.

    Raises:
        ValueError: an option is out of range.
    """
    return _light(
        "mnasnet",
        MNASNET_B1,
        "relu",
        width,
        output_stride,
        Channels(aspp_channels, low_level_channels, decoder_channels),
    )


def resnet34(
    width: float = 1.0,
    *,
    output_stride: int = 16,
    aspp_channels: int = 256,
    low_level_channels: int = 48,
    decoder_channels: int = 256,
) -> Encoder:
    """ResNet-34 with ASPP; decoders of plain convolutions.

    The options are those of `mobilenet_v2`.

    Raises:
        ValueError: an option is out of range.
    """
    return _resnet(
        "resnet34",
        False,
        width,
        output_stride,
        Channels(aspp_channels, low_level_channels, decoder_channels),
    )


def resnet50(
    width: float = 1.0,
    *,
    output_stride: int = 16,
    aspp_channels: int = 256,
    low_level_channels: int = 48,
    decoder_channels: int = 256,
) -> Encoder:
    """ResNet-50 with ASPP; decoders of plain convolutions.

    The options are those of `mobilenet_v2`.

    Raises:
        ValueError: an option is out of range.
    """
    return _resnet(
        "resnet50",
        True,
        width,
        output_stride,
        Channels(aspp_channels, low_level_channels, decoder_channels),
    )


ENCODERS: dict[str, Callable[..., Encoder]] = {
    "mobilenet_v2": mobilenet_v2,
    "mnasnet": mnasnet,
    "resnet34": resnet34,
    "resnet50": resnet50,
}


def named_encoder(name: str, **options: int | float) -> Encoder:
    """A backbone of `ENCODERS` by name.

    Args:
        name: a key of `ENCODERS`.
        **options: its keyword arguments.

    Raises:
        ValueError: no backbone has that name, it has no such option, or an option is out of range.
    """
    if name not in ENCODERS:
        raise ValueError(f"no backbone {name!r}; expected one of {', '.join(ENCODERS)}")
    known = list(inspect.signature(ENCODERS[name]).parameters)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"backbone {name} has no option {', '.join(unknown)}; expected {', '.join(known)}"
        )
    return ENCODERS[name](**options)


def _light(
    name: str,
    rows: tuple[Row, ...],
    activation: str,
    width: float,
    output_stride: int,
    channels: Channels,
) -> Encoder:
    _check(name, width, output_stride, channels)
    trunk = inverted_residual_trunk(
        rows, activation=activation, width=width, output_stride=output_stride
    )
    return _encoder(name, trunk, channels, rates=(), is_separable=True, activation=activation)


def _resnet(
    name: str,
    has_bottlenecks: bool,
    width: float,
    output_stride: int,
    channels: Channels,
) -> Encoder:
    _check(name, width, output_stride, channels)
    # ResNet-34 and ResNet-50 have as many blocks per stage.
    trunk = resnet_trunk(
        (3, 4, 6, 3), has_bottlenecks=has_bottlenecks, width=width, output_stride=output_stride
    )
    rates = tuple(rate * 16 // output_stride for rate in ATROUS_RATES)
    return _encoder(name, trunk, channels, rates=rates, is_separable=False, activation="relu")


def _check(name: str, width: float, output_stride: int, channels: Channels) -> None:
    if not (width > 0 and math.isfinite(width)):
        raise ValueError(f"{name}: width {width}; expected a multiplier above 0, as 0.5")
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"{name}: output_stride {output_stride}; expected 8, 16 or 32")
    for part, count in channels._asdict().items():
        if not (isinstance(count, int) and count > 0):
            raise ValueError(f"{name}: {part}_channels {count}; expected a whole number above 0")


def _encoder(
    name: str,
    trunk: Trunk,
    channels: Channels,
    *,
    rates: tuple[int, ...],
    is_separable: bool,
    activation: str,
) -> Encoder:
    layers = []
    for index, build in enumerate(trunk.builds):
        layer = "stem" if index == 0 else f"block_{index}"
        layers.append(
            EncoderLayer(name=layer, reads=(index - 1 if index else IMAGES,), build=build)
        )
    aspp = partial(ASPP, trunk.channels[-1], channels.aspp, rates=rates, activation=activation)
    layers.append(EncoderLayer(name="aspp", reads=(len(layers) - 1,), build=aspp))
    return Encoder(
        name=name,
        layers=tuple(layers),
        decoder_reads=(trunk.low_level, len(layers) - 1),
        build_decoder=partial(
            Decoder,
            low_level=(trunk.channels[trunk.low_level], channels.low_level),
            aspp_channels=channels.aspp,
            decoder_channels=channels.decoder,
            is_separable=is_separable,
            activation=activation,
        ),
    )
