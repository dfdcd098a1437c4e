"""The report: every section, all text escaped, nothing from outside, and the pictures."""

import copy
import io
import json
import math
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from oneshot_ednas.config import ExperimentConfig, LatencyConfig
from oneshot_ednas.data.source import DataConfig
from oneshot_ednas.deploy import compare
from oneshot_ednas.report import RunPictures, write_report
from oneshot_ednas.report.markup import duration, join, number, tag
from oneshot_ednas.report.plots import (
    RunLog,
    outcome_plots,
    prediction_mosaic,
    running_mean,
    search_plots,
)
from oneshot_ednas.retrain import RetrainConfig
from oneshot_ednas.schema import dump_yaml
from oneshot_ednas.search import SearchConfig
from oneshot_ednas.space import ednas_tiny
from oneshot_ednas.tasks import Task, TaskConfig, make_tasks

SECTIONS = ["headline", "comparison", "architecture", "curves", "predictions", "gap", "export"]
SECTIONS += ["run"]
CLASS_NAMES = ["<b>&", "road", "sky"]
TARGET_MS = 1.45
STEPS = 200
TASK_CONFIGS = {
    "segmentation": TaskConfig(kind="segmentation", num_classes=3),
    "depth": TaskConfig(kind="depth"),
    "normals": TaskConfig(kind="normals"),
}
TASKS = make_tasks(TASK_CONFIGS)
METRICS = {
    "segmentation": {"miou": 0.412, "pixel_accuracy": 0.83},
    "depth": {"absolute_error": 3.21, "relative_error": 0.21, "rmse": 6.0},
    "normals": {"mean_angle_deg": 21.5, "within_11": 0.41, "within_22": 0.6, "within_30": 0.7},
}
VOID = {"meta", "img", "link", "br", "hr", "input"}


