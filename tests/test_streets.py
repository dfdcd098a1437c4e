import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.data import streets
from oneshot_ednas.data.street_scene import CLASSES, SKY
from oneshot_ednas.data.streets import MAX_DEPTH_M, intrinsics, render_frame

ROAD, BUILDING = CLASSES.index("road"), CLASSES.index("building")


def small_frame(index: int, split: str = "train") -> dict[str, np.ndarray]:
    return render_frame(index, height=32, width=64, split=split)


@pytest.fixture(scope="module")
def frames() -> list[dict[str, np.ndarray]]:
    return [small_frame(index) for index in range(20)]


def digest(frame: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(frame[name].tobytes() for name in sorted(frame))).hexdigest()


def viewing_rays(height: int, width: int) -> np.ndarray:
    focal, x, y = intrinsics(height, width)
    rows, columns = np.indices((height, width)) + 0.5
    return np.stack([(columns - x) / focal, (rows - y) / focal, np.ones((height, width))], -1)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(
    index=st.integers(0, 2**40),
    split=st.sampled_from(streets.SPLITS),
    size=st.tuples(st.integers(16, 40), st.integers(16, 60)),
)
def test_every_frame_keeps_the_data_contract(index, split, size):
    frame = render_frame(index, height=size[0], width=size[1], split=split)
    assert {name: (array.dtype.name, array.shape) for name, array in frame.items()} == {
        "image": ("uint8", (*size, 3)),
        "segmentation": ("uint8", size),
        "depth": ("float32", size),
        "normals": ("float16", (*size, 3)),
    }
    assert all(array.flags.c_contiguous for array in frame.values())
    sky, depth = frame["segmentation"] == SKY, frame["depth"]
    normals = frame["normals"].astype(np.float64)
    assert frame["segmentation"].max() < len(CLASSES)
    assert depth.min() >= 0
    assert depth.max() <= MAX_DEPTH_M
    assert (depth[sky] == 0).all()
    assert (normals[sky] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(normals[~sky], axis=-1), 1, atol=2e-3)
    # Half precision moves a normal seen edge-on by up to 5e-4.
    assert ((normals * viewing_rays(*size)).sum(-1) <= 2e-3).all()


def test_a_frame_is_the_same_bit_for_bit_after_other_frames():
    first = digest(small_frame(3))
    small_frame(4)
    np.random.default_rng(0).random(5)
    assert digest(small_frame(3)) == first


def test_a_frame_is_the_same_bit_for_bit_in_another_process_with_other_threads():
    program = (
        "import hashlib\n"
        "from oneshot_ednas.data.streets import render_frame\n"
        "frame = render_frame(7, split='val')\n"
        "data = b''.join(frame[name].tobytes() for name in sorted(frame))\n"
        "print(hashlib.sha256(data).hexdigest())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "5"},
    )
    assert answer.stdout.strip() == digest(render_frame(7, split="val"))


def test_the_labels_of_frame_0_have_not_changed():
    # A change here means different data: raise RENDERER_VERSION, then print this count anew.
    assert streets.RENDERER_VERSION == 1
    counts = np.bincount(small_frame(0)["segmentation"].ravel(), minlength=len(CLASSES))
    expected = [784, 92, 546, 36, 188, 261, 70, 47, 19, 5]
    # Rounding may differ between processors: a few pixels on an edge may change sides.
    np.testing.assert_allclose(counts, expected, atol=3)


def test_no_two_indices_or_splits_share_a_scene():
    labels = {
        small_frame(index, split)["segmentation"].tobytes()
        for index in range(4)
        for split in streets.SPLITS
    }
    assert len(labels) == 4 * len(streets.SPLITS)


def test_every_class_occurs_and_none_takes_half_of_all_pixels(frames):
    labels = np.stack([frame["segmentation"] for frame in frames])
    share = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
    assert share.min() > 0.003, dict(zip(CLASSES, share, strict=True))
    assert share.max() < 0.5


