"""Files that last: atomic writes, checked reads, and states that come back exactly."""

import json
import math
import os
import stat
from pathlib import Path

import pytest
import torch
from conftest import OUT_CHANNELS, random_alpha
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as save_tensors

from oneshot_ednas.checkpoint import _digest, load_checkpoint, previous_checkpoint, save_checkpoint
from oneshot_ednas.models.network import build_network
from oneshot_ednas.schema import read_json
from oneshot_ednas.store import (
    append_json_line,
    read_json_lines,
    write_bytes,
    write_json,
    write_text,
)


def assert_equal_state(got, expected) -> None:
    """Same types, keys, numbers and bits; tuples come back as lists."""
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert torch.equal(
            got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
        )
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        assert [type(key) for key in got] == [type(key) for key in expected]
        for key, value in expected.items():
            assert_equal_state(got[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_equal_state(a, b)
    else:
        assert type(got) is type(expected)
        assert got == expected or (math.isnan(got) and math.isnan(expected))


STATE = {
    "step": 7,
    "weights": {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2)},
    "seconds": 1.5,
    "name": "x",
}


# Writing ------------------------------------------------------------------------------------


def test_written_files_hold_what_was_given_and_nothing_is_left_beside(tmp_path):
    write_bytes(tmp_path / "new" / "deep" / "a.bin", b"\x00\xff")
    write_text(tmp_path / "a.txt", "ä\n")
    write_json(tmp_path / "a.json", {"b": [1, 2.5, None]})
    assert (tmp_path / "new" / "deep" / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "ä\n"
    assert read_json(tmp_path / "a.json") == {"b": [1, 2.5, None]}
    assert (tmp_path / "a.json").read_text().endswith("}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "a.txt", "a.json"}


def test_written_files_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "ours", "")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_part(tmp_path, monkeypatch, function):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with path.open() as reader:
        write_text(path, "new and longer")
        assert reader.read() == "old"
    assert path.read_text() == "new and longer"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_refuses_numbers_that_it_cannot_hold(tmp_path, value):
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": value})
    assert not (tmp_path / "a.json").exists()
    append_json_line(tmp_path / "a.jsonl", {"loss": 1.5})
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        append_json_line(tmp_path / "a.jsonl", {"loss": value})
    assert read_json_lines(tmp_path / "a.jsonl", dict) == [{"loss": 1.5}]


# Round trips --------------------------------------------------------------------------------

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_tensors_of_every_kind_and_shape_come_back_bit_by_bit(tmp_path, dtype, shape):
    values = torch.randint(-3, 100, shape).to(dtype)
    state = {"x": values, "transposed": values.transpose(0, -1) if shape else values}
    save_checkpoint(tmp_path / "a.safetensors", state)
    assert_equal_state(load_checkpoint(tmp_path / "a.safetensors"), state)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.text(max_size=4) | st.integers(-3, 99)
nested = st.recursive(
    plain | st.integers(0, 5).map(lambda n: ("tensor", n)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)


def with_tensors(value):
    """Hypothesis draws plain values; ("tensor", n) stands for a tensor."""
    if isinstance(value, tuple):
        return torch.full((value[1],), float(value[1]))
    if isinstance(value, dict):
        return {key: with_tensors(item) for key, item in value.items()}
    return [with_tensors(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=60)
@given(state=st.dictionaries(st.text(max_size=4), nested, max_size=4))
def test_any_nested_state_comes_back_equal(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("store") / "a.safetensors"
    state = with_tensors(state)
    save_checkpoint(path, state)
    assert_equal_state(load_checkpoint(path), state)


def test_keys_that_look_alike_are_kept_apart(tmp_path):
    state = {
        "c": {1: torch.zeros(1), "1": torch.ones(1)},
        "a/b": torch.full((1,), 2.0),
        "a": {"b": torch.full((1,), 3.0)},
        "tensor": {"tensor": "text", "dict": [torch.full((1,), 4.0)]},
    }
    save_checkpoint(tmp_path / "a.safetensors", state)
    assert_equal_state(load_checkpoint(tmp_path / "a.safetensors"), state)


def test_tensors_that_share_memory_come_back_apart(tmp_path):
    x = torch.arange(6.0)
    save_checkpoint(tmp_path / "a.safetensors", {"x": x, "again": x, "part": x[2:4]})
    got = load_checkpoint(tmp_path / "a.safetensors")
    got["x"].zero_()
    assert got["again"].tolist() == [0, 1, 2, 3, 4, 5]
    assert got["part"].tolist() == [2, 3]


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_network_with_its_optimizer_goes_on_exactly_after_loading(tmp_path, small_space, kind):
    def make(seed):
        torch.manual_seed(seed)
        network = build_network(small_space, OUT_CHANNELS)
        if kind == "adam":
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.5, 0.9))
        else:
            optimizer = torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.9)
        return network, optimizer

    def step(network, optimizer):
        optimizer.zero_grad()
        outputs = network(torch.ones(1, 3, 32, 32), small_space.base_architecture)
        sum(value.square().sum() for value in outputs.values()).backward()
        optimizer.step()

    network, optimizer = make(0)
    for _ in range(2):
        step(network, optimizer)
    path = tmp_path / "a.safetensors"
    alpha = random_alpha(small_space, 0)
    save_checkpoint(
        path,
        {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "alpha": alpha.state_dict(),
            "torch": torch.get_rng_state(),
        },
    )
    state = load_checkpoint(path)
    assert_equal_state(state["optimizer"], optimizer.state_dict())
    assert all(isinstance(key, int) for key in state["optimizer"]["state"])
    assert torch.equal(state["torch"], torch.get_rng_state())
    other, other_optimizer = make(1)
    other.load_state_dict(state["network"])
    other_optimizer.load_state_dict(state["optimizer"])
    step(network, optimizer)
    step(other, other_optimizer)
    for (name, a), b in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_loaded_state_survives_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, STATE)
    got = load_checkpoint(path)
    path.unlink()
    assert_equal_state(got, STATE)


def test_what_is_no_plain_value_is_refused_by_name(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(TypeError, match="checkpoint entry /alpha/odd is of type complex"):
        save_checkpoint(path, {"alpha": {"odd": 1j}})
    assert not path.exists()


# The checkpoint before ----------------------------------------------------------------------


def test_the_checkpoint_before_is_kept(tmp_path):
    path = tmp_path / "search.safetensors"
    assert previous_checkpoint(path) == tmp_path / "search.previous.safetensors"
    for number in range(3):
        save_checkpoint(path, {"step": number, "x": torch.full((2,), float(number))})
        assert load_checkpoint(path)["step"] == number
        if number:
            before = load_checkpoint(previous_checkpoint(path))
            assert_equal_state(before, {"step": number - 1, "x": torch.full((2,), number - 1.0)})
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "search.previous.safetensors"}


def test_a_save_that_fails_loses_no_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"step": 1})

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


