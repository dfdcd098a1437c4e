"""Fused features to one dense map per task."""

from typing import cast

from torch import Tensor, nn

from oneshot_ednas.models.layers import SeparableConv, conv_same, conv_weight
from oneshot_ednas.space import SearchSpace


class Head(nn.Module):
    """Separable convolutions, then a separable classifier with bias and no BN."""

    def __init__(self, space: SearchSpace, out_channels: int, *, momentum: float) -> None:
        super().__init__()
        channels = space.fusion.channels
        self.convs = nn.Sequential(
            *(
                SeparableConv(channels, channels, use_relu6=True, momentum=momentum)
                for _ in range(space.head.num_convs)
            )
        )
        self.depthwise = conv_weight(channels, 1, 3, 3)
        self.classifier = nn.Conv2d(channels, out_channels, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.classifier.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Raw map `[batch, out_channels, height, width]` at the finest level."""
        return self.classifier(conv_same(self.convs(x), self.depthwise, 1, depthwise=True))