def scaled(metrics: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {t: {k: v * factor for k, v in values.items()} for t, values in metrics.items()}


def figures(latency_ms: float, reward: float, factor: float) -> dict[str, Any]:
    return {
        "architecture": "i3e1c8",
        "latency_ms": latency_ms,
        "is_inside_target": latency_ms <= TARGET_MS,
        "parameters": int(210_000 * factor),
        "gmacs": 0.113 * factor,
        "reward": reward,
        "reward_per_seed": [reward],
        "metrics": scaled(METRICS, factor),
        "metrics_std": None,
    }


class RunFolder:
    """A run as the pipeline writes it; change the parts, then write it."""

    def __init__(self, folder: Path, tasks: Mapping[str, Task] = TASKS) -> None:
        rng = np.random.default_rng(0)
        self.folder, self.tasks, self.space = folder, dict(tasks), ednas_tiny()
        self.config = ExperimentConfig(
            space="ednas_tiny",
            data=DataConfig(height=64, width=128, train_frames=1200, test_frames=128),
            tasks=TASK_CONFIGS,
            latency=LatencyConfig(table="edgetpu_sim_64x128.csv", target_ms=TARGET_MS),
            search=SearchConfig(steps=STEPS, batch_size=16, warmup_fraction=0.3),
            retrain=RetrainConfig(steps=400, batch_size=16),
        )
        probabilities: dict[str, dict[str, float]] = {}
        for choice in self.space.choices:
            shares = rng.dirichlet([1] * len(choice.options)).tolist()
            probabilities[choice.name] = dict(zip(map(str, choice.options), shares, strict=True))
        supernet = {
            "reward": 0.21,
            "metrics": scaled(METRICS, 0.9),
            "expected_latency_ms": 1.412,
            "argmax_latency_ms": 1.53,
            "alarms": ["3 of 88 options were never trained; <search> longer"],
        }
        self.candidates: dict[str, Any] = {
            "probabilities": probabilities,
            "candidates": [
                {
                    "architecture": self.space.sample(rng).to_json(),
                    "latency_ms": TARGET_MS - 0.01 - 0.04 * rng.random(),
                    "log_probability": -9 - i,
                    "reward": 0.21 - 0.01 * i,
                    "metrics": scaled(METRICS, 0.9),
                }
                for i in range(6)
            ],
            "pareto_front": [
                {"latency_ms": 1.0 + 0.02 * i, "log_probability": -60 / (1 + i)} for i in range(30)
            ],
        }
        self.results: dict[str, Any] = {
            "space": "ednas_tiny",
            "table": "edgetpu_sim_64x128.csv",
            "target_ms": TARGET_MS,
            **figures(1.4372, 0.2345, 1.0),
            "supernet": supernet,
            "baselines": {"base": figures(1.61, 0.22, 1.02), "random": figures(1.40, 0.19, 0.93)},
            "seed": 0,
            "num_frames": {"train": 1200, "test": 128},
            "date": "2024-05-01",
            "versions": {"python": "3.11.2", "torch": "2.4", "device": "cpu (x86_64), 2 threads"},
        }
        self.seconds = {"search": 412.5, "derive": 12.25, "retrain.seed_0": 199.0, "export": 3.5}
        self.export: dict[str, Any] | None = {
            "file": "model.tflite",
            "size_bytes": 3 * 2**19,
            "io": "int8",
            "num_calibration_images": 128,
            "operators": {"CONV_2D": {"count": 42, "version": 3}},
            "unmapped": [],
            "metrics": {
                "validation": compare(METRICS, scaled(METRICS, 0.9), tasks),
                "test": compare(METRICS, scaled(METRICS, 1.01), tasks),
            },
            "latency": {
                "predicted_ms": 1.4372,
                "predicted_for": "Coral Edge TPU, usb3-desktop (simulated)",
                "measured_ms": 0.9,
                "spread_ms": 0.01,
                "measured_on": "CPU, <board>",
                "error_percent": None,
            },
            "compiler": None,
            "not_compiled": "edgetpu_compiler is not on PATH",
            "not_verified": None,
        }
        self.log = [self._search_line(step, rng) for step in range(0, STEPS, 5)]
        for stage in ("retrain.seed_0", "baseline.base", "baseline.random"):
            for step in range(0, 400, 10):
                loss = 4 * math.exp(-step / 150) + 1 + 0.2 * rng.random()
                self.log.append({"stage": stage, "step": step, "loss/weights": loss})

    def _search_line(self, step: int, rng: np.random.Generator) -> dict[str, Any]:
        decay = math.exp(-step / 80)
        line = {
            "stage": "search",
            "step": step,
            "loss/weights": 6 * decay + 1 + 0.3 * rng.random(),
            "loss/segmentation": 2 * decay + 0.3 + 0.1 * rng.random(),
            "loss/depth": 20 * decay + 5 + rng.random(),
            "loss/normals": decay + 0.1,
            "latency/expected_ms": 1.42 + 0.1 * math.sin(step / 40),
            "latency/mu": 1.0 + step / 300,
            "alpha/entropy": 27 - step / 20,
            "temperature": 0.0,
        }
        if step >= 60:
            line |= {"loss/alpha": 6.2 * decay + 1.1, "temperature": 5 - step / 45}
        return line

    def pictures(self, num_frames: int = 2, size: tuple[int, int] = (16, 32)) -> RunPictures:
        rng = np.random.default_rng(1)
        normals = rng.normal(size=(3, *size))
        depth = rng.uniform(1, 80, (1, *size)).astype(np.float32)
        depth[:, :3] = 0
        maps = {
            "segmentation": np.where(np.arange(size[0]) < 2, 255, 1)[:, None].repeat(size[1], 1),
            "depth": depth,
            "normals": (normals / np.linalg.norm(normals, axis=0)).astype(np.float32),
        }
        shown = {name: [maps[task.kind]] * num_frames for name, task in self.tasks.items()}
        guesses = {name: [frame.clip(None, 1) for frame in maps] for name, maps in shown.items()}
        images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(num_frames)]
        return RunPictures(images=images, targets=shown, predictions=guesses)

    def write(
        self,
        pictures: RunPictures | None = None,
        class_names: Mapping[str, Sequence[str]] | None = None,
    ) -> str:
        """The text of the report."""
        (self.folder / "results.json").write_text(json.dumps(self.results))
        (self.folder / "candidates.json").write_text(json.dumps(self.candidates))
        (self.folder / "seconds.json").write_text(json.dumps(self.seconds))
        if self.export is not None:
            (self.folder / "export.json").write_text(json.dumps(self.export))
        (self.folder / "config.yaml").write_text(dump_yaml(self.config))
        lines = "".join(json.dumps(line) + "\n" for line in self.log)
        (self.folder / "metrics.jsonl").write_text(lines)
        path = write_report(
            self.folder,
            tasks=self.tasks,
            space=self.space,
            pictures=pictures or self.pictures(),
            class_names={"segmentation": CLASS_NAMES} if class_names is None else class_names,
        )
        assert path == self.folder / "report.html"
        return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that every element is closed, and collects what the page shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sections: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str]] = []
        self.bold: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag in ("section", "header"):
            self.sections[dict(attrs)["id"] or ""] = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.sections:
            self.sections[list(self.sections)[-1]].append(data.strip())
            if self.open[-1] == "b":
                self.bold.append(data)

    def words(self, section: str) -> str:
        return " ".join(self.sections[section])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The whole report of the run as it is."""
    return Page(RunFolder(tmp_path_factory.mktemp("run")).write())


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def plain(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run whose curves, which take a second, are left out of its report."""
    for name in ("search_plots", "outcome_plots"):
        monkeypatch.setattr(f"oneshot_ednas.report.page.{name}", lambda *_, **__: b"")
    return run


