"""Which layout a folder has, and a search step on every target of each."""

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import fixtures_adashare
import fixtures_astmt
import fixtures_cityscapes
import fixtures_mtan
import fixtures_nyuv2_mat
import folders
import numpy as np
import pytest
import yaml
from conftest import SMALL_SPACE, toy_table
from test_cli import good

from oneshot_ednas.config import load_config
from oneshot_ednas.data.layouts import LAYOUTS, mtan, open_data
from oneshot_ednas.data.targets import TARGET_KINDS
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.run_folder import Problem
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.tasks import TASK_KINDS, TaskConfig, make_tasks

REPOSITORY = Path(__file__).resolve().parent.parent
SIZE = (32, 32)


# Folders ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """A layout's fixture."""

    layout: str
    """Its row in `LAYOUTS`."""
    name: str
    """The data set's."""
    title: str
    """How the layout is called."""
    write: Callable[[Path], object]
    test_split: str
    tasks: dict[str, dict]
    """Settings of tasks that learn from all of its targets."""

    @property
    def targets(self) -> set[str]:
        return {task.get("target", name) for name, task in self.tasks.items()}


def write_manifest(root: Path) -> None:
    """The folder of `folders`, with a split for tests."""
    splits = {"train": ["a", "b", "c"], "test": ["d"]}
    for split, frames in splits.items():
        for frame in frames:
            folders.write_frame(root, frame)
        (root / f"{split}.txt").write_text("\n".join(frames))
    manifest = folders.layout(splits={split: f"{split}.txt" for split in splits})
    (root / "dataset.yaml").write_text(yaml.safe_dump(manifest))


def write_nyuv2_mat(root: Path) -> None:
    """At the official size: the camera is known for no other, and normals need it."""
    pytest.importorskip("h5py")
    pytest.importorskip("scipy")
    fixtures_nyuv2_mat.write_nyuv2_mat(root, size=(480, 640))


def write_pascal_mt(root: Path) -> None:
    pytest.importorskip("scipy")
    # Enough that two frames are validated on, of which one at least shows parts.
    more = ("2009_000001", "2009_000002", "2009_000004", "2009_000005")
    fixtures_astmt.write_pascal_mt(root, more_train=more, more_val=("2009_000006",))


def segmentation(num_classes: int) -> dict:
    return {"kind": "segmentation", "num_classes": num_classes}


DEPTH = {"kind": "depth", "relative_weight": 0.1, "scale": 5.0}
NORMALS, EDGES = {"kind": "normals"}, {"kind": "edges"}
DISPARITY, HEATMAP = {"kind": "disparity"}, {"kind": "heatmap"}

