"""The network: three ways to run one architecture, inheritance, BN statistics, and its size."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import OUT_CHANNELS, SMALL_SPACE, random_alpha
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oneshot_ednas.architecture import Architecture
from oneshot_ednas.models.blocks import SharingConfig
from oneshot_ednas.models.layers import ElasticBatchNorm
from oneshot_ednas.models.network import (
    Network,
    build_network,
    derived_network,
    inherit_weights,
    recalibrate_bn,
)
from oneshot_ednas.relaxation import ArchitectureParameters, one_hot_gates
from oneshot_ednas.schema import shipped
from oneshot_ednas.space import SearchSpace, ednas_b0, ednas_tiny

seeds = st.integers(0, 2**31 - 1)

SHARING = {
    "shared": SharingConfig(),
    "per_width": SharingConfig(bn_affine="per_width"),
    "kernel_transform": SharingConfig(kernel_transform=True),
    "both": SharingConfig(bn_affine="per_width", kernel_transform=True),
}


def supernet_of(space: SearchSpace, sharing: str = "shared") -> Network:
    """A supernet away from its identity start, so that a wrong channel, set or map shows."""
    torch.manual_seed(0)
    supernet = build_network(space, OUT_CHANNELS, sharing=SHARING[sharing])
    for name, parameter in supernet.named_parameters():
        if "kernel_maps" in name:
            nn.init.normal_(parameter, std=0.2)
    for layer in bn_layers(supernet):
        for tensor in (layer.weight, layer.running_var):
            tensor.data.uniform_(0.5, 1.5)
        for tensor in (layer.bias, layer.running_mean):
            tensor.data.normal_(std=0.5)
    for head in supernet.heads.values():
        # Unit scale: the default 0.01 would hide differences below absolute tolerances.
        nn.init.normal_(head.classifier.weight)
    return supernet


def bn_layers(network: Network) -> list[ElasticBatchNorm]:
    return [layer for layer in network.modules() if isinstance(layer, ElasticBatchNorm)]


def images_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def supernets() -> dict[str, Network]:
    spaces = (ednas_tiny(), ednas_b0(), SearchSpace.from_yaml(SMALL_SPACE))
    found = {space.name: supernet_of(space) for space in spaces}
    return found | {name: supernet_of(spaces[-1], name) for name in SHARING if name != "shared"}


def assert_same(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Equal to a fraction of the largest value, task by task."""
    assert list(got) == list(expected) == list(OUT_CHANNELS)
    for task, value in got.items():
        scale = expected[task].abs().max().item()
        assert scale > 0.1
        torch.testing.assert_close(value, expected[task], rtol=0, atol=tolerance * scale)


def check_three_runs(supernet: Network, seed: int, *, tolerance: float) -> None:
    space = supernet.space
    dtype = next(supernet.parameters()).dtype
    architecture = space.sample(np.random.default_rng(seed))
    images = images_of(2, 3, 64, 64, seed=seed).to(dtype)
    network = derived_network(supernet, architecture).to(dtype)
    side = 64 // space.output_stride
    for is_training in (True, False):
        supernet.train(is_training)
        network.train(is_training)
        with torch.no_grad():
            derived = network(images)
            assert_same(supernet(images, architecture), derived, tolerance)
            gates = one_hot_gates(space, architecture, dtype=dtype)
            assert_same(supernet(images, gates), derived, tolerance)
        for task, count in OUT_CHANNELS.items():
            assert derived[task].shape == (2, count, side, side)
        # The training pass has moved the derived network's statistics.
        inherit_weights(network, supernet, architecture)


@settings(max_examples=8)
@given(seeds)
def test_one_hot_equals_sliced_equals_derived_in_the_tiny_space(supernets, seed):
    check_three_runs(supernets["ednas_tiny"], seed, tolerance=1e-5)


@settings(max_examples=2)
@given(seeds)
def test_one_hot_equals_sliced_equals_derived_in_the_paper_s_space(supernets, seed):
    # In float64: the coarsest level is one pixel, and batch statistics over two values magnify
    # float32's rounding; a wrong channel shows all the better.
    supernet = supernets["ednas_b0"].double()
    check_three_runs(supernet, seed, tolerance=1e-9)
    supernet.float()


