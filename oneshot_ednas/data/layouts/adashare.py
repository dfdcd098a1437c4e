"""The JSON lists of AdaShare and AutoMTL, which name every file of a frame. No torch.

`{split: [[file of each column, ...], ...]}`, with paths relative to the folder of the list. One
row of `LISTS` per data set:

- Cityscapes: MTAN's arrays, so images in 0..1, labels with -1 ignored, and for depth the official
  16-bit disparity over 65535, which is no depth in metres.
- NYUv2: labels 0..39 with 255 ignored, depth as float32 metres. Normals are PNG: RGB / 255 * 2 - 1
  is (right, forward, up), and white is invalid.
- Tiny-Taskonomy: PNG. Label 0 is unsure and ignored, 1 is background, then come 16 classes of COCO.
  Depth is in units of 1/512 m; the loaders drop 64500 and above (65535 is a hole in the mesh). 2D
  keypoints and texture edges are 16-bit heat maps, here over 65536; the loaders also clip them at
  0.005 and 0.08. Normals are x right, y down, z forward: in those axes MonoSDF compares its own
  with Omnidata's, which are encoded alike, and cross-task consistency turns those of NYUv2 into
  them. The authors' words for z, "towards the camera", contradict both. Grey normals, of almost no
  length, are invalid; AdaShare takes the holes of the depth instead.

How AdaShare trains is no matter of the layout: images as BGR less (104.007, 116.669, 122.679),
random scales of 0.5 to 1.5 that leave depth as it is, random crops, Taskonomy's depth as
log(1 + stored) / log(65536), and normals of NYUv2 as raw bytes that a mirrored image leaves alone.

Source:
    X. Sun et al., "AdaShare: Learning What To Share For Efficient Deep Multi-Task Learning",
    NeurIPS 2020, https://github.com/sunxm2357/AdaShare (dataloaders);
    L. Zhang et al., "AutoMTL", NeurIPS 2022, https://github.com/zhanglijun95/AutoMTL;
    A. Zamir et al., "Taskonomy", CVPR 2018, https://github.com/StanfordVL/taskonomy (data/README);
    A. Zamir et al., "Robust Learning Through Cross-Task Consistency", CVPR 2020, and
    Z. Yu et al., "MonoSDF", NeurIPS 2022 (axes of Taskonomy's normals).
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from oneshot_ednas.data.dataset import NAMELESS, DataSet
from oneshot_ednas.data.files import check_inside, read_vector
from oneshot_ednas.data.manifest import LIST_BYTES
from oneshot_ednas.data.sources import (
    DepthSource,
    DisparitySource,
    ImageSource,
    LabelsSource,
    NormalsSource,
    TargetSource,
    ValuesSource,
    check_relative,
)
from oneshot_ednas.data.targets import IGNORE
from oneshot_ednas.parsing import parse_json

TASKONOMY_CLASSES = (
    "background",
    "bottle",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
)
WEIGHTS_FILE = "semseg_prior_factor.npy"


@dataclass(frozen=True, kw_only=True)
class FrameList:
    """One row of `LISTS`: a list by its name, and how its columns are encoded."""

    file: str
    """The list, in the data folder."""
    name: str
    """Of the data set."""
    title: str
    """Of the layout, for people."""
    columns: tuple[str, ...]
    """`image` or the target that each entry of a row is the file of."""
    image: ImageSource
    targets: dict[str, TargetSource]
    notes: tuple[str, ...] = ()
    has_class_weights: bool = False
    """Whether `class_weights` are those of this data set."""

    def is_in(self, root: Path) -> bool:
        """Whether a folder has the list."""
        return (root / self.file).is_file()

    def open(self, root: Path) -> DataSet:
        """The data set that the list in a folder describes; its keys are the splits.

        A frame's id is the path of its image without the suffix. That a listed file exists is
        checked where a split is read, since a list may name millions.

        Args:
            root: the data folder.

        Raises:
            ValueError: for a list that is missing, no JSON or not UTF-8, a row that is no list of
                as many paths as there are columns, a path that leaves the folder, a frame that is
                listed twice in a split or with other files in another one.
        """
        root = root.resolve()
        splits: dict[str, tuple[str, ...]] = {}
        listed: dict[str, dict[str, str]] = {}
        for split, rows in self._read(root).items():
            frames: dict[str, None] = {}
            if not isinstance(rows, list):
                raise ValueError(
                    f"{self.file}: {split}: expected a list of rows, got {_kind(rows)}"
                )
            for number, row in enumerate(rows, start=1):
                where = f"{self.file}: {split} row {number}"
                found = self._row(root, row, where)
                frame = str(PurePosixPath(found["image"]).with_suffix(""))
                if frame in frames:
                    raise ValueError(f"{where}: frame {frame} is listed twice; keep one")
                if listed.setdefault(frame, found) != found:
                    raise ValueError(
                        f"{where}: frame {frame} has other files in another split; correct one"
                    )
                frames[frame] = None
            splits[split] = tuple(frames)
        return DataSet(
            name=self.name,
            layout=self.title,
            root=root,
            image=self.image,
            targets=self.targets,
            splits=splits,
            listed=listed,
            notes=self.notes + (_weight_notes(root) if self.has_class_weights else ()),
        )

    def _read(self, root: Path) -> dict[str, object]:
        path = root / self.file
        if not path.is_file():
            raise ValueError(f"no file {self.file} in {root}; give the folder that holds the list")
        check_inside(root, path, self.file)
        if path.stat().st_size > LIST_BYTES:
            raise ValueError(f"{self.file}: expected at most {LIST_BYTES} bytes of lists")
        try:
            content = parse_json(path.read_text("utf-8-sig"), self.file)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.file}: not UTF-8 text ({error.reason}); save it as UTF-8"
            ) from None
        except ValueError as error:
            raise ValueError(f"{error}; copy the list anew") from None
        if not isinstance(content, dict) or not content:
            raise ValueError(
                f"{self.file}: expected an object with a list of rows per split, got "
                f"{_kind(content) if content else 'no split'}"
            )
        return content

    def _row(self, root: Path, row: object, where: str) -> dict[str, str]:
        """The file of each column of a row, relative to the root."""
        expected = f"expected [{', '.join(self.columns)}]"
        if not isinstance(row, list):
            raise ValueError(f"{where}: {expected}, got {_kind(row)}")
        if len(row) != len(self.columns):
            raise ValueError(f"{where}: {expected}, got {len(row)} entries")
        pairs = zip(self.columns, row, strict=True)
        return {column: _path(root, entry, f"{where}: {column}") for column, entry in pairs}


def _path(root: Path, entry: object, where: str) -> str:
    """A listed path as one below the root; a leading `/` is dropped where that gives a file."""
    if not isinstance(entry, str):
        raise ValueError(f"{where}: expected a path, got {_kind(entry)}")
    relative = entry.removeprefix("/")
    try:
        check_relative(relative, where)
        is_inside = PurePosixPath(relative).name != ""
    except ValueError:
        is_inside = False
    if not is_inside or (relative != entry and not (root / relative).is_file()):
        raise ValueError(
            f"{where}: expected a path relative to the data folder, got {entry!r}; rewrite the "
            f"paths of the list"
        )
    return str(PurePosixPath(relative))


def _kind(value: object) -> str:
    """What a JSON value is, for messages."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return kinds.get(type(value), "a number")


