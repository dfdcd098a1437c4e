import numpy as np
import pytest
from fixtures_mtan import HEIGHT, WIDTH, frame_arrays, labels, save, write_cityscapes, write_nyuv2
from hypothesis import given
from hypothesis import strategies as st

from oneshot_ednas.data.dataset import NAMELESS, with_num_classes
from oneshot_ednas.data.layouts.mtan import is_mtan, open_mtan
from oneshot_ednas.data.packed import folder_split


def stored(data, frame="train/1"):
    return data.read_frame(frame, height=HEIGHT, width=WIDTH)


def expected_labels(num_classes):
    found = labels(num_classes)
    return np.where(found == -1, 255, found)


def test_a_pack_of_cityscapes_has_disparity_and_no_depth(tmp_path):
    data = open_mtan(write_cityscapes(tmp_path))
    assert is_mtan(tmp_path)
    assert (data.name, data.layout) == ("mtan_cityscapes", "MTAN pack, Cityscapes")
    assert {name: data.target_kind(name) for name in data.targets} == {
        "segmentation": "labels",
        "disparity": "disparity",
    }
    assert any("no metres" in note for note in data.notes)
    frame, arrays = stored(data), frame_arrays(1)
    assert (frame["image"] == np.rint(arrays["image"].astype(float) * 255)).all()
    assert frame["image"][0, 0].tolist() == [0, 0, 255]
    assert (frame["segmentation"] == expected_labels(7)).all()
    assert frame["disparity"].dtype == np.float32
    assert (frame["disparity"] == arrays["disparity"][..., 0]).all()
    assert stored(data, "train/0")["disparity"][0, 0] == 0


def test_a_pack_of_nyuv2_has_depth_in_metres_and_normals_in_camera_axes(tmp_path):
    data = open_mtan(write_nyuv2(tmp_path))
    assert is_mtan(tmp_path)
    assert (data.name, data.layout) == ("mtan_nyuv2", "MTAN pack, NYUv2")
    assert {name: data.target_kind(name) for name in data.targets} == {
        "segmentation": "labels",
        "depth": "depth",
        "normals": "normals",
    }
    frame, arrays = stored(data), frame_arrays(1)
    assert (frame["segmentation"] == expected_labels(13)).all()
    assert (frame["depth"] == arrays["depth"][..., 0]).all()
    assert frame["depth"][0, 0] == 0
    # Stored right, forward, up; returned x right, y down, z forward.
    assert frame["normals"][3, 0].tolist() == [1, 0, 0]
    assert frame["normals"][3, 1].tolist() == [0, 0, 1]
    assert frame["normals"][3, 2].tolist() == [0, -1, 0]
    assert frame["normals"][3, 3].tolist() == [0, 0, 0]
    assert frame["normals"][3, 4].tolist() == [0, 0, -1]  # a wall in front of the camera
    assert any("does not state its axes" in note for note in data.notes)


def test_the_13_classes_of_nyuv2_are_named_in_the_order_of_the_labels(tmp_path):
    classes = open_mtan(write_nyuv2(tmp_path)).class_names("segmentation")
    assert len(classes) == 13
    assert (classes[0], classes[4], classes[11], classes[12]) == ("bed", "floor", "wall", "window")