@pytest.mark.parametrize("sharing", ["per_width", "kernel_transform", "both"])
@settings(max_examples=5)
@given(seed=seeds)
def test_one_hot_equals_sliced_equals_derived_however_options_share(supernets, sharing, seed):
    check_three_runs(supernets[sharing], seed, tolerance=1e-5)


def test_hard_gates_run_the_architecture_that_they_sampled(supernets):
    supernet = supernets["ednas_tiny"].eval()
    alpha, images = random_alpha(supernet.space, 1), images_of(1, 3, 64, 64)
    gates = alpha.gates(1.0, hard=True, generator=torch.Generator().manual_seed(5))
    indices = [int(v.argmax()) for block in gates for v in block if len(v) > 1]
    with torch.no_grad():
        assert_same(supernet(images, gates), supernet(images, supernet.space.decode(indices)))


def test_the_derived_network_holds_exactly_the_architecture_s_channels(supernets):
    supernet = supernets["ednas_tiny"]
    space = supernet.space
    architecture = space.sample(np.random.default_rng(3))
    network = derived_network(supernet, architecture)
    in_filters = space.stem_filters
    for block, module in zip(architecture.blocks, network.backbone.blocks, strict=True):
        assert list(module.branches) == [block.op]
        branch = module.branches[block.op]
        hidden = in_filters * block.expand_ratio
        assert branch.project.shape == (block.filters, hidden, 1, 1)
        kernel = branch.depthwise if block.op == "ibn" else branch.expand
        group = 1 if block.op == "ibn" else in_filters
        assert kernel.shape == (hidden, group, block.kernel_size, block.kernel_size)
        in_filters = block.filters
    assert network.num_parameters == sum(p.numel() for p in network.parameters())
    assert network.num_parameters < supernet.num_parameters


def test_inherited_weights_are_copies(supernets):
    supernet = supernets["small"]
    network = derived_network(supernet, supernet.space.base_architecture)
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert all(torch.equal(supernet.state_dict()[name], tensor) for name, tensor in before.items())


# What options share -------------------------------------------------------------------------


def test_a_supernet_keeps_its_tensors_by_default(small_space):
    state = build_network(small_space, OUT_CHANNELS).state_dict()
    bn = ("weight", "bias", "running_mean", "running_var")
    spec, width = small_space.blocks[1], max(small_space.in_filters(1))
    hidden, out, side = max(spec.expand_ratios) * width, max(spec.filters), max(spec.kernel_sizes)
    prefix = "backbone.blocks.1.branches."
    expected = {
        "ibn.project": (out, hidden, 1, 1),
        "ibn.expand": (hidden, width, 1, 1),
        "ibn.depthwise": (hidden, 1, side, side),
        **{f"ibn.expand_bn.{name}": (hidden,) for name in bn},
        **{f"ibn.depthwise_bn.{name}": (hidden,) for name in bn},
        **{f"ibn.project_bn.{name}": (out,) for name in bn},
        "fused_ibn.project": (out, hidden, 1, 1),
        "fused_ibn.expand": (hidden, width, side, side),
        **{f"fused_ibn.expand_bn.{name}": (hidden,) for name in bn},
        **{f"fused_ibn.project_bn.{name}": (out,) for name in bn},
    }
    got = {n.removeprefix(prefix): tuple(t.shape) for n, t in state.items() if prefix in n}
    assert got == expected


@pytest.mark.parametrize("sharing", ["per_width", "kernel_transform", "both"])
def test_however_options_share_a_supernet_starts_as_the_same_function(small_space, sharing):
    torch.manual_seed(1)
    plain = build_network(small_space, OUT_CHANNELS).eval()
    after = torch.rand(1)
    torch.manual_seed(1)
    supernet = build_network(small_space, OUT_CHANNELS, sharing=SHARING[sharing]).eval()
    assert torch.equal(torch.rand(1), after)  # no draw more or less
    extra = supernet.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() <= supernet.state_dict().keys()
    assert all("kernel_maps" in name for name in extra)
    assert bool(extra) == (sharing != "per_width")
    images, generator = images_of(1, 3, 32, 32), np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(5):
            architecture = small_space.sample(generator)
            got, expected = supernet(images, architecture), plain(images, architecture)
            assert all(torch.equal(got[task], expected[task]) for task in expected)