FOLDERS = [
    Folder(
        layout="manifest",
        name="toy",
        title="manifest dataset.yaml",
        write=write_manifest,
        test_split="test",
        tasks={"segmentation": segmentation(3), "depth": DEPTH, "normals": NORMALS},
    ),
    Folder(
        layout="adashare_cityscapes",
        name="adashare_cityscapes",
        title="AdaShare list, Cityscapes",
        write=fixtures_adashare.write_cityscapes,
        test_split="test",
        tasks={"disparity": DISPARITY}
        | {f"segmentation_{count}": segmentation(count) for count in (2, 7, 19)},
    ),
    Folder(
        layout="adashare_nyuv2",
        name="adashare_nyuv2",
        title="AdaShare list, NYUv2",
        write=lambda root: fixtures_adashare.write_nyuv2(root, num_train=3),
        test_split="test",
        tasks={"segmentation": segmentation(40), "normals": NORMALS, "depth": DEPTH},
    ),
    Folder(
        layout="adashare_taskonomy",
        name="adashare_taskonomy",
        title="AdaShare list, Tiny-Taskonomy",
        write=lambda root: fixtures_adashare.write_taskonomy(root, num_train=3),
        test_split="test",
        tasks={
            "segmentation": segmentation(17)
            | {"class_weights": fixtures_adashare.WEIGHTS.tolist()},
            "normals": NORMALS,
            "depth": DEPTH,
            "keypoints": HEATMAP,
            "edge_texture": HEATMAP,
            "log_depth": {"kind": "log_depth", "target": "depth"},
        },
    ),
    Folder(
        layout="mtan",
        name="mtan_cityscapes",
        title="MTAN pack, Cityscapes",
        write=lambda root: fixtures_mtan.write_cityscapes(root, numbers=(0, 1, 2)),
        test_split="val",
        tasks={"segmentation": segmentation(7), "disparity": DISPARITY},
    ),
    Folder(
        layout="mtan",
        name="mtan_nyuv2",
        title="MTAN pack, NYUv2",
        write=lambda root: fixtures_mtan.write_nyuv2(root, numbers=(0, 1, 2)),
        test_split="val",
        tasks={"segmentation": segmentation(13), "depth": DEPTH, "normals": NORMALS},
    ),
    Folder(
        layout="cityscapes",
        name="cityscapes",
        title="official Cityscapes",
        write=fixtures_cityscapes.write_cityscapes,
        test_split="val",
        tasks={
            "segmentation": segmentation(19),
            "disparity": DISPARITY | {"scale": 20.0},
            "depth": DEPTH,
        },
    ),
    Folder(
        layout="nyuv2_mat",
        name="nyuv2",
        title="official NYUv2 .mat",
        write=write_nyuv2_mat,
        test_split="test",
        tasks={"segmentation": segmentation(40), "depth": DEPTH, "normals": NORMALS},
    ),
    Folder(
        layout="astmt_nyud",
        name="nyud_mt",
        title="ASTMT NYUD_MT",
        write=lambda root: fixtures_astmt.write_nyud_mt(root, more_train=("0004",)),
        test_split="val",
        tasks={
            "segmentation": segmentation(40),
            "depth": DEPTH,
            "normals": NORMALS,
            "edges": EDGES | {"max_distance": 0.011},
        },
    ),
    Folder(
        layout="astmt_pascal",
        name="pascal_mt",
        title="ASTMT PASCAL_MT",
        write=write_pascal_mt,
        test_split="val",
        tasks={
            "segmentation": segmentation(21),
            "human_parts": {"kind": "human_parts", "num_classes": 7},
            "saliency": {"kind": "saliency"},
            "normals": NORMALS,
            "edges": EDGES,
        },
    ),
]

each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[Folder], Path]:
    """The data folder of a fixture, written once. Read only."""
    roots: dict[str, Path] = {}

    def root_of(folder: Folder) -> Path:
        if folder.name not in roots:
            root = tmp_path_factory.mktemp(folder.name)
            folder.write(root)
            roots[folder.name] = root
        return roots[folder.name]

    return root_of


# Which layout -------------------------------------------------------------------------------


def test_every_layout_has_a_folder_here():
    assert {folder.layout for folder in FOLDERS} == set(LAYOUTS)


@each_folder
def test_a_folder_is_told_by_its_files(written, folder):
    root = written(folder)
    data = open_data(root)
    assert (data.name, data.layout, data.root) == (folder.name, folder.title, root.resolve())
    assert folder.targets == set(data.targets)
    others = {name for name, row in LAYOUTS.items() if row.is_in(root)} - {folder.layout}
    # The arrays of AdaShare's Cityscapes lie as MTAN's do; its list says more.
    assert others == ({"mtan"} if folder.layout == "adashare_cityscapes" else set())


@each_folder
def test_a_layout_that_is_named_is_the_one_that_is_found(written, folder):
    assert open_data(written(folder), layout=folder.layout) == open_data(written(folder))


def test_a_layout_that_is_named_comes_before_what_the_files_tell(written):
    (folder,) = (folder for folder in FOLDERS if folder.layout == "adashare_cityscapes")
    root = written(folder)
    data = open_data(root, layout="mtan")
    assert (data.name, list(data.splits)) == ("mtan_cityscapes", ["train"])
    assert data == mtan.open_mtan(root)


