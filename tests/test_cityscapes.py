import json

import numpy as np
import pytest
from fixtures_cityscapes import BASELINE, FRAMES, FX, HEIGHT, WIDTH, write_cityscapes
from PIL import Image

from oneshot_ednas.data.layouts.cityscapes import (
    CATEGORIES,
    CLASSES,
    is_cityscapes,
    open_cityscapes,
)
from oneshot_ednas.data.packed import folder_split

FRAME = "train/aachen/aachen_000000_000019"
FOLDERS = {
    "leftImg8bit": "_leftImg8bit.png",
    "gtFine": "_gtFine_labelIds.png",
    "disparity": "_disparity.png",
    "camera": "_camera.json",
}

# Names, train ids and categories of the label ids, as the authors list them.
LABELS = {
    7: ("road", 0, "flat"),
    8: ("sidewalk", 1, "flat"),
    11: ("building", 2, "construction"),
    12: ("wall", 3, "construction"),
    13: ("fence", 4, "construction"),
    17: ("pole", 5, "object"),
    19: ("traffic light", 6, "object"),
    20: ("traffic sign", 7, "object"),
    21: ("vegetation", 8, "nature"),
    22: ("terrain", 9, "nature"),
    23: ("sky", 10, "sky"),
    24: ("person", 11, "human"),
    25: ("rider", 12, "human"),
    26: ("car", 13, "vehicle"),
    27: ("truck", 14, "vehicle"),
    28: ("bus", 15, "vehicle"),
    31: ("train", 16, "vehicle"),
    32: ("motorcycle", 17, "vehicle"),
    33: ("bicycle", 18, "vehicle"),
}


def read(data, frame=FRAME, height=HEIGHT, width=WIDTH, **options):
    return data.read_frame(frame, height=height, width=width, **options)


def test_the_splits_are_the_folders_without_the_dummy_test_set(tmp_path):
    assert not is_cityscapes(tmp_path)
    write_cityscapes(tmp_path)
    assert is_cityscapes(tmp_path)
    data = open_cityscapes(tmp_path)
    assert data.splits == {
        split: tuple(sorted(f"{split}/{frame}" for frame in frames))
        for split, frames in FRAMES.items()
    }


def test_images_and_classes_are_those_of_the_files(tmp_path):
    stored = write_cityscapes(tmp_path)
    data = open_cityscapes(tmp_path)
    for frame, arrays in stored.items():
        found = read(data, frame)
        assert (found["image"] == arrays["leftImg8bit"]).all()
        wanted = [[LABELS.get(v, ("", 255, ""))[1] for v in row] for row in arrays["gtFine"]]
        assert found["segmentation"].tolist() == wanted
    assert data.class_names("segmentation") == CLASSES
    assert all(CLASSES[index] == name for name, index, _ in LABELS.values())
    assert len(CLASSES) == len(LABELS) == 19


def test_categories_count_the_same_pixels_as_the_classes(tmp_path):
    stored = write_cityscapes(tmp_path)[FRAME]["gtFine"]
    data = open_cityscapes(tmp_path)
    found = read(data, label_map="categories7")["segmentation"]
    assert data.class_names("segmentation", "categories7") == CATEGORIES
    for label_id, category in zip(stored.flat, found.flat, strict=True):
        wanted = LABELS[label_id][2] if label_id in LABELS else None
        assert (CATEGORIES[category] if category != 255 else None) == wanted


def test_disparity_is_in_pixels_and_depth_in_metres(tmp_path):
    stored = write_cityscapes(tmp_path)
    data = open_cityscapes(tmp_path)
    for i, frame in enumerate(FRAMES["train"]):
        p = stored[f"train/{frame}"]["disparity"].astype(float)
        found = read(data, f"train/{frame}")
        valid = p > 1
        pixels = np.where(valid, (p - 1) / 256, 0)
        assert np.allclose(found["disparity"], pixels, rtol=1e-6)
        metres = np.divide(BASELINE * (FX + i), pixels, out=np.zeros_like(p), where=valid)
        assert np.allclose(found["depth"], np.where(metres <= 80, metres, 0), rtol=1e-6)
        assert found["disparity"][0, :4].tolist() == [0, 0, 1 / 256, 8]
        assert found["depth"][0, :4].tolist() == [0, 0, 0, BASELINE * (FX + i) / 8]


