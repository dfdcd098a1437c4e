"""The packs of NumPy arrays that came with MTAN, which LibMTL and auto-lambda read too. No torch.

`{train,val}/{image,label,depth,normal}/N.npy`, one array a frame: images of floats in 0..1, labels
from 0 with -1 for ignored pixels. A pack with `normal` is NYUv2: depth in metres, unit normals, 13
classes. One without is Cityscapes: what its folder `depth` holds is the official 16-bit disparity
over 65535, which is no depth in metres, so the target is `disparity`. AutoMTL names the folders of
labels by their number of classes: `label_2`, `label_7`, `label_19`.

The 13 classes of NYUv2 are in the order of SceneNet's table, to which the authors refer.

MTAN states no axes for its normals, only that they are those of D. Eigen's page
(https://cs.nyu.edu/~deigen/dnl/, `normals_gt.tgz`) at another size. They are read as right,
forward, up, as was measured on AdaShare's PNG of the same frames. Two loaders agree with it: that
of cross-task consistency exchanges the last two channels of `normals_gt.tgz` and negates the new
second one, and MTAN's own negates the first one where it mirrors an image.

Source:
    S. Liu, E. Johns, A. J. Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019,
    https://github.com/lorenmt/mtan (README, issues 10, 11 and 25);
    A. Handa et al., https://github.com/ankurhanda/SceneNetv1.0 (classes);
    A. Zamir et al., "Robust Learning Through Cross-Task Consistency", CVPR 2020 (axes).
"""

import re
from collections.abc import Iterable
from pathlib import Path

from oneshot_ednas.data.dataset import NAMELESS, DataSet
from oneshot_ednas.data.layouts.counterparts import check_counterparts
from oneshot_ednas.data.layouts.nyuv2_mat import CLASSES13
from oneshot_ednas.data.sources import (
    DepthSource,
    DisparitySource,
    ImageSource,
    LabelsSource,
    NormalsSource,
    TargetSource,
)

EXPECTED = "{train,val}/{image,label,depth,normal}/N.npy"
"""The files that tell the layout, for people."""
SPLITS = ("train", "val")

_SUFFIX = ".npy"
_NUMBERED = re.compile("label_([1-9][0-9]*)")


def is_mtan(root: Path) -> bool:
    """Whether a folder has `train/image/*.npy` or `val/image/*.npy`."""
    return any(any((root / split / "image").glob(f"*{_SUFFIX}")) for split in SPLITS)


def open_mtan(root: Path) -> DataSet:
    """The data set in a pack: the splits and the targets whose folders are there.

    One folder of labels gives the target `segmentation`; of several, `label_N` gives
    `segmentation_N`. Labels whose number of classes nothing tells have `NAMELESS` classes.

    Args:
        root: the data folder.

    Raises:
        ValueError: for a folder without a split or a target, frames that lack a file, or a file
            or folder whose name holds no number that can be.
    """
    splits = [split for split in SPLITS if (root / split).is_dir()]
    if not splits:
        raise ValueError(f"no folder train or val in {root}; expected {EXPECTED}")
    present = {path.name for split in splits for path in (root / split).iterdir() if path.is_dir()}
    label_counts = _label_counts(present)
    folders = [*label_counts, *(name for name in ("depth", "normal") if name in present)]
    if not folders:
        raise ValueError(
            f"no folder label, depth or normal in {', '.join(splits)} of {root}; "
            f"expected {EXPECTED}"
        )
    is_nyuv2 = "normal" in present
    data = DataSet(
        name="mtan_nyuv2" if is_nyuv2 else "mtan_cityscapes",
        layout=f"MTAN pack, {'NYUv2' if is_nyuv2 else 'Cityscapes'}",
        root=root.resolve(),
        image=ImageSource(folder=_folder("image"), suffix=_SUFFIX, white=1.0),
        targets=_targets(label_counts, folders, is_nyuv2),
        splits={split: _frames(root, split, ["image", *folders]) for split in splits},
        notes=_notes(label_counts, folders, is_nyuv2),
    )
    return check_counterparts(data)


