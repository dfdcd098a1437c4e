"""A backbone whose every operator each task shares, copies or skips.

Source: AutoMTL (Zhang et al., NeurIPS 2022, section 3.1), https://arxiv.org/abs/2110.13076
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from oneshot_ednas.models.encoder import Block, Stem
from oneshot_ednas.models.layers import ConvBN, ElasticBatchNorm, SeparableConv
from oneshot_ednas.sharing.policy import CHOICES, SHARED, Policy
from oneshot_ednas.sharing.tracing import Operator, OperatorTypes, TracedBackbone, trace_backbone
from oneshot_ednas.sharing.weaving import Weaver

PLAIN_OPERATORS: OperatorTypes = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.Linear,
)
"""Of backbones made of torch's layers."""
EDNAS_OPERATORS: OperatorTypes = (Block, Stem, ConvBN, SeparableConv)
"""Of a `Chain` of an EDNAS encoder: whole blocks, and the BiFPN's convolutions."""


class OperatorNetwork(nn.Module):
    """The network of one policy: the operators that are used, each for the tasks that use it.

    Made by `Supermodel.standalone` or `operator_network`. Names in its state are those of the
    supermodel, after `body.`.
    """

    def __init__(
        self, body: fx.GraphModule, policy: Policy, operators: tuple[Operator, ...]
    ) -> None:
        super().__init__()
        self.body, self.policy, self.operators = body, policy, operators
        # Weights with two names are in the state once: checkpoints hold no tensor twice.
        names = dict[int, str]()
        self._second_names: dict[str, str] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            first = names.setdefault(id(parameter), name)
            if first != name:
                self._second_names[name] = first
        self.register_state_dict_post_hook(_drop_second_names)
        self.register_load_state_dict_pre_hook(_add_second_names)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
        """Raw maps per task."""
        return cast(dict[str, Tensor], self.body(images))

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, with the decoders'."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def encoder_parameters(self) -> int:
        """Trainable numbers without the decoders'."""
        return sum(self._encoder_sizes().values())

    @property
    def shared_fraction(self) -> float:
        """Share of the encoder's parameters that two or more tasks use; 0 without parameters."""
        parts: list[nn.Module] = []
        for index, operator in enumerate(self.operators):
            if sum(row[index] == SHARED for row in self.policy.choices) > 1:
                parts.append(self.body.get_submodule(f"shared.{operator.name}"))
        if len(self.policy.tasks) > 1 and hasattr(self.body, "rest"):
            parts.append(self.body.get_submodule("rest"))
        used = {id(parameter) for part in parts for parameter in part.parameters()}
        sizes = self._encoder_sizes()
        return sum(sizes[key] for key in used) / max(sum(sizes.values()), 1)

    def _encoder_sizes(self) -> dict[int, int]:
        return {
            id(parameter): parameter.numel()
            for name, parameter in self.body.named_parameters()
            if not name.startswith("decoders.")
        }


def _drop_second_names(
    module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object
) -> None:
    for name in cast(OperatorNetwork, module)._second_names:
        del state[prefix + name]


def _add_second_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name, first in cast(OperatorNetwork, module)._second_names.items():
        if prefix + first in state:
            state[prefix + name] = state[prefix + first]