def test_a_derived_network_is_the_same_however_its_supernet_shares(small_space):
    fixed = small_space.fix(small_space.base_architecture)
    plain = build_network(fixed, OUT_CHANNELS).state_dict()
    other = build_network(fixed, OUT_CHANNELS, sharing=SHARING["both"]).state_dict()
    assert {n: t.shape for n, t in plain.items()} == {n: t.shape for n, t in other.items()}


def test_an_architecture_trains_its_own_bn_sets_and_the_maps_that_it_needs(supernets):
    supernet = supernets["both"].train()
    space = supernet.space
    architecture = space.sample(np.random.default_rng(2))
    supernet.zero_grad()
    outputs = supernet(images_of(2, 3, 64, 64), architecture)
    sum(value.square().mean() for value in outputs.values()).backward()
    in_width = space.stem_filters
    for index, (spec, block) in enumerate(zip(space.blocks, architecture.blocks, strict=True)):
        branch = supernet.backbone.blocks[index].branches[block.op]
        own = (
            space.in_filters(index).index(in_width),
            spec.expand_ratios.index(block.expand_ratio),
        )
        hidden_bn = branch.depthwise_bn if block.op == "ibn" else branch.expand_bn
        width = spec.filters.index(block.filters)
        for layer, option in ((hidden_bn, own), (branch.project_bn, (width,))):
            for gradient in (layer.weight.grad, layer.bias.grad):
                used = gradient.abs().amax(-1) > 0
                assert used[option]
                assert used.sum() == 1
        maps = branch.kernel_maps
        assert set(maps) == {str(size) for size in spec.kernel_sizes[:-1]}
        for size, beyond in maps.items():
            is_used = beyond.grad is not None and bool(beyond.grad.any())
            assert is_used == (block.kernel_size <= int(size))
        in_width = block.filters
    supernet.zero_grad()


@pytest.mark.parametrize("name", ["ednas_tiny", "small", "both"])
def test_every_parameter_of_a_derived_network_gets_a_gradient(supernets, name):
    supernet = supernets[name]
    network = derived_network(supernet, supernet.space.sample(np.random.default_rng(1))).train()
    outputs = network(images_of(2, 3, 64, 64))
    sum(value.square().mean() for value in outputs.values()).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


# Gradients of alpha -------------------------------------------------------------------------


def alpha_loss(supernet: Network, alpha: ArchitectureParameters, images, *, hard: bool, seed: int):
    gates = alpha.gates(2.0, hard=hard, generator=torch.Generator().manual_seed(seed))
    outputs = supernet(images, gates)
    # A fixed random projection: no symmetry that could cancel a gradient.
    total = torch.zeros((), dtype=images.dtype)
    for index, value in enumerate(outputs.values()):
        total = total + (value * images_of(*value.shape, seed=index).to(value)).mean()
    return total


@pytest.mark.parametrize("name", ["ednas_tiny", "ednas_b0", "both"])
@pytest.mark.parametrize("hard", [False, True])
def test_every_choice_gets_a_gradient_from_the_network(supernets, name, hard):
    supernet = supernets[name].train()
    alpha = random_alpha(supernet.space, 0, scale=0.1)
    size = 96 if name == "ednas_b0" else 64
    alpha_loss(supernet, alpha, images_of(2, 3, size, size), hard=hard, seed=0).backward()
    start = 0
    for choice in supernet.space.choices:
        gradient = alpha.logits.grad[start : start + len(choice.options)]
        start += len(choice.options)
        assert (gradient.abs() > 0).all(), choice.name
        # A softmax does not see a shift of all its logits.
        assert gradient.sum().abs() < 1e-3 * gradient.abs().sum() + 1e-12, choice.name