def test_a_manifest_comes_before_any_other_layout(tmp_path):
    fixtures_cityscapes.write_cityscapes(tmp_path)
    write_manifest(tmp_path)
    assert open_data(tmp_path).name == "toy"
    assert open_data(tmp_path, layout="cityscapes").name == "cityscapes"


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "cityscapes"])
def test_a_layout_that_is_named_wrongly_says_what_it_misses(written, layout):
    if layout == "nyuv2_mat":
        pytest.importorskip("h5py")
    (folder,) = (folder for folder in FOLDERS if folder.layout == "cityscapes")
    with pytest.raises(ValueError, match=r"\A.+\Z") as error:
        open_data(written(folder), layout=layout)
    first_file = {
        "manifest": "dataset.yaml",
        "mtan": "train or val",
        "astmt_nyud": "gt_sets/train.txt",
        "astmt_pascal": "ImageSets/Context/train.txt",
    }
    assert first_file.get(layout, LAYOUTS[layout].expected) in str(error.value)


def test_an_unknown_layout_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"^unknown data layout cityscape; .*cityscapes") as error:
        open_data(tmp_path, layout="cityscape")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], "nothing"),
        (["rgb/0.png", "notes.txt"], "notes.txt, rgb/"),
        ([f"{letter}.png" for letter in "abcdefghi"], "a.png, b.png, .*, h.png, ..."),
    ],
)
def test_a_folder_of_no_layout_is_refused_with_what_was_found_and_expected(tmp_path, files, found):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=f"no known layout: found {found}; expected") as error:
        open_data(tmp_path)
    for name, row in LAYOUTS.items():
        assert f"{name}: {row.expected}" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_folder_is_no_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data folder .*absent"):
        open_data(tmp_path / "absent")


# A search step ------------------------------------------------------------------------------


def write_config(project: Path, folder: Folder) -> Path:
    """A config whose tasks learn from every target of a folder, with its space and table."""
    project.mkdir()
    (project / "space.yaml").write_text(SMALL_SPACE)
    config = {
        "device": "cpu",
        "space": "space.yaml",
        "data": {
            "source": "folder",
            "height": SIZE[0],
            "width": SIZE[1],
            "test_split": folder.test_split,
            "augment": {"flip": True, "scale": [0.5, 2.0], "brightness": 0.2},
            "workers": 1,
        },
        "tasks": folder.tasks,
        "latency": {"table": "table.csv", "target_ms": 50.0},
        "search": {
            "steps": 1,
            "warmup_fraction": 0.0,
            "batch_size": 1,
            "num_validations": 1,
            "splits": {"weights": 0.34, "alpha": 0.33, "validation": 0.33},
            "loop": {"log_every": 1},
        },
        "retrain": {"steps": 1, "batch_size": 1},
    }
    path = project / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    tasks = make_tasks(load_config(path).tasks)
    channels = {name: task.out_channels for name, task in tasks.items()}
    table = toy_table(SearchSpace.from_yaml(SMALL_SPACE), SIZE, out_channels=channels)
    header = replace(table.header, held_out_mape=5.0)
    LatencyTable(header, table.rows, "table.csv").save(project / "table.csv")
    return path


def logged(run: Path) -> dict[str, float]:
    """Everything that the search logged."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


def check_log(run: Path, tasks: dict[str, TaskConfig]) -> None:
    """Each task has a finite loss and all its metrics, finite."""
    values = logged(run)
    expected = {f"loss/{name}" for name in tasks} | {
        f"validation/{name}/{metric}"
        for name, task in tasks.items()
        for metric in task.metric_names
    }
    assert expected <= set(values), sorted(values)
    numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
    assert all(math.isfinite(value) for value in numbers.values()), numbers


@each_folder
def test_a_search_step_on_every_target_has_finite_losses_and_metrics(written, folder, tmp_path):
    config = write_config(tmp_path / "project", folder)
    good("search", config, "--data", written(folder), "--out", tmp_path / "run")
    check_log(tmp_path / "run", load_config(config).tasks)


# The shipped configs ------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A config, a data set that it is for, and what its header says to set for that one."""

    config: str
    data: str
    overrides: tuple[str, ...] = ()


