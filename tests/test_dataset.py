import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from folders import (
    DEPTH,
    HEIGHT,
    LABELS,
    WIDTH,
    layout,
    read,
    write_dataset,
    write_frame,
)
from PIL import Image

from oneshot_ednas.data.manifest import open_manifest

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY / os.environ.get("ONESHOT_EDNAS_SHARED_DATA", "../shared/data")
NYU = SHARED / "nyuv2_256x192"
NYU_MANIFEST = REPOSITORY / "configs/datasets/nyuv2_256x192.yaml"


def test_a_frame_holds_the_stored_pixels_in_the_units_of_the_contract(tmp_path):
    frame = read(write_dataset(tmp_path))
    image, label, depth = write_frame(tmp_path)
    assert frame["image"].dtype == np.uint8
    assert (frame["image"] == image).all()
    assert frame["segmentation"].dtype == np.uint8
    assert (frame["segmentation"] == label).all()
    assert frame["segmentation"][0, 0] == 255
    assert frame["depth"].dtype == np.float32
    assert frame["depth"][0, 1] == frame["depth"][0, 2] == 0  # a hole, and beyond 10 m
    assert np.allclose(frame["depth"][1:], depth[1:] / 1000)


def test_stored_normals_are_turned_into_camera_axes(tmp_path):
    normals = read(write_dataset(tmp_path))["normals"].astype(float)
    assert (normals[0, 0] == 0).all()
    assert np.abs(normals[0, 1] - (1, 0, 0)).max() < 0.01  # right
    assert np.abs(normals[1, 1] - (0, 0, -1)).max() < 0.01  # back to the camera: a frontal wall
    assert np.abs(normals[2, 1] - (0, -1, 0)).max() < 0.01  # up: a floor
    assert np.allclose(np.linalg.norm(normals[1:], axis=-1), 1, atol=2e-3)


def test_a_label_map_renames_drops_and_keeps_ignored(tmp_path):
    data = write_dataset(tmp_path)
    labels = read(data, label_map="two")["segmentation"]
    stored = write_frame(tmp_path)[1]
    assert (labels[stored == 0] == 0).all()
    assert (labels[stored == 1] == 255).all()
    assert (labels[stored == 2] == 1).all()
    assert labels[0, 0] == 255
    assert data.label_map("two").classes == ("flat", "thing")
    assert data.label_map(None).classes == ("wall", "floor", "chair")


def test_resizing_averages_the_image_and_takes_the_nearest_target(tmp_path):
    frame = read(write_dataset(tmp_path), height=3, width=4)
    image, label, depth = write_frame(tmp_path)
    means = image.reshape(3, 2, 4, 2, 3).mean(axis=(1, 3))
    assert np.abs(frame["image"] - means).max() <= 0.5
    assert (frame["segmentation"] == label[1::2, 1::2]).all()
    assert np.allclose(frame["depth"], depth[1::2, 1::2] / 1000)
    assert frame["normals"].shape == (3, 4, 3)
    larger = read(write_dataset(tmp_path), height=12, width=16)
    assert (larger["segmentation"] == label.repeat(2, 0).repeat(2, 1)).all()
    assert larger["image"].shape == (12, 16, 3)


def test_only_the_wanted_targets_are_read(tmp_path):
    data = write_dataset(tmp_path)
    (tmp_path / "label/a.png").unlink()
    assert set(read(data, targets=("depth",))) == {"image", "depth"}


def test_arrays_of_other_projects_are_read_from_npy(tmp_path):
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    arrays = {
        "image": np.stack([rows / 10, columns / 10, rows * 0 + 1.0], axis=-1),
        "label": (columns % 3 - 1).astype(np.float32),
        "depth": (rows[..., None] + 0.5).astype(np.float32),
        "normal": np.where(rows[..., None] > 0, (0.0, 0.0, 1.0), 0.0),
    }
    for folder, array in arrays.items():
        (tmp_path / "train" / folder).mkdir(parents=True)
        np.save(tmp_path / "train" / folder / "7.npy", array)
    (tmp_path / "train.txt").write_text("train/7\n")
    manifest = layout(
        image={"folder": "{parent}/image", "suffix": ".npy", "white": 1},
        splits={"train": "train.txt"},
        targets={
            "segmentation": {
                "kind": "labels",
                "folder": "{parent}/label",
                "suffix": ".npy",
                "ignore": -1,
                "classes": ["x", "y"],
            },
            "depth": {"kind": "depth", "folder": "{parent}/depth", "suffix": ".npy"},
            "normals": {
                "kind": "normals",
                "folder": "{parent}/normal",
                "suffix": ".npy",
                "axes": ["left", "up", "backward"],
            },
        },
    )
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(manifest))
    data = open_manifest(tmp_path)
    assert data.frames("train") == ("train/7",)
    frame = data.read_frame("train/7", height=HEIGHT, width=WIDTH)
    assert (frame["image"] == np.rint(arrays["image"] * 255)).all()
    assert frame["segmentation"][0, :4].tolist() == [255, 0, 1, 255]
    assert (frame["depth"] == arrays["depth"][..., 0]).all()
    assert frame["normals"][1, 1].tolist() == [0, 0, -1]
    assert not frame["normals"][0].any()


