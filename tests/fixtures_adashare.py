"""Small data sets in the lists of AdaShare and AutoMTL, with known pixels."""

import json

import fixtures_mtan
import numpy as np
from fixtures_mtan import HEIGHT, WIDTH
from PIL import Image

PREFIX = {"cityscapes": "cityscape", "nyuv2": "nyu_v2_3task", "taskonomy": "taskonomy"}
"""Name of each list without its suffix."""

WEIGHTS = np.linspace(0.5, 2.5, 17).astype(np.float32)


def rgb(number=0):
    """Bytes whose channels differ."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([rows * 10, columns * 10, rows * 0 + 7 + number], -1).astype(np.uint8)


def nyuv2_arrays(number=0):
    """One frame as stored, by column of the list."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    labels = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 40).astype(np.uint8)
    labels[:, -1] = 255
    normals = np.full((HEIGHT, WIDTH, 3), (128, 0, 128), np.uint8)
    normals[:, 0] = (255, 128, 128)
    normals[:, 1] = (128, 255, 128)
    normals[:, 2] = (128, 128, 255)
    normals[:, 3] = 255
    depth = (0.5 + rows + 0.25 * columns + number).astype(np.float32)
    depth[0, 0] = 0
    return {"image": rgb(number), "segmentation": labels, "normals": normals, "depth": depth}


def taskonomy_arrays(number=0):
    """One frame as stored, by column of the list."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    labels = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 18).astype(np.uint8)
    normals = np.full((HEIGHT, WIDTH, 3), (128, 128, 0), np.uint8)
    normals[:, 0] = (255, 128, 128)
    normals[:, 1] = (128, 255, 128)
    normals[:, 2] = (128, 128, 255)
    normals[:, 3] = 128
    depth = (512 * (1 + rows) + 64 * columns + number).astype(np.uint16)
    depth[0, :4] = 0, 64499, 64500, 65535
    keypoints = (rows * 20 + columns).astype(np.uint16)
    edges = (rows * 4000 + columns).astype(np.uint16)
    edges[0, 0] = 65535
    return {
        "image": rgb(number),
        "segmentation": labels,
        "normals": normals,
        "depth": depth,
        "keypoints": keypoints,
        "edge_texture": edges,
    }


def save(root, path, array):
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".npy":
        np.save(target, array)
    else:
        Image.fromarray(array).save(target)
    return path


def write_list(root, data_set, splits):
    path = root / f"{PREFIX[data_set]}.json"
    path.write_text(json.dumps(splits))
    return root


def write_cityscapes(root):
    """Four training frames, of which train1 and train2 have two each, and a test frame."""
    rows = []
    for number in range(5):
        arrays, split = fixtures_mtan.frame_arrays(number), "test" if number == 4 else "train"
        row = [save(root, f"{split}/image/{number}.npy", arrays["image"])]
        row.append(save(root, f"{split}/depth/{number}.npy", arrays["disparity"]))
        for count in (2, 7, 19):
            array = fixtures_mtan.labels(count)
            row.append(save(root, f"{split}/label_{count}/{number}.npy", array))
        rows.append(row)
    splits = {"train": rows[:4], "train1": rows[:2], "train2": rows[2:4], "test": rows[4:]}
    return write_list(root, "cityscapes", splits)


def write_nyuv2(root, num_train=2):
    """Training frames and a test frame."""
    rows = []
    for number in range(num_train + 1):
        arrays, name = nyuv2_arrays(number), f"{number:04d}"
        rows.append(
            [
                save(root, f"img/{name}.png", arrays["image"]),
                save(root, f"seg/{name}.png", arrays["segmentation"]),
                save(root, f"normal_mask/{name}.png", arrays["normals"]),
                save(root, f"depth/{name}.npy", arrays["depth"]),
            ]
        )
    return write_list(root, "nyuv2", {"train": rows[:-1], "test": rows[-1:]})


def write_taskonomy(root, num_train=1):
    """Training frames and a test frame of one building, and the weights of the classes."""
    domains = ("rgb", "segmentsemantic", "normal", "depth_zbuffer", "keypoints2d", "edge_texture")
    rows = []
    for number in range(num_train + 1):
        arrays = taskonomy_arrays(number).values()
        frame = f"point_{number}_view_0_domain"
        pairs = zip(domains, arrays, strict=True)
        rows.append([save(root, f"hall/{d}/{frame}_{d}.png", array) for d, array in pairs])
    np.save(root / "semseg_prior_factor.npy", WEIGHTS)
    return write_list(root, "taskonomy", {"train": rows[:-1], "test": rows[-1:]})
