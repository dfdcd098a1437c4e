"""A torch module as a short list of operations that the Edge TPU knows.

`torch.export` gives the module's ATen graph. Here batch normalisation is folded into the
convolution before it, ReLU and ReLU6 are fused, zero padding becomes the convolution's own, and
what only parameters feed (slices of elastic weights, for example) is computed once. Anything else
is an error that names the operation and the module it stands in.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

Shape = tuple[int, int, int, int]
"""Batch, channels, height, width."""
Activation = Literal["relu", "relu6"]
Padding = tuple[int, int, int, int]
"""Left, right, top, bottom."""

_aten = torch.ops.aten
_IDENTITIES = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.detach.default,
    _aten.dropout.default,  # the module is in evaluation mode
}
_ACTIVATIONS: Mapping[Any, Activation] = {
    _aten.relu.default: "relu",
    _aten.relu_.default: "relu",
    _aten.relu6.default: "relu6",
    _aten.relu6_.default: "relu6",
    _aten.hardtanh.default: "relu6",
    _aten.hardtanh_.default: "relu6",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Op:
    """One operation; it writes one tensor, of the same name."""

    name: str
    """A path such as `backbone/block_4/branches/ibn/expand`."""
    inputs: tuple[str, ...]
    """Names of the tensors it reads."""
    shape: Shape
    """Of the tensor it writes."""

    def compute(self, *inputs: Tensor) -> Tensor:
        """The result in float."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class Conv(Op):
    """Convolution with bias, BN folded in."""

    weight: Tensor
    """`[out, in / groups, kernel, kernel]`."""
    bias: Tensor
    """`[out]`."""
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    padding: Padding = (0, 0, 0, 0)
    activation: Activation | None = None

    @property
    def is_depthwise(self) -> bool:
        """One filter per channel."""
        return self.groups > 1 and self.groups == self.weight.shape[0] and self.weight.shape[1] == 1

    def compute(self, *inputs: Tensor) -> Tensor:
        """The result in float."""
        x = F.pad(inputs[0], self.padding) if any(self.padding) else inputs[0]
        y = F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        return _activate(y, self.activation)


@dataclass(frozen=True, kw_only=True, eq=False)
class Add(Op):
    """Sum of two tensors of one shape."""

    activation: Activation | None = None

    def compute(self, *inputs: Tensor) -> Tensor:
        """The result in float."""
        return _activate(inputs[0] + inputs[1], self.activation)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool(Op):
    """Pooling over the pixels that exist: padding is never part of a maximum or a mean."""

    mode: Literal["max", "average"]
    kernel_size: int
    stride: int

    def compute(self, *inputs: Tensor) -> Tensor:
        """The result in float."""
        arguments: Any = {"kernel_size": self.kernel_size, "stride": self.stride, "ceil_mode": True}
        if self.mode == "max":
            y = F.max_pool2d(inputs[0], **arguments)
        else:
            y = F.avg_pool2d(inputs[0], **arguments, count_include_pad=False)
        return y[..., : self.shape[2], : self.shape[3]]  # without ceil_mode the rest is dropped


@dataclass(frozen=True, kw_only=True, eq=False)
class Resize(Op):
    """Resampling to another height and width."""

    mode: Literal["nearest", "bilinear"]
    align_corners: bool = False

    def compute(self, *inputs: Tensor) -> Tensor:
        """The result in float."""
        corners = {"align_corners": self.align_corners} if self.mode == "bilinear" else {}
        return F.interpolate(inputs[0], size=self.shape[2:], mode=self.mode, **corners)


