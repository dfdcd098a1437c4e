"""Cityscapes as its authors distribute it. No torch.

`<kind>/{train,val}/<city>/<city>_<sequence>_<frame>_<kind>...`, with the kinds `leftImg8bit`,
`gtFine`, and if wanted `disparity` and `camera`.

Source: Cordts et al., "The Cityscapes dataset for semantic urban scene understanding", CVPR 2016,
https://www.cityscapes-dataset.com; ids and encodings as in the authors' cityscapesScripts
(helpers/labels.py, README.md).
"""

from pathlib import Path

from oneshot_ednas.data.dataset import DataSet
from oneshot_ednas.data.layouts.counterparts import check_counterparts
from oneshot_ednas.data.sources import (
    CameraFiles,
    DepthSource,
    DisparitySource,
    FileSource,
    ImageSource,
    LabelMap,
    LabelsSource,
    TargetSource,
)
from oneshot_ednas.data.targets import IGNORE

# The ground truth of `test` is not public: its files hold the ego vehicle and the borders only.
SPLITS = ("train", "val")

CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train"),
    *("motorcycle", "bicycle"),
)
"""The 19 classes that count, by train id."""

LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label id, which files hold, of each class."""
NUM_LABEL_IDS = 34

CATEGORIES = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
CATEGORY_OF_CLASS = (0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 6, 6, 6, 6, 6)
"""Index in `CATEGORIES` of each class."""

# The customary bound of depth in street scenes. An error of half a pixel is 8 % of the distance
# there, and the stored disparities themselves reach down to 1/256 pixel, over 100 kilometres.
MAX_METRES = 80.0

IMAGE = ImageSource(folder="leftImg8bit", suffix="_leftImg8bit.png")


def is_cityscapes(root: Path) -> bool:
    """Whether the folder has Cityscapes' images and fine annotations."""
    return (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir()


def open_cityscapes(root: Path) -> DataSet:
    """The frames with fine annotations as a data set of splits `train` (2,975) and `val` (500).

    Targets are `segmentation` (19 classes; label map `categories7`), `disparity` in pixels of the
    full image if that folder is there, and `depth` up to 80 m if `camera` is there too.

    Raises:
        ValueError: for a split without frames, or frames without one of their files.
    """
    targets = _targets(root)
    return check_counterparts(
        DataSet(
            name="cityscapes",
            layout="official Cityscapes",
            root=root.resolve(),
            image=IMAGE,
            targets=targets,
            splits={split: _frames(root, split, targets["segmentation"]) for split in SPLITS},
            notes=_notes(targets),
        )
    )


def _targets(root: Path) -> dict[str, TargetSource]:
    targets: dict[str, TargetSource] = {"segmentation": _segmentation()}
    folder, suffix = "disparity", "_disparity.png"
    if (root / folder).is_dir():
        # A stored p > 0 is a disparity of (p - 1) / 256 pixels.
        targets["disparity"] = DisparitySource(
            kind="disparity", folder=folder, suffix=suffix, scale=1 / 256, offset=-1.0
        )
        if (root / "camera").is_dir():
            targets["depth"] = DepthSource(
                kind="depth",
                folder=folder,
                suffix=suffix,
                encoding="inverse",
                scale=256.0,
                offset=-1.0,
                max_metres=MAX_METRES,
                camera=CameraFiles(folder="camera", suffix="_camera.json"),
            )
    return targets


def _segmentation() -> LabelsSource:
    to_class = [IGNORE] * NUM_LABEL_IDS
    to_category = [IGNORE] * NUM_LABEL_IDS
    for index, label_id in enumerate(LABEL_IDS):
        to_class[label_id] = index
        # Labels outside the 19 classes do not count for their category either.
        to_category[label_id] = CATEGORY_OF_CLASS[index]
    return LabelsSource(
        kind="labels",
        folder="gtFine",
        suffix="_gtFine_labelIds.png",
        classes=CLASSES,
        map=tuple(to_class),
        label_maps={"categories7": LabelMap(classes=CATEGORIES, map=tuple(to_category))},
    )


def _frames(root: Path, split: str, labels: TargetSource) -> tuple[str, ...]:
    """Frame ids `<split>/<city>/<name>` of all images and label maps of a split, in order."""
    assert isinstance(labels, LabelsSource)
    frames: set[str] = set()
    source: FileSource
    for source in (IMAGE, labels):
        base = root / source.folder
        found = [path.relative_to(base) for path in base.glob(f"{split}/*/*{source.suffix}")]
        frames |= {path.as_posix().removesuffix(source.suffix) for path in found}
    if not frames:
        raise ValueError(
            f"no frames in {IMAGE.folder}/{split}/*/*{IMAGE.suffix}; expected those of the split, "
            f"unpacked as they come"
        )
    return tuple(sorted(frames))


def _notes(targets: dict[str, TargetSource]) -> tuple[str, ...]:
    if "depth" in targets:
        return (f"depth beyond {MAX_METRES:g} m is left out",)
    if "disparity" in targets:
        return ("no depth in metres: the folder camera is not there",)
    return ("no disparity and no depth: the folder disparity is not there",)
