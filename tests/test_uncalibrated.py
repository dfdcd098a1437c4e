"""A table whose error nobody knows is refused on the command line, unless it is allowed there."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner, Result

from oneshot_ednas.cli import main
from oneshot_ednas.latency.table import LatencyTable


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def setting(tiny, tmp_path) -> str:
    """The setting that names a table of unknown error."""
    header = replace(tiny.table.header, held_out_mape=None)
    LatencyTable(header, tiny.table.rows).save(tmp_path / "uncalibrated.csv")
    return f"latency.table={tmp_path / 'uncalibrated.csv'}"


@pytest.mark.parametrize("command", ["run", "search", "evolve"])
def test_the_refusal_names_the_option(project, tmp_path, setting, command):
    out = tmp_path / "run"
    result = call(command, project / "config.yaml", "--out", out, "--set", setting)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: the error of uncalibrated.csv on whole networks is unknown")
    assert "go on with --allow-uncalibrated" in line
    assert not out.exists()


def test_a_search_and_a_run_go_on_with_the_option(project, tmp_path, setting, monkeypatch):
    # The report takes seconds and has tests of its own.
    monkeypatch.setattr("oneshot_ednas.pipeline.write_report", lambda folder, **_: folder)
    out = tmp_path / "run"
    arguments = [project / "config.yaml", "--out", out, "--set", setting, "--allow-uncalibrated"]
    result = call("search", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 6
    assert "allow_uncalibrated: true" in (out / "config.yaml").read_text()
    # The folder's config holds the consent, so later stages need not ask again.
    assert call("derive", out).exit_code == 0
    result = call("run", *arguments, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["latency_ms"] <= 5.0


@pytest.mark.parametrize(
    ("option", "unknown"),
    [
        (["--host", "usb2-raspberry-pi"], "usb2-raspberry-pi at 500 MHz"),
        (["--clock-mhz", "250"], "usb3-desktop at 250 MHz"),
        (["--host", "pcie-desktop"], None),
    ],
)
def test_a_table_for_what_nobody_measured_says_so(project, tmp_path, option, unknown):
    out = tmp_path / "simulated.csv"
    size = ["--image-size", "32", "32"]
    result = call("latency", "table", project / "space.yaml", *size, *option, "--out", out)
    assert result.exit_code == 0, result.stderr
    said = result.stdout.splitlines()[1:]
    if unknown is None:
        assert said == []
    else:
        assert said == [
            f"error unknown: no latency is published for {unknown}; a search takes this table with "
            f"--allow-uncalibrated only"
        ]


def test_a_run_folder_keeps_its_config(tmp_path):
    result = call("search", tmp_path, "--allow-uncalibrated")
    assert result.exit_code == 2
    assert "a run folder keeps its config: --out, --set and --allow-uncalibrated" in result.stderr
