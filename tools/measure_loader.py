"""How many times as fast as a training step the input pipeline is, in one run.

    python tools/measure_loader.py configs/nyuv2_256x192.yaml --data DIR

The loader alone: batches of the training split, packed on disk, with the config's augmentation. The
step: forward, backward and optimizer of the base network on such batches, loading included. Both in
CPU seconds of one process on the CPU, and in seconds of the clock on a GPU.
"""

import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from oneshot_ednas.cli.common import bad_input, data_option, with_data
from oneshot_ednas.config import load_config
from oneshot_ednas.data.source import load_data
from oneshot_ednas.retrain import StandAloneTraining
from oneshot_ednas.space import named_space
from oneshot_ednas.tasks import make_tasks
from oneshot_ednas.training import choose_device, training_batch


@click.command()
@click.argument("config")
@data_option
@click.option("--batches", default=40, show_default=True, help="Batches to load.")
@click.option("--steps", default=10, show_default=True, help="Steps to train.")
@bad_input
def main(config: str, data: Path | None, batches: int, steps: int) -> None:
    """Print samples per second of the loader and of the training, and their ratio."""
    loaded = with_data(load_config(Path(config)), data)
    device = choose_device(loaded.device)
    tasks = make_tasks(loaded.tasks)
    train, _ = load_data(loaded.data, tasks)
    space = named_space(loaded.space)
    settings, augmentation = loaded.retrain, loaded.data.augment
    training = StandAloneTraining(
        settings,
        space,
        space.base_architecture,
        tasks,
        train,
        stage="measure",
        augmentation=augmentation,
        seed=0,
        device=device,
    )

    def load(step: int) -> None:
        training_batch(
            train,
            name="measure",
            step=step,
            batch_size=settings.batch_size,
            seed=0,
            augmentation=augmentation,
            device=device,
        )

    loading = settings.batch_size / _seconds(load, batches, device)
    learning = settings.batch_size / _seconds(training.take_step, steps, device)
    print(f"loader    {loading:8.0f} samples/s")
    print(f"training  {learning:8.0f} samples/s")
    print(f"ratio     {loading / learning:8.1f}")


def _seconds(work: Callable[[int], object], count: int, device: torch.device) -> float:
    """Seconds per call, after one that is not counted."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    work(0)
    _finish(device)
    start = clock()
    for step in range(1, count + 1):
        work(step)
    _finish(device)
    return (clock() - start) / count


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
