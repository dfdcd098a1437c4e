"""The commands on data folders, on folders with known pixels."""

import io
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from test_cli import call, good, refused

from oneshot_ednas.data.check import check_data, shared_frames
from oneshot_ednas.data.layouts import open_data
from oneshot_ednas.data.packed import folder_split
from oneshot_ednas.data.parallel import chunks, run_chunks
from oneshot_ednas.data.sources import Intrinsics
from oneshot_ednas.data.statistics import (
    Classes,
    Moments,
    Numbers,
    frame_sums,
    inverse_log_weights,
    median_frequency_weights,
    target_sums,
)
from oneshot_ednas.data.targets import TARGET_KINDS
from oneshot_ednas.report.data_sheet import choose_frames, data_sheet
from oneshot_ednas.schema import read_json
from oneshot_ednas.tasks import pictures

REPOSITORY = Path(__file__).resolve().parent.parent
NYU = REPOSITORY / os.environ.get("ONESHOT_EDNAS_SHARED_DATA", "../shared/data") / "nyuv2_256x192"
NYU_MANIFEST = REPOSITORY / "configs/datasets/nyuv2_256x192.yaml"

HEIGHT, WIDTH = 6, 8
FRAMES = {"train": ["a", "b", "room/c"], "test": ["d"]}
MANIFEST = {
    "name": "toy",
    "image": {"folder": "rgb", "suffix": ".png"},
    "splits": {"train": "train.txt", "test": "test.txt"},
    "targets": {
        "segmentation": {
            "kind": "labels",
            "folder": "label",
            "suffix": ".png",
            "classes": ["wall", "floor", "chair", "lamp"],
            "label_maps": {"two": {"classes": ["flat", "thing"], "map": [0, 0, 1, 255]}},
        },
        "depth": {"kind": "depth", "folder": "depth", "suffix": ".png", "scale": 0.001},
        "normals": {
            "kind": "normals",
            "folder": "normal",
            "suffix": ".npy",
            "axes": ["right", "up", "backward"],
        },
        "edges": {"kind": "edges", "folder": "edge", "suffix": ".png", "ignore": 9},
        "outline": {"kind": "derived_edges"},
        "disparity": {"kind": "disparity", "folder": "disp", "suffix": ".png", "scale": 0.25},
        "heat": {"kind": "values", "folder": "heat", "suffix": ".npy", "scale": -2, "invalid": [5]},
    },
    "intrinsics": {"fx": 8, "fy": 6, "cx": 3.5, "cy": 2.5},
}


def frame_arrays(seed: int, height: int = HEIGHT, width: int = WIDTH) -> dict[str, np.ndarray]:
    """What is stored of a frame; half of it is drawn at random."""
    random = np.random.default_rng(seed)
    size = (height, width)
    normal = random.normal(size=(*size, 3))
    normal[..., 2] = 5 * np.abs(normal[..., 2]) + 1  # stored backward: towards the camera
    normal[0, 0] = 0
    label = np.broadcast_to(np.arange(width) % 3, size).astype(np.uint8)
    label[0, 0] = 255
    return {
        "rgb": random.integers(0, 256, (*size, 3)).astype(np.uint8),
        "label": label,
        "depth": random.integers(0, 9000, size).astype(np.uint16),
        "normal": normal.astype(np.float32),
        "edge": random.choice([0, 1, 9], size).astype(np.uint8),
        "disp": random.integers(0, 5, size).astype(np.uint16),
        "heat": random.choice([np.nan, 5, 0.1, -7], size).astype(np.float32),
    }


def write_frame(root: Path, frame: str, stored: dict[str, np.ndarray]) -> None:
    for folder, array in stored.items():
        suffix = ".npy" if folder in ("normal", "heat") else ".png"
        path = root / folder / f"{frame}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".npy":
            np.save(path, array)
        else:
            Image.fromarray(array).save(path)


def write_folder(root: Path, frames: dict[str, list[str]] = FRAMES, **changes: object) -> Path:
    listed = dict.fromkeys(frame for group in frames.values() for frame in group)
    for seed, frame in enumerate(listed):
        write_frame(root, frame, frame_arrays(seed))
    for split, group in frames.items():
        (root / f"{split}.txt").write_text("".join(f"{frame}\n" for frame in group))
    splits = {split: f"{split}.txt" for split in frames}
    (root / "dataset.yaml").write_text(
        yaml.safe_dump(MANIFEST | {"splits": splits} | changes, sort_keys=False)
    )
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "data")