def class_weights(root: Path) -> dict[str, tuple[float, ...]]:
    """Weight of each class of a target in its loss, from the class priors of Tiny-Taskonomy.

    Args:
        root: the data folder.

    Returns:
        `segmentation`: one weight per class of `TASKONOMY_CLASSES`; nothing where the folder has no
        `semseg_prior_factor.npy`.

    Raises:
        ValueError: if the file cannot be read, is a link that leaves the folder, or holds anything
            but 17 positive numbers.
    """
    if not (root / WEIGHTS_FILE).is_file():
        return {}
    expected = f"expected {len(TASKONOMY_CLASSES)} positive numbers, one per class"
    try:
        weights = read_vector(root, WEIGHTS_FILE)
    except ValueError as error:
        raise ValueError(f"{error}; {expected}") from None
    if len(weights) != len(TASKONOMY_CLASSES):
        raise ValueError(f"{WEIGHTS_FILE}: {expected}, got {len(weights)}")
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise ValueError(f"{WEIGHTS_FILE}: {expected}, got {weights.min():g}..{weights.max():g}")
    return {"segmentation": tuple(float(weight) for weight in weights)}


def _array_labels(num_classes: int) -> LabelsSource:
    return LabelsSource(
        kind="labels", folder=".", suffix=".npy", classes=NAMELESS[:num_classes], ignore=-1
    )


