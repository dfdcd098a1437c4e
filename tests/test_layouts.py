import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from oneshot_ednas.data.layouts import read_frame
from oneshot_ednas.data.manifest import load_manifest, split_frames

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY / os.environ.get("ONESHOT_EDNAS_SHARED_DATA", "../shared/data")
NYU = SHARED / "nyuv2_256x192"
NYU_MANIFEST = REPOSITORY / "configs/datasets/nyuv2_256x192.yaml"

HEIGHT, WIDTH = 6, 8


def layout(**changes):
    base = {
        "name": "toy",
        "image": {"folder": "rgb", "suffix": ".png"},
        "splits": {"train": "splits/train.txt"},
        "segmentation": {
            "folder": "label",
            "suffix": ".png",
            "classes": ["wall", "floor", "chair"],
            "label_maps": {"two": {"classes": ["flat", "thing"], "map": [0, 255, 1]}},
        },
        "depth": {"folder": "depth", "suffix": ".png", "scale": 0.001, "max_metres": 10},
        "normals": {
            "stored": {
                "folder": "normal",
                "suffix": ".png",
                "encoding": "rgb",
                "axes": ["right", "forward", "up"],
                "invalid": [255, 255, 255],
            }
        },
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
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / folder / f"{frame}.png")
    return image, label, depth


def write_dataset(root, frames=("a", "b"), manifest=None):
    for frame in frames:
        write_frame(root, frame)
    (root / "splits").mkdir(exist_ok=True)
    (root / "splits/train.txt").write_text("\n".join(frames) + "\n")
    (root / "dataset.yaml").write_text(yaml.safe_dump(manifest or layout()))
    return load_manifest(root)


def read(root, manifest, height=HEIGHT, width=WIDTH, **options):
    return read_frame(manifest, root, "a", height=height, width=width, **options)


def test_a_frame_holds_the_stored_pixels_in_the_units_of_the_contract(tmp_path):
    frame = read(tmp_path, write_dataset(tmp_path))
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
    normals = read(tmp_path, write_dataset(tmp_path))["normals"].astype(float)
    assert (normals[0, 0] == 0).all()
    assert np.abs(normals[0, 1] - (1, 0, 0)).max() < 0.01  # right
    assert np.abs(normals[1, 1] - (0, 0, -1)).max() < 0.01  # back to the camera: a frontal wall
    assert np.abs(normals[2, 1] - (0, -1, 0)).max() < 0.01  # up: a floor
    assert np.allclose(np.linalg.norm(normals[1:], axis=-1), 1, atol=2e-3)


def test_a_label_map_renames_drops_and_keeps_ignored(tmp_path):
    manifest = write_dataset(tmp_path)
    labels = read(tmp_path, manifest, label_map="two")["segmentation"]
    stored = write_frame(tmp_path)[1]
    assert (labels[stored == 0] == 0).all()
    assert (labels[stored == 1] == 255).all()
    assert (labels[stored == 2] == 1).all()
    assert labels[0, 0] == 255
    assert manifest.label_map("two").classes == ("flat", "thing")
    assert manifest.label_map(None).classes == ("wall", "floor", "chair")


def test_resizing_averages_the_image_and_takes_the_nearest_target(tmp_path):
    frame = read(tmp_path, write_dataset(tmp_path), height=3, width=4)
    image, label, depth = write_frame(tmp_path)
    means = image.reshape(3, 2, 4, 2, 3).mean(axis=(1, 3))
    assert np.abs(frame["image"] - means).max() <= 0.5
    assert (frame["segmentation"] == label[1::2, 1::2]).all()
    assert np.allclose(frame["depth"], depth[1::2, 1::2] / 1000)
    assert frame["normals"].shape == (3, 4, 3)
    larger = read(tmp_path, write_dataset(tmp_path), height=12, width=16)
    assert (larger["segmentation"] == label.repeat(2, 0).repeat(2, 1)).all()
    assert larger["image"].shape == (12, 16, 3)


