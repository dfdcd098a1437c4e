"""The configs of BMTAS and AutoMTL on folders of their layouts, with tiny networks."""

import json
from pathlib import Path

import fixtures_adashare
import fixtures_astmt
import pytest
from test_cli import good

from oneshot_ednas.config import TaskSharingConfig, load_config

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = (
    "device=cpu",
    "data.height=48",
    "data.width=64",
    "data.workers=1",
    "data.augment={flip: true}",
    "backbone.options={width: 0.125, aspp_channels: 8, decoder_channels: 8, low_level_channels: 8}",
    "derive.batch_size=2",
    "derive.calibration_batches=1",
    "retrain.steps=1",
    "retrain.batch_size=2",
    "retrain.calibration_batches=1",
    "baselines=[separate]",
)


def settings(*own: str) -> list[str]:
    return [part for setting in (*TINY, *own) for part in ("--set", setting)]


def slow(backbone: str):
    return pytest.param(backbone, marks=pytest.mark.slow)


@pytest.mark.parametrize("backbone", ["mobilenet_v2", slow("resnet50")])
def test_bmtas_on_pascal(tmp_path, backbone):
    root, out = tmp_path / "data", tmp_path / "run"
    more = ("0002", "0003", "0004", "0005")
    fixtures_astmt.write_pascal_mt(root, more_train=more, more_val=("0006",))
    own = settings(
        f"backbone.name={backbone}",
        "branching.steps=2",
        "branching.warmup_fraction=0.5",
        "branching.batch_size=2",
        "branching.cycle_steps=1",
        "branching.splits={weights: 0.33, alpha: 0.33, validation: 0.34}",
    )
    config = CONFIGS / "bmtas_pascal.yaml"
    result = good("branch", config, "--data", root, "--out", out, "--json", *own)
    networks = json.loads(result.stdout)["networks"]
    assert set(networks) == {"branched", "separate"}
    assert networks["branched"]["gmacs"] <= networks["separate"]["gmacs"]
    assert len(networks["separate"]["metrics"]) == 5


@pytest.mark.parametrize("backbone", ["resnet34", slow("mobilenet_v2"), slow("mnasnet")])
def test_automtl_on_nyuv2(tmp_path, backbone):
    root, out = tmp_path / "data", tmp_path / "run"
    fixtures_adashare.write_nyuv2(root, num_train=5)
    own = settings(
        f"backbone.name={backbone}",
        "operators.pretrain_steps=1",
        "operators.policy_steps=1",
        "operators.batch_size=2",
        "operators.num_candidates=2",
        "operators.splits={weights: 0.4, alpha: 0.4, validation: 0.2}",
    )
    config = CONFIGS / "automtl_nyuv2.yaml"
    result = good("share", config, "--data", root, "--out", out, "--json", *own)
    networks = json.loads(result.stdout)["networks"]
    assert set(networks) == {"operators", "separate"}
    assert len(networks["operators"]["metrics"]) == 3


def test_settings_are_those_of_the_papers():
    bmtas = load_config(CONFIGS / "bmtas_pascal.yaml", kind=TaskSharingConfig)
    assert bmtas.branching is not None
    assert bmtas.branching.warmup_steps == 2000
    assert bmtas.branching.steps - bmtas.branching.warmup_steps == 40000
    weights, alpha = (bmtas.branching.splits[name] for name in ("weights", "alpha"))
    assert alpha / (weights + alpha) == pytest.approx(0.2)
    assert bmtas.divides_learning_rate
    assert bmtas.retrain.optimizer.rate_at(0, 40000) == 0.005
    automtl = load_config(CONFIGS / "automtl_nyuv2.yaml", kind=TaskSharingConfig)
    assert automtl.operators is not None
    assert (automtl.operators.pretrain_steps, automtl.operators.policy_steps) == (10000, 20000)
    assert not automtl.divides_learning_rate