def _heat_map() -> ValuesSource:
    return ValuesSource(kind="values", folder=".", suffix=".png", scale=1 / 65536)


def _weight_notes(root: Path) -> tuple[str, ...]:
    return tuple(
        f"{target}: {WEIGHTS_FILE} weighs the classes; for the papers' loss set "
        f"tasks.{target}.class_weights to [{', '.join(f'{weight:.4g}' for weight in weights)}]"
        for target, weights in class_weights(root).items()
    )


LISTS: dict[str, FrameList] = {
    "adashare_cityscapes": FrameList(
        file="cityscape.json",
        name="adashare_cityscapes",
        title="AdaShare list, Cityscapes",
        columns=("image", "disparity", "segmentation_2", "segmentation_7", "segmentation_19"),
        image=ImageSource(folder=".", suffix=".npy", white=1.0),
        targets={
            "disparity": DisparitySource(kind="disparity", folder=".", suffix=".npy"),
            "segmentation_2": _array_labels(2),
            "segmentation_7": _array_labels(7),
            "segmentation_19": _array_labels(19),
        },
        notes=(
            "disparity is what the list calls depth: the official 16-bit disparity over 65535, no "
            "metres",
        ),
    ),
    "adashare_nyuv2": FrameList(
        file="nyu_v2_3task.json",
        name="adashare_nyuv2",
        title="AdaShare list, NYUv2",
        columns=("image", "segmentation", "normals", "depth"),
        image=ImageSource(folder=".", suffix=".png"),
        targets={
            "segmentation": LabelsSource(
                kind="labels", folder=".", suffix=".png", classes=NAMELESS[:40]
            ),
            "normals": NormalsSource(
                kind="normals",
                folder=".",
                suffix=".png",
                encoding="rgb",
                axes=("right", "forward", "up"),
                invalid=(255.0, 255.0, 255.0),
            ),
            "depth": DepthSource(kind="depth", folder=".", suffix=".npy"),
        },
    ),
    "adashare_taskonomy": FrameList(
        file="taskonomy.json",
        name="adashare_taskonomy",
        title="AdaShare list, Tiny-Taskonomy",
        columns=("image", "segmentation", "normals", "depth", "keypoints", "edge_texture"),
        image=ImageSource(folder=".", suffix=".png"),
        targets={
            "segmentation": LabelsSource(
                kind="labels",
                folder=".",
                suffix=".png",
                classes=TASKONOMY_CLASSES,
                map=(IGNORE, *range(len(TASKONOMY_CLASSES))),
                ignore=0,
            ),
            "normals": NormalsSource(
                kind="normals",
                folder=".",
                suffix=".png",
                encoding="rgb",
                axes=("right", "down", "forward"),
            ),
            "depth": DepthSource(
                kind="depth", folder=".", suffix=".png", scale=1 / 512, max_metres=64499 / 512
            ),
            "keypoints": _heat_map(),
            "edge_texture": _heat_map(),
        },
        notes=(
            "segmentation: the labels were made by a network (FCIS), not by people",
            "normals: z is read as forward, as other works do, though its authors say backward",
        ),
        has_class_weights=True,
    ),
}
"""By the name that a config gives the layout."""
