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
    """Near is bright, far is dark, on a log scale from the nearest to the farthest pixel."""
    known = positive(depth_m)
    valid = np.isfinite(known)
    return _ramp(-np.log(np.where(valid, known, 1)), valid)


def disparity_picture(disparity: np.ndarray) -> np.ndarray:
    """As `depth_picture`: near, which is a large disparity, is bright."""
    known = positive(disparity)
    valid = np.isfinite(known)
    return _ramp(np.log(np.where(valid, known, 1)), valid)


def heatmap_picture(values: np.ndarray) -> np.ndarray:
    """Large is bright, small is dark, from the smallest to the largest value of the map."""
    valid = np.isfinite(values)
    return _ramp(np.where(valid, values, 0).astype(np.float64), valid)


def binary_picture(values: np.ndarray) -> np.ndarray:
    """Labels 0 and 1, or probabilities, from dark grey to white; invalid pixels black."""
    valid = np.isfinite(values) & (values != losses.INVALID_LABEL)
    light = np.rint(48 + 207 * np.where(valid, values, 0).clip(0, 1).astype(np.float64))
    return np.repeat(np.where(valid, light, 0).astype(np.uint8)[..., None], 3, axis=-1)


def positive(values: np.ndarray) -> np.ndarray:
    """The map with NaN where depth or disparity is unknown: not finite, or not above 0."""
    known = np.isfinite(values) & (values > 0)
    return np.where(known, values, np.nan).astype(np.float64)


def _ramp(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Colours whose lightness grows with the value, over the range of the valid ones.

    Source:
        Green, A colour scheme for the display of astronomical intensity images, 2011 (cubehelix)
    """
    if not valid.any():
        return np.zeros((*values.shape, 3), dtype=np.uint8)
    low, high = values[valid].min(), values[valid].max()
    share = (values - low) / (high - low) if high > low else np.ones_like(values)
    # From 0.2, so that the smallest value is not as black as an invalid pixel.
    light = 0.2 + 0.75 * share.clip(0, 1)
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
