"""Writer of a tiny Cityscapes with known pixels."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 12, 16
FRAMES = {
    "train": (
        "aachen/aachen_000001_000019",
        "aachen/aachen_000000_000019",
        "ulm/ulm_000000_000019",
    ),
    "val": ("lindau/lindau_000000_000019",),
}
BASELINE, FX = 0.25, 2048.0  # metres, pixels


def write_cityscapes(
    root: Path, kinds: tuple[str, ...] = ("disparity", "camera")
) -> dict[str, dict[str, np.ndarray]]:
    """Cityscapes of three and one frames; returns what was stored by frame id and kind."""
    stored = {}
    for split, frames in {**FRAMES, "test": ("berlin/berlin_000000_000019",)}.items():
        for i, frame in enumerate(frames):
            arrays = frame_arrays(i)
            if split != "test":
                stored[f"{split}/{frame}"] = arrays
            save(root, "leftImg8bit", split, frame, ".png", arrays["leftImg8bit"])
            save(root, "gtFine", split, frame, "_labelIds.png", arrays["gtFine"])
            save(root, "gtFine", split, frame, "_color.png", arrays["leftImg8bit"])
            if "disparity" in kinds:
                save(root, "disparity", split, frame, ".png", arrays["disparity"])
            if "camera" in kinds:
                path = root / f"camera/{split}/{frame}_camera.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(
                    json.dumps(
                        {
                            "extrinsic": {"baseline": BASELINE, "pitch": 0.03},
                            "intrinsic": {"fx": FX + i, "fy": 2200.0, "u0": 1000.0, "v0": 500.0},
                        }
                    )
                )
    return stored


def frame_arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 34, (HEIGHT, WIDTH)).astype(np.uint8)
    labels.flat[:34] = np.arange(34)
    disparity = rng.integers(2, 30000, (HEIGHT, WIDTH)).astype(np.uint16)
    disparity[0, :4] = 0, 1, 2, 2049  # not measured, infinitely far, 1/256 pixel, 8 pixels
    return {
        "leftImg8bit": rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8),
        "gtFine": labels,
        "disparity": disparity,
    }


def save(root: Path, kind: str, split: str, frame: str, end: str, array: np.ndarray) -> None:
    path = root / f"{kind}/{split}/{frame}_{kind}{end}"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