def figures(*arguments: object) -> dict:
    return json.loads(good(*arguments, "--json").stdout)


# Check --------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_stored_pixels(folder):
    train = figures("data", "check", folder)["splits"]["train"]
    stored = [frame_arrays(seed) for seed in range(3)]
    assert (train["frames"], train["broken_frames"], train["sizes"]) == (3, 0, {"8x6": 3})
    image = np.concatenate([frame["rgb"].reshape(-1, 3) for frame in stored]) / 255
    assert np.allclose(train["image"]["mean"], image.mean(axis=0))
    assert np.allclose(train["image"]["std"], image.std(axis=0))
    targets = train["targets"]
    assert [target["kind"] for target in targets.values()] == [
        "labels", "depth", "normals", "edges", "edges", "disparity", "values"
    ]  # fmt: skip
    for target in targets.values():
        assert target["invalid_rule"] == TARGET_KINDS[target["kind"]].rule
        assert target["frames_without_valid_pixel"] == 0
    # 8 columns of labels 0, 1, 2, 0, 1, 2, 0, 1 on 6 rows; one pixel of label 0 is ignored.
    labels = targets["segmentation"]
    assert labels["invalid_share"] == pytest.approx(1 / 48)
    shares = {name: row["share"] for name, row in labels["classes"].items()}
    assert shares == pytest.approx({"wall": 17 / 47, "floor": 18 / 47, "chair": 12 / 47, "lamp": 0})
    edge = np.stack([frame["edge"] for frame in stored])
    assert targets["edges"]["invalid_share"] == pytest.approx((edge == 9).mean())
    assert targets["edges"]["edge_share"] == pytest.approx((edge[edge != 9] == 1).mean())
    # All columns but the last differ from the next; the ignored pixel's rim adds one below none.
    assert targets["outline"]["edge_share"] == pytest.approx(42 / 48)
    for name, key, scale in (("depth", "depth", 0.001), ("disparity", "disp", 0.25)):
        values = np.concatenate([frame[key].ravel() for frame in stored]) * scale
        check_numbers(targets[name], values, values > 0)
    heat = -2 * np.concatenate([frame["heat"].ravel() for frame in stored])
    check_numbers(targets["heat"], heat, np.isfinite(heat) & (heat != -10))
    normals = targets["normals"]
    assert normals["mean_length"] == pytest.approx(1, abs=1e-3)
    assert normals["invalid_share"] >= 1 / 48


def check_numbers(found: dict, values: np.ndarray, valid: np.ndarray) -> None:
    assert found["invalid_share"] == pytest.approx(1 - valid.mean())
    kept = values[valid]
    assert (found["minimum"], found["maximum"]) == pytest.approx((kept.min(), kept.max()))
    assert (found["mean"], found["std"]) == pytest.approx((kept.mean(), kept.std()))
    for percent, value in found["percentiles"].items():
        exact = np.quantile(kept, float(percent) / 100, method="inverted_cdf")
        assert value == pytest.approx(exact, rel=1.1e-3)
    assert found["median"] == found["percentiles"]["50"]


def test_tables_name_classes_rules_and_splits(folder):
    text = good("data", "check", folder).stdout
    assert "toy: manifest dataset.yaml" in text
    assert "never in segmentation: lamp" in text
    assert "3 of 4 classes occur" in text
    assert f"invalid in depth: {TARGET_KINDS['depth'].rule}" in text
    assert "shared:" not in text
    assert "broken:" not in text


def test_the_figures_do_not_depend_on_the_number_of_processes(tmp_path):
    frames = {"train": [str(i) for i in range(40)], "val": [str(i) for i in range(30, 50)]}
    folder = write_folder(tmp_path, frames)
    one, three = (figures("data", "check", folder, "--workers", n) for n in (1, 3))
    assert one == three
    assert one["splits"]["val"]["frames"] == 20