def test_the_report_has_every_section_in_order_and_is_balanced(page: Page) -> None:
    assert list(page.sections) == SECTIONS
    assert all(page.sections.values())


def test_the_report_needs_nothing_else(page: Page) -> None:
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    sources = [value for key, value in page.attributes if key in ("src", "href")]
    assert len(sources) == 4
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    assert "url(" not in page.text
    assert "://" not in page.text


def test_text_from_files_is_escaped(plain: RunFolder) -> None:
    plain.results["versions"]["python"] = "<script>alert(1)</script>"
    plain.results["table"] = "a&b.csv"
    text = plain.write()
    assert "&lt;b&gt;&amp;" in text
    assert "<b>&" not in text
    page = Page(text)
    assert "script" not in page.tags
    assert "<b>&" in page.sections["predictions"]
    assert "<script>alert(1)</script>" in page.sections["run"]
    assert "3 of 88 options were never trained; <search> longer" in page.sections["gap"]


def test_the_headline_says_whether_the_budget_is_met(plain: RunFolder) -> None:
    words = Page(plain.write()).words("headline")
    assert "Inside the budget: 1.437 of 1.45 ms" in words
    assert "64x128, 1,200 training and 128 test frames · seed 0" in words
    plain.results |= {"latency_ms": 1.5, "is_inside_target": False}
    assert "Over the budget: 1.500 of 1.45 ms" in Page(plain.write()).words("headline")


def test_the_best_value_of_each_row_is_bold(page: Page) -> None:
    words = page.words("comparison")
    assert "depth: absolute error ↓ 3.210 3.274 2.985" in words
    assert "segmentation: miou ↑ 0.4120 0.4202 0.3832" in words
    assert "rmse" not in words  # not a reward metric
    assert {"2.985", "0.4202", "0.2345"} <= set(page.bold)
    assert not {"3.210", "0.4120", "0.3832", "0.2200"} & set(page.bold)


def test_a_run_without_baselines_alarms_or_log_has_a_report(run: RunFolder) -> None:
    run.results["baselines"], run.results["supernet"]["alarms"] = {}, []
    run.candidates["candidates"] = run.candidates["candidates"][:1]
    run.candidates["pareto_front"] = run.candidates["pareto_front"][:1]
    run.log = []
    page = Page(run.write(run.pictures(1), class_names={}))
    assert list(page.sections) == SECTIONS
    assert "the run has no baselines" in page.words("comparison")
    assert "warning" not in page.words("headline")
    assert "Look at the search again" not in page.words("gap")
    assert "class 2" in page.sections["predictions"]


def test_single_lines_and_values_that_are_not_finite_are_drawn(run: RunFolder) -> None:
    run.log = [run.log[0], {"stage": "search", "step": 5, "loss/weights": float("nan")}]
    assert list(Page(run.write()).sections) == SECTIONS


def test_several_seeds_show_their_standard_deviation(plain: RunFolder) -> None:
    plain.results |= {"reward_per_seed": [0.23, 0.24], "metrics_std": scaled(METRICS, 0.01)}
    words = Page(plain.write()).words("comparison")
    assert "0.4120 ± 0.0041" in words
    assert "2 seeds (mean ± standard deviation)" in words


def test_the_architecture_shows_the_base_value_where_it_differs(plain: RunFolder) -> None:
    base = plain.space.base_architecture.to_json()
    plain.candidates["candidates"][0]["architecture"] = copy.deepcopy(base)
    assert "base" not in " ".join(Page(plain.write()).sections["architecture"][:-1])
    base["blocks"][1] |= {"kernel_size": 5, "filters": 24}  # type: ignore[index]
    plain.candidates["candidates"][0]["architecture"] = base
    shown = Page(plain.write()).sections["architecture"][:-1]
    assert [word for word in shown if word.startswith("base")] == ["base 3", "base 16"]


