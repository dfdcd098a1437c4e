"""Supermodels: any backbone, every policy, and the networks that come out of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oneshot_ednas import ednas_tiny
from oneshot_ednas.models.encoder import Chain, ednas_encoder
from oneshot_ednas.models.layers import ElasticBatchNorm
from oneshot_ednas.models.macs import module_macs
from oneshot_ednas.models.network import recalibrate_bn
from oneshot_ednas.sharing.operators import (
    EDNAS_OPERATORS,
    PLAIN_OPERATORS,
    Supermodel,
    compile_supermodel,
    operator_network,
)
from oneshot_ednas.sharing.policy import Policy
from oneshot_ednas.sharing.tracing import Skip

TASKS = {"segmentation": 5, "depth": 1, "normals": 3}


class Residual(nn.Module):
    """With all that makes skipping hard: in-place operations, a projection, a reused activation."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after, momentum=0.05)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.project = nn.Conv2d(before, after, 1, stride) if stride > 1 else None

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.project is None else self.project(x)
        return F.relu(y, inplace=True)


class Backbone(nn.Module):
    """Two features, one parameter outside all operators, one convolution that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList([Residual(8, 8, 1), Residual(8, 12, 2)])
        self.scale = nn.Parameter(torch.full((12, 1, 1), 1.5))
        self.twice = nn.Conv2d(12, 12, 1)
        self.unused = nn.Linear(7, 7)

    def forward(self, images):
        low = self.stages[0](self.pool(self.stem(images)))
        high = self.twice(self.twice(self.stages[1](low) * self.scale))
        high = high.clone().mul_(2.0)
        return low, F.interpolate(high, size=low.shape[-2:], mode="nearest")


class Decoder(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(20, channels, 1)

    def forward(self, low, high):
        return self.conv(torch.cat([low, high], 1))


def images(*, batch: int = 2, size: tuple[int, int] = (24, 40), seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def decoders() -> dict[str, nn.Module]:
    return {task: Decoder(channels) for task, channels in TASKS.items()}


@pytest.fixture
def supermodel() -> Supermodel:
    torch.manual_seed(0)
    model = compile_supermodel(Backbone(), decoders(), images())
    return apart(model)


def apart(model: Supermodel) -> Supermodel:
    """Each copy with weights and running statistics of its own, as after some training."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.2 * torch.rand_like(tensor))
    return model


def random_policy(model: Supermodel, seed: int) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    return Policy.random(model.tasks, model.operator_names, generator)


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for task in found:
        torch.testing.assert_close(found[task], expected[task], rtol=1e-6, atol=1e-6)


# Compilation --------------------------------------------------------------------------------


def test_operators_are_found_in_running_order_with_their_depths(supermodel):
    expected = {
        "stem.0": 1,
        "stem.1": 2,
        "stages.0.conv1": 3,
        "stages.0.bn1": 4,
        "stages.0.conv2": 5,
        "stages.0.bn2": 6,
        "stages.1.conv1": 7,
        "stages.1.bn1": 8,
        "stages.1.conv2": 9,
        "stages.1.bn2": 10,
        "stages.1.project": 7,
        "twice": 11,
    }
    assert dict(zip(supermodel.operator_names, supermodel.depths, strict=True)) == expected
    assert supermodel.operators[0].kind == "Conv2d"
    assert supermodel.operators[0].parameters == 8 * 27 + 8


def test_all_shared_is_the_plain_backbone_with_its_decoders():
    torch.manual_seed(1)
    backbone, own = Backbone(), decoders()
    before = copy.deepcopy(backbone.state_dict())
    model = compile_supermodel(backbone, own, images())
    policy = Policy.all_shared(model.tasks, model.operator_names)
    for mode in (False, True):
        backbone.train(mode)
        model.train(mode)
        features = backbone(images())
        check_equal(model(images(), policy), {task: own[task](*features) for task in own})
    assert backbone.stem[2].inplace
    assert before.keys() == backbone.state_dict().keys()


def test_compiling_leaves_the_backbone_and_its_bn_alone():
    backbone = Backbone().train()
    before = copy.deepcopy(backbone.state_dict())
    compile_supermodel(backbone, decoders(), images())
    after = backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert backbone.training
    assert backbone.stages[0].bn1.momentum == 0.05


