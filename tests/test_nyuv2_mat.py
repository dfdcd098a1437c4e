import numpy as np
import pytest
from fixtures_nyuv2_mat import (
    HEIGHT,
    MAP_CLASS,
    TEST,
    TRAIN,
    WIDTH,
    stored_arrays,
    write_class_mapping,
    write_frames,
    write_nyuv2_mat,
    write_splits,
)

from oneshot_ednas.data.layouts.nyuv2_mat import is_nyuv2_mat, open_nyuv2_mat
from oneshot_ednas.data.packed import folder_split

h5py = pytest.importorskip("h5py")
pytest.importorskip("scipy")

FRAMES = "nyu_depth_v2_labeled.mat"
ALL = tuple(str(index) for index in range(5))


def read(data, frame, height=HEIGHT, width=WIDTH, **options):
    return data.read_frame(frame, height=height, width=width, **options)


def test_splits_count_frames_from_zero(tmp_path):
    assert not is_nyuv2_mat(tmp_path)
    write_nyuv2_mat(tmp_path)
    assert is_nyuv2_mat(tmp_path)
    data = open_nyuv2_mat(tmp_path)
    assert data.splits == {
        "train": tuple(str(index - 1) for index in TRAIN),
        "test": tuple(str(index - 1) for index in TEST),
    }


def test_images_and_depths_keep_rows_columns_and_channels(tmp_path):
    arrays = write_nyuv2_mat(tmp_path)
    data = open_nyuv2_mat(tmp_path)
    for frame in ALL:
        found = read(data, frame)
        assert (found["image"] == arrays["images"][int(frame)]).all()
        assert (found["depth"] == arrays["depths"][int(frame)]).all()
        assert found["depth"].dtype == np.float32


def test_stored_labels_become_forty_classes(tmp_path):
    arrays = write_nyuv2_mat(tmp_path)
    data = open_nyuv2_mat(tmp_path)
    classes = [255] + [k - 1 if k else 255 for k in MAP_CLASS]
    for frame in ALL:
        wanted = np.array(classes)[arrays["labels"][int(frame)]]
        assert (read(data, frame)["segmentation"] == wanted).all()
    assert len(data.class_names("segmentation")) == 40
    names = data.class_names("segmentation", "classes13")
    assert len(names) == 13
    coarse = read(data, "0", label_map="classes13")["segmentation"]
    found = [names[index] if index != 255 else None for index in coarse[0, :8]]
    # Classes 40 otherprop, 1 wall, 22 ceiling, 5 chair, 12 counter; 0 is none.
    assert found == [None, "objects", "wall", None, "ceiling", "chair", "wall", "furniture"]


