"""Runs: what a run folder holds, interruption and resumption, and what is refused before it."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys

import pytest
import torch
from test_cli import call, figures, good
from tiny import new_run, tiny_table

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.checkpoint import load_checkpoint, previous_checkpoint
from oneshot_ednas.cli.runs import reopen
from oneshot_ednas.config import ExperimentConfig, load_config
from oneshot_ednas.data.source import DataConfig
from oneshot_ednas.derive import BudgetSearch
from oneshot_ednas.export.edgetpu import MAX_VERSIONS
from oneshot_ednas.latency.operations import network_macs
from oneshot_ednas.latency.table import LatencyTable
from oneshot_ednas.pipeline import OneShotRun, run_all
from oneshot_ednas.ranking import rank_candidates
from oneshot_ednas.retrain import RetrainConfig, retrain
from oneshot_ednas.run_folder import Frames, RunFiles, RunFolder
from oneshot_ednas.schema import load_yaml, read_json
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.store import write_json
from oneshot_ednas.tasks import TaskConfig
from oneshot_ednas.training import Interrupted, StageLog, derived_seed, take_in_log
from oneshot_ednas.workers import open_workers

STAGES = ["search", "retrain.seed_0", "retrain.seed_1", "baseline.base", "baseline.random"]
TIMED = ["search", "derive", *STAGES[1:], "evaluate"]


def same_checkpoints(one, other) -> bool:
    for stage in STAGES:
        a, b = (load_checkpoint(RunFiles(folder).checkpoint(stage)) for folder in (one, other))
        key = "supernet" if stage == "search" else "network"
        if not all(torch.equal(value, b[key][name]) for name, value in a[key].items()):
            return False
    return True


# What a run leaves --------------------------------------------------------------------------


def forget(files: RunFiles, stage: str) -> None:
    """Delete the checkpoints of a stage: without the newest one, the one before is taken."""
    path = files.checkpoint(stage)
    path.unlink()
    previous_checkpoint(path).unlink()


def test_a_run_folder_holds_everything(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {
        "config.yaml",
        "space.yaml",
        "architecture.json",
        "results.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "report.html",
        "splits.json",
        "candidates.json",
        "model.tflite",
        "export.json",
    }
    for stage in STAGES:
        assert RunFiles(finished_run).checkpoint(stage).is_file()
    # Validation metrics may have a stage of their own.
    assert {path.name for path in (finished_run / "tensorboard").iterdir()} >= set(STAGES)
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    for stage, steps in (dict.fromkeys(STAGES, 5) | {"search": 6}).items():
        logged = [x["step"] for x in lines if x["stage"] == stage and "loss/weights" in x]
        assert logged == list(range(steps)), stage
    assert "<html" in (finished_run / "report.html").read_text()
    assert [path.name for path in finished_run.rglob(".*")] == [".lock"], "a part was left"


def test_a_run_folder_reads_back_what_the_run_was_given(finished_run, project):
    config = load_yaml(finished_run / "config.yaml", ExperimentConfig)
    assert config == load_config(project / "config.yaml")
    assert SearchSpace.load(finished_run / "space.yaml") == SearchSpace.load(project / "space.yaml")
    splits = read_json(finished_run / "splits.json")
    assert {name: len(part) for name, part in splits.items()} == {
        "weights": 19,
        "alpha": 8,
        "validation": 5,
    }
    assert len({frame for part in splits.values() for frame in part}) == 32


def test_results_hold_the_named_figures(finished_run, tiny):
    results = read_json(finished_run / "results.json")
    architecture = Architecture.load(finished_run / "architecture.json")
    assert results["method"] == "one_shot"
    assert results["target_ms"] == 5.0
    assert results["latency_ms"] <= 5.0
    assert results["is_inside_target"] is True
    channels = {"segmentation": 10, "depth": 1}
    # Through the CSV, which rounds to six digits.
    assert results["latency_ms"] == pytest.approx(
        tiny.table.latency_ms(tiny.space, architecture, channels), rel=1e-5
    )
    assert results["architecture"] == str(architecture)
    assert set(results["metrics"]) == {"segmentation", "depth"}
    assert {"miou", "pixel_accuracy"} <= set(results["metrics"]["segmentation"])
    assert {"absolute_error", "relative_error"} <= set(results["metrics"]["depth"])
    assert results["seed"] == 3
    assert {"torch", "python", "oneshot_ednas", "numpy", "device"} <= set(results["versions"])
    assert set(results["seconds"]) >= set(TIMED)
    assert min(results["seconds"].values()) >= 0
    assert {"reward", "metrics", "expected_latency_ms", "alarms"} <= set(results["supernet"])
    assert results["num_frames"] == {"train": 32, "test": 6}
    assert len(results["reward_per_seed"]) == 2
    assert results["reward"] == pytest.approx(sum(results["reward_per_seed"]) / 2)
    assert results["metrics_std"]["depth"]["absolute_error"] > 0
    cost, seconds = results["cost"], results["seconds"]
    assert cost["search_seconds"] == seconds["search"] + seconds["derive"]
    assert cost["retrain_seconds"] == seconds["retrain.seed_0"] + seconds["retrain.seed_1"]
    # Two seeds, five steps of four frames, three times the forward pass.
    assert cost["retrain_macs"] == pytest.approx(results["gmacs"] * 1e9 * 2 * 5 * 4 * 3)
    candidates = read_json(finished_run / "candidates.json")["candidates"]
    search = reopen(finished_run, None).one_shot
    # Validation during the search, and ranking: two calibration batches of eight frames, five
    # validation frames, forward only.
    run = reopen(finished_run, None)
    best = BudgetSearch(search.alpha, run.costs).best(5.0, 1)[0].architecture
    assert run._validate()[1] == (2 * 8 + 5) * run.macs(best)
    ranking = (2 * 8 + 5) * sum(
        network_macs(tiny.space, Architecture.from_json(one["architecture"]), (32, 32), channels)
        for one in candidates
    )
    assert cost["search_macs"] == pytest.approx(search.macs + ranking)
    assert search.macs > 0
    base, random = results["baselines"]["base"], results["baselines"]["random"]
    assert base["architecture"] == str(tiny.space.base_architecture)
    assert base["latency_ms"] > 5.0
    assert base["is_inside_target"] is False
    assert random["latency_ms"] <= 5.0
    for row in (results, base, random):
        assert row["parameters"] > 1000
        assert row["gmacs"] > 0


def test_no_two_runs_have_a_training_in_common(finished_run):
    files = RunFiles(finished_run)
    seeds = {stage: load_checkpoint(files.checkpoint(stage))["seed"] for stage in STAGES[1:]}
    assert seeds.pop("retrain.seed_1") == derived_seed(3, "retrain", 1)
    assert set(seeds.values()) == {3}


def test_a_log_torn_by_a_crash_is_taken_in_without_its_last_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "search", "step": 0}\n')
    part, line = tmp_path / "stages", '{"stage": "retrain.seed_1", "step": 0}\n'
    part.mkdir()
    for torn, count in ((line[:9], 1), (line + line[:9], 2), (line, 2)):
        (part / "metrics.jsonl").write_text(torn)
        take_in_log(tmp_path, part, "retrain.seed_1")
        log = (tmp_path / "metrics.jsonl").read_text()
        assert log.endswith("}\n")
        assert len([json.loads(one) for one in log.splitlines()]) == count
        assert not (part / "metrics.jsonl").exists()


def test_time_is_kept_with_each_checkpoint_and_reading_back_adds_none(
    project, finished_run, tmp_path, monkeypatch
):
    out = shutil.copytree(finished_run, tmp_path / "run")
    run = new_run(project, out, resume=True)
    before = run.seconds
    run.evaluate()
    after = run.seconds
    assert after["evaluate"] > before["evaluate"]
    assert {name: after[name] for name in STAGES} == {name: before[name] for name in STAGES}
    forget(RunFiles(out), "retrain.seed_0")
    saved = []

    def spy(*arguments, on_save, **settings):
        def note_time():
            on_save()
            saved.append(run.seconds["retrain.seed_0"])

        return retrain(*arguments, on_save=note_time, **settings)

    monkeypatch.setattr("oneshot_ednas.pipeline.retrain", spy)
    run.retrain()
    assert len(saved) == 3  # after two, four and five steps
    assert before["retrain.seed_0"] < saved[0] < saved[1] < saved[2]


def test_workers_are_checked_before_a_folder_is_made(project, tmp_path):
    result = call("run", project / "config.yaml", "--out", tmp_path / "run", "--workers", "banana")
    assert result.exit_code == 2
    assert "--workers: expected N, ray or ray:N" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_candidates_are_ranked_inside_the_target(finished_run):
    found = read_json(finished_run / "candidates.json")
    candidates = found["candidates"]
    assert 2 <= len(candidates) <= 4  # the two most probable, and up to two further draws
    assert all(candidate["latency_ms"] <= 5.0 for candidate in candidates)
    assert candidates[0]["reward"] >= candidates[1]["reward"]
    chosen = Architecture.load(finished_run / "architecture.json")
    assert candidates[0]["architecture"] == chosen.to_json()
    for options in found["probabilities"].values():
        assert sum(options.values()) == pytest.approx(1)
    latencies = [point["latency_ms"] for point in found["pareto_front"]]
    assert latencies == sorted(latencies)


def test_candidates_are_scored_on_frames_that_nothing_was_trained_on(
    project, finished_run, tmp_path, monkeypatch
):
    out = shutil.copytree(finished_run, tmp_path / "run")
    asked = {}

    def spy(*arguments, **settings):
        asked.update(settings)
        return rank_candidates(*arguments, **settings)

    monkeypatch.setattr("oneshot_ednas.pipeline.rank_candidates", spy)
    run = new_run(project, out, resume=True)
    run.derive()
    splits = read_json(out / "splits.json")
    assert list(asked["validation"].sources) == splits["validation"]
    assert list(asked["calibration"].sources) == splits["weights"]
    assert asked["target_ms"] == 5.0
    trained = {name: list(split.sources) for name, split in run.one_shot.splits.items()}
    assert trained == {name: splits[name] for name in ("weights", "alpha")}


# Export -------------------------------------------------------------------------------------


def test_the_exported_network_does_what_the_trained_one_does(finished_run):
    report, results = (read_json(finished_run / f"{name}.json") for name in ("export", "results"))
    assert (report["file"], report["network"]) == ("model.tflite", "retrain.seed_0")
    assert report["architecture"] == results["architecture"]
    assert report["size_bytes"] == (finished_run / "model.tflite").stat().st_size
    assert report["num_calibration_images"] == results["num_frames"]["train"] == 32
    assert report["latency"]["predicted_ms"] == results["latency_ms"]
    assert report["not_verified"] is None
    assert set(report["metrics"]) == {"validation", "test"}
    for split in report["metrics"].values():
        assert abs(split["segmentation"]["pixel_accuracy"]["difference"]) < 2
        assert abs(split["depth"]["absolute_error"]["difference"]) < 2
    assert read_json(finished_run / "seconds.json")["export"] > 0
    assert "not exported" not in (finished_run / "report.html").read_text()


def test_an_export_is_done_once(project, finished_run, tmp_path, monkeypatch):
    out = shutil.copytree(finished_run, tmp_path / "run")
    run = new_run(project, out, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("oneshot_ednas.pipeline.deploy", None)
        assert run.export() == read_json(finished_run / "export.json")
    # A training that is newer than the file makes it stale.
    later = (out / "export.json").stat().st_mtime + 10
    os.utime(RunFiles(out).checkpoint("retrain.seed_0"), (later, later))
    (out / "model.tflite").write_bytes(b"stale")
    run.export()
    assert (out / "model.tflite").read_bytes() == (finished_run / "model.tflite").read_bytes()


@pytest.fixture
def own_copy(project, finished_run, tmp_path):
    """A finished run to change."""
    return new_run(project, shutil.copytree(finished_run, tmp_path / "run"), resume=True)


def test_a_file_that_is_not_that_of_the_report_is_written_anew(own_copy, finished_run):
    own_copy.files.model.write_bytes(b"another network")
    report = own_copy.export()
    assert own_copy.files.model.read_bytes() == (finished_run / "model.tflite").read_bytes()
    assert report["sha256"] == read_json(finished_run / "export.json")["sha256"]


def test_an_export_is_compiled_once_there_is_a_compiler(own_copy, tmp_path, monkeypatch):
    script = tmp_path / "bin" / "edgetpu_compiler"
    script.parent.mkdir()
    # In place of the Edge TPU compiler, which is a closed program.
    script.write_text("#!/bin/sh\necho refused\nexit 1\n")
    script.chmod(0o755)
    assert "is not on PATH" in own_copy.export()["not_compiled"]
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    assert own_copy.export()["not_compiled"].endswith("(exit status 1): refused")


def test_an_export_without_its_training_is_refused_with_the_command_to_run(own_copy):
    forget(own_copy.files, "retrain.seed_0")
    with pytest.raises(ValueError, match=r"retrain.seed_0 is not trained to its end; run oneshot"):
        own_copy.export()


def test_a_network_that_the_device_does_not_take_has_its_report_all_the_same(own_copy, monkeypatch):
    files = own_copy.files
    page = files.folder / "report.html"
    for path in (files.export, page):
        path.unlink()
    monkeypatch.setitem(MAX_VERSIONS, "CONV_2D", 1)
    with pytest.raises(RuntimeError, match="is written by CONV_2D version 3, expected at most 1"):
        run_all(own_copy)
    assert "The network is not exported." in page.read_text()
    assert not files.model.exists()
    # The page takes seconds, and is the same.
    monkeypatch.setattr("oneshot_ednas.pipeline.write_report", lambda at, **_: page.touch() or at)
    page.unlink()
    result = call("evaluate", files.folder)
    assert (result.exit_code, result.stdout) == (1, "")
    assert page.exists()


def test_the_printed_time_has_all_stages_in_it(own_copy, monkeypatch):
    def export(run):
        write_json(run.files.seconds, run.seconds | {"export": 5000.0})

    monkeypatch.setattr(OneShotRun, "export", export)
    monkeypatch.setattr("oneshot_ednas.pipeline.write_report", lambda at, **_: at)
    text = good("evaluate", own_copy.files.folder).stdout
    seconds = sum(read_json(own_copy.files.seconds).values())
    assert seconds > 5000
    assert f"{seconds:.0f} s in all" in text


def test_a_machine_without_an_interpreter_finishes_a_run(
    project, finished_run, tmp_path, monkeypatch, capsys
):
    out = shutil.copytree(finished_run, tmp_path / "run")
    (out / "export.json").unlink()
    run = new_run(project, out, resume=True)
    with monkeypatch.context() as patch:
        for name in ("tflite_runtime", "ai_edge_litert"):
            patch.setitem(sys.modules, name, None)
        results = run_all(run)
    assert figures(results) == figures(read_json(finished_run / "results.json"))
    report = read_json(out / "export.json")
    assert "pip install ai-edge-litert" in report["not_verified"]
    assert report["metrics"] is None
    assert "measured_ms" not in report["latency"]
    assert (out / "model.tflite").read_bytes() == (finished_run / "model.tflite").read_bytes()
    assert f"export: not verified: {report['not_verified']}" in capsys.readouterr().err
    assert "Not verified: no TFLite interpreter" in (out / "report.html").read_text()
    # Once there is one, the next sitting verifies.
    assert run.export()["metrics"].keys() == {"validation", "test"}


# Interruption -------------------------------------------------------------------------------


def test_a_run_interrupted_in_every_stage_ends_as_the_uninterrupted_one(
    project, finished_run, tmp_path, monkeypatch, capsys
):
    stops = [("search", 0), ("search", 3), *((stage, 2) for stage in STAGES[1:])]
    scalars = StageLog.scalars

    def interrupting(self, step, values):
        if stops and (self.stage, step) == stops[0] and "loss/weights" in values:
            os.kill(os.getpid(), signal.SIGINT)
        scalars(self, step, values)

    monkeypatch.setattr(StageLog, "scalars", interrupting)
    monkeypatch.setattr("oneshot_ednas.pipeline.write_report", lambda *_, **__: tmp_path)
    out = tmp_path / "run"
    while stops:
        stage, step = stops[0]
        with pytest.raises(Interrupted, match=f"stopped after step {step + 1} of . in {stage}"):
            run_all(new_run(project, out, resume=True))
        assert not (out / "results.json").exists()
        stops.pop(0)
    results = run_all(new_run(project, out, resume=True))
    assert figures(results) == figures(read_json(finished_run / "results.json"))
    assert same_checkpoints(out, finished_run)
    logs = [(folder / "metrics.jsonl").read_text() for folder in (out, finished_run)]
    assert logs[0] == logs[1]
    assert capsys.readouterr().out == ""


def test_a_crash_while_deriving_leaves_the_stage_to_be_done_again(
    project, finished_run, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    names = ("architecture.json", "candidates.json")
    for name in names:
        (out / name).unlink()
    run = new_run(project, out, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("oneshot_ednas.pipeline.pareto_front", None)
        with pytest.raises(TypeError):
            run_all(run)
    assert not (out / "architecture.json").exists()
    new_run(project, out, resume=True).derive()
    assert all((out / n).read_text() == (finished_run / n).read_text() for n in names)


def test_stages_out_of_order_are_refused_with_the_command_to_run(project, finished_run, tmp_path):
    run = new_run(project, tmp_path / "run")
    with pytest.raises(ValueError, match="the search is at step 0 of 6; finish it with oneshot-ed"):
        run.derive()
    for stage in (run.retrain, run.evaluate, run.report):
        with pytest.raises(ValueError, match="no derived architecture yet; run oneshot-ednas deri"):
            stage()
    out = tmp_path / "copy"
    shutil.copytree(finished_run, out)
    forget(RunFiles(out), "retrain.seed_1")
    run = new_run(project, out, resume=True)
    with pytest.raises(ValueError, match=r"retrain.seed_1 is not trained to its end; run oneshot"):
        run.evaluate()


# What is refused before anything is written -------------------------------------------------


def test_a_folder_with_another_run_is_refused(project, finished_run):
    before = {path: path.read_bytes() for path in finished_run.glob("*.*")}
    with pytest.raises(ValueError, match="already holds this run; go on with --resume"):
        new_run(project, finished_run)
    for resume in (False, True):
        with pytest.raises(
            ValueError, match=r"already holds a run of another config .search.steps: 6 against 7."
        ):
            new_run(project, finished_run, overrides=["search.steps=7"], resume=resume)
    assert {path: path.read_bytes() for path in finished_run.glob("*.*")} == before


def test_a_folder_with_something_else_is_left_alone(project, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run; choose another --out"):
        new_run(project, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_space_or_data_that_changed_since_is_refused(project, finished_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    text = (out / "space.yaml").read_text()
    (out / "space.yaml").write_text(text.replace("stem_filters: 8", "stem_filters: 16"))
    with pytest.raises(ValueError, match="the search space has changed since the run began"):
        new_run(project, out, resume=True)
    (out / "space.yaml").write_text(text)
    splits = read_json(out / "splits.json")
    splits["weights"][0] = "train/999"
    (out / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(ValueError, match="the data, or how it is split, has changed since"):
        new_run(project, out, resume=True)
    shutil.copy(finished_run / "splits.json", out)
    digests = read_json(out / "data.json")
    (out / "data.json").write_text(json.dumps(dict.fromkeys(digests, "0")))
    with pytest.raises(ValueError, match="the data has changed since the run began"):
        new_run(project, out, resume=True)
    shutil.copy(finished_run / "data.json", out)
    table = (out / "latency_table.csv").read_text()
    (out / "latency_table.csv").write_text(table.replace("fixed_ms: ", "fixed_ms: 1"))
    with pytest.raises(ValueError, match="the latency table has changed since the run began"):
        new_run(project, out, resume=True)
    (out / "latency_table.csv").write_text(table)
    new_run(project, out, resume=True, overrides=["device=cpu", "data.workers=1"])


def test_a_table_and_space_in_the_form_of_an_older_version_are_the_same(
    project, finished_run, tmp_path
):
    out = shutil.copytree(finished_run, tmp_path / "run")
    table = (out / "latency_table.csv").read_text()
    older = "# held_out_spearman: null\n# note: ''\n" + table
    (out / "latency_table.csv").write_text(older)
    space = "# by hand\n" + (out / "space.yaml").read_text()
    (out / "space.yaml").write_text(space)
    reopen(out, None)
    assert (out / "latency_table.csv").read_text() == older
    assert (out / "space.yaml").read_text() == space
    new_run(project, out, resume=True)
    assert (out / "latency_table.csv").read_text() == table
    (out / "latency_table.csv").write_text(older.replace("fixed_ms: ", "fixed_ms: 1"))
    with pytest.raises(ValueError, match="the latency table has changed since the run began"):
        new_run(project, out, resume=True)


def test_a_target_that_asks_for_nothing_is_told(project, tmp_path, capsys):
    for target, is_told in (("1000", True), (None, False)):
        changed = [f"latency.target_ms={target}"] if target else []
        new_run(project, tmp_path / str(target), overrides=["search.steps=1", *changed]).search()
        assert ("every architecture is inside this target" in capsys.readouterr().err) is is_told


def test_a_reopened_run_needs_neither_the_space_nor_the_table_it_began_with(
    finished_run, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    config = (out / "config.yaml").read_text()
    table = re.search(r"table: (.*)", config)[1]
    space = re.search(r"^space: (.*)", config, re.MULTILINE)[1]
    gone = config.replace(table, "gone.csv").replace(space, "gone.yaml")
    (out / "config.yaml").write_text(gone)
    monkeypatch.chdir(tmp_path)
    again = reopen(out, None)
    assert again.space.to_yaml() == (out / "space.yaml").read_text()
    assert again.table.to_text() == (out / "latency_table.csv").read_text()
    assert again.table.name == "gone.csv"
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        OneShotRun(load_config(out / "config.yaml"), out)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["latency.target_ms=4"], "is 4 ms, below the minimum of space small: 4.363 ms"),
        (["search.batch_size=9"], "search.batch_size is 9, the smaller of .* has 8 frames"),
        (["retrain.batch_size=33"], "retrain.batch_size is 33, the training split has 32 frames"),
        (["device=cuda:7"], "device cuda:7 was asked for and is absent"),
        (["data.width=48"], "table.csv is for images of 32x32, got 32x48"),
        (["tasks.segmentation.num_classes=11"], "no row in table.csv for separable_conv"),
        (["search.splits={weights: 0.5, alpha: 0.2, validation: 0.2}"], "shares that sum to 1"),
        (["search.splits={weights: 0.9, alpha: 0.09, validation: 0.01}"], "validation .* is empty"),
        (["data.test_split=tset"], "tset"),
    ],
)
def test_what_cannot_work_is_refused_before_a_folder_is_made(project, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        new_run(project, tmp_path / "run", overrides=overrides)
    assert list(tmp_path.iterdir()) == []


def test_a_random_baseline_that_finds_nothing_is_refused_at_once(project, tmp_path, monkeypatch):
    monkeypatch.setattr("oneshot_ednas.run_folder.MAX_RANDOM_DRAWS", 3)
    with pytest.raises(ValueError, match=r"none of 3 random architectures is inside 4.364 ms"):
        new_run(project, tmp_path / "run", overrides=["latency.target_ms=4.364"])
    assert list(tmp_path.iterdir()) == []
    new_run(project, tmp_path / "run", overrides=["latency.target_ms=4.364", "baselines=[base]"])


def test_a_table_of_unknown_error_needs_consent(project, tiny, tmp_path):
    table = tiny_table(tiny.space)
    header = dataclasses.replace(table.header, held_out_mape=None)
    LatencyTable(header, table.rows, "x").save(tmp_path / "table.csv")
    overrides = [f"latency.table={tmp_path / 'table.csv'}"]
    with pytest.raises(ValueError, match=r"the error of table.csv on whole networks is unknown"):
        new_run(project, tmp_path / "run", overrides=overrides)
    new_run(project, tmp_path / "run", overrides=[*overrides, "latency.allow_uncalibrated=true"])
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_networks_trained_on_workers_are_those_trained_one_by_one(
    project, finished_run, tmp_path, tiny
):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    files = RunFiles(folder)
    stages = ["retrain.seed_0", "retrain.seed_1", "baseline.base", "baseline.random"]
    log_before = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    for stage in stages:
        forget(files, stage)
    seconds = json.loads(files.seconds.read_text())
    files.seconds.write_text(json.dumps({"search": seconds["search"], "derive": seconds["derive"]}))
    run = new_run(project, folder, resume=True)
    with open_workers("2") as run.workers:
        run.retrain()
    for stage in stages:
        one, other = (
            load_checkpoint(RunFiles(which).checkpoint(stage))["network"]
            for which in (folder, finished_run)
        )
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert run.seconds[stage] > 0
    log = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    for stage in stages:
        of_stage = [[x for x in lines if x["stage"] == stage] for lines in (log, log_before)]
        assert of_stage[0] == of_stage[1]
    assert len(log) == len(log_before)
    assert figures(run.evaluate()) == figures(
        json.loads(RunFiles(finished_run).results.read_text())
    )


def test_runs_of_different_seeds_can_share_their_splits(project, tmp_path):
    shared = [
        new_run(
            project, tmp_path / str(seed), overrides=[f"seed={seed}", "search.split_seed=7"]
        ).indices
        for seed in (0, 1)
    ]
    own = new_run(project, tmp_path / "own", overrides=["seed=1"]).indices
    assert shared[0] == shared[1] != own


# Runs of another config ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherConfig:
    """The config of another kind of run."""

    seed: int = 0
    device: str = "cpu"
    deterministic: bool = False
    data: DataConfig
    tasks: dict[str, TaskConfig]
    retrain: RetrainConfig
    space: str | None = None


OTHER = """\
data: {source: streets, height: 32, width: 32, train_frames: 32, test_frames: 6, workers: 1}
tasks:
  segmentation: {kind: segmentation, num_classes: 10}