def test_every_broken_file_is_told_and_the_check_goes_on(folder):
    (folder / "depth/a.png").write_bytes(b"no image")
    (folder / "normal/a.npy").unlink()
    label = np.full((HEIGHT, WIDTH), 77, np.uint8)
    Image.fromarray(label).save(folder / "label/room/c.png")
    result = call("data", "check", folder, "--json")
    assert result.exit_code == 1
    assert "error: 2 of 4 frames are broken; " in result.stderr
    found = json.loads(result.stdout)
    assert [line.split(": ")[0] for line in found["broken"]["a"]] == ["frame a"] * 2
    assert "depth/a.png" in found["broken"]["a"][0]
    assert "no file normal/a.npy" in found["broken"]["a"][1]
    assert "label/room/c.png: labels 77 in 48 pixels" in found["broken"]["room/c"][0]
    assert str(folder) not in json.dumps(found["broken"])
    train = found["splits"]["train"]
    assert (train["frames"], train["broken_frames"], train["sizes"]) == (3, 2, {"8x6": 1})
    text = call("data", "check", folder, "--out", folder.parent / "out").stdout
    assert text.count("broken: frame ") == 3
    assert (folder.parent / "out/check.png").is_file()


def test_a_data_set_of_broken_frames_only_is_told(folder):
    for path in (folder / "rgb").rglob("*.png"):
        path.write_bytes(b"")
    result = call("data", "check", folder, "--out", folder.parent / "out")
    assert result.exit_code == 1
    assert "4 of 4 frames are broken" in result.stderr
    assert read_json(folder.parent / "out/check.json")["splits"]["test"]["broken_frames"] == 1
    assert not (folder.parent / "out/check.png").exists()


def test_frames_in_two_splits_are_named(tmp_path):
    frames = {"train": ["a", "b", "c"], "train_fit": ["a", "b"], "test": ["c", "d"], "val": ["e"]}
    found = figures("data", "check", write_folder(tmp_path, frames))
    assert found["shared_frames"] == [
        {"splits": ["train", "train_fit"], "frames": 2, "example": "a", "part": "train_fit"},
        {"splits": ["train", "test"], "frames": 1, "example": "c", "part": None},
    ]
    (warning,) = found["warnings"]
    assert warning.startswith("1 frames are in both train and test (for example c); ")


@pytest.mark.parametrize(
    ("first", "second", "is_by_design"),
    [
        (("train", "abc"), ("train_fit", "ab"), True),
        (("train1", "ab"), ("train", "abc"), True),
        (("trainval", "abc"), ("val", "c"), True),
        (("train", "abc"), ("test", "c"), False),
        (("train", "abc"), ("train_fit", "cd"), False),
    ],
)
def test_only_a_part_that_its_name_tells_is_no_leak(first, second, is_by_design):
    (shared,) = shared_frames({name: tuple(frames) for name, frames in (first, second)})
    assert shared.is_by_design is is_by_design


def test_wrong_units_axes_and_empty_targets_are_warned_of(tmp_path):
    targets = MANIFEST["targets"]
    wrong = {
        "metres": targets["depth"] | {"scale": 1},
        "tiny": targets["depth"] | {"scale": 1e-6},
        "away": targets["normals"] | {"axes": ["right", "up", "forward"]},
        "right": targets["normals"],
        "depth": targets["depth"],
        "nothing": targets["depth"] | {"max_metres": 1e-9},
    }
    folder = write_folder(tmp_path, {"train": ["a"]}, targets=wrong)
    normal = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    normal[..., 2] = 1  # stored backward, so towards the camera
    np.save(folder / "normal/a.npy", normal)
    found = figures("data", "check", folder)
    metres, tiny, away, nothing = found["warnings"]
    depth = frame_arrays(0)["depth"]
    assert metres.startswith("train: metres is ")
    assert f" to {depth.max()} m" in metres
    assert "millimetres read as metres? Then set its scale to 0.001" in metres
    assert "tiny is" in tiny
    assert "not in metres?" in tiny
    assert "away: 100% of the normals point away from the camera" in away
    assert "nothing has no valid pixel" in nothing
    shown = found["splits"]["train"]["targets"]
    assert shown["right"]["towards_camera_share"] == 1
    assert shown["right"]["mean_direction"] == pytest.approx([0, 0, -1])
    assert shown["nothing"]["frames_without_valid_pixel"] == 1
    assert "median" not in shown["nothing"]
    assert "nothing valid" in good("data", "check", folder).stdout


