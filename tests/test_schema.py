"""Strict YAML: what is read, and the one line that every refusal gives."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneshot_ednas.schema import (
    dump_yaml,
    find_file,
    load_yaml,
    nearest,
    parse_yaml,
    read_json,
    shipped,
    to_plain,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 10
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Circle:
    kind: Literal["circle"]
    radius: float


@dataclass(frozen=True, kw_only=True)
class Polygon:
    kind: Literal["square", "triangle"]
    side: float = 1.0

    def __post_init__(self) -> None:
        if self.side <= 0:
            raise ValueError(f"side: expected more than 0, got {self.side:g}")


@dataclass(frozen=True, kw_only=True)
class Shapes:
    one: Circle | Polygon | None = None
    many: dict[str, Circle | Polygon] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    is_fast: bool = False
    mode: Literal["linear", "constant"] = "linear"
    inner: Inner = Inner()
    sizes: tuple[int, ...] = ()
    pair: tuple[int, int] = (1, 2)
    weights: dict[str, float] = field(default_factory=dict)
    limit: float | None = None
    either: int | bool = 0
    folder: Path = Path("out")
    parts: tuple[Inner, ...] = ()


def read(text: str, *overrides: str) -> Outer:
    return parse_yaml(text, Outer, source="a.yaml", overrides=overrides)


FULL = """\
name: x
is_fast: true
mode: constant
inner: {steps: 3, rate: 1e-3}
sizes: [1, 2, 3]
pair: [4, 5]
weights:
  depth: 1
  normals: 2.5
