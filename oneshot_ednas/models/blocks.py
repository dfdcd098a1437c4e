"""IBN and Fused-IBN, elastic: one set of weights runs every kernel, expansion and width.

An option is the leading channels and the centre of the kernel. A block runs in two ways on the
same weights: `sliced` uses one option's slices; `relaxed` mixes all options by gates, at the cost
of one full-size IBN and one full-size Fused-IBN.

Source: superkernels after Single-Path NAS (Stamoulis et al., 2019) and channel masks after
FBNetV2 (Wan et al., CVPR 2020); the blocks of EDNAS (Vu et al., WACV 2023), figure 4.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from oneshot_ednas.architecture import BlockArchitecture
from oneshot_ednas.relaxation import BlockGates
from oneshot_ednas.space import BlockSpec

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


class ElasticBatchNorm(nn.Module):
    """Batch normalisation of the leading channels that come in.

    A supernet uses batch statistics while it trains and keeps no running ones (`momentum` 0),
    since they would mix architectures; a derived network is an ordinary BN.
    """

    def __init__(self, channels: int, *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Normalise; in training mode by the batch, otherwise by the running statistics."""
        c = x.shape[1]
        update = self.training and self.momentum > 0
        return F.batch_norm(
            x,
            self.running_mean[:c] if update or not self.training else None,
            self.running_var[:c] if update or not self.training else None,
            self.weight[:c],
            self.bias[:c],
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


class _Branch(nn.Module):
    """What IBN and Fused-IBN share: two elastic convolutions and the projection's width."""

    def __init__(self, spec: BlockSpec, in_channels: int, *, momentum: float) -> None:
        super().__init__()
        self.stride = spec.stride
        self.hidden = max(spec.expand_ratios) * in_channels
        self.project = conv_weight(max(spec.filters), self.hidden, 1, 1)
        self.project_bn = ElasticBatchNorm(max(spec.filters), momentum=momentum)

    def _project(self, h: Tensor, filters: int) -> Tensor:
        return self.project_bn(F.conv2d(h, self.project[:filters, : h.shape[1]]))


class IBN(_Branch):
    """Inverted bottleneck: 1x1 expand (unless the expansion is 1), depthwise, 1x1 project.

    Source: MobileNetV2 (Sandler et al., CVPR 2018).
    """

    def __init__(self, spec: BlockSpec, in_channels: int, *, momentum: float) -> None:
        super().__init__(spec, in_channels, momentum=momentum)
        self.has_expand = max(spec.expand_ratios) > 1
        if self.has_expand:
            self.expand = conv_weight(self.hidden, in_channels, 1, 1)
            self.expand_bn = ElasticBatchNorm(self.hidden, momentum=momentum)
        side = max(spec.kernel_sizes)
        self.depthwise = conv_weight(self.hidden, 1, side, side)
        self.depthwise_bn = ElasticBatchNorm(self.hidden, momentum=momentum)

    def sliced(self, x: Tensor, block: BlockArchitecture) -> Tensor:
        """Run one option's slices; the residual is the caller's."""
        in_channels = x.shape[1]
        hidden = block.expand_ratio * in_channels
        if self.has_expand:
            x = F.relu6(self.expand_bn(F.conv2d(x, self.expand[:hidden, :in_channels])))
        kernel = centre(self.depthwise[:hidden], block.kernel_size)
        h = F.relu6(self.depthwise_bn(conv_same(x, kernel, self.stride, depthwise=True)))
        return self._project(h, block.filters)

    def relaxed(self, x: Tensor, kernel_mask: Tensor, hidden_mask: Tensor) -> Tensor:
        """Run all options at full size.

        The hidden mask acts once, after the depthwise activation: a depthwise convolution keeps
        channels apart, so the result is the same as masking after the expansion too, and the
        gate's gradient sees what the channel would have carried.
        """
        if self.has_expand:
            x = F.relu6(self.expand_bn(F.conv2d(x, self.expand)))
        kernel = self.depthwise * kernel_mask
        h = F.relu6(self.depthwise_bn(conv_same(x, kernel, self.stride, depthwise=True)))
        return self._project(h * hidden_mask, self.project.shape[0])


class FusedIBN(_Branch):
    """Full k x k convolution that expands, then 1x1 project.

    Source: EfficientNet-EdgeTPU (Gupta and Akin, 2020); MobileDets (Xiong et al., CVPR 2021).
    """

    def __init__(self, spec: BlockSpec, in_channels: int, *, momentum: float) -> None:
        super().__init__(spec, in_channels, momentum=momentum)
        side = max(spec.kernel_sizes)
        self.expand = conv_weight(self.hidden, in_channels, side, side)
        self.expand_bn = ElasticBatchNorm(self.hidden, momentum=momentum)

    def sliced(self, x: Tensor, block: BlockArchitecture) -> Tensor:
        """Run one option's slices; the residual is the caller's."""
        in_channels = x.shape[1]
        hidden = block.expand_ratio * in_channels
        kernel = centre(self.expand[:hidden, :in_channels], block.kernel_size)
        h = F.relu6(self.expand_bn(conv_same(x, kernel, self.stride)))
        return self._project(h, block.filters)

    def relaxed(self, x: Tensor, kernel_mask: Tensor, hidden_mask: Tensor) -> Tensor:
        """Run all options at full size."""
        h = F.relu6(self.expand_bn(conv_same(x, self.expand * kernel_mask, self.stride)))
        return self._project(h * hidden_mask, self.project.shape[0])


BRANCHES: dict[str, type[IBN] | type[FusedIBN]] = {"ibn": IBN, "fused_ibn": FusedIBN}


class ElasticBlock(nn.Module):
    """One block of the space: a branch per op, and the residual where widths and stride allow."""

    def __init__(self, spec: BlockSpec, in_filters: Sequence[int], *, momentum: float) -> None:
        super().__init__()
        self.spec, self.in_filters = spec, tuple(in_filters)
        self.branches = nn.ModuleDict(
            {op: BRANCHES[op](spec, max(in_filters), momentum=momentum) for op in spec.ops}
        )
        side = max(spec.kernel_sizes)
        offset = (torch.arange(side) - side // 2).abs()
        reach = torch.maximum(offset[:, None], offset[None, :])
        sizes = torch.tensor(spec.kernel_sizes)
        out_channels, hidden = max(spec.filters), max(spec.expand_ratios) * max(in_filters)
        hidden_widths = torch.tensor(
            [[ratio * width for ratio in spec.expand_ratios] for width in in_filters]
        )
        # Which kernel taps and channels each option uses: gates mix these 0/1 patterns.
        self.kernel_steps: Tensor
        self.out_steps: Tensor
        self.hidden_steps: Tensor
        self.register_buffer(
            "kernel_steps", (reach <= (sizes // 2)[:, None, None]).float(), persistent=False
        )
        self.register_buffer(
            "out_steps", _steps(torch.tensor(spec.filters), out_channels), persistent=False
        )
        self.register_buffer("hidden_steps", _steps(hidden_widths, hidden), persistent=False)

    def forward(
        self, x: Tensor, run: BlockArchitecture | BlockGates, in_gate: Tensor | None = None
    ) -> Tensor:
        """Run one option's slices, or the mixture of all options.

        Args:
            x: `[batch, in-width, height, width]`; for the mixture at the largest in-width and
                already masked by the block before.
            run: the option, or this block's gates.
            in_gate: with gates: over the in-width options, the `filters` gate of the block before.

        Returns:
            `[batch, filters, height, width]`; of a mixture at the largest width, masked.
        """
        if isinstance(run, BlockArchitecture):
            return self._sliced(x, run)
        assert in_gate is not None
        return self._relaxed(x, run, in_gate)

    def _sliced(self, x: Tensor, block: BlockArchitecture) -> Tensor:
        branch = cast(IBN | FusedIBN, self.branches[block.op])
        y = branch.sliced(x, block)
        has_residual = self.spec.stride == 1 and x.shape[1] == block.filters
        return x + y if has_residual else y

    def _relaxed(self, x: Tensor, gates: BlockGates, in_gate: Tensor) -> Tensor:
        kernel_mask = torch.einsum("k,khw->hw", gates.kernel_size, self.kernel_steps.to(x.dtype))
        hidden_mask = torch.einsum(
            "i,e,iec->c", in_gate, gates.expand_ratio, self.hidden_steps.to(x.dtype)
        ).view(-1, 1, 1)
        out_mask = (gates.filters @ self.out_steps.to(x.dtype)).view(-1, 1, 1)
        mixed = []
        for index, op in enumerate(self.spec.ops):
            branch = cast(IBN | FusedIBN, self.branches[op])
            mixed.append(gates.op[index] * branch.relaxed(x, kernel_mask, hidden_mask))
        y = sum(mixed[1:], start=mixed[0]) * out_mask
        pairs = self._equal_widths()
        if not pairs:
            return y
        residual_gate = torch.stack([in_gate[i] * gates.filters[j] for i, j in pairs]).sum()
        channels = min(x.shape[1], y.shape[1])
        residual = F.pad(x[:, :channels], (0, 0, 0, 0, 0, y.shape[1] - channels))
        # x is masked to its own width, so where widths are equal its channels are the option's.
        return y + residual_gate * residual

    def _equal_widths(self) -> list[tuple[int, int]]:
        if self.spec.stride != 1:
            return []
        return [
            (i, self.spec.filters.index(width))
            for i, width in enumerate(self.in_filters)
            if width in self.spec.filters
        ]


def _steps(widths: Tensor, channels: int) -> Tensor:
    """Per width, 1 for the leading `width` channels and 0 after: shape `[*widths, channels]`."""
    return (torch.arange(channels) < widths.unsqueeze(-1)).float()
