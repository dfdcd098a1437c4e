"""The tool that compares depth losses: trains every seed once, and refuses what has no two."""

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

TOOL = Path(__file__).resolve().parents[1] / "tools" / "study_depth_loss.py"
SETTINGS = "multi_trial: {steps: 2}\n"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("study_depth_loss", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def study(tool, config, out):
    return CliRunner().invoke(tool.main, [str(config), "--out", str(out)])


def write_config(project, change=lambda text: text) -> Path:
    """Beside the project's, which names the space and the table that lie there."""
    path = project / "depth_loss.yaml"
    path.write_text(change((project / "config.yaml").read_text()) + SETTINGS)
    return path


def test_both_losses_are_trained_with_every_seed_and_only_once(tool, project, tmp_path):
    config, out = write_config(project), tmp_path / "out"
    result = study(tool, config, out)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "depth_loss.json").read_text())
    assert {name: len(trainings) for name, trainings in found.items()} == {"L1": 2, "JAReD": 2}
    assert found["L1"] != found["JAReD"]
    table = (out / "depth_loss.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()] == [
        "| depth loss",
        "| ---",
        "| L1",
        "| JAReD",
        "| % improved",
    ]
    # A finished training is read; one that is missing is done again, alike.
    kept = out / "L1" / "seed_3.json"
    before = kept.stat().st_mtime_ns
    (out / "JAReD" / "seed_4.json").unlink()
    assert study(tool, config, out).exit_code == 0
    assert kept.stat().st_mtime_ns == before
    assert json.loads((out / "depth_loss.json").read_text()) == found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("relative_weight: 1.0", "relative_weight: 0", "relative_weight is 0: that is L1"),
        ("  depth: {", "  far: {", "expected segmentation and depth, depth is missing"),
        ("  segmentation: {", "  other: {", "and depth, segmentation is missing"),
    ],
)
def test_a_config_without_two_losses_is_refused_before_anything_is_trained(
    tool, project, tmp_path, old, new, message
):
    config = write_config(project, lambda text: text.replace(old, new))
    result = study(tool, config, tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_the_table_shows_means_deviations_and_gains(tool):
    def trainings(*values):
        return [
            {
                "segmentation": {"miou": one},
                "depth": {"absolute_error": one, "relative_error": 2 * one},
            }
            for one in values
        ]

    text = tool._table({"L1": trainings(0.9, 1.1), "JAReD": trainings(1.15, 1.25)})
    # Higher is better for the first, lower for the others.
    deviation = "14.14"
    assert f"| L1 | 1.0000 | {deviation} | 1.0000 | {deviation} | 2.0000 | {deviation} |" in text
    assert "| JAReD | 1.2000 | 5.89 | 1.2000 | 5.89 | 2.4000 | 5.89 |" in text
    assert "| % improved | +20.0 | +58.3 | -20.0 | +58.3 | -20.0 | +58.3 |" in text
