"""Maps as colours, for people: one function per kind of task."""

import colorsys
import functools

import numpy as np

from oneshot_ednas.tasks import losses, metrics


@functools.cache
def class_colours(num_classes: int) -> np.ndarray:
    """One RGB colour per class, in a table of 256 rows; the rows of no class are black."""
    # Steps of the golden ratio spread any number of hues evenly; brightness tells neighbours apart.
    colours = [
        colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.9, 0.55)[i // 2 % 2], (1.0, 0.75, 0.5)[i % 3])
        for i in range(num_classes)
    ]
    palette = np.zeros((losses.INVALID_LABEL + 1, 3), dtype=np.uint8)
    palette[:num_classes] = np.rint(np.array(colours) * 255)
    return palette


def segmentation_picture(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Each class in its colour, invalid pixels black.

    Raises:
        ValueError: for a label out of range.
    """
    metrics.check_labels(labels, num_classes, "picture")
    return class_colours(num_classes)[labels]


def depth_picture(depth_m: np.ndarray) -> np.ndarray:
    """Near is bright, far is dark, on a log scale from the nearest to the farthest pixel.

    Source:
        Green, A colour scheme for the display of astronomical intensity images, 2011 (cubehelix)
    """
    valid = np.isfinite(depth_m) & (depth_m > 0)
    if not valid.any():
        return np.zeros((*depth_m.shape, 3), dtype=np.uint8)
    log_depth = np.log(np.where(valid, depth_m, depth_m[valid].max()).astype(np.float64))
    low, high = log_depth.min(), log_depth.max()
    # From 0.95 down to 0.2, so that the farthest pixel is not as black as an invalid one.
    light = 0.95 - 0.75 * (log_depth - low) / max(high - low, 1e-12)
    angle = 2 * np.pi * (0.5 / 3 + 1 - 1.5 * light)
    swing = light * (1 - light) / 2
    hue = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    mix = np.array([[-0.14861, 1.78277], [-0.29227, -0.90649], [1.97294, 0.0]])
    colour = light[..., None] + swing[..., None] * (hue @ mix.T)
    return np.where(valid[..., None], np.rint(colour.clip(0, 1) * 255), 0).astype(np.uint8)


def normals_picture(normals: np.ndarray) -> np.ndarray:
    """x, y and z as red, green and blue from -1 to 1, invalid pixels black."""
    vectors = normals.astype(np.float64)
    valid = (np.isfinite(vectors).all(axis=-1) & (vectors != 0).any(axis=-1))[..., None]
    colour = np.rint((np.where(valid, vectors, 0).clip(-1, 1) + 1) * 127.5)
    return np.where(valid, colour, 0).astype(np.uint8)
