import json
import re

import fixtures_adashare as fixtures
import fixtures_mtan
import numpy as np
import pytest
from fixtures_mtan import HEIGHT, WIDTH

from oneshot_ednas.data.dataset import NAMELESS
from oneshot_ednas.data.layouts.adashare import LISTS, TASKONOMY_CLASSES, class_weights
from oneshot_ednas.data.packed import folder_split

CITYSCAPES, NYUV2, TASKONOMY = LISTS.values()
WRITERS = [
    (CITYSCAPES, fixtures.write_cityscapes),
    (NYUV2, fixtures.write_nyuv2),
    (TASKONOMY, fixtures.write_taskonomy),
]


def read(data, frame, height=HEIGHT, width=WIDTH):
    return data.read_frame(frame, height=height, width=width)


def kinds(data):
    return {name: data.target_kind(name) for name in data.targets}


def test_cityscapes_has_three_sets_of_labels_and_disparity(tmp_path):
    data = CITYSCAPES.open(fixtures.write_cityscapes(tmp_path))
    assert kinds(data) == {
        "disparity": "disparity",
        "segmentation_2": "labels",
        "segmentation_7": "labels",
        "segmentation_19": "labels",
    }
    assert any("no metres" in note for note in data.notes)
    assert data.frames("train") == tuple(f"train/image/{n}" for n in range(4))
    assert data.frames("train1") + data.frames("train2") == data.frames("train")
    assert data.frames("test") == ("test/image/4",)
    frame, arrays = read(data, "test/image/4"), fixtures_mtan.frame_arrays(4)
    assert (frame["image"] == np.rint(arrays["image"].astype(float) * 255)).all()
    assert (frame["disparity"] == arrays["disparity"][..., 0]).all()
    for count in (2, 7, 19):
        labels = fixtures_mtan.labels(count)
        assert (frame[f"segmentation_{count}"] == np.where(labels == -1, 255, labels)).all()
        assert data.class_names(f"segmentation_{count}") == NAMELESS[:count]


def test_nyuv2_has_metres_and_normals_in_camera_axes(tmp_path):
    data = NYUV2.open(fixtures.write_nyuv2(tmp_path))
    assert kinds(data) == {"segmentation": "labels", "normals": "normals", "depth": "depth"}
    assert (data.frames("train"), data.frames("test")) == (("img/0000", "img/0001"), ("img/0002",))
    frame, arrays = read(data, "img/0001"), fixtures.nyuv2_arrays(1)
    assert (frame["image"] == arrays["image"]).all()
    assert (frame["segmentation"] == arrays["segmentation"]).all()
    assert (frame["segmentation"][:, -1] == 255).all()
    assert len(data.class_names("segmentation")) == 40
    assert (frame["depth"] == arrays["depth"]).all()
    assert frame["depth"][0, 0] == 0
    normals = frame["normals"].astype(float)
    assert np.abs(normals[5, 0] - (1, 0, 0)).max() < 0.01  # right
    assert np.abs(normals[5, 1] - (0, 0, 1)).max() < 0.01  # forward
    assert np.abs(normals[5, 2] - (0, -1, 0)).max() < 0.01  # up: a floor
    assert (normals[5, 3] == 0).all()  # white: none
    assert np.abs(normals[5, 4] - (0, 0, -1)).max() < 0.01  # a wall in front of the camera


def test_taskonomy_has_metres_heat_maps_and_seventeen_classes(tmp_path):
    data = TASKONOMY.open(fixtures.write_taskonomy(tmp_path))
    assert kinds(data) == {
        "segmentation": "labels",
        "normals": "normals",
        "depth": "depth",
        "keypoints": "values",
        "edge_texture": "values",
    }
    assert data.frames("train") == ("hall/rgb/point_0_view_0_domain_rgb",)
    frame, arrays = read(data, data.frames("test")[0]), fixtures.taskonomy_arrays(1)
    stored = arrays["segmentation"].astype(int)
    assert (frame["segmentation"] == np.where(stored == 0, 255, stored - 1)).all()
    assert set(np.unique(frame["segmentation"])) == {*range(17), 255}
    assert data.class_names("segmentation") == TASKONOMY_CLASSES
    assert (TASKONOMY_CLASSES[0], TASKONOMY_CLASSES[16]) == ("background", "vase")
    metres = arrays["depth"] / 512
    assert (frame["depth"][1:] == metres[1:]).all()
    assert frame["depth"][0, :4].tolist() == [0, 64499 / 512, 0, 0]
    for name in ("keypoints", "edge_texture"):
        assert frame[name].dtype == np.float32
        assert (frame[name] == arrays[name] / 65536).all()
    normals = frame["normals"].astype(float)
    assert np.abs(normals[5, 0] - (1, 0, 0)).max() < 0.01  # right
    assert np.abs(normals[5, 1] - (0, 1, 0)).max() < 0.01  # down
    assert np.abs(normals[5, 2] - (0, 0, 1)).max() < 0.01  # forward
    assert (normals[5, 3] == 0).all()  # grey: none
    assert np.abs(normals[5, 4] - (0, 0, -1)).max() < 0.01  # a wall in front of the camera


