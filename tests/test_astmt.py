import numpy as np
import pytest
from fixtures_astmt import (
    HEIGHT,
    NYUD_SPLITS,
    PASCAL_SPLITS,
    WIDTH,
    Person,
    write_nyud_mt,
    write_parts,
    write_pascal_mt,
)
from PIL import Image
from scipy import ndimage

from oneshot_ednas.data.layouts.astmt import (
    is_nyud_mt,
    is_pascal_mt,
    open_nyud_mt,
    open_pascal_mt,
)
from oneshot_ednas.data.packed import folder_split

NYUD_TARGETS = {
    "segmentation": "segmentation",
    "depth": "depth",
    "normals": "normals",
    "edges": "edge",
}
PASCAL_TARGETS = ["segmentation", "human_parts", "normals", "saliency", "edges"]
WITH_PARTS, WITHOUT_PARTS, IN_CONTEXT = "2008_000003", "2008_000002", "2010_000001"


def read(data, frame, height=HEIGHT, width=WIDTH, **options):
    return data.read_frame(frame, height=height, width=width, **options)


@pytest.fixture
def nyud(tmp_path):
    return write_nyud_mt(tmp_path), open_nyud_mt(tmp_path)


@pytest.fixture
def pascal(tmp_path):
    return write_pascal_mt(tmp_path), open_pascal_mt(tmp_path)


def test_a_folder_is_told_by_its_lists_and_images(tmp_path):
    write_nyud_mt(tmp_path / "nyud")
    write_pascal_mt(tmp_path / "pascal")
    found = [(is_nyud_mt(root), is_pascal_mt(root)) for root in sorted(tmp_path.iterdir())]
    assert found == [(True, False), (False, True)]
    assert not is_nyud_mt(tmp_path)
    assert not is_pascal_mt(tmp_path)


def test_splits_keep_the_order_of_the_lists(nyud, pascal):
    assert nyud[1].splits == NYUD_SPLITS
    assert pascal[1].splits == PASCAL_SPLITS


def test_nyud_counts_classes_from_one_and_ignores_zero(nyud):
    stored, data = nyud
    for frame, arrays in stored.items():
        labels = arrays["segmentation"].astype(int)
        found = read(data, frame)["segmentation"]
        assert (found == np.where(labels == 0, 255, labels - 1)).all()
        assert found[1, :3].tolist() == [255, 0, 39]
    names = data.class_names("segmentation")
    assert (len(names), names[0], names[1], names[39]) == (40, "wall", "floor", "otherprop")


def test_nyud_maps_its_classes_to_thirteen(nyud):
    _, data = nyud
    names40, names13 = (
        data.class_names("segmentation"),
        data.class_names("segmentation", "classes13"),
    )
    assert len(names13) == 13
    fine = read(data, "0001")["segmentation"]
    coarse = read(data, "0001", label_map="classes13")["segmentation"]
    assert ((fine == 255) == (coarse == 255)).all()
    pairs = {
        (names40[a], names13[b]) for a, b in zip(fine.flat, coarse.flat, strict=True) if a < 40
    }
    assert {pair for pair in pairs if pair[0] in names13} == {
        (name, name) for name, _ in pairs if name in names13
    }
    assert dict(pairs)["otherprop"] == "objects"


def test_nyud_depth_is_in_metres_and_edges_are_marked(nyud):
    stored, data = nyud
    for frame, arrays in stored.items():
        found = read(data, frame)
        assert (found["depth"] == arrays["depth"]).all()
        assert (found["depth"][0, :3] == 0).all()
        assert (found["edges"] == arrays["edge"]).all()
        assert found["edges"].sum() > 0
        assert np.abs(found["image"].astype(int) - arrays["images"]).max() <= 2  # JPEG


def test_nyud_normals_turn_into_camera_axes(nyud):
    found = read(nyud[1], "0001")["normals"]
    assert found[0, 0].tolist() == [0, 0, 0]
    assert (found[1:, :4] == (1, 0, 0)).all()  # right
    assert (found[:, 4:8] == (0, -1, 0)).all()  # up
    assert (found[:, 8:] == (0, 0, -1)).all()  # back to the camera


def test_pascal_labels_are_those_of_voc_and_else_of_context(pascal):
    stored, data = pascal
    for frame, folder in (
        (WITH_PARTS, "VOC12"),
        (WITHOUT_PARTS, "VOC12"),
        (IN_CONTEXT, "pascal-context"),
    ):
        assert (read(data, frame)["segmentation"] == stored[frame][folder]).all()
    assert len(data.class_names("segmentation")) == 21
    assert data.class_names("segmentation")[15] == "person"
    assert "semseg/VOC12, and where a frame has none there of semseg/pascal" in data.notes[0]


@pytest.mark.parametrize("folder", ["VOC12", "pascal-context"])
def test_pascal_labels_may_lie_in_one_folder(tmp_path, folder):
    stored = write_pascal_mt(tmp_path, (folder,))
    data = open_pascal_mt(tmp_path)
    for frame, arrays in stored.items():
        assert (read(data, frame)["segmentation"] == arrays[folder]).all()
    assert data.notes[0] == f"segmentation is that of semseg/{folder}"


