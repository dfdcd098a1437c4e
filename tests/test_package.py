"""The public names, and what an import costs."""

import importlib
import subprocess
import sys

import pytest

import oneshot_ednas


def test_every_public_name_is_there_and_nothing_else_is():
    assert set(oneshot_ednas.__all__) == set(oneshot_ednas._HOMES) | {"__version__"}
    for name, home in oneshot_ednas._HOMES.items():
        assert getattr(oneshot_ednas, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        oneshot_ednas.no_such_name  # noqa: B018


def test_spaces_architectures_tables_and_the_simulator_need_no_torch():
    code = (
        "import sys\n"
        "from oneshot_ednas import Architecture, LatencyTable, ednas_tiny\n"
        "from oneshot_ednas.latency.edgetpu import EdgeTpu\n"
        "space = ednas_tiny()\n"
        "table = LatencyTable.load('latency_tables/edgetpu_sim_64x128.csv')\n"
        "assert table.latency_ms(space, space.base_architecture) > 1\n"
        "assert EdgeTpu.load().fixed_ms > 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
