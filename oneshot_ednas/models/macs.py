"""Multiply-adds of any module, counted while it runs on shapes alone."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from oneshot_ednas.models.encoder import IMAGES, Encoder


def module_macs(module: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds of a module's convolutions and linear layers for one frame.

    A copy of the module runs on the meta device, where tensors have shapes and no values: nothing
    is computed, and the module's mode and BN statistics stay as they are.

    Args:
        module: on any device; what it computes may depend on shapes, not on values.
        inputs: `[batch, ...]` each; counted for the first of the batch.
    """
    counted = copy.deepcopy(module).to("meta").eval()
    frame = [x[:1].to("meta") for x in inputs]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(*frame)
    # A multiply-add is two operations.
    return int(counter.get_total_flops()) // 2


def encoder_macs(
    encoder: Encoder, image_size: tuple[int, int], out_channels: Mapping[str, int]
) -> tuple[list[int], dict[str, int]]:
    """Multiply-adds of each layer and of each task's decoder, for one image.

    Args:
        encoder: the backbone; of a space, a fixed one.
        image_size: height and width of the image.
        out_channels: output channels per task.
    """
    images = torch.empty(1, 3, *image_size, device="meta")
    outputs, layers = list[Tensor](), list[int]()
    for layer in encoder.layers:
        module = layer.build()
        reads = [images if index == IMAGES else outputs[index] for index in layer.reads]
        layers.append(module_macs(module, *reads))
        with torch.no_grad():
            outputs.append(module.to("meta").eval()(*reads))
    features = [outputs[index] for index in encoder.decoder_reads]
    return layers, {
        task: module_macs(encoder.build_decoder(count), *features)
        for task, count in out_channels.items()
    }
