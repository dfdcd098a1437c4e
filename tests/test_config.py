"""The config of a run: strict reading, overrides, shipped files."""

import dataclasses
from pathlib import Path

import pytest
from tiny import CONFIG

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.config import (
    ExperimentConfig,
    LatencyConfig,
    TaskSharingConfig,
    first_difference,
    load_config,
)
from oneshot_ednas.data.manifest import Manifest
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.schema import dump_yaml, find_file, load_yaml, parse_yaml, shipped
from oneshot_ednas.sharing.backbone import make_encoder
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.costs import latency_costs
from oneshot_ednas.space import SearchSpace, named_space
from oneshot_ednas.tasks import make_tasks

ALL_CONFIGS = sorted(path.name for path in shipped("configs").glob("*.yaml"))
SHARING_CONFIGS = [
    name for name in ALL_CONFIGS if "\nbackbone:" in (shipped("configs") / name).read_text("utf-8")
]
CONFIGS = [name for name in ALL_CONFIGS if name not in SHARING_CONFIGS]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_loads_with_its_space_and_table(name):
    config = load_config(shipped("configs") / name)
    space = named_space(config.space)
    table = LatencyTable.load(find_file(config.latency.table))
    table.check_image_size(*config.data.image_size)
    assert table.header.held_out_mape is not None
    channels = {key: task.out_channels for key, task in make_tasks(config.tasks).items()}
    costs = table.costs(space, channels)
    assert costs.min_latency_ms <= config.latency.target_ms < costs.max_latency_ms


@pytest.mark.parametrize("name", SHARING_CONFIGS)
def test_every_shipped_config_of_task_sharing_loads(name):
    config = load_config(shipped("configs") / name, kind=TaskSharingConfig)
    assert parse_yaml(dump_yaml(config), TaskSharingConfig, source="copy") == config
    encoder = make_encoder(config.backbone)
    if config.latency is not None:
        table = LatencyTable.load(find_file(config.latency.table))
        table.check_image_size(*config.data.image_size)
        channels = {key: task.out_channels for key, task in make_tasks(config.tasks).items()}
        costs = latency_costs(encoder.space, table, channels)
        shared, separate = (
            costs.of(make(list(channels), costs.num_layers))
            for make in (Branching.shared, Branching.separate)
        )
        assert shared < config.latency.target_ms < separate


def test_every_shipped_table_has_a_shipped_config():
    used = {load_config(shipped("configs") / name).latency.table for name in CONFIGS}
    assert used == {
        f"latency_tables/{path.name}" for path in shipped("latency_tables").glob("*.csv")
    }


def test_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    expected = load_config(shipped("configs/demo.yaml"))
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("configs/demo.yaml")) == expected
    assert find_file("configs/demo.yaml").is_file()


@pytest.mark.parametrize("path", sorted(shipped("configs/spaces").glob("*.yaml")), ids=str)
def test_every_shipped_space_loads(path):
    space = SearchSpace.load(path)
    assert space == named_space(path.stem)
    assert space.name == path.stem
    assert SearchSpace.from_yaml(space.to_yaml()) == space


@pytest.mark.parametrize("path", sorted(shipped("configs/datasets").glob("*.yaml")), ids=str)
def test_every_shipped_manifest_loads(path):
    manifest = load_yaml(path, Manifest)
    assert manifest.name == path.stem
    assert {"train", "test"} <= manifest.splits.keys()


@pytest.mark.parametrize("path", sorted(shipped("configs/architectures").glob("*.json")), ids=str)
def test_every_shipped_architecture_is_in_its_space(path):
    architecture = Architecture.load(path)
    named_space(architecture.space).check(architecture)


