"""Steps on a device that does not exist, run by `test_devices`; prints where the host waited.

A device of torch's `privateuseone` has a name and no kernels. In fake mode tensors have shapes and
a device and no values, so whatever mixes devices raises as it would on a GPU, and whatever reads a
value is seen. It takes a process of its own, since torch has one such device per process.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tiny import FAST, TARGET_MS, Tiny, make_tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

import oneshot_ednas
from oneshot_ednas import retrain, search
from oneshot_ednas.balancing import BalancingConfig
from oneshot_ednas.data.transforms import AugmentConfig
from oneshot_ednas.models.network import build_network
from oneshot_ednas.relaxation import ArchitectureParameters
from oneshot_ednas.retrain import RetrainConfig, StandAloneTraining
from oneshot_ednas.search import LatencyLossConfig, OneShotSearch, SearchConfig

PACKAGE = Path(oneshot_ednas.__file__).parent
NAME = "simulated"
AUGMENT = AugmentConfig(flip=True, scale=(0.8, 1.3), brightness=0.2, contrast=0.1, colour=0.1)


class HostReads(TorchDispatchMode):
    """Answers whoever reads a value, and notes the function of the package that did."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(self._without_values, (args, kwargs or {}))
        if (generator := kwargs.get("generator")) is not None:
            drawn = args[0].device if isinstance(args[0], torch.Tensor) else kwargs.get("device")
            assert drawn in (None, generator.device), f"{generator.device} draws for {drawn}"
            kwargs["generator"] = None  # fake mode draws nothing, and knows none
        if func is not torch.ops.aten._local_scalar_dense.default:
            return func(*args, **kwargs)
        if args[0].device.type == NAME:
            self.places.append(self._place())
        return {torch.bool: True, torch.long: 1}.get(args[0].dtype, 1.0)

    def _without_values(self, value):
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            return self.fake.from_tensor(value)
        return value

    def _place(self) -> str:
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if path.is_relative_to(PACKAGE):
                return f"{path.relative_to(PACKAGE)}:{frame.name}"
        return "outside"


class Backend(_DummyBackendModule):
    """What autocast asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def with_values(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Builds a module as ever; once it is moved to the device it has no values."""

    def build(*args, **kwargs) -> nn.Module:
        with _disable_current_modes():
            return make(*args, **kwargs)

    return build


def make_search(tiny: Tiny, **settings) -> OneShotSearch:
    plain = {"steps": 6, "batch_size": 4, "optimizer": FAST, "warmup_fraction": 0.0}
    return OneShotSearch(
        SearchConfig(**plain | settings),
        tiny.space,
        tiny.tasks,
        tiny.table,
        target_ms=TARGET_MS,
        splits={"weights": tiny.train.subset(range(16)), "alpha": tiny.train.subset(range(16, 24))},
        augmentation=AUGMENT,
        seed=0,
        device=torch.device(NAME),
    )


def make_training(tiny: Tiny, **settings) -> StandAloneTraining:
    return StandAloneTraining(
        RetrainConfig(steps=6, batch_size=4, **settings),
        tiny.space,
        tiny.space.base_architecture,
        tiny.tasks,
        tiny.train,
        stage="one",
        augmentation=AUGMENT,
        seed=0,
        device=torch.device(NAME),
    )


FIXED = LatencyLossConfig(schedule="fixed")
KINDS: dict[str, Callable[[Tiny], object]] = {
    "mixing": lambda tiny: torch.ones(3, device=NAME) + torch.ones(3),
    "reading": lambda tiny: float(torch.ones((), device=NAME)),
    "retrain": lambda tiny: make_training(tiny).take_step(0),
    "uncertainty": lambda tiny: make_training(
        tiny, balancing=BalancingConfig(method="uncertainty")
    ).take_step(0),
    "dwa": lambda tiny: make_training(tiny, balancing=BalancingConfig(method="dwa")).take_step(0),
    "weights": lambda tiny: make_search(
        tiny, warmup_fraction=0.5, distillation=True, num_paths=2
    ).take_step(0),
    "alpha": lambda tiny: make_search(tiny)._alpha_step(0),
    "joint": lambda tiny: make_search(tiny, mode="joint", sandwich=False, latency=FIXED).take_step(
        0
    ),
}


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    search.build_network = retrain.build_network = with_values(build_network)
    search.ArchitectureParameters = with_values(ArchitectureParameters)
    tiny, results = make_tiny(), {}
    for kind in sys.argv[1:]:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, HostReads(fake) as reads:
            # Else a constant goes to the device, which has no kernels, before fake mode sees it.
            torch._C._set_only_lift_cpu_tensors(True)
            try:
                KINDS[kind](tiny)
                error = None
            except Exception:
                error = traceback.format_exc()
        results[kind] = {"error": error, "reads": reads.places}
    print(json.dumps(results))
