"""Kinds of targets: how each is resized, and what the decoders make of known pixels."""

import json

import numpy as np
import pytest
import yaml
from folders import DEPTH, LABELS, layout, open_with, write_dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from oneshot_ednas.data.decode import VOID_RIM, label_edges
from oneshot_ednas.data.manifest import open_manifest
from oneshot_ednas.data.targets import TARGET_KINDS, is_valid, resized

HEIGHT, WIDTH = 6, 8
sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))


def drawn(kind, size, seed):
    """A map of a kind, with invalid pixels."""
    row, generator = TARGET_KINDS[kind], np.random.default_rng(seed)
    shape = size if row.channels == 1 else (*size, row.channels)
    top = 2 if kind == "edges" else 7
    target = generator.integers(1 if kind == "depth" else 0, top, shape).astype(row.dtype)
    target[generator.random(size) < 0.2] = row.invalid
    return target


def stored(tmp_path, kind, array, **settings):
    """What a target's decoder makes of the numbers of one file."""
    array = np.asarray(array)
    data = open_with(tmp_path, kind, array, **settings)
    Image.new("RGB", array.shape[1::-1]).save(tmp_path / "rgb/a.png")
    return data.read_stored("a")["map"]


@pytest.mark.parametrize("kind", TARGET_KINDS)
@given(size=sizes, new=sizes, seed=st.integers(0, 99))
def test_a_resized_map_holds_stored_values_only(kind, size, new, seed):
    target = drawn(kind, size, seed)
    found = resized(kind, target, *new)
    assert found.shape == (*new, *target.shape[2:])
    assert found.dtype == target.dtype
    row = TARGET_KINDS[kind]
    pixels = {tuple(p) for p in np.nan_to_num(target, nan=-1).reshape(-1, row.channels).tolist()}
    assert {
        tuple(p) for p in np.nan_to_num(found, nan=-1).reshape(-1, row.channels).tolist()
    } <= pixels | ({(0,)} if kind == "edges" else set())
    assert resized(kind, target, *size) is target


@pytest.mark.parametrize("kind", TARGET_KINDS)
@given(size=sizes, factor=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 99))
def test_enlarging_by_a_whole_number_repeats_pixels(kind, size, factor, seed):
    target = drawn(kind, size, seed)
    larger = resized(kind, target, size[0] * factor[0], size[1] * factor[1])
    expected = target.repeat(factor[0], axis=0).repeat(factor[1], axis=1)
    np.testing.assert_array_equal(larger, expected)


