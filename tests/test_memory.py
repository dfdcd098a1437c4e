"""The memory estimate against what autograd holds and what processes take; the measured peak."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_branching_search import make as make_branching
from test_operators import Backbone, Decoder
from tiny import CPU, FAST
from torch import nn

from oneshot_ednas import memory
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.memory import (
    MemoryEstimate,
    NoEstimateError,
    _LiveBytes,
    _peak,
    _Step,
    estimate_memory,
    watched_memory,
)
from oneshot_ednas.peak_memory import PeakMemory, free_memory, gib, resident_memory
from oneshot_ednas.retrain import NetworkTraining, RetrainConfig, StandAloneTraining
from oneshot_ednas.sharing.operator_search import OperatorSearch, OperatorSharingConfig
from oneshot_ednas.training import task_losses, training_batch

MIB = 2**20
IS_LINUX = sys.platform == "linux"
needs_linux = pytest.mark.skipif(not IS_LINUX, reason="other systems tell a process's life only")


def make_training(tiny, *, batch_size: int = 4, build=None, **optimizer) -> NetworkTraining:
    config = RetrainConfig(steps=4, batch_size=batch_size)
    space = tiny.space
    rest = {"stage": "one", "augmentation": AugmentConfig(), "seed": 0, "device": CPU}
    if build is not None:
        return NetworkTraining(
            config, build, tiny.tasks, tiny.train, identity="own", label="own", **rest
        )
    return StandAloneTraining(
        config, space, space.base_architecture, tiny.tasks, tiny.train, **rest
    )


def make_operators(tiny) -> OperatorSearch:
    config = OperatorSharingConfig(pretrain_steps=2, policy_steps=4, batch_size=4, optimizer=FAST)
    return OperatorSearch(
        config,
        Backbone,
        Decoder,
        tiny.tasks,
        splits={"weights": tiny.train.subset(range(16)), "alpha": tiny.train.subset(range(8))},
        augmentation=AugmentConfig(),
        seed=0,
        device=CPU,
    )


def estimate(**parts: int) -> MemoryEstimate:
    names = ("weights", "gradients", "optimizer", "activations", "batch", "workspace", "process")
    return MemoryEstimate(**dict.fromkeys(names, 0) | parts)


def saved_bytes(network: nn.Module, run, tasks, batch) -> int:
    """Bytes of the distinct storages that a real forward pass saves, but the weights."""
    own = {p.untyped_storage().data_ptr() for p in [*network.parameters(), *network.buffers()]}
    own |= {tensor.untyped_storage().data_ptr() for tensor in batch.values()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = task_losses(tasks, network(batch["image"], *run), batch)
    assert all(loss.requires_grad for loss in losses.values())
    return sum(storage.nbytes() for storage in held.values())


def test_live_bytes_follow_storages_and_not_views():
    with _LiveBytes() as live:
        a = torch.empty(1024, device="meta")
        assert live.now == 4096
        b = a.view(2, 512)[0] + 1
        assert live.now == 4096 + 2048
        b.add_(1)
        a.t().mul_(2)
        assert (live.now, live.peak) == (6144, 6144)
        del a
        assert (live.now, live.peak) == (2048, 6144)
        torch.zeros(10**6)  # of another device
        assert live.peak == 6144
    del b
    assert live.now == 0


@pytest.mark.parametrize("kind", ["sliced", "relaxed", "trained"])
def test_the_estimate_counts_what_autograd_saves(tiny, kind):
    if kind == "trained":
        training = make_training(tiny)
        network, run, split = training.network, (), training.split
    else:
        training = tiny.search()
        network, split = training.supernet, training.splits["weights"]
        run = (tiny.space.base_architecture,)
        if kind == "relaxed":
            run = (training.alpha.gates(1.0, generator=torch.Generator().manual_seed(0)),)
    batch = training_batch(
        split,
        name="x",
        step=0,
        batch_size=4,
        seed=0,
        augmentation=AugmentConfig(),
        device=CPU,
    )
    found = _peak(network, tiny.tasks, split.batch([0]), _Step(batch_size=4, args=run), "float32")
    # At the end of the forward pass outputs and losses are alive too, and masks are not.
    assert found.activations == pytest.approx(saved_bytes(network, run, tiny.tasks, batch), rel=0.1)


def test_no_architecture_needs_more_than_the_estimate(tiny):
    search = tiny.search()
    whole = estimate_memory(search)
    generator = np.random.default_rng(0)
    frame = search.splits["weights"].batch([0])
    for _ in range(3):
        step = _Step(batch_size=4, args=(tiny.space.sample(generator),))
        one = _peak(search.supernet, tiny.tasks, frame, step, "float32")
        assert one.activations <= whole.activations
        assert one.total <= whole.activations + whole.batch + whole.workspace


def test_activations_and_batch_grow_with_the_batch_size_and_weights_do_not(tiny):
    small, large = (estimate_memory(make_training(tiny, batch_size=size)) for size in (4, 8))
    assert large.batch == 2 * small.batch
    # Statistics of BN and mixed kernels do not depend on the batch.
    assert 1.9 * small.activations < large.activations <= 2 * small.activations
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(large, part) == getattr(small, part) > 0


def test_weights_gradients_and_optimizer_are_those_of_a_real_step(tiny):
    training = make_training(tiny)
    found = estimate_memory(training)
    training.take_step(0)
    parameters = list(training.network.parameters())
    assert found.gradients == sum(p.grad.numel() * 4 for p in parameters)
    states = [t for one in training.optimizer.state.values() for t in one.values()]
    assert found.optimizer == sum(t.numel() * 4 for t in states if t.dim() > 0)
    assert found.weights == sum(t.numel() * 4 for t in [*parameters, *training.network.buffers()])


def test_a_joint_step_holds_two_batches_and_an_alpha_step_no_gradient_of_weights(tiny):
    joint, alternating = (
        estimate_memory(tiny.search(mode=mode, warmup_fraction=0.0))
        for mode in ("joint", "alternating")
    )
    assert joint.batch == 4 * alternating.batch
    assert joint.activations > 1.9 * alternating.activations


def test_half_precision_halves_most_of_the_activations(tiny):
    full, half = (estimate_memory(tiny.search(precision=name)) for name in ("float32", "bfloat16"))
    assert 0.5 < half.activations / full.activations < 0.8  # losses stay in float32
    assert half.weights == full.weights


@pytest.mark.parametrize("kind", ["fixed", "searchable", "operators"])
def test_searches_of_what_tasks_share_are_estimated_too(tiny, kind):
    search = (
        make_operators(tiny)
        if kind == "operators"
        else make_branching(tiny, is_fixed=kind == "fixed")
    )
    found = estimate_memory(search)
    assert found.activations > found.batch > 0
    search.take_step(search.config.steps - 1)  # what was estimated runs


def test_an_estimate_changes_nothing(tiny):
    search, other = tiny.search(), tiny.search()
    state = torch.get_rng_state()
    estimate_memory(search)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in search.supernet.parameters())
    for step in (0, 5):
        search.take_step(step)
        other.take_step(step)
    for one, same in zip(search.supernet.parameters(), other.supernet.parameters(), strict=True):
        assert torch.equal(one, same)


class Peeking(nn.Module):
    """A network whose computation depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({n: nn.Conv2d(3, c, 1) for n, c in CHANNELS.items()})

    def forward(self, images):
        if images.mean() > 0:
            images = images + 1
        return {name: head(images) for name, head in self.heads.items()}