@pytest.mark.parametrize(
    ("name", "sharing"),
    [("ednas_tiny", "shared"), *(("small", sharing) for sharing in SHARING)],
)
def test_the_gradient_of_alpha_agrees_with_finite_differences(name, sharing):
    space = SearchSpace.from_yaml(SMALL_SPACE) if name == "small" else ednas_tiny()
    supernet = supernet_of(space, sharing).double().train()
    # float64 alpha: the noise is drawn in float32 and is the same at each call.
    alpha = random_alpha(space, 2, scale=0.5).double()
    images = images_of(2, 3, 64, 64).double()
    loss = alpha_loss(supernet, alpha, images, hard=False, seed=4)
    (gradient,) = torch.autograd.grad(loss, alpha.logits)
    scale = gradient.abs().max().item()
    generator = torch.Generator().manual_seed(0)
    directions = [torch.eye(len(gradient), dtype=torch.float64)[i] for i in (0, 3, -1)]
    directions += [
        torch.randn(len(gradient), generator=generator, dtype=torch.float64) for _ in range(6)
    ]
    for direction in directions:
        values = []
        # So small a step that hardly a ReLU6 crosses its kink on the way.
        for step in (1e-8, -1e-8):
            moved = random_alpha(space, 2, scale=0.5).double()
            moved.logits.data.copy_(alpha.logits.data + step * direction)
            with torch.no_grad():
                values.append(alpha_loss(supernet, moved, images, hard=False, seed=4).item())
        slope = (values[0] - values[1]) / 2e-8
        assert slope == pytest.approx((gradient @ direction).item(), rel=2e-4, abs=1e-5 * scale)


# BN statistics ------------------------------------------------------------------------------


def test_training_a_supernet_leaves_its_running_statistics_untouched(supernets):
    supernet = supernets["small"].train()
    space = supernet.space
    before = [(x.running_mean.clone(), x.running_var.clone()) for x in bn_layers(supernet)]
    for run in (space.base_architecture, one_hot_gates(space, space.base_architecture)):
        outputs = supernet(images_of(2, 3, 32, 32), run)
        sum(value.sum() for value in outputs.values()).backward()
    supernet.zero_grad()
    for layer, (mean, var) in zip(bn_layers(supernet), before, strict=True):
        assert torch.equal(layer.running_mean, mean)
        assert torch.equal(layer.running_var, var)


def test_training_a_derived_network_moves_its_running_statistics(small_space):
    network = build_network(small_space.fix(small_space.base_architecture), OUT_CHANNELS).train()
    network(images_of(2, 3, 32, 32))
    assert all((layer.running_mean != 0).any() for layer in bn_layers(network))