def test_only_the_wanted_tasks_are_read(tmp_path):
    manifest = write_dataset(tmp_path)
    (tmp_path / "label/a.png").unlink()
    assert set(read(tmp_path, manifest, tasks=("depth",))) == {"image", "depth"}


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
        segmentation={
            "folder": "{parent}/label",
            "suffix": ".npy",
            "ignore": -1,
            "classes": ["x", "y"],
        },
        depth={"folder": "{parent}/depth", "suffix": ".npy", "scale": 1},
        normals={
            "stored": {
                "folder": "{parent}/normal",
                "suffix": ".npy",
                "axes": ["left", "up", "backward"],
            }
        },
    )
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(manifest))
    loaded = load_manifest(tmp_path)
    assert split_frames(loaded, tmp_path, "train") == ("train/7",)
    frame = read_frame(loaded, tmp_path, "train/7", height=HEIGHT, width=WIDTH)
    assert (frame["image"] == np.rint(arrays["image"] * 255)).all()
    assert frame["segmentation"][0, :4].tolist() == [255, 0, 1, 255]
    assert (frame["depth"] == arrays["depth"][..., 0]).all()
    assert frame["normals"][1, 1].tolist() == [0, 0, -1]
    assert not frame["normals"][0].any()


def test_disparity_becomes_metres(tmp_path):
    manifest = write_dataset(
        tmp_path,
        manifest=layout(
            depth={
                "folder": "depth",
                "suffix": ".png",
                "scale": 500.0,
                "offset": -1,
                "encoding": "inverse",
            },
        ),
    )
    depth = np.full((HEIGHT, WIDTH), 101, dtype=np.uint16)
    depth[0, :2] = 0, 1
    Image.fromarray(depth).save(tmp_path / "depth/a.png")
    frame = read(tmp_path, manifest)
    assert frame["depth"][0, :3].tolist() == [0, 0, 5]


def test_normals_are_derived_from_depth_at_the_stored_size(tmp_path):
    camera = {"fx": 20.0, "fy": 20.0, "cx": 16.0, "cy": 12.0}
    manifest = write_dataset(
        tmp_path,
        manifest=layout(
            normals={"derived": {"window": 5, "same_label": False}},
            intrinsics=camera,
            depth={"folder": "depth", "suffix": ".npy", "scale": 1},
            segmentation=None,
        ),
    )
    v, u = np.mgrid[:24, :32].astype(float)
    slope = np.array([0.3, -0.4, -0.866])
    depth = -3 / ((u - 16) / 20 * slope[0] + (v - 12) / 20 * slope[1] + slope[2])
    assert depth.min() > 0
    np.save(tmp_path / "depth/a.npy", depth)
    Image.new("RGB", (32, 24)).save(tmp_path / "rgb/a.png")
    normals = read(tmp_path, manifest, height=12, width=16)["normals"]
    assert normals.dtype == np.float16
    # The intrinsics belong to the stored size: at another size these would be other angles.
    assert np.abs(normals.astype(float) - slope / np.linalg.norm(slope)).max() < 2e-3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_other_kinds_of_images_become_rgb(tmp_path, mode):
    manifest = write_dataset(tmp_path)
    image = Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90))
    if mode == "P":
        image = Image.new("P", (WIDTH, HEIGHT), 1)
        image.putpalette([0, 0, 0, 90, 90, 90])
    image.convert(mode).save(tmp_path / "rgb/a.png")
    assert (read(tmp_path, manifest)["image"] == 90).all()


def test_a_palette_label_map_gives_its_indices(tmp_path):
    manifest = write_dataset(tmp_path)
    label = Image.new("P", (WIDTH, HEIGHT), 2)
    label.putpalette([9, 9, 9, 80, 80, 80, 200, 0, 0])
    label.save(tmp_path / "label/a.png")
    assert (read(tmp_path, manifest)["segmentation"] == 2).all()


