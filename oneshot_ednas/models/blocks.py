"""IBN and Fused-IBN, elastic: one set of weights runs every kernel, expansion and width.

An option is the leading channels and the centre of the kernel. A block runs in two ways on the
same weights: `sliced` uses one option's slices; `relaxed` mixes all options by gates, at the cost
of one full-size IBN and one full-size Fused-IBN.

Source: superkernels after Single-Path NAS (Stamoulis et al., 2019) and channel masks after
FBNetV2 (Wan et al., CVPR 2020); the blocks of EDNAS (Vu et al., WACV 2023), figure 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from oneshot_ednas.architecture import BlockArchitecture
from oneshot_ednas.models.layers import (
    BNOption,
    ElasticBatchNorm,
    centre,
    conv_same,
    conv_weight,
)
from oneshot_ednas.relaxation import BlockGates
from oneshot_ednas.space import BlockSpec


@dataclass(frozen=True, kw_only=True)
class SharingConfig:
    """What the options of a supernet's block share besides leading channels and kernel centres."""

    bn_affine: Literal["shared", "per_width"] = "shared"
    """Scale and shift of a block's BN layers: one set whose leading channels serve all widths, or
    one per out-width and, for hidden channels, per in-width and expansion.
    Source: switchable BN of Slimmable Neural Networks (Yu et al., ICLR 2019), whose statistics
    need no switch here, since they are those of the batch or recomputed per architecture."""
    kernel_transform: bool = False
    """Whether a smaller kernel is a learned linear map of the next larger one's centre, one map
    per block, op and size, the identity at the start.
    Source: Once-for-All (Cai et al., ICLR 2020, section 3.2), for depthwise kernels. Fused-IBN
    gets it too: the taps of its centre serve two sizes just as well, and a map over taps alone
    costs next to nothing beside the convolution."""


class Mixture(NamedTuple):
    """The gates of a block as its branches use them."""

    kernel_size: Tensor
    """`[kernel sizes]`"""
    kernel_mask: Tensor
    """`[side, side]`: per tap, the sum of the gates of the kernels that have it."""
    hidden: Tensor
    """`[in-widths, expansions]`"""
    hidden_mask: Tensor
    """`[channels, 1, 1]`: per hidden channel, the sum of the gates of the options that have it."""
    filters: Tensor
    """`[out-widths]`"""


class _Branch(nn.Module):
    """What IBN and Fused-IBN share: an elastic kernel, hidden channels and the projection."""

    kernel_name: ClassVar[str]
    """The convolution whose kernel size is a choice."""

    def __init__(
        self, spec: BlockSpec, in_filters: Sequence[int], *, momentum: float, sharing: SharingConfig
    ) -> None:
        super().__init__()
        self.spec, self.in_filters, self.stride = spec, tuple(in_filters), spec.stride
        self.momentum = momentum
        self.has_own_affine = sharing.bn_affine == "per_width"
        self.hidden = max(spec.expand_ratios) * max(in_filters)
        self.project = conv_weight(max(spec.filters), self.hidden, 1, 1)
        self.project_bn = self._batch_norm(out_steps(spec))
        self.mapped_sizes = spec.kernel_sizes[-2::-1] if sharing.kernel_transform else ()
        # The part of each map beyond the identity.
        self.kernel_maps = nn.ParameterDict(
            {str(size): nn.Parameter(torch.zeros(size**2, size**2)) for size in self.mapped_sizes}
        )

    def _batch_norm(self, option_steps: Tensor) -> ElasticBatchNorm:
        return ElasticBatchNorm(
            option_steps.shape[-1],
            momentum=self.momentum,
            option_steps=option_steps if self.has_own_affine else None,
        )

    def _hidden_option(self, in_channels: int | Tensor, block: BlockArchitecture) -> BNOption:
        if not self.has_own_affine:
            return None
        ratio = self.spec.expand_ratios.index(block.expand_ratio)
        # A tensor while torch.jit traces.
        return self.in_filters.index(int(in_channels)), ratio

    def _out_option(self, block: BlockArchitecture) -> BNOption:
        return (self.spec.filters.index(block.filters),) if self.has_own_affine else None

    def _project(self, h: Tensor, filters: int, option: BNOption) -> Tensor:
        return self.project_bn(F.conv2d(h, self.project[:filters, : h.shape[1]]), option)

    def _kernel(self, weight: Tensor, kernel_size: int) -> Tensor:
        """One size's kernel: the centre of the largest, through the maps on the way if any."""
        for size in self.mapped_sizes:
            if size < kernel_size:
                break
            taps = centre(weight, size).flatten(2)
            weight = (taps + taps @ self.kernel_maps[str(size)]).unflatten(2, (size, size))
        return centre(weight, kernel_size)

    def _mixed_kernel(self, weight: Tensor, mixture: Mixture) -> Tensor:
        if not self.kernel_maps:
            return weight * mixture.kernel_mask
        mixed = torch.zeros_like(weight)
        for gate, size in zip(mixture.kernel_size, self.spec.kernel_sizes, strict=True):
            margin = (weight.shape[2] - size) // 2
            mixed = mixed + gate * F.pad(self._kernel(weight, size), [margin] * 4)
        return mixed

    def own_weights(self, in_channels: int, block: BlockArchitecture) -> dict[str, Tensor]:
        """What an option has that is no leading part of the tensor of that name."""
        found = {}
        if self.kernel_maps:
            weight = getattr(self, self.kernel_name)
            found[self.kernel_name] = self._kernel(weight, block.kernel_size)
        hidden, out = self._hidden_option(in_channels, block), self._out_option(block)
        for name, layer in self.named_children():
            if self.has_own_affine and isinstance(layer, ElasticBatchNorm):
                weight, bias = layer.affine(out if layer is self.project_bn else hidden)
                found |= {f"{name}.weight": weight, f"{name}.bias": bias}
        return found