def test_pascal_edges_part_the_labels(pascal):
    stored, data = pascal
    labels = stored[WITH_PARTS]["VOC12"]
    # Pixels of the void label take that of the nearest labelled one.
    nearest = ndimage.distance_transform_edt(labels == 255, return_indices=True)[1]
    labels = labels[tuple(nearest)]
    wanted = np.zeros((HEIGHT, WIDTH), bool)
    for y, x in np.ndindex(HEIGHT, WIDTH):
        beside = [labels[y, x + 1]] if x + 1 < WIDTH else []
        below = [labels[y + 1, x]] if y + 1 < HEIGHT else []
        wanted[y, x] = any(other != labels[y, x] for other in beside + below)
    assert (read(data, WITH_PARTS)["edges"] == wanted).all()


def test_human_parts_are_drawn_over_the_background(pascal):
    found = read(pascal[1], WITH_PARTS)["human_parts"]
    wanted = np.zeros((HEIGHT, WIDTH))
    wanted[:2, :4], wanted[4:6, 2:8] = 1, 4
    assert (found == wanted).all()  # the dog's head is background
    assert pascal[1].class_names("human_parts") == (
        *("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg"),
    )


def test_frames_without_human_parts_are_invalid_everywhere(pascal):
    for frame in (WITHOUT_PARTS, IN_CONTEXT):
        assert (read(pascal[1], frame)["human_parts"] == 255).all()


def test_each_of_the_24_parts_has_its_class(pascal, tmp_path):
    classes = {
        1: "hair head lear lebrow leye mouth nose rear rebrow reye",
        2: "neck torso",
        3: "luarm ruarm",
        4: "lhand llarm rhand rlarm",
        5: "luleg ruleg",
        6: "lfoot llleg rfoot rlleg",
    }
    wanted = {name: index for index, names in classes.items() for name in names.split()}
    assert len(wanted) == 24
    pixels = {name: divmod(i, WIDTH) for i, name in enumerate(wanted)}
    parts = {name: (slice(y, y + 1), slice(x, x + 1)) for name, (y, x) in pixels.items()}
    write_parts(tmp_path / f"human_parts/{WITH_PARTS}.mat", [Person(slice(0, 2), parts)])
    found = read(pascal[1], WITH_PARTS)["human_parts"]
    assert {name: found[pixel] for name, pixel in pixels.items()} == wanted
    assert (found > 0).sum() == 24


def test_pascal_normals_and_saliency_are_decoded(pascal):
    stored, data = pascal
    found = read(data, WITH_PARTS)
    normals = found["normals"].astype(float)
    assert (normals[0, 0] == 0).all()
    for rows, direction in ((slice(1, 3), (1, 0, 0)), (slice(3, 6), (0, 1, 0))):
        assert np.abs(normals[rows] - direction).max() < 0.01
    assert np.abs(normals[6:] - (0, 0, -1)).max() < 0.01  # back to the camera
    assert (found["saliency"] == (stored[WITH_PARTS]["sal_distill"] / 255 > 0.5)).all()
    assert found["saliency"][0, :4].tolist() == [0, 0, 1, 1]
    assert data.class_names("saliency") == ("background", "salient")


