"""The search space as a symbolic value of PyGlove, and back."""

import pyglove as pg
import pytest
from conftest import all_architectures
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot_ednas.space import SearchSpace, ednas_b0, ednas_tiny


def test_every_architecture_goes_to_pyglove_and_back(small_space):
    template = pg.template(small_space.to_pyglove())
    assert pg.dna_spec(small_space.to_pyglove()).space_size == small_space.num_architectures
    for architecture in list(all_architectures(small_space))[::31]:
        dna = pg.DNA(list(small_space.encode(architecture)))
        value = template.decode(dna)
        assert small_space.from_pyglove(value) == architecture
        assert tuple(template.encode(value).to_numbers()) == small_space.encode(architecture)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["b0", "tiny"]))
def test_random_dna_are_architectures_of_the_space(seed, name):
    import random

    space = ednas_b0() if name == "b0" else ednas_tiny()
    symbolic = space.to_pyglove()
    dna = pg.random_dna(pg.dna_spec(symbolic), random.Random(seed))
    architecture = space.from_pyglove(pg.template(symbolic).decode(dna))
    assert space.decode(dna.to_numbers()) == architecture
    assert architecture.space == space.name


def test_choices_are_those_of_the_space_in_its_order(small_space):
    spec = pg.dna_spec(small_space.to_pyglove())
    names = [str(point.id) for point in spec.decision_points]
    assert names == [choice.name for choice in small_space.choices]
    options = [len(point.candidates) for point in spec.decision_points]
    assert options == [len(choice.options) for choice in small_space.choices]


def test_a_fixed_space_has_nothing_to_choose(small_space):
    fixed: SearchSpace = small_space.fix(small_space.base_architecture)
    value = fixed.to_pyglove()
    assert fixed.from_pyglove(value) == small_space.base_architecture
    assert pg.dna_spec(value).space_size == 1


def test_a_value_of_another_space_is_refused(small_space):
    value = pg.template(ednas_tiny().to_pyglove()).decode(
        pg.DNA(list(ednas_tiny().encode(ednas_tiny().base_architecture)))
    )
    with pytest.raises(ValueError, match="expected a value of the 4 blocks of space small"):
        small_space.from_pyglove(value)
    fixed = small_space.fix(small_space.base_architecture).to_pyglove()
    fixed.block_2.rebind(filters=7)
    with pytest.raises(ValueError, match="block 2 has filters 7"):
        small_space.from_pyglove(fixed)