class Supermodel(nn.Module):
    """All policies' networks at once. Made by `compile_supermodel`.

    Parts: `shared.<operator>`, `own.<task>.<operator>`, `decoders.<task>`, and `rest.<module>` for
    what is no operator and thus shared by all tasks.
    """

    def __init__(self, traced: TracedBackbone, decoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = tuple(decoders)
        self.operators = traced.operators
        self._traced, self._skips = traced.graph, traced.skips
        originals = {one.name: traced.root.get_submodule(one.name) for one in self.operators}
        self.shared, self.own, self.rest = nn.Module(), nn.ModuleDict(), nn.Module()
        for name, module in originals.items():
            _plant(self.shared, name, module)
        for task in self.tasks:
            self.own[task] = nn.Module()
            # In one go, so that weights which two operators have in common stay in common.
            for name, module in copy.deepcopy(originals).items():
                _plant(self.own[task], name, module)
        self._plant_rest(traced)
        self.decoders = nn.ModuleDict(decoders)
        self._momenta: dict[str, float | None] = {}
        for name, module in self.named_modules():
            if isinstance(module, (_NormBase, ElasticBatchNorm)):
                # Running statistics would be shared between policies.
                self._momenta[name], module.momentum = module.momentum, 0.0
        self._mixed = self._weave(None)
        self._woven: tuple[Policy, fx.Graph] | None = None

    def _plant_rest(self, traced: TracedBackbone) -> None:
        names = {one.name for one in self.operators}
        for node in traced.graph.nodes:
            target = str(node.target)
            if node.op == "call_module" and target not in names:
                _plant(self.rest, target, traced.root.get_submodule(target))
            elif node.op == "get_attr":
                path, _, name = target.rpartition(".")
                _plant(self.rest, target, getattr(traced.root.get_submodule(path), name))

    @property
    def operator_names(self) -> tuple[str, ...]:
        """In the order in which the backbone runs them; the order of gates and policies."""
        return tuple(one.name for one in self.operators)

    @property
    def depths(self) -> list[int]:
        """Depth of each operator, for `policy_regularization`."""
        return [one.depth for one in self.operators]

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        run: Float[Tensor, "tasks operators 3"] | Policy,
    ) -> dict[str, Tensor]:
        """Raw maps per task.

        Args:
            images: normalised images.
            run: a policy runs what it chooses, and what tasks have in common once; gates mix the
                three outputs of each operator, all of which are computed, so that a gate of 0 has
                its gradient too. Gates of 1/3 train everything.

        Raises:
            ValueError: if the gates are of another shape, or the policy of other operators.
        """
        # Not a GraphModule: that would hold all parameters a second time, under other names.
        if isinstance(run, Policy):
            if self._woven is None or self._woven[0] != run:
                self._woven = run, self._weave(run)
            result = fx.Interpreter(self, graph=self._woven[1]).run(images)
        else:
            expected = len(self.tasks), len(self.operators), len(CHOICES)
            if tuple(run.shape) != expected:
                raise ValueError(f"gates: expected {list(expected)}, got {list(run.shape)}")
            # One unbinding: its gradient is one kernel, however many gates there are.
            gates = run.to(images).reshape(-1).unbind()
            result = fx.Interpreter(self, graph=self._mixed).run(images, gates)
        return cast(dict[str, Tensor], result)

    def standalone(self, policy: Policy) -> OperatorNetwork:
        """The network of a policy, with copies of the weights, and BN as it was before compiling.

        Raises:
            ValueError: if the policy is of other tasks or operators.
        """
        body = copy.deepcopy(fx.GraphModule(self, self._weave(policy)))
        for name, module in body.named_modules():
            if name in self._momenta:
                cast(Any, module).momentum = self._momenta[name]
        _with_own_statistics(body)
        return OperatorNetwork(body, policy, self.operators).train(self.training)

    def pretraining_gates(self) -> Float[Tensor, "tasks operators 3"]:
        """1/3 for each of the three, on the supermodel's device."""
        shape = len(self.tasks), len(self.operators), len(CHOICES)
        return next(self.parameters()).new_full(shape, 1 / len(CHOICES))

    def describe(self, policy: Policy, probabilities: Tensor) -> dict[str, Any]:
        """Policy, its distribution and the operators, as JSON; `Policy.from_json` reads it."""
        operators = [
            {"name": o.name, "kind": o.kind, "parameters": o.parameters, "depth": o.depth}
            for o in self.operators
        ]
        return policy.to_json() | {
            "operators": operators,
            "probabilities": probabilities.detach().cpu().tolist(),
            "num_layers": max(self.depths),
        }

    def _weave(self, policy: Policy | None) -> fx.Graph:
        """The computation of all tasks: of a policy, or of the mixture by gates.

        A value that tasks have in common is one node, and so is what they compute from it alike.
        """
        if policy is not None and (policy.tasks, policy.operators) != (
            self.tasks,
            self.operator_names,
        ):
            raise ValueError(
                f"the policy is of tasks {', '.join(policy.tasks)} and {len(policy.operators)} "
                f"operators, the network of {', '.join(self.tasks)} and {len(self.operators)}; "
                f"search on this backbone"
            )
        return Weaver(self.tasks, self.operator_names, policy).weave(self._traced, self._skips)


