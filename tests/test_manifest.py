"""The manifest of a data folder and its split files: what is refused, and in which words."""

import os

import pytest
import yaml
from folders import DEPTH, LABELS, NORMALS, layout, write_dataset

from oneshot_ednas.data.manifest import Manifest, open_manifest
from oneshot_ednas.schema import dump_yaml, load_yaml, parse_yaml


def refused(root, match, **changes):
    with pytest.raises(ValueError, match=match) as caught:
        write_dataset(root, manifest=layout(**changes))
    assert "\n" not in str(caught.value)


def write_split(root, text):
    (root / "splits/train.txt").write_bytes(text)


def test_a_manifest_reads_back_equal(tmp_path):
    write_dataset(tmp_path)
    manifest = load_yaml(tmp_path / "dataset.yaml", Manifest)
    assert parse_yaml(dump_yaml(manifest), Manifest, source="dumped") == manifest
    assert {name: source.target_kind for name, source in manifest.targets.items()} == {
        "segmentation": "labels",
        "depth": "depth",
        "normals": "normals",
    }


def test_a_manifest_may_lie_elsewhere(tmp_path):
    data = write_dataset(tmp_path / "data")
    manifest = (tmp_path / "data/dataset.yaml").rename(tmp_path / "other.yaml")
    other = open_manifest(tmp_path / "data", manifest)
    assert (other.targets, other.splits) == (data.targets, data.splits)
    assert (data.layout, other.layout) == ("manifest dataset.yaml", "manifest other.yaml")


