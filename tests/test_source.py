"""Where a run's data comes from: rendered streets or a user's folder."""

import fixtures_mtan
import numpy as np
import pytest
from PIL import Image

from oneshot_ednas.data.source import DataConfig, load_data
from oneshot_ednas.tasks import TaskConfig, make_tasks

MANIFEST = """\
name: rooms
image: {folder: rgb, suffix: .png}
splits: {train: train.txt, test: test.txt}
targets:
  segmentation: {kind: labels, folder: label, suffix: .png, classes: [wall, floor, chair]}
  depth: {kind: depth, folder: depth, suffix: .png, scale: 0.001}
"""
SEGMENTATION = TaskConfig(kind="segmentation", num_classes=3)
DEPTH = TaskConfig(kind="depth")


def write_rooms(root, *, frames=6, size=(24, 32)):
    """A small data folder: numbered frames, the last two for the test."""
    generator = np.random.default_rng(0)
    for name in ("rgb", "label", "depth"):
        (root / name).mkdir(parents=True)
    for frame in range(frames):
        picture = generator.integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(picture).save(root / f"rgb/{frame}.png")
        Image.fromarray(generator.integers(0, 3, size).astype(np.uint8)).save(
            root / f"label/{frame}.png"
        )
        Image.fromarray(generator.integers(500, 9000, size).astype(np.uint16)).save(
            root / f"depth/{frame}.png"
        )
    (root / "train.txt").write_text("".join(f"{i}\n" for i in range(frames - 2)))
    (root / "test.txt").write_text(f"{frames - 2}\n{frames - 1}\n")
    (root / "dataset.yaml").write_text(MANIFEST)
    return root


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("rooms"))


def folder_config(**settings) -> DataConfig:
    return DataConfig(**({"source": "folder", "height": 16, "width": 32, "workers": 1} | settings))


def tasks(**configs):
    return make_tasks(configs or {"segmentation": SEGMENTATION, "depth": DEPTH})


def test_streets_give_the_asked_frames_at_the_asked_size(capsys):
    config = DataConfig(height=32, width=32, train_frames=32, test_frames=6, workers=1)
    some = make_tasks({"depth": DEPTH, "normals": TaskConfig(kind="normals")})
    train, test = load_data(config, some)
    assert (len(train), len(test)) == (32, 6)
    assert train.arrays["image"].shape == (32, 32, 32, 3)
    assert config.image_size == (32, 32)
    assert train.name != test.name
    assert not np.array_equal(train.arrays["image"][0], test.arrays["image"][0])
    assert capsys.readouterr().out == ""


def test_a_folder_is_read_as_its_manifest_says(rooms):
    train, test = load_data(folder_config(root=str(rooms)), tasks())
    assert (train.sources, test.sources) == (("0", "1", "2", "3"), ("4", "5"))
    assert train.class_names == {"segmentation": ("wall", "floor", "chair")}
    assert train.kinds == {"segmentation": "labels", "depth": "depth"}
    assert train.arrays["depth"].shape == (4, 16, 32)
    assert (train.height, train.width) == (16, 32)
    assert 0.5 <= train.arrays["depth"].min() <= train.arrays["depth"].max() <= 9.0


def test_the_config_s_manifest_comes_before_the_folder_s(rooms, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(MANIFEST.replace("rooms", "halls").replace("0.001", "0.002"))
    train, _ = load_data(folder_config(root=str(rooms)), tasks())
    assert train.name == "rooms-train"
    train, _ = load_data(folder_config(root=str(rooms), manifest=str(other)), tasks())
    assert train.name == "halls-train"
    bare = write_rooms(tmp_path / "bare")
    (bare / "dataset.yaml").unlink()
    train, _ = load_data(folder_config(root=str(bare), manifest=str(other)), tasks())
    assert train.name == "halls-train"
    assert train.arrays["depth"].max() > 9.0


def test_frames_that_are_trained_on_and_tested_on_are_refused(tmp_path):
    rooms = write_rooms(tmp_path / "rooms")
    (rooms / "test.txt").write_text("3\n4\n5\n")
    message = "1 frames are in both rooms-train and rooms-test, for example 3"
    with pytest.raises(ValueError, match=message):
        load_data(folder_config(root=str(rooms)), tasks())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "streets"}, "source streets needs train_frames and test_frames"),
        ({"source": "streets", "train_frames": 3}, "needs train_frames and test_frames"),
        ({"train_frames": 3}, "train_frames and test_frames belong to source streets"),
        ({"train_split": "test"}, "train_split and test_split are both test"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"height": 15}, "expected images of at least 16x16, got 15x32"),
    ]
    + [
        (
            {"source": "streets", "train_frames": 3, "test_frames": 3, name: "x"},
            f"{name} belongs to source folder, not to streets",
        )
        for name in ("root", "layout", "manifest", "label_map")
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        folder_config(**settings)


def test_a_data_folder_that_is_not_named_or_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="this config reads a data folder: name it with --data"):
        load_data(folder_config(), tasks())
    with pytest.raises(FileNotFoundError, match=r"no data folder .*/nowhere"):
        load_data(folder_config(root=str(tmp_path / "nowhere")), tasks())
    with pytest.raises(ValueError, match=r"has no known layout: found nothing; expected one of"):
        load_data(folder_config(root=str(tmp_path)), tasks())
    with pytest.raises(FileNotFoundError, match=r"no file else.yaml"):
        load_data(folder_config(root=str(tmp_path), manifest="else.yaml"), tasks())


def test_tasks_must_match_the_data(rooms):
    with pytest.raises(ValueError, match="rooms has no target normals; known: depth, segmentation"):
        load_data(folder_config(root=str(rooms)), tasks(normals=TaskConfig(kind="normals")))
    ten = TaskConfig(kind="segmentation", num_classes=10)
    message = (
        "task segmentation: expected 10 classes, segmentation of rooms-train has 3; set num_classes"
    )
    with pytest.raises(ValueError, match=message):
        load_data(folder_config(root=str(rooms)), tasks(segmentation=ten))
    streets = DataConfig(height=32, width=32, train_frames=32, test_frames=6, workers=1)
    with pytest.raises(ValueError, match="task seg has no target seg in streets-train; it has "):
        load_data(streets, tasks(seg=SEGMENTATION))
    with pytest.raises(
        ValueError, match=r"task depth is of kind normals, which .* normals; .* has depth"
    ):
        load_data(streets, tasks(depth=TaskConfig(kind="normals")))


def test_a_task_of_another_name_tells_a_pack_its_number_of_classes(tmp_path):
    fixtures_mtan.write_cityscapes(tmp_path, folders=("label",))
    config = folder_config(root=str(tmp_path), train_split="train", test_split="val")
    named = tasks(semantics=TaskConfig(kind="segmentation", target="segmentation", num_classes=7))
    train, _ = load_data(config, named)
    assert len(train.class_names["semantics"]) == 7


def test_saliency_needs_labels_of_two_classes(rooms):
    mask = tasks(mask=TaskConfig(kind="saliency", target="segmentation"))
    with pytest.raises(ValueError, match="task mask: expected 2 classes, segmentation of rooms-tr"):
        load_data(folder_config(root=str(rooms)), mask)