# Damage -------------------------------------------------------------------------------------


def test_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"step": 3, "x": torch.tensor([1.5, -2.0])})
    whole = path.read_bytes()
    for place in range(len(whole)):
        for mask in (0x01, 0x80):
            damaged = bytearray(whole)
            damaged[place] ^= mask
            path.write_bytes(damaged)
            with pytest.raises(
                ValueError, match=r"the checkpoint is damaged|expected checkpoint for"
            ):
                load_checkpoint(path)
    path.write_bytes(whole)
    assert load_checkpoint(path)["step"] == 3


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"step": 3, "x": torch.tensor([1.5, -2.0])})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="the checkpoint is damaged"):
            load_checkpoint(path)


def flip_last_byte(path):
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)


def test_the_message_on_damage_says_what_to_do(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, STATE)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a\.safetensors: .*; delete it to start this stage anew"):
        load_checkpoint(path)


def test_a_damaged_checkpoint_gives_the_one_before_and_says_so(tmp_path):
    path = tmp_path / "a.safetensors"
    for step in (1, 2):
        save_checkpoint(path, {**STATE, "step": step})
    flip_last_byte(path)
    with pytest.warns(UserWarning, match=r"SHA-256 does not match\); going on from the one before"):
        assert_equal_state(load_checkpoint(path), {**STATE, "step": 1})
    flip_last_byte(previous_checkpoint(path))
    with pytest.raises(ValueError, match=r"damaged .*previous\.safetensors; delete both to start"):
        load_checkpoint(path)


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "a.safetensors"
    for step in (1, 2):
        save_checkpoint(path, {**STATE, "step": step})
    flip_last_byte(path)
    save_checkpoint(path, {**STATE, "step": 3})
    assert load_checkpoint(path)["step"] == 3
    assert load_checkpoint(previous_checkpoint(path))["step"] == 1