@dataclass(frozen=True, kw_only=True, eq=False)
class Relu(Op):
    """An activation that stands alone, since its input is read by others too."""

    activation: Activation

    def compute(self, *inputs: Tensor) -> Tensor:
        """The result in float."""
        return _activate(inputs[0], self.activation)


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """Operations in order of execution, from named inputs to named outputs."""

    inputs: Mapping[str, Shape]
    ops: tuple[Op, ...]
    outputs: Mapping[str, str]
    """Public name to tensor name, for example `segmentation` to its classifier."""

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor, inputs first."""
        return {**self.inputs, **{op.name: op.shape for op in self.ops}}

    def tensors(self, *inputs: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name as it is computed in float; dropped once it is read out.

        Args:
            inputs: one batch `[batch, channels, height, width]` per graph input.

        Raises:
            ValueError: for another number of inputs or other sizes.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"expected {len(self.inputs)} inputs, got {len(inputs)}")
        last_use = {name: i for i, op in enumerate(self.ops) for name in op.inputs}
        values: dict[str, Tensor] = {}
        for (name, shape), value in zip(self.inputs.items(), inputs, strict=True):
            if value.dim() != 4 or tuple(value.shape[1:]) != shape[1:]:
                raise ValueError(
                    f"{name}: expected [batch, {', '.join(map(str, shape[1:]))}], "
                    f"got {list(value.shape)}"
                )
            values[name] = value
            yield name, value
        for i, op in enumerate(self.ops):
            values[op.name] = op.compute(*(values[name] for name in op.inputs))
            yield op.name, values[op.name]
            for name in {*op.inputs, op.name}:
                if last_use.get(name, -1) <= i:
                    del values[name]

    @torch.no_grad()
    def run(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Every tensor by name, in float."""
        return dict(self.tensors(*inputs))


