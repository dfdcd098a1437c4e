"""The baseline of relaxed blocks: a mixture that runs each option as a module of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneshot_ednas.architecture import BlockArchitecture
from oneshot_ednas.latency.operations import block_options
from oneshot_ednas.models.layers import ElasticBatchNorm, conv_same, conv_weight
from oneshot_ednas.relaxation import BlockGates
from oneshot_ednas.space import CHOICE_FIELDS, BlockSpec


class PathBlock(nn.Module):
    """One option of a block with weights of its own, without the residual."""

    def __init__(self, block: BlockArchitecture, in_filters: int, stride: int) -> None:
        super().__init__()
        self.stride, side = stride, block.kernel_size
        hidden = block.expand_ratio * in_filters
        self.is_fused = block.op == "fused_ibn"
        self.has_expand = self.is_fused or block.expand_ratio > 1
        if self.has_expand:
            expand_side = side if self.is_fused else 1
            self.expand = conv_weight(hidden, in_filters, expand_side, expand_side)
            self.expand_bn = ElasticBatchNorm(hidden, momentum=0.0)
        if not self.is_fused:
            self.depthwise = conv_weight(hidden, 1, side, side)
            self.depthwise_bn = ElasticBatchNorm(hidden, momentum=0.0)
        self.project = conv_weight(block.filters, hidden, 1, 1)
        self.project_bn = ElasticBatchNorm(block.filters, momentum=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, filters, height, width]` from the block's input."""
        if self.has_expand:
            stride = self.stride if self.is_fused else 1
            x = F.relu6(self.expand_bn(conv_same(x, self.expand, stride)))
        if not self.is_fused:
            y = conv_same(x, self.depthwise, self.stride, depthwise=True)
            x = F.relu6(self.depthwise_bn(y))
        return self.project_bn(F.conv2d(x, self.project))


class PathMixture(nn.Module):
    """All options of a block side by side: 2 x 2 x 2 x 4 = 32 paths in EDNAS' space.

    Each path reads the whole input, at the largest in-width, and its output counts by the product
    of its gates, padded to the largest width. The residual is that of a relaxed block.

    Source:
        The mixed operation of DARTS (Liu et al., ICLR 2019, eq. 2), with factorised weights.
    """

    def __init__(self, spec: BlockSpec, in_filters: Sequence[int]) -> None:
        super().__init__()
        self.spec, self.in_filters = spec, tuple(in_filters)
        self.options = tuple(block_options(spec))
        self.paths = nn.ModuleList(
            PathBlock(option, max(in_filters), spec.stride) for option in self.options
        )

    def forward(self, x: Tensor, gates: BlockGates, in_gate: Tensor) -> Tensor:
        """The mixture, `[batch, largest width, height, width]`.

        Args:
            x: `[batch, largest in-width, height, width]`.
            gates: the block's.
            in_gate: over the in-width options, for the residual.
        """
        widest = max(self.spec.filters)
        total: Tensor | None = None
        for option, path in zip(self.options, self.paths, strict=True):
            gate = torch.stack(
                [
                    vector[self.spec.options(field).index(getattr(option, field))]
                    for field, vector in zip(CHOICE_FIELDS, gates, strict=True)
                ]
            ).prod()
            y = F.pad(gate * path(x), (0, 0, 0, 0, 0, widest - option.filters))
            total = y if total is None else total + y
        assert total is not None
        return total + self._residual(x, gates, in_gate, widest)

    def _residual(
        self, x: Tensor, gates: BlockGates, in_gate: Tensor, widest: int
    ) -> Tensor | float:
        pairs = [
            (i, self.spec.filters.index(width))
            for i, width in enumerate(self.in_filters)
            if width in self.spec.filters and self.spec.stride == 1
        ]
        if not pairs:
            return 0.0
        gate = torch.stack([in_gate[i] * gates.filters[j] for i, j in pairs]).sum()
        channels = min(x.shape[1], widest)
        return gate * F.pad(x[:, :channels], (0, 0, 0, 0, 0, widest - channels))