def policy_learning_rates(policy: Policy) -> dict[str, float]:
    """By the name of a module of a policy's network, 1 / the number of tasks that share it."""
    scales = {}
    for index, operator in enumerate(policy.operators):
        count = sum(row[index] == SHARED for row in policy.choices)
        if count > 0:
            scales[f"body.shared.{operator}"] = 1 / count
    return scales


def _with_own_statistics(body: fx.GraphModule) -> None:
    """Give every further run of a module BN statistics of its own, and the weights of the first.

    Tasks that share an operator may come to it with different values: each batch is normalised by
    itself in training, and an average over all of them would fit none.
    """
    seen = set[str]()
    for number, node in enumerate(body.graph.nodes):
        target = str(node.target)
        if node.op != "call_module" or target not in seen:
            seen.add(target)
            continue
        module = body.get_submodule(target)
        if not any(isinstance(part, (_NormBase, ElasticBatchNorm)) for part in module.modules()):
            continue
        shared: dict[int, object] = {id(p): p for p in module.parameters()}
        again = copy.deepcopy(module, memo=shared)
        node.target = f"again.n{number}.{target}"
        _plant(body, node.target, again)
    body.recompile()


def _plant(tree: nn.Module, path: str, part: object) -> None:
    """Put a module, parameter or tensor where its path says, with modules on the way."""
    *way, name = path.split(".")
    for step in way:
        if not hasattr(tree, step):
            tree.add_module(step, nn.Module())
        tree = cast(nn.Module, getattr(tree, step))
    if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
        tree.register_buffer(name, part)
    elif isinstance(part, nn.Module):
        tree.add_module(name, part)
    else:
        setattr(tree, name, part)


def compile_supermodel(
    backbone: nn.Module,
    decoders: Mapping[str, nn.Module],
    example: Float[Tensor, "batch channels height width"],
    operator_types: OperatorTypes = PLAIN_OPERATORS,
) -> Supermodel:
    """Give each task a copy of each operator and a way around it.

    The backbone is traced by torch.fx: `self.training` and other attributes that its forward reads
    count as they are now. Parameters that are in no module of `operator_types`, such as those that
    a forward hands to `F.conv2d`, stay shared by all tasks.

    Args:
        backbone: images to a tensor or a tuple of tensors; its weights are copied.
        decoders: per task, `module(*features) -> Tensor`; part of the supermodel from now on.
        example: images of the size to train on; operators' shapes are taken from the first.
        operator_types: classes of modules that become operators; `EDNAS_OPERATORS` for an EDNAS
            encoder. A module that runs twice is one operator.

    Raises:
        ValueError: if there is no task, the backbone cannot be traced or has no operators, or one
            changes the shape so that skipping cannot follow.
    """
    if not decoders:
        raise ValueError("decoders: expected at least one task")
    return Supermodel(trace_backbone(backbone, example, operator_types), decoders)


def operator_network(
    make_backbone: Callable[[], nn.Module],
    decoders: Mapping[str, nn.Module],
    example: Float[Tensor, "batch channels height width"],
    policy: Policy,
    operator_types: OperatorTypes = PLAIN_OPERATORS,
) -> OperatorNetwork:
    """The network of a policy with fresh weights, to be trained from scratch.

    Each task's own operators come from a backbone of their own, since copies of one would start
    alike.

    Args:
        make_backbone: makes one with new weights.
        decoders: as of `compile_supermodel`.
        example: as of `compile_supermodel`.
        policy: what each task takes.
        operator_types: as of `compile_supermodel`.

    Raises:
        ValueError: as of `compile_supermodel` and `Supermodel.standalone`.
    """
    supermodel = compile_supermodel(make_backbone(), decoders, example, operator_types)
    for task in supermodel.tasks:
        fresh = make_backbone()
        for name in supermodel.operator_names:
            own = supermodel.own[task].get_submodule(name)
            own.load_state_dict(fresh.get_submodule(name).state_dict())
    return supermodel.standalone(policy)