def batch_statistics(network, batches, architecture=None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Averages over batches of each BN layer's batch mean and unbiased variance, in NumPy."""
    seen: dict[nn.Module, list[np.ndarray]] = {layer: [] for layer in bn_layers(network)}
    hooks = [
        layer.register_forward_pre_hook(lambda m, x: seen[m].append(x[0].double().numpy()))
        for layer in seen
    ]
    network.train()
    with torch.no_grad():
        for images in batches:
            network(images, architecture)
    for hook in hooks:
        hook.remove()
    axes = (0, 2, 3)
    return [
        (
            np.mean([x.mean(axes) for x in values], 0),
            np.mean([x.var(axes, ddof=1) for x in values], 0),
        )
        if values
        else (np.empty(0), np.empty(0))
        for values in seen.values()
    ]


@pytest.mark.parametrize("is_supernet", [True, False])
def test_recalibrated_statistics_are_the_averages_over_batches(is_supernet):
    space = ednas_tiny()
    architecture = space.sample(np.random.default_rng(6))
    network = supernet_of(space)
    if not is_supernet:
        network, architecture = derived_network(network, architecture), None
    batches = [images_of(2, 3, 64, 64, seed=seed) for seed in range(3)]
    expected = batch_statistics(network, batches, architecture)
    momenta = [layer.momentum for layer in bn_layers(network)]
    network.eval()
    recalibrate_bn(network, iter(batches), architecture)
    assert not network.training
    assert [layer.momentum for layer in bn_layers(network)] == momenta
    for layer, (mean, var) in zip(bn_layers(network), expected, strict=True):
        used = len(mean)
        np.testing.assert_allclose(layer.running_mean[:used].numpy(), mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.running_var[:used].numpy(), var, rtol=1e-3, atol=1e-6)
        # What the architecture does not use is reset.
        assert (layer.running_mean[used:] == 0).all()
        assert (layer.running_var[used:] == 1).all()


@settings(max_examples=4)
@given(seeds)
def test_recalibrated_derived_and_sliced_networks_evaluate_alike(seed):
    supernet = supernet_of(ednas_tiny())
    architecture = supernet.space.sample(np.random.default_rng(seed))
    network = derived_network(supernet, architecture)
    batches = [images_of(4, 3, 64, 64, seed=i) for i in range(2)]
    recalibrate_bn(supernet, batches, architecture)
    recalibrate_bn(network, batches)
    images = images_of(2, 3, 64, 64, seed=9)
    with torch.no_grad():
        assert_same(supernet.eval()(images, architecture), network.eval()(images))


def test_recalibration_takes_no_gradient_and_needs_a_batch(supernets):
    supernet = supernets["small"].train()
    recalibrate_bn(supernet, [images_of(2, 3, 32, 32)], supernet.space.base_architecture)
    assert supernet.training
    assert all(parameter.grad is None for parameter in supernet.parameters())
    with pytest.raises(ValueError, match="recalibrating BN needs at least one batch of images"):
        recalibrate_bn(supernet, [], supernet.space.base_architecture)


class Twice(nn.Module):
    """Torch's own BN: one layer runs before and after a square, one only where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: torch.Tensor, path: str = "") -> torch.Tensor:
        features = self.dropout(self.norm(images))
        features = self.norm(images**2)
        return self.other(features) if path == "other" else features


def test_statistics_of_other_modules_are_averages_over_the_runs_of_each_layer():
    network = Twice()
    network.other.eval()
    for tensor in (network.norm.running_mean, network.other.running_var):
        tensor.fill_(7)
    batches = [images_of(2, 3, 5, 4, seed=seed) for seed in range(3)]
    state = torch.random.get_rng_state()
    recalibrate_bn(network, iter(batches))
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing is dropped meanwhile
    assert (network.norm.momentum, network.other.momentum) == (0.1, 0.3)
    assert network.training
    assert network.norm.training
    assert not network.other.training
    runs = [x.double().numpy() for images in batches for x in (images, images**2)]
    axes = (0, 2, 3)
    means = np.mean([x.mean(axes) for x in runs], 0)
    variances = np.mean([x.var(axes, ddof=1) for x in runs], 0)
    np.testing.assert_allclose(network.norm.running_mean.numpy(), means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(network.norm.running_var.numpy(), variances, rtol=1e-5)
    assert network.other.running_mean.tolist() == [0, 0, 0]  # never run
    assert network.other.running_var.tolist() == [1, 1, 1]
    recalibrate_bn(network, batches, "other")
    assert (network.other.running_mean.abs() < 1e-5).all()  # of what is normalised already
    assert (network.other.running_var != 1).all()
    with pytest.raises(ValueError, match="recalibrating BN needs at least one batch of images"):
        recalibrate_bn(network, [])


# Refusals -----------------------------------------------------------------------------------


def test_networks_without_tasks_or_channels_are_refused(small_space):
    with pytest.raises(ValueError, match="out_channels: expected at least one task"):
        build_network(small_space, {})
    with pytest.raises(
        ValueError, match="out_channels: task depth needs at least 1 channel, got 0"
    ):
        build_network(small_space, {"segmentation": 3, "depth": 0})


def test_a_supernet_must_be_told_what_to_run(supernets):
    supernet, images = supernets["small"], images_of(1, 3, 32, 32)
    base = supernet.space.base_architecture
    with pytest.raises(ValueError, match="a supernet needs an architecture or gates"):
        supernet(images)
    with pytest.raises(ValueError, match="expected gates for 4 blocks, got 3"):
        supernet(images, one_hot_gates(supernet.space, base)[:3])
    odd = Architecture((replace(base.blocks[0], filters=9), *base.blocks[1:]))
    with pytest.raises(ValueError, match="block 1 has filters 9, the options are"):
        supernet(images, odd)


def test_weights_go_only_into_the_architecture_s_own_network(supernets):
    supernet = supernets["small"]
    space = supernet.space
    base = space.base_architecture
    other = space.decode([1] * len(space.choices))
    network = build_network(space.fix(base), OUT_CHANNELS)
    for wrong_network, wrong_architecture in ((network, other), (supernet, base)):
        with pytest.raises(ValueError, match=r"must be built from space\.fix\(architecture\)"):
            inherit_weights(wrong_network, supernet, wrong_architecture)
    with pytest.raises(
        ValueError, match=r"expected a network with tasks .*depth.*, got \{'depth': 1\}"
    ):
        inherit_weights(build_network(space.fix(base), {"depth": 1}), supernet, base)


# Size ---------------------------------------------------------------------------------------


def gflops(network: Network) -> float:
    """2 x multiply-adds of the convolutions at 256x256, in billions, as fvcore counts them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore is built on torch.jit, which is deprecated
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(network.eval(), torch.zeros(1, 3, 256, 256))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return 2 * analysis.by_operator()["conv"] / 1e9


def edge_network(architecture: Architecture | None, **out_channels: int) -> Network:
    space = ednas_b0()
    return build_network(space.fix(architecture or space.base_architecture), out_channels)


@pytest.mark.slow
def test_the_base_network_has_the_size_of_the_paper_s_edge_baseline():
    # Vu et al., EDNAS, table 2: MT edge baseline 3.4 M parameters and 1.2 GFLOPs; the two
    # single-task networks together 2.3 GFLOPs.
    network = edge_network(None, segmentation=19, depth=1)
    assert round(network.num_parameters / 1e6, 1) == 3.4
    assert round(gflops(network), 1) == 1.2
    single = gflops(edge_network(None, segmentation=19)) + gflops(edge_network(None, depth=1))
    assert round(single, 1) == 2.3


@pytest.mark.slow
def test_table_6_with_a_standard_fused_ibn_is_larger_than_printed():
    # The paper prints 4.3 M and 4.1 GFLOPs, which a full k x k convolution exceeds.
    architecture = Architecture.load(shipped("configs/architectures/ednas_table6.json"))
    network = edge_network(architecture, segmentation=19, depth=1)
    assert round(network.num_parameters / 1e6, 1) == 12.7
    assert round(gflops(network), 1) == 6.7


def test_what_hard_gates_leave_idle_has_no_gradient_but_that_of_its_gate():
    """Bit for bit the gradient of alpha that all branches give, held in less memory."""
    space = ednas_tiny()
    torch.manual_seed(0)
    supernet = build_network(space, {"depth": 1})
    alpha = ArchitectureParameters(space)
    images = torch.randn(2, 3, 64, 64)
    found, held = [], []
    for make in (lambda gates: gates, tuple):
        gates = alpha.gates(1.0, hard=True, generator=torch.Generator().manual_seed(3))
        assert any(gates.idle_ops)
        sizes = dict[int, int]()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            loss = supernet(images, make(gates))["depth"].square().mean()
        found.append(torch.autograd.grad(loss, alpha.logits)[0])
        held.append(sum(sizes.values()))
    assert torch.equal(*found)
    assert torch.count_nonzero(found[0]) > 0
    assert held[0] < 0.8 * held[1]


@pytest.mark.parametrize("is_hard", [True, False])
def test_activations_that_are_computed_again_give_the_same_gradients_from_less_memory(is_hard):
    space = ednas_tiny()
    torch.manual_seed(0)
    supernet = build_network(space, {"depth": 1})
    alpha = ArchitectureParameters(space)
    images = torch.randn(2, 3, 64, 64)
    weights = list(supernet.backbone.parameters())[:5]
    found, held = [], []
    for supernet.backbone.checkpoint_activations in (False, True):
        gates = alpha.gates(1.0, hard=is_hard, generator=torch.Generator().manual_seed(3))
        sizes = dict[int, int]()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            loss = supernet(images, gates)["depth"].square().mean()
        found.append(torch.autograd.grad(loss, [alpha.logits, *weights], allow_unused=True))
        held.append(sum(sizes.values()))
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert held[1] < 0.6 * held[0]