retrain: {steps: 1, batch_size: 4}
space: space.yaml
"""


def test_runs_of_another_config_have_a_folder(project, tmp_path):
    (tmp_path / "other.yaml").write_text(OTHER)
    shutil.copy(project / "space.yaml", tmp_path)

    def other(*overrides) -> RunFolder[OtherConfig]:
        config = load_config(tmp_path / "other.yaml", overrides, kind=OtherConfig)
        return RunFolder(config, tmp_path / "run")

    run = other()
    assert run.config.space == str(tmp_path / "space.yaml")
    assert run.out_channels == {"segmentation": 10}
    run.open(resume=False)
    with run.timed("search"):
        pass
    assert run.seconds.keys() == {"search"}
    assert load_config(run.files.config, kind=OtherConfig) == run.config
    with pytest.raises(ValueError, match="already holds this run; go on with --resume"):
        other().open(resume=False)
    with pytest.raises(ValueError, match=re.escape("another config (retrain.steps: 1 against 2)")):
        other("retrain.steps=2").open(resume=True)
    # Neither how often a loop writes nor how many processes read defines a run.
    other("retrain.loop.log_every=7", "data.workers=2").open(resume=True)
    with pytest.raises(ValueError, match=r"holds a run of another kind or version .*config\.yaml"):
        new_run(project, tmp_path / "run", resume=True)


def test_batches_larger_than_what_they_are_drawn_from_are_refused(project, tmp_path):
    run = new_run(project, tmp_path / "run")
    splits = {"weights": 0.5, "validation": 0.5}
    frames = Frames.load(run.config.data, run.tasks, splits=splits, seed=1)
    assert {name: len(part) for name, part in frames.sources.items()} == dict.fromkeys(splits, 16)
    assert list(frames.part("weights").sources) == frames.sources["weights"]
    assert frames.digests == run.data_digests
    frames.check_batches("search.batch_size", 16, "weights", "validation")
    for parts, where in {
        (): "the training split has 32",
        ("weights",): "the weight split has 16",
        ("weights", "validation"): "the smaller of the weight and validation splits has 16",
    }.items():
        with pytest.raises(ValueError, match=f"b.size is 33, {where} frames; lower it"):
            frames.check_batches("b.size", 33, *parts)