def _label_counts(present: Iterable[str]) -> dict[str, int | None]:
    """Number of classes of each folder of labels, None if its name does not tell."""
    counts: dict[str, int | None] = {"label": None} if "label" in present else {}
    numbers = [int(match[1]) for name in present if (match := _NUMBERED.fullmatch(name))]
    for number in sorted(numbers):
        if number > len(NAMELESS):
            raise ValueError(
                f"label_{number}: expected at most {len(NAMELESS)} classes in a folder's name; "
                f"rename it"
            )
        counts[f"label_{number}"] = number
    return counts


def _targets(
    label_counts: dict[str, int | None], folders: list[str], is_nyuv2: bool
) -> dict[str, TargetSource]:
    targets: dict[str, TargetSource] = {}
    for folder, count in label_counts.items():
        # Of a folder that tells no number, NAMELESS as a whole says that nobody knows.
        classes = CLASSES13 if is_nyuv2 and count is None else NAMELESS[:count]
        targets[_label_target(folder, label_counts)] = LabelsSource(
            kind="labels", folder=_folder(folder), suffix=_SUFFIX, classes=classes, ignore=-1
        )
    if "depth" in folders and is_nyuv2:
        targets["depth"] = DepthSource(kind="depth", folder=_folder("depth"), suffix=_SUFFIX)
    elif "depth" in folders:
        targets["disparity"] = DisparitySource(
            kind="disparity", folder=_folder("depth"), suffix=_SUFFIX
        )
    if is_nyuv2:
        targets["normals"] = NormalsSource(
            kind="normals",
            folder=_folder("normal"),
            suffix=_SUFFIX,
            axes=("right", "forward", "up"),
        )
    return targets


def _label_target(folder: str, label_counts: dict[str, int | None]) -> str:
    count = label_counts[folder]
    is_only = len(label_counts) == 1
    return "segmentation" if is_only or count is None else f"segmentation_{count}"


def _notes(
    label_counts: dict[str, int | None], folders: list[str], is_nyuv2: bool
) -> tuple[str, ...]:
    notes = []
    if "depth" in folders and not is_nyuv2:
        notes.append(
            "disparity is what the pack calls depth: the official 16-bit disparity over 65535, "
            "no metres"
        )
    for folder, count in label_counts.items():
        target = _label_target(folder, label_counts)
        if count is not None:
            notes.append(f"{target} is {folder}: {count} classes, by number")
        elif not is_nyuv2:
            notes.append(
                f"{target} is {folder}: the pack does not tell its number of classes (MTAN has 2, "
                f"7 and 19)"
            )
    if is_nyuv2:
        notes.append(
            "normals: the pack does not state its axes; read as (right, forward, up), those of "
            "the published normals that it was made from"
        )
    return tuple(notes)


def _frames(root: Path, split: str, folders: list[str]) -> tuple[str, ...]:
    """Frame ids of a split by number, 2 before 10: all that any of the folders has."""
    numbers = {
        path.stem: path
        for folder in folders
        for path in (root / split / folder).glob(f"*{_SUFFIX}")
        # What begins with a dot was left by an operating system.
        if not path.name.startswith(".")
    }
    if not numbers:
        raise ValueError(
            f"{split}: expected files image/N{_SUFFIX}, got none; unpack the pack anew"
        )
    for number, path in numbers.items():
        if not (number.isascii() and number.isdigit()):
            raise ValueError(
                f"{path.relative_to(root)}: expected the number of a frame, as 0{_SUFFIX}; rename "
                f"or move the file"
            )
    return tuple(f"{split}/{number}" for number in sorted(numbers, key=lambda n: (int(n), len(n))))


def _folder(name: str) -> str:
    return f"{{parent}}/{name}"