def test_disparity_becomes_metres(tmp_path):
    data = write_dataset(
        tmp_path,
        manifest=layout(
            targets={
                "depth": {
                    "kind": "depth",
                    "folder": "depth",
                    "suffix": ".png",
                    "scale": 500.0,
                    "offset": -1,
                    "encoding": "inverse",
                },
            },
        ),
    )
    depth = np.full((HEIGHT, WIDTH), 101, dtype=np.uint16)
    depth[0, :2] = 0, 1
    Image.fromarray(depth).save(tmp_path / "depth/a.png")
    frame = read(data)
    assert frame["depth"][0, :3].tolist() == [0, 0, 5]


def test_normals_are_derived_from_depth_at_the_stored_size(tmp_path):
    camera = {"fx": 20.0, "fy": 20.0, "cx": 16.0, "cy": 12.0}
    data = write_dataset(
        tmp_path,
        manifest=layout(
            intrinsics=camera,
            targets={
                "depth": {"kind": "depth", "folder": "depth", "suffix": ".npy"},
                "normals": {"kind": "derived_normals", "window": 5},
            },
        ),
    )
    v, u = np.mgrid[:24, :32].astype(float)
    slope = np.array([0.3, -0.4, -0.866])
    depth = -3 / ((u - 16) / 20 * slope[0] + (v - 12) / 20 * slope[1] + slope[2])
    assert depth.min() > 0
    np.save(tmp_path / "depth/a.npy", depth)
    Image.new("RGB", (32, 24)).save(tmp_path / "rgb/a.png")
    normals = read(data, height=12, width=16)["normals"]
    assert normals.dtype == np.float16
    # The intrinsics belong to the stored size: at another size these would be other angles.
    assert np.abs(normals.astype(float) - slope / np.linalg.norm(slope)).max() < 2e-3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_other_kinds_of_images_become_rgb(tmp_path, mode):
    data = write_dataset(tmp_path)
    image = Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90))
    if mode == "P":
        image = Image.new("P", (WIDTH, HEIGHT), 1)
        image.putpalette([0, 0, 0, 90, 90, 90])
    image.convert(mode).save(tmp_path / "rgb/a.png")
    assert (read(data)["image"] == 90).all()


def test_a_palette_label_map_gives_its_indices(tmp_path):
    data = write_dataset(tmp_path)
    label = Image.new("P", (WIDTH, HEIGHT), 2)
    label.putpalette([9, 9, 9, 80, 80, 80, 200, 0, 0])
    label.save(tmp_path / "label/a.png")
    assert (read(data)["segmentation"] == 2).all()