def test_at_half_size_targets_are_stored_pixels_and_no_edge_is_lost(nyud, pascal):
    for data, frame in ((nyud[1], "0001"), (pascal[1], WITH_PARTS)):
        whole, half = read(data, frame), read(data, frame, HEIGHT // 2, WIDTH // 2)
        for name in data.targets:
            array = whole[name]
            if data.target_kind(name) == "edges":
                wanted = array.reshape(HEIGHT // 2, 2, WIDTH // 2, 2).max(axis=(1, 3))
            else:
                wanted = array[1::2, 1::2]
            assert (half[name] == wanted).all(), name
        assert half["image"].shape == (HEIGHT // 2, WIDTH // 2, 3)


def test_targets_are_offered_where_their_folders_are(nyud, pascal, tmp_path):
    assert list(nyud[1].targets) == list(NYUD_TARGETS)
    assert list(pascal[1].targets) == PASCAL_TARGETS
    for folder in ("normals", "edge", "semseg", "sal_distill"):
        (tmp_path / folder).rename(tmp_path / f"no_{folder}")
    assert list(open_nyud_mt(tmp_path).targets) == ["segmentation", "depth"]
    bare = open_pascal_mt(tmp_path)
    assert list(bare.targets) == ["human_parts", "normals"]
    assert len(bare.notes) == 1
    with pytest.raises(ValueError, match="pascal_mt has no target edges"):
        read(bare, WITH_PARTS, targets=("edges",))


@pytest.mark.parametrize(
    "path",
    ["images/0003.jpg", "segmentation/0003.png", "depth/0003.npy", "normals/0003.npy"],
)
def test_a_missing_file_of_nyud_is_refused_when_opened(nyud, tmp_path, path):
    (tmp_path / path).unlink()
    message = rf"^1 of 15 files are missing, the first is {path} of frame 0003 in split train; "
    with pytest.raises(ValueError, match=message):
        open_nyud_mt(tmp_path)


@pytest.mark.parametrize(
    ("folder", "suffix", "refused"),
    [
        ("JPEGImages", ".jpg", "JPEGImages/2010_000001.jpg"),
        ("human_parts", ".mat", "human_parts/2010_000001.mat"),
        ("normals_distill", ".png", "normals_distill/2010_000001.png"),
        ("semseg/pascal-context", ".png", "semseg/pascal-context/2010_000001.png"),
    ],
)
def test_a_missing_file_of_pascal_is_refused_when_opened(pascal, tmp_path, folder, suffix, refused):
    (tmp_path / folder / f"{IN_CONTEXT}{suffix}").unlink()
    message = rf"^1 of 15 files are missing, the first is {refused} of frame 2010_000001 in split"
    with pytest.raises(ValueError, match=message) as caught:
        open_pascal_mt(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no file gt_sets/val\.txt for a split in"),
        ("\n", r"gt_sets/val\.txt: expected one frame id a line, got an empty file"),
        ("0002\n0002\n", r"gt_sets/val\.txt: frame 0002 is listed twice"),
    ],
)
def test_lists_with_faults_are_refused(nyud, tmp_path, text, message):
    path = tmp_path / "gt_sets/val.txt"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_nyud_mt(tmp_path)


def spoil(root, fault):
    if fault == "label":
        Image.new("L", (WIDTH, HEIGHT), 41).save(root / "segmentation/0003.png")
    elif fault == "colours":
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "segmentation/0003.png")
    elif fault == "depth cut short":
        path = root / "depth/0003.npy"
        path.write_bytes(path.read_bytes()[:-40])
    elif fault == "grey normals":
        np.save(root / "normals/0003.npy", np.zeros((HEIGHT, WIDTH)))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("label", r"segmentation/0003\.png: labels 41 in 192 pixels lie outside the 41 stored"),
        ("colours", r"segmentation/0003\.png: expected one channel, got 3; colour-coded"),
        ("depth cut short", r"depth/0003\.npy cannot be read \(.+\); expected a whole \.npy file"),
        ("grey normals", r"normals/0003\.npy: expected normals of 3 channels, got \(12, 16\)"),
    ],
)
def test_a_fault_of_a_frame_of_nyud_is_named_in_one_line(nyud, tmp_path, fault, message):
    spoil(tmp_path, fault)
    with pytest.raises(ValueError, match=f"^frame 0003: {message}") as caught:
        read(nyud[1], "0003")
    assert "\n" not in str(caught.value)


def spoil_pascal(root, fault):
    from scipy.io import savemat

    parts = root / f"human_parts/{WITH_PARTS}.mat"
    if fault == "cut short":
        parts.write_bytes(parts.read_bytes()[:300])
    elif fault == "other structure":
        savemat(parts, {"anno": {"objects": 3}})
    elif fault == "other variable":
        savemat(parts, {"LabelMap": np.zeros((HEIGHT, WIDTH))})
    elif fault == "other size":
        write_parts(parts, [Person(slice(0, 2), {"head": (slice(0, 1),)})], size=(6, 8))
    elif fault == "label":
        Image.new("L", (WIDTH, HEIGHT), 21).save(root / f"semseg/VOC12/{WITH_PARTS}.png")
    elif fault == "coloured saliency":
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / f"sal_distill/{WITH_PARTS}.png")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("cut short", r"human_parts/.+\.mat cannot be read \(.+\); expected a whole MATLAB file"),
        ("other structure", r"human_parts/.+\.mat: expected a structure anno with objects"),
        ("other variable", r"human_parts/.+\.mat: expected a structure anno with objects"),
        ("other size", "human_parts is 8x6, expected the image's 16x12; store both at one size"),
        ("label", r"semseg/VOC12/.+\.png: labels 21 in 192 pixels lie outside the 21 stored"),
        ("coloured saliency", r"sal_distill/.+\.png: expected one channel, got 3"),
    ],
)
def test_a_fault_of_a_frame_of_pascal_is_named_in_one_line(pascal, tmp_path, fault, message):
    spoil_pascal(tmp_path, fault)
    with pytest.raises(ValueError, match=f"^frame {WITH_PARTS}: {message}") as caught:
        read(pascal[1], WITH_PARTS)
    assert "\n" not in str(caught.value)


def test_packed_splits_hold_what_the_frames_hold(nyud, pascal, tmp_path):
    for data in (nyud[1], pascal[1]):
        packed = folder_split(
            data, "train", height=6, width=8, cache_dir=tmp_path / "cache", workers=1
        )
        assert packed.sources == data.splits["train"]
        for index, frame in enumerate(packed.sources):
            wanted, found = read(data, frame, 6, 8), packed.frame(index)
            assert found.keys() == wanted.keys()
            assert all((found[name] == wanted[name]).all() for name in wanted)