FITS = [
    Fit("cityscapes_2task", "adashare_cityscapes"),
    Fit(
        "cityscapes_2task",
        "adashare_cityscapes",
        ("tasks.segmentation.convention=adashare", "tasks.disparity.convention=adashare"),
    ),
    Fit(
        "cityscapes_2task",
        "cityscapes",
        (
            "tasks.segmentation.target=segmentation",
            "data.test_split=val",
            "tasks.disparity.scale=12.8",
            "tasks.disparity.loss_weight=0.00371",
            "tasks.disparity.relative_weight=13.5",
        ),
    ),
    Fit("nyuv2_3task", "adashare_nyuv2"),
    Fit(
        "nyuv2_3task",
        "adashare_nyuv2",
        tuple(f"tasks.{name}.convention=adashare" for name in ("segmentation", "depth", "normals")),
    ),
    Fit("nyuv2_3task", "nyuv2"),
    Fit("nyuv2_3task", "nyud_mt", ("data.test_split=val",)),
    Fit(
        "nyuv2_3task",
        "nyuv2",
        ("data.label_map=classes13", "tasks.segmentation.num_classes=13"),
    ),
    Fit("pascal_5task", "pascal_mt"),
    Fit(
        "pascal_5task",
        "pascal_mt",
        tuple(
            f"tasks.{name}.convention=astmt"
            for name in ("segmentation", "human_parts", "saliency", "normals", "edges")
        ),
    ),
    Fit("taskonomy_5task", "adashare_taskonomy"),
]


@pytest.mark.parametrize("name", dict.fromkeys(fit.config for fit in FITS))
def test_the_budget_of_a_shipped_config_decides_something(name, tmp_path):
    config = load_config(REPOSITORY / f"configs/{name}.yaml", ["device=cpu"])
    problem = Problem(config, tmp_path)
    assert problem.costs.min_latency_ms < problem.target_ms < problem.costs.max_latency_ms
    assert problem.table.header.held_out_mape is not None


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: f"{fit.config}-{fit.data}")
def test_a_search_step_of_a_shipped_config_on_its_data(written, fit, tmp_path):
    (folder,) = (folder for folder in FOLDERS if folder.name == fit.data)
    overrides = (
        "device=cpu",
        "space=ednas_tiny",
        "latency.table=latency_tables/edgetpu_sim_48x64.csv",
        "latency.target_ms=50",
        "data.height=48",
        "data.width=64",
        "data.workers=1",
        "search.steps=1",
        "search.warmup_fraction=0",
        "search.batch_size=1",
        "search.num_validations=1",
        "search.splits={weights: 0.34, alpha: 0.33, validation: 0.33}",
        "retrain.batch_size=1",
        *fit.overrides,
    )
    config = REPOSITORY / f"configs/{fit.config}.yaml"
    settings = [part for override in overrides for part in ("--set", override)]
    good("search", config, "--data", written(folder), "--out", tmp_path / "run", *settings)
    check_log(tmp_path / "run", load_config(config, overrides).tasks)


# The page on data sets ----------------------------------------------------------------------

PAGE = (REPOSITORY / "docs/datasets.md").read_text("utf-8")


def code(language: str, start: str = "") -> str:
    """The one code block of the page that begins so."""
    blocks = re.findall(f"```{language}\n(.*?)```", PAGE, re.DOTALL)
    (found,) = (block for block in blocks if block.startswith(start))
    return found


def table(first: str) -> list[list[str]]:
    """Rows of the one table of the page whose first column has this head."""
    _, _, after = PAGE.partition(f"| {first} | ")
    rows = after.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def names(cell: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall("`([^`]+)`", cell)


def commands() -> list[list[str]]:
    lines = PAGE.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("    oneshot-ednas ")]


def write_example(root: Path, manifest: str) -> None:
    """Five random frames of every file that a manifest names."""
    random = np.random.default_rng(0)
    high = {"labels": 3, "depth": 15000, "disparity": 1500}  # of other kinds, any byte
    loaded = yaml.safe_load(manifest)
    sources = [loaded["image"], *loaded["targets"].values()]
    for split, frames in {"train": "abcd", "test": "e"}.items():
        for source in (source for source in sources if "folder" in source):
            kind = source.get("kind", "image")
            size = (24, 32, 3) if kind in ("image", "normals") else (24, 32)
            dtype = np.uint16 if high.get(kind, 0) > 256 else np.uint8
            for frame in frames:
                array = random.integers(0, high.get(kind, 256), size).astype(dtype)
                fixtures_adashare.save(root, f"{source['folder']}/{frame}{source['suffix']}", array)
        (root / loaded["splits"][split]).write_text("\n".join(frames))
    (root / "dataset.yaml").write_text(manifest)