class IBN(_Branch):
    """Inverted bottleneck: 1x1 expand (unless the expansion is 1), depthwise, 1x1 project.

    Source: MobileNetV2 (Sandler et al., CVPR 2018).
    """

    kernel_name = "depthwise"

    def __init__(
        self, spec: BlockSpec, in_filters: Sequence[int], *, momentum: float, sharing: SharingConfig
    ) -> None:
        super().__init__(spec, in_filters, momentum=momentum, sharing=sharing)
        steps = hidden_steps(spec, in_filters)
        self.has_expand = max(spec.expand_ratios) > 1
        if self.has_expand:
            self.expand = conv_weight(self.hidden, max(in_filters), 1, 1)
            self.expand_bn = self._batch_norm(steps)
        side = max(spec.kernel_sizes)
        self.depthwise = conv_weight(self.hidden, 1, side, side)
        self.depthwise_bn = self._batch_norm(steps)

    def sliced(self, x: Tensor, block: BlockArchitecture) -> Tensor:
        """Run one option's slices; the residual is the caller's."""
        in_channels = x.shape[1]
        hidden = block.expand_ratio * in_channels
        option = self._hidden_option(in_channels, block)
        if self.has_expand:
            x = F.relu6(self.expand_bn(F.conv2d(x, self.expand[:hidden, :in_channels]), option))
        kernel = self._kernel(self.depthwise[:hidden], block.kernel_size)
        h = F.relu6(self.depthwise_bn(conv_same(x, kernel, self.stride, depthwise=True), option))
        return self._project(h, block.filters, self._out_option(block))

    def relaxed(self, x: Tensor, mixture: Mixture) -> Tensor:
        """Run all options at full size.

        The hidden mask acts once, after the depthwise activation: a depthwise convolution keeps
        channels apart, so the result is the same as masking after the expansion too, and the
        gate's gradient sees what the channel would have carried.
        """
        if self.has_expand:
            x = F.relu6(self.expand_bn(F.conv2d(x, self.expand), mixture.hidden))
        kernel = self._mixed_kernel(self.depthwise, mixture)
        y = conv_same(x, kernel, self.stride, depthwise=True)
        h = F.relu6(self.depthwise_bn(y, mixture.hidden))
        return self._project(h * mixture.hidden_mask, self.project.shape[0], mixture.filters)


class FusedIBN(_Branch):
    """Full k x k convolution that expands, then 1x1 project.

    Source: EfficientNet-EdgeTPU (Gupta and Akin, 2020); MobileDets (Xiong et al., CVPR 2021).
    """

    kernel_name = "expand"

    def __init__(
        self, spec: BlockSpec, in_filters: Sequence[int], *, momentum: float, sharing: SharingConfig
    ) -> None:
        super().__init__(spec, in_filters, momentum=momentum, sharing=sharing)
        side = max(spec.kernel_sizes)
        self.expand = conv_weight(self.hidden, max(in_filters), side, side)
        self.expand_bn = self._batch_norm(hidden_steps(spec, in_filters))

    def sliced(self, x: Tensor, block: BlockArchitecture) -> Tensor:
        """Run one option's slices; the residual is the caller's."""
        in_channels = x.shape[1]
        hidden = block.expand_ratio * in_channels
        kernel = self._kernel(self.expand[:hidden, :in_channels], block.kernel_size)
        option = self._hidden_option(in_channels, block)
        h = F.relu6(self.expand_bn(conv_same(x, kernel, self.stride), option))
        return self._project(h, block.filters, self._out_option(block))

    def relaxed(self, x: Tensor, mixture: Mixture) -> Tensor:
        """Run all options at full size."""
        kernel = self._mixed_kernel(self.expand, mixture)
        h = F.relu6(self.expand_bn(conv_same(x, kernel, self.stride), mixture.hidden))
        return self._project(h * mixture.hidden_mask, self.project.shape[0], mixture.filters)