@pytest.mark.parametrize(
    ("metres", "one", "message"),
    [
        (20, 80, None),
        (20, 1000, None),
        (20, 1001, "invalid values taken for depths? Correct them, or set max_metres"),
        (101, 101, "millimetres read as metres?"),
        (0.02, 0.02, "not in metres?"),
    ],
)
def test_the_check_and_a_run_warn_of_the_same_depths(tmp_path, metres, one, message):
    depth = MANIFEST["targets"]["depth"] | {"suffix": ".npy", "scale": 1}
    folder = write_folder(tmp_path / "data", {"train": ["a"]}, targets={"depth": depth})
    stored = np.full((HEIGHT, WIDTH), metres, np.float32)
    stored[0, 0] = one
    np.save(folder / "depth/a.npy", stored)
    found = figures("data", "check", folder)["warnings"]
    assert len(found) == (message is not None)
    assert all(message in line for line in found)
    with warnings.catch_warnings(record=True, action="always") as caught:
        folder_split(
            open_data(folder), "train", height=HEIGHT, width=WIDTH, cache_dir=tmp_path / "cache"
        )
    assert len(caught) == len(found)


def test_the_camera_decides_which_normals_it_can_see():
    # A wall that faces right, seen at the left and at the right end of the image.
    normals = np.zeros((1, 2, 3), np.float16)
    normals[..., 0] = 1
    camera = Intrinsics(fx=1.0, fy=1.0, cx=0.5, cy=0.0)
    assert target_sums("normals", normals, camera).found.num_facing == 1
    shifted = Intrinsics(fx=1.0, fy=1.0, cx=5.0, cy=0.0)
    assert target_sums("normals", normals, shifted).found.num_facing == 2


def test_out_holds_the_figures_and_a_sheet_of_all_targets(folder, tmp_path):
    out = tmp_path / "out"
    printed = figures("data", "check", folder, "--out", out)
    assert read_json(out / "check.json") == printed
    with Image.open(out / "check.png") as sheet:
        assert sheet.width > 8 * 200  # the image and seven targets
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    assert {(0, 0, 0), (255, 255, 255), (48, 48, 48)} <= colours  # invalid, edges, no edges


def test_the_sheet_has_the_colours_of_a_run_s_predictions(folder):
    data = open_data(folder)
    frame = data.read_stored("a")
    sheet = data_sheet(data, [("train", "a")], {})
    with Image.open(io.BytesIO(sheet)) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    shown = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    for name, draw in [
        ("depth", pictures.depth_picture),
        ("disparity", pictures.disparity_picture),
        ("heat", pictures.heatmap_picture),
        ("edges", pictures.binary_picture),
        ("normals", pictures.normals_picture),
    ]:
        expected = draw(frame[name]).reshape(-1, 3)
        assert {tuple(colour) for colour in expected.tolist()} <= shown, name


def test_frames_of_the_sheet_are_spread_over_splits_and_are_not_broken(tmp_path):
    frames = {"train": list("abcdefgh"), "fit": list("abcd"), "test": list("ijkl")}
    data = open_data(write_folder(tmp_path, frames))
    chosen = choose_frames(data, {"a": (), "i": ()}, count=4)
    assert [split for split, _ in chosen] == ["train", "train", "test", "test"]
    assert not {"a", "i"} & {frame for _, frame in chosen}
    assert len(set(chosen)) == 4
    with pytest.raises(ValueError, match="no frame of toy can be drawn"):
        data_sheet(data, [], {})


def test_empty_and_flat_maps_can_be_drawn(tmp_path):
    folder = write_folder(tmp_path, {"train": ["a"]})
    stored = frame_arrays(0)
    stored["depth"][:] = 0
    stored["disp"][:] = 3
    stored["heat"][:] = np.nan
    stored["label"][:] = 255
    write_frame(folder, "a", stored)
    sheet = data_sheet(open_data(folder), [("train", "a")], {"segmentation": []})
    assert sheet.startswith(b"\x89PNG")


# Sums ---------------------------------------------------------------------------------------

numbers = arrays.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30),
)


@given(numbers, st.integers(0, 60))
def test_sums_of_parts_are_sums_of_the_whole(values, cut):
    whole = Numbers.of(values)
    parts = Numbers.of(values[:cut]) + Numbers.of(values[cut:])
    assert (parts.counts == whole.counts).all()
    assert (parts.minimum, parts.maximum) == (whole.minimum, whole.maximum)
    scale = max(np.abs(values).max(), 1e-30)
    assert np.allclose(parts.moments.mean, values.mean(dtype=np.float64), atol=1e-9 * scale)
    assert np.allclose(parts.moments.std, values.std(dtype=np.float64), atol=1e-6 * scale)