def broken(root, name):
    """A data set with one fault; returns the manifest."""
    manifest = write_dataset(root)
    if name == "missing file":
        (root / "depth/a.png").unlink()
    elif name == "size":
        Image.new("L", (WIDTH - 1, HEIGHT)).save(root / "label/a.png")
    elif name == "label":
        Image.new("L", (WIDTH, HEIGHT), 3).save(root / "label/a.png")
    elif name == "truncated":
        data = (root / "rgb/a.png").read_bytes()
        (root / "rgb/a.png").write_bytes(data[: len(data) // 2])
    elif name == "no image":
        (root / "rgb/a.png").write_text("hello")
    elif name == "coloured labels":
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "label/a.png")
    elif name == "grey normals":
        Image.new("L", (WIDTH, HEIGHT)).save(root / "normal/a.png")
    elif name == "deep image":
        Image.fromarray(np.full((HEIGHT, WIDTH), 300, np.uint16)).save(root / "rgb/a.png")
    return manifest


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing file", r"frame a: no file .*depth/a\.png; restore it or drop the frame"),
        ("size", r"frame a: segmentation is 7x6, expected the image's 8x6; store both"),
        ("label", r"frame a: label 3 lies outside the 3 stored classes of toy \(ignored is 255\)"),
        ("truncated", r"frame a: .*rgb/a\.png cannot be read \(.+\); expected a whole \.png file"),
        ("no image", r"frame a: .*rgb/a\.png cannot be read \(cannot identify"),
        ("coloured labels", r"frame a: expected segmentation of one channel, got 3"),
        ("grey normals", r"frame a: expected normals of 3 channels, got \(6, 8\)"),
        ("deep image", r"frame a: expected image values in 0\.\.255, got 300; set image\.white"),
    ],
)
def test_a_fault_of_a_frame_is_named_in_one_line(tmp_path, fault, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, broken(tmp_path, fault))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{"a": 1}], dtype=object), r"cannot be read \(Object arrays cannot be loaded"),
        (np.zeros(5), r"expected numbers of shape height x width .*, got float64 of shape \(5,\)"),
        (np.full((HEIGHT, WIDTH), 0.5), "expected whole numbers as labels, got float64"),
        (np.full((HEIGHT, WIDTH), np.nan), "expected whole numbers as labels, got float64"),
        (np.full((HEIGHT, WIDTH), -1), "label -1 lies outside the 3 stored classes"),
    ],
)
def test_arrays_that_are_no_label_maps_are_refused(tmp_path, array, message):
    segmentation = {**layout()["segmentation"], "suffix": ".npy"}
    manifest = write_dataset(tmp_path, manifest=layout(segmentation=segmentation))
    np.save(tmp_path / "label/a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, manifest)


def test_an_image_of_two_channels_is_refused(tmp_path):
    image = {"folder": "rgb", "suffix": ".npy"}
    manifest = write_dataset(tmp_path, manifest=layout(image=image))
    np.save(tmp_path / "rgb/a.npy", np.zeros((HEIGHT, WIDTH, 2)))
    with pytest.raises(ValueError, match="expected an image of 1 or 3 channels, got 2"):
        read(tmp_path, manifest)


def test_unknown_names_are_refused_with_a_hint(tmp_path):
    manifest = write_dataset(tmp_path)
    with pytest.raises(ValueError, match="toy has no split trian; did you mean train"):
        split_frames(manifest, tmp_path, "trian")
    with pytest.raises(ValueError, match="toy has no label map tow; did you mean two"):
        read(tmp_path, manifest, label_map="tow")
    with pytest.raises(ValueError, match="toy has no task normal; did you mean normals"):
        read(tmp_path, manifest, tasks=("normal",))
    bare = write_dataset(tmp_path, manifest=layout(segmentation=None))
    with pytest.raises(ValueError, match="toy has no segmentation, so no label map two"):
        bare.label_map("two")


@pytest.mark.parametrize("frame", ["../secret", "/etc/passwd", "x/../../y", "..\\up"])
def test_frames_outside_the_folder_are_refused(tmp_path, frame):
    manifest = write_dataset(tmp_path)
    (tmp_path / "splits/train.txt").write_text(frame + "\n")
    with pytest.raises(ValueError, match="frame: expected a path inside the data folder, got"):
        split_frames(manifest, tmp_path, "train")
    with pytest.raises(ValueError, match="frame: expected a path inside the data folder, got"):
        read_frame(manifest, tmp_path, frame, height=2, width=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\na\n", r"train\.txt: frame a is listed twice; keep one"),
        ("\n \n", r"train\.txt: expected one frame id a line, got an empty file"),
    ],
)
def test_split_files_with_faults_are_refused(tmp_path, text, message):
    manifest = write_dataset(tmp_path)
    (tmp_path / "splits/train.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        split_frames(manifest, tmp_path, "train")


def test_a_folder_without_what_the_manifest_names_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no data folder .*absent; give the folder that holds"):
        load_manifest(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no manifest .*dataset\.yaml; write one as in configs"):
        load_manifest(tmp_path)
    manifest = write_dataset(tmp_path)
    (tmp_path / "splits/train.txt").unlink()
    with pytest.raises(ValueError, match=r"no file .*train\.txt for split train, named in"):
        load_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"no file .*train\.txt for split train"):
        split_frames(manifest, tmp_path, "train")
    for file in (tmp_path / "normal").iterdir():
        file.unlink()
    (tmp_path / "normal").rmdir()
    with pytest.raises(ValueError, match=r"no folder .*normal for normals, named in"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "name: expected letters, digits, _, - and ., got 'a/b'"),
        ({"splits": {}}, "expected at least one split"),
        ({"splits": {"train": "../x"}}, r"splits\.train: expected a path inside the data folder"),
        ({"image": {"folder": "/rgb", "suffix": ".png"}}, "folder: expected a path inside"),
        ({"image": {"folder": "rgb", "suffix": ".tif"}}, r"expected a suffix of \.png.*'\.tif'"),
        (
            {"image": {"folder": "rgb", "suffix": ".png", "white": 0}},
            "expected a positive stored value of white, got 0",
        ),
        (
            {"depth": {"folder": "depth", "suffix": ".png", "scale": 0}},
            "expected a positive depth scale, got 0",
        ),
        (
            {"segmentation": {"folder": "label", "suffix": ".png", "classes": ["a", "a"]}},
            "classes: a is listed twice",
        ),
        (
            {"segmentation": {"folder": "label", "suffix": ".png", "classes": []}},
            "expected 1 to 255 classes, got 0",
        ),
        (
            {
                "segmentation": {
                    **layout()["segmentation"],
                    "label_maps": {"m": {"classes": ["a"], "map": [0, 1]}},
                }
            },
            r"map: expected classes 0\.\.0 or 255 \(dropped\), got 1",
        ),
        ({"normals": {}}, "expected normals to be either stored or derived"),
        ({"normals": {"derived": {}}}, "derived normals need depth and intrinsics"),
        ({"normals": {"derived": {"window": 4}}}, "expected an odd window of at least 3"),
        (
            {"intrinsics": {"fx": 0, "fy": 1, "cx": 0, "cy": 0}},
            r"expected positive focal lengths, got fx=0\.0, fy=1\.0",
        ),
        (
            {"normals": {"stored": {**layout()["normals"]["stored"], "axes": ["x", "up", "up"]}}},
            "axes: unknown direction x",
        ),
        (
            {
                "normals": {
                    "stored": {**layout()["normals"]["stored"], "axes": ["right", "up", "up"]}
                }
            },
            "expected three different axes, got right, up, up",
        ),
        (
            {"normals": {"stored": {**layout()["normals"]["stored"], "invalid": [0]}}},
            "expected three invalid values, got 1",
        ),
    ],
)
def test_manifests_with_faults_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path, manifest=layout(**changes))


