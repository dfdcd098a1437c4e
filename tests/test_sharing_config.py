"""What task sharing refuses: each in one line, with exit status 2, before anything is written."""

import math
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from test_cli import call, refused
from test_sharing_run import SHARING_CONFIG, write_sharing_project
from torch import Tensor, nn

from oneshot_ednas.config import TaskSharingConfig, load_config
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.models.encoder import IMAGES, Encoder, EncoderLayer
from oneshot_ednas.schema import imported, shipped
from oneshot_ednas.sharing.backbone import BackboneConfig, make_encoder
from oneshot_ednas.sharing.branching import Branching
from oneshot_ednas.sharing.branching_search import BranchingConfig
from oneshot_ednas.sharing.costs import latency_costs
from oneshot_ednas.sharing.operators import EDNAS_OPERATORS, PLAIN_OPERATORS

NO_LATENCY = ("latency=null", "branching.objective=weighted")
EIGHT_TASKS = "tasks={" + ", ".join(f"t{i}: {{kind: depth}}" for i in range(8)) + "}"

# Backbones of a user's own ------------------------------------------------------------------

NUMBER = 3


class Strided(nn.Module):
    """A convolution at half the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Branching2(Strided):
    """Its way depends on a shape, which tracing cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.shape[-1] > 8 else self.conv(x).relu()


class ByValue(Strided):
    """Its way depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if bool(x.sum() > 0) else -self.conv(x)


class Unbatched(Strided):
    """Its operator sees one frame without the batch: channels come first."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[0])[None]


def encoder_of(layer: type[Strided], width: int = 4) -> Encoder:
    return Encoder(
        name="mine",
        layers=(EncoderLayer(name="a", reads=(IMAGES,), build=partial(layer, width)),),
        decoder_reads=(0,),
        build_decoder=partial(nn.Conv2d, 4, kernel_size=1),
    )


def plain(width: int = 4, scale: float = 1.0) -> Encoder:
    assert (type(width), type(scale)) == (int, float)
    return encoder_of(Strided, round(width * scale))


def untraceable() -> Encoder:
    return encoder_of(Branching2)


def by_value() -> Encoder:
    return encoder_of(ByValue)


def unbatched() -> Encoder:
    return encoder_of(Unbatched)


def no_encoder() -> nn.Module:
    return Strided(4)


def broken() -> Encoder:
    raise KeyError("weights.pth")


def own(name: str, options: str = "{}") -> tuple[str, ...]:
    return *NO_LATENCY, f"backbone={{name: '{name}', options: {options}}}"


HERE = "test_sharing_config"


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tiny) -> Path:
    """Config, space and table. Read only."""
    return write_sharing_project(tmp_path_factory.mktemp("sharing_config"), tiny.table)


def line_of(command: str, folder: Path, out: Path, overrides: tuple[str, ...]) -> str:
    sets = [part for override in overrides for part in ("--set", override)]
    return refused(command, folder / "sharing.yaml", "--out", out, *sets)


