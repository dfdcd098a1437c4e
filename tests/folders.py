"""A small data folder whose pixels are known, with its manifest."""

import numpy as np
import yaml
from PIL import Image

from oneshot_ednas.data.manifest import open_manifest

HEIGHT, WIDTH = 6, 8

LABELS = {
    "kind": "labels",
    "folder": "label",
    "suffix": ".png",
    "classes": ["wall", "floor", "chair"],
    "label_maps": {"two": {"classes": ["flat", "thing"], "map": [0, 255, 1]}},
}
DEPTH = {"kind": "depth", "folder": "depth", "suffix": ".png", "scale": 0.001, "max_metres": 10}
NORMALS = {
    "kind": "normals",
    "folder": "normal",
    "suffix": ".png",
    "encoding": "rgb",
    "axes": ["right", "forward", "up"],
    "invalid": [255, 255, 255],
}
TARGETS = {"segmentation": LABELS, "depth": DEPTH, "normals": NORMALS}


def layout(targets=TARGETS, **changes):
    """The manifest of the folder, with other targets or keys; None drops a key."""
    base = {
        "name": "toy",
        "image": {"folder": "rgb", "suffix": ".png"},
        "splits": {"train": "splits/train.txt"},
        "targets": targets,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def write_frame(root, frame="a", height=HEIGHT, width=WIDTH):
    """A frame whose pixels are known: a gradient, three label columns, depth in millimetres."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows * 10, columns * 10, rows * 0 + 7], axis=-1).astype(np.uint8)
    label = (columns % 3).astype(np.uint8)
    label[0, 0] = 255
    depth = (1000 + 100 * rows + columns).astype(np.uint16)
    depth[0, 1], depth[0, 2] = 0, 60000
    normal = np.full((height, width, 3), (255, 128, 128), dtype=np.uint8)
    normal[1] = (128, 0, 128)
    normal[2] = (128, 128, 255)
    normal[0, 0] = 255
    for folder, array in (("rgb", image), ("label", label), ("depth", depth), ("normal", normal)):
        path = root / folder / f"{frame}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return image, label, depth


def write_dataset(root, frames=("a", "b"), manifest=None):
    """The folder and its manifest, opened."""
    for frame in frames:
        write_frame(root, frame)
    (root / "splits").mkdir(exist_ok=True)
    (root / "splits/train.txt").write_text("\n".join(frames) + "\n", "utf-8")
    (root / "dataset.yaml").write_text(yaml.safe_dump(manifest or layout()))
    return open_manifest(root)


def open_with(root, target, array, *, name="map", **settings):
    """The folder with one target only, read from an array: a `.npy` file of frame a."""
    source = {"kind": target, "folder": name, "suffix": ".npy", **settings}
    (root / name).mkdir(parents=True, exist_ok=True)
    np.save(root / name / "a.npy", array)
    return write_dataset(root, frames=("a",), manifest=layout(targets={name: source}))


def read(data, height=HEIGHT, width=WIDTH, **options):
    """Frame a."""
    return data.read_frame("a", height=height, width=width, **options)