def test_quantiles_of_zeros_are_zero():
    numbers = Numbers.of(np.array([0, 0, -0.0, 0, 1], np.float32))
    assert (numbers.quantile(0.05), numbers.quantile(0.5), numbers.quantile(1.0)) == (0, 0, 1)


@given(numbers, st.floats(0, 1))
def test_quantiles_are_those_of_numpy_to_a_thousandth(values, share):
    exact = float(np.sort(values)[max(int(np.ceil(share * len(values))) - 1, 0)])
    assert Numbers.of(values).quantile(share) == pytest.approx(exact, rel=1.1e-3, abs=1e-37)


def test_the_spread_of_large_numbers_does_not_cancel():
    values = np.array([[1e9], [1e9 + 1], [1e9 + 2]])
    parts = Moments.of(values[:1]) + Moments.of(values[1:]) + Moments.of(values[:0])
    assert parts.std[0] == pytest.approx(np.sqrt(2 / 3))


def test_class_weights_follow_their_papers():
    # Class 0 fills frame 1; classes 0 and 1 share frame 2, one to three; class 2 is absent.
    first = Classes.of(np.array([0, 0, 0, 0], np.uint8))
    second = Classes.of(np.array([0, 1, 1, 1], np.uint8))
    both = first + second
    # Frequencies: 5 of 8 pixels, and 3 of the 4 of the frame that has it.
    median = (5 / 8 + 3 / 4) / 2
    weights = median_frequency_weights(both, 3)
    assert weights == (pytest.approx(median / (5 / 8)), pytest.approx(median / (3 / 4)), None)
    logs = inverse_log_weights(both, 3)
    assert logs[:2] == pytest.approx((1 / np.log(1.02 + 5 / 8), 1 / np.log(1.02 + 3 / 8)))
    assert logs[2] is None
    assert median_frequency_weights(Classes.of(np.zeros(0, np.uint8)), 2) == (None, None)


@pytest.mark.parametrize("workers", [1, 2, None])
def test_results_come_in_order_and_progress_adds_up(workers):
    jobs = chunks([str(i) for i in range(10)], 3)
    assert [len(job) for job in jobs] == [3, 3, 3, 1]
    seen: list[tuple[int, int]] = []
    found = run_chunks(_joined, jobs, workers=workers, progress=lambda *at: seen.append(at))
    assert list(found) == ["012", "345", "678", "9"]
    assert seen == [(3, 10), (6, 10), (9, 10), (10, 10)]


def _joined(frames: tuple[str, ...]) -> str:
    return "".join(frames)


# Prepare ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(HEIGHT, WIDTH), (3, 4), (4, 5), (12, 9)])
@pytest.mark.parametrize("label_map", [None, "two"])
def test_a_prepared_folder_reads_as_the_source_at_that_size(folder, height, width, label_map):
    out = folder.parent / "out"
    chosen = ["--label-map", label_map] if label_map else []
    size = ["--height", height, "--width", width]
    done = figures("data", "prepare", folder, "--out", out, *size, *chosen)
    assert done == {"out": str(out), "frames": 4, "kept": 0, "left_out": {}}
    source, written = open_data(folder), open_data(out)
    assert written.splits == {split: tuple(frames) for split, frames in FRAMES.items()}
    assert not (out / "left_out.txt").exists()
    for frame_id in ("a", "b", "room/c", "d"):
        expected = source.read_frame(frame_id, height=height, width=width, label_map=label_map)
        found = written.read_stored(frame_id)
        assert list(found) == list(expected)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    for name in source.targets:
        assert written.target_kind(name) == source.target_kind(name)
        assert written.class_names(name) == source.class_names(name, label_map)


def test_the_camera_follows_the_size(folder, tmp_path):
    good("data", "prepare", folder, "--out", tmp_path / "o", "--height", 3, "--width", 16)
    camera = open_data(tmp_path / "o").intrinsics
    # Twice as wide, half as high; the middle of the image stays the middle.
    assert camera == Intrinsics(fx=16.0, fy=3.0, cx=7.5, cy=1.0)