def test_at_half_size_the_image_is_averaged_and_targets_are_picked(tmp_path):
    data = open_mtan(write_nyuv2(tmp_path))
    frame = data.read_frame("val/0", height=HEIGHT // 2, width=WIDTH // 2)
    arrays = frame_arrays(0)
    image = np.rint(arrays["image"].astype(float) * 255)
    means = image.reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(frame["image"] - means).max() <= 0.5
    assert (frame["segmentation"] == expected_labels(13)[1::2, 1::2]).all()
    assert (frame["depth"] == arrays["depth"][1::2, 1::2, 0]).all()
    assert frame["normals"][:, 0].tolist() == [[0, 0, 1]] * (HEIGHT // 2)


@pytest.mark.parametrize(
    ("folders", "targets"),
    [
        (("label_19",), {"segmentation": 19}),
        (("label",), {"segmentation": 255}),
        (
            ("label_2", "label_7", "label_19"),
            {"segmentation_2": 2, "segmentation_7": 7, "segmentation_19": 19},
        ),
        (("label", "label_19"), {"segmentation": 255, "segmentation_19": 19}),
    ],
)
def test_folders_of_labels_are_named_by_their_number_of_classes(tmp_path, folders, targets):
    data = open_mtan(write_cityscapes(tmp_path, folders=folders))
    found = {name: len(data.class_names(name)) for name in data.targets if name != "disparity"}
    assert found == targets
    assert list(data.targets) == [*targets, "disparity"]
    frame = stored(data)
    for name, count in targets.items():
        assert (frame[name] == expected_labels(7 if count == 255 else count)).all()
        assert any(note.startswith(f"{name} is label") for note in data.notes)


def test_classes_that_nothing_counts_are_numbered_by_the_config(tmp_path):
    data = open_mtan(write_cityscapes(tmp_path, folders=("label",)))
    assert data.class_names("segmentation") == NAMELESS
    counted = with_num_classes(data, {"segmentation": 7})
    assert counted.class_names("segmentation") == NAMELESS[:7]
    assert (stored(counted)["segmentation"] == expected_labels(7)).all()
    with pytest.raises(ValueError, match=r"label/1\.npy: labels 5, 6 in .* outside the 5 stored"):
        stored(with_num_classes(data, {"segmentation": 5}))


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    data = open_mtan(write_cityscapes(tmp_path, numbers=(10, 2, 0, 100), splits=("train",)))
    assert data.splits == {"train": ("train/0", "train/2", "train/10", "train/100")}


@given(st.sets(st.integers(0, 3000), min_size=1, max_size=6))
def test_every_number_is_a_frame_once_and_in_order(tmp_path_factory, numbers):
    root = tmp_path_factory.mktemp("pack")
    for number in numbers:
        for folder in ("image", "label_2"):
            (root / "train" / folder).mkdir(parents=True, exist_ok=True)
            (root / "train" / folder / f"{number}.npy").touch()
    assert open_mtan(root).frames("train") == tuple(f"train/{n}" for n in sorted(numbers))


def test_what_operating_systems_leave_behind_is_no_frame(tmp_path):
    write_cityscapes(tmp_path)
    (tmp_path / "train/image/._0.npy").touch()
    (tmp_path / "train/image/.DS_Store").touch()
    (tmp_path / "train/notes").mkdir()
    assert open_mtan(tmp_path).frames("train") == ("train/0", "train/1")


def test_a_split_is_packed_with_the_kinds_of_its_targets(tmp_path):
    data = open_mtan(write_nyuv2(tmp_path / "pack"))
    packed = folder_split(data, "val", height=6, width=8, cache_dir=tmp_path / "c", workers=1)
    assert packed.kinds == {"segmentation": "labels", "depth": "depth", "normals": "normals"}
    assert packed.sources == ("val/0", "val/1")
    batch = packed.batch([1, 0])
    assert batch["segmentation"].shape == (2, 6, 8)
    assert batch["normals"].shape == (2, 3, 6, 8)
    depth = [frame_arrays(number)["depth"][1::2, 1::2, 0] for number in (1, 0)]
    assert (batch["depth"][:, 0].numpy() == np.stack(depth)).all()


def test_disparity_is_packed_as_disparity(tmp_path):
    data = open_mtan(write_cityscapes(tmp_path / "pack"))
    packed = folder_split(
        data, "train", height=HEIGHT, width=WIDTH, targets=["disparity"], cache_dir=tmp_path / "c"
    )
    assert packed.kinds == {"disparity": "disparity"}
    assert packed.num_invalid_depth_frames == 0
    batch = packed.batch([0])["disparity"]
    assert (batch[0, 0].numpy() == frame_arrays(0)["disparity"][..., 0]).all()


def no_splits(root):
    (root / "train").rename(root / "training")
    (root / "val").rename(root / "validation")


def no_targets(root):
    for split in ("train", "val"):
        (root / split / "depth").rename(root / split / "range")
        (root / split / "label_7").rename(root / split / "labels")


def a_file_less(root):
    for number in (3, 11):
        save(root, "val/image", number, frame_arrays()["image"])
        save(root, "val/label_7", number, labels(7))


def an_image_less(root):
    (root / "train/image/1.npy").unlink()


def a_folder_less(root):
    (root / "val/depth").rename(root / "val/inverse")


def an_empty_split(root):
    for path in (root / "val").rglob("*.npy"):
        path.unlink()


def a_named_frame(root):
    (root / "train/depth/1.npy").rename(root / "train/depth/one.npy")


def too_many_classes(root):
    (root / "train/label_256").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_splits, r"^no folder train or val in .*; expected \{train,val\}/"),
        (no_targets, r"^no folder label, depth or normal in train, val of .*; expected \{train"),
        (a_file_less, r"^2 of 18 files are missing, the first is val/depth/3\.npy of frame val/3"),
        (an_image_less, r"^1 of 12 files are missing, the first is train/image/1\.npy"),
        (a_folder_less, r"^2 of 12 files are missing, the first is val/depth/0\.npy"),
        (an_empty_split, r"^val: expected files image/N\.npy, got none; unpack the pack anew$"),
        (a_named_frame, r"^train/depth/one\.npy: expected the number of a frame, as 0\.npy; ren"),
        (too_many_classes, r"^label_256: expected at most 255 classes in a folder's name; ren"),
    ],
)
def test_a_faulty_pack_is_refused_in_one_line_when_it_is_opened(tmp_path, damage, message):
    write_cityscapes(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        open_mtan(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "array", "message"),
    [
        ("image", np.full((HEIGHT, WIDTH, 3), 200.0), r"image/0\.npy: expected values in 0\.\.1, "),
        ("label", np.full((HEIGHT, WIDTH), 13), r"label/0\.npy: labels 13 in 192 pixels lie out"),
        ("label", np.full((HEIGHT, WIDTH), -2), r"label/0\.npy: labels -2 in 192 pixels lie out"),
        ("label", np.full((HEIGHT, WIDTH), 0.5), r"label/0\.npy: expected whole numbers as label"),
        ("normal", np.zeros((HEIGHT, WIDTH)), r"normal/0\.npy: expected normals of 3 channels"),
        ("depth", np.ones((HEIGHT, WIDTH, 2)), r"depth/0\.npy: expected one channel, got 2"),
        ("depth", np.ones((6, 8)), r"depth is 8x6, expected the image's 16x12"),
        ("depth", np.array([None]), r"depth/0\.npy cannot be read \(.+\); expected a whole \.npy"),
    ],
)
def test_a_faulty_array_is_refused_in_one_line(tmp_path, folder, array, message):
    data = open_mtan(write_nyuv2(tmp_path))
    np.save(tmp_path / "train" / folder / "0.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message) as caught:
        stored(data, "train/0")
    assert "\n" not in str(caught.value)


def test_other_folders_are_no_pack(tmp_path):
    assert not is_mtan(tmp_path)
    (tmp_path / "train/image").mkdir(parents=True)
    (tmp_path / "train/image/0.png").touch()
    assert not is_mtan(tmp_path)
