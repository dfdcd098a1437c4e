"""A backbone as a graph of operators, and what stands in for an operator that is skipped."""

import contextlib
import copy
import inspect
import io
from collections.abc import Iterator
from dataclasses import dataclass

import jaxtyping
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

OperatorTypes = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class Skip:
    """How a tensor follows the shape of an operator's output; no parameters.

    Maps are averaged over windows of the operator's stride, or, where its output is not
    ceil(size / stride) pixels, pooled to the size that it had when it was traced. Surplus channels
    are cut off, missing ones are zeros.
    """

    dim: int
    channels: int
    stride: tuple[int, int]
    size: tuple[int, int] | None

    def __call__(self, x: Tensor) -> Tensor:
        """From the operator's input to the shape of its output."""
        missing = self.channels - x.shape[self.dim]
        if missing < 0:
            x = x.narrow(self.dim, 0, self.channels)
        if self.size is not None:
            x = F.adaptive_avg_pool2d(x, self.size)
        elif self.stride != (1, 1):
            x = F.avg_pool2d(x, self.stride, self.stride, ceil_mode=True, count_include_pad=False)
        if missing > 0:
            dims_after = x.dim() - 1 - self.dim
            x = F.pad(x, (0, 0) * dims_after + (0, missing))
        return x


@dataclass(frozen=True)
class Operator:
    """A part of the backbone that tasks share, copy or skip."""

    name: str
    """Path of the module in the backbone."""
    kind: str
    """Its class."""
    parameters: int
    depth: int
    """Most operators on a way from the images up to it, with it: l of eq. 2."""


@dataclass(frozen=True)
class TracedBackbone:
    """The backbone's computation: nodes in running order, and the modules that they call."""

    root: nn.Module
    """A copy of the backbone, without in-place operations."""
    graph: fx.Graph
    operators: tuple[Operator, ...]
    skips: dict[str, Skip | None]
    """By the name of the node that runs an operator; None is the identity."""


class _OperatorTracer(fx.Tracer):
    def __init__(self, operator_types: OperatorTypes) -> None:
        super().__init__()
        self.operator_types = operator_types

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Operators are not looked into, as torch's own layers."""
        return isinstance(m, self.operator_types) or super().is_leaf_module(
            m, module_qualified_name
        )


def trace_backbone(
    backbone: nn.Module, example: Tensor, operator_types: OperatorTypes
) -> TracedBackbone:
    """Trace a backbone down to its operators and run it once for their shapes.

    Args:
        backbone: images to a tensor or a tuple of tensors; it is copied.
        example: images, of the size that the training has.
        operator_types: classes of modules that become operators.

    Raises:
        ValueError: if it cannot be traced, has no operator, or has one that cannot be skipped.
    """
    name = type(backbone).__name__
    root = copy.deepcopy(backbone)
    graph = _traced(root, operator_types, name)
    _without_in_place(graph, root)
    graph.lint()
    _record_shapes(graph, root, example, name)
    operators: dict[str, Operator] = {}
    skips: dict[str, Skip | None] = {}
    depths: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = max((depths[read] for read in node.all_input_nodes), default=0)
        depths[node] = before
        module = root.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(module, operator_types):
            continue
        depths[node] = before + 1
        skips[node.name] = _skip_of(node, module)
        found = Operator(
            name=str(node.target),
            kind=type(module).__name__,
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            depth=depths[node],
        )
        # A module that runs twice is one operator, at the depth of its first run.
        operators.setdefault(found.name, found)
    if not operators:
        kinds = ", ".join(kind.__name__ for kind in operator_types)
        raise ValueError(f"{name}: expected operators of {kinds}, found none; name its own types")
    return TracedBackbone(root, graph, tuple(operators.values()), skips)


def _traced(root: nn.Module, operator_types: OperatorTypes, name: str) -> fx.Graph:
    try:
        with _without_type_checks():
            graph = _OperatorTracer(operator_types).trace(root)
    except Exception as error:
        # Whatever a forward does with a symbolic tensor may fail in its own way.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} cannot be traced: {reason}; its forward must not depend on tensors' values, "
            f"or make the module that does an operator type"
        ) from error
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError(f"{name}: expected images as its one input, got {', '.join(inputs)}")
    (result,) = next(node for node in reversed(graph.nodes) if node.op == "output").args
    if not isinstance(result, fx.Node) and not (
        isinstance(result, (tuple, list)) and all(isinstance(one, fx.Node) for one in result)
    ):
        raise ValueError(
            f"{name}: expected a tensor or a tuple of tensors from its forward, got "
            f"{type(result).__name__}; wrap it in a module that gives a tuple"
        )
    return graph