def test_every_option_carries_its_probability(plain: RunFolder) -> None:
    titles = [value for key, value in Page(plain.write()).attributes if key == "title"]
    assert len(titles) == sum(len(choice.options) for choice in plain.space.choices)
    expected = plain.candidates["probabilities"]["block_1.op"]["ibn"]
    assert titles[0] == f"ibn: {expected:.1%}"


def test_the_gap_table_compares_latencies_with_the_target(page: Page) -> None:
    words = page.words("gap")
    assert "Expected under alpha (soft) 1.412 -2.6%" in words
    assert "Reward 0.2100 0.2345" in words


def test_the_export_stands_beside_the_float_network(page: Page) -> None:
    words = page.words("export")
    assert "validation: float int8 difference test: float int8 difference" in words
    assert "segmentation: miou 0.4120 0.3708 -4.12 points 0.4120 0.4161 +0.41 points" in words
    assert "depth: relative error 0.2100 0.1890 -10.00% 0.2100 0.2121 +1.00%" in words
    assert "rmse" not in words
    assert "part of what the network was retrained on" in words
    assert "model.tflite: 1.50 MiB, integers only, int8 in and out, calibrated on 128" in words
    assert "1.437 ms predicted for Coral Edge TPU, usb3-desktop (simulated); 0.900 ms" in words
    assert "measured here on CPU, <board>. Not one device and runtime" in words
    assert "Edge TPU compiler: not compiled: edgetpu_compiler is not on PATH" in words
    assert "CONV_2D 42 3" in words
    assert "Look at the file again" not in words
    assert "export 3.5 s total 10.5 min" in page.words("run")


def test_what_is_doubtful_about_the_export_stands_first(plain: RunFolder) -> None:
    assert plain.export is not None
    plain.export |= {
        "metrics": None,
        "not_verified": "no interpreter: pip install <it>",
        "unmapped": ["resize may not be mapped"],
        "compiler": {
            "version": "16.0",
            "on_chip_bytes": 2**20,
            "off_chip_bytes": 2**18,
            "mapped": 40,
            "unmapped": 2,
            "operations": [
                {"name": "CONV_2D", "count": 40, "status": "Mapped to Edge TPU"},
                {"name": "ADD", "count": 2, "status": "Not today"},
            ],
        },
        "latency": {"predicted_ms": 1.4, "predicted_for": "Coral"},
    }
    words = Page(plain.write()).words("export")
    assert words.startswith("Export Look at the file again On the Edge TPU, resize may not be mapp")
    assert "Not verified: no interpreter: pip install <it>" in words
    assert "1.400 ms predicted for Coral; not measured here" in words
    assert "40 operations mapped, 2 left to the CPU, 1.00 MiB of parameters on the chip" in words
    assert "0.25 MiB streamed (version 16.0); 2 ADD: Not today" in words
    assert "float" not in words


def test_a_run_that_is_not_exported_says_so(plain: RunFolder) -> None:
    plain.export = None
    assert "The network is not exported." in Page(plain.write()).words("export")


def test_the_full_config_is_in_the_report(page: Page) -> None:
    assert "warmup_fraction: 0.3" in page.words("run")


def test_a_missing_file_is_named(plain: RunFolder) -> None:
    plain.write()
    (plain.folder / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*results\.json"):
        write_report(
            plain.folder, tasks=TASKS, space=plain.space, pictures=plain.pictures(), class_names={}
        )


def test_pictures_must_have_a_map_of_each_task_for_each_image(plain: RunFolder) -> None:
    pictures = plain.pictures(2)
    pictures.targets["depth"].pop()
    message = r"targets: expected one map of task depth for each of 2 images .* got 1"
    with pytest.raises(ValueError, match=message):
        plain.write(pictures)
    assert not (plain.folder / "report.html").exists()


@pytest.fixture
def panels(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> dict[str, Axes]:
    """The panels of the plots, by title, before they become pixels."""
    found: dict[str, Axes] = {}

    def keep(figure: Figure) -> bytes:
        found.update({axes.get_title(loc="left"): axes for axes in figure.axes})
        return b""

    monkeypatch.setattr("oneshot_ednas.report.plots.to_png", keep)
    log = RunLog(run.log)
    search_plots(log, task_names=list(TASKS), target_ms=1.45, warmup_steps=60, max_entropy=27.0)
    candidates, front = run.candidates["candidates"], run.candidates["pareto_front"]
    outcome_plots(log, candidates=candidates, front=front, target_ms=1.45)
    return found


def lines(axes: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.lines}


def test_curves_show_what_was_logged(panels: dict[str, Axes], run: RunFolder) -> None:
    logged = [line for line in run.log if line["stage"] == "search"]
    expected = lines(panels["Expected latency, ms"])["expected under alpha"]
    assert list(expected.get_ydata()) == [line["latency/expected_ms"] for line in logged]
    assert list(expected.get_xdata()) == [line["step"] for line in logged]
    assert set(lines(panels["Expected latency, ms"])["target"].get_ydata()) == {1.45}
    (temperature,) = panels["Temperature"].lines
    assert list(temperature.get_xdata()) == list(range(60, STEPS, 5))
    assert set(TASKS) <= set(lines(panels["Loss per task"]))
    assert panels["Loss per task"].get_yscale() == "log"
    assert {"derived, seed 0", "base", "random"} <= set(
        lines(panels["Loss when trained from scratch"])
    )


def test_the_running_mean_of_a_straight_line_is_that_line() -> None:
    axes = Figure().subplots()
    steps = np.arange(200)
    running_mean(axes, steps, 3.0 * steps, "x")
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), 3.0 * steps)
    assert len(axes.lines) == 2


