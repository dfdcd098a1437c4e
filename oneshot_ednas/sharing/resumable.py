"""What the searches of what tasks share have in common: steps, checkpoints, and going on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from oneshot_ednas.balancing import Balancing
from oneshot_ednas.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from oneshot_ednas.data.packed import PackedSplit
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.determinism import random_state, set_random_state
from oneshot_ednas.guard import StepGuard
from oneshot_ednas.tasks import Task
from oneshot_ednas.training import LoopConfig, StageLog, run_steps, seed_step, training_batch


class StepsConfig(Protocol):
    """What a search's config has of its steps."""

    @property
    def steps(self) -> int:
        """Weight steps."""

    @property
    def batch_size(self) -> int:
        """Frames of a step."""

    @property
    def loop(self) -> LoopConfig:
        """How often to write."""


class ResumableSearch(ABC):
    """A search that can be cut after any step and ends as if it had not been."""

    stage: ClassVar[str]
    """In the log and in checkpoints."""
    kept: ClassVar[tuple[str, ...]] = ()
    """Attributes, numbers, that later steps depend on."""
    config: StepsConfig
    tasks: dict[str, Task]
    splits: Mapping[str, PackedSplit]
    augmentation: AugmentConfig
    balancing: Balancing
    seed: int
    device: torch.device
    guard: StepGuard
    step: int

    @property
    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """What is trained, by its name in checkpoints."""

    @property
    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """What trains it, by its name in checkpoints."""

    @abstractmethod
    def take_step(self, step: int) -> dict[str, float | Tensor]:
        """One weight step and what belongs to it; returns numbers to log."""

    @abstractmethod
    def phase(self, values: Mapping[str, float]) -> str:
        """Where the search is, from numbers of the log, in a few words."""

    @abstractmethod
    def logits(self) -> dict[str, Tensor]:
        """What to log as histograms, by name."""

    @abstractmethod
    def alarms(self) -> list[str]:
        """What looks wrong with the search, in words; empty if nothing does."""

    def state_dict(self) -> dict[str, Any]:
        """All state that later steps depend on."""
        return {
            "stage": self.stage,
            "step": self.step,
            "seed": self.seed,
            "num_skipped": self.guard.num_skipped,
            **{name: getattr(self, name) for name in self.kept},
            **{name: module.state_dict() for name, module in self.modules.items()},
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "balancing": self.balancing.state_dict(),
            **random_state(self.device),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: if the state is of another search, seed, network or balancing.
        """
        if state.get("stage") != self.stage:
            raise ValueError(
                f"the checkpoint is of {state.get('stage')}, not of a search of {self.stage}"
            )
        if state["seed"] != self.seed:
            raise ValueError(f"checkpoint has seed {state['seed']}, the config {self.seed}")
        try:
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"the checkpoint is of another network: {first}") from None
        self.balancing.load_state_dict(state["balancing"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
        for name in ("step", *self.kept):
            setattr(self, name, state[name])
        self.guard.num_skipped = state.get("num_skipped", 0)
        set_random_state(state, self.device)

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint file where there is one.

        Raises:
            ValueError: if it is damaged or of another run.
        """
        if has_checkpoint(checkpoint):
            self.load_state_dict(load_checkpoint(checkpoint))

    def run(
        self, folder: Path, checkpoint: Path, on_save: Callable[[], None] = lambda: None
    ) -> None:
        """Search from the current step to the end.

        Args:
            folder: the run folder, for the log.
            checkpoint: the checkpoint file to write.
            on_save: called after each checkpoint.

        Raises:
            Interrupted: after Ctrl-C, once the checkpoint is written.
            RuntimeError: if a loss is not finite.
        """

        def take_step(step: int) -> dict[str, float | Tensor]:
            seed_step(self.seed, self.stage, step)
            values = self.take_step(step)
            self.step = step + 1
            if step % (10 * self.config.loop.log_every) == 0:
                for name, logits in self.logits().items():
                    log.histogram(step, name, logits)
            return values

        def save(_: int) -> None:
            save_checkpoint(checkpoint, self.state_dict())
            on_save()

        with StageLog(folder, self.stage, total=self.config.steps, start=self.step) as log:
            run_steps(log, take_step, save, self._describe, self.config.loop, self.guard)

    def _describe(self, values: Mapping[str, float]) -> str:
        parts = [f"loss {values['loss/weights']:.3f}"]
        parts += [f"{name} {values[f'loss/{name}']:.3f}" for name in self.tasks]
        return "  ".join([*parts, self.phase(values)])

    def _batch(self, split: str, step: int) -> dict[str, Tensor]:
        return training_batch(
            self.splits[split],
            name=f"{self.stage}.{split}",
            step=step,
            batch_size=self.config.batch_size,
            seed=self.seed,
            augmentation=self.augmentation,
            device=self.device,
        )