CHANNELS = {"segmentation": 10, "depth": 1}


def test_a_network_that_looks_at_values_has_no_estimate_and_still_runs(tiny, capsys):
    training = make_training(tiny, build=Peeking)
    with pytest.raises(NoEstimateError, match="does not run without values"):
        estimate_memory(training)
    with watched_memory("retrain", CPU, lambda: estimate_memory(training)) as figures:
        training.take_step(0)
    assert figures["estimated"] is None
    assert figures["peak"] > 0
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("retrain: memory is not estimated: it does not run without values")
    assert last == f"retrain: peak memory {gib(figures['peak'])}"


def test_a_stage_is_told_before_and_after(tiny, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 3 * 2**30)
    wanted = estimate(weights=2**30, activations=4 * 2**30, process=2**29)
    with watched_memory("search", CPU, lambda: wanted) as figures:
        assert figures == {"estimated": wanted.total, "peak": None}
    told, warned, after = capsys.readouterr().err.splitlines()
    assert told == (
        "search: this needs about 5.50 GiB on cpu (weights 1.00 GiB, activations 4.00 GiB, "
        "process 0.50 GiB)"
    )
    assert "warning: cpu has 3.00 GiB free and this needs about 4.00 GiB more" in warned
    assert after.endswith("(estimated 5.50 GiB)")