def test_the_derived_candidate_stands_out(panels: dict[str, Axes], run: RunFolder) -> None:
    first, *others = run.candidates["candidates"]
    for title, key in (
        ("Log-probability under alpha", "log_probability"),
        ("Reward with supernet weights", "reward"),
    ):
        drawn = lines(panels[title])
        assert drawn["derived"].get_xydata().tolist() == [[first["latency_ms"], first[key]]]
        assert len(drawn["candidates"].get_xdata()) == len(others)
        assert set(drawn["target"].get_xdata()) == {1.45}


def test_target_and_prediction_share_their_colours() -> None:
    tasks = make_tasks({"far": TaskConfig(kind="depth")})
    ramp = np.linspace(2, 50, 240, dtype=np.float32)[None].repeat(8, 0)[None]
    stray = ramp.copy()
    stray[..., 0, :5] = 1e-4  # far nearer than anything measured
    image = np.zeros((8, 240, 3), np.uint8)
    pictures = RunPictures(images=[image], targets={"far": [ramp]}, predictions={"far": [stray]})
    mosaic = np.asarray(Image.open(io.BytesIO(prediction_mosaic(pictures, tasks))))[..., :3]
    assert mosaic.shape == (2 * (8 + 6) + 40, 3 * (240 + 6) + 26, 3)
    left = 26 + 2 * (240 + 6)
    above, below = mosaic[40:48, left : left + 240], mosaic[54:62, left : left + 240]
    np.testing.assert_array_equal(above[1:], below[1:])
    assert (above[0, :5] == above[0, 0]).any()
    assert (mosaic[40:56, :480] == 0).all()  # the image, twice as large


def test_the_mosaic_is_kept_in_the_folder_and_small_maps_are_enlarged(plain: RunFolder) -> None:
    plain.write()
    with Image.open(plain.folder / "predictions.png") as mosaic:
        assert mosaic.width == 5 * (8 * 32 + 6) + 26
        assert mosaic.height == 2 * 2 * (8 * 16 + 6) + 40


def test_the_log_leaves_out_torn_lines_and_a_missing_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert RunLog.read(path).lines == []
    path.write_text('{"stage": "search", "step": 0, "x": 2}\n{"stage": "search", "st')
    steps, values = RunLog.read(path).curve("search", "x")
    assert steps.tolist() == [0]
    assert values.tolist() == [2.0]


@given(st.text(), st.text())
def test_an_element_gives_back_its_text_and_its_attribute(text: str, value: str) -> None:
    class Reader(HTMLParser):
        data, found = "", ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found = attrs[0][1] or ""

        def handle_data(self, data: str) -> None:
            self.data += data

    reader = Reader()
    reader.feed(tag("p", text, title=value))
    reader.close()
    assert reader.data == text
    assert reader.found == value


def test_html_is_not_escaped_twice() -> None:
    assert join([tag("b", "a & b"), " < c"]) == "<b>a &amp; b</b> &lt; c"


def test_numbers_have_four_digits_and_times_a_fitting_unit() -> None:
    assert [number(v) for v in (0.41, 21.5, 999.96, 12345.6)] == [
        "0.4100",
        "21.50",
        "1000",
        "12,346",
    ]
    assert [duration(v) for v in (4.25, 90.0, 9000.0)] == ["4.2 s", "1.5 min", "2.5 h"]