def test_an_ednas_encoder_compiles_into_blocks_and_convolutions():
    space = ednas_tiny()
    encoder = ednas_encoder(space.fix(space.base_architecture))
    chain, own = Chain(encoder), {task: encoder.build_decoder(1) for task in ("a", "b")}
    x = images(size=(32, 64))
    model = compile_supermodel(chain, own, x, EDNAS_OPERATORS)
    kinds = [operator.kind for operator in model.operators]
    assert kinds[0] == "Stem"
    assert kinds.count("Block") == len(space.blocks)
    # Fusion sums stay; everything with weights is an operator.
    assert not list(model.rest.parameters())
    policy = Policy.all_shared(model.tasks, model.operator_names)
    features = chain(x)
    check_equal(model(x, policy), {task: own[task](*features) for task in own})
    apart(model)
    drawn = random_policy(model, 3)
    check_equal(model.standalone(drawn)(x), model(x, drawn))
    norms = [m for m in model.standalone(policy).modules() if isinstance(m, ElasticBatchNorm)]
    assert {norm.momentum for norm in norms} == {0.1}


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


class Squeeze(nn.Module):
    """An operator that gives another number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.mean((2, 3)) * self.weight


class Pair(nn.Bilinear):
    """An operator of two inputs."""


class Wrapped(nn.Module):
    def __init__(self, part: nn.Module, inputs: int = 1, as_dict: bool = False) -> None:
        super().__init__()
        self.part, self.inputs, self.as_dict = part, inputs, as_dict

    def forward(self, x):
        y = self.part(*[x, x + 1][: self.inputs])
        return {"y": y} if self.as_dict else y


class Filled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x).fill_diagonal_(0)


@pytest.mark.parametrize(
    ("backbone", "types", "message"),
    [
        (DataDependent(), PLAIN_OPERATORS, "DataDependent cannot be traced: symbolically traced"),
        (Wrapped(Squeeze()), (Squeeze,), r"operator part \(Squeeze\) turns \[1, 3, 24, 40\] into"),
        (Wrapped(Pair(40, 40, 2), 2), (Pair,), r"operator part \(Pair\) takes 2 inputs"),
        (Wrapped(nn.ReLU()), PLAIN_OPERATORS, "expected operators of Conv2d, .* found none"),
        (Wrapped(nn.Conv2d(3, 3, 1), as_dict=True), PLAIN_OPERATORS, "a tuple of tensors from"),
        (Filled(), PLAIN_OPERATORS, "changes a tensor by fill_diagonal_; use a pure"),
        (
            nn.Sequential(nn.Conv2d(4, 3, 1)),
            PLAIN_OPERATORS,
            r"example of shape \[2, 3, 24, 40\]: G",
        ),
        (nn.Bilinear(3, 3, 3), (nn.Conv2d,), "expected images as its one input, got input1"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(backbone, types, message):
    with pytest.raises(ValueError, match=message) as caught:
        compile_supermodel(backbone, decoders(), images(), types)
    assert "\n" not in str(caught.value)


class Aliases(nn.Module):
    """Reads tensors after they were changed under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv(x)
        self.relu(y)
        again = y
        again.mul_(2)
        torch.relu_(y)
        F.relu6(y, True)
        return self.last(again)


def test_a_tensor_changed_in_place_is_read_as_changed():
    torch.manual_seed(2)
    backbone = Aliases()
    model = compile_supermodel(backbone, {"a": nn.Identity()}, images())
    found = model(images(), Policy.all_shared(model.tasks, model.operator_names))["a"]
    torch.testing.assert_close(found, backbone(images()))


def test_a_supermodel_needs_a_task():
    with pytest.raises(ValueError, match="at least one task"):
        compile_supermodel(Backbone(), {}, images())


# Skipping -----------------------------------------------------------------------------------


def test_skipping_averages_windows_and_cuts_or_pads_channels():
    x = torch.arange(12.0).view(1, 2, 2, 3)
    found = Skip(1, 3, (2, 2), None)(x)
    expected = torch.tensor([[[2.0, 3.5]], [[8.0, 9.5]], [[0.0, 0.0]]])
    torch.testing.assert_close(found, expected[None])
    torch.testing.assert_close(Skip(1, 1, (1, 1), None)(x), x[:, :1])
    rows = torch.ones(2, 5, 3)
    torch.testing.assert_close(Skip(2, 4, (1, 1), None)(rows), F.pad(rows, (0, 1)))


