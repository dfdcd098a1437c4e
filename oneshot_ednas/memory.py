"""How much memory a training needs, told before its first step, and what it took at its peak.

The estimate runs one step on the meta device, where tensors have shapes and no values, and follows
what is alive: weights, gradients, what autograd saves, and temporaries. Nothing is trained and no
large memory is taken, so that a training that does not fit is known before it is begun.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from oneshot_ednas import distributed
from oneshot_ednas.architecture import Architecture
from oneshot_ednas.peak_memory import PeakMemory, free_memory, gib, resident_memory
from oneshot_ednas.retrain import NetworkTraining
from oneshot_ednas.search import OneShotSearch
from oneshot_ednas.sharing.branched import RouteGates, Routes
from oneshot_ednas.sharing.branching_search import BranchingSearch
from oneshot_ednas.sharing.operator_search import OperatorSearch
from oneshot_ednas.space import SearchSpace
from oneshot_ednas.tasks import Task
from oneshot_ednas.training import Precision, note, task_losses, weighted_sum

Training = OneShotSearch | NetworkTraining | BranchingSearch | OperatorSearch
_CPU_CONSTANT = 64 * 2**20
_CPU_SHARE = 0.08
# What a step on a CPU takes beyond its tensors, for kernels that are compiled and blocks that the
# allocator keeps: this much, and this share of the activations. Fitted to six trainings.


class NoEstimateError(RuntimeError):
    """A network or a task does not run on the meta device, where tensors have no values."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a training needs at its peak, on the device of its weights."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    """State of the optimizer."""
    activations: int
    """What the forward pass leaves for the backward pass, losses included."""
    batch: int
    workspace: int
    """Temporaries at the peak; those inside a kernel, such as cuDNN's, are not known."""
    process: int
    """What the process held before, but the weights; 0 on a GPU."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def text(self, device: torch.device) -> str:
        """One line."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        named = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size >= 2**20)
        return f"this needs about {gib(self.total)} on {device} ({named})"

    def shortage(self, device: torch.device) -> str | None:
        """A warning where the device has not that much free, else None; also if nobody knows."""
        free = free_memory(device)
        # What the process and the weights take is no longer free.
        missing = self.total - self.process - self.weights
        if free is None or missing <= free:
            return None
        return (
            f"{device} has {gib(free)} free and this needs about {gib(missing)} more; lower the "
            f"batch size or the image size, or free memory"
        )


# The estimate -------------------------------------------------------------------------------


def estimate_memory(training: Training) -> MemoryEstimate:
    """Peak of the steps of a training or a search, whatever the search draws.

    A weight step runs its architectures one after the other, so the largest of them counts and not
    their sum; an alpha step runs the mixture while the weights' gradients are held still.

    Args:
        training: at any step.

    Raises:
        NoEstimateError: if the network or a task's loss needs values.
    """
    network: nn.Module
    if isinstance(training, OneShotSearch):
        network, steps = training.supernet, _search_steps(training)
    elif isinstance(training, NetworkTraining):
        network, steps = training.network, [_Step(batch_size=_own(training.config.batch_size))]
    elif isinstance(training, BranchingSearch):
        network, steps = training.network, _branching_steps(training)
    else:
        # Pre-training runs every operator of every task, and so do the steps of the policy.
        gates = training.supermodel.pretraining_gates()
        step = _Step(batch_size=_own(training.config.batch_size), args=(gates,))
        network, steps = training.supermodel, [step]
    split = training.split if isinstance(training, NetworkTraining) else training.splits["weights"]
    # The searches of what tasks share have no choice of it.
    precision: Precision = getattr(training.config, "precision", "float32")
    peaks = [_peak(network, training.tasks, split.batch([0]), step, precision) for step in steps]
    largest = max(peaks, key=lambda peak: peak.total)
    weights = _num_bytes([*network.parameters(), *network.buffers()])
    trained = [p for group in training.optimizer.param_groups for p in group["params"]]
    gradients = _num_bytes(trained)
    # An update has temporaries of its own, but no activations beside it.
    update = _update_bytes(training.optimizer, trained) - largest.activations
    workspace, process = max(largest.workspace, update), 0
    if training.device.type == "cpu":
        workspace += _CPU_CONSTANT + int(_CPU_SHARE * largest.activations)
        process = max(resident_memory() - weights, 0)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=_state_copies(training.optimizer) * gradients,
        activations=largest.activations,
        batch=largest.batch,
        workspace=workspace,
        process=process,
    )