def test_images_vary_within_and_between_frames(frames):
    images = np.stack([frame["image"] for frame in frames]).astype(float)
    assert images.std(axis=(1, 2)).min() > 5
    assert images.mean(axis=(1, 2, 3)).std() > 10
    assert ((images == 0) | (images == 255)).mean() < 0.1


def test_colour_alone_does_not_give_the_class(frames):
    colours = np.concatenate([frame["image"].reshape(-1, 3) for frame in frames]).astype(float)
    labels = np.concatenate([frame["segmentation"].ravel() for frame in frames])
    means = np.stack([colours[labels == label].mean(0) for label in range(len(CLASSES))])
    guess = ((colours[:, None] - means) ** 2).sum(-1).argmin(1)
    recall = [(guess[labels == label] == label).mean() for label in range(len(CLASSES))]
    assert np.mean(recall) < 0.4


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_road_normals_are_those_of_the_plane_through_the_road(index):
    frame = render_frame(index, height=32, width=64)
    road = (frame["segmentation"] == ROAD) & (frame["depth"] > 0)
    points = viewing_rays(32, 64)[road] * frame["depth"][road][:, None].astype(float)
    plane = np.linalg.lstsq(points, np.ones(len(points)), rcond=None)[0]  # plane @ point = 1
    camera_height_m = 1 / np.linalg.norm(plane)
    sin_pitch = plane[2] * camera_height_m
    normals = frame["normals"][road].astype(float)
    np.testing.assert_allclose(points @ plane, 1, atol=1e-5)
    assert 1.2 <= camera_height_m <= 2.3
    assert abs(plane[0]) < 1e-6  # the camera does not roll
    assert (normals[:, 0] == 0).all()
    np.testing.assert_allclose(normals[:, 1], -np.sqrt(1 - sin_pitch**2), atol=1e-3)
    np.testing.assert_allclose(normals[:, 2], -sin_pitch, atol=1e-3)


def test_wall_normals_are_perpendicular_to_the_steps_between_neighbouring_points(frames):
    rays = viewing_rays(32, 64)
    slants = []
    for frame in frames:
        points, normals = rays * frame["depth"][..., None], frame["normals"].astype(float)
        wall = (frame["segmentation"] == BUILDING) & (frame["depth"] > 0)
        pair = wall[:, 1:] & wall[:, :-1] & (normals[:, 1:] == normals[:, :-1]).all(-1)
        step = (points[:, 1:] - points[:, :-1])[pair]
        slants.append(np.abs((step * normals[:, 1:][pair]).sum(-1)) / np.linalg.norm(step, axis=-1))
    slant = np.concatenate(slants)
    assert len(slant) > 1000
    assert np.median(slant) < 1e-3
    assert (slant < 5e-3).mean() > 0.9  # the others cross from one house to the next


def test_three_times_the_resolution_shows_the_same_scene():
    coarse, fine = small_frame(5), render_frame(5, height=96, width=192)
    middle = {name: array[1::3, 1::3] for name, array in fine.items()}  # the very same rays
    same = coarse["segmentation"] == middle["segmentation"]
    assert same.mean() > 0.995
    np.testing.assert_allclose(coarse["depth"][same], middle["depth"][same], rtol=1e-3)
    difference = coarse["image"].astype(float) - middle["image"]
    assert np.abs(difference).mean() < 15  # sensor noise only


def test_twice_the_resolution_mostly_agrees_after_dropping_pixels():
    coarse, fine = small_frame(6), render_frame(6)
    assert (coarse["segmentation"] == fine["segmentation"][::2, ::2]).mean() > 0.85


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": -1}, "expected a frame index of 0 or more, got -1"),
        ({"index": 0, "height": 8}, "at least 16 rows and columns, got 8x128"),
        ({"index": 0, "width": 15}, "at least 16 rows and columns, got 64x15"),
        ({"index": 0, "split": "trian"}, "unknown split 'trian'; expected one of train, val, test"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        render_frame(**arguments)