def test_the_page_lists_every_layout_in_order_with_what_tells_it():
    rows = table("layout")
    assert [names(row[0])[0] for row in rows] == list(LAYOUTS)
    for folder in FOLDERS[1:]:
        (row,) = (row for row in rows if names(row[0]) == [folder.layout])
        assert folder.targets <= set(names(row[3]))


def test_the_page_lists_every_kind_of_target_and_task():
    assert [names(row[0])[0] for row in table("kind of target")] == list(TARGET_KINDS)
    rows = {names(row[0])[0]: row[1:] for row in table("task kind")}
    assert list(rows) == list(TASK_KINDS)
    for kind, (target, _, metrics, settings, conventions) in rows.items():
        row = TASK_KINDS[kind]
        assert names(target) == [row.target_kind]
        assert set(names(settings)) == row.settings
        assert {"ours", *names(conventions)} == set(row.metrics)
        assert tuple(names(metrics)) == row.metrics["ours"].names


def test_what_the_page_sets_for_other_folders_is_tested_here():
    for row in table("config"):
        assert (REPOSITORY / "configs" / names(row[0])[0]).is_file()
        for settings in re.findall("`(--set [^`]+)`", row[2]):
            overrides = tuple(word for word in shlex.split(settings) if word != "--set")
            assert overrides in {fit.overrides for fit in FITS}


def test_commands_of_the_page_run(written, tmp_path, monkeypatch):
    (folder,) = (folder for folder in FOLDERS if folder.name == "nyud_mt")
    shutil.copytree(written(folder), tmp_path / "DIR")
    monkeypatch.chdir(tmp_path)
    kinds = set()
    for command in commands():
        kinds.add(" ".join(command[:2]) if command[0] == "data" else command[0])
        if command[0] == "data":
            good(*command)
        else:
            overrides = [command[i + 1] for i, word in enumerate(command) if word == "--set"]
            Problem(load_config(Path(command[1]), [*overrides, "device=cpu"]), tmp_path / "run")
    assert kinds == {"run", "data check", "data prepare", "data stats"}
    assert (tmp_path / "runs/check/check.png").is_file()
    assert open_data(tmp_path / "DIR_256").layout == "manifest dataset.yaml"


def test_the_manifest_and_the_tasks_of_the_page_train(tmp_path, monkeypatch):
    root = tmp_path / "data"
    root.mkdir()
    write_example(root, code("yaml", "# dataset.yaml"))
    good("data", "check", root)
    (tmp_path / "my_kinds.py").write_text(code("python"))
    monkeypatch.syspath_prepend(tmp_path)
    tasks = yaml.safe_load(code("yaml", "tasks:\n  segmentation: {kind: segmentation, num_classes"))
    folder = replace(FOLDERS[0], tasks=tasks["tasks"])
    config = write_config(tmp_path / "project", folder)
    good("search", config, "--data", root, "--out", tmp_path / "run")
    check_log(tmp_path / "run", load_config(config).tasks)
    assert folder.targets == set(open_data(root).targets)


def test_the_page_s_tasks_of_cityscapes_train(written, tmp_path):
    (folder,) = (folder for folder in FOLDERS if folder.name == "adashare_cityscapes")
    tasks = yaml.safe_load(code("yaml", "tasks:\n  segmentation: {kind: segmentation, target"))
    config = write_config(tmp_path / "project", replace(folder, tasks=tasks["tasks"]))
    good("search", config, "--data", written(folder), "--out", tmp_path / "run")
    check_log(tmp_path / "run", load_config(config).tasks)


def test_a_manifest_may_be_one_shipped_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Found and read, since its folders are missed.
    with pytest.raises(ValueError, match="no folder rgb for image in "):
        open_data(tmp_path, manifest=Path("configs/datasets/nyuv2_256x192.yaml"))