def test_only_the_wanted_targets_and_splits_are_written(folder, tmp_path):
    out = tmp_path / "out"
    chosen = ["--targets", "depth,outline", "--splits", "test"]
    good("data", "prepare", folder, "--out", out, "--height", 3, "--width", 4, *chosen)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        "dataset.yaml",
        "prepare.json",
        "splits/test.txt",
        "image/d.png",
        "depth/d.npy",
        "outline/d.png",
    }
    assert list(open_data(out).targets) == ["depth", "outline"]


def test_a_broken_frame_ends_the_work_or_is_left_out(folder, tmp_path):
    (folder / "depth/b.png").unlink()
    call_it = ["data", "prepare", folder, "--out", tmp_path / "out", "--height", 3, "--width", 4]
    message = refused(*call_it)
    assert "frame b: no file depth/b.png" in message
    assert "--skip-broken" in message
    assert not (tmp_path / "out/dataset.yaml").exists()
    done = figures(*call_it, "--resume", "--skip-broken")
    assert done["frames"] == 3
    assert list(done["left_out"]) == ["b"]
    assert open_data(tmp_path / "out").splits["train"] == ("a", "room/c")
    (line,) = (tmp_path / "out/left_out.txt").read_text().splitlines()
    assert line.startswith("frame b: no file depth/b.png")
    # Restored, it is written at last, and nothing is left out any more.
    write_frame(folder, "b", frame_arrays(1))
    done = figures(*call_it, "--resume", "--skip-broken")
    assert (done["frames"], done["kept"], done["left_out"]) == (4, 3, {})
    assert not (tmp_path / "out/left_out.txt").exists()
    (folder / "rgb/d.png").unlink()
    again = [*call_it[:3], "--out", tmp_path / "new", *call_it[5:], "--skip-broken"]
    assert "every frame of split test is broken, for example frame d" in refused(*again)


def test_whole_files_are_kept_and_missing_ones_written(folder, tmp_path):
    out = tmp_path / "out"
    call_it = ["data", "prepare", folder, "--out", out, "--height", 3, "--width", 4]
    good(*call_it)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    kept = (out / "depth/a.npy").stat().st_mtime_ns
    (out / "depth/b.npy").unlink()
    (out / "dataset.yaml").unlink()
    done = figures(*call_it, "--resume")
    assert (done["frames"], done["kept"]) == (4, 3)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert (out / "depth/a.npy").stat().st_mtime_ns == kept


def test_folders_that_are_not_to_be_written_are_refused(folder, tmp_path):
    size = ["--height", 3, "--width", 4]
    inside = refused("data", "prepare", folder, "--out", folder / "small", *size)
    assert "lies inside the data folder" in inside
    assert not (folder / "small").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    call_it = ["data", "prepare", folder, "--out", foreign, *size]
    assert "is not empty; go on with --resume" in refused(*call_it)
    assert "was not made by this command" in refused(*call_it, "--resume")
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    out = tmp_path / "out"
    good("data", "prepare", folder, "--out", out, *size)
    other = ["--height", 5, "--width", 4, "--targets", "depth", "--resume"]
    message = refused("data", "prepare", folder, "--out", out, *other)
    assert "made with other settings: height was 3, is 5; targets was None, is ['depth']" in message
    (out / "prepare.json").write_text("[]")
    message = refused("data", "prepare", folder, "--out", out, *size, "--resume")
    assert "expected settings by name" in message