def load_text(tmp_path, text, overrides=()):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("seed: 3", "sed: 3", 1, "unknown key sed; did you mean seed?"),
        ("  batch_size: 4\n  loop", "  batchsize: 4\n  loop", 18, "unknown key search.batchsize"),
        ("seed: 3", "seed: 3\nseed: 4", 2, "duplicate key seed"),
        ("seed: 3", "seed: -1", 1, "seed: expected 0 or more, got -1"),
        ("seed: 3", "seed: three", 1, "seed: expected a whole number, got 'three'"),
        ("  steps: 6", "  steps: many", 17, "search.steps: expected a whole number, got 'many'"),
        ("target_ms: 5.0", "target_ms: -5.0", 16, "latency: target_ms: expected a positive time"),
        (
            "target_ms: 5.0",
            "target_ms: .nan",
            16,
            "target_ms: expected a finite number, got '.nan'",
        ),
        ("[base, random]", "[bass]", 28, "baselines: expected some of base, random, got bass"),
        ("[base, random]", "[base, base]", 28, "baselines: each at most once"),
        ("kind: depth", "kind: deph", 15, "tasks.depth: unknown task kind deph; did you mean"),
        ("num_classes: 10", "num_classes: 1", 14, "must be in 2..255, got 1"),
        ("height: 32", "height: 8", 6, "data: expected images of at least 16x16, got 8x32"),
        ("streets", "street", 5, "data.source: expected one of streets, folder, got street"),
        ("  train_frames: 32\n", "", 5, "source streets needs train_frames and test_frames"),
        ("streets", "folder", 5, "train_frames and test_frames belong to source streets"),
        ("  workers: 1", "  root: here", 5, "root belongs to source folder, not to streets"),
        ("space: space.yaml\n", "", 1, "missing key space"),
    ],
)
def test_every_error_names_file_and_line(tmp_path, old, new, line, message):
    assert old in CONFIG
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_text(tmp_path, CONFIG.replace(old, new, 1))
    assert message in str(error.value)
    place = str(error.value).split(": ")[0]
    assert place.startswith(f"{tmp_path}/config.yaml:")
    # A dataclass's own refusal is reported where its block begins.
    assert int(place.rsplit(":", 1)[1]) <= line
    if "key" in message or "expected a whole" in message:
        assert place.endswith(f":{line}")
    assert "\n" not in str(error.value)


def test_no_task_is_refused(tmp_path):
    start, end = CONFIG.index("tasks:"), CONFIG.index("latency:")
    with pytest.raises(ValueError, match="tasks: expected at least one"):
        load_text(tmp_path, CONFIG[:start] + "tasks: {}\n" + CONFIG[end:])


def test_a_target_must_be_positive():
    with pytest.raises(ValueError, match="target_ms: expected a positive time, got 0"):
        LatencyConfig(table="t.csv", target_ms=0.0)


def test_overrides_replace_values_and_name_themselves_in_errors(tmp_path):
    config = load_text(
        tmp_path,
        CONFIG,
        ["search.steps=9", "search.optimizer.learning_rate=1e-2", "baselines=[]", "data.width=64"],
    )
    assert config.search.steps == 9
    assert config.search.optimizer.learning_rate == 0.01
    assert config.baselines == ()
    assert config.data.image_size == (32, 64)
    assert config.search.batch_size == 4
    for override, message in {
        "search.stepz=9": "--set search.stepz.*unknown key search.stepz; did you mean steps",
        "search.batch_size=-3": "search: batch_size: expected .* -3, with --set search.batch_size$",
        "search.splits.alpha=7": "search: splits: expected .*, with --set search.splits.alpha$",
        "search.steps=soon": "--set search.steps.*expected a whole number, got 'soon'",
        "steps": "--set steps: expected key=value",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_text(tmp_path, CONFIG, [override])


def test_a_config_survives_the_run_folder(tmp_path):
    config = load_text(tmp_path, CONFIG)
    assert parse_yaml(dump_yaml(config), ExperimentConfig, source="copy") == config
    for name in CONFIGS:
        shipped_config = load_config(shipped("configs") / name)
        text = dump_yaml(shipped_config)
        assert parse_yaml(text, ExperimentConfig, source="copy") == shipped_config


def test_files_beside_the_config_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "space.yaml").touch()
    config = load_text(tmp_path, CONFIG)
    assert config.space == str(tmp_path / "space.yaml")
    assert config.latency.table == "table.csv"  # not there: as written
    (tmp_path / "table.csv").touch()
    assert load_text(tmp_path, CONFIG).latency.table == str(tmp_path / "table.csv")
    # Beside the config comes first; what lies in the working directory is found too, and what
    # the package ships keeps its name.
    here = tmp_path / "here"
    here.mkdir()
    (here / "other.csv").touch()
    (here / "table.csv").touch()
    monkeypatch.chdir(here)
    assert load_text(tmp_path, CONFIG).latency.table == str(tmp_path / "table.csv")
    for table, expected in {
        "other.csv": str(here / "other.csv"),
        "latency_tables/edgetpu_sim_64x128.csv": "latency_tables/edgetpu_sim_64x128.csv",
    }.items():
        assert load_text(tmp_path, CONFIG, [f"latency.table={table}"]).latency.table == expected


def test_the_first_difference_of_two_configs_is_named(tmp_path):
    config = load_text(tmp_path, CONFIG)
    assert first_difference(config, config) is None
    other = load_text(tmp_path, CONFIG, ["search.optimizer.weight_decay=0.5", "retrain.steps=9"])
    expected = "search.optimizer.weight_decay: 1e-05 against 0.5"
    assert first_difference(config, other) == expected
    fewer = dataclasses.replace(config, tasks={"depth": config.tasks["depth"]})
    assert first_difference(config, fewer).startswith("tasks: ")


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file nowhere.yaml"):
        load_config(Path("nowhere.yaml"))