@pytest.mark.skipif(not NYU.is_dir(), reason="the NYUv2 frames are not here")
def test_the_nyuv2_frames_agree_with_what_is_known_of_them():
    manifest = load_manifest(NYU, NYU_MANIFEST)
    frames = split_frames(manifest, NYU, "mini_train")
    assert len(frames) == 16
    assert len(manifest.label_map(None).classes) == len(manifest.label_map("classes13").map) == 40
    labels, depths, valid = set(), [], []
    camera = manifest.intrinsics
    v, u = np.mgrid[:96, :128] * 2 + 1
    rays = np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, u * 0 + 1], -1)
    for frame_id in frames[:8]:
        frame = read_frame(manifest, NYU, frame_id, height=96, width=128, label_map="classes13")
        labels |= set(np.unique(frame["segmentation"]).tolist())
        depths.append(frame["depth"])
        length = np.linalg.norm(frame["normals"].astype(np.float32), axis=-1)
        assert (np.abs(length - 1) < 0.01)[length > 0].all()
        # Towards the camera: against the ray of each pixel, up to the rounding of float16.
        assert ((frame["normals"] * rays).sum(-1) <= 1e-3).all()
        valid.append((length > 0).mean())
    assert len(manifest.label_map("classes13").classes) == 13
    assert labels <= {*range(13), 255}
    assert len(labels) > 8
    # Holes were filled; the training split spans 0.71 to 9.96 m, its mean is 2.86 m.
    assert min(d.min() for d in depths) >= 0.71
    assert max(d.max() for d in depths) <= 9.96
    assert 1.5 < np.mean(depths) < 4.5
    assert np.mean(valid) > 0.8
