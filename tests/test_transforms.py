import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.data.targets import TARGET_KINDS
from oneshot_ednas.data.transforms import AugmentConfig, augment

FULL = AugmentConfig(flip=True, scale=(0.7, 1.6), brightness=0.3, contrast=0.3, colour=0.3)


def make_batch(size=8, height=12, width=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    normals = torch.nn.functional.normalize(torch.randn(size, 3, height, width, generator=g), dim=1)
    labels = torch.randint(0, 5, (size, height, width), generator=g)
    depth = torch.rand(size, 1, height, width, generator=g) + 1
    labels[:, 0, 0] = 255
    depth[:, :, 0, 0] = 0
    normals[:, :, 0, 0] = 0
    image = torch.rand(size, 3, height, width, generator=g) * 2 - 1
    return {"image": image, "segmentation": labels, "depth": depth, "normals": normals}


KINDS = {"segmentation": "labels", "depth": "depth", "normals": "normals"}


def run(batch, config, seed=0, kinds=KINDS):
    return augment(batch, config, torch.Generator().manual_seed(seed), kinds)


def test_no_augmentation_changes_nothing():
    batch = make_batch()
    result = run(batch, AugmentConfig())
    assert all(torch.equal(result[name], batch[name]) for name in batch)


def test_the_batch_itself_is_left_alone():
    batch = make_batch()
    before = {name: tensor.clone() for name, tensor in batch.items()}
    run(batch, FULL)
    assert all(torch.equal(before[name], batch[name]) for name in batch)


def test_a_flip_mirrors_about_half_of_the_samples_and_negates_the_x_of_normals():
    batch = make_batch(size=64)
    result = run(batch, AugmentConfig(flip=True))
    flipped = (result["image"] != batch["image"]).flatten(1).any(dim=1)
    assert 20 < flipped.sum() < 44
    assert torch.equal(result["image"][flipped], batch["image"][flipped].flip(-1))
    assert torch.equal(result["segmentation"][flipped], batch["segmentation"][flipped].flip(-1))
    assert torch.equal(result["depth"][flipped], batch["depth"][flipped].flip(-1))
    mirrored = batch["normals"][flipped].flip(-1)
    assert torch.equal(result["normals"][flipped, 0], -mirrored[:, 0])
    assert torch.equal(result["normals"][flipped, 1:], mirrored[:, 1:])
    assert torch.equal(result["normals"][~flipped], batch["normals"][~flipped])


def test_flipping_twice_with_the_same_draws_is_the_identity():
    batch = make_batch(size=32)
    config = AugmentConfig(flip=True)
    result = run(run(batch, config, seed=3), config, seed=3)
    assert all(torch.equal(result[name], batch[name]) for name in batch)


@given(seed=st.integers(0, 10**6), low=st.floats(0.5, 2.0), spread=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_targets_hold_only_values_that_were_there(seed, low, spread):
    batch = make_batch(size=3, seed=seed)
    scale = (low, low + spread)
    result = run(batch, AugmentConfig(flip=True, scale=scale), seed)
    assert all(result[name].shape == batch[name].shape for name in batch)
    assert all(result[name].dtype == batch[name].dtype for name in batch)
    assert set(result["segmentation"].unique().tolist()) <= {0, 1, 2, 3, 4, 255}
    length = result["normals"].norm(dim=1)
    assert ((length - 1).abs() < 1e-5).logical_or(length == 0).all()
    # All three are invalid at the same pixels, as they were in the batch.
    invalid = result["segmentation"] == 255
    assert torch.equal(invalid, result["depth"][:, 0] == 0)
    assert torch.equal(invalid, length == 0)
    assert result["image"].abs().max() <= 1


@pytest.mark.parametrize("scale", [0.5, 1.25, 2.0])
def test_scaling_divides_depth(scale):
    batch = make_batch()
    batch["depth"] = torch.full_like(batch["depth"], 3.0)
    result = run(batch, AugmentConfig(scale=(scale, scale)))["depth"]
    valid = result > 0
    torch.testing.assert_close(result[valid], torch.full_like(result[valid], 3.0 / scale))
    assert bool(valid.all()) == (scale > 1)


def test_an_enlarged_image_shows_a_part_with_image_and_targets_aligned():
    # Position is written into every map, so that what lies under each pixel can be read off.
    height, width = 48, 64
    column = torch.arange(width).repeat(height, 1)
    image = (column / width).expand(4, 3, -1, -1).contiguous() * 2 - 1
    batch = {"image": image, "segmentation": column.repeat(4, 1, 1)}
    result = run(batch, AugmentConfig(flip=True, scale=(2.0, 2.0)))
    from_image = (result["image"][:, 0] + 1) / 2 * width
    assert (from_image - result["segmentation"]).abs().max() <= 0.76
    shown = result["segmentation"].amax(dim=(1, 2)) - result["segmentation"].amin(dim=(1, 2))
    assert ((shown >= width / 2 - 1) & (shown <= width / 2)).all()
    assert result["segmentation"].amin(dim=(1, 2)).unique().numel() == 4


def test_a_shrunken_image_lies_whole_inside_an_invalid_surround():
    batch = make_batch(size=16, height=24, width=32)
    batch["segmentation"] = torch.arange(24 * 32).view(1, 24, 32).repeat(16, 1, 1) % 200
    result = run(batch, AugmentConfig(scale=(0.5, 0.5)))
    outside = result["segmentation"] == 255
    kept = (~outside).flatten(1).sum(dim=1)
    assert (kept == 12 * 16).all()
    assert (result["image"].permute(0, 2, 3, 1)[outside] == 0).all()
    assert (result["normals"].permute(0, 2, 3, 1)[outside] == 0).all()
    assert outside.flatten(1).unique(dim=0).shape[0] > 8


def test_colours_change_the_image_only_and_each_sample_for_itself():
    batch = make_batch()
    batch["image"] = batch["image"][:1].repeat(8, 1, 1, 1)
    result = run(batch, AugmentConfig(brightness=0.3, contrast=0.3, colour=0.3))
    assert all(torch.equal(result[name], batch[name]) for name in batch if name != "image")
    assert result["image"].flatten(1).unique(dim=0).shape[0] == 8
    assert result["image"].abs().max() <= 1


@pytest.mark.parametrize("kind", ["brightness", "contrast", "colour"])
def test_each_colour_change_is_the_textbook_formula(kind):
    batch = make_batch(size=6)
    batch["image"] = batch["image"] * 0.3
    result = run(batch, AugmentConfig(**{kind: 0.4}))["image"]
    x, y = (batch["image"] + 1) / 2, (result + 1) / 2
    draws = torch.rand(6, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    column = {"brightness": 4, "contrast": 5, "colour": 6}[kind]
    factor = (1 + 0.4 * draws[:, column]).view(-1, 1, 1, 1)
    grey = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    expected = {
        "brightness": x * factor,
        "contrast": (x - grey.mean(dim=(2, 3), keepdim=True)) * factor
        + grey.mean(dim=(2, 3), keepdim=True),
        "colour": grey + (x - grey) * factor,
    }[kind]
    torch.testing.assert_close(y, expected)


def test_all_colour_changes_are_brightness_then_contrast_then_saturation():
    batch = make_batch(size=6)
    batch["image"] = batch["image"] * 0.2
    result = run(batch, AugmentConfig(brightness=0.3, contrast=0.4, colour=0.5))["image"]
    draws = torch.rand(6, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    strengths = torch.tensor([0.3, 0.4, 0.5])
    brightness, contrast, colour = (1 + strengths * draws[:, 4:]).T.view(3, -1, 1, 1, 1)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    x = (batch["image"] + 1) / 2 * brightness
    mean = (x * luma).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
    x = (x - mean) * contrast + mean
    grey = (x * luma).sum(dim=1, keepdim=True)
    torch.testing.assert_close((result + 1) / 2, grey + (x - grey) * colour)


def test_an_enlarged_plain_image_stays_plain_up_to_its_border():
    batch = {"image": torch.full((64, 3, 12, 16), 0.8)}
    result = run(batch, AugmentConfig(flip=True, scale=(1.0, 1.5)))
    torch.testing.assert_close(result["image"], batch["image"])


def test_grey_images_stay_grey():
    batch = make_batch()
    batch["image"] = batch["image"][:, :1].repeat(1, 3, 1, 1)
    image = run(batch, AugmentConfig(brightness=0.3, contrast=0.3, colour=0.3))["image"]
    torch.testing.assert_close(image[:, 0], image[:, 1])
    torch.testing.assert_close(image[:, 0], image[:, 2])


def test_the_result_is_a_function_of_batch_and_seed():
    batch = make_batch()
    first, again, other = run(batch, FULL, 1), run(batch, FULL, 1), run(batch, FULL, 2)
    assert all(torch.equal(first[name], again[name]) for name in batch)
    assert not torch.equal(first["image"], other["image"])


def test_any_config_takes_the_same_number_of_draws():
    states = []
    for config in (AugmentConfig(), FULL):
        generator = torch.Generator().manual_seed(0)
        augment(make_batch(), config, generator, KINDS)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_bad_configs_and_batches_are_refused():
    with pytest.raises(ValueError, match=r"scale: expected 0 < smallest <= largest, got 1.5 and 1"):
        AugmentConfig(scale=(1.5, 1.0))
    with pytest.raises(ValueError, match=r"contrast: expected 0\.\.1, got -0.1"):
        AugmentConfig(contrast=-0.1)
    with pytest.raises(
        ValueError, match=r"no kind is given for the target edges; given are \['depth', "
    ):
        run({**make_batch(), "edges": torch.zeros(8, 1, 12, 16)}, FULL)
    with pytest.raises(ValueError, match=r"expected a batch with an image, got \['depth'\]"):
        run({"depth": torch.zeros(1, 1, 4, 4)}, FULL)


def make_kinds_batch(size=6, height=12, width=16, seed=0):
    """One target of every kind, named by it, with invalid pixels in places of their own."""
    g = torch.Generator().manual_seed(seed)
    batch = {"image": torch.rand(size, 3, height, width, generator=g) * 2 - 1}
    for name, kind in TARGET_KINDS.items():
        if kind.is_whole:
            target = torch.randint(0, 2, (size, height, width), generator=g)
        else:
            target = torch.rand(size, kind.channels, height, width, generator=g) + 0.5
        outside = torch.rand(size, height, width, generator=g) < 0.2
        if target.ndim == 4:
            outside = outside[:, None].expand_as(target)
        target[outside] = kind.invalid
        batch[name] = target
    return batch


ALL_KINDS = {name: name for name in TARGET_KINDS}


def same(a, b):
    return torch.equal(a.nan_to_num(nan=-7), b.nan_to_num(nan=-7))


@pytest.mark.parametrize("name", TARGET_KINDS)
def test_every_kind_is_itself_after_two_mirrors(name):
    batch = make_kinds_batch()
    config = AugmentConfig(flip=True)
    once = run(batch, config, seed=3, kinds=ALL_KINDS)
    assert same(run(once, config, seed=3, kinds=ALL_KINDS)[name], batch[name])
    changed = (once["image"] != batch["image"]).flatten(1).any(dim=1)
    assert 0 < changed.sum() < len(changed)
    factors = torch.tensor(TARGET_KINDS[name].mirrored)
    if batch[name].ndim == 4:
        factors = factors.view(-1, 1, 1)
    mirrored = (batch[name].flip(-1) * factors).to(batch[name].dtype)
    assert same(once[name][changed], mirrored[changed])
    assert same(once[name][~changed], batch[name][~changed])


@pytest.mark.parametrize("name", TARGET_KINDS)
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.6])
def test_every_kind_is_aligned_with_the_image_and_scaled_as_its_row_says(name, scale):
    batch = make_kinds_batch(height=24, width=32)
    # Where each pixel comes from, carried along as labels.
    batch["place"] = torch.arange(24 * 32).view(1, 24, 32).repeat(6, 1, 1)
    kinds = {**ALL_KINDS, "place": "labels"}
    batch["place"][batch["place"] == 255] = 254
    batch["inside"] = torch.zeros_like(batch["place"])
    kinds["inside"] = "labels"
    result = run(batch, AugmentConfig(scale=(scale, scale)), seed=5, kinds=kinds)
    outside = result["inside"] == 255
    assert bool(outside.any()) == (scale < 1)
    target, found = batch[name], result[name]
    assert (found.shape, found.dtype) == (target.shape, target.dtype)
    planes = target.view(6, -1, 24 * 32)
    places = result["place"].clamp(max=24 * 32 - 1).view(6, 1, -1).expand(-1, planes.shape[1], -1)
    expected = planes.gather(2, places).view_as(target)
    factor = {"depth": 1 / scale, "disparity": scale}.get(name, 1)
    expected = (expected * factor).to(target.dtype)
    if target.ndim == 4:
        outside = outside[:, None].expand_as(target)
    invalid = {"labels": 255, "edges": 255, "values": torch.nan}.get(name, 0)
    expected[outside] = invalid
    if name == "edges" and scale < 1:  # grown, see below
        assert ((found == 1) | (found == expected)).all()
        return
    # One place has the number of another: 254 stands for 255 too.
    known = result["place"] != 254
    known = known[:, None].expand_as(target) if target.ndim == 4 else known
    torch.testing.assert_close(found[known], expected[known], equal_nan=True)


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.7, 0.9])
def test_a_line_of_edges_survives_at_every_scale(scale):
    edges = torch.zeros(30, 32, 32, dtype=torch.int64)
    edges[:10, 13], edges[10:20, :, 18], edges[20:] = 1, 1, torch.eye(32, dtype=torch.int64)
    batch = {"image": torch.zeros(30, 3, 32, 32), "edges": edges}
    found = run(batch, AugmentConfig(scale=(scale, scale)), seed=2, kinds={"edges": "edges"})
    shown = found["edges"] != 255
    # In each row or column of what is shown, the line has one or two pixels.
    counts = ((found["edges"] == 1).sum(2)[10:20], (found["edges"] == 1).sum(1)[:10])
    for count, inside in zip(counts, (shown[10:20].any(2), shown[:10].any(1)), strict=True):
        assert ((count >= 1) == inside).all()
        assert (count <= 3).all()
    diagonal = (found["edges"][20:] == 1).any(2)
    assert (diagonal == shown[20:].any(2)).all()
