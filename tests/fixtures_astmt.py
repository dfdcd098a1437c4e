"""Writers of tiny ASTMT packs with known pixels."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 12, 16
NYUD_SPLITS = {"train": ("0003", "0001"), "val": ("0002",)}
PASCAL_SPLITS = {"train": ("2008_000003", "2008_000002"), "val": ("2010_000001",)}


@dataclass
class Person:
    """An object of class person: its rows in the image, and rows x columns of each part."""

    rows: slice
    parts: dict[str, tuple[slice, slice]]


def with_more(
    splits: dict[str, tuple[str, ...]], more_train: tuple[str, ...], more_val: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    return {"train": (*splits["train"], *more_train), "val": (*splits["val"], *more_val)}


def write_nyud_mt(root: Path, more_train: tuple[str, ...] = ()) -> dict[str, dict[str, np.ndarray]]:
    """NYUD_MT, with more frames of numbers up to 6; returns what was stored by frame and folder."""
    stored = {}
    for split, frames in with_more(NYUD_SPLITS, more_train, ()).items():
        write_text(root / f"gt_sets/{split}.txt", "\n".join(frames) + "\n")
        for frame in frames:
            stored[frame] = nyud_frame(int(frame))
            arrays = stored[frame]
            save_image(root / f"images/{frame}.jpg", arrays["images"])
            save_image(root / f"segmentation/{frame}.png", arrays["segmentation"])
            for folder in ("depth", "normals", "edge"):
                save_array(root / f"{folder}/{frame}.npy", arrays[folder])
    return stored


def nyud_frame(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    normals = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    normals[..., :4, 0], normals[..., 4:8, 1] = 1, -1  # right, up
    normals[..., 8:, 2] = 1  # towards the camera
    normals[0, 0] = 0
    depth = rng.uniform(0.7, 9.9, (HEIGHT, WIDTH)).astype(np.float32)
    depth[0, :3] = 0
    labels = rng.integers(0, 41, (HEIGHT, WIDTH)).astype(np.uint8)
    labels[1, :3] = 0, 1, 40
    return {
        "images": np.full((HEIGHT, WIDTH, 3), (40 * seed, 90, 200), np.uint8),
        "segmentation": labels,
        "depth": depth,
        "normals": normals,
        "edge": (rng.random((HEIGHT, WIDTH)) < 0.1).astype(np.float32),
    }


def write_pascal_mt(
    root: Path,
    labels: tuple[str, ...] = ("VOC12", "pascal-context"),
    more_train: tuple[str, ...] = (),
    more_val: tuple[str, ...] = (),
) -> dict[str, dict[str, np.ndarray]]:
    """PASCAL_MT; returns what was stored by frame and folder.

    Frame `2008_000003` shows two persons of whom one has parts, `2008_000002` a person without
    parts, `2010_000001` none. With two folders of labels the first holds all frames but the last.
    More frames, whose last digit is at most 6, show the persons of `2008_000003`.
    """
    persons = {
        "2008_000003": [
            Person(
                slice(0, 10),
                {"head": (slice(0, 2), slice(0, 4)), "rhand": (slice(4, 6), slice(2, 8))},
            ),
            Person(slice(10, 12), {}),
        ],
        "2008_000002": [Person(slice(0, 12), {})],
        "2010_000001": [],
    }
    persons |= dict.fromkeys((*more_train, *more_val), persons["2008_000003"])
    stored = {}
    for split, frames in with_more(PASCAL_SPLITS, more_train, more_val).items():
        write_text(root / f"ImageSets/Context/{split}.txt", "\n".join(frames) + "\n")
        for frame in frames:
            stored[frame] = arrays = pascal_frame(int(frame[-1]))
            save_image(root / f"JPEGImages/{frame}.jpg", arrays["JPEGImages"])
            for folder in labels:
                if folder == labels[-1] or frame != "2010_000001":
                    save_image(root / f"semseg/{folder}/{frame}.png", arrays[folder])
            for folder in ("normals_distill", "sal_distill"):
                save_image(root / f"{folder}/{frame}.png", arrays[folder])
            write_parts(root / f"human_parts/{frame}.mat", persons[frame])
    return stored


def pascal_frame(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    voc = np.zeros((HEIGHT, WIDTH), np.uint8)
    voc[:, 8:] = seed
    voc[6:, :4] = 15
    voc[0, 0] = 255
    normals = np.full((HEIGHT, WIDTH, 3), (128, 128, 255), np.uint8)  # towards the camera
    normals[:3], normals[3:6] = (255, 128, 128), (128, 255, 128)  # right, down
    normals[0, 0] = 128
    saliency = rng.integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    saliency[0, :4] = 0, 127, 128, 255
    return {
        "JPEGImages": np.full((HEIGHT, WIDTH, 3), (200, 40 * seed, 90), np.uint8),
        "VOC12": voc,
        "pascal-context": voc[:, ::-1],
        "normals_distill": normals,
        "sal_distill": saliency,
    }


def write_parts(path: Path, persons: list[Person], size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    """One file of PASCAL-Parts: a dog with a part, then these persons."""
    from scipy.io import savemat

    def mask(*where: slice) -> np.ndarray:
        found = np.zeros(size, np.uint8)
        found[where] = 1
        return found

    dog = struct_array([{"part_name": "head", "mask": mask(slice(8, 12))}])
    objects = [{"class": "dog", "class_ind": 12.0, "mask": mask(slice(8, 12)), "parts": dog}]
    for person in persons:
        parts = [{"part_name": name, "mask": mask(*where)} for name, where in person.parts.items()]
        objects.append(
            {
                "class": "person",
                "class_ind": 15.0,
                "mask": mask(person.rows),
                "parts": struct_array(parts) if parts else np.zeros((0, 0)),
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"anno": {"imname": path.stem, "objects": struct_array(objects)}})


def struct_array(rows: list[dict]) -> np.ndarray:
    """A 1 x n structure array of MATLAB."""
    found = np.zeros((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        for name, value in row.items():
            found[0, i][name] = value
    return found


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def save_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, quality=95)


def save_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
