"""Random flips, scales, crops and colours of whole batches, the same for an image and its targets.

Targets have a geometry of their own: a mirrored image negates the x of its normals, and an image
enlarged by s shows a scene that is s times nearer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from oneshot_ednas.constants import constant
from oneshot_ednas.data.targets import TARGET_KINDS

# Rec. 601 weights of the brightness of an RGB pixel.
_LUMA = (0.299, 0.587, 0.114)
# Columns of the table of draws.
_FLIP, _SCALE, _SHIFT_X, _SHIFT_Y, _BRIGHTNESS, _CONTRAST, _COLOUR = range(7)
_NUM_DRAWS = 7


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Which augmentations are drawn, and how strong; the default is none."""

    flip: bool = False
    """Mirror every second image from left to right."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest enlargement. The result keeps the batch's size: above 1 a random part
    is shown, below 1 the image lies at a random place, surrounded by invalid pixels."""
    brightness: float = 0.0
    """Largest relative change of brightness, 0..1."""
    contrast: float = 0.0
    """Largest relative change of contrast, 0..1."""
    colour: float = 0.0
    """Largest relative change of saturation, 0..1."""

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high < math.inf:
            raise ValueError(f"scale: expected 0 < smallest <= largest, got {low:g} and {high:g}")
        for name in ("brightness", "contrast", "colour"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0..1, got {getattr(self, name):g}")


def augment(
    batch: dict[str, Tensor],
    config: AugmentConfig,
    generator: torch.Generator,
    kinds: Mapping[str, str],
) -> dict[str, Tensor]:
    """A randomly changed copy of a training batch; every sample is drawn for itself.

    The image is interpolated; targets take the nearest pixel, so that no label, depth or normal
    arises that nobody measured. Pixels from outside the image are mid-grey and invalid.

    Args:
        batch: `image` float32 [B, 3, H, W] in -1..1 and targets, as `PackedSplit.batch` returns.
        config: what to draw.
        generator: on the CPU, whatever the batch's device; the result is a function of the batch,
            the config and the generator's state. Each sample takes the same number of draws under
            any config, so that configs can be compared sample by sample.
        kinds: row in `TARGET_KINDS` of each target.

    Raises:
        ValueError: if the batch has no image, or a target that is not known here.
    """
    if "image" not in batch:
        raise ValueError(f"expected a batch with an image, got {sorted(batch)}")
    unknown = sorted(set(batch) - {"image", *kinds})
    if unknown:
        raise ValueError(f"no kind is given for the target {unknown[0]}; given are {sorted(kinds)}")
    image = batch["image"]
    draws = torch.rand(len(image), _NUM_DRAWS, generator=generator)
    draws = draws.to(image.device, non_blocking=True)
    result = dict(batch)
    if config.brightness or config.contrast or config.colour:
        result["image"] = _jitter(image, config, draws)
    is_flipped = draws[:, _FLIP] < 0.5 if config.flip else None
    if config.scale != (1.0, 1.0):
        return _scale(result, config.scale, draws, is_flipped, kinds)
    return result if is_flipped is None else _flip(result, is_flipped, kinds)


def skip_samples(generator: torch.Generator, num_samples: int) -> None:
    """Leave out the draws of that many samples, so that those after them are changed as ever."""
    torch.rand(num_samples, _NUM_DRAWS, generator=generator)


def _jitter(
    image: Float[Tensor, "batch 3 height width"], config: AugmentConfig, draws: Tensor
) -> Float[Tensor, "batch 3 height width"]:
    """Brightness, then contrast about the mean grey, then saturation, as one linear map."""
    spread = draws * 2 - 1
    brightness = 1 + config.brightness * spread[:, _BRIGHTNESS]
    contrast = 1 + config.contrast * spread[:, _CONTRAST]
    colour = 1 + config.colour * spread[:, _COLOUR]
    luma = constant(_LUMA, image)
    # Each step keeps greys grey, so with x in 0..1 all three together are
    # x -> matrix x + (1 - contrast) * mean brightness of the brightened image.
    saturate = colour[:, None, None] * torch.eye(3, device=image.device) + (
        1 - colour[:, None, None]
    ) * luma.expand(3, 3)
    matrix = (brightness * contrast)[:, None, None] * saturate
    mean = ((image.mean(dim=(2, 3)) + 1) / 2 * luma).sum(dim=1) * brightness
    shift = (1 - contrast) * mean
    # In -1..1, y = 2 (matrix (x + 1) / 2 + shift) - 1.
    bias = matrix.sum(dim=2, keepdim=True) + (2 * shift - 1)[:, None, None]
    mixed = torch.baddbmm(bias, matrix, image.flatten(2))
    return mixed.clamp_(-1, 1).view_as(image)


def _scale(
    batch: dict[str, Tensor],
    limits: tuple[float, float],
    draws: Tensor,
    is_flipped: Tensor | None,
    kinds: Mapping[str, str],
) -> dict[str, Tensor]:
    """Enlarge each sample about a random place, and mirror the chosen ones on the way."""
    image = batch["image"]
    size, (height, width) = len(image), image.shape[-2:]
    low, high = limits
    scale = low + (high - low) * draws[:, _SCALE]
    # Source position of a pixel at x, both in -1..1 over the image: x / scale + shift. The largest
    # shift keeps the part inside the image, or the image inside the frame.
    reach = (1 - 1 / scale).abs()
    x = _centres(width, image) / scale[:, None] + ((draws[:, _SHIFT_X] * 2 - 1) * reach)[:, None]
    if is_flipped is not None:
        x = torch.where(is_flipped[:, None], x.flip(1), x)
    y = _centres(height, image) / scale[:, None] + ((draws[:, _SHIFT_Y] * 2 - 1) * reach)[:, None]
    # Between the outermost pixel centre and the border there is nothing to blend with. (That is
    # grid_sample's padding_mode="border", too, which Apple's GPUs do not have before torch 2.13.)
    column = x.clamp(1 / width - 1, 1 - 1 / width)
    row = y.clamp(1 / height - 1, 1 - 1 / height)
    grid = torch.stack(torch.broadcast_tensors(column[:, None, :], row[:, :, None]), dim=-1)
    result = dict(batch)
    result["image"] = F.grid_sample(image, grid, align_corners=False)
    # Nearest pixels of an axis-aligned map: one row and one column index per pixel of the border.
    columns, inside_x = _nearest(x, width)
    rows, inside_y = _nearest(y, height)
    if low < 1:
        inside = inside_y[:, None, :, None] & inside_x[:, None, None, :]
        result["image"] = torch.where(inside, result["image"], 0)
    flat = (rows[:, :, None] * width + columns[:, None, :]).view(size, 1, -1)

    for name, target in batch.items():
        if name == "image":
            continue
        kind = TARGET_KINDS[kinds[name]]
        if kind.resize == "any" and low < 1:
            target = _grown(target, scale, low)
        planes = target.view(size, -1, height * width)
        picked = planes.gather(2, flat.expand(-1, planes.shape[1], -1))
        picked = picked.view(size, -1, height, width)
        # In place: on a CPU most of the time goes into memory that is new.
        if kind.enlarged:
            picked.div_(scale[:, None, None, None] ** -kind.enlarged)
        if is_flipped is not None and kind.mirrored != (1.0,):
            factors = torch.where(is_flipped[:, None], constant(kind.mirrored, picked), 1)
            picked.mul_(factors[:, :, None, None])
        if low < 1:
            picked = torch.where(inside, picked, kind.invalid)
        result[name] = picked.view_as(target).to(target.dtype)
    return result


def _grown(
    target: Int64[Tensor, "batch height width"], scale: Tensor, low: float
) -> Int64[Tensor, "batch height width"]:
    """Maps of 0 and 1 in which lines are so wide that none is lost between the picked pixels."""
    side = 2 * math.ceil(0.5 / low) + 1
    lines = (target == 1).float().unsqueeze(1)
    grown = F.max_pool2d(lines, side, stride=1, padding=side // 2).squeeze(1) > 0
    is_shrunk = (scale < 1).view(-1, 1, 1)
    return torch.where(is_shrunk & grown & (target == 0), 1, target)


def _centres(pixels: int, like: Tensor) -> Float[Tensor, " pixels"]:
    """Pixel centres in -1..1 over the image, as `grid_sample` without aligned corners counts."""
    return (torch.arange(pixels, device=like.device, dtype=like.dtype) * 2 + 1) / pixels - 1


def _nearest(position: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Index of the pixel that each position in -1..1 lies in, and whether it lies in one."""
    index = ((position + 1) * (pixels / 2)).floor().long()
    return index.clamp(0, pixels - 1), (index >= 0) & (index < pixels)


def _flip(batch: dict[str, Tensor], chosen: Tensor, kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """Mirror the chosen samples from left to right."""
    result = {}
    for name, tensor in batch.items():
        mirrored = tensor.flip(-1)
        factors = TARGET_KINDS[kinds[name]].mirrored if name != "image" else (1.0,)
        if factors != (1.0,):
            mirrored = mirrored * constant(factors, mirrored).view(-1, 1, 1)
        result[name] = torch.where(chosen.view(-1, *[1] * (tensor.ndim - 1)), mirrored, tensor)
    return result