@given(size=sizes, new=sizes, seed=st.integers(0, 99))
def test_shrunken_edges_are_1_where_any_pixel_of_their_area_is(size, new, seed):
    new = min(size[0], new[0]), min(size[1], new[1])
    edges = drawn("edges", size, seed)
    found = resized("edges", edges, *new)
    if new == size:
        return
    for row in range(new[0]):
        for column in range(new[1]):
            rows = slice(row * size[0] // new[0], (row + 1) * size[0] // new[0])
            columns = slice(column * size[1] // new[1], (column + 1) * size[1] // new[1])
            assert (found[row, column] == 1) == (edges[rows, columns] == 1).any()


@given(size=st.integers(2, 64), new=st.integers(1, 64), place=st.integers(0, 63))
def test_a_line_of_one_pixel_survives_every_shrinking_and_stays_thin(size, new, place):
    edges = np.zeros((size, 5), np.uint8)
    edges[place % size] = 1
    new = min(size, new)
    found = resized("edges", edges, new, 5)
    assert (found.sum(axis=0) == 1).all()
    assert (resized("edges", edges.T, 5, new) == found.T).all()
    assert abs((found[:, 0].argmax() + 0.5) / new - (place % size + 0.5) / size) <= 1 / new


def test_invalid_pixels_are_known_by_kind():
    assert is_valid("labels", np.array([[0, 254, 255]], np.uint8)).tolist() == [[1, 1, 0]]
    assert is_valid("edges", np.array([[0, 1, 255]], np.uint8)).tolist() == [[1, 1, 0]]
    assert is_valid("depth", np.array([[0, 0.1]], np.float32)).tolist() == [[0, 1]]
    assert is_valid("values", np.array([[0, np.nan]], np.float32)).tolist() == [[1, 0]]
    normals = np.array([[[0, 0, 0], [0, 0, -1]]], np.float16)
    assert is_valid("normals", normals).tolist() == [[0, 1]]


@given(size=sizes, seed=st.integers(0, 99))
def test_label_edges_are_where_a_right_or_lower_neighbour_differs(size, seed):
    labels = np.random.default_rng(seed).integers(-1, 3, size)
    edges = label_edges(labels, np.zeros(size, bool))
    assert edges.dtype == np.uint8
    for row in range(size[0]):
        for column in range(size[1]):
            label, neighbours = labels[row, column], []
            if column + 1 < size[1]:
                neighbours.append(labels[row, column + 1])
            if row + 1 < size[0]:
                neighbours.append(labels[row + 1, column])
            assert edges[row, column] == any(other != label for other in neighbours)


@pytest.mark.parametrize("width", [1, 2, 5, 10])
def test_a_rim_of_void_is_one_contour(width):
    labels = np.zeros((4, 20 + width), np.uint8)
    labels[:, 10 + width :] = 3
    labels[:, 10 : 10 + width] = 255
    edges = label_edges(labels, labels == 255)
    assert (edges.sum(axis=1) == 1).all()
    assert (edges[:, 9 : 10 + width] == 1).any(axis=1).all()


def test_nothing_is_known_of_edges_deep_in_void():
    labels = np.zeros((3, 30), np.uint8)
    labels[:, 10:] = 255
    edges = label_edges(labels, labels == 255)
    assert (edges[:, : 10 + VOID_RIM] == 0).all()
    assert (edges[:, 10 + VOID_RIM :] == 255).all()
    assert (label_edges(labels, np.ones((3, 30), bool)) == 255).all()


def test_disparity_is_scaled_and_what_is_not_positive_is_invalid(tmp_path):
    values = [[0.0, 1, 3, 9], [-5, np.nan, np.inf, 1e300]]
    found = stored(tmp_path, "disparity", values, scale=0.5, offset=-1, invalid=[0, 9])
    assert found.dtype == np.float32
    assert found.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]


def test_depth_is_scaled_cut_and_freed_of_what_is_no_depth(tmp_path):
    values = [[0.0, 2, 65, -1], [np.nan, -np.inf, 1e300, 40]]
    found = stored(tmp_path, "depth", values, scale=0.5, max_metres=30, invalid=[0, 65])
    assert found.dtype == np.float32
    assert found.tolist() == [[0, 1, 0, 0], [0, 0, 0, 20]]
    inverse = stored(tmp_path, "depth", [[0.0, 4, 1e-300]], scale=2, encoding="inverse")
    assert inverse.tolist() == [[0, 0.5, 0]]


def test_values_are_scaled_and_may_be_negative_or_zero(tmp_path):
    found = stored(
        tmp_path, "values", [[0.0, -2, 7], [np.nan, np.inf, 1e300]], scale=2, invalid=[7]
    )
    np.testing.assert_array_equal(found, np.float32([[0, -4, np.nan], [np.nan] * 3]))
    assert found.dtype == np.float32


def test_edges_are_above_a_value_and_unknown_where_the_file_says_so(tmp_path):
    found = stored(tmp_path, "edges", [[0.0, 0.5, 0.6], [9, np.nan, -1]], above=0.5, ignore=9)
    assert found.tolist() == [[0, 0, 1], [255, 255, 0]]
    assert stored(tmp_path, "edges", [[0, 1, 255]]).tolist() == [[0, 1, 1]]


def test_classes_may_be_made_from_a_quantity(tmp_path):
    settings = {"classes": ["background", "salient"], "above": 127.5}
    # All stored values are quantities, 255 too.
    found = stored(tmp_path, "labels", [[0.0, 127, 128], [255, np.nan, 200]], **settings)
    assert found.tolist() == [[0, 0, 1], [1, 255, 1]]
    found = stored(tmp_path, "labels", [[0, 127, 255]], ignore=255, **settings)
    assert found.tolist() == [[0, 0, 255]]


def test_normals_are_unit_vectors_in_camera_axes(tmp_path):
    vectors = [[[2.0, 0, 0], [0, 0, 3]], [[0, 0, 0.4], [np.nan, 1, 1]]]
    found = stored(tmp_path, "normals", vectors, axes=["left", "up", "backward"])
    assert found.dtype == np.float16
    assert found.tolist() == [[[-1, 0, 0], [0, 0, -1]], [[0, 0, 0], [0, 0, 0]]]
    colours = np.array([[[255, 128, 128], [7, 7, 7]]], np.uint8)
    axes = ["right", "down", "forward"]
    found = stored(tmp_path, "normals", colours, encoding="rgb", axes=axes, invalid=[7, 7, 7])
    assert np.abs(found.astype(float) - [[[1, 0, 0], [0, 0, 0]]]).max() < 0.01


def test_edges_are_derived_from_the_stored_labels_whatever_the_label_map(tmp_path):
    targets = {"segmentation": LABELS, "edges": {"kind": "derived_edges"}}
    data = write_dataset(tmp_path, manifest=layout(targets=targets))
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:, 3:] = 2
    labels[0, 0] = 255
    Image.fromarray(labels).save(tmp_path / "label/a.png")
    for label_map in (None, "two"):
        frame = data.read_stored("a", label_map=label_map)
        assert (frame["edges"] == label_edges(labels, labels == 255)).all()
    assert frame["edges"].sum() == HEIGHT
    # Only what the edges are derived from is read.
    assert data.files("a", ["edges"]) == ("rgb/a.png", "label/a.png")
    assert data.sources(["edges"]).keys() == {"edges", "segmentation"}