@pytest.mark.parametrize("frame", ["../secret", "/etc/passwd", "x/../../y", "..\\up", "a\0b"])
def test_frames_outside_the_folder_are_refused(tmp_path, frame):
    data = write_dataset(tmp_path)
    write_split(tmp_path, frame.encode() + b"\n")
    with pytest.raises(ValueError, match=r"train\.txt: frame: expected a path inside the data fol"):
        open_manifest(tmp_path)
    with pytest.raises(ValueError, match="frame: expected a path inside the data folder, got"):
        data.read_frame(frame, height=2, width=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a\na\n", r"^splits/train\.txt: frame a is listed twice; keep one$"),
        (b"a\n./a\n", r"^splits/train\.txt: frame a is listed twice; keep one$"),
        (b"\n \n", r"^splits/train\.txt: expected one frame id a line, got an empty file$"),
        (b"", r"^splits/train\.txt: expected one frame id a line, got an empty file$"),
        (b"caf\xe9\n", r"^splits/train\.txt: not UTF-8 text \(.+\); save it as UTF-8$"),
        ("a\n".encode("utf-16"), r"^splits/train\.txt: not UTF-8 text \(.+\); save it as UTF-8$"),
    ],
)
def test_split_files_with_faults_are_refused(tmp_path, text, message):
    write_dataset(tmp_path)
    write_split(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        open_manifest(tmp_path)


@pytest.mark.parametrize("text", [b"a\nb\n", b"a\r\nb\r\n", b"\xef\xbb\xbfa\nb", b" a \n\n./b\n\n"])
def test_split_files_of_any_editor_give_the_same_frames(tmp_path, text):
    write_dataset(tmp_path)
    write_split(tmp_path, text)
    assert open_manifest(tmp_path).frames("train") == ("a", "b")


def test_names_in_other_alphabets_are_read(tmp_path):
    data = write_dataset(tmp_path, frames=("küche/täglich", "部屋\u2028一"))
    assert data.frames("train") == ("küche/täglich", "部屋\u2028一")
    assert set(data.read_frame("küche/täglich", height=2, width=2)) == {"image", *data.targets}


def test_names_that_are_no_utf8_are_refused(tmp_path):
    data = write_dataset(tmp_path)
    frame = os.fsdecode(b"caf\xe9")
    with pytest.raises(ValueError, match=r"frame: expected a name in UTF-8, got 'caf\\udce9'"):
        data.read_frame(frame, height=2, width=2)


def test_a_folder_without_what_the_manifest_names_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no data folder .*absent; give the folder that holds"):
        open_manifest(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no manifest .*dataset\.yaml; write one as in configs"):
        open_manifest(tmp_path)
    write_dataset(tmp_path)
    (tmp_path / "splits/train.txt").unlink()
    with pytest.raises(ValueError, match=r"no file splits/train\.txt for a split in .*, named in"):
        open_manifest(tmp_path)
    (tmp_path / "normal").rename(tmp_path / "normals")
    with pytest.raises(ValueError, match=r"no folder normal for normals in .*, named in"):
        open_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "name: expected letters, digits, _, - and ., got 'a/b'"),
        ({"name": ""}, "name: expected letters, digits, _, - and ., got ''"),
        ({"splits": {}}, "expected at least one split"),
        ({"splits": {"train": "../x"}}, r"splits\.train: expected a path inside the data folder"),
        ({"splits": {"a/b": "splits/train.txt"}}, "splits: expected letters, digits, .*'a/b'"),
        ({"image": {"folder": "/rgb", "suffix": ".png"}}, "folder: expected a path inside"),
        ({"image": {"folder": "rgb", "suffix": ".tif"}}, r"expected a suffix of \.png.*'\.tif'"),
        ({"image": {"folder": "rgb", "suffix": "/../x.png"}}, r"expected a suffix of \.png"),
        (
            {"image": {"folder": "rgb", "suffix": ".png", "white": 0}},
            "expected a positive stored value of white, got 0",
        ),
        (
            {"intrinsics": {"fx": 0, "fy": 1, "cx": 0, "cy": 0}},
            r"expected positive focal lengths, got fx=0\.0, fy=1\.0",
        ),
    ],
)
def test_manifests_with_faults_are_refused(tmp_path, changes, message):
    refused(tmp_path, message, **changes)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("image", DEPTH, "targets.image: image is the input; name the target otherwise"),
        ("../depth", DEPTH, "targets: expected letters, digits, _, - and ., got '../depth'"),
        ("depth", {**DEPTH, "scale": 0}, "expected a positive depth scale, got 0"),
        ("depth", {**DEPTH, "max_metres": 0}, "max_metres: expected a positive distance, got 0"),
        (
            "depth",
            {**DEPTH, "camera": {"folder": "camera", "suffix": ".json"}},
            "camera files turn disparity into metres: set encoding: inverse",
        ),
        (
            "depth",
            {**DEPTH, "encoding": "inverse", "camera": {"folder": "..", "suffix": ".json"}},
            "folder: expected a path inside the data folder",
        ),
        (
            "depth",
            {"kind": "disparity", "folder": "depth", "suffix": ".png", "scale": -1},
            "expected a positive disparity scale, got -1",
        ),
        ("labels", {**LABELS, "classes": ["a", "a"]}, "classes: a is listed twice"),
        ("labels", {**LABELS, "classes": []}, "expected 1 to 255 classes, got 0"),
        (
            "labels",
            {**LABELS, "label_maps": {"m": {"classes": ["a"], "map": [0, 1]}}},
            r"map: expected classes 0\.\.0 or 255 \(dropped\), got 1",
        ),
        ("labels", {**LABELS, "above": 3}, "above makes two classes, got 3"),
        ("labels", {**LABELS, "above": 3, "classes": ["a", "b"]}, "there can be no label_maps"),
        (
            "parts",
            {
                "kind": "pascal_parts",
                "folder": "label",
                "suffix": ".mat",
                "classes": ["none", "head"],
                "parts": {"hair": 2},
            },
            r"parts\.hair: expected a class of 1\.\.1, got 2",
        ),
        ("edges", {"kind": "derived_edges"}, "derived from segmentation, expected .* kind labels"),
        ("normals", {"kind": "derived_normals"}, "derived from depth, expected .* of kind depth"),
        ("normals", {"kind": "derived_normals", "window": 4}, "an odd window of at least 3"),
        ("normals", {**NORMALS, "axes": ["x", "up", "up"]}, "axes: unknown direction x"),
        ("normals", {**NORMALS, "axes": ["right", "up", "up"]}, "three different axes, got right"),
        ("normals", {**NORMALS, "invalid": [0]}, "expected three invalid values, got 1"),
    ],
)
def test_targets_with_faults_are_refused(tmp_path, name, source, message):
    refused(tmp_path, message, targets={name: source})