def test_the_last_two_checkpoints_are_kept(tmp_path):
    path = tmp_path / "a.safetensors"
    for step in range(4):
        save_checkpoint(path, {**STATE, "step": step})
        assert load_checkpoint(path)["step"] == step
        if step:
            assert load_checkpoint(previous_checkpoint(path))["step"] == step - 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_of_format_1_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, STATE)
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["checkpoint"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digest = _digest(tensors, header["state"], 1)
    old = {"format": "1", "sha256": digest, "state": json.dumps(header["state"])}
    path.write_bytes(save_tensors(tensors, metadata=old))
    assert_equal_state(load_checkpoint(path), STATE)


def test_equal_states_give_equal_files(tmp_path):
    for name in ("a", "b"):
        save_checkpoint(tmp_path / f"{name}.safetensors", STATE)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_another_format_and_other_safetensors_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    header = {"format": "9", "state": json.dumps({"dict": []}), "sha256": "0"}
    path.write_bytes(save_tensors({}, metadata=header))
    with pytest.raises(ValueError, match="expected checkpoint format 1 to 2, got 9; another"):
        load_checkpoint(path)
    path.write_bytes(save_tensors({"x": torch.zeros(1)}))
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none\.safetensors"):
        load_checkpoint(tmp_path / "none.safetensors")


# Odd files ----------------------------------------------------------------------------------


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_device_is_written_to_and_not_replaced():
    write_text(Path("/dev/null"), "anything")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_damaged_format_number_gives_the_checkpoint_before(tmp_path):
    path = tmp_path / "a.safetensors"
    for step in (1, 2):
        save_checkpoint(path, {**STATE, "step": step})
    data = path.read_bytes()
    assert data.count(b'\\"format\\": 2') == 1
    path.write_bytes(data.replace(b'\\"format\\": 2', b'\\"format\\": 6'))
    with pytest.warns(UserWarning, match="damaged"):
        assert load_checkpoint(path)["step"] == 1


def test_a_header_that_nests_too_deep_is_damage(tmp_path):
    path = tmp_path / "a.safetensors"
    for depth in (800, 5000):
        tree = "[" * depth + "]" * depth
        header = f'{{"format": 2, "sha256": "0", "state": {tree}}}'
        path.write_bytes(save_tensors({}, metadata={"checkpoint": header}))
        with pytest.raises(ValueError, match="the checkpoint is damaged"):
            load_checkpoint(path)


def test_a_missing_checkpoint_gives_the_one_before(tmp_path):
    path = tmp_path / "a.safetensors"
    for step in (1, 2):
        save_checkpoint(path, {**STATE, "step": step})
    path.unlink()
    with pytest.warns(UserWarning, match="is missing; going on from the one before it"):
        assert load_checkpoint(path)["step"] == 1
    save_checkpoint(path, {**STATE, "step": 3})
    assert load_checkpoint(previous_checkpoint(path))["step"] == 1