def test_a_shortage_is_told_only_where_there_is_one(monkeypatch):
    wanted = estimate(weights=MIB, activations=10 * MIB, process=500 * MIB)
    for free, is_short in ((10 * MIB, False), (10 * MIB - 1, True), (None, False)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert (wanted.shortage(CPU) is not None) == is_short


def test_free_memory_is_a_part_of_the_machine():
    free = free_memory(CPU)
    assert free is not None
    assert 0 < free < 2**50
    assert MIB < resident_memory() < 2**40


@needs_linux
def test_the_peak_is_that_of_the_block():
    with PeakMemory(CPU) as large:
        held = torch.ones(50 * MIB)
        del held
    with PeakMemory(CPU) as small:
        pass
    assert large.peak - small.peak > 150 * MIB


@pytest.mark.parametrize(("size", "text"), [(3 * 2**30, "3.00 GiB"), (5 * MIB, "5 MiB")])
def test_sizes_are_readable(size, text):
    assert gib(size) == text


PROGRAM = """
import json, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from oneshot_ednas.config import load_config
from oneshot_ednas.memory import estimate_memory
from oneshot_ednas.peak_memory import PeakMemory
from oneshot_ednas.retrain import StandAloneTraining
from oneshot_ednas.run_folder import Experiment
from oneshot_ednas.search import OneShotSearch

config = load_config(Path(sys.argv[1]), sys.argv[3:])
experiment = Experiment(config, Path("unused"))
space, device = experiment.space, torch.device("cpu")
if sys.argv[2] == "search":
    training = OneShotSearch(
        config.search, space, experiment.tasks, experiment.table,
        target_ms=experiment.target_ms,
        splits={name: experiment.part(name) for name in ("weights", "alpha")},
        augmentation=config.data.augment, seed=0, device=device,
    )
else:
    training = StandAloneTraining(
        config.retrain, space, space.extreme(space.base_architecture, largest=True),
        experiment.tasks, experiment.train, stage="one", augmentation=config.data.augment,
        seed=0, device=device,
    )
found = estimate_memory(training)
with PeakMemory(device) as measured:
    for step in range(training.config.steps // 2, training.config.steps // 2 + 3):
        training.take_step(step)
print(json.dumps({"estimated": found.total, "peak": measured.peak, "process": found.process}))
"""


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "batch_size"), [("search", 16), ("search", 64), ("training", 64)]
)
def test_the_estimate_is_near_what_a_process_takes(stage, batch_size, tmp_path):
    section = "retrain" if stage == "training" else "search"
    settings = [
        "device=cpu",
        "data.train_frames=160",
        "data.test_frames=16",
        "search.splits={weights: 0.45, alpha: 0.45, validation: 0.1}",
        f"{section}.batch_size={batch_size}",
    ]
    config = Path(__file__).parents[1] / "configs" / "demo.yaml"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(config), stage, *settings],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["estimated"] == pytest.approx(found["peak"], rel=0.25), found
