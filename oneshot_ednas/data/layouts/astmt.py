"""The two data packs of ASTMT, NYUD_MT and PASCAL_MT, which many later works read. No torch.

What the files hold is stated nowhere but in the readers that were published with the packs. Their
rotation of normals turns channels 0 and 1 as right and down (or as left and up) turn; that these
are right and down, and that channel 2 points back to the camera, is the colouring of NYU Depth v2
as the authors of 2D-3D-S describe it. A wrong sign would mirror pictures, and alter no score.

Sources:
    Maninis, Radosavovic, Kokkinos, "Attentive single-tasking of multiple tasks", CVPR 2019,
    https://arxiv.org/abs/1904.08918 (both packs).
    Vandenhende et al., "Multi-task learning for dense prediction tasks: a survey", TPAMI 2021,
    https://arxiv.org/abs/2004.13379 (NYUD_MT with arrays in place of MATLAB files).
    Armeni et al., "Joint 2D-3D-semantic data for indoor scene understanding", 2017,
    https://arxiv.org/abs/1702.01105 (directions of normals).
"""

from pathlib import Path

from oneshot_ednas.data.dataset import DataSet
from oneshot_ednas.data.layouts.counterparts import check_counterparts
from oneshot_ednas.data.layouts.nyuv2_mat import CLASSES13, CLASSES40, MAP_40_TO_13
from oneshot_ednas.data.manifest import read_frame_list
from oneshot_ednas.data.sources import (
    DepthSource,
    DerivedEdges,
    EdgesSource,
    FileSource,
    ImageSource,
    LabelMap,
    LabelsSource,
    NormalsSource,
    PartsSource,
    TargetSource,
)
from oneshot_ednas.data.targets import IGNORE

SPLITS = ("train", "val")
AXES = ("right", "down", "backward")

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)

PARTS = {
    "head": ("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"),
    "torso": ("neck", "torso"),
    "upper arm": ("luarm", "ruarm"),
    "lower arm": ("lhand", "llarm", "rhand", "rlarm"),
    "upper leg": ("luleg", "ruleg"),
    "lower leg": ("lfoot", "llleg", "rfoot", "rlleg"),
}
"""Names of parts in the files of PASCAL-Parts (https://arxiv.org/abs/1406.2031), by the six parts
that Chen et al., "Attention to scale", CVPR 2016, made of them and that ASTMT kept."""

NYUD_TARGETS: dict[str, TargetSource] = {
    "segmentation": LabelsSource(
        kind="labels",
        folder="segmentation",
        suffix=".png",
        classes=CLASSES40,
        map=(IGNORE, *range(len(CLASSES40))),
        ignore=0,
        label_maps={"classes13": LabelMap(classes=CLASSES13, map=(IGNORE, *MAP_40_TO_13))},
    ),
    "depth": DepthSource(kind="depth", folder="depth", suffix=".npy"),
    "normals": NormalsSource(kind="normals", folder="normals", suffix=".npy", axes=AXES),
    "edges": EdgesSource(kind="edges", folder="edge", suffix=".npy"),
}

PASCAL_TARGETS: dict[str, TargetSource] = {
    "human_parts": PartsSource(
        kind="pascal_parts",
        folder="human_parts",
        suffix=".mat",
        classes=("background", *PARTS),
        parts={name: i for i, names in enumerate(PARTS.values(), start=1) for name in names},
    ),
    "normals": NormalsSource(
        kind="normals", folder="normals_distill", suffix=".png", axes=AXES, encoding="rgb"
    ),
    "saliency": LabelsSource(
        kind="labels",
        folder="sal_distill",
        suffix=".png",
        classes=("background", "salient"),
        above=255 / 2,
    ),
}
# Both hold the same 21 classes; a frame that has no VOC labels has those of PASCAL-Context.
PASCAL_LABELS = tuple(
    LabelsSource(kind="labels", folder=folder, suffix=".png", classes=VOC_CLASSES)
    for folder in ("semseg/VOC12", "semseg/pascal-context")
)


