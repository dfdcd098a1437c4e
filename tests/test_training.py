"""Seeds, batches, the step loop and its log."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CPU

from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.guard import StepGuard
from oneshot_ednas.models.network import build_network
from oneshot_ednas.report.plots import RunLog
from oneshot_ednas.training import (
    Interrupted,
    LoopConfig,
    OptimizerConfig,
    StageLog,
    StopRequest,
    accuracy_of,
    calibration_images,
    choose_device,
    derived_seed,
    evaluate,
    note,
    numpy_generator,
    run_steps,
    task_losses,
    torch_generator,
    training_batch,
    weighted_sum,
)

AUGMENT = AugmentConfig(flip=True, scale=(1.0, 1.5), brightness=0.3)


def out_channels(tiny) -> dict[str, int]:
    return {name: task.out_channels for name, task in tiny.tasks.items()}


def batch_of(tiny, **changes) -> dict[str, torch.Tensor]:
    settings = {"name": "a", "step": 0, "batch_size": 4, "seed": 0}
    settings |= {"augmentation": AUGMENT, "device": CPU}
    return training_batch(tiny.train, **(settings | changes))


# Seeds and devices --------------------------------------------------------------------------


def test_derived_seeds_differ_per_seed_purpose_and_step():
    purposes = [("augment", 0), ("augment", 1), ("order",), ("path", 0), (1, "path")]
    seeds = {derived_seed(seed, *purpose) for seed in range(20) for purpose in purposes}
    assert len(seeds) == 20 * len(purposes)


@given(st.integers(0, 2**63), st.integers(0, 2**31))
def test_derived_seeds_repeat_and_fit_every_generator(seed, step):
    value = derived_seed(seed, "gumbel", step)
    assert value == derived_seed(seed, "gumbel", step)
    assert 0 <= value < 2**63
    draws = [torch.rand(1, generator=torch_generator(seed, "x", step)).item() for _ in range(2)]
    assert draws[0] == draws[1]
    numbers = [numpy_generator(seed, "x", step).random() for _ in range(2)]
    assert numbers[0] == numbers[1]


def test_a_device_that_is_absent_or_unknown_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    for name in ("cuda", "cuda:1", "mps", "meta"):
        with pytest.raises(ValueError, match=f"device {name} was asked for and is absent"):
            choose_device(name)
    with pytest.raises(ValueError, match="expected auto, cpu, cuda, cuda:N or mps, got gpu"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("auto") == torch.device("cuda")
    with pytest.raises(ValueError, match="device cuda:2 was asked for and is absent"):
        choose_device("cuda:2")


# Batches ------------------------------------------------------------------------------------


def test_batches_are_a_pure_function_of_seed_step_and_name(tiny):
    first = batch_of(tiny, step=3)
    torch.rand(7)  # global random state does not matter
    again = batch_of(tiny, step=3)
    assert set(first) >= {"image", "segmentation", "depth"}
    assert all(torch.equal(first[name], again[name]) for name in first)
    for change in ({"step": 4}, {"seed": 1}, {"name": "b"}):
        other = batch_of(tiny, **({"step": 3} | change))
        assert not torch.equal(first["image"], other["image"]), change


def test_an_epoch_of_batches_shows_each_frame_once(tiny):
    plain = AugmentConfig()
    shown = torch.cat([batch_of(tiny, step=step, augmentation=plain)["image"] for step in range(8)])
    every = tiny.train.batch(range(32))["image"]
    matches = (shown[:, None] == every[None]).flatten(2).all(2)
    assert matches.sum(0).tolist() == [1] * 32


def test_calibration_images_are_plain_frames_and_fit_small_splits(tiny):
    part = tiny.train.subset(range(3))
    batches = list(calibration_images(part, num_batches=2, batch_size=8, seed=0, device=CPU))
    assert [tuple(images.shape) for images in batches] == [(3, 3, 32, 32)] * 2
    pixels = part.batch(range(3))["image"]
    assert torch.equal(batches[0].sum(0).sort()[0], pixels.sum(0).sort()[0]) or all(
        any(torch.equal(image, frame) for frame in pixels) for image in batches[0]
    )


# Losses and evaluation ----------------------------------------------------------------------


def test_the_weighted_sum_uses_the_tasks_weights(tiny):
    losses = {"segmentation": torch.tensor(2.0), "depth": torch.tensor(30.0)}
    weights = {name: task.loss_weight for name, task in tiny.tasks.items()}
    assert weighted_sum(weights, losses).item() == pytest.approx(2.0 + 0.1 * 30.0)
    tensors = {"segmentation": torch.tensor(0.5), "depth": torch.tensor(0.25)}
    assert weighted_sum(tensors, losses).item() == 0.5 * 2.0 + 0.25 * 30.0


def test_metrics_of_batches_equal_metrics_of_the_whole(tiny):
    torch.manual_seed(0)
    network = build_network(tiny.space.fix(tiny.space.base_architecture), out_channels(tiny))
    part = tiny.train.subset(range(7))
    scores = [
        evaluate(network, part, tiny.tasks, batch_size=size, device=CPU) for size in (7, 3, 1)
    ]
    assert set(scores[0]) == set(tiny.tasks)
    for other in scores[1:]:
        for task, values in scores[0].items():
            assert other[task] == pytest.approx(values, rel=1e-5)
    assert not network.training
    assert 0 < accuracy_of(tiny.tasks, scores[0]) < 10


def test_task_losses_are_one_finite_number_per_task(tiny):
    torch.manual_seed(0)
    network = build_network(tiny.space.fix(tiny.space.base_architecture), out_channels(tiny))
    batch = batch_of(tiny)
    losses = task_losses(tiny.tasks, network(batch["image"]), batch)
    assert set(losses) == set(tiny.tasks)
    assert all(loss.shape == () and loss > 0 for loss in losses.values())


# Learning rate ------------------------------------------------------------------------------


def test_the_learning_rate_rises_then_follows_half_a_cosine():
    config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.1)
    rates = [config.rate_at(step, 110) for step in range(111)]
    assert rates[:11] == pytest.approx([(step + 1) / 12 for step in range(11)])
    progress = np.arange(100) / 99
    expected = 0.5 * (1 + np.cos(np.pi * progress))
    assert rates[11:] == pytest.approx(expected)
    assert rates[60] == pytest.approx(expected[49])
    assert rates[110] == pytest.approx(0, abs=1e-9)


def test_without_warm_up_the_first_rate_is_the_full_one():
    config = OptimizerConfig(learning_rate=0.5, warmup_fraction=0.0)
    assert config.rate_at(0, 10) == 0.5
    assert config.rate_at(5, 10) == pytest.approx(0.25)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = config.build([parameter])
    assert optimizer.defaults["weight_decay"] == config.weight_decay
    config.apply(optimizer, 5, 10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


def test_only_the_group_of_the_weights_follows_the_schedule():
    config = OptimizerConfig(learning_rate=0.5, warmup_fraction=0.0)
    optimizer = config.build([torch.nn.Parameter(torch.zeros(2))])
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.125})
    config.apply(optimizer, 5, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.25), 0.125]


def test_the_poly_schedule_is_a_power_of_the_steps_that_are_left():
    config = OptimizerConfig(learning_rate=2.0, schedule="poly", warmup_fraction=0.0)
    rates = [config.rate_at(step, 8) for step in (0, 2, 4, 8)]
    assert rates == pytest.approx([2.0, 2 * 0.75**0.9, 2 * 0.5**0.9, 0.0])
    assert rates[2] == pytest.approx(1.0717735)
    risen = OptimizerConfig(learning_rate=1.0, schedule="poly", warmup_fraction=0.2)
    rates = [risen.rate_at(step, 10) for step in (0, 1, 2, 6)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5**0.9])


def test_sgd_steps_by_its_momentum():
    config = OptimizerConfig(
        kind="sgd", learning_rate=0.1, momentum=0.5, weight_decay=0.2, warmup_fraction=0.0
    )
    parameter = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = config.build([parameter])
    velocity, expected = 0.0, 1.0
    for _ in range(3):
        optimizer.zero_grad()
        (3 * parameter).sum().backward()
        optimizer.step()
        velocity = 0.5 * velocity + 3 + 0.2 * expected
        expected -= 0.1 * velocity
        assert parameter.item() == pytest.approx(expected)


def test_groups_scale_the_rate_and_those_added_later_keep_their_own():
    config = OptimizerConfig(learning_rate=0.5, warmup_fraction=0.0)
    first, second, third, own = (torch.nn.Parameter(torch.zeros(2)) for _ in range(4))
    groups = [
        {"params": [first]},
        {"params": [second], "lr_scale": 0.5},
        {"params": [third], "lr_scale": 2.0},
    ]
    optimizer = config.build(groups)
    optimizer.add_param_group({"params": [own], "lr": 0.125})
    config.apply(optimizer, 5, 10)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [pytest.approx(0.25), pytest.approx(0.125), pytest.approx(0.5), 0.125]
    config.apply(optimizer, 0, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25, 1.0, 0.125]
    with pytest.raises(ValueError, match="lr_scale: expected a positive number, got 0"):
        config.build([{"params": [first], "lr_scale": 0.0}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "expected learning_rate > 0"),
        ({"learning_rate": math.nan}, "expected learning_rate > 0"),
        ({"weight_decay": -1.0}, "weight_decay >= 0"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm > 0"),
        ({"warmup_fraction": 1.0}, "warmup_fraction: expected 0 to below 1, got 1.0"),
        ({"momentum": 1.0}, "momentum: expected 0 to below 1, got 1.0"),
    ],
)
def test_optimizer_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


def test_loop_intervals_below_one_are_refused():
    for settings in ({"log_every": 0}, {"checkpoint_every": 0}):
        with pytest.raises(ValueError, match="log_every and checkpoint_every of at least 1"):
            LoopConfig(**settings)


# The log and the loop -----------------------------------------------------------------------


GUARD = StepGuard("s", max_skipped=0)


def one(_step: int) -> dict[str, float]:
    return {"x": 1.0}


def logged(folder) -> list[tuple[str, int]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(entry["stage"], entry["step"]) for entry in map(json.loads, lines)]


def loop(folder, *, take_step, start=0, total=6, config=None, stage="s", saved=None):
    saved = [] if saved is None else saved
    with StageLog(folder, stage, total=total, start=start) as log:
        run_steps(
            log,
            take_step,
            saved.append,
            lambda values: f"{values['x']:.1f}",
            config or LoopConfig(log_every=2, checkpoint_every=4),
            StepGuard(stage, max_skipped=0),
        )
    return saved, log


def test_the_loop_logs_and_saves_at_its_intervals_and_at_the_end(tmp_path):
    steps = []
    saved, log = loop(tmp_path, take_step=lambda step: steps.append(step) or {"x": step})
    assert steps == [0, 1, 2, 3, 4, 5]
    assert saved == [4, 6]
    assert logged(tmp_path) == [("s", 0), ("s", 2), ("s", 4), ("s", 5)]
    assert log.seconds > 0
    assert list((tmp_path / "tensorboard" / "s").iterdir())


def test_numbers_that_are_not_finite_are_null_in_the_log_and_gaps_in_its_curves(tmp_path):
    losses = [1.0, math.nan, math.inf]
    every = LoopConfig(log_every=1, checkpoint_every=9)
    loop(tmp_path, take_step=lambda step: {"x": losses[step]}, config=every, total=3)
    path = tmp_path / "metrics.jsonl"

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [row["x"] for row in rows] == [1.0, None, None]
    steps, values = RunLog.read(path).curve("s", "x")
    np.testing.assert_equal(steps, [0, 1, 2])
    np.testing.assert_equal(values, [1.0, math.nan, math.nan])


def test_a_resumed_stage_drops_the_lines_of_the_steps_that_it_takes_again(tmp_path):
    every = LoopConfig(log_every=1, checkpoint_every=1)
    loop(tmp_path, take_step=lambda step: {"x": 1}, stage="other", config=every, total=2)
    loop(tmp_path, take_step=lambda step: {"x": 1.0}, config=every, total=5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "s", "st')  # torn by a crash
    loop(tmp_path, take_step=lambda step: {"x": 2.0}, config=every, start=3, total=5)
    assert logged(tmp_path) == [("other", 0), ("other", 1), *(("s", i) for i in range(5))]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["x"] for line in lines if line["stage"] == "s"] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_stops(tmp_path, number):
    before = signal.getsignal(number)
    steps, saved = [], []

    def take_step(step):
        steps.append(step)
        if step == 2:
            os.kill(os.getpid(), number)
        return {"x": torch.tensor(1.0)}

    with (
        StageLog(tmp_path, "s", total=6) as log,
        pytest.raises(Interrupted, match="stopped after step 3 of 6 in s"),
    ):
        run_steps(log, take_step, saved.append, lambda values: "", LoopConfig(), GUARD)
    assert (steps, saved) == ([0, 1, 2], [3])
    assert signal.getsignal(number) == before


def test_a_signal_while_the_checkpoint_is_written_does_not_stop_without_one(tmp_path):
    saved = []

    def describe(values):
        # Runs between the step and its checkpoint; the last moment that must still save.
        os.kill(os.getpid(), signal.SIGINT)
        return ""

    with StageLog(tmp_path, "s", total=6) as log, pytest.raises(Interrupted, match="step 1 of 6"):
        run_steps(log, lambda step: {"x": 1.0}, saved.append, describe, LoopConfig(), GUARD)
    assert saved == [1]


def test_a_request_between_the_two_checks_of_a_step_waits_for_the_next_checkpoint(
    tmp_path, monkeypatch
):
    class Late:
        """Is set from its second reading on, as by a signal between two lines."""

        reads = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        @property
        def is_set(self):
            self.reads += 1
            return self.reads > 1

    monkeypatch.setattr("oneshot_ednas.training.StopRequest", Late)
    saved = []
    with StageLog(tmp_path, "s", total=6) as log, pytest.raises(Interrupted) as stop:
        run_steps(
            log, lambda step: {"x": 1.0}, saved.append, lambda values: "", LoopConfig(), GUARD
        )
    assert f"after step {saved[-1]} of" in str(stop.value)


def test_a_signal_in_the_last_step_stops_before_the_next_stage(tmp_path):
    def take_step(step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return {"x": 0.0}

    saved = []
    with pytest.raises(Interrupted, match="stopped after step 2 of 2"):
        loop(tmp_path, take_step=take_step, total=2, saved=saved)
    assert saved == [2]


def test_the_bar_shows_its_text_as_it_is(tmp_path):
    with StageLog(tmp_path, "s", total=2) as log:
        log.advance(1, "E[lat] 1.2/1.3 ms")
        (task,) = log._progress.tasks
        assert log._progress.columns[-1].render(task).plain == "E[lat] 1.2/1.3 ms"


def test_a_second_ctrl_c_stops_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_notes_go_to_stderr(capsys):
    note("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")