def test_at_half_size_targets_are_the_stored_pixels(tmp_path):
    write_cityscapes(tmp_path)
    data = open_cityscapes(tmp_path)
    whole, half = read(data), read(data, height=HEIGHT // 2, width=WIDTH // 2)
    for name in data.targets:
        assert (half[name] == whole[name][1::2, 1::2]).all()
    means = whole["image"].reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(half["image"] - means).max() <= 1


@pytest.mark.parametrize(
    ("kinds", "targets", "note"),
    [
        (
            ("disparity", "camera"),
            ["segmentation", "disparity", "depth"],
            "depth beyond 80 m is left out",
        ),
        (("disparity",), ["segmentation", "disparity"], "no depth in metres: the folder camera"),
        (("camera",), ["segmentation"], "no disparity and no depth"),
    ],
)
def test_targets_are_offered_where_their_files_are(tmp_path, kinds, targets, note):
    write_cityscapes(tmp_path, kinds)
    data = open_cityscapes(tmp_path)
    assert list(data.targets) == targets
    assert len(data.notes) == 1
    assert note in data.notes[0]
    assert set(read(data)) == {"image", *targets}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_missing_counterpart_is_refused_when_opened(tmp_path, kind):
    write_cityscapes(tmp_path)
    for frame in FRAMES["train"][:2]:
        (tmp_path / f"{kind}/train/{frame}{FOLDERS[kind]}").unlink()
    message = (
        rf"^2 of 16 files are missing, the first is {kind}/{FRAME}{FOLDERS[kind]} of frame "
        rf"{FRAME} in split train; restore"
    )
    with pytest.raises(ValueError, match=message) as caught:
        open_cityscapes(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_split_without_frames_is_refused(tmp_path):
    write_cityscapes(tmp_path)
    for kind in ("leftImg8bit", "gtFine"):
        (tmp_path / kind / "val").rename(tmp_path / kind / "elsewhere")
    with pytest.raises(ValueError, match=r"^no frames in leftImg8bit/val/\*/\*_leftImg8bit\.png"):
        open_cityscapes(tmp_path)


def spoil(root, fault):
    labels = root / f"gtFine/{FRAME}_gtFine_labelIds.png"
    if fault == "colours":
        Image.new("RGBA", (WIDTH, HEIGHT)).save(labels)
    elif fault == "unknown label":
        Image.new("L", (WIDTH, HEIGHT), 34).save(labels)
    elif fault == "other size":
        Image.new("L", (WIDTH // 2, HEIGHT // 2), 7).save(labels)
    elif fault == "cut short":
        labels.write_bytes(labels.read_bytes()[:60])
    elif fault == "camera":
        (root / f"camera/{FRAME}_camera.json").write_text(json.dumps({"intrinsic": {"fx": 1}}))
    elif fault == "8 bits":
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / f"disparity/{FRAME}_disparity.png")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("colours", r"_labelIds\.png: expected one channel, got 4; colour-coded maps must be"),
        ("unknown label", r"_labelIds\.png: labels 34 in 192 pixels lie outside the 34 stored"),
        ("other size", "segmentation is 8x6, expected the image's 16x12; store both at one size"),
        ("cut short", r"_labelIds\.png cannot be read \(.+\); expected a whole \.png file"),
        ("camera", r"_camera\.json: expected extrinsic\.baseline and intrinsic\.fx as positive"),
        ("8 bits", r"_disparity\.png: expected one channel, got 3"),
    ],
)
def test_a_fault_of_a_frame_is_named_in_one_line(tmp_path, fault, message):
    write_cityscapes(tmp_path)
    data = open_cityscapes(tmp_path)
    spoil(tmp_path, fault)
    with pytest.raises(ValueError, match=message) as caught:
        read(data)
    assert str(caught.value).startswith(f"frame {FRAME}: ")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_packed_split_holds_what_the_frames_hold(tmp_path):
    write_cityscapes(tmp_path)
    data = open_cityscapes(tmp_path)
    packed = folder_split(data, "train", height=6, width=8, cache_dir=tmp_path / "cache", workers=1)
    assert packed.sources == data.splits["train"]
    assert packed.class_names == {"segmentation": CLASSES}
    for index, frame in enumerate(packed.sources):
        wanted = read(data, frame, 6, 8)
        found = packed.frame(index)
        assert found.keys() == wanted.keys()
        assert all((found[name] == wanted[name]).all() for name in wanted)