BRANCHES: dict[str, type[IBN] | type[FusedIBN]] = {"ibn": IBN, "fused_ibn": FusedIBN}


class ElasticBlock(nn.Module):
    """One block of the space: a branch per op, and the residual where widths and stride allow."""

    def __init__(
        self,
        spec: BlockSpec,
        in_filters: Sequence[int],
        *,
        momentum: float,
        sharing: SharingConfig = SharingConfig(),
    ) -> None:
        super().__init__()
        self.spec, self.in_filters = spec, tuple(in_filters)
        self.branches = nn.ModuleDict(
            {
                op: BRANCHES[op](spec, in_filters, momentum=momentum, sharing=sharing)
                for op in spec.ops
            }
        )
        side = max(spec.kernel_sizes)
        offset = (torch.arange(side) - side // 2).abs()
        reach = torch.maximum(offset[:, None], offset[None, :])
        sizes = torch.tensor(spec.kernel_sizes)
        # Which kernel taps and channels each option uses: gates mix these 0/1 patterns.
        self.kernel_steps: Tensor
        self.out_steps: Tensor
        self.hidden_steps: Tensor
        self.register_buffer(
            "kernel_steps", (reach <= (sizes // 2)[:, None, None]).float(), persistent=False
        )
        self.register_buffer("out_steps", out_steps(spec), persistent=False)
        self.register_buffer("hidden_steps", hidden_steps(spec, in_filters), persistent=False)

    def forward(
        self,
        x: Tensor,
        run: BlockArchitecture | BlockGates,
        in_gate: Tensor | None = None,
        idle_ops: tuple[int, ...] = (),
    ) -> Tensor:
        """Run one option's slices, or the mixture of all options.

        Args:
            x: `[batch, in-width, height, width]`; for the mixture at the largest in-width and
                already masked by the block before.
            run: the option, or this block's gates.
            in_gate: with gates: over the in-width options, the `filters` gate of the block before.
            idle_ops: with gates: indices of ops whose gate is known to be 0.

        Returns:
            `[batch, filters, height, width]`; of a mixture at the largest width, masked.
        """
        if isinstance(run, BlockArchitecture):
            return self._sliced(x, run)
        assert in_gate is not None
        return self._relaxed(x, run, in_gate, idle_ops)

    def own_weights(self, in_channels: int, block: BlockArchitecture) -> dict[str, Tensor]:
        """By name, what an option has that is no leading part of the tensor of that name."""
        branch = cast(IBN | FusedIBN, self.branches[block.op])
        own = branch.own_weights(in_channels, block)
        return {f"branches.{block.op}.{name}": tensor for name, tensor in own.items()}

    def _sliced(self, x: Tensor, block: BlockArchitecture) -> Tensor:
        branch = cast(IBN | FusedIBN, self.branches[block.op])
        y = branch.sliced(x, block)
        has_residual = self.spec.stride == 1 and x.shape[1] == block.filters
        return x + y if has_residual else y

    def _relaxed(
        self, x: Tensor, gates: BlockGates, in_gate: Tensor, idle_ops: tuple[int, ...]
    ) -> Tensor:
        kernel_mask = torch.einsum("k,khw->hw", gates.kernel_size, self.kernel_steps.to(x.dtype))
        hidden_mask = torch.einsum(
            "i,e,iec->c", in_gate, gates.expand_ratio, self.hidden_steps.to(x.dtype)
        ).view(-1, 1, 1)
        out_mask = (gates.filters @ self.out_steps.to(x.dtype)).view(-1, 1, 1)
        mixture = Mixture(
            kernel_size=gates.kernel_size,
            kernel_mask=kernel_mask,
            hidden=torch.outer(in_gate, gates.expand_ratio),
            hidden_mask=hidden_mask,
            filters=gates.filters,
        )
        mixed = []
        for index, op in enumerate(self.spec.ops):
            branch = cast(IBN | FusedIBN, self.branches[op])
            # What is times 0 has no gradient but that of its gate, for which its value is enough.
            with torch.set_grad_enabled(torch.is_grad_enabled() and index not in idle_ops):
                y = branch.relaxed(x, mixture)
            mixed.append(gates.op[index] * y)
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


def out_steps(spec: BlockSpec) -> Float[Tensor, "filters channels"]:
    """Per out-width, 1 for its channels and 0 for the others."""
    return _steps(torch.tensor(spec.filters))


def hidden_steps(
    spec: BlockSpec, in_filters: Sequence[int]
) -> Float[Tensor, "in_filters expand_ratios channels"]:
    """Per in-width and expansion, 1 for the hidden channels and 0 for the others."""
    return _steps(torch.outer(torch.tensor(in_filters), torch.tensor(spec.expand_ratios)))


def _steps(widths: Tensor) -> Tensor:
    return (torch.arange(int(widths.max())) < widths.unsqueeze(-1)).float()