@pytest.mark.parametrize(("frame_list", "write"), WRITERS)
def test_at_half_size_targets_are_picked_and_the_image_is_averaged(tmp_path, frame_list, write):
    data = frame_list.open(write(tmp_path))
    frame_id = data.frames("test")[0]
    whole, half = read(data, frame_id), read(data, frame_id, HEIGHT // 2, WIDTH // 2)
    for name in data.targets:
        assert np.array_equal(half[name], whole[name][1::2, 1::2])
    means = whole["image"].reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(half["image"] - means).max() <= 0.5


@pytest.mark.parametrize(("frame_list", "write"), WRITERS)
def test_a_split_is_packed_with_the_kinds_of_its_targets(tmp_path, frame_list, write):
    data = frame_list.open(write(tmp_path / "data"))
    packed = folder_split(data, "train", height=6, width=8, cache_dir=tmp_path / "c", workers=1)
    assert packed.kinds == kinds(data)
    assert packed.sources == data.frames("train")
    last = len(packed) - 1
    batch, frame = packed.batch([last]), read(data, data.frames("train")[last], 6, 8)
    for name in data.targets:
        found = batch[name][0].numpy()
        expected = frame[name].transpose(2, 0, 1) if frame[name].ndim == 3 else frame[name]
        assert np.array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize(("frame_list", "write"), WRITERS)
def test_a_folder_is_told_by_its_list(tmp_path, frame_list, write):
    assert not frame_list.is_in(tmp_path)
    write(tmp_path)
    assert [other for other in LISTS.values() if other.is_in(tmp_path)] == [frame_list]


def test_all_files_of_a_frame_are_those_of_its_row(tmp_path):
    data = NYUV2.open(fixtures.write_nyuv2(tmp_path))
    assert set(data.files("img/0002", data.targets)) == {
        "img/0002.png",
        "seg/0002.png",
        "normal_mask/0002.png",
        "depth/0002.npy",
    }
    (tmp_path / "seg/0001.png").unlink()
    assert NYUV2.open(tmp_path) == data  # who learns from the depth alone needs no labels
    with pytest.raises(ValueError, match=r"frame img/0001: no file seg/0001\.png; restore it"):
        data.identity("train", ["segmentation"])
    assert len(data.identity("train", ["depth"])) == 4


def test_a_leading_slash_is_dropped_where_that_gives_a_file(tmp_path):
    fixtures.write_nyuv2(tmp_path)
    rows = json.loads((tmp_path / NYUV2.file).read_text())
    before = NYUV2.open(tmp_path)
    fixtures.write_list(
        tmp_path, "nyuv2", {split: [[f"/{p}" for p in r] for r in rows[split]] for split in rows}
    )
    assert NYUV2.open(tmp_path) == before


def test_a_list_in_utf8_with_a_byte_order_mark_is_read(tmp_path):
    fixtures.write_nyuv2(tmp_path)
    before = NYUV2.open(tmp_path)
    text = (tmp_path / NYUV2.file).read_text()
    (tmp_path / NYUV2.file).write_text(text, "utf-8-sig")
    assert NYUV2.open(tmp_path) == before


ROW = ["img/0000.png", "seg/0000.png", "normal_mask/0000.png", "depth/0000.npy"]
OTHER = ["img/0000.png", "seg/0001.png", "normal_mask/0000.png", "depth/0000.npy"]


def with_image(path):
    return {"train": [ROW, [path, *ROW[1:]]]}


PATH = "train row 2: image: expected a path relative to the data folder, got"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object with a list of rows per split, got no split"),
        ([ROW], "expected an object with a list of rows per split, got a list"),
        ("text", "expected an object with a list of rows per split, got text"),
        ({"train": {"0": ROW}}, "train: expected a list of rows, got an object"),
        (
            {"train": [ROW[:3]]},
            "train row 1: expected [image, segmentation, normals, depth], g",
        ),
        ({"train": [[*ROW, ""]]}, "train row 1: expected [image, segmentation, normals, depth], g"),
        ({"train": ["img.png"]}, "train row 1: expected [image, segmentation, normals, depth], go"),
        ({"train": [[1, *ROW[1:]]]}, "train row 1: image: expected a path, got a number"),
        ({"train": [[*ROW[:3], None]]}, "train row 1: depth: expected a path, got null"),
        ({"train": [ROW, ROW]}, "train row 2: frame img/0000 is listed twice; keep one"),
        (with_image("./img//0000.png"), "train row 2: frame img/0000 is listed twice; keep one"),
        ({"a": [ROW], "b": [OTHER]}, "b row 1: frame img/0000 has other files in another split"),
        (with_image("/home/a/img/0001.png"), f"{PATH} '/home/a/img/0001.png'; rewrite the paths"),
        (with_image("//img/0001.png"), f"{PATH} '//img/0001.png'; rewrite"),
        (with_image("../img/0001.png"), f"{PATH} '../img/0001.png'; rewrite"),
        (with_image("C:\\img\\0001.png"), PATH),
        (with_image("a\0b"), PATH),
        (with_image("\ud800.png"), "not valid JSON: text with half of a surrogate pair"),
        (with_image("."), f"{PATH} '.'; rewrite"),
        (with_image(""), f"{PATH} ''; rewrite"),
    ],
)
def test_a_faulty_list_is_refused_in_one_line_that_names_the_row(tmp_path, content, message):
    fixtures.write_list(fixtures.write_nyuv2(tmp_path), "nyuv2", content)
    with pytest.raises(ValueError, match=re.escape(f"nyu_v2_3task.json: {message}")) as caught:
        NYUV2.open(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"train": [', r"not valid JSON: Expecting value: line 1 .*; copy the list anew"),
        (b"", r"not valid JSON: Expecting value"),
        (b"[" * 100_000, r"not valid JSON: more than 64 levels"),
        (b'{"train": [], "train": []}', r"not valid JSON: key 'train' comes twice"),
        ('{"trän": []}'.encode("latin-1"), r"not UTF-8 text \(invalid .*\); save it as UTF-8"),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / CITYSCAPES.file).write_bytes(text)
    with pytest.raises(ValueError, match=rf"^cityscape\.json: {message}") as caught:
        CITYSCAPES.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_the_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no file taskonomy\.json in .*; give the folder that"):
        TASKONOMY.open(tmp_path)


@pytest.mark.parametrize(
    ("path", "array", "message"),
    [
        ("img/0000.png", np.zeros((6, 8, 3), np.uint8), "segmentation is 16x12, expected the imag"),
        ("seg/0000.png", np.full((HEIGHT, WIDTH), 40, np.uint8), r"labels 40 in 192 pixels lie ou"),
        ("seg/0000.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8), "expected one channel, got 3"),
        ("normal_mask/0000.png", np.zeros((HEIGHT, WIDTH), np.uint8), "normals of 3 channels"),
        ("depth/0000.npy", np.zeros(5), r"depth/0000\.npy cannot be read \(expected numbers of"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line(tmp_path, path, array, message):
    data = NYUV2.open(fixtures.write_nyuv2(tmp_path))
    fixtures.save(tmp_path, path, array)
    with pytest.raises(ValueError, match=rf"^frame img/0000: .*{message}") as caught:
        read(data, "img/0000")
    assert "\n" not in str(caught.value)


def test_labels_beyond_the_classes_of_taskonomy_are_refused(tmp_path):
    data = TASKONOMY.open(fixtures.write_taskonomy(tmp_path))
    frame_id = data.frames("train")[0]
    labels = np.full((HEIGHT, WIDTH), 18, np.uint8)
    fixtures.save(tmp_path, data.path("segmentation", frame_id), labels)
    with pytest.raises(ValueError, match="labels 18 in 192 pixels lie outside the 18 stored"):
        read(data, frame_id)


def test_class_weights_are_those_of_the_file(tmp_path):
    assert class_weights(tmp_path) == {}
    weights = class_weights(fixtures.write_taskonomy(tmp_path))
    assert weights == {"segmentation": tuple(fixtures.WEIGHTS.astype(float).tolist())}
    assert len(weights["segmentation"]) == len(TASKONOMY_CLASSES)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(18), "got 18$"),
        (np.ones((17, 1)), r"got float64 of shape \(17, 1\)"),
        (np.array(["a"] * 17), r"got <U1 of shape \(17,\)"),
        (np.zeros(17, dtype=bool), r"got bool of shape \(17,\)"),
        (np.zeros(17), "got 0..0"),
        (np.full(17, np.nan), "got nan..nan"),
        (np.array([None] * 17), r"cannot be read \(.* got object of shape \(17,\)"),
    ],
)
def test_faulty_class_weights_are_refused(tmp_path, weights, message):
    np.save(tmp_path / "semseg_prior_factor.npy", weights, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"semseg_prior_factor\.npy.*{message}") as caught:
        class_weights(tmp_path)
    assert "expected 17 positive numbers, one per class" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_class_weights_of_a_lying_header_are_refused(tmp_path):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**55},), }}\n".encode()
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (tmp_path / "semseg_prior_factor.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"^semseg_prior_factor\.npy cannot be read \(") as caught:
        class_weights(tmp_path)
    assert "more than the 100000000 that are read); expected 17 positive" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_class_weights_that_a_link_takes_from_elsewhere_are_refused(tmp_path):
    folder = fixtures.write_taskonomy(tmp_path / "data")
    path = folder / "semseg_prior_factor.npy"
    path.rename(tmp_path / "outside.npy")
    path.symlink_to(tmp_path / "outside.npy")
    with pytest.raises(ValueError, match=r"^semseg_prior_factor\.npy is a link that leaves the da"):
        LISTS["adashare_taskonomy"].open(folder)


def test_the_notes_of_the_data_set_say_how_to_weigh_its_classes(tmp_path):
    note = LISTS["adashare_taskonomy"].open(fixtures.write_taskonomy(tmp_path)).notes[-1]
    assert "tasks.segmentation.class_weights to [0.5, 0.625, " in note
