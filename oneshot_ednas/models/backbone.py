"""Stem and elastic blocks: images to the features of the tapped levels."""

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.models.blocks import ElasticBlock, SharingConfig
from oneshot_ednas.models.layers import ConvBN
from oneshot_ednas.relaxation import Gates, HardGates
from oneshot_ednas.space import SearchSpace


class Backbone(nn.Module):
    """The searched part of the network."""

    def __init__(
        self, space: SearchSpace, *, momentum: float, sharing: SharingConfig = SharingConfig()
    ) -> None:
        super().__init__()
        self.checkpoint_activations = False
        """Whether a block's activations are computed again for the backward pass."""
        self.tap_blocks = space.fusion.tap_blocks
        self.stem = ConvBN(3, space.stem_filters, kernel_size=3, stride=2, momentum=momentum)
        self.blocks = nn.ModuleList(
            ElasticBlock(spec, space.in_filters(index), momentum=momentum, sharing=sharing)
            for index, spec in enumerate(space.blocks)
        )

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], run: Architecture | Gates
    ) -> list[Tensor]:
        """Features of the tapped blocks, finest first.

        Args:
            images: normalised images.
            run: an architecture (sliced run) or gates (relaxed run, features at full width).
        """
        x = self.stem(images)
        taps = []
        in_gate = x.new_ones(1)
        idle_ops = run.idle_ops if isinstance(run, HardGates) else ((),) * len(self.blocks)
        for number, block in enumerate(self.blocks, start=1):
            gates = run.blocks[number - 1] if isinstance(run, Architecture) else run[number - 1]
            if self.checkpoint_activations and self.training:
                # A supernet's BN keeps no statistics, so nothing is counted twice.
                x = checkpoint(
                    block,
                    x,
                    gates,
                    in_gate,
                    idle_ops[number - 1],
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x = block(x, gates, in_gate, idle_ops[number - 1])
            if not isinstance(run, Architecture):
                in_gate = gates.filters
            if number in self.tap_blocks:
                taps.append(x)
        return taps

    def own_weights(self, architecture: Architecture) -> dict[str, Tensor]:
        """By name, what an architecture has that is no leading part of the tensor of that name."""
        found, in_filters = dict[str, Tensor](), self.stem.weight.shape[0]
        for index, block in enumerate(architecture.blocks):
            own = cast(ElasticBlock, self.blocks[index]).own_weights(in_filters, block)
            found |= {f"blocks.{index}.{name}": tensor for name, tensor in own.items()}
            in_filters = block.filters
        return found
