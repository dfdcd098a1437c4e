"""Bidirectional feature fusion by plain sums.

Source: BiFPN of EfficientDet (Tan et al., CVPR 2020, section 3), with ReLU6 and unweighted sums
as in EDNAS (Vu et al., WACV 2023, section 3.1).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from oneshot_ednas.models.layers import ConvBN, SeparableConv
from oneshot_ednas.space import SearchSpace


class FusionNode(nn.Module):
    """Sum of the inputs, ReLU6, separable convolution with BN."""

    def __init__(self, channels: int, *, momentum: float) -> None:
        super().__init__()
        self.conv = SeparableConv(channels, channels, use_relu6=False, momentum=momentum)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Fuse two or three maps of one size."""
        total = inputs[0]
        for other in inputs[1:]:
            total = total + other
        return self.conv(F.relu6(total))


class BiFPNLayer(nn.Module):
    """One repeat: top-down to the finest level, then bottom-up.

    The last repeat is read at the finest level only, so it has no bottom-up nodes: they would be
    dead weight on the device.
    """

    def __init__(self, num_levels: int, channels: int, *, is_last: bool, momentum: float) -> None:
        super().__init__()
        count = num_levels - 1
        self.top_down = nn.ModuleList(FusionNode(channels, momentum=momentum) for _ in range(count))
        self.bottom_up = nn.ModuleList(
            FusionNode(channels, momentum=momentum) for _ in range(0 if is_last else count)
        )

    def forward(self, down_inputs: list[Tensor], up_inputs: list[Tensor]) -> list[Tensor]:
        """Fused maps, finest first.

        Args:
            down_inputs: one map per level for the top-down path, finest first.
            up_inputs: one map per level for the bottom-up path; the first is not used.
        """
        coarsest = len(down_inputs) - 1
        middle = [down_inputs[coarsest]]
        for node, level in zip(self.top_down, range(coarsest - 1, -1, -1), strict=True):
            x = down_inputs[level]
            middle.insert(0, node(x, F.interpolate(middle[0], size=x.shape[-2:], mode="nearest")))
        fused = [middle[0]]
        for node, level in zip(self.bottom_up, range(1, coarsest + 1), strict=False):
            below = F.max_pool2d(fused[-1], 2, ceil_mode=True)
            inputs = [up_inputs[level], below]
            if level < coarsest:
                inputs.insert(1, middle[level])
            fused.append(node(*inputs))
        return fused


class BiFPN(nn.Module):
    """Laterals to a common width, extra coarse levels, and the repeats."""

    def __init__(self, space: SearchSpace, *, momentum: float) -> None:
        super().__init__()
        fusion = space.fusion
        self.num_levels, channels = fusion.num_levels, fusion.channels
        widths = [max(space.blocks[tap - 1].filters) for tap in fusion.tap_blocks]

        def lateral(width: int) -> ConvBN:
            return ConvBN(width, channels, use_relu6=False, momentum=momentum)

        # As in EfficientDet, a tap above the finest has one lateral per path that reads it.
        self.down_laterals = nn.ModuleList(lateral(width) for width in widths)
        self.up_laterals = nn.ModuleList(lateral(width) for width in widths[1:])
        self.extra = lateral(widths[-1]) if self.num_levels > len(widths) else None
        last = fusion.num_repeats - 1
        self.layers = nn.ModuleList(
            BiFPNLayer(self.num_levels, channels, is_last=i == last, momentum=momentum)
            for i in range(fusion.num_repeats)
        )

    def forward(self, taps: list[Tensor]) -> Tensor:
        """The finest fused map.

        Args:
            taps: backbone features, finest first; leading channels only in a sliced run.
        """
        down = [conv(x) for conv, x in zip(self.down_laterals, taps, strict=True)]
        up = down[:1] + [conv(x) for conv, x in zip(self.up_laterals, taps[1:], strict=True)]
        if self.extra is not None:
            extra = F.max_pool2d(self.extra(taps[-1]), 2, ceil_mode=True)
            while True:
                down.append(extra)
                up.append(extra)
                if len(down) == self.num_levels:
                    break
                extra = F.max_pool2d(extra, 2, ceil_mode=True)
        for layer in self.layers:
            fused = layer(down, up)
            down = up = fused
        return fused[0]