@pytest.mark.parametrize(
    "operator",
    [
        nn.Conv2d(3, 7, 3, stride=2, padding=1),
        nn.Conv2d(3, 2, 5, stride=1, padding=2),
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(3, 4, 3, stride=(2, 1), padding=1),
        nn.ConvTranspose2d(3, 6, 2, stride=2),
        nn.Linear(40, 13),
        nn.Linear(40, 50),
    ],
)
def test_a_skipped_operator_has_its_shape_and_no_parameters(operator):
    x = images(size=(24, 40))
    model = compile_supermodel(Wrapped(operator), {"a": nn.Identity()}, x)
    policy = Policy(("a",), ("part",), ((2,),))
    network = model.standalone(policy)
    assert network(x)["a"].shape == operator(x).shape
    assert network.num_parameters == 0
    assert network.shared_fraction == 0


def test_skipping_works_at_other_image_sizes(supermodel):
    x = images(size=(33, 65))
    skipping = Policy.uniform(supermodel.tasks, supermodel.operator_names, 2)
    shared = Policy.all_shared(supermodel.tasks, supermodel.operator_names)
    for task, output in supermodel(x, shared).items():
        assert supermodel(x, skipping)[task].shape == output.shape


def test_a_stride_is_seen_where_the_map_is_one_pixel():
    model = compile_supermodel(
        Wrapped(nn.Conv2d(3, 3, 3, 2, 1)), {"a": nn.Identity()}, images(size=(1, 1))
    )
    x = images(size=(8, 8))
    assert model(x, Policy(("a",), ("part",), ((2,),)))["a"].shape == (2, 3, 4, 4)


# Policies and gates -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("training", [False, True])
def test_gates_policy_and_standalone_agree(supermodel, seed, training):
    supermodel.train(training)
    policy = random_policy(supermodel, seed)
    expected = supermodel(images(), policy)
    check_equal(supermodel(images(), policy.one_hot()), expected)
    network = supermodel.standalone(policy)
    assert network.training == training
    check_equal(network(images()), expected)
    check_equal(copy.deepcopy(supermodel)(images(), policy), expected)


def test_soft_gates_mix_the_three_outputs():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    heads = {"a": nn.Identity(), "b": nn.Identity()}
    model = apart(compile_supermodel(Wrapped(conv), heads, images()))
    gates = torch.tensor([[[0.2, 0.5, 0.3]], [[0.6, 0.1, 0.3]]])
    found, x = model(images(), gates), images()
    for row, task in zip(gates, heads, strict=True):
        shared = model.shared.get_submodule("part")(x)
        own = model.own[task].get_submodule("part")(x)
        expected = row[0, 0] * shared + row[0, 1] * own + row[0, 2] * x
        torch.testing.assert_close(found[task], expected)


def test_pretraining_reaches_every_parameter_and_gates_every_logit(supermodel):
    gates = supermodel.pretraining_gates().requires_grad_()
    outputs = supermodel(images(), gates)
    sum(output.square().mean() for output in outputs.values()).backward()
    assert [n for n, p in supermodel.named_parameters() if p.grad is None] == []
    assert gates.grad.count_nonzero() == gates.numel()


def test_gradients_of_gates_are_those_of_finite_differences():
    model = Wrapped(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 3, 1)))
    model = compile_supermodel(model, {"a": nn.Identity(), "b": nn.Identity()}, images())
    model, x = apart(model).double(), images(batch=1, size=(4, 4)).double()
    gates = torch.rand(2, 2, 3, dtype=torch.double, requires_grad=True)

    def loss(values):
        return sum(output.square().sum() for output in model(x, values).values())

    assert torch.autograd.gradcheck(loss, (gates,))


def test_what_tasks_have_in_common_is_computed_once(supermodel):
    frame = images(batch=1)
    names = supermodel.operator_names
    shared = module_macs(supermodel.standalone(Policy.all_shared(supermodel.tasks, names)), frame)
    own = module_macs(supermodel.standalone(Policy.all_own(supermodel.tasks, names)), frame)
    heads = sum(6 * 10 * 20 * channels for channels in TASKS.values())
    assert module_macs(Backbone(), frame) == shared - heads
    assert own - heads == 3 * (shared - heads)
    # Parted at the last operator alone, which runs twice on 3x5 pixels of 12 channels.
    late = tuple((0,) * 11 + (int(task == "depth"),) for task in supermodel.tasks)
    parted = module_macs(supermodel.standalone(Policy(supermodel.tasks, names, late)), frame)
    assert parted - shared == 2 * 12 * 12 * 3 * 5