BOTH = [
    (["tasks={depth: {kind: depth}}"], "sharing is between tasks: expected at least 2, got 1"),
    ([EIGHT_TASKS], "8 tasks have 4,140 groupings (their Bell number); the limit is 7 tasks"),
    (["branching.resource_weight=-1"], "lambda): expected a finite number >= 0, got -1.0"),
    (["branching.resource_weight=.nan"], "resource_weight: expected a finite number, got '.nan'"),
    (["branching.resource_weight=.inf"], "resource_weight: expected a finite number, got '.inf'"),
    (["operators.regularization=-1"], "regularization >= 0, both finite, got 0.01 and -1.0"),
    (["latency.target_ms=0"], "target_ms: expected a positive time, got 0.0"),
    (
        [*NO_LATENCY, "backbone={name: mobilenet_v3}"],
        "unknown backbone mobilenet_v3; did you mean mobilenet_v2? (your own: package.module:NAME)",
    ),
    (
        [*NO_LATENCY, "backbone={name: mobilenet_v2, options: {wdth: 1}}"],
        "backbone mobilenet_v2 has no option wdth; expected width, output_stride",
    ),
    (
        [*NO_LATENCY, "backbone={name: mobilenet_v2, options: {width: 0}}"],
        "mobilenet_v2: width 0.0; expected a multiplier above 0",
    ),
    (
        ["backbone={name: mobilenet_v2}"],
        "latency tables are of EDNAS spaces, the backbone is mobilenet_v2; leave latency out",
    ),
    (["backbone={name: ednas}"], "backbone ednas needs a space, for example space: ednas_tiny"),
    (["backbone.options={width: 1}"], "backbone ednas has no options"),
    (
        [*NO_LATENCY, "backbone.name=mobilenet_v2"],
        "space and architecture belong to the backbone ednas, not to mobilenet_v2",
    ),
    (["backbone.space=gone.yaml"], "no file gone.yaml"),
    (["backbone.space=ednas_teeny"], "no search space ednas_teeny; shipped: ednas_b0"),
    (["backbone.architecture=gone.json"], "no file gone.json"),
    (["backbone.architecture=FOREIGN"], "architecture has 16 blocks, space small has 4"),
    (["baselines=[separate, base]"], "baselines: expected some of separate, shared, vanilla, ra"),
    (["baselines=[shared, shared]"], "baselines: each at most once, got shared, shared"),
    (["num_permutations=0"], "num_permutations: expected at least 1, got 0"),
    (["seed=-1"], "seed: expected 0 or more, got -1"),
    (["retrain.batch_size=33"], "retrain.batch_size is 33, the training split has 32 frames"),
    (["latency=null"], "objective: budget and resource: latency need latency with a table"),
    (["latency.table=gone.csv"], "no file gone.csv"),
    (["data.width=64"], "table.csv is for images of 32x32, got 32x64"),
    (["tasks.segmentation.num_classes=12"], "no row in table.csv for separable_conv k3 8->12"),
    (own("no.such.place:NAME"), "cannot import no.such.place: No module named 'no'; install it"),
    (own(f"{HERE}:GONE"), f"module {HERE} has no GONE"),
    (own(f"{HERE}:NUMBER"), f"backbone {HERE}:NUMBER: expected a function, got int"),
    (own(f"{HERE}:a b"), f"backbone {HERE}:a b: expected package.module:NAME"),
    (
        own(f"{HERE}:no_encoder"),
        "expected an oneshot_ednas.models.encoder.Encoder, got Strided",
    ),
    (
        own(f"{HERE}:plain", "{wide: 3}"),
        "options: got an unexpected keyword argument 'wide'; it takes (width: int = 4, sc",
    ),
    (own(f"{HERE}:broken"), f"backbone {HERE}:broken cannot be made: 'weights.pth'"),
    (own(f"{HERE}:by_value"), f"backbone {HERE}:by_value does not run on images of 32x32: "),
    (own(f"{HERE}:plain", "{width: 5}"), f"backbone {HERE}:plain does not run on images of 32x32"),
]
BRANCH = [
    (["branching=null"], "the config has no section branching; see configs/sharing_streets_ti"),
    (
        ["latency.target_ms=5"],
        "latency.target_ms is 5 ms, below the smallest branched network of small: 5.409 ms; raise",
    ),
    (["branching.batch_size=20"], "branching.batch_size is 20, the smaller of the weight and alp"),
    (["branching.steps=0"], "steps: expected at least 1, got 0"),
    (["branching.alpha_share=1"], "alpha_share: expected above 0 and below 1, got 1.0"),
]
SHARE = [
    (["operators=null"], "the config has no section operators; see configs/sharing_streets_tiny"),
    (["baselines=[permuted]"], "baselines: permuted is of a branching; leave it out"),
    (["backbone.architecture=search"], "operator sharing takes one architecture: backbone.archi"),
    (["operators.batch_size=20"], "operators.batch_size is 20, the smaller of the weight and al"),
    (own(f"{HERE}:untraceable"), "cannot be traced: "),
    (
        own(f"{HERE}:unbatched"),
        "operator layers.a.conv (Conv2d) turns [3, 32, 32] into [4, 16, 16], which skipping it",
    ),
]
CASES = [(command, *case) for command in ("branch", "share") for case in BOTH]
CASES += [("branch", *case) for case in BRANCH] + [("share", *case) for case in SHARE]


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    CASES,
    ids=[f"{command} {' '.join(overrides)[:60]}" for command, overrides, _ in CASES],
)
def test_bad_input_gets_one_line_and_leaves_no_folder(
    folder, tmp_path, command, overrides, message
):
    foreign = str(shipped("configs/architectures/ednas_table6.json"))
    given = tuple(override.replace("FOREIGN", foreign) for override in overrides)
    line = line_of(command, folder, tmp_path / "runs" / "run", given)
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_target_goes_and_the_next_below_is_refused_with_searched_blocks(
    folder, tmp_path, tiny
):
    search = ("backbone.architecture=search",)
    line = line_of("branch", folder, tmp_path / "run", (*search, "latency.target_ms=4"))
    smallest = tiny.table.costs(tiny.space, {"segmentation": 10, "depth": 1}).min_latency_ms
    assert f"is 4 ms, below the smallest branched network of small: {smallest:.4g} ms" in line
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_unknown_error_needs_consent(folder, tmp_path, tiny):
    project = shutil.copytree(folder, tmp_path / "project")
    table = LatencyTable.load(project / "table.csv")
    text = table.to_text().replace("# held_out_mape: 5.0\n", "")
    (project / "table.csv").write_text(text)
    unknown = LatencyTable.load(project / "table.csv")
    assert unknown.header.held_out_mape is None
    for command in ("branch", "share"):
        line = line_of(command, project, tmp_path / "run", ())
        assert "the error of table.csv on whole networks is unknown" in line
        assert "--allow-uncalibrated" in line
    assert not (tmp_path / "run").exists()
    # The consent leads on to the next thing wrong.
    arguments = ["branch", project / "sharing.yaml", "--out", tmp_path / "run"]
    line = refused(*arguments, "--allow-uncalibrated", "--set", "latency.target_ms=5")
    assert "below the smallest branched network" in line
    with pytest.raises(ValueError, match="held_out_mape"):
        unknown.check_calibrated(allowed=False)
    unknown.check_calibrated(allowed=True)
    table.check_calibrated(allowed=False)


