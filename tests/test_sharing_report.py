"""The report of task sharing: its pictures, its sections, and what it does with odd files."""

import io
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from test_report import Page

from oneshot_ednas.report.branching_tree import short_names
from oneshot_ednas.report.plots import RunLog, RunPictures
from oneshot_ednas.report.sharing_page import write_sharing_report
from oneshot_ednas.report.sharing_plots import (
    branching_tree,
    correlation_heatmap,
    grouping_heatmap,
    policy_heatmaps,
    route_heatmaps,
    search_curves,
    sharing_pattern,
    tradeoff_plot,
    training_curves,
)
from oneshot_ednas.space import ednas_tiny
from oneshot_ednas.tasks import TaskConfig, make_tasks

TASKS = {
    "segmentation": TaskConfig(kind="segmentation", num_classes=3),
    "depth": TaskConfig(kind="depth"),
    "normals": TaskConfig(kind="normals"),
    "edges": TaskConfig(kind="edges"),
    "saliency": TaskConfig(kind="saliency"),
}
CHOICES = ("shared", "own", "skip")
ALWAYS = ["comparison", "tradeoff", "curves", "predictions", "run"]


def tree(num_tasks: int, num_layers: int) -> list[list[int]]:
    """All tasks together at first, one more on its own after each equal part of the layers."""
    parts = [layer * num_tasks // num_layers for layer in range(num_layers)]
    return [[min(task, part) for task in range(num_tasks)] for part in parts]


def all_groupings(num_tasks: int) -> list[str]:
    found = set()
    for labels in itertools.product(range(num_tasks), repeat=num_tasks):
        first: dict[int, int] = {}
        found.add(",".join(str(first.setdefault(label, len(first))) for label in labels))
    return sorted(found)


class SharingFolder:
    """A run of a search for sharing with made-up figures; change the parts, then write it."""

    def __init__(self, folder: Path, num_tasks: int = 3, num_operators: int = 12) -> None:
        self.folder, self.rng = folder, np.random.default_rng(num_tasks)
        configs = dict(list(TASKS.items())[:num_tasks])
        self.tasks, self.class_names = make_tasks(configs), ["<b>&", "road"]
        names, space, rng = list(self.tasks), ednas_tiny(), self.rng
        layers = ["stem", *(f"block_{i + 1}" for i in range(len(space.blocks))), "bifpn"]
        groupings = tree(num_tasks, len(layers))
        keys = all_groupings(num_tasks)
        shares = [rng.dirichlet([0.3] * len(keys)).tolist() for _ in layers]
        self.branching: dict[str, Any] | None = {
            "tasks": names,
            "layers": layers,
            "groupings": groupings,
            "architectures": {name: space.sample(rng).to_json() for name in names},
            "probabilities": rng.dirichlet([1] * num_tasks, (num_tasks, len(layers))).tolist(),
            "grouping_probabilities": [dict(zip(keys, row, strict=True)) for row in shares],
        }
        policy = rng.dirichlet([0.5] * 3, (num_tasks, num_operators))
        self.policy: dict[str, Any] | None = {
            "tasks": names,
            "operators": [
                {"name": f"block_{i // 3}.part_{i % 3}", "kind": "Conv2d", "parameters": 9}
                | {"depth": i}
                for i in range(num_operators)
            ],
            "policy": [[CHOICES[i] for i in row] for row in policy.argmax(-1)],
            "probabilities": policy.tolist(),
            "num_layers": num_operators,
        }
        last = list(range(num_tasks))
        together, apart = [[0] * num_tasks] * len(layers), [last] * len(layers)
        self.results: dict[str, Any] = {
            "method": "branching",
            "backbone": "ednas_tiny",
            "found": "branched",
            "networks": {
                "separate": self.network("one network per task", 12.0, None, apart),
                "shared": self.network("one encoder for all tasks", 4.0, -3.25, together),
                "branched": self.network("found by the search", 6.5, 1.5, groupings),
                "cross <i>": self.network("another way", 7.0, 0.5, None),
            },
            "baseline": "separate",
            "target_ms": None,
            "search": {"seconds": 9.0, "expected": 6.4, "unit": "gmacs", "alarms": ["<u> alpha"]}
            | {"lambda": 0.1},
            "seed": 3,
            "versions": {"python": "3.11", "device": "cpu"},
            "num_frames": {"train": 1200, "test": 128},
            "date": "2024-05-01",
        }
        self.seconds = {"branching": 400.0, "retrain.separate.seed_0": 60.0}
        self.config = "name: <script>alert(1)</script>\nsteps: 400\n"
        self.log = list(self._lines())

    def network(
        self, what: str, gmacs: float, delta: float | None, branching: list[list[int]] | None
    ) -> dict[str, Any]:
        return {
            "what": what,
            "parameters": int(3e5 * gmacs),
            "gmacs": gmacs,
            "latency_ms": None,
            "shared_parameters": 1 - gmacs / 12,
            "metrics": {
                name: dict.fromkeys(task.reward_metrics, 0.1 * gmacs)
                for name, task in self.tasks.items()
            },
            "metrics_std": None,
            "delta": delta
            if delta is None
            else {"overall": delta, "tasks": dict.fromkeys(self.tasks, delta)},
            "branching": branching,
            "seeds": 1,
        }

    def _lines(self) -> Iterator[dict[str, Any]]:
        for step in range(0, 100, 5):
            loss = math.exp(-step / 40)
            common = {"step": step, "loss/weights": loss + 1, "temperature": 5 - step / 25}
            common |= {f"loss/{name}": loss / (i + 1) for i, name in enumerate(self.tasks)}
            yield {"stage": "branching", "loss/alpha": loss, "cost/expected": 9.0} | common
            yield (
                {"stage": "operators", "loss/policy": loss, "policy/shared": 0.5}
                | common
                | {
                    "policy/own": 0.3,
                    "policy/skip": 0.2,
                    "policy/regularization": 2 + loss,
                }
            )
            yield {"stage": "retrain.separate.seed_0", "step": step, "loss/weights": loss}

    def pictures(self) -> RunPictures:
        size = (16, 32)
        labels = self.rng.integers(0, 2, size)
        depth = self.rng.uniform(1, 80, (1, *size)).astype(np.float32)
        normals = self.rng.normal(size=(3, *size)).astype(np.float32)
        by_kind = {"depth": depth, "normals": normals}
        maps = {name: [by_kind.get(task.kind, labels)] for name, task in self.tasks.items()}
        image = self.rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        return RunPictures(images=[image], targets=maps, predictions=maps)

    def write(self) -> str:
        """The text of the report."""
        self.write_files()
        return self.report()

    def write_files(self) -> None:
        self.folder.mkdir(exist_ok=True)
        parts = {"results": self.results, "seconds": self.seconds}
        parts |= {"branching": self.branching, "policy": self.policy}
        for name, part in parts.items():
            if part is not None:
                (self.folder / f"{name}.json").write_text(json.dumps(part))
        (self.folder / "config.yaml").write_text(self.config)
        lines = "".join(json.dumps(line) + "\n" for line in self.log)
        (self.folder / "metrics.jsonl").write_text(lines)

    def report(self) -> str:
        path = write_sharing_report(
            self.folder,
            tasks=self.tasks,
            pictures=self.pictures(),
            class_names={"segmentation": self.class_names},
        )
        assert path == self.folder / "report.html"
        return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The whole report of a run with everything."""
    return Page(SharingFolder(tmp_path_factory.mktemp("sharing")).write())


@pytest.fixture
def run(tmp_path: Path) -> SharingFolder:
    return SharingFolder(tmp_path / "run")


@pytest.fixture
def plain(run: SharingFolder, monkeypatch: pytest.MonkeyPatch) -> SharingFolder:
    """A run whose pictures are drawn, and checked, but not turned into pixels."""
    for module in ("branching_tree", "sharing_curves", "sharing_plots"):
        monkeypatch.setattr(f"oneshot_ednas.report.{module}.to_png", lambda *_, **__: b"")
    return run


def size_of(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        picture.load()
        return picture.size


def drawn_axes(monkeypatch: pytest.MonkeyPatch, module: str, draw: Callable[[], Any]) -> list[Axes]:
    """The axes of a picture before they become pixels."""
    found: list[Axes] = []

    def keep(figure: Figure) -> bytes:
        found.extend(figure.axes)
        return b""

    monkeypatch.setattr(f"oneshot_ednas.report.{module}.to_png", keep)
    draw()
    return found


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(("num_tasks", "num_layers"), [(1, 1), (2, 5), (3, 10), (5, 20), (5, 40)])
def test_the_tree_is_a_picture_of_sane_size(num_tasks: int, num_layers: int) -> None:
    names, layers = list(TASKS)[:num_tasks], [f"block_{i}" for i in range(num_layers)]
    width, height = size_of(branching_tree(names, layers, tree(num_tasks, num_layers)))
    assert 1800 <= width <= 3400
    assert 100 < height < 1000


def test_the_tree_changes_with_its_groupings_and_options() -> None:
    names, layers = list(TASKS)[:3], ["a", "b", "c"]
    first = [[0, 0, 0], [0, 0, 1], [0, 1, 2]]
    pictures = {
        branching_tree(names, layers, first),
        branching_tree(names, layers, [[0, 0, 0], [0, 1, 1], [0, 1, 2]]),
        branching_tree(names, layers, first, [{0: "fused k5 e6 24"}, {}, {}]),
        branching_tree(names, layers, first, [{0: "ibn k5 e6 24"}, {}, {}]),
        branching_tree(names, layers, first, image=np.zeros((4, 8, 3), np.uint8)),
    }
    assert len(pictures) == 5


def test_lines_of_the_tree_run_through_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    names, layers = ["seg", "depth", "normals", "edges"], ["a", "b", "c", "d"]
    groupings = [[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 2], [0, 1, 2, 3]]
    (axes,) = drawn_axes(
        monkeypatch, "branching_tree", lambda: branching_tree(names, layers, groupings)
    )
    labels = {"seg + normals", "depth + edges", "4 tasks"}  # over one layer, no room for names
    assert labels <= set(texts(axes))
    paths = [np.asarray(line.get_ydata()) for line in axes.lines]
    assert len(paths) == 4
    for layer, grouping in enumerate(groupings):
        rows = [path[2 + 2 * layer] for path in paths]
        for one, other in itertools.combinations(range(4), 2):
            near = abs(rows[one] - rows[other]) < 0.2
            assert near == (grouping[one] == grouping[other])
    # No lines cross: their order is the same from the first layer to the heads.
    orders = {tuple(np.argsort([path[i] for path in paths])) for i in range(len(paths[0]))}
    assert orders == {(0, 2, 1, 3)}


def test_texts_of_a_deep_tree_stay_in_their_nodes_and_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = ["stem", *(f"block_{i}" for i in range(1, 19)), "bifpn"]
    groupings = tree(5, 20)
    options = [dict.fromkeys(set(layer), "fused k5 e6 144") for layer in groupings]
    (axes,) = drawn_axes(
        monkeypatch,
        "branching_tree",
        lambda: branching_tree(list(TASKS), layers, groupings, options),
    )
    figure = axes.figure
    figure.draw_without_rendering()
    boxes = [patch.get_window_extent() for patch in axes.patches]
    level = [text for text in axes.texts if not text.get_rotation() and text.get_text()]
    extents = [text.get_window_extent() for text in level]
    frame = figure.bbox
    for text, extent in zip(level, extents, strict=True):
        assert frame.x0 <= extent.x0 <= extent.x1 <= frame.x1
        assert frame.y0 <= extent.y0 <= extent.y1 <= frame.y1
        inside = [
            b for b in boxes if b.x0 <= extent.x0 and extent.x1 <= b.x1 and b.overlaps(extent)
        ]
        crossed = [b for b in boxes if b.overlaps(extent)]
        # A text lies wholly in its node, or, as a group's label, in none.
        assert len(crossed) == len(inside) <= 1, text.get_text()
    assert not any(a.overlaps(b) for a, b in itertools.combinations(extents, 2))


@pytest.mark.parametrize(
    ("groupings", "message"),
    [
        ([[0, 0]], r"expected a grouping .* for each of 2 layers, got 1"),
        ([[0, 0], [0]], r"layer b: expected a group for each of 2 tasks, got 1"),
        ([[0, 1], [0, 0]], r"layer b: expected each group to be part of one group .* got \[0, 0\]"),
    ],
)
def test_groupings_that_are_no_tree_are_refused(groupings: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        branching_tree(["x", "y"], ["a", "b"], groupings)


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_heat_maps_are_pictures_and_change_with_their_values(
    num_tasks: int, tmp_path: Path
) -> None:
    run = SharingFolder(tmp_path, num_tasks)
    assert run.branching is not None
    assert run.policy is not None
    names, layers = list(run.tasks), run.branching["layers"]
    groupings, chances = run.branching["groupings"], run.branching["grouping_probabilities"]
    routes = np.array(run.branching["probabilities"])
    operators = [row["name"] for row in run.policy["operators"]]
    probabilities = np.array(run.policy["probabilities"])
    choices = run.policy["policy"]
    pairs = [
        (grouping_heatmap(layers, chances, names), grouping_heatmap(layers, chances[::-1], names)),
        (
            grouping_heatmap(layers, chances, names, groupings),
            grouping_heatmap(layers, chances, names, groupings[:1] * len(layers)),
        ),
        (
            route_heatmaps(names, layers, routes.tolist()),
            route_heatmaps(names, layers, routes[:, ::-1].tolist()),
        ),
        (
            policy_heatmaps(names, operators, probabilities),
            policy_heatmaps(names, operators, probabilities[..., ::-1]),
        ),
        (
            sharing_pattern(names, operators, choices),
            sharing_pattern(names, operators, [row[::-1] for row in choices]),
        ),
        (
            correlation_heatmap(names, np.eye(num_tasks)),
            correlation_heatmap(names, np.eye(num_tasks) * 0.5 + 0.5),
        ),
    ]
    for one, other in pairs:
        assert one != other
        width, height = size_of(one)
        assert 400 < width < 2000
        assert 150 < height < 2000


def test_groupings_beyond_the_most_probable_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = all_groupings(4)
    assert len(keys) == 15
    chances = [dict(zip(keys, np.arange(1, 16) / 120, strict=True))]
    names = ["segmentation", "depth", "normals", "semantics"]
    axes = drawn_axes(
        monkeypatch,
        "sharing_plots",
        lambda: grouping_heatmap(["a"], chances, names, [[0, 0, 0, 0]]),
    )[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels[0] == "seg dep nor sem"  # chosen, though the least probable
    assert labels[1] == "seg | dep | nor | sem"
    assert labels[-1] == "3 others, summed"
    values = np.asarray(axes.images[0].get_array())[:, 0]
    np.testing.assert_allclose(values.sum(), 1)
    np.testing.assert_allclose(values[-1], (2 + 3 + 4) / 120)


def test_many_operators_are_drawn_and_named_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = [f"layers.block_{i}.depthwise" for i in range(150)]
    probabilities = np.random.default_rng(0).dirichlet([1] * 3, (2, 150))
    axes = drawn_axes(
        monkeypatch,
        "sharing_plots",
        lambda: policy_heatmaps(["x", "y"], operators, probabilities),
    )
    np.testing.assert_array_equal(axes[1].images[0].get_array(), probabilities[1].T)
    labels = [text.get_text() for text in axes[1].get_xticklabels()]
    assert labels == operators[::3]


def test_the_pattern_of_many_operators_is_a_picture() -> None:
    operators = [f"layers.block_{i}.depthwise" for i in range(150)]
    policy = [["shared"] * 150, ["own", "skip"] * 75]
    width, height = size_of(sharing_pattern(["x", "y"], operators, policy))
    assert width > 1800
    assert 250 < height < 700


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: grouping_heatmap(["a"], [], ["x"]), "expected values of 1 layers, got 0"),
        (lambda: grouping_heatmap(["a"], [{"0,1": 1.0}], ["x"]), "each of 1 tasks, got '0,1'"),
        (
            lambda: route_heatmaps(["x"], ["a", "b"], [[[1.0]]]),
            "values of 2 layers, got 1",
        ),
        (lambda: sharing_pattern(["x"], ["a"], [["both"]]), "task x: expected shared, own, skip"),
        (lambda: sharing_pattern(["x"], ["a"], [[]]), "expected values of 1 operators, got 0"),
        (lambda: correlation_heatmap(["x"], np.eye(2)), r"expected 1 x 1 values, got shape \(2, 2"),
    ],
)
def test_values_of_other_tasks_or_layers_are_refused(
    draw: Callable[[], bytes], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def network(gmacs: float, latency_ms: float | None, overall: float | None) -> dict[str, Any]:
    delta = None if overall is None else {"overall": overall, "tasks": {}}
    return {"gmacs": gmacs, "latency_ms": latency_ms, "delta": delta}


def test_the_trade_off_names_each_network_once_without_overlap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    networks = {"separate": network(12.0, 9.0, None), "unknown": network(1.0, 2.0, None)}
    for i in range(6):  # close together
        networks[f"random_{i}"] = network(6 + 0.02 * i, 5 + 0.02 * i, 0.1 * (i % 2))
    (axes,) = drawn_axes(
        monkeypatch, "sharing_curves", lambda: tradeoff_plot(networks, found="random_2")
    )
    assert sorted(texts(axes)) == sorted(set(networks) - {"unknown"})
    assert axes.get_xlabel() == "latency, ms"
    axes.figure.draw_without_rendering()
    extents = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(extents, 2))


def test_the_trade_off_of_a_baseline_alone_is_a_picture() -> None:
    assert size_of(tradeoff_plot({"separate": network(3.0, None, None)}))[0] > 1000


def test_the_trade_off_is_against_multiply_adds_if_a_latency_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    networks = {"separate": network(12.0, 9.0, 0.0), "one": network(5.0, None, 2.0)}
    (axes,) = drawn_axes(monkeypatch, "sharing_curves", lambda: tradeoff_plot(networks))
    assert axes.get_xlabel() == "GMACs per frame"
    points = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) == 1]
    assert points == [[[12.0, 0.0]], [[5.0, 2.0]]]


def test_curves_draw_what_was_logged(run: SharingFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(run.log)
    for stage, last in (("branching", "Cost: expected"), ("operators", "Policy: regularization")):
        axes = drawn_axes(
            monkeypatch,
            "sharing_curves",
            lambda stage=stage: search_curves(log, list(run.tasks), stage),
        )
        panels = {a.get_title(loc="left"): a for a in axes if a.get_visible()}
        assert {"Loss", "Loss per task", "Temperature", last} <= set(panels)
        labels = panels["Loss per task"].get_legend_handles_labels()[1]
        assert labels == list(run.tasks)
    shares = panels["Mean probability of each choice"]
    assert shares.get_legend_handles_labels()[1] == ["shared", "own", "skip"]
    (axes_of_training,) = drawn_axes(monkeypatch, "sharing_curves", lambda: training_curves(log))
    labels = axes_of_training.get_legend_handles_labels()[1]
    assert labels == ["separate, seed 0"]
    assert training_curves(RunLog([])) is None


SECTIONS = ["headline", "comparison", "tradeoff", "branching", "routes", "policy", "curves"]
SECTIONS += ["predictions", "run"]


def test_the_page_has_every_section_in_order_and_is_balanced(page: Page) -> None:
    assert list(page.sections) == SECTIONS
    assert all(page.sections.values())


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_the_page_is_for_any_number_of_tasks(plain: SharingFolder, num_tasks: int) -> None:
    run = SharingFolder(plain.folder, num_tasks)
    assert list(Page(run.write()).sections) == SECTIONS
    with Image.open(run.folder / "predictions.png") as mosaic:
        assert mosaic.width == (2 + num_tasks) * (8 * 32 + 6) + 26


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "u", "i"} & set(page.tags)
    sources = [value for key, value in page.attributes if key in ("src", "href")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    assert "://" not in page.text
    # Trade-off, three trees, two of routes, three of policies, three of curves, predictions.
    assert sum(value.startswith("data:") for value in sources) == 13


def test_text_from_files_and_names_is_escaped(plain: SharingFolder) -> None:
    old, new = "depth", "<script>alert(2)</script>"
    text = json.dumps([plain.results, plain.branching, plain.policy]).replace(
        f'"{old}"', f'"{new}"'
    )
    plain.results, plain.branching, plain.policy = json.loads(text)
    kinds = {name: TASKS[name] for name in ("segmentation", old, "normals")}
    plain.tasks = make_tasks({name.replace(old, new): config for name, config in kinds.items()})
    plain.class_names = ["<script>", "road"]
    page = Page(plain.write())
    assert "script" not in page.tags
    assert f"{new}: relative error ↓" in page.words("comparison")
    assert "<script>" in page.sections["predictions"]
    assert "<script>alert(1)</script>" in page.words("run")
    assert "<u> alpha" in page.sections["curves"]
    assert "cross <i>" in page.sections["comparison"]


def test_the_comparison_marks_the_found_network_and_the_best(page: Page) -> None:
    words = page.words("comparison")
    assert words.startswith("Comparison branched found separate shared cross <i>")
    assert "Overall gain, % ↑ +1.50 n/a -3.25 +0.50" in words
    assert "GMACs per frame ↓ 6.500 12.00 4.000 7.000" in words
    assert "segmentation: miou ↑ 0.6500 1.200 0.4000 0.7000" in words
    assert "Encoder parameters shared 45.8% 0.0% 66.7% 41.7%" in words
    assert {"+1.50", "4.000", "1.200"} <= set(page.bold)
    assert not {"+0.50", "66.7%", "12.00"} & set(page.bold)
    assert "Latency" not in words


def test_the_headline_says_what_was_gained(page: Page, plain: SharingFolder) -> None:
    words = page.words("headline")
    assert "branched: 54% of the multiply-adds of separate at +1.50% overall gain" in words
    assert "1,200 training and 128 test frames · seed 3 · cpu · 7.7 min" in words
    assert "1 warning about the search" in words
    for row in plain.results["networks"].values():
        row |= {"latency_ms": 1.5 * row["gmacs"], "seeds": 2, "metrics_std": row["metrics"]}
    plain.results["target_ms"] = 9.0
    text = plain.write()
    assert 'h1 class="over"' in text
    other = Page(text)
    assert "Latency, ms ↓ 9.750" in other.words("comparison")
    assert "0.6500 ± 0.65" in other.words("comparison")
    assert "2 seeds (mean ± standard deviation)" in other.words("comparison")
    assert "9.750 ms latency, target 9" in other.words("headline")


def test_each_branched_network_has_a_tree_and_the_found_one_its_blocks(
    plain: SharingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def keep(*parts: Any) -> bytes:
        calls.append(parts)
        return b""

    monkeypatch.setattr("oneshot_ednas.report.sharing_page.branching_tree", keep)
    words = Page(plain.write()).words("branching")
    assert words.startswith("Branching branched (found) found by the search separate")
    assert "cross" not in words
    assert plain.branching is not None
    (_, layers, groupings, options, _), *others = calls
    assert layers == plain.branching["layers"]
    assert groupings == plain.branching["groupings"]
    assert [other[3] for other in others] == [None, None]
    assert options[0] == {}
    block = plain.branching["architectures"]["segmentation"]["blocks"][0]
    op = "fused" if block["op"] == "fused_ibn" else "ibn"
    shown = f"{op} k{block['kernel_size']} e{block['expand_ratio']} {block['filters']}"
    assert options[1] == {0: shown}
    assert set(options[-2]) == set(groupings[-2])


@pytest.mark.parametrize(
    ("method", "absent", "missing"),
    [("branching", "policy", "policy"), ("operators", "branching", "routes")],
)
def test_what_was_not_searched_has_no_section(
    plain: SharingFolder, method: str, absent: str, missing: str
) -> None:
    setattr(plain, absent, None)
    plain.results["method"] = method
    plain.log = []
    sections = list(Page(plain.write()).sections)
    assert missing not in sections
    assert set(ALWAYS) <= set(sections)


def damage(run: SharingFolder, name: str, change: Callable[[Any], Any]) -> None:
    path = run.folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("name", ["results.json", "seconds.json", "branching.json", "config.yaml"])
def test_a_missing_file_is_named(plain: SharingFolder, name: str) -> None:
    plain.write_files()
    (plain.folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no file .*{name}"):
        plain.report()


def without(key: str) -> Callable[[Any], Any]:
    return lambda data: {name: value for name, value in data.items() if name != key}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("results.json", without("found"), r"results\.json: expected the keys .* found is missing"),
        ("results.json", lambda _: [], r"results\.json: expected an object, got list"),
        (
            "results.json",
            lambda data: data | {"found": "best"},
            r"results\.json: found: expected one of separate, .* got 'best'",
        ),
        ("results.json", lambda data: data | {"method": "x"}, r"method: expected branching or ope"),
        (
            "results.json",
            lambda data: data | {"networks": {**data["networks"], "shared": {}}},
            r"results\.json: network shared: expected the keys what, .* are missing",
        ),
        (
            "branching.json",
            lambda data: data | {"tasks": ["depth"]},
            r"branching\.json: expected the tasks segmentation, depth, normals, got depth",
        ),
        ("branching.json", lambda data: data | {"layers": ["a"]}, r"branching\.json: .* 1 layers"),
        (
            "policy.json",
            lambda data: data | {"probabilities": [[[1, 2]]]},
            r"policy\.json: probabilities: expected 3 tasks x 12 operators x 3 choices, got shape",
        ),
        ("policy.json", lambda data: data | {"operators": [{}]}, r"policy\.json: 'name'"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    plain: SharingFolder, name: str, change: Callable[[Any], Any], message: str
) -> None:
    plain.write_files()
    damage(plain, name, change)
    with pytest.raises(ValueError, match=message) as caught:
        plain.report()
    assert "\n" not in str(caught.value)


def test_files_that_are_no_json_are_named(plain: SharingFolder) -> None:
    plain.write_files()
    (plain.folder / "policy.json").write_text("{")
    with pytest.raises(ValueError, match=r"policy\.json: not valid JSON"):
        plain.report()


def test_short_names_tell_tasks_apart() -> None:
    assert short_names(["segmentation", "depth"]) == ["seg", "dep"]
    assert short_names(["segment_a", "segments"]) == ["segment_", "segments"]
    assert short_names(["x", "xy"]) == ["x", "xy"]