def test_a_full_disk_is_one_line_and_leaves_no_half_written_file(folder, tmp_path):
    # A limit on the size of files stands for the disk: the flat image is small, its depth is not.
    resource = pytest.importorskip("resource")
    flat = frame_arrays(3)
    flat["rgb"][:] = 7
    write_frame(folder, "d", flat)
    out = tmp_path / "out"
    size = ["--height", 60, "--width", 80, "--targets", "depth", "--splits", "test"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        message = refused("data", "prepare", folder, "--out", out, *size, "--workers", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith(f"error: {out}/depth/d.npy: File too large; not written, ")
    assert (out / "image/d.png").is_file()
    assert not list((out / "depth").iterdir())
    assert not (out / "dataset.yaml").exists()
    assert figures("data", "prepare", folder, "--out", out, *size, "--resume")["frames"] == 1


# Statistics ---------------------------------------------------------------------------------


def test_statistics_of_a_split(folder):
    found = figures("data", "stats", folder, "--split", "train", "--label-map", "two")
    assert (found["split"], found["frames"], found["label_map"]) == ("train", 3, "two")
    classes = found["targets"]["segmentation"]["classes"]
    assert list(classes) == ["flat", "thing"]
    assert classes["flat"]["share"] == pytest.approx(35 / 47)
    # Both occur in every frame, so frequencies are shares, and their median lies in the middle.
    assert classes["flat"]["median_frequency_weight"] == pytest.approx(0.5 / (35 / 47))
    assert classes["thing"]["inverse_log_weight"] == pytest.approx(1 / np.log(1.02 + 12 / 47))
    depth = np.stack([frame_arrays(seed)["depth"] for seed in range(3)]) / 1000
    assert found["targets"]["depth"]["mean"] == pytest.approx(depth[depth > 0].mean())
    assert found["targets"]["depth"]["std"] == pytest.approx(depth[depth > 0].std())
    assert figures("data", "stats", folder)["split"] == "train"
    text = good("data", "stats", folder).stdout
    assert "median-frequency weight" in text
    assert "red" in text


def test_sums_add_up_over_frames(folder):
    data = open_data(folder)
    one, two = frame_sums(data, "a"), frame_sums(data, "b")
    both = one + two
    assert both.num_frames == 2
    assert both.targets["depth"].num_valid == (
        one.targets["depth"].num_valid + two.targets["depth"].num_valid
    )


# Bad input ----------------------------------------------------------------------------------


def test_bad_input_is_one_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for command in ("check", "stats"):
        assert "no data folder" in refused("data", command, tmp_path / "absent")
        assert "has no known layout" in refused("data", command, tmp_path / "empty")
        assert "unknown data layout x" in refused("data", command, folder, "--layout", "x")
        assert "no.yaml (tried " in refused(
            "data", command, folder, "--manifest", tmp_path / "no.yaml"
        )
        assert "expected at least 1, got 0" in refused("data", command, folder, "--workers", 0)
    assert "no split tset; did you mean test" in refused("data", "stats", folder, "--split", "tset")
    message = refused("data", "stats", folder, "--label-map", "tow")
    assert "no label map tow; did you mean two" in message
    (folder / "depth/a.png").unlink()
    assert "frame a: no file depth/a.png" in refused("data", "stats", folder)
    size = ["--height", 3, "--width", 4]
    prepare = ["data", "prepare", folder, "--out", tmp_path / "out", *size]
    assert "no target dpth; did you mean depth" in refused(*prepare, "--targets", "dpth")
    assert "no split tset" in refused(*prepare, "--splits", "tset")
    assert "no label map tow" in refused(*prepare, "--label-map", "tow")
    assert "expected different names" in refused(*prepare, "--targets", "depth,,edges")
    assert "expected different names" in refused(*prepare, "--splits", "test,test")
    zero = ["--height", 0, "--width", 4]
    assert "a width of at least 1, got 0 and 4" in refused(*prepare[:-4], *zero)
    assert not (tmp_path / "out").exists()
    (folder / "test.txt").write_text("\n")
    assert "test.txt: expected one frame id a line" in refused("data", "check", folder)


@pytest.mark.shared_data
@pytest.mark.skipif(not NYU.is_dir(), reason="the NYUv2 frames are not here")
def test_the_nyuv2_frames_are_as_known(tmp_path):
    from dataclasses import replace

    data = open_data(NYU, manifest=NYU_MANIFEST)
    few = replace(data, splits={split: data.splits[split] for split in ("mini_train", "mini_test")})
    check = check_data(few)
    assert (check.broken, check.shared, check.warnings) == ({}, (), ())
    train = check.figures()["splits"]["mini_train"]
    assert train["sizes"] == {"256x192": 16}
    targets = train["targets"]
    assert targets["depth"]["invalid_share"] == 0  # holes were filled
    assert 0.71 - 1e-6 <= targets["depth"]["minimum"] < targets["depth"]["maximum"] <= 9.96 + 1e-6
    assert targets["normals"]["towards_camera_share"] > 0.999
    assert targets["segmentation"]["classes"]["otherprop"]["share"] == 0
    sheet = data_sheet(few, choose_frames(few, {}), {"segmentation": range(39)})
    (tmp_path / "check.png").write_bytes(sheet)
    with Image.open(tmp_path / "check.png") as picture:
        assert picture.width > 4 * 256
