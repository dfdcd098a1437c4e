"""Architectures as JSON: round trips, the shipped tables, and what is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneshot_ednas.architecture import Architecture, BlockArchitecture
from oneshot_ednas.schema import shipped
from oneshot_ednas.space import ednas_b0

# Vu et al., EDNAS (WACV 2023), tables 6 and 7, rows 1-16: layer, kernel, filters, expansion.
# The stride column is the space's and is checked there.
TABLE_6 = """
FusedIBN 3 16 1 | IBN 5 36 6 | FusedIBN 5 24 6 | FusedIBN 3 60 6 | FusedIBN 3 40 3
FusedIBN 5 120 3 | IBN 3 120 3 | FusedIBN 5 80 6 | FusedIBN 5 168 6 | FusedIBN 5 84 3
FusedIBN 5 84 6 | FusedIBN 5 288 3 | FusedIBN 3 96 3 | FusedIBN 3 96 6 | FusedIBN 3 96 3
FusedIBN 5 160 6
"""
TABLE_7 = """
FusedIBN 3 24 1 | IBN 3 36 6 | IBN 3 36 6 | FusedIBN 5 40 6 | FusedIBN 5 40 3
IBN 3 80 6 | FusedIBN 3 120 3 | FusedIBN 3 80 6 | FusedIBN 3 168 3 | FusedIBN 3 56 6
FusedIBN 3 112 3 | FusedIBN 5 192 6 | FusedIBN 3 192 6 | IBN 5 192 3 | IBN 5 192 3
FusedIBN 5 240 3
"""

BLOCK = {"op": "ibn", "kernel_size": 3, "filters": 8, "expand_ratio": 6}


def printed(table: str) -> Architecture:
    blocks = []
    for row in table.replace("\n", "|").split("|"):
        if row.strip():
            layer, kernel, filters, expansion = row.split()
            blocks.append(
                BlockArchitecture(
                    op={"IBN": "ibn", "FusedIBN": "fused_ibn"}[layer],
                    kernel_size=int(kernel),
                    filters=int(filters),
                    expand_ratio=int(expansion),
                )
            )
    return Architecture(tuple(blocks))


@pytest.mark.parametrize(("number", "table"), [(6, TABLE_6), (7, TABLE_7)])
def test_the_paper_s_tables_are_shipped_and_in_the_space(number, table):
    architecture = Architecture.load(shipped(f"configs/architectures/ednas_table{number}.json"))
    assert architecture == printed(table)
    assert architecture.space == "ednas_b0"
    assert architecture in ednas_b0()


def test_the_fused_blocks_are_as_many_as_the_paper_counts():
    # Section 4.3: "occupying 14 out of 16 tunable layers" and "11 compared to 14".
    for table, fused in ((TABLE_6, 14), (TABLE_7, 11)):
        assert sum(block.op == "fused_ibn" for block in printed(table).blocks) == fused


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ibn", "fused_ibn"]),
            st.sampled_from([3, 5]),
            st.integers(1, 500),
            st.integers(1, 6),
        ),
        max_size=4,
    ),
    st.text(max_size=8),
)
def test_json_reads_back_equal(rows, name):
    keys = ("op", "kernel_size", "filters", "expand_ratio")
    blocks = tuple(BlockArchitecture(**dict(zip(keys, row, strict=True))) for row in rows)
    architecture = Architecture(blocks, space=name)
    got = Architecture.from_json(json.loads(json.dumps(architecture.to_json())))
    assert got == architecture
    assert got.space == name


def test_a_saved_file_loads_equal_and_holds_the_json_form(tmp_path):
    architecture = Architecture(printed(TABLE_6).blocks, space='a "quoted" name')
    architecture.save(tmp_path / "a.json")
    assert Architecture.load(tmp_path / "a.json") == architecture
    assert json.loads((tmp_path / "a.json").read_text()) == architecture.to_json()
    Architecture.load(str(tmp_path / "a.json")).save(str(tmp_path / "b.json"))
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()


def test_the_shipped_files_are_as_save_writes_them(tmp_path):
    for number in (6, 7):
        path = shipped(f"configs/architectures/ednas_table{number}.json")
        Architecture.load(path).save(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_text() == path.read_text()


def test_the_space_s_name_is_no_part_of_equality():
    blocks = printed(TABLE_6).blocks
    assert Architecture(blocks, space="a") == Architecture(blocks, space="b")
    assert hash(Architecture(blocks, space="a")) == hash(Architecture(blocks, space="b"))


def test_the_short_form_has_one_word_per_block():
    assert str(printed(TABLE_6)).split()[:3] == ["f3e1c16", "i5e6c36", "f5e6c24"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r'^a\.json: expected an object with a list "blocks"$'),
        ({"blocks": 3}, r'expected an object with a list "blocks"'),
        ({"format": 2, "blocks": []}, r"expected format 1, got 2; a newer version"),
        ({"blocks": [], "block": []}, r"unknown key block; did you mean blocks\?"),
        (
            {"blocks": [BLOCK, 3]},
            r"^a\.json: block 2: expected an object with keys op, kernel_size",
        ),
        (
            {"blocks": [BLOCK | {"kernel": 3}]},
            r"block 1: unknown key kernel; did you mean kernel_size",
        ),
        ({"blocks": [{"op": "ibn"}]}, r"block 1: missing key kernel_size"),
        (
            {"blocks": [BLOCK | {"filters": 8.0}]},
            r"block 1: filters: expected a whole number, got 8\.0",
        ),
        ({"blocks": [BLOCK | {"filters": True}]}, r"filters: expected a whole number, got True"),
        ({"blocks": [BLOCK | {"op": 1}]}, r"block 1: op: expected text, got 1"),
    ],
)
def test_bad_json_is_refused_with_its_place(data, message):
    with pytest.raises(ValueError, match=message):
        Architecture.from_json(data, source="a.json")


def test_bad_files_are_refused_by_name(tmp_path):
    path: Path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.json"):
        Architecture.load(path)
    path.write_text('{"blocks": [')
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        Architecture.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.json: expected UTF-8 text"):
        Architecture.load(path)