def trace(module: nn.Module, *shapes: Shape) -> Graph:
    """The graph of a module in evaluation mode.

    Args:
        module: its forward takes one tensor per shape and returns a tensor (then the output is
            named `output`), or a dict, tuple or list of tensors.
        shapes: batch, channels, height and width of each input; a deployed model has batch 1.

    Raises:
        ValueError: for an operation that the exporter does not know, with the module it is in.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    examples = tuple(torch.zeros(shape, device=device) for shape in shapes)
    try:
        program = torch.export.export(module, examples, strict=False)
    finally:
        for part, mode in modes:  # not module.train(), which would wake frozen parts
            part.training = mode
    return _Tracer(module, program).graph()


class _Tracer:
    """One walk over an exported program."""

    def __init__(self, module: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.module, self.program = module, program
        self.ops: dict[str, Op] = {}
        self.inputs: dict[str, Shape] = {}
        self.taken: set[str] = set()
        # What each node of the program stands for: a tensor's name, or a constant.
        self.tensor_of: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.constant_names: dict[str, str] = {}
        self.pending_pads: dict[str, tuple[str, Padding]] = {}
        # The node whose result a tensor is, which moves on as batch norm and activation merge.
        self.result_of: dict[str, Node] = {}

    def graph(self) -> Graph:
        """Walk the program."""
        self.live = _live_nodes(self.program.graph)
        outputs: dict[str, str] = {}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "output":
                outputs = self._outputs(node)
            elif node in self.live:
                self._call(node)
        return Graph(inputs=self.inputs, ops=tuple(self.ops.values()), outputs=outputs)

    # Nodes ----------------------------------------------------------------------------------

    def _placeholder(self, node: Node) -> None:
        signature = self.program.graph_signature
        held = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        if node.name in held:
            name = held[node.name]
            source = self.program.state_dict if name in self.program.state_dict else None
            value = (source or self.program.constants)[name]
            self.constants[node.name] = cast(Tensor, value).detach().cpu()
            self.constant_names[node.name] = name
        elif "val" in node.meta and isinstance(node.meta["val"], Tensor):
            name = self._unique(node.name)
            self.inputs[name] = _shape(node)
            self.tensor_of[node.name] = name

    def _outputs(self, node: Node) -> dict[str, str]:
        spec = self.program.call_spec.out_spec
        leaves = list(cast(tuple[Node, ...], node.args[0]))
        names = list(spec.context) if spec.type is dict else []
        if len(names) != len(leaves):
            names = [f"output_{i}" for i in range(len(leaves))] if len(leaves) > 1 else ["output"]
        found = {name: self._read(node, leaf) for name, leaf in zip(names, leaves, strict=True)}
        if len(set(found.values())) < len(found) or set(found.values()) & set(self.inputs):
            raise ValueError("an output is given twice, or is an input; nothing would compute it")
        return found

    def _call(self, node: Node) -> None:
        sources = node.all_input_nodes
        if all(source.name in self.constants for source in sources):
            self._fold(node)
            return
        target = node.target
        if target in _IDENTITIES:
            self._same_as(node, sources[0])
        elif target in _ACTIVATIONS:
            self._activation(node, _ACTIVATIONS[target])
        elif handler := self._handlers().get(target):
            handler(node)
        else:
            raise ValueError(
                f"{self._where(node)}: {target} has no Edge TPU form here; the exporter knows "
                f"convolution, batch normalisation, ReLU, ReLU6, zero padding, addition, pooling, "
                f"nearest and bilinear resize"
            )

    def _handlers(self) -> dict[Any, Callable[[Node], None]]:
        return {
            _aten.conv2d.default: self._conv,
            _aten.conv2d.padding: self._conv,
            _aten.batch_norm.default: self._batch_norm,
            _aten.pad.default: self._pad,
            _aten.add.Tensor: self._add,
            _aten.add_.Tensor: self._add,
            _aten.max_pool2d.default: self._pool,
            _aten.avg_pool2d.default: self._pool,
            _aten.upsample_nearest2d.vec: self._resize,
            _aten.upsample_bilinear2d.vec: self._resize,
        }

    def _fold(self, node: Node) -> None:
        """Compute what only constants feed."""
        call = node.target if callable(node.target) else operator.getitem
        arguments = torch.fx.node.map_arg(node.args, lambda n: self.constants[n.name])
        keywords = torch.fx.node.map_arg(node.kwargs, lambda n: self.constants[n.name])
        self.constants[node.name] = call(*cast(Any, arguments), **cast(Any, keywords))
        names = [self.constant_names[n.name] for n in node.all_input_nodes]
        self.constant_names[node.name] = names[0] if names else node.name

    def _same_as(self, node: Node, source: Node) -> None:
        self.tensor_of[node.name] = self._read(node, source)

    def _activation(self, node: Node, activation: Activation) -> None:
        if node.target in (_aten.hardtanh.default, _aten.hardtanh_.default):
            ends = {"min_val": -1.0, "max_val": 1.0} | _arguments(node, "min_val", "max_val")
            if ends != {"min_val": 0.0, "max_val": 6.0}:
                raise ValueError(f"{self._where(node)}: expected a clip to 0..6, got {ends}")
        name = self._read(node, cast(Node, node.args[0]))
        op = self.ops.get(name)
        if isinstance(op, (Conv, Add)) and op.activation is None and self._is_only_reader(name):
            self._merge(node, replace(op, activation=activation))
        else:
            self._emit(node, activation, Relu, inputs=(name,), activation=activation)

    def _conv(self, node: Node) -> None:
        arguments = _arguments(node, "weight", "bias", "stride", "padding", "dilation", "groups")
        source = cast(Node, node.args[0])
        weight = self._constant(node, arguments["weight"])
        bias = arguments.get("bias")
        stride, dilation = (
            self._square(node, name, arguments.get(name, 1)) for name in ("stride", "dilation")
        )
        padding = self._conv_padding(node, arguments.get("padding", 0), weight, dilation)
        if source.name in self.pending_pads and not any(padding):
            name, padding = self.pending_pads[source.name]
        else:
            name = self._read(node, source)
        weight_node = cast(Node, arguments["weight"])
        self._emit(
            node,
            "conv",
            Conv,
            path=self.constant_names[weight_node.name].removesuffix(".weight"),
            inputs=(name,),
            weight=weight,
            bias=torch.zeros(weight.shape[0]) if bias is None else self._constant(node, bias),
            stride=stride,
            dilation=dilation,
            groups=int(arguments.get("groups", 1)),
            padding=padding,
        )

    def _conv_padding(self, node: Node, padding: Any, weight: Tensor, dilation: int) -> Padding:
        if padding == "valid":
            return (0, 0, 0, 0)
        if padding == "same":
            rows, columns = (dilation * (size - 1) for size in weight.shape[2:])
            return (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        pair = [padding] * 2 if isinstance(padding, int) else list(padding)
        rows, columns = pair[0], pair[-1]
        return (columns, columns, rows, rows)

    def _batch_norm(self, node: Node) -> None:
        name = self._read(node, cast(Node, node.args[0]))
        op = self.ops.get(name)
        if not isinstance(op, Conv) or op.activation or not self._is_only_reader(name):
            raise ValueError(
                f"{self._where(node)}: batch normalisation can only be folded into a convolution "
                f"right before it, whose output nothing else reads"
            )
        if node.args[5]:
            raise ValueError(f"{self._where(node)}: batch normalisation by batch statistics")
        mean, variance = (self._constant(node, node.args[i]).double() for i in (3, 4))
        gain = torch.rsqrt(variance + cast(float, node.args[7]))
        if node.args[1] is not None:
            gain = gain * self._constant(node, node.args[1]).double()
        shift = 0.0 if node.args[2] is None else self._constant(node, node.args[2]).double()
        weight = op.weight.double() * gain.view(-1, 1, 1, 1)
        bias = (op.bias.double() - mean) * gain + shift
        self._merge(node, replace(op, weight=weight.float(), bias=bias.float()))

    def _pad(self, node: Node) -> None:
        """Remember zero padding for the convolution that follows."""
        arguments = _arguments(node, "pad", "mode", "value")
        padding = list(arguments["pad"])
        is_zero = arguments.get("mode", "constant") == "constant" and not arguments.get("value")
        users = {user.target for user in node.users}
        if len(padding) != 4 or min(padding) < 0 or not is_zero or users - {_aten.conv2d.default}:
            raise ValueError(
                f"{self._where(node)}: expected zero padding of rows and columns that only "
                f"convolutions read, got {node.args[1:]} read by {sorted(map(str, users))}"
            )
        source = self._read(node, cast(Node, node.args[0]))
        self.pending_pads[node.name] = (source, cast(Padding, tuple(padding)))

    def _add(self, node: Node) -> None:
        terms = node.args[:2]
        shapes = [_shape(term) for term in terms if isinstance(term, Node)]
        is_plain = len(shapes) == 2 and shapes[0] == shapes[1] and node.kwargs.get("alpha", 1) == 1
        if not is_plain or any(cast(Node, term).name in self.constants for term in terms):
            raise ValueError(
                f"{self._where(node)}: expected the sum of two maps of one shape, got {node.args}"
            )
        names = tuple(self._read(node, cast(Node, term)) for term in terms)
        self._emit(node, "add", Add, inputs=names)

    def _pool(self, node: Node) -> None:
        is_max = node.target is _aten.max_pool2d.default
        rest = ("dilation",) if is_max else ("ceil_mode", "count_include_pad", "divisor_override")
        arguments = _arguments(node, "kernel_size", "stride", "padding", *rest)
        kernel_size = self._square(node, "kernel_size", arguments["kernel_size"])
        stride = self._square(node, "stride", arguments.get("stride") or kernel_size)
        padding = self._square(node, "padding", arguments.get("padding", 0))
        dilation = self._square(node, "dilation", arguments.get("dilation", 1))
        if padding or dilation != 1 or arguments.get("divisor_override"):
            raise ValueError(
                f"{self._where(node)}: expected pooling without padding, dilation and divisor, "
                f"got {node.args[1:]}"
            )
        mode = "max" if is_max else "average"
        name = self._read(node, cast(Node, node.args[0]))
        self._emit(
            node, f"{mode}_pool", Pool, inputs=(name,), mode=mode, kernel_size=kernel_size,
            stride=stride,
        )  # fmt: skip

    def _resize(self, node: Node) -> None:
        is_nearest = node.target is _aten.upsample_nearest2d.vec
        corners = () if is_nearest else ("align_corners",)
        arguments = _arguments(node, "output_size", *corners, "scale_factors")
        aligned = bool(arguments.get("align_corners"))
        source = cast(Node, node.args[0])
        scales = arguments.get("scale_factors") or ()
        sizes = zip(_shape(source)[2:], scales, _shape(node)[2:], strict=False)
        # torch steps by the factor itself, TFLite by the ratio of the sizes.
        if not aligned and any(before * scale != after for before, scale, after in sizes):
            raise ValueError(
                f"{self._where(node)}: expected factors that give whole sizes, got {scales} of "
                f"{_shape(source)[2:]}; resize to a size instead"
            )
        mode = "nearest" if is_nearest else "bilinear"
        name = self._read(node, source)
        self._emit(node, "resize", Resize, inputs=(name,), mode=mode, align_corners=aligned)

    # Parts ----------------------------------------------------------------------------------

    def _emit(
        self, node: Node, kind: str, make: type[Op], *, path: str | None = None, **fields: Any
    ) -> None:
        if path is None:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            path = ".".join(part for part in (stack[-1][0] if stack else "", kind) if part)
        name = self._unique(self._readable(path))
        self._merge(node, make(name=name, shape=_shape(node), **fields))

    def _merge(self, node: Node, op: Op) -> None:
        """Let a node's result be what the operation writes."""
        self.ops[op.name] = op
        self.tensor_of[node.name] = op.name
        self.result_of[op.name] = node

    def _is_only_reader(self, name: str) -> bool:
        """Whether one node alone reads a tensor, directly or through nodes that change nothing."""

        def readers(node: Node) -> int:
            return sum(
                readers(user) if user.target in _IDENTITIES else 1
                for user in node.users
                if user in self.live or user.op == "output"
            )

        return name in self.result_of and readers(self.result_of[name]) == 1

    def _readable(self, path: str) -> str:
        """`backbone.blocks.3.x` as `backbone/block_4/x`: lists count from 1, as people do."""
        parts: list[str] = []
        for part in path.split("."):
            if part.isdigit() and parts:
                parts[-1] = f"{parts[-1].removesuffix('s')}_{int(part) + 1}"
            else:
                parts.append(part)
        return "/".join(parts)

    def _unique(self, name: str) -> str:
        number, unique = 1, name
        while unique in self.taken:
            number += 1
            unique = f"{name}_{number}"
        self.taken.add(unique)
        return unique

    def _read(self, node: Node, source: Node) -> str:
        """Name of the tensor that a node reads."""
        if source.name in self.pending_pads:
            raise ValueError(f"{self._where(node)}: zero padding that no convolution reads")
        if source.name in self.constants:
            raise ValueError(f"{self._where(node)}: expected a computed map, got a constant")
        return self.tensor_of[source.name]

    def _constant(self, node: Node, value: Any) -> Tensor:
        if not isinstance(value, Node) or value.name not in self.constants:
            raise ValueError(f"{self._where(node)}: expected constant weights, got computed ones")
        return self.constants[value.name].float()

    def _square(self, node: Node, name: str, value: Any) -> int:
        values = {value} if isinstance(value, int) else set(value)
        if len(values) != 1:
            raise ValueError(f"{self._where(node)}: expected one {name} for both axes, got {value}")
        return int(values.pop())

    def _where(self, node: Node) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0] if stack else ""
        return f"module {path or type(self.module).__name__}, operation {node.name}"


def _live_nodes(graph: torch.fx.Graph) -> set[Node]:
    """Nodes whose result reaches an output."""
    live: set[Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in live:
                live.add(source)
                waiting.append(source)
    return live


def _arguments(node: Node, *names: str) -> dict[str, Any]:
    """Arguments after the first one, by name."""
    return {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}


def _shape(node: Node) -> Shape:
    shape = tuple(int(size) for size in node.meta["val"].shape)
    if len(shape) != 4:
        raise ValueError(
            f"operation {node.name}: expected [batch, channels, height, width], got {list(shape)}"
        )
    return cast(Shape, shape)


def _activate(x: Tensor, activation: Activation | None) -> Tensor:
    if activation is None:
        return x
    return F.relu6(x) if activation == "relu6" else F.relu(x)
