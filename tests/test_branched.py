"""Branched networks: gates, routes and stand-alone networks are three views of one computation."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_SPACE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oneshot_ednas import SearchSpace, build_network, export_tflite, recalibrate_bn
from oneshot_ednas.export.runtime import TfliteNetwork
from oneshot_ednas.models.blocks import SharingConfig
from oneshot_ednas.models.deeplab import named_encoder
from oneshot_ednas.models.encoder import (
    Chain,
    Encoder,
    EncoderLayer,
    ednas_encoder,
    output_norms,
)
from oneshot_ednas.models.layers import ElasticBatchNorm
from oneshot_ednas.relaxation import one_hot_gates
from oneshot_ednas.sharing.branched import (
    BranchedNetwork,
    RouteGates,
    Routes,
    branched_network,
    check_branching,
    inherit_branched,
    learning_rate_scales,
    supergraph,
)
from oneshot_ednas.sharing.branching import Branching

SPACE = SearchSpace.from_yaml(SMALL_SPACE)
FIXED = SPACE.fix(SPACE.sample(np.random.default_rng(7)))
CHANNELS = {"segmentation": 4, "depth": 1, "normals": 3}
TASKS = tuple(CHANNELS)
SIZE = (32, 48)
laws = settings(deadline=None, derandomize=True, max_examples=12)


def small_deeplab(name: str = "mobilenet_v2") -> Encoder:
    return named_encoder(
        name, width=0.25, aspp_channels=16, low_level_channels=8, decoder_channels=16
    )


ENCODERS = {
    "fixed": lambda: ednas_encoder(FIXED),
    "searchable": lambda: ednas_encoder(SPACE),
    "own affine and kernels": lambda: ednas_encoder(
        SPACE, sharing=SharingConfig(bn_affine="per_width", kernel_transform=True)
    ),
    "deeplab": small_deeplab,
}


def images(count: int = 2, seed: int = 0, size=SIZE) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def perturbed(network: nn.Module, seed: int = 0) -> nn.Module:
    """With every number that training changes away from its start, kernel maps too."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad and p.dim() != 4:
                p += 0.1 * torch.randn(p.shape, generator=source, dtype=p.dtype)
    return network


def random_routes(encoder: Encoder, seed: int) -> Routes:
    """Tasks leave each other at random layers, so that some layers are shared."""
    generator = np.random.default_rng(seed)
    tree = Branching.random(TASKS, len(encoder.layers), generator)
    names = np.array([generator.permutation(len(TASKS)) for _ in encoder.layers])
    candidates = tuple(
        tuple(int(names[layer, labels[task]]) for layer, labels in enumerate(tree.groupings))
        for task in range(len(TASKS))
    )
    options = None
    if encoder.space is not None and not encoder.space.is_fixed:
        options = tuple(encoder.space.sample(generator) for _ in TASKS)
    return Routes(candidates, options)


def one_hot(encoder: Encoder, routes: Routes, dtype: torch.dtype) -> RouteGates:
    gates = F.one_hot(torch.tensor(routes.candidates), len(TASKS)).to(dtype)
    if routes.options is None:
        return RouteGates(gates)
    space = encoder.space
    assert space is not None
    return RouteGates(gates, tuple(one_hot_gates(space, o, dtype=dtype) for o in routes.options))


def stand_alone(encoder: Encoder, net: BranchedNetwork, routes: Routes) -> BranchedNetwork:
    branching = routes.branching(TASKS)
    alone = branched_network(encoder, branching, CHANNELS)
    alone.to(next(net.parameters()).dtype)
    for p in alone.parameters():
        p.data.fill_(float("nan"))  # what is not inherited shows
    inherit_branched(alone, net, routes.candidates, branching)
    return alone.train()


# Three views --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_gates_routes_and_stand_alone_networks_agree(name, dtype, tolerance):
    torch.manual_seed(0)
    encoder = ENCODERS[name]()
    net = perturbed(supergraph(encoder, CHANNELS)).to(dtype).train()
    # BN divides by the deviation of the batch, which must not be a rounding error.
    x = images(4, size=(64, 64) if name == "deeplab" else SIZE).to(dtype)
    for seed in range(3 if name != "deeplab" else 2):
        routes = random_routes(encoder, seed)
        with torch.no_grad():
            hard = net(x, routes)
            mixed = net(x, one_hot(encoder, routes, dtype))
            alone = stand_alone(encoder, net, routes)(x)
        for task, count in CHANNELS.items():
            assert hard[task].shape[1] == count
            scale = float(hard[task].abs().max())
            assert scale > 0.02
            assert float((hard[task][0] - hard[task][1]).abs().max()) > 0.1 * scale
            for other in (mixed, alone):
                assert float((hard[task] - other[task]).abs().max()) <= tolerance * scale
        assert list(hard) == list(mixed) == list(alone) == list(TASKS)