def test_searching_keeps_no_running_statistics(supermodel):
    before = {n: b.clone() for n, b in supermodel.named_buffers() if "running" in n}
    supermodel.train()(images(), supermodel.pretraining_gates())
    after = dict(supermodel.named_buffers())
    assert len(before) == 2 * 5 * 4
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gates_and_policies_of_another_backbone_are_refused(supermodel):
    with pytest.raises(ValueError, match=r"gates: expected \[3, 12, 3\], got \[3, 11, 3\]"):
        supermodel(images(), torch.ones(3, 11, 3))
    other = Policy.all_own(supermodel.tasks, [f"{n}" for n in range(12)])
    for run in (supermodel.standalone, lambda policy: supermodel(images(), policy)):
        with pytest.raises(ValueError, match="search on this backbone"):
            run(other)


# Stand-alone networks -----------------------------------------------------------------------


def test_parameters_are_counted_by_use(supermodel):
    names, sizes = supermodel.operator_names, [o.parameters for o in supermodel.operators]
    heads = sum(21 * channels for channels in TASKS.values())
    policy = random_policy(supermodel, 5)
    columns = list(zip(*policy.choices, strict=True))
    expected = sum(
        size * (column.count(1) + (0 in column))
        for size, column in zip(sizes, columns, strict=True)
    )
    network = supermodel.standalone(policy)
    assert network.encoder_parameters == expected + 12
    assert network.num_parameters == expected + 12 + heads
    common = 12 + sum(s for s, c in zip(sizes, columns, strict=True) if c.count(0) > 1)
    assert network.shared_fraction == pytest.approx(common / (expected + 12))
    assert 0 < network.shared_fraction < 1
    assert supermodel.standalone(Policy.all_shared(supermodel.tasks, names)).shared_fraction == 1
    own = supermodel.standalone(Policy.all_own(supermodel.tasks, names))
    assert own.shared_fraction == pytest.approx(12 / (3 * sum(sizes) + 12))


def test_a_standalone_network_is_on_its_own(supermodel):
    policy = random_policy(supermodel, 6)
    network = supermodel.standalone(policy)
    expected = network(images())
    with torch.no_grad():
        for parameter in supermodel.parameters():
            parameter.zero_()
    check_equal(network(images()), expected)
    momenta = {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.05, 0.1}
    clone = copy.deepcopy(network).train()
    clone(images())
    changed = clone.state_dict()
    assert not all(torch.equal(changed[n], t) for n, t in network.state_dict().items())


def test_a_network_is_rebuilt_from_its_policy(supermodel):
    policy = random_policy(supermodel, 7)
    network = supermodel.standalone(Policy.from_json(policy.to_json())).eval()
    torch.manual_seed(8)
    rebuilt = operator_network(Backbone, decoders(), images(), policy).eval()
    state = network.state_dict()
    assert list(rebuilt.state_dict()) == list(state)
    weights = [n for n, p in rebuilt.named_parameters() if p.dim() == 4]
    assert all(not torch.equal(rebuilt.state_dict()[name], state[name]) for name in weights)
    # Copies of an operator start apart.
    assert any(name.startswith("body.own.") for name in weights)
    own = operator_network(
        Backbone, decoders(), images(), Policy.all_own(policy.tasks, policy.operators)
    ).state_dict()
    one, other = (own[f"body.own.{task}.twice.weight"] for task in ("depth", "normals"))
    assert not torch.equal(one, other)
    rebuilt.load_state_dict(state)
    check_equal(rebuilt(images()), network(images()))


def test_bn_of_a_network_can_be_recalibrated(supermodel):
    network = supermodel.standalone(random_policy(supermodel, 9))
    before = copy.deepcopy(network.state_dict())
    recalibrate_bn(network, [images(seed=seed) for seed in range(3)])
    after = network.state_dict()
    running = [name for name in before if "running_mean" in name]
    assert running
    assert all(not torch.equal(before[name], after[name]) for name in running)


def test_weights_that_operators_have_in_common_stay_in_common():
    backbone = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    backbone[2].weight = backbone[0].weight
    heads = {"a": nn.Identity(), "b": nn.Identity()}
    model = compile_supermodel(backbone, heads, images())
    own = model.own["a"]
    assert own.get_submodule("0").weight is own.get_submodule("2").weight
    assert own.get_submodule("0").weight is not model.shared.get_submodule("0").weight
    network = model.standalone(Policy.all_shared(model.tasks, model.operator_names))
    assert network.num_parameters == 9 + 3 + 3
    assert network.shared_fraction == 1


def test_the_description_of_a_policy_is_read_back(supermodel):
    policy = random_policy(supermodel, 1)
    data = supermodel.describe(policy, supermodel.pretraining_gates())
    assert Policy.from_json(data) == policy
    assert data["num_layers"] == 11
    assert data["operators"][-1] == {
        "name": "twice",
        "kind": "Conv2d",
        "parameters": 156,
        "depth": 11,
    }