def write_camera(root, baseline, fx):
    (root / "camera").mkdir(exist_ok=True)
    camera = {"extrinsic": {"baseline": baseline}, "intrinsic": {"fx": fx}}
    (root / "camera/a_camera.json").write_text(json.dumps(camera))


def test_a_camera_file_turns_disparity_into_metres(tmp_path):
    source = {
        "kind": "depth",
        "folder": "depth",
        "suffix": ".png",
        "encoding": "inverse",
        "offset": -1,
        "scale": 256.0,  # disparity is (stored - 1) / 256 pixels
        "camera": {"folder": "camera", "suffix": "_camera.json"},
    }
    data = write_dataset(tmp_path, manifest=layout(targets={"depth": source}))
    disparity = np.full((HEIGHT, WIDTH), 10 * 256 + 1, np.uint16)
    disparity[0, :3] = 0, 1, 5 * 256 + 1
    Image.fromarray(disparity).save(tmp_path / "depth/a.png")
    write_camera(tmp_path, 0.2, 2000.0)
    depth = data.read_stored("a")["depth"]
    assert depth[0, :3].tolist() == [0, 0, 80]
    assert (depth[1:] == 40).all()
    assert data.files("a", ["depth"]) == ("rgb/a.png", "depth/a.png", "camera/a_camera.json")
    expected = "expected extrin"
    for baseline, fx, reason in [
        (0, 2000.0, expected),
        (0.2, "x", expected),
        (0.2, None, expected),
        (float("nan"), 1, "not valid JSON: NaN"),
    ]:
        write_camera(tmp_path, baseline, fx)
        with pytest.raises(ValueError, match=rf"^frame a: camera/a_camera\.json: {reason}"):
            data.read_stored("a")
    (tmp_path / "camera/a_camera.json").unlink()
    with pytest.raises(ValueError, match=r"^frame a: no file camera/a_camera\.json; restore it"):
        data.identity("train", ["depth"])


PARTS = {
    "kind": "pascal_parts",
    "folder": "parts",
    "suffix": ".mat",
    "classes": ["background", "head", "torso"],
    "parts": {"hair": 1, "head": 1, "torso": 2},
}