def test_at_half_size_targets_are_the_stored_pixels(tmp_path):
    write_nyuv2_mat(tmp_path)
    data = open_nyuv2_mat(tmp_path)
    whole, half = read(data, "3"), read(data, "3", HEIGHT // 2, WIDTH // 2)
    for name in data.targets:
        assert (half[name] == whole[name][1::2, 1::2]).all()
    means = whole["image"].reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(half["image"] - means).max() <= 1


def test_normals_of_a_plane_are_the_planes_by_the_official_camera(tmp_path):
    height, width = 480, 640
    v, u = np.mgrid[:height, :width].astype(float)
    rays = np.stack([(u - 325.58) / 518.86, (v - 253.74) / 519.47, u * 0 + 1], -1)
    normal = np.array([0.2, -0.5, -0.8]) / np.linalg.norm([0.2, -0.5, -0.8])
    arrays = stored_arrays((height, width), 2)
    arrays["depths"][0] = -2 / (rays @ normal)
    arrays["labels"][0] = u // 320 + 1
    write_frames(tmp_path, arrays)
    write_splits(tmp_path, train=(1,), test=(2,))
    assert "normals are derived from depth: not those" in open_nyuv2_mat(tmp_path).notes[1]
    write_class_mapping(tmp_path)
    data = open_nyuv2_mat(tmp_path)
    assert list(data.targets) == ["segmentation", "depth", "normals"]
    assert "normals are derived from depth within each label" in data.notes[0]
    found = read(data, "0", 48, 64, targets=("normals",))["normals"].astype(float)
    assert np.abs(found - normal).max() < 2e-3


def test_frames_of_another_size_have_no_normals(tmp_path):
    write_nyuv2_mat(tmp_path)
    data = open_nyuv2_mat(tmp_path)
    assert list(data.targets) == ["segmentation", "depth"]
    assert data.notes == ("no normals: frames are 16x12, the camera is known for 640x480",)


def test_without_the_class_mapping_there_is_no_segmentation(tmp_path):
    write_nyuv2_mat(tmp_path)
    (tmp_path / "classMapping40.mat").unlink()
    data = open_nyuv2_mat(tmp_path)
    assert list(data.targets) == ["depth"]
    assert data.notes[0] == (
        "no segmentation: classMapping40.mat gives the 40 classes and is not there"
    )
    with pytest.raises(ValueError, match="nyuv2 has no target segmentation"):
        read(data, "0", targets=("segmentation",))


def without(arrays, name):
    return {key: array for key, array in arrays.items() if key != name}


def spoil(root, fault):
    arrays = write_nyuv2_mat(root)
    path = root / FRAMES
    if fault == "no split":
        (root / "splits.mat").unlink()
    elif fault == "cut short":
        path.write_bytes(path.read_bytes()[:3000])
    elif fault == "no HDF5":
        path.write_text("hello")
    elif fault == "no images":
        write_frames(root, without(arrays, "images"))
    elif fault == "no labels":
        write_frames(root, without(arrays, "labels"))
    elif fault == "axes":
        with h5py.File(path, "w") as file:
            file["images"] = arrays["images"]
    elif fault == "fewer depths":
        write_frames(root, {**arrays, "depths": arrays["depths"][:3]})
    elif fault == "split cut short":
        (root / "splits.mat").write_bytes((root / "splits.mat").read_bytes()[:150])
    elif fault == "mapping cut short":
        mapping = root / "classMapping40.mat"
        mapping.write_bytes(mapping.read_bytes()[:150])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no split", r"no file splits\.mat beside nyu_depth_v2_labeled\.mat; it holds the offic"),
        ("cut short", rf"{FRAMES} cannot be read \(.+\); expected a whole file of MATLAB 7\.3"),
        ("no HDF5", rf"{FRAMES} cannot be read \(.+\); expected a whole file of MATLAB 7\.3"),
        ("no images", rf"{FRAMES}: expected images of frames x 3 x width x height, got none"),
        ("no labels", rf"{FRAMES}: expected labels of \(5, 16, 12\) as the images, got none"),
        ("axes", rf"{FRAMES}: expected images of .+, got \(5, 12, 16, 3\); restore"),
        ("fewer depths", rf"{FRAMES}: expected depths of \(5, 16, 12\) .+, got \(3, 16, 12\)"),
        ("split cut short", r"splits\.mat cannot be read \(.+\); expected a whole MATLAB file"),
        ("mapping cut short", r"classMapping40\.mat cannot be read \(.+\); expected a whole"),
    ],
)
def test_faulty_files_are_refused_when_opened(tmp_path, fault, message):
    spoil(tmp_path, fault)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        open_nyuv2_mat(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((), r"expected trainNdxs within 1\.\.5, got none"),
        ((0, 1), r"expected trainNdxs within 1\.\.5, got 0\.\.1"),
        ((1, 6), r"expected trainNdxs within 1\.\.5, got 1\.\.6"),
        ((1, 1), "trainNdxs lists a frame twice"),
        ((1, 1.5), "expected a vector trainNdxs of whole numbers"),
        ((1, 3), "frame 3 is in trainNdxs and in testNdxs"),
    ],
)
def test_splits_with_faults_are_refused(tmp_path, train, message):
    write_nyuv2_mat(tmp_path)
    write_splits(tmp_path, train=train)
    with pytest.raises(ValueError, match=rf"^splits\.mat: {message}"):
        open_nyuv2_mat(tmp_path)


@pytest.mark.parametrize(
    ("map_class", "message"),
    [
        ((1, 2, 3), rf"expected mapClass of the 7 names in {FRAMES}, got 3"),
        ((1, 2, 3, 4, 5, 6, 41), r"expected mapClass in 0\.\.40, got 1\.\.41"),
        ((1, 2, 3, 4, 5, 6, 0.5), "expected a vector mapClass of whole numbers"),
    ],
)
def test_class_mappings_with_faults_are_refused(tmp_path, map_class, message):
    write_nyuv2_mat(tmp_path)
    write_class_mapping(tmp_path, map_class)
    with pytest.raises(ValueError, match=rf"^classMapping40\.mat: {message}"):
        open_nyuv2_mat(tmp_path)


def test_a_label_without_a_name_is_refused_when_read(tmp_path):
    arrays = write_nyuv2_mat(tmp_path)
    arrays["labels"][3, 0, 0] = 8
    write_frames(tmp_path, arrays)
    message = rf"^frame 3: {FRAMES}: labels 8 in 1 pixels lie outside the 8 stored classes"
    with pytest.raises(ValueError, match=message):
        read(open_nyuv2_mat(tmp_path), "3")


def test_a_packed_split_holds_what_the_frames_hold(tmp_path):
    write_nyuv2_mat(tmp_path)
    data = open_nyuv2_mat(tmp_path)
    packed = folder_split(data, "train", height=6, width=8, cache_dir=tmp_path / "cache", workers=1)
    assert packed.sources == data.splits["train"]
    for index, frame in enumerate(packed.sources):
        wanted, found = read(data, frame, 6, 8), packed.frame(index)
        assert found.keys() == wanted.keys()
        assert all((found[name] == wanted[name]).all() for name in wanted)
