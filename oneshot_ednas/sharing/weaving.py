"""From the graph of a backbone to that of all tasks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from oneshot_ednas.sharing.policy import CHOICES, OWN, SHARED, Policy
from oneshot_ednas.sharing.tracing import Skip


class Weaver:
    """Builds the graph of all tasks from that of the backbone.

    Its modules are those of a `Supermodel`. Of a policy, its input is the images; without one,
    images and all gates, in a flat sequence.
    """

    def __init__(
        self, tasks: Sequence[str], operators: Sequence[str], policy: Policy | None
    ) -> None:
        self.tasks, self.policy = tuple(tasks), policy
        self.index = {name: index for index, name in enumerate(operators)}
        self.graph = fx.Graph()
        self.images = self.graph.placeholder("images")
        self.gates = self.graph.placeholder("gates") if policy is None else None
        self.made: dict[tuple[object, ...], fx.Node] = {}
        """Nodes by what they are made of: who asks for the same gets the same."""

    def weave(self, traced: fx.Graph, skips: Mapping[str, Skip | None]) -> fx.Graph:
        """The computation of all tasks; the result is a map per task.

        Args:
            traced: of the backbone.
            skips: of the nodes that run operators, by name.
        """
        results = {}
        for number, task in enumerate(self.tasks):
            values: dict[fx.Node, fx.Node] = {}
            features: Any = ()
            for node in traced.nodes:
                if node.op == "placeholder":
                    values[node] = self.images
                elif node.op == "output":
                    features = fx.node.map_arg(node.args[0], values.__getitem__)
                elif node.name in skips:
                    values[node] = self._operator(number, node, values, skips[node.name])
                else:
                    is_part = node.op in ("call_module", "get_attr")
                    target = f"rest.{node.target}" if is_part else node.target
                    values[node] = self._run(node, target, values)
            features = tuple(features) if isinstance(features, Sequence) else (features,)
            results[task] = self.graph.call_module(f"decoders.{task}", features)
        self.graph.output(results)
        return self.graph

    def _operator(
        self, task: int, node: fx.Node, values: dict[fx.Node, fx.Node], skip: Skip | None
    ) -> fx.Node:
        """The value of an operator for a task."""
        index = self.index[str(node.target)]
        shared, own = f"shared.{node.target}", f"own.{self.tasks[task]}.{node.target}"
        if self.policy is not None:
            choice = self.policy.choices[task][index]
            if choice in (SHARED, OWN):
                return self._run(node, shared if choice == SHARED else own, values)
            return self._skipped(values[node.all_input_nodes[0]], skip)
        three = (
            self._run(node, shared, values),
            self._run(node, own, values),
            self._skipped(values[node.all_input_nodes[0]], skip),
        )
        first = len(CHOICES) * (task * len(self.index) + index)
        return self.graph.call_function(mix, (self.gates, first, *three))

    def _run(
        self, node: fx.Node, target: str | Callable[..., Any], values: dict[fx.Node, fx.Node]
    ) -> fx.Node:
        """A node of the backbone on a task's values."""
        key = (node, target, *(values[read] for read in node.all_input_nodes))
        if key not in self.made:
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            self.made[key] = self.graph.create_node(node.op, target, args, kwargs)
        return self.made[key]

    def _skipped(self, x: fx.Node, skip: Skip | None) -> fx.Node:
        if skip is None:
            return x
        if (skip, x) not in self.made:
            args = (x, skip.dim, skip.channels, skip.stride, skip.size)
            self.made[skip, x] = self.graph.call_function(follow, args)
        return self.made[skip, x]


def follow(
    x: Tensor, dim: int, channels: int, stride: tuple[int, int], size: tuple[int, int] | None
) -> Tensor:
    """`Skip` as a function, for graphs."""
    return Skip(dim, channels, stride, size)(x)


def mix(gates: Sequence[Tensor], first: int, shared: Tensor, own: Tensor, skip: Tensor) -> Tensor:
    """Sum of the three, each times its gate: the gates at `first` and the two after it."""
    return gates[first] * shared + gates[first + 1] * own + gates[first + 2] * skip