limit: null
folder: a/b
parts:
- steps: 7
- {}
"""


def test_every_supported_type_is_read():
    assert read(FULL) == Outer(
        name="x",
        is_fast=True,
        mode="constant",
        inner=Inner(steps=3, rate=0.001),
        sizes=(1, 2, 3),
        pair=(4, 5),
        weights={"depth": 1.0, "normals": 2.5},
        limit=None,
        folder=Path("a/b"),
        parts=(Inner(steps=7), Inner()),
    )


def test_defaults_stand_where_a_key_is_left_out():
    assert read("name: x") == Outer(name="x")


def test_numbers_without_a_point_and_with_an_exponent_are_floats():
    assert read("name: x\nlimit: 3").limit == 3.0
    assert isinstance(read("name: x\nlimit: 3").limit, float)
    assert read("name: x\nlimit: 1e-3").limit == 0.001


def test_text_that_looks_like_a_number_stays_text():
    assert read("name: 007").name == "007"


@given(
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"])),
    st.booleans(),
    st.lists(st.integers(-(10**9), 10**9)),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
    st.dictionaries(st.sampled_from(["depth", "normals", "no", "1"]), st.floats(0, 1)),
    st.integers(1, 99),
)
def test_dumped_yaml_reads_back_equal(name, is_fast, sizes, limit, weights, steps):
    value = Outer(
        name=name,
        is_fast=is_fast,
        sizes=tuple(sizes),
        limit=limit,
        weights=weights,
        parts=(Inner(steps=steps),),
    )
    assert read(dump_yaml(value)) == value


def test_to_plain_leaves_no_dataclass_tuple_or_path():
    assert to_plain(read(FULL))["parts"] == [{"steps": 7, "rate": 0.1}, {"steps": 10, "rate": 0.1}]
    assert to_plain(read(FULL))["folder"] == "a/b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nmod: linear", r"^a\.yaml:2: unknown key mod; did you mean mode\?$"),
        ("name: x\nzzzz: 1", r"^a\.yaml:2: unknown key zzzz; known: either, folder, .*weights$"),
        (
            "name: x\ninner:\n  step: 1",
            r"^a\.yaml:3: unknown key inner\.step; did you mean steps\?",
        ),
        ("name: x\nmode: linear\nname: y", r"^a\.yaml:3: duplicate key name$"),
        ("name: x\nweights: {a: 1, a: 2}", r"^a\.yaml:2: duplicate key weights\.a$"),
        ("is_fast: true", r"^a\.yaml:1: missing key name$"),
        ("", r"^a\.yaml: missing key name$"),
        ("name: x\nis_fast: 1", r"^a\.yaml:2: is_fast: expected true or false, got '1'$"),
        (
            "name: x\ninner:\n  steps: 1.5",
            r"^a\.yaml:3: inner\.steps: expected a whole number, got '1.5'",
        ),
        ("name: x\ninner: {steps: '3'}", r"inner\.steps: expected a whole number, got '3'"),
        ("name: x\ninner: {rate: fast}", r"inner\.rate: expected a finite number, got 'fast'"),
        ("name: x\ninner: {rate: }", r"inner\.rate: expected a finite number, got nothing"),
        ("name: x\ninner: {rate: [1]}", r"inner\.rate: expected a finite number, got a list"),
        ("name:", r"^a\.yaml:1: name: expected text, got nothing$"),
        ("name: {a: 1}", r"name: expected text, got keys and values"),
        (
            "name: x\nmode: cosine",
            r"^a\.yaml:2: mode: expected one of linear, constant, got cosine$",
        ),
        ("name: x\ninner: 3", r"^a\.yaml:2: inner: expected keys and values, got '3'$"),
        ("[1, 2]", r"^a\.yaml:1: file: expected keys and values, got a list$"),
        ("? [1]\n: 2", r"^a\.yaml:1: file: expected a plain key, got a list$"),
        ("name: x\nsizes: 3", r"^a\.yaml:2: sizes: expected a list, got '3'$"),
        ("name: x\nsizes:\n- 1\n- b", r"^a\.yaml:4: sizes\[1\]: expected a whole number, got 'b'$"),
        ("name: x\npair: [1]", r"^a\.yaml:2: pair: expected 2 values, got 1$"),
        ("name: x\nlimit: .inf", r"^a\.yaml:2: limit: expected a finite number, got '\.inf'$"),
        ("name: x\nlimit: much", r"^a\.yaml:2: limit: expected a finite number, got 'much'$"),
        ("name: x\neither: much", r"^a\.yaml:2: either: expected true or false, got 'much'$"),
        ("name: x\ninner: {steps: 0}", r"^a\.yaml:2: inner: steps: expected at least 1, got 0$"),
        ("name: x\nparts: [{steps: 0}]", r"parts\[0\]: steps: expected at least 1, got 0$"),
        ("name: [x", r"^a\.yaml:1: not valid YAML: "),
        ("name: x\n\tmode: y", r"^a\.yaml:2: not valid YAML: "),
        ("name: \x00", r"^a\.yaml:1: not valid YAML: character U\+0000 is not allowed$"),
        ("name: x\n---\nname: y", r"^a\.yaml:2: not valid YAML: "),
    ],
)
def test_bad_text_is_refused_in_one_line_with_its_place(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_one_of_several_dataclasses_is_chosen_by_its_kind():
    text = "one: {side: 2, kind: triangle}\nmany: {a: {kind: circle, radius: 3}}"
    shapes = parse_yaml(text, Shapes, source="a.yaml")
    expected = Shapes(
        one=Polygon(kind="triangle", side=2.0), many={"a": Circle(kind="circle", radius=3.0)}
    )
    assert shapes == expected
    assert parse_yaml(dump_yaml(shapes), Shapes, source="dumped") == shapes
    assert parse_yaml("one: null", Shapes, source="a.yaml").one is None
    overrides = ["many.a.kind=square", "many.a.side=4"]
    many = parse_yaml("", Shapes, source="a.yaml", overrides=overrides).many
    assert many == {"a": Polygon(kind="square", side=4.0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "one:\n  radius: 1",
            r"^a\.yaml:2: missing key one\.kind; known: circle, square, triangle$",
        ),
        (
            "many:\n  a:\n    side: 1\n    kind: sqare",
            r"^a\.yaml:4: many\.a\.kind: unknown sqare; did you mean square\?$",
        ),
        (
            "one:\n  kind: circle\n  side: 1",
            r"^a\.yaml:3: unknown key one\.side; known: kind, radius$",
        ),
        ("one:\n  kind: circle", r"^a\.yaml:2: missing key one\.radius$"),
        (
            "one:\n  kind: circle\n  radius: big",
            r"^a\.yaml:3: one\.radius: expected a finite number, got 'big'$",
        ),
        (
            "one:\n  kind: square\n  side: 0",
            r"^a\.yaml:2: one: side: expected more than 0, got 0$",
        ),
        ("one:\n  kind: [square]", r"^a\.yaml:2: one\.kind: expected text, got a list$"),
        ("one:\n- square", r"^a\.yaml:2: one: expected keys and values, got a list$"),
        ("one:\n  kind: circle\n  kind: square", r"^a\.yaml:3: duplicate key one\.kind$"),
    ],
)
def test_faults_of_a_chosen_dataclass_are_named_with_their_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text, Shapes, source="a.yaml")
    assert "\n" not in str(caught.value)


def test_a_field_type_that_yaml_cannot_hold_is_our_own_mistake():
    @dataclass(frozen=True)
    class Odd:
        value: complex

    with pytest.raises(TypeError, match=r"fields of type .*complex.* cannot be read from YAML"):
        parse_yaml("value: 1", Odd, source="a.yaml")


def test_overrides_replace_and_add_values_by_dotted_key():
    got = read(
        "name: x\ninner: {steps: 3}", "inner.rate=0.5", "name=y", "weights.depth=2", "sizes=[4]"
    )
    assert got == Outer(
        name="y", inner=Inner(steps=3, rate=0.5), sizes=(4,), weights={"depth": 2.0}
    )
    assert read("limit: 3\nname: x", "limit=").limit is None
    assert read("", "name=x", "inner.steps=4") == Outer(name="x", inner=Inner(steps=4))


def test_the_last_of_two_overrides_of_one_key_counts():
    assert read("name: x", "inner.steps=3", "inner.steps=4").inner.steps == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name", r"^--set name: expected key=value, for example search\.steps=100$"),
        ("=3", r"^--set =3: expected key=value"),
        ("name.first=3", r"^--set name\.first=3: name has no keys in a\.yaml$"),
        ("inner.stepz=3", r"unknown key inner\.stepz; did you mean steps\?"),
        ("inner.steps=many", r"^--set inner\.steps:1: inner\.steps: expected a whole number"),
        ("sizes=[1", r"^--set sizes:1: not valid YAML"),
    ],
)
def test_a_bad_override_is_refused_and_named(override, message):
    with pytest.raises(ValueError, match=message):
        read("name: x", override)


def test_load_yaml_names_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("name: x\nmood: y\n")
    with pytest.raises(ValueError, match=r"config\.yaml:2: unknown key mood; did you mean mode"):
        load_yaml(path, Outer)
    with pytest.raises(FileNotFoundError, match=r"no file .*other\.yaml"):
        load_yaml(tmp_path / "other.yaml", Outer)
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(
        ValueError, match=r"config\.yaml: expected UTF-8 text, got invalid start byte"
    ):
        load_yaml(path, Outer)
    path.write_text("name: x\n")
    assert load_yaml(path, Outer, overrides=["mode=constant"]).mode == "constant"


def test_json_is_read_or_refused_by_name(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.json"):
        read_json(path)
    path.write_text('{"a": [1, 2.5, null]}')
    assert read_json(path) == {"a": [1, 2.5, None]}
    path.write_text('{"a": [1,')
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON: "):
        read_json(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.json: expected UTF-8 text, got "):
        read_json(path)


def test_shipped_files_are_found_and_others_are_not():
    assert shipped("configs/spaces/ednas_b0.yaml").is_file()
    with pytest.raises(FileNotFoundError, match=r"configs/nothing is not shipped"):
        shipped("configs/nothing")


def test_files_are_looked_up_as_given_then_beside_then_among_the_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    beside = tmp_path / "sub"
    beside.mkdir()
    (beside / "a.yaml").write_text("")
    assert find_file("a.yaml", beside=beside) == beside / "a.yaml"
    (tmp_path / "a.yaml").write_text("")
    assert find_file("a.yaml", beside=beside) == Path("a.yaml")
    name = "configs/spaces/ednas_tiny.yaml"
    assert find_file(name, beside=beside) == shipped(name)
    with pytest.raises(
        FileNotFoundError, match=r"no file b\.yaml \(tried b\.yaml, .*sub/b\.yaml, and"
    ):
        find_file("b.yaml", beside=beside)
    with pytest.raises(FileNotFoundError, match=r"no file /nowhere/b\.yaml"):
        find_file("/nowhere/b.yaml", beside=beside)


def test_nearest_suggests_a_close_word_or_lists_all():
    assert nearest("stepz", ["steps", "rate"]) == "did you mean steps?"
    assert nearest("qqq", ["steps", "rate"]) == "known: rate, steps"