def _own(batch_size: int) -> int:
    """Frames of a batch that are this process's."""
    return batch_size // distributed.count()


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A forward and a backward pass."""

    batch_size: int
    args: tuple[Any, ...] = ()
    """Of the network's forward, after the images."""
    batches: int = 1
    """Copies of the batch that are held."""
    trains_weights: bool = True
    """Else the gradient goes to the tensors among `args`."""
    tasks: tuple[str, ...] | None = None
    """Those whose losses count; None for all."""


@dataclass(frozen=True, kw_only=True)
class _Peak:
    """Bytes of a step beside weights, gradients and optimizer."""

    activations: int
    batch: int
    workspace: int

    @property
    def total(self) -> int:
        return self.activations + self.batch + self.workspace


def _search_steps(search: OneShotSearch) -> list[_Step]:
    """The weight steps of the largest architectures, and the alpha step."""
    size, is_joint = _own(search.config.batch_size), search.config.mode == "joint"
    steps = []
    if not is_joint or search.config.warmup_steps > 0:
        steps = [_Step(batch_size=size, args=(one,)) for one in _largest_of_each_op(search.space)]
    relaxed = _Step(
        args=(search.alpha.probabilities(),),
        batch_size=2 * size if is_joint else size,
        batches=2 if is_joint else 1,  # the two halves are held beside the whole
        trains_weights=is_joint,
    )
    return [*steps, relaxed]


def _branching_steps(search: BranchingSearch) -> list[_Step]:
    """All tasks along candidates of their own, and one task's mixture of all candidates."""
    num_tasks, num_layers, _ = search.parameters.routes.shape
    own = tuple((task,) * num_layers for task in range(num_tasks))
    size, space = search.config.batch_size, search.encoder.space
    options: list[tuple[Architecture, ...] | None] = [None]
    if search.parameters.candidates:
        assert space is not None
        options = [(one,) * num_tasks for one in _largest_of_each_op(space)]
    steps = [_Step(batch_size=size, args=(Routes(own, drawn),)) for drawn in options]
    first = next(iter(search.tasks))
    mixture = _Step(
        batch_size=size,
        args=(search.parameters.probabilities(), (first,)),
        tasks=(first,),
        trains_weights=search.config.gates == "soft",
    )
    return [*steps, mixture]


def _largest_of_each_op(space: SearchSpace) -> list[Architecture]:
    """The largest architecture with one op everywhere where that is an option, for each op."""
    ops = dict.fromkeys(op for block in space.blocks for op in block.ops)
    found = []
    for op in ops:
        indices = [
            choice.options.index(op) if choice.field == "op" and op in choice.options else index
            for index, choice in zip(
                space.encode(space.base_architecture), space.choices, strict=True
            )
        ]
        found.append(space.extreme(space.decode(indices), largest=True))
    return list(dict.fromkeys(found))


