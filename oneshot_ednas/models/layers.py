"""Layers that every part of the network is made of: SAME padding, BN of leading channels."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from oneshot_ednas.distributed import is_bn_synced, synced_batch_norm

BN_EPS = 1e-3
"""As in EfficientNet."""
BN_MOMENTUM = 0.1


def pad_same(
    x: Float[Tensor, "batch channels height width"], kernel_size: int, stride: int
) -> Tensor:
    """Zero padding as TensorFlow's SAME: the output has ceil(size / stride) pixels.

    torch's symmetric padding differs from it at stride 2 and would leave a PAD op in the export.
    """

    def before_after(size: int) -> tuple[int, int]:
        total = max((math.ceil(size / stride) - 1) * stride + kernel_size - size, 0)
        return total // 2, total - total // 2

    top, bottom = before_after(int(x.shape[2]))
    left, right = before_after(int(x.shape[3]))
    return F.pad(x, (left, right, top, bottom))


BNOption = tuple[int, ...] | Tensor | None
"""Index of an option, gates over the options, or nothing where all share one set."""


class ElasticBatchNorm(nn.Module):
    """Batch normalisation of the leading channels that come in.

    A supernet uses batch statistics while it trains and keeps no running ones (`momentum` 0),
    since they would mix architectures; a derived network is an ordinary BN.
    """

    def __init__(
        self, channels: int, *, momentum: float, option_steps: Tensor | None = None
    ) -> None:
        """Build it with one set of scale and shift, or one per option.

        Args:
            channels: the most that come in.
            momentum: of the running statistics.
            option_steps: `[*options, channels]`, 1 for the channels that an option has; the last
                option has all.
        """
        super().__init__()
        self.momentum = momentum
        shape = (channels,) if option_steps is None else option_steps.shape
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.is_own: Tensor | None
        self.register_buffer(
            "is_own", None if option_steps is None else option_steps.bool(), persistent=False
        )
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def affine(self, option: BNOption) -> tuple[Tensor, Tensor]:
        """Scale and shift of an option, or their mixture by gates, one number per channel."""
        if self.is_own is None:
            return self.weight, self.bias
        if not isinstance(option, Tensor):
            assert option is not None
            return self.weight[option], self.bias[option]
        return self._mixed(self.weight, option), self._mixed(self.bias, option)

    def _mixed(self, sets: Tensor, gates: Tensor) -> Tensor:
        assert self.is_own is not None
        # Channels beyond an option's width count as the largest option has them: its own numbers
        # there are never trained, and a gate's gradient should see what the channel would carry.
        largest = sets.flatten(0, -2)[-1]
        sets = torch.where(self.is_own, sets, largest)
        return (gates.unsqueeze(-1) * sets).flatten(0, -2).sum(0)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], option: BNOption = None
    ) -> Float[Tensor, "batch channels height width"]:
        """Normalise; in training mode by the batch, otherwise by the running statistics.

        Args:
            x: the leading channels.
            option: where there is one set per option: its index, or gates over the options.
        """
        c = x.shape[1]
        weight, bias = self.affine(option)
        has_running = self.momentum > 0 or not self.training
        running_mean = self.running_mean[:c] if has_running else None
        running_var = self.running_var[:c] if has_running else None
        if self.training and is_bn_synced():
            return synced_batch_norm(
                x,
                weight[:c],
                bias[:c],
                running_mean,
                running_var,
                momentum=self.momentum,
                eps=BN_EPS,
            )
        return F.batch_norm(
            x,
            running_mean,
            running_var,
            weight[:c],
            bias[:c],
            training=self.training,
            momentum=self.momentum,
            eps=BN_EPS,
        )


def conv_weight(*shape: int) -> nn.Parameter:
    """Convolution weights drawn by He's rule over the fan-out."""
    weight = torch.empty(*shape)
    # A depthwise kernel's fan-out is its area: kaiming_normal_ would divide by the channels too.
    fan_out = shape[2] * shape[3] * (1 if shape[1] == 1 else shape[0])
    nn.init.normal_(weight, std=math.sqrt(2.0 / fan_out))
    return nn.Parameter(weight)


class ConvBN(nn.Module):
    """1x1 or SAME-padded convolution of fixed width over the input's leading channels, with BN."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        use_relu6: bool = True,
        momentum: float = BN_MOMENTUM,
    ) -> None:
        super().__init__()
        self.stride, self.use_relu6 = stride, use_relu6
        self.weight = conv_weight(out_channels, in_channels, kernel_size, kernel_size)
        self.bn = ElasticBatchNorm(out_channels, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise and, if wished, clip to 0..6."""
        y = self.bn(conv_same(x, self.weight[:, : x.shape[1]], self.stride))
        return F.relu6(y) if self.use_relu6 else y


class SeparableConv(nn.Module):
    """Depthwise 3x3, then 1x1 with BN and, if wished, ReLU6."""

    def __init__(
        self, in_channels: int, out_channels: int, *, use_relu6: bool, momentum: float
    ) -> None:
        super().__init__()
        self.depthwise = conv_weight(in_channels, 1, 3, 3)
        self.pointwise = ConvBN(in_channels, out_channels, use_relu6=use_relu6, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Same size, `out_channels` channels."""
        return self.pointwise(conv_same(x, self.depthwise, 1, depthwise=True))


def conv_same(x: Tensor, weight: Tensor, stride: int, *, depthwise: bool = False) -> Tensor:
    """Convolution with TensorFlow's SAME padding; `depthwise` keeps the channels apart."""
    kernel_size = int(weight.shape[2])  # a tensor while torch.jit traces
    groups = x.shape[1] if depthwise else 1
    if stride == 1:
        return F.conv2d(x, weight, padding=kernel_size // 2, groups=groups)
    return F.conv2d(pad_same(x, kernel_size, stride), weight, stride=stride, groups=groups)


def centre(weight: Tensor, kernel_size: int) -> Tensor:
    """The middle `kernel_size` x `kernel_size` of a convolution's weights."""
    margin = (weight.shape[2] - kernel_size) // 2
    end = weight.shape[2] - margin
    return weight[:, :, margin:end, margin:end]