def is_nyud_mt(root: Path) -> bool:
    """Whether the folder is NYUD_MT."""
    return (root / "gt_sets").is_dir() and (root / "images").is_dir()


def open_nyud_mt(root: Path) -> DataSet:
    """NYUD_MT as a data set of splits `train` (795) and `val` (654), 40 classes, metres.

    Targets are those of `NYUD_TARGETS` whose folder is there.

    Raises:
        ValueError: for a list that is missing or empty, or frames without one of their files.
    """
    return check_counterparts(
        DataSet(
            name="nyud_mt",
            layout="ASTMT NYUD_MT",
            root=root.resolve(),
            image=ImageSource(folder="images", suffix=".jpg"),
            targets=_found(root, NYUD_TARGETS),
            splits=_splits(root, "gt_sets"),
        )
    )


def is_pascal_mt(root: Path) -> bool:
    """Whether the folder is PASCAL_MT."""
    return (root / "ImageSets/Context").is_dir() and (root / "JPEGImages").is_dir()


def open_pascal_mt(root: Path) -> DataSet:
    """PASCAL_MT as a data set of splits `train` (4,998) and `val` (5,105).

    Targets are those of `PASCAL_TARGETS` whose folder is there, and with one of the folders of
    labels `segmentation` (21 classes) and the `edges` between them.

    Raises:
        ValueError: for a list that is missing or empty, or frames without one of their files.
    """
    image = ImageSource(folder="JPEGImages", suffix=".jpg")
    splits = _splits(root, "ImageSets/Context")
    targets = _found(root, PASCAL_TARGETS)
    labels = [source for source in PASCAL_LABELS if (root / source.folder).is_dir()]
    if labels:
        targets = {
            "segmentation": labels[0],
            **targets,
            "edges": DerivedEdges(kind="derived_edges"),
        }
    return check_counterparts(
        DataSet(
            name="pascal_mt",
            layout="ASTMT PASCAL_MT",
            root=root.resolve(),
            image=image,
            targets=targets,
            splits=splits,
            listed=_listed(root, splits, {"image": image, **targets}, labels),
            notes=_pascal_notes(targets, labels),
        )
    )


def _found(root: Path, targets: dict[str, TargetSource]) -> dict[str, TargetSource]:
    return {
        name: source
        for name, source in targets.items()
        if isinstance(source, FileSource) and (root / source.folder).is_dir()
    }


def _splits(root: Path, folder: str) -> dict[str, tuple[str, ...]]:
    return {split: read_frame_list(root, f"{folder}/{split}.txt") for split in SPLITS}


def _listed(
    root: Path,
    splits: dict[str, tuple[str, ...]],
    sources: dict[str, ImageSource | TargetSource],
    labels: list[LabelsSource],
) -> dict[str, dict[str, str]]:
    """The files of each frame, where its labels may lie in either of two folders."""
    if len(labels) < 2:
        return {}
    stored = {name: source for name, source in sources.items() if isinstance(source, FileSource)}
    first, second = labels
    in_first = {path.stem for path in (root / first.folder).iterdir()}
    return {
        frame: {
            **{name: source.path(frame) for name, source in stored.items()},
            "segmentation": (first if frame in in_first else second).path(frame),
        }
        for frames in splits.values()
        for frame in frames
    }


def _pascal_notes(targets: dict[str, TargetSource], labels: list[LabelsSource]) -> tuple[str, ...]:
    notes = {
        "segmentation": "segmentation is that of "
        + ", and where a frame has none there of ".join(source.folder for source in labels),
        "normals": "normals are predictions of another network, valid everywhere; ASTMT leaves out "
        "objects that NYU Depth v2 does not have",
        "saliency": "saliency is the prediction of another network",
        "edges": "edges part the 21 classes; ASTMT takes those of the 459 of PASCAL-Context",
    }
    return tuple(note for name, note in notes.items() if name in targets)