def test_data_of_a_folder_are_asked_for(folder, tmp_path):
    line = line_of(
        "branch", folder, tmp_path / "run", ("data={source: folder, height: 32, width: 32}",)
    )
    assert "name it with --data DIR" in line
    line = refused("share", folder / "sharing.yaml", "--out", tmp_path / "run", "--data", tmp_path)
    assert "belongs to source folder, not to streets" in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    line = line_of("branch", folder, tmp_path, ())
    assert "is not empty and holds no run; choose another --out" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_unknown_keys_name_file_line_and_neighbour(folder, tmp_path):
    project = shutil.copytree(folder, tmp_path / "project")
    for old, new, message in (
        (
            "  warmup_fraction",
            "  warmup_fractoin",
            "unknown key branching.warmup_fractoin; did you",
        ),
        ("backbone: {name: ednas,", "backbone: {nam: ednas,", "unknown key backbone.nam; did you"),
        (
            "  pretrain_steps: 1",
            "  pretrain_steps: one",
            "operators.pretrain_steps: expected a who",
        ),
    ):
        assert old in SHARING_CONFIG
        text = SHARING_CONFIG.replace(old, new)
        (project / "sharing.yaml").write_text(text)
        number = text[: text.index(new)].count("\n") + 1
        line = line_of("branch", project, tmp_path / "run", ())
        assert f"sharing.yaml:{number}: {message}" in line
    assert not (tmp_path / "run").exists()


def test_help_names_papers_and_an_example():
    for command, paper in (("branch", "BMTAS"), ("share", "AutoMTL")):
        text = " ".join(call(command, "--help").stdout.split())
        assert paper in text
        assert f"Example: oneshot-ednas {command} configs/sharing_streets_tiny.yaml --out" in text
        assert "--json" in text
        assert "--resume" in text


# Modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, -1e-9, math.nan, math.inf, -math.inf])
def test_lambda_is_finite_and_not_negative(value):
    with pytest.raises(ValueError, match=r"\(lambda\): expected a finite number >= 0"):
        BranchingConfig(steps=1, batch_size=1, resource_weight=value)
    assert BranchingConfig(steps=1, batch_size=1, resource_weight=0.0).resource_weight == 0


def test_files_beside_a_config_are_named_by_absolute_paths(folder, tmp_path):
    project = shutil.copytree(folder, tmp_path / "project")
    (project / "mine.json").write_text("{}")
    overrides = ["backbone.architecture=mine.json"]
    config = load_config(project / "sharing.yaml", overrides, kind=TaskSharingConfig)
    assert config.backbone.space == str(project / "space.yaml")
    assert config.backbone.architecture == str(project / "mine.json")
    assert config.latency.table == str(project / "table.csv")
    overrides = ["backbone={name: ednas, space: ednas_tiny, architecture: search}"]
    config = load_config(project / "sharing.yaml", overrides, kind=TaskSharingConfig)
    assert (config.backbone.space, config.backbone.architecture) == ("ednas_tiny", "search")


def test_an_encoder_is_of_the_base_a_file_or_the_whole_space(folder, tmp_path, tiny, small_space):
    space = str(folder / "space.yaml")
    base = make_encoder(BackboneConfig(space=space))
    assert base.space.is_fixed
    assert base.space.base_architecture == small_space.base_architecture
    assert make_encoder(BackboneConfig(space=space, architecture="search")).space == small_space
    largest = small_space.extreme(small_space.base_architecture, largest=True)
    assert largest != small_space.base_architecture
    largest.save(tmp_path / "largest.json")
    one = make_encoder(BackboneConfig(space=space, architecture=str(tmp_path / "largest.json")))
    assert one.space.is_fixed
    assert one.space.base_architecture == largest
    channels = {"segmentation": 10, "depth": 1}
    costs = latency_costs(one.space, tiny.table, channels)
    shared = Branching.shared(list(channels), 6, largest)
    expected = tiny.table.latency_ms(small_space, largest, channels)
    assert costs.of(shared) == pytest.approx(expected, rel=1e-12)


def test_an_own_backbone_is_made_with_its_options():
    config = BackboneConfig(name=f"{HERE}:plain", options={"width": 3.0, "scale": 2.0})
    layer = make_encoder(config).layers[0].build()
    # Whole numbers of a config come as whole numbers.
    assert layer.conv.out_channels == 6
    assert config.operator_types == PLAIN_OPERATORS
    assert BackboneConfig(space="ednas_tiny").operator_types == EDNAS_OPERATORS


def test_a_module_that_fails_when_it_is_imported_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text, reason in (
        ("own_syntax", "def f(:\n", "invalid syntax"),
        ("own_division", "1 / 0\n", "division by zero"),
        ("own_import", "import not_installed_here\n", "No module named 'not_installed_here'"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(
            ValueError, match=f"^backbone {name}:f: cannot import {name}: "
        ) as error:
            imported(f"{name}:f", what="backbone")
        assert reason in str(error.value)
        assert "\n" not in str(error.value)
        assert name not in sys.modules
    (tmp_path / "own_good.py").write_text("value = 3\n\ndef f():\n    return 1\n")
    assert imported("own_good:f", what="backbone")() == 1
    with pytest.raises(ValueError, match="backbone own_good:value: expected a function, got int"):
        imported("own_good:value", what="backbone")
    assert imported("own_good:value", int, what="number") == 3
    with pytest.raises(ValueError, match=r"number own_good:f: expected an .*int, got function"):
        imported("own_good:f", int, what="number")
    for name in ("own_good", "own_good:", ":f", "own good:f", "own_good:f.g", "..own_good:f"):
        with pytest.raises(ValueError, match=r"expected package\.module:NAME"):
            imported(name, what="backbone")