def test_derived_normals_need_intrinsics_and_derived_edges_need_stored_labels(tmp_path):
    refused(
        tmp_path,
        "targets.normals: derived from depth, which needs the camera's intrinsics",
        targets={"depth": DEPTH, "normals": {"kind": "derived_normals"}},
    )
    salient = {"kind": "labels", "folder": "label", "suffix": ".png", "classes": ["no", "yes"]}
    refused(
        tmp_path,
        "targets.edges: derived from salient, expected a target of kind labels that stores them",
        targets={
            "salient": {**salient, "above": 3},
            "edges": {"kind": "derived_edges", "labels": "salient"},
        },
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{folder: depth, suffix: .png}", r"yaml:5: missing key targets\.depth\.kind; known: lab"),
        (
            "{kind: dpeth, folder: depth, suffix: .png}",
            r"yaml:5: targets\.depth\.kind: unknown dpeth; did you mean depth\?",
        ),
        (
            "{kind: depth, folder: depth, suffix: .png, classes: [a]}",
            r"yaml:5: unknown key targets\.depth\.classes; ",
        ),
        ("{kind: depth, folder: depth}", r"yaml:5: missing key targets\.depth\.suffix"),
        ("depth", r"yaml:5: targets\.depth: expected keys and values, got 'depth'"),
    ],
)
def test_faults_of_a_target_name_their_line(tmp_path, text, message):
    write_dataset(tmp_path)
    (tmp_path / "dataset.yaml").write_text(
        "name: toy\nimage: {folder: rgb, suffix: .png}\nsplits: {train: splits/train.txt}\n"
        f"targets:\n  depth: {text}\n"
    )
    with pytest.raises(ValueError, match=message):
        open_manifest(tmp_path)


def test_links_inside_the_folder_are_followed_and_others_are_not(tmp_path):
    outside = tmp_path / "outside"
    data = write_dataset(tmp_path / "data")
    write_dataset(outside)
    depth = tmp_path / "data/depth/a.png"
    depth.unlink()
    depth.symlink_to("b.png")
    assert data.read_frame("a", height=2, width=2)["depth"].shape == (2, 2)
    depth.unlink()
    depth.symlink_to(outside / "depth/b.png")
    message = r"^frame a: depth/a\.png is a link that leaves the data folder; copy the file"
    with pytest.raises(ValueError, match=message):
        data.read_frame("a", height=2, width=2)
    (tmp_path / "data/label").rename(tmp_path / "data/old")
    (tmp_path / "data/label").symlink_to(outside / "label")
    with pytest.raises(ValueError, match=r"^frame b: label/b\.png is a link that leaves"):
        data.read_frame("b", height=2, width=2)


def test_the_data_folder_itself_may_be_a_link(tmp_path):
    write_dataset(tmp_path / "data")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    data = open_manifest(tmp_path / "link")
    assert data.root == (tmp_path / "data").resolve()
    assert set(data.read_frame("a", height=2, width=2)) == {"image", *data.targets}


def test_a_manifest_of_before_targets_had_kinds_is_refused_by_its_key(tmp_path):
    write_dataset(tmp_path)
    old = {**layout(targets=None), "depth": {"folder": "depth", "suffix": ".png"}}
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(ValueError, match=r"unknown key depth; known: image, .*, targets"):
        open_manifest(tmp_path)


def test_a_label_map_has_a_class_for_each_stored_label(tmp_path):
    labels = {**LABELS, "label_maps": {"plant": {"classes": ["soil", "plant"], "map": [0, 1]}}}
    write_dataset(tmp_path)
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(layout(targets={"labels": labels})))
    message = r"dataset\.yaml:\d+: .*label_maps\.plant: expected a class for each of 3 stored"
    with pytest.raises(ValueError, match=message):
        open_manifest(tmp_path)