def _peak(
    network: nn.Module,
    tasks: Mapping[str, Task],
    frame: Mapping[str, Tensor],
    step: _Step,
    precision: Precision,
) -> _Peak:
    """Follow a step on the meta device."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    held: dict[str, Tensor] = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        moved = _on_meta(tensor, dtype)
        if tensor.requires_grad and step.trains_weights:
            # Gradients are there already: those of the architecture before, in a weight step.
            moved.grad = torch.empty_like(moved)
        held[name] = moved.requires_grad_(tensor.requires_grad)
    args = tree_map(partial(_leaf, dtype=dtype), step.args)
    counted = {name: tasks[name] for name in step.tasks or tasks}
    batch = {
        name: torch.empty((step.batch_size, *rows.shape[1:]), dtype=rows.dtype, device="meta")
        for name, rows in frame.items()
    }
    images = batch["image"].to(dtype)
    with _LiveBytes() as live:
        try:
            outputs = functional_call(network, held, (images, *args))
            losses = task_losses(counted, outputs, batch)
            loss = weighted_sum(dict.fromkeys(counted, 1.0), losses)
            activations = live.now
            if step.trains_weights:
                loss.backward()
            else:
                gates = [x.tensors if isinstance(x, RouteGates) else x for x in args]
                leaves = [x for x in tree_leaves(gates) if isinstance(x, Tensor)]
                torch.autograd.grad(loss, leaves, allow_unused=True)
        except (NotImplementedError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise NoEstimateError(f"it does not run without values: {reason}") from error
    return _Peak(
        activations=activations,
        batch=step.batches * _num_bytes(batch.values()),
        # Autocast keeps the cast weights until the end of the step.
        workspace=live.peak
        - activations
        + (_num_bytes(held.values()) if dtype.itemsize < 4 else 0),
    )


def _leaf(value: object, dtype: torch.dtype) -> object:
    """Gates without values, whose gradient is asked for; other things as they are."""
    if isinstance(value, RouteGates):
        return value.with_tensors([_on_meta(x, dtype).requires_grad_() for x in value.tensors])
    return _on_meta(value, dtype).requires_grad_() if isinstance(value, Tensor) else value


def _on_meta(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    wanted = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, device="meta", dtype=wanted, requires_grad=False)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _state_copies(optimizer: torch.optim.Optimizer) -> int:
    """Tensors of a weight's size that the optimizer keeps for each."""
    if isinstance(optimizer, torch.optim.SGD):
        return int(optimizer.param_groups[0]["momentum"] > 0)
    return 2


def _update_bytes(optimizer: torch.optim.Optimizer, trained: Sequence[Tensor]) -> int:
    """Temporaries of an update: of all weights at a time where torch does them at a time."""
    group = optimizer.param_groups[0]
    if group.get("fused"):
        return 0
    is_foreach = group.get("foreach") or (group.get("foreach") is None and trained[0].is_cuda)
    sizes = [_num_bytes([parameter]) for parameter in trained]
    return sum(sizes) if is_foreach else 2 * max(sizes)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, from then on until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # What an operation changes in place or looks at anew is among its arguments' storages.
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._held:
                    size = storage.nbytes()
                    self._held[key] = weakref.ref(storage, partial(self._free, key)), size
                    self.now += size
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, _: object) -> None:
        self.now -= self._held.pop(key)[1]


# Around a stage ------------------------------------------------------------------------------


@contextmanager
def watched_memory(
    stage: str, device: torch.device, estimate: Callable[[], MemoryEstimate]
) -> Iterator[dict[str, int | None]]:
    """Tell what a stage needs before it, and what it took after it.

    Args:
        stage: its name, for the lines.
        device: where it runs.
        estimate: of the stage.

    Yields:
        `estimated` and, after the block, `peak`, in bytes; None for what is not known.
    """
    figures: dict[str, int | None] = {"estimated": None, "peak": None}
    try:
        found = estimate()
    except NoEstimateError as reason:
        note(f"{stage}: memory is not estimated: {reason}")
    else:
        figures["estimated"] = found.total
        note(f"{stage}: {found.text(device)}")
        if shortage := found.shortage(device):
            note(f"{stage}: warning: {shortage}")
    measured = PeakMemory(device)
    try:
        with measured:
            yield figures
    finally:
        figures["peak"] = measured.peak
        expected = figures["estimated"]
        beside = "" if expected is None else f" (estimated {gib(expected)})"
        note(f"{stage}: peak memory {gib(measured.peak)}{beside}")