@laws
@given(st.integers(0, 999))
def test_any_routes_of_a_space_give_their_stand_alone_network(seed):
    torch.manual_seed(seed)
    encoder = ednas_encoder(SPACE)
    net = perturbed(supergraph(encoder, CHANNELS), seed).double().train()
    routes = random_routes(encoder, seed)
    with torch.no_grad():
        hard = net(images().double(), routes)
        alone = stand_alone(encoder, net, routes)(images().double())
    for task in TASKS:
        torch.testing.assert_close(hard[task], alone[task], rtol=1e-10, atol=1e-10)


def test_a_mixture_is_the_sum_of_the_candidates_by_their_gates():
    """Where all candidates are the same, any gates give what one candidate does."""
    torch.manual_seed(0)
    encoder = ednas_encoder(FIXED)
    net = supergraph(encoder, CHANNELS).double().train()
    for candidates in net.layers:
        for other in candidates[1:]:
            other.load_state_dict(candidates[0].state_dict())
    x = images().double()
    routes = Routes(((0,) * len(encoder.layers),) * 3)
    gates = torch.rand(3, len(encoder.layers), 3, dtype=torch.float64).softmax(-1)
    with torch.no_grad():
        mixed, hard = net(x, RouteGates(gates)), net(x, routes)
        double = net(x, RouteGates(2 * gates))
    for task in TASKS:
        torch.testing.assert_close(mixed[task], hard[task], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(double[task], hard[task])


# What is computed ---------------------------------------------------------------------------


def calls(net: BranchedNetwork, run) -> Counter:
    """How often each candidate runs, by layer and number."""
    found: Counter = Counter()
    handles = [
        module.register_forward_hook(lambda *_, key=(layer, number): found.update([key]))
        for layer, candidates in enumerate(net.layers)
        for number, module in enumerate(candidates)
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["searchable", "deeplab"])
def test_what_tasks_share_is_computed_once(name):
    encoder = ENCODERS[name]()
    net = supergraph(encoder, CHANNELS).eval()
    x = images(1, size=(64, 64))
    for seed in range(3):
        routes = random_routes(encoder, seed)
        branching = routes.branching(TASKS)
        found = calls(net, lambda routes=routes: net(x, routes))
        per_layer = [
            sum(n for (i, _), n in found.items() if i == layer)
            for layer in range(len(encoder.layers))
        ]
        assert tuple(per_layer) == branching.num_groups
        alone = branched_network(encoder, branching, CHANNELS).eval()
        found = calls(alone, lambda alone=alone: alone(x))
        assert set(found.values()) == {1}
        assert len(found) == sum(branching.num_groups)


def test_the_same_candidate_after_another_is_another_computation():
    encoder = ednas_encoder(FIXED)
    net = supergraph(encoder, CHANNELS).eval()
    depth = len(encoder.layers)
    routes = Routes(((0,) * depth, (1,) + (0,) * (depth - 1), (0,) * depth))
    found = calls(net, lambda: net(images(1), routes))
    assert found == {(0, 0): 1, (0, 1): 1, **{(layer, 0): 2 for layer in range(1, depth)}}


def test_only_the_wanted_tasks_run():
    encoder = ednas_encoder(SPACE)
    torch.manual_seed(0)
    net = supergraph(encoder, CHANNELS).train()
    routes = Routes(
        tuple((t,) * len(encoder.layers) for t in range(3)), random_routes(encoder, 0).options
    )
    everything = net(images(), routes)
    decoders = []
    for task, decoder in net.decoders.items():
        decoder.register_forward_hook(lambda *_, task=task: decoders.append(task))
    found = calls(net, lambda: decoders.append(net(images(), routes, ("normals",))))
    assert set(found) == {(layer, 2) for layer in range(len(encoder.layers))}
    assert decoders[0] == "normals"
    assert len(decoders) == 2
    assert list(decoders[1]) == ["normals"]
    torch.testing.assert_close(decoders[1]["normals"], everything["normals"])
    gates = one_hot(encoder, routes, torch.float32)
    both = net(images(), gates, ["depth", "segmentation"])
    assert list(both) == ["depth", "segmentation"]
    torch.testing.assert_close(both["depth"], everything["depth"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs routes or gates"):
        net(images())


# The ends of the range ----------------------------------------------------------------------


def of_network(name: str, depth: int) -> str:
    """Name in a `BranchedNetwork` that is fully shared, from that in a `Network`."""
    parts = name.split(".")
    match parts[0], parts[1]:
        case "backbone", "stem":
            return ".".join(["layers.0.0.conv", *parts[2:]])
        case "backbone", "blocks":
            return ".".join([f"layers.{int(parts[2]) + 1}.0.elastic", *parts[3:]])
        case "bifpn", _:
            return ".".join([f"layers.{depth - 1}.0.bifpn", *parts[1:]])
    assert parts[0] == "heads"
    return ".".join(["decoders", *parts[1:]])


def test_full_sharing_is_the_network_of_the_space():
    torch.manual_seed(0)
    encoder = ednas_encoder(FIXED)
    depth = len(encoder.layers)
    single = perturbed(build_network(FIXED, CHANNELS))
    recalibrate_bn(single, [images(seed=seed) for seed in range(2)])
    shared = branched_network(encoder, Branching.shared(TASKS, depth), CHANNELS)
    state = {of_network(name, depth): tensor for name, tensor in single.state_dict().items()}
    shared.load_state_dict(state, strict=True)
    assert shared.num_parameters == single.num_parameters
    heads = sum(p.numel() for p in single.heads.parameters())
    assert shared.num_encoder_parameters == single.num_parameters - heads
    for mode in (True, False):
        one, other = single.train(mode)(images()), shared.train(mode)(images())
        for task in TASKS:
            torch.testing.assert_close(one[task], other[task], rtol=1e-5, atol=1e-6)


def test_a_searchable_space_takes_the_paths_of_the_branching():
    path = SPACE.sample(np.random.default_rng(3))
    encoder = ednas_encoder(SPACE)
    shared = branched_network(encoder, Branching.shared(TASKS, len(encoder.layers), path), CHANNELS)
    single = build_network(SPACE.fix(path), CHANNELS)
    assert shared.num_parameters == single.num_parameters


@pytest.mark.parametrize("name", ["fixed", "deeplab"])
def test_separate_branches_have_the_parameters_of_single_networks(name):
    encoder = ENCODERS[name]()
    separate = branched_network(encoder, Branching.separate(TASKS, len(encoder.layers)), CHANNELS)
    total = 0
    for count in CHANNELS.values():
        parts = [Chain(encoder), encoder.build_decoder(count)]
        total += sum(p.numel() for part in parts for p in part.parameters())
    assert separate.num_parameters == total
    if name == "fixed":
        singles = [build_network(FIXED, {task: n}) for task, n in CHANNELS.items()]
        assert total == sum(single.num_parameters for single in singles)
    separate.train()(images(size=(64, 64)))["depth"].square().sum().backward()
    touched = [n for n, p in separate.named_parameters() if p.grad is not None]
    assert {n.split(".")[2] for n in touched if n.startswith("layers")} == {"1"}
    assert {n.split(".")[1] for n in touched if n.startswith("decoders")} == {"depth"}


# Training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_the_last_bn_of_a_candidate_has_no_trained_scale(name):
    encoder = ENCODERS[name]()
    net = supergraph(encoder, CHANNELS)
    frozen = {id(p) for p in net.parameters() if not p.requires_grad}
    expected = set()
    for candidates in net.layers:
        assert len(candidates) == len(TASKS)
        for candidate in candidates:
            norms = output_norms(candidate)
            assert norms
            for norm in norms:
                expected |= {id(norm.weight), id(norm.bias)}
                assert bool((norm.weight == 1).all())
                assert bool((norm.bias == 0).all())
    assert frozen == expected
    for decoder in net.decoders.values():
        assert all(p.requires_grad for p in decoder.parameters())
    assert net.num_parameters == sum(p.numel() for p in net.parameters() if id(p) not in expected)
    # In the stand-alone network they are trained.
    alone = branched_network(encoder, random_routes(encoder, 0).branching(TASKS), CHANNELS)
    assert all(p.requires_grad for p in alone.parameters())


@pytest.mark.parametrize("name", ["searchable", "deeplab"])
def test_candidates_start_apart_and_share_nothing(name):
    torch.manual_seed(0)
    net = supergraph(ENCODERS[name](), CHANNELS)
    for candidates in net.layers:
        one, two, three = (dict(c.named_parameters()) for c in candidates)
        assert not {p.data_ptr() for p in one.values()} & {p.data_ptr() for p in two.values()}
        kernels = [key for key, p in one.items() if p.dim() == 4]
        assert kernels
        assert all(not torch.equal(one[k], two[k]) for k in kernels)
        assert all(not torch.equal(two[k], three[k]) for k in kernels)


@pytest.mark.parametrize("name", ["searchable", "fixed", "deeplab"])
def test_every_parameter_of_a_branched_network_gets_a_gradient(name):
    torch.manual_seed(0)
    encoder = ENCODERS[name]()
    for seed in range(2):
        branching = random_routes(encoder, seed).branching(TASKS)
        net = branched_network(encoder, branching, CHANNELS).train()
        out = net(images(4, size=(64, 64)))
        sum(y.square().sum() for y in out.values()).backward()
        missing = [n for n, p in net.named_parameters() if p.grad is None]
        assert not missing
        dead = [n for n, p in net.named_parameters() if not bool(p.grad.abs().sum() > 0)]
        assert not dead


def test_every_gate_and_every_candidate_gets_a_gradient():
    torch.manual_seed(0)
    encoder = ednas_encoder(SPACE)
    net = supergraph(encoder, CHANNELS).train()
    gates = torch.full((3, len(encoder.layers), 3), 1 / 3, requires_grad=True)
    options = tuple(
        tuple(
            type(block)(*(torch.full_like(v, 1 / len(v)).requires_grad_() for v in block))
            for block in one_hot_gates(SPACE, SPACE.base_architecture)
        )
        for _ in TASKS
    )
    run = RouteGates(gates, options)
    out = net(images(), run)
    sum((y * torch.randn_like(y)).sum() for y in out.values()).backward()
    assert bool((gates.grad != 0).all())
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    copied = run.with_tensors(run.tensors)
    assert all(a is b for a, b in zip(copied.tensors, run.tensors, strict=True))
    assert len(run.tensors) == 1 + 3 * 4 * len(SPACE.blocks)


@pytest.mark.parametrize("name", ["searchable", "deeplab"])
def test_training_leaves_the_statistics_of_a_supergraph_alone(name):
    encoder = ENCODERS[name]()
    net = supergraph(encoder, CHANNELS).train()
    before = copy.deepcopy({n: b for n, b in net.named_buffers() if "running" in n})
    assert len(before) > 100
    routes = random_routes(encoder, 0)
    x = 5 + 3 * images(4, size=(64, 64))
    net(x, routes)
    net(x, one_hot(encoder, routes, torch.float32))
    assert all(torch.equal(before[n], b) for n, b in net.named_buffers() if n in before)
    # A stand-alone network keeps its own.
    alone = stand_alone(encoder, net, routes)
    inherited = copy.deepcopy({n: b for n, b in alone.named_buffers() if "running" in n})
    alone(x)
    assert not any(torch.equal(inherited[n], b) for n, b in alone.named_buffers() if n in inherited)
    norms = [m for m in alone.modules() if isinstance(m, (ElasticBatchNorm, nn.BatchNorm2d))]
    assert all(norm.momentum and norm.momentum > 0 for norm in norms)


def test_learning_rates_fall_with_the_tasks_that_share():
    groupings = ((0, 0, 0), (0, 1, 0), (0, 1, 0), (0, 1, 2), (0, 1, 2), (0, 1, 2))
    branching = Branching(TASKS, groupings)
    scales = learning_rate_scales(branching)
    assert scales == {
        "layers.0.0": 1 / 3,
        "layers.1.0": 1 / 2, "layers.1.1": 1.0,
        "layers.2.0": 1 / 2, "layers.2.1": 1.0,
        **{f"layers.{i}.{g}": 1.0 for i in (3, 4, 5) for g in range(3)},
    }  # fmt: skip
    net = branched_network(ednas_encoder(FIXED), branching, CHANNELS)
    assert set(scales) == {
        f"layers.{i}.{g}" for i, layer in enumerate(net.layers) for g in range(len(layer))
    }
    for name in scales:
        assert sum(p.numel() for p in net.get_submodule(name).parameters()) > 0


# Refusals -----------------------------------------------------------------------------------


def test_branchings_of_something_else_are_refused():
    fixed, searchable, deeplab = ednas_encoder(FIXED), ednas_encoder(SPACE), small_deeplab()
    depth = len(fixed.layers)
    path = SPACE.base_architecture
    good = Branching.shared(TASKS, depth)
    check_branching(fixed, good, TASKS)
    check_branching(searchable, Branching.shared(TASKS, depth, path), TASKS)
    cases = [
        (fixed, good, TASKS[:2], "expected a branching of segmentation, depth, got one of"),
        (fixed, good, (*TASKS[1:], TASKS[0]), "got one of segmentation, depth, normals"),
        (fixed, Branching.shared(TASKS, depth - 1), TASKS, "has 6 layers, the branching 5"),
        (searchable, good, TASKS, "needs an architecture per task"),
        (fixed, Branching.shared(TASKS, depth, path), TASKS, "block"),
        (
            deeplab,
            Branching.shared(TASKS, len(deeplab.layers), path),
            TASKS,
            "no choice of blocks, the branching has paths",
        ),
    ]
    assert path != FIXED.base_architecture
    for encoder, branching, tasks, message in cases:
        with pytest.raises(ValueError, match=message):
            check_branching(encoder, branching, tasks)
        with pytest.raises(ValueError, match=message):
            branched_network(encoder, branching, dict.fromkeys(tasks, 1))


def test_weights_are_inherited_by_the_network_of_the_same_branching_only():
    encoder = ednas_encoder(FIXED)
    depth = len(encoder.layers)
    net = supergraph(encoder, CHANNELS)
    one, other = Branching.shared(TASKS, depth), Branching.separate(TASKS, depth)
    alone = branched_network(encoder, one, CHANNELS)
    candidates = tuple((t,) * depth for t in range(3))
    with pytest.raises(ValueError, match=r"expected the network of layers 1-6: segmentation \|"):
        inherit_branched(alone, net, candidates, other)
    with pytest.raises(ValueError, match="expected the network of"):
        inherit_branched(net, net, ((0,) * depth,) * 3, one)


# Export -------------------------------------------------------------------------------------


def test_a_branched_network_is_exported(tmp_path):
    torch.manual_seed(0)
    encoder = ednas_encoder(SPACE)
    routes = random_routes(encoder, 4)
    branching = routes.branching(TASKS)
    assert max(branching.num_groups) > 1
    net = branched_network(encoder, branching, CHANNELS)
    calibration = images(16, size=(32, 64)).clamp(-1, 1)
    recalibrate_bn(net, [calibration])
    net.eval()
    report = export_tflite(net, tmp_path / "net.tflite", calibration_images=calibration)
    assert set(report.outputs) == set(TASKS)
    found = TfliteNetwork(tmp_path / "net.tflite")(calibration[:4])
    with torch.no_grad():
        expected = net(calibration[:4])
    for task in TASKS:
        error = (found[task] - expected[task]).square().mean()
        assert float(error / expected[task].var()) < 0.1
    program = torch.export.export(net, (calibration[:1],))
    for task, y in program.module()(calibration[:1]).items():
        torch.testing.assert_close(y, net(calibration[:1])[task], rtol=1e-4, atol=1e-5)


def one_layer(name: str = "stem", **settings) -> EncoderLayer:
    return EncoderLayer(
        **{"name": name, "reads": (-1,), "build": lambda: torch.nn.Conv2d(3, 4, 1)} | settings
    )


@pytest.mark.parametrize("names", [("stem", "stem"), ("stage.1",), ("",)])
def test_layers_go_by_names_of_their_own(names):
    with pytest.raises(ValueError, match="expected layers with names of their own"):
        Encoder(
            name="own",
            layers=tuple(one_layer(name) for name in names),
            decoder_reads=(0,),
            build_decoder=lambda count: torch.nn.Conv2d(4, count, 1),
        )


def test_a_layer_that_is_not_made_anew_is_refused():
    module = torch.nn.Conv2d(3, 4, 1)
    encoder = Encoder(
        name="own",
        layers=(one_layer(build=lambda: module),),
        decoder_reads=(0,),
        build_decoder=lambda count: torch.nn.Conv2d(4, count, 1),
    )
    with pytest.raises(ValueError, match="layer stem: build gives the same module each time"):
        supergraph(encoder, {"a": 1, "b": 1})
