"""The official labelled frames of NYU Depth v2, in their MATLAB files. No torch.

`nyu_depth_v2_labeled.mat` (HDF5) holds all 1,449 frames. The split lies in `splits.mat` and the 40
classes in `classMapping40.mat`, both as distributed with it.

Sources:
    Silberman, Hoiem, Kohli, Fergus, "Indoor segmentation and support inference from RGBD images",
    ECCV 2012, https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html (frames, split, camera).
    Gupta, Arbelaez, Malik, "Perceptual organization and recognition of indoor scenes from RGB-D
    images", CVPR 2013 (40 classes).
    Couprie, Farabet, Najman, LeCun, "Indoor semantic segmentation using depth information",
    ICLR 2013, https://arxiv.org/abs/1301.3572 (13 classes).
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from oneshot_ednas.data import files
from oneshot_ednas.data.dataset import DataSet
from oneshot_ednas.data.sources import (
    DepthSource,
    DerivedNormals,
    ImageSource,
    Intrinsics,
    LabelMap,
    LabelsSource,
    TargetSource,
)
from oneshot_ednas.data.targets import IGNORE

FRAMES = "nyu_depth_v2_labeled.mat"
SPLITS = "splits.mat"
CLASS_MAPPING = "classMapping40.mat"

CLASSES40 = (
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf"),
    *("picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror"),
    *("floor mat", "clothes", "ceiling", "books", "refridgerator", "television", "paper", "towel"),
    *("shower curtain", "box", "whiteboard", "person", "night stand", "toilet", "sink", "lamp"),
    *("bathtub", "bag", "otherstructure", "otherfurniture", "otherprop"),
)
"""The 40 classes by class index; files count them from 1."""

CLASSES13 = (
    *("bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa"),
    *("table", "tv", "wall", "window"),
)
MAP_40_TO_13 = (
    *(11, 4, 5, 0, 3, 8, 9, 11, 12, 5, 7, 5, 12, 9, 5, 12, 5, 6, 6, 4),
    *(6, 2, 1, 5, 10, 6, 6, 6, 6, 6, 6, 5, 6, 6, 6, 6, 6, 6, 5, 6),
)
"""Index in `CLASSES13` of each of `CLASSES40`."""

# The colour camera of the authors' toolbox (camera_params.m): depth maps are in its view.
CAMERA = Intrinsics(
    fx=5.1885790117450188e02,
    fy=5.1946961112127485e02,
    cx=3.2558244941119034e02,
    cy=2.5373616633400465e02,
)
CAMERA_SIZE = (640, 480)


def is_nyuv2_mat(root: Path) -> bool:
    """Whether the folder has the labelled frames of NYU Depth v2."""
    return (root / FRAMES).is_file()


def open_nyuv2_mat(root: Path) -> DataSet:
    """The labelled frames as a data set of splits `train` (795) and `test` (654).

    Targets are `segmentation` (40 classes, label map `classes13`; with `classMapping40.mat` only),
    `depth` in metres with the authors' filled holes, and `normals` derived from it.

    Raises:
        ValueError: for files that are missing, cut short, or not what they should be; without
            h5py or SciPy.
    """
    count, num_names, size = _measure(root)
    splits = _splits(root, count)
    targets: dict[str, TargetSource] = {}
    notes = []
    if (root / CLASS_MAPPING).is_file():
        targets["segmentation"] = _segmentation(_class_map(root, num_names))
    else:
        notes.append(f"no segmentation: {CLASS_MAPPING} gives the 40 classes and is not there")
    targets["depth"] = DepthSource(kind="depth", folder=".", suffix=FRAMES, stack="depths")
    if size == CAMERA_SIZE:
        labels = "segmentation" if "segmentation" in targets else None
        targets["normals"] = DerivedNormals(kind="derived_normals", labels=labels)
        within = " within each label" if labels else ""
        notes.append(f"normals are derived from depth{within}: not those of published results")
    else:
        notes.append(
            f"no normals: frames are {size[0]}x{size[1]}, the camera is known for "
            f"{CAMERA_SIZE[0]}x{CAMERA_SIZE[1]}"
        )
    return DataSet(
        name="nyuv2",
        layout="official NYUv2 .mat",
        root=root.resolve(),
        image=ImageSource(folder=".", suffix=FRAMES, stack="images"),
        targets=targets,
        splits=splits,
        intrinsics=CAMERA if size == CAMERA_SIZE else None,
        notes=tuple(notes),
    )


def _segmentation(class_map: tuple[int, ...]) -> LabelsSource:
    to13 = tuple(IGNORE if index == IGNORE else MAP_40_TO_13[index] for index in class_map)
    return LabelsSource(
        kind="labels",
        folder=".",
        suffix=FRAMES,
        stack="labels",
        classes=CLASSES40,
        map=class_map,
        ignore=0,
        label_maps={"classes13": LabelMap(classes=CLASSES13, map=to13)},
    )


def _measure(root: Path) -> tuple[int, int, tuple[int, int]]:
    """Number of frames and of named labels, and (width, height); arrays are not read."""
    h5py = files.import_h5py()
    found = {}
    try:
        with h5py.File(root / FRAMES, "r") as file:
            for name in ("images", "depths", "labels", "names"):
                with suppress(ValueError):  # what is missing is told below
                    found[name] = tuple(files.hdf5_array(file, name).shape)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{FRAMES} cannot be read ({reason}); expected a whole file of MATLAB 7.3"
        ) from None
    # MATLAB's order of axes is the reverse: height x width x 3 x frames.
    images = found.get("images", ())
    if len(images) != 4 or images[1] != 3 or 0 in images:
        raise ValueError(
            f"{FRAMES}: expected images of frames x 3 x width x height, got {images or 'none'}; "
            f"restore the official file"
        )
    frames, _, width, height = images
    for name in ("depths", "labels"):
        if found.get(name) != (frames, width, height):
            raise ValueError(
                f"{FRAMES}: expected {name} of {(frames, width, height)} as the images, got "
                f"{found.get(name, 'none')}; restore the official file"
            )
    return frames, int(np.prod(found.get("names", (0,)))), (width, height)


def _splits(root: Path, count: int) -> dict[str, tuple[str, ...]]:
    if not (root / SPLITS).is_file():
        raise ValueError(
            f"no file {SPLITS} beside {FRAMES}; it holds the official split (trainNdxs, testNdxs)"
        )
    found = files.read_matlab(root, SPLITS)
    splits = {}
    for split, name in (("train", "trainNdxs"), ("test", "testNdxs")):
        indices = _whole_numbers(found, SPLITS, name)
        if not len(indices) or indices.min() < 1 or indices.max() > count:
            shown = f"{indices.min()}..{indices.max()}" if len(indices) else "none"
            raise ValueError(f"{SPLITS}: expected {name} within 1..{count}, got {shown}")
        if len(set(indices.tolist())) < len(indices):
            raise ValueError(f"{SPLITS}: {name} lists a frame twice; restore the official file")
        splits[split] = tuple(str(index - 1) for index in indices)  # MATLAB counts from 1
    both = set(splits["train"]) & set(splits["test"])
    if both:
        raise ValueError(
            f"{SPLITS}: frame {int(min(both, key=int)) + 1} is in trainNdxs and in testNdxs; "
            f"restore the official file"
        )
    return splits


def _class_map(root: Path, num_names: int) -> tuple[int, ...]:
    """Class index of each stored label, of which 0 is unlabelled."""
    classes = _whole_numbers(files.read_matlab(root, CLASS_MAPPING), CLASS_MAPPING, "mapClass")
    if len(classes) != num_names:
        raise ValueError(
            f"{CLASS_MAPPING}: expected mapClass of the {num_names} names in {FRAMES}, got "
            f"{len(classes)}"
        )
    if classes.min() < 0 or classes.max() > len(CLASSES40):
        raise ValueError(
            f"{CLASS_MAPPING}: expected mapClass in 0..{len(CLASSES40)}, got "
            f"{classes.min()}..{classes.max()}"
        )
    return (IGNORE, *(int(index) - 1 if index else IGNORE for index in classes))


def _whole_numbers(found: dict[str, Any], file: str, name: str) -> np.ndarray:
    """A vector of whole numbers; MATLAB stores them as floating point."""
    values = np.atleast_1d(found.get(name, ()))
    if name not in found or values.ndim != 1 or values.dtype.kind not in "iuf":
        raise ValueError(f"{file}: expected a vector {name} of whole numbers")
    if not (np.isfinite(values) & (np.abs(values) < 2**31)).all():
        raise ValueError(f"{file}: expected a vector {name} of whole numbers")
    whole = values.astype(np.int64)
    if (whole != values).any():
        raise ValueError(f"{file}: expected a vector {name} of whole numbers")
    return whole