@contextlib.contextmanager
def _without_type_checks() -> Iterator[None]:
    """To a type checker of arguments, a symbolic tensor is no tensor."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


# In-place operations ------------------------------------------------------------------------


def _without_in_place(graph: fx.Graph, root: nn.Module) -> None:
    """Turn in-place operations into others: tasks may read a tensor that one of them changes.

    The tracer takes `x += y` for `x = x + y`: other names of `x` keep the old value.
    """
    changed = set()
    for module in root.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
            changed.add(module)
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op == "call_module":
            is_in_place = root.get_submodule(node.target) in changed
        else:
            is_in_place = _made_pure(node)
        if is_in_place:
            # Whoever reads the changed tensor later reads the result.
            changed_tensor = node.all_input_nodes[0]
            for user in list(changed_tensor.users):
                if order[user] > order[node]:
                    user.replace_input_with(changed_tensor, node)


def _made_pure(node: fx.Node) -> bool:
    """Replace the target of an in-place function or method; whether there was one."""
    if node.op == "call_method":
        method = str(node.target)
        if not method.endswith("_") or method.endswith("__"):
            return False
        if not hasattr(Tensor, method[:-1]):
            raise ValueError(f"the backbone changes a tensor by {method}; use a pure operation")
        node.target = method[:-1]
        return True
    if node.op != "call_function":
        return False
    assert callable(node.target)
    name = getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__") and hasattr(torch, name[:-1]):
        node.target = getattr(torch, name[:-1])
        return True
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a builtin, which has no signature and no such flag
        return False
    if given.arguments.get("inplace") is not True:
        return False
    given.arguments["inplace"] = False
    node.args, node.kwargs = given.args, given.kwargs
    return True


# Shapes -------------------------------------------------------------------------------------


def _record_shapes(graph: fx.Graph, root: nn.Module, example: Tensor, name: str) -> None:
    modes = [(module, module.training) for module in root.modules()]
    # BN must neither see the example nor fail at a batch of one.
    root.eval()
    parameter = next(root.parameters(), example)
    runner = ShapeProp(fx.GraphModule(root, graph))
    try:
        # It would print what is raised here anyway.
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            runner.propagate(example[:1].to(parameter.device))
    except RuntimeError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(
            f"{name} does not run on an example of shape {list(example.shape)}: {reason}; give "
            f"images of the size to train on"
        ) from error
    for module, mode in modes:
        module.training = mode


def _skip_of(node: fx.Node, module: nn.Module) -> Skip | None:
    """What stands in for an operator; None where the shape stays."""
    reads = node.all_input_nodes
    shapes = [_shape(one) for one in (*reads, node)]
    if len(reads) != 1 or any(shape is None for shape in shapes):
        raise ValueError(
            f"operator {node.target} ({type(module).__name__}) takes {len(reads)} inputs; expected "
            f"one tensor in and one out; choose operator types inside it"
        )
    before, after = shapes
    assert before is not None
    assert after is not None
    if before == after and _strides(module) == (1, 1):
        return None
    dim = len(after) - 1 if isinstance(module, nn.Linear) else 1
    is_map = len(after) == 4 and dim == 1
    others = [i for i in range(len(after)) if i != dim and not (is_map and i > 1)]
    if len(before) != len(after) or len(after) < 2 or any(before[i] != after[i] for i in others):
        raise ValueError(
            f"operator {node.target} ({type(module).__name__}) turns {list(before)} into "
            f"{list(after)}, which skipping it cannot follow; choose operator types without it"
        )
    if not is_map:
        return Skip(dim, after[dim], (1, 1), None)
    (height, width), size = before[2:], (after[2], after[3])
    for stride in (_strides(module), (-(-height // size[0]), -(-width // size[1]))):
        if size == (-(-height // stride[0]), -(-width // stride[1])):
            return Skip(dim, after[dim], stride, None)
    return Skip(dim, after[dim], (1, 1), size)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    found = node.meta.get("tensor_meta")
    return tuple(found.shape) if isinstance(found, TensorMetadata) else None


def _strides(module: nn.Module) -> tuple[int, int]:
    """As the module says; at a map of one pixel, shapes do not tell."""
    stride = getattr(module, "stride", 1)
    if isinstance(stride, int):
        return stride, stride
    return (stride[0], stride[1]) if isinstance(stride, tuple) and len(stride) == 2 else (1, 1)
