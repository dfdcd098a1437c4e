"""Writer of a tiny `nyu_depth_v2_labeled.mat` and the files beside it, with known pixels."""

from pathlib import Path

import numpy as np

NUM_FRAMES, HEIGHT, WIDTH = 5, 12, 16
TRAIN, TEST = (4, 1, 2), (5, 3)  # MATLAB counts from 1
MAP_CLASS = (40, 1, 0, 22, 5, 1, 12)  # of the stored labels 1..7; 0 is no class


def write_nyuv2_mat(
    root: Path, size: tuple[int, int] = (HEIGHT, WIDTH), frames: int = NUM_FRAMES
) -> dict[str, np.ndarray]:
    """All three files; returns the stored arrays, frames first: images HWC, depths, labels."""
    arrays = stored_arrays(size, frames)
    write_frames(root, arrays)
    write_splits(root)
    write_class_mapping(root)
    return arrays


def stored_arrays(size: tuple[int, int], frames: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(MAP_CLASS) + 1, (frames, *size)).astype(np.uint16)
    labels[:, 0, : len(MAP_CLASS) + 1] = np.arange(len(MAP_CLASS) + 1)
    return {
        "images": rng.integers(0, 256, (frames, *size, 3)).astype(np.uint8),
        "depths": rng.uniform(0.7, 9.9, (frames, *size)).astype(np.float32),
        "labels": labels,
    }


def write_frames(root: Path, arrays: dict[str, np.ndarray]) -> None:
    """As MATLAB writes: axes reversed, so that the frames come first, then columns, then rows."""
    import h5py

    root.mkdir(parents=True, exist_ok=True)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        for name, array in arrays.items():
            file[name] = array.transpose(0, *reversed(range(1, array.ndim)))
        texts = [file.create_dataset(f"#refs#/{i}", data=[i]) for i in range(len(MAP_CLASS))]
        file.create_dataset("names", data=[[text.ref for text in texts]], dtype=h5py.ref_dtype)


def write_splits(root: Path, train: tuple = TRAIN, test: tuple = TEST) -> None:
    from scipy.io import savemat

    columns = {name: np.array([v], float).T for name, v in (("train", train), ("test", test))}
    savemat(root / "splits.mat", {"trainNdxs": columns["train"], "testNdxs": columns["test"]})


def write_class_mapping(root: Path, map_class: tuple = MAP_CLASS) -> None:
    from scipy.io import savemat

    savemat(root / "classMapping40.mat", {"mapClass": np.array([map_class], float)})