def write_parts(root, objects):
    """A file of PASCAL-Parts: objects as (class, mask, {part name: mask})."""
    scipy_io = pytest.importorskip("scipy.io")
    (root / "parts").mkdir(exist_ok=True)
    part_type = [("part_name", object), ("mask", object)]
    rows = []
    for index, mask, parts in objects:
        found = np.zeros((1, len(parts)), part_type)
        for i, item in enumerate(parts.items()):
            found[0, i] = item
        rows.append(("name", index, mask, found))
    kind = [("class", object), ("class_ind", object), ("mask", object), ("parts", object)]
    scipy_io.savemat(
        root / "parts/a.mat",
        {"anno": {"imname": "a", "objects": np.array([rows], kind).reshape(1, -1)}},
    )


def mask(rows, columns):
    found = np.zeros((HEIGHT, WIDTH), np.uint8)
    found[rows, columns] = 1
    return found


def test_parts_of_persons_are_painted_in_the_order_of_the_file(tmp_path):
    pytest.importorskip("scipy")
    (tmp_path / "parts").mkdir()
    data = write_dataset(tmp_path, manifest=layout(targets={"parts": PARTS}))
    person = mask(slice(0, 4), slice(0, 4))
    body = {"torso": mask(slice(0, 4), 1), "hair": mask(0, slice(0, 2)), "tail": mask(5, 5)}
    dog = (12, mask(5, slice(0, 8)), {"head": mask(5, 0)})
    write_parts(tmp_path, [dog, (15, person, body)])
    expected = np.zeros((HEIGHT, WIDTH))
    expected[:4, 1] = 2
    expected[0, :2] = 1
    assert data.read_stored("a")["parts"].tolist() == expected.tolist()
    assert data.class_names("parts") == ("background", "head", "torso")
    for objects in ([dog], [(15, person, {})], [(15, person, {"tail": person})]):
        write_parts(tmp_path, objects)
        assert (data.read_stored("a")["parts"] == 255).all()


def test_a_matlab_file_without_parts_is_refused(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    (tmp_path / "parts").mkdir()
    data = write_dataset(tmp_path, manifest=layout(targets={"parts": PARTS}))
    for variables in ({"x": 1}, {"anno": 1}, {"anno": {"objects": np.zeros((0, 0))}}):
        scipy_io.savemat(tmp_path / "parts/a.mat", variables)
        with pytest.raises(ValueError, match=r"^frame a: parts/a\.mat: expected a structure anno"):
            data.read_stored("a")


def test_every_frame_may_lie_in_one_matlab_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (HEIGHT, WIDTH, 3, 4), dtype=np.uint8)
    depths = generator.uniform(1, 9, (HEIGHT, WIDTH, 4)).astype(np.float32)
    with h5py.File(tmp_path / "all.mat", "w") as file:
        file["images"], file["depths"] = images.T, depths.T
    (tmp_path / "train.txt").write_text("0\n3\n")
    manifest = {
        "name": "stack",
        "image": {"folder": ".", "suffix": "all.mat", "stack": "images"},
        "splits": {"train": "train.txt"},
        "targets": {
            "depth": {"kind": "depth", "folder": ".", "suffix": "all.mat", "stack": "depths"}
        },
    }
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(manifest))
    data = open_manifest(tmp_path)
    frame = data.read_stored("3")
    assert (frame["image"] == images[..., 3]).all()
    assert (frame["depth"] == depths[..., 3]).all()
    assert [path for path, *_ in data.identity("train", ["depth"])] == ["all.mat"]
    with pytest.raises(ValueError, match=r"^frame 4: all\.mat cannot be read \(images has frames"):
        data.read_stored("4")


def test_an_array_of_8_bits_is_no_image_of_16(tmp_path):
    image = {"folder": "rgb", "suffix": ".png", "white": 65535}
    data = write_dataset(tmp_path, manifest=layout(image=image, targets={"depth": DEPTH}))
    with pytest.raises(ValueError, match=r"^frame a: rgb/a\.png: image\.white is 65535, got val"):
        data.read_stored("a")
    Image.fromarray(np.full((HEIGHT, WIDTH), 65535 // 5, np.uint16)).save(tmp_path / "rgb/a.png")
    assert (data.read_stored("a")["image"] == 51).all()
