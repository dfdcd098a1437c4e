"""Search spaces: counts, encoding, sampling, mutation, fixing, files and refusals."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import SMALL_SPACE, all_architectures
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.architecture import Architecture, BlockArchitecture
from oneshot_ednas.schema import shipped
from oneshot_ednas.space import (
    CHOICE_FIELDS,
    SearchSpace,
    ednas_b0,
    ednas_tiny,
    named_space,
)

SPACES = [ednas_b0(), ednas_tiny(), SearchSpace.from_yaml(SMALL_SPACE)]
seeds = st.integers(0, 2**32 - 1)
spaces = st.sampled_from(range(len(SPACES)))


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


def test_ednas_b0_has_two_to_the_79_architectures():
    # 32**16 = 2**80 nominally; block 1 keeps expansion 1, which takes one factor of two.
    assert ednas_b0().num_architectures == 2**79


def test_ednas_b0_is_the_paper_s_base_network():
    rows = [
        (*(getattr(block.base, name) for name in ("kernel_size", "filters", "expand_ratio")),)
        for block in ednas_b0().blocks
    ]
    assert [block.stride for block in ednas_b0().blocks] == [
        1,
        2,
        1,
        2,
        1,
        2,
        *[1] * 5,
        2,
        *[1] * 4,
    ]
    assert rows == [
        (3, 16, 1),
        *[(3, 24, 6)] * 2,
        *[(5, 40, 6)] * 2,
        *[(3, 80, 6)] * 3,
        *[(5, 112, 6)] * 3,
        *[(5, 192, 6)] * 4,
        (3, 320, 6),
    ]
    assert {block.base.op for block in ednas_b0().blocks} == {"ibn"}


def test_filters_are_the_base_times_the_multiplier_without_rounding_to_eight():
    blocks = ednas_b0().blocks
    assert blocks[1].filters == (12, 18, 24, 36)
    assert blocks[3].filters == (20, 30, 40, 60)
    assert blocks[10].filters == (56, 84, 112, 168)


def test_strides_and_the_output_stride_follow_from_the_blocks():
    space = ednas_b0()
    assert space.output_stride == 8
    assert [space.block_strides[tap - 1] for tap in space.fusion.tap_blocks] == [8, 16, 32]
    assert ednas_tiny().output_stride == 4


def test_num_architectures_is_what_brute_force_counts(small_space):
    every = set(all_architectures(small_space))
    assert small_space.num_architectures == len(every) == 3072
    options = [
        {getattr(a.blocks[i], name) for a in every}
        for i, name in itertools.product(range(4), CHOICE_FIELDS)
    ]
    assert math.prod(map(len, options)) == 3072


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_num_architectures_is_the_product_of_option_counts(space):
    assert space.num_architectures == math.prod(len(c.options) for c in space.choices)
    assert all(len(choice.options) > 1 for choice in space.choices)
    assert len({choice.name for choice in space.choices}) == len(space.choices)


@given(spaces, seeds)
def test_decode_inverts_encode(which, seed):
    space = SPACES[which]
    architecture = space.sample(np.random.default_rng(seed))
    assert architecture in space
    assert space.decode(space.encode(architecture)) == architecture
    assert space.encode(space.decode(space.encode(architecture))) == space.encode(architecture)


@given(spaces, seeds)
def test_a_mutation_changes_exactly_one_choice_to_another_option(which, seed):
    space, generator = SPACES[which], np.random.default_rng(seed)
    before = space.sample(generator)
    after = space.mutate(before, generator)
    assert after in space
    pairs = zip(space.encode(before), space.encode(after), strict=True)
    assert sum(a != b for a, b in pairs) == 1


def test_mutation_reaches_every_option_of_every_choice_equally(small_space):
    start = small_space.base_architecture
    generator = random.Random(0)
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(4000):
        key = small_space.encode(small_space.mutate(start, generator))
        seen[key] = seen.get(key, 0) + 1
    neighbours = sum(len(choice.options) - 1 for choice in small_space.choices)
    assert len(seen) == neighbours
    # A choice of three options shares its draws between two neighbours: half as many each.
    share = 4000 / len(small_space.choices)
    assert min(seen.values()) > 0.7 * share / 2
    assert max(seen.values()) < 1.3 * share


@given(spaces, seeds)
def test_fixing_twice_is_fixing_once(which, seed):
    space = SPACES[which]
    architecture = space.sample(np.random.default_rng(seed))
    fixed = space.fix(architecture)
    assert fixed.fix(architecture) == fixed
    assert fixed.is_fixed
    assert fixed.num_architectures == 1
    assert fixed.base_architecture == fixed.sample(random.Random(0)) == architecture
    assert not space.is_fixed


def test_sampling_is_uniform_and_repeats_with_its_seed(small_space):
    generator = np.random.default_rng(0)
    drawn = [small_space.encode(small_space.sample(generator)) for _ in range(3000)]
    for choice, column in zip(small_space.choices, zip(*drawn, strict=True), strict=True):
        shares = np.bincount(column, minlength=len(choice.options)) / len(drawn)
        # Five standard deviations of a share.
        assert np.abs(shares - 1 / len(choice.options)).max() < 5 * 0.5 / math.sqrt(len(drawn))
    again = np.random.default_rng(0)
    assert [small_space.encode(small_space.sample(again)) for _ in range(5)] == drawn[:5]
    assert small_space.sample(random.Random(3)) == small_space.sample(random.Random(3))


@settings(max_examples=12)
@given(spaces, seeds)
def test_yaml_reads_back_equal_also_of_a_fixed_space(which, seed):
    space = SPACES[which]
    assert SearchSpace.from_yaml(space.to_yaml()) == space
    fixed = space.fix(space.sample(np.random.default_rng(seed)))
    assert SearchSpace.from_yaml(fixed.to_yaml()) == fixed


def test_a_space_can_be_loaded_by_name_or_path(tmp_path):
    assert named_space("ednas_tiny") == ednas_tiny()
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL_SPACE)
    assert named_space(str(path)).name == "small"
    path.write_text(changed(SMALL_SPACE, "name: small", "name: other"))
    assert named_space(str(path)).name == "other"
    assert SearchSpace.load(shipped("configs/spaces/ednas_b0.yaml")) == ednas_b0()
    with pytest.raises(
        FileNotFoundError, match="no search space ednas; shipped: ednas_b0, ednas_tiny"
    ):
        named_space("ednas")
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.yaml"):
        SearchSpace.load(tmp_path / "none.yaml")


def test_own_options_of_a_block_come_before_the_common_ones(small_space):
    assert small_space.blocks[0].expand_ratios == (1,)
    assert small_space.blocks[1].filters == (4, 8, 12)
    assert small_space.blocks[2].ops == ("ibn",)
    assert small_space.blocks[3].kernel_sizes == (3,)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stride: 1", "stride: 3", r"block 1: stride: expected 1 or 2, got 3"),
        (
            "ops: [ibn, fused_ibn]",
            "ops: [mbconv]",
            r"ops: expected some of ibn, fused_ibn, got mbconv",
        ),
        ("ops: [ibn, fused_ibn]", "ops: []", r"options: ops: expected at least one option"),
        ("kernel_sizes: [3, 5]", "kernel_sizes: [3, 3]", r"kernel_size: expected distinct options"),
        (
            "kernel_sizes: [3, 5]",
            "kernel_sizes: [5, 3]",
            r"kernel_size: expected ascending positive",
        ),
        (
            "kernel_sizes: [3, 5]",
            "kernel_sizes: [2, 3]",
            r"kernel_size: expected odd sizes, got \[2, 3\]",
        ),
        ("filters: [4, 8, 12]", "filters: [0, 8]", r"filters: expected ascending positive options"),
        (
            "filters: [4, 8, 12]",
            "filters: [4, 12]",
            r"block 2: filters: base value 8 is none of \[4, 12\]",
        ),
        ("expand_ratios: [2, 4]", "expand_ratios: [1, 2]", r"1 cannot be mixed with other ratios"),
        (
            "filters: [4, 8, 12]",
            "filter_multipliers: [0.55, 1]",
            r"filters: 8 x 0\.55 = 4\.4 is not a whole number; list the filters of this block",
        ),
        (
            "[3, 4], num",
            "[4, 3], num",
            r"tap_blocks: expected ascending numbers from 1 to 4, got \[4, 3\]",
        ),
        (
            "[3, 4], num",
            "[4, 5], num",
            r"tap_blocks: expected ascending numbers from 1 to 4, got \[4, 5\]",
        ),
        ("[3, 4], num", "[], num", r"tap_blocks: expected ascending numbers from 1 to 4, got \[\]"),
        (
            "[3, 4], num",
            "[2, 3], num",
            r"each tap needs twice the stride of the one before, got \[4, 4\]",
        ),
        (
            "num_levels: 3",
            "num_levels: 1",
            r"expected num_levels >= 2 and num_repeats >= 1, got 1 and 2",
        ),
        ("num_repeats: 2", "num_repeats: 0", r"num_repeats >= 1, got 3 and 0"),
        ("stem_filters: 8", "stem_filters: 0", r"stem_filters: expected at least 1, got 0"),
        (" channels: 8", " channels: 0", r"fusion\.channels: expected at least 1, got 0"),
        ("num_levels", "num_level", r"unknown key fusion\.num_level; did you mean num_levels\?"),
        ("num_convs: 1", "num_convs: 0", r"head\.num_convs: expected at least 1, got 0"),
    ],
)
def test_a_bad_space_is_refused_with_file_and_line(old, new, message):
    text = changed(SMALL_SPACE, old, new)
    with pytest.raises(ValueError, match=message) as caught:
        SearchSpace.from_yaml(text, source="my.yaml")
    assert str(caught.value).startswith("my.yaml:")


def test_a_space_without_blocks_or_options_is_refused(small_space):
    with pytest.raises(ValueError, match="blocks: expected at least one"):
        replace(small_space, blocks=())
    with pytest.raises(ValueError, match=r"op: expected distinct options, got \[\]"):
        replace(small_space.blocks[0], ops=())


def test_expansion_one_may_stand_beside_others_where_no_ibn_is():
    text = changed(
        SMALL_SPACE, "ops: [ibn], expand_ratios: [2, 4]", "ops: [fused_ibn], expand_ratios: [1, 2]"
    )
    text = changed(text, "    kernel_size: 5\n", "    kernel_size: 5\n    op: fused_ibn\n")
    assert SearchSpace.from_yaml(text).blocks[2].expand_ratios == (1, 2)


def test_a_foreign_architecture_is_refused_by_block_and_decision(small_space):
    base = small_space.base_architecture
    odd = Architecture((replace(base.blocks[0], filters=9), *base.blocks[1:]))
    message = r"not in space small: block 1 has filters 9, the options are \[8\]"
    for use in (small_space.check, small_space.encode, small_space.fix):
        with pytest.raises(ValueError, match=message):
            use(odd)
    with pytest.raises(ValueError, match=message):
        small_space.mutate(odd, random.Random(0))
    with pytest.raises(ValueError, match="architecture has 3 blocks, space small has 4"):
        small_space.check(Architecture(base.blocks[:3]))
    assert odd not in small_space
    assert base in small_space
    assert "base" not in small_space


def test_indices_out_of_range_are_refused(small_space):
    indices = list(small_space.encode(small_space.base_architecture))
    with pytest.raises(ValueError, match=f"expected {len(indices)} indices, got 2"):
        small_space.decode([0, 0])
    for bad in (2, -1):
        with pytest.raises(ValueError, match=rf"block_1\.op: expected an index below 2, got {bad}"):
            small_space.decode([bad, *indices[1:]])


def test_a_fixed_space_has_nothing_to_mutate(small_space):
    fixed = small_space.fix(small_space.base_architecture)
    with pytest.raises(ValueError, match="space small is one network: nothing to mutate"):
        fixed.mutate(fixed.base_architecture, random.Random(0))


def test_the_base_architecture_is_in_its_space():
    for space in SPACES:
        assert space.base_architecture in space
        assert space.base_architecture.space == space.name
        assert all(isinstance(block, BlockArchitecture) for block in space.base_architecture.blocks)
