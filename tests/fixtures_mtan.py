"""Small packs in the layout of MTAN, with known pixels."""

import numpy as np

HEIGHT, WIDTH = 12, 16
DIRECTIONS = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1)], np.float32)
"""Stored vectors of the first three columns; the fourth has none."""


def frame_arrays(number=0):
    """One frame as stored: arrays by folder."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    disparity = (1000 * rows + 10 * columns + number).astype(np.float64) / 65535
    depth = 0.5 + rows + 0.25 * columns + number
    depth[0, 0] = 0
    normal = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    normal[:, :3] = DIRECTIONS
    normal[:, 4:] = -DIRECTIONS[1]
    return {
        "image": np.stack([rows / 20, columns / 20, np.ones_like(rows)], -1).astype(np.float32),
        "disparity": disparity[..., None].astype(np.float32),
        "depth": depth[..., None].astype(np.float32),
        "normal": normal,
    }


def labels(num_classes):
    """Every class in turn along a row, and a column of ignored pixels."""
    found = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % num_classes
    found[:, -1] = -1
    return found.astype(np.float32)


def save(root, folder, number, array):
    (root / folder).mkdir(parents=True, exist_ok=True)
    np.save(root / folder / f"{number}.npy", array)


def write_cityscapes(root, numbers=(0, 1), folders=("label_7",), splits=("train", "val")):
    """A pack of Cityscapes; labels have as many classes as their folder says, or else 7."""
    for split in splits:
        for number in numbers:
            arrays = frame_arrays(number)
            save(root, f"{split}/image", number, arrays["image"])
            save(root, f"{split}/depth", number, arrays["disparity"])
            for folder in folders:
                count = folder.removeprefix("label").removeprefix("_")
                save(root, f"{split}/{folder}", number, labels(int(count or 7)))
    return root


def write_nyuv2(root, numbers=(0, 1), splits=("train", "val")):
    """A pack of NYUv2."""
    for split in splits:
        for number in numbers:
            arrays = frame_arrays(number)
            for folder in ("image", "depth", "normal"):
                save(root, f"{split}/{folder}", number, arrays[folder])
            save(root, f"{split}/label", number, labels(13))
    return root