def broken(root, name):
    """A data set with one fault."""
    data = write_dataset(root)
    if name == "missing file":
        (root / "depth/a.png").unlink()
    elif name == "size":
        Image.new("L", (WIDTH - 1, HEIGHT)).save(root / "label/a.png")
    elif name == "label":
        Image.new("L", (WIDTH, HEIGHT), 3).save(root / "label/a.png")
    elif name == "truncated":
        content = (root / "rgb/a.png").read_bytes()
        (root / "rgb/a.png").write_bytes(content[: len(content) // 2])
    elif name == "no image":
        (root / "rgb/a.png").write_text("hello")
    elif name == "coloured labels":
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "label/a.png")
    elif name == "grey normals":
        Image.new("L", (WIDTH, HEIGHT)).save(root / "normal/a.png")
    elif name == "deep image":
        Image.fromarray(np.full((HEIGHT, WIDTH), 300, np.uint16)).save(root / "rgb/a.png")
    return data


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing file", r"^frame a: no file depth/a\.png; restore it or drop the frame"),
        ("size", r"frame a: segmentation is 7x6, expected the image's 8x6; store both"),
        (
            "label",
            r"^frame a: label/a\.png: labels 3 in 48 pixels lie outside the 3 stored",
        ),
        ("truncated", r"^frame a: rgb/a\.png cannot be read \(.+\); expected a whole \.png file"),
        ("no image", r"^frame a: rgb/a\.png cannot be read \(no PNG or JPEG image"),
        ("coloured labels", r"^frame a: label/a\.png: expected one channel, got 3"),
        ("grey normals", r"^frame a: normal/a\.png: expected normals of 3 channels, got \(6, 8\)"),
        (
            "deep image",
            r"^frame a: rgb/a\.png: expected values in 0\.\.255, got 300\.\.300; set",
        ),
    ],
)
def test_a_fault_of_a_frame_is_named_in_one_line(tmp_path, fault, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(broken(tmp_path, fault))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{"a": 1}], dtype=object), r"cannot be read \(expected numbers of shape"),
        (np.zeros(5), r"expected numbers of shape height x width .*, got float64 of shape \(5,\)"),
        (np.full((HEIGHT, WIDTH), 0.5), "expected whole numbers as labels, got 0.5"),
        (np.full((HEIGHT, WIDTH), np.nan), "expected whole numbers as labels, got nan"),
        (np.full((HEIGHT, WIDTH), 1e30), r"expected whole numbers as labels, got 1e\+30"),
        (np.full((HEIGHT, WIDTH), -1), "labels -1 in 48 pixels lie outside the 3 stored classes"),
        (np.arange(48).reshape(HEIGHT, WIDTH), r"labels 3, 4, 5, 6, 7, \.\.\. in 45 pixels lie"),
    ],
)
def test_arrays_that_are_no_label_maps_are_refused(tmp_path, array, message):
    targets = {"segmentation": {**LABELS, "suffix": ".npy"}}
    data = write_dataset(tmp_path, manifest=layout(targets=targets))
    np.save(tmp_path / "label/a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read(data)


def test_an_image_of_two_channels_is_refused(tmp_path):
    image = {"folder": "rgb", "suffix": ".npy"}
    data = write_dataset(tmp_path, manifest=layout(image=image))
    np.save(tmp_path / "rgb/a.npy", np.zeros((HEIGHT, WIDTH, 2)))
    with pytest.raises(ValueError, match="expected 1 or 3 channels, got 2"):
        read(data)


def test_unknown_names_are_refused_with_a_hint(tmp_path):
    data = write_dataset(tmp_path)
    with pytest.raises(ValueError, match="toy has no split trian; did you mean train"):
        data.frames("trian")
    with pytest.raises(ValueError, match="toy has no label map tow; did you mean two"):
        read(data, label_map="tow")
    with pytest.raises(ValueError, match="toy has no target normal; did you mean normals"):
        read(data, targets=("normal",))
    bare = write_dataset(tmp_path, manifest=layout(targets={"depth": DEPTH}))
    with pytest.raises(ValueError, match="toy has no segmentation, so no label map two"):
        bare.label_map("two")


@pytest.mark.skipif(not NYU.is_dir(), reason="the NYUv2 frames are not here")
def test_the_nyuv2_frames_agree_with_what_is_known_of_them():
    data = open_manifest(NYU, NYU_MANIFEST)
    frames = data.frames("mini_train")
    assert len(frames) == 16
    assert len(data.label_map(None).classes) == len(data.label_map("classes13").map) == 40
    labels, depths, valid = set(), [], []
    camera = data.intrinsics
    v, u = np.mgrid[:96, :128] * 2 + 1
    rays = np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, u * 0 + 1], -1)
    for frame_id in frames[:8]:
        frame = data.read_frame(frame_id, height=96, width=128, label_map="classes13")
        labels |= set(np.unique(frame["segmentation"]).tolist())
        depths.append(frame["depth"])
        length = np.linalg.norm(frame["normals"].astype(np.float32), axis=-1)
        assert (np.abs(length - 1) < 0.01)[length > 0].all()
        # Towards the camera: against the ray of each pixel, up to the rounding of float16.
        assert ((frame["normals"] * rays).sum(-1) <= 1e-3).all()
        valid.append((length > 0).mean())
    assert len(data.label_map("classes13").classes) == 13
    assert labels <= {*range(13), 255}
    assert len(labels) > 8
    # Holes were filled; the training split spans 0.71 to 9.96 m, its mean is 2.86 m.
    assert min(d.min() for d in depths) >= 0.71
    assert max(d.max() for d in depths) <= 9.96
    assert 1.5 < np.mean(depths) < 4.5
    assert np.mean(valid) > 0.8
