"""Strict reading: YAML into frozen dataclasses by field type, JSON, and the shipped files.

Every error is one line that names the file, the line, what was expected and what came.
"""

import dataclasses
import difflib
import importlib
import json
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from oneshot_ednas.parsing import (
    JSON_BYTES,
    YAML_BYTES,
    YAML_DEPTH,
    compose_yaml,
    is_text,
    one_line,
    parse_json,
    read_limited,
)

T = TypeVar("T")

_PACKAGE = Path(__file__).resolve().parent
_SCALAR_TAGS = {
    bool: ("tag:yaml.org,2002:bool",),
    int: ("tag:yaml.org,2002:int",),
}
MAX_DIGITS = 100
"""Of a number; one of 64 bits takes 20, and 66 where it is written in binary."""
_TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def shipped(relative: str | Path) -> Path:
    """Path of a file or folder shipped with the package (`configs/...`, `latency_tables/...`).

    Raises:
        FileNotFoundError: if neither the wheel nor the source checkout holds it.
    """
    # A wheel carries the folders inside the package; a source checkout has them beside it.
    for base in (_PACKAGE, _PACKAGE.parent):
        if (base / relative).exists():
            return base / relative
    raise FileNotFoundError(f"{relative} is not shipped with oneshot_ednas ({_PACKAGE})")


def is_shipped(relative: str | Path) -> bool:
    """Whether the package has a file or folder of that name."""
    try:
        shipped(relative)
    except FileNotFoundError:
        return False
    return True


def find_file(name: str | Path, *, beside: Path | None = None) -> Path:
    """An existing file: as given, beside another file, or shipped with the package.

    Raises:
        FileNotFoundError: naming the places that were tried.
    """
    path = Path(name)
    candidates = [path] + ([beside / path] if beside is not None and not path.is_absolute() else [])
    for candidate in candidates:
        if candidate.exists():
            return candidate
    if not path.is_absolute() and is_shipped(path):
        return shipped(path)
    tried = ", ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(
        f"no file {name} (tried {tried}, and the files shipped with the package)"
    )


def load_yaml(path: Path, cls: type[T], *, overrides: Iterable[str] = ()) -> T:
    """Read a YAML file into a dataclass, strictly.

    Args:
        path: the file.
        cls: a (frozen) dataclass; nested dataclasses, `X | None`, `tuple[X, ...]`,
            `dict[str, X]`, `Literal`, `Path` and scalars are read by field type.
        overrides: `dotted.key=value` settings that replace or add values, as on the command line.

    Raises:
        ValueError: for unknown, missing or duplicate keys, wrong types and values that the
            dataclass itself refuses; the message names file and line.
        FileNotFoundError: if there is no such file.
    """
    return parse_yaml(read_text(path), cls, source=str(path), overrides=overrides)


def read_text(path: Path) -> str:
    """Text of a UTF-8 file that people write.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is larger than any of these, or no UTF-8 text; names the file.
    """
    return read_limited(path, YAML_BYTES)


def parse_yaml(text: str, cls: type[T], *, source: str, overrides: Iterable[str] = ()) -> T:
    """Like `load_yaml`, for text; `source` names it in messages."""
    root = compose_yaml(text, source)
    if root is None:
        root = yaml.MappingNode("tag:yaml.org,2002:map", [], None, None)
    for override in overrides:
        _apply_override(root, override, source)
    return cast(T, _Reader(source).read(root, cls, ""))


def read_json(path: Path) -> Any:
    """Read a JSON file; see `parse_json`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, or beyond the limits; names the file.
    """
    return parse_json(read_limited(path, JSON_BYTES), str(path))


def load_json(path: Path, cls: type[T]) -> T:
    """Read a JSON file into a dataclass, as strictly as `load_yaml`, and many times as fast.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as for `load_yaml`; the message names file and key, not the line.
    """
    return cast(T, _Reader(str(path)).read(_json_node(read_json(path)), cls, ""))


def _json_node(value: Any) -> yaml.Node:
    if isinstance(value, dict):
        pairs = [(_json_node(key), _json_node(item)) for key, item in value.items()]
        return yaml.MappingNode("tag:yaml.org,2002:map", pairs)
    if isinstance(value, list):
        return yaml.SequenceNode("tag:yaml.org,2002:seq", [_json_node(item) for item in value])
    kind = "null" if value is None else type(value).__name__
    text = value if isinstance(value, str) else json.dumps(value)
    return yaml.ScalarNode(f"tag:yaml.org,2002:{kind}", text)


def to_plain(value: Any) -> Any:
    """A dataclass as nested dicts, lists and scalars, ready for YAML or JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def dump_yaml(value: object) -> str:
    """YAML text of a dataclass; `parse_yaml` reads it back to an equal one."""
    return yaml.safe_dump(to_plain(value), sort_keys=False, allow_unicode=True, width=100)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint: "did you mean x?" or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"


def imported(name: str, cls: type[T] | None = None, *, what: str) -> Any:
    """A user's own object, named `package.module:NAME`.

    Args:
        name: of the object.
        cls: the class that it is of; None for anything that can be called.
        what: names it in messages, for example `task kind`.

    Raises:
        ValueError: if there is none, or it is something else.
    """
    place, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*place.split("."), attribute)):
        raise ValueError(f"{what} {name}: expected package.module:NAME")
    try:
        module = importlib.import_module(place)
    except Exception as error:
        # What is not of the package may fail in its own way.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, ModuleNotFoundError):
            reason += "; install it, or set PYTHONPATH to its folder"
        raise ValueError(f"{what} {name}: cannot import {place}: {reason}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{what} {name}: module {place} has no {attribute}")
    found = getattr(module, attribute)
    if cls is None and not callable(found):
        raise ValueError(f"{what} {name}: expected a function, got {type(found).__name__}")
    if cls is not None and not isinstance(found, cls):
        raise ValueError(
            f"{what} {name}: expected an {cls.__module__.rpartition('.')[0]}.{cls.__name__}, got "
            f"{type(found).__name__}"
        )
    return found


_OVERRIDE = "--set "
"""What the names of the marks of overrides begin with."""


def _apply_override(root: yaml.Node, override: str, source: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ValueError(
            one_line(f"--set {override}: expected key=value, for example search.steps=100")
        )
    node, parts = root, key.strip().split(".")
    if len(parts) > YAML_DEPTH:
        raise ValueError(f"--set: expected a key of at most {YAML_DEPTH} parts, got {len(parts)}")
    value = compose_yaml(text, f"{_OVERRIDE}{key}") or yaml.ScalarNode("tag:yaml.org,2002:null", "")
    # Marks of the override, so that a message about its keys does not name a line of the file.
    marks = value.start_mark, value.end_mark
    for depth, part in enumerate(parts):
        if not isinstance(node, yaml.MappingNode):
            before = ".".join(parts[:depth])
            raise ValueError(one_line(f"--set {override}: {before} has no keys in {source}"))
        last = depth == len(parts) - 1
        match = [i for i, (k, _) in enumerate(node.value) if k.value == part]
        if last:
            entry = (yaml.ScalarNode("tag:yaml.org,2002:str", part, *marks), value)
            if match:
                node.value[match[0]] = entry
            else:
                node.value.append(entry)
        elif match:
            node = node.value[match[0]][1]
        else:
            child = yaml.MappingNode("tag:yaml.org,2002:map", [], *marks)
            node.value.append((yaml.ScalarNode("tag:yaml.org,2002:str", part, *marks), child))
            node = child


class _Reader:
    """Walks a YAML node tree and a type together; keeps the file name for messages."""

    def __init__(self, source: str) -> None:
        self.source = source

    def error(self, node: yaml.Node, message: str) -> ValueError:
        mark = node.start_mark
        # The mark's name is the file, or the override that the node came from.
        place = f"{mark.name}:{mark.line + 1}" if mark is not None else self.source
        return ValueError(one_line(f"{place}: {message}"))

    def read(self, node: yaml.Node, kind: Any, where: str) -> Any:
        origin = typing.get_origin(kind)
        if dataclasses.is_dataclass(kind):
            return self._dataclass(node, cast(type, kind), where)
        if origin in (types.UnionType, typing.Union):
            return self._union(node, typing.get_args(kind), where)
        if origin is tuple:
            return self._tuple(node, typing.get_args(kind), where)
        if origin is dict:
            item = typing.get_args(kind)[1]
            pairs = self._pairs(node, where)
            return {key: self.read(n, item, f"{where}.{key}") for key, _, n in pairs}
        if origin is typing.Literal:
            value = self._scalar(node, str, where)
            if value not in typing.get_args(kind):
                known = ", ".join(map(str, typing.get_args(kind)))
                raise self.error(node, f"{where}: expected one of {known}, got {value}")
            return value
        return self._scalar(node, kind, where)

    def _pairs(self, node: yaml.Node, where: str) -> list[tuple[str, yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(
                node, f"{where or 'file'}: expected keys and values, got {_show(node)}"
            )
        pairs: dict[str, tuple[str, yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or not is_text(key.value):
                raise self.error(key, f"{where or 'file'}: expected a plain key, got {_show(key)}")
            if key.value in pairs:
                raise self.error(key, f"duplicate key {_join(where, key.value)}")
            pairs[key.value] = (key.value, key, value)
        return list(pairs.values())

    def _dataclass(self, node: yaml.Node, cls: type, where: str) -> object:
        hints = _hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
        values = {}
        for key, key_node, value_node in self._pairs(node, where):
            if key not in fields:
                hint = nearest(key, fields)
                raise self.error(key_node, f"unknown key {_join(where, key)}; {hint}")
            values[key] = self.read(value_node, hints[key], _join(where, key))
        for name, field in fields.items():
            has_default = (
                field.default is not dataclasses.MISSING
                or field.default_factory is not dataclasses.MISSING
            )
            if name not in values and not has_default:
                raise self.error(node, f"missing key {_join(where, name)}")
        try:
            return cls(**values)
        except ValueError as error:
            message = f"{where}: {error}" if where else str(error)
            changes = _changes(node)
            if changes:  # the line alone would be that of what was right before
                message = f"{message}, with {', '.join(changes)}"
            raise self.error(node, message) from None

    def _union(self, node: yaml.Node, kinds: tuple[Any, ...], where: str) -> Any:
        if node.tag == "tag:yaml.org,2002:null" and type(None) in kinds:
            return None
        others = [kind for kind in kinds if kind is not type(None)]
        if len(others) == 1:
            return self.read(node, others[0], where)
        tagged = _by_kind(tuple(others))
        if tagged:
            return self._tagged(node, tagged, where)
        messages = []
        for kind in others:
            try:
                return self.read(node, kind, where)
            except ValueError as error:
                messages.append(str(error))
        raise ValueError(messages[-1])

    def _tagged(self, node: yaml.Node, tagged: dict[str, type], where: str) -> object:
        kinds = [value for key, _, value in self._pairs(node, where) if key == "kind"]
        if not kinds:
            known = ", ".join(tagged)
            raise self.error(node, f"missing key {_join(where, 'kind')}; known: {known}")
        kind = self._scalar(kinds[0], str, _join(where, "kind"))
        if kind not in tagged:
            raise self.error(
                kinds[0], f"{_join(where, 'kind')}: unknown {kind}; {nearest(kind, tagged)}"
            )
        return self._dataclass(node, tagged[kind], where)

    def _tuple(self, node: yaml.Node, kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(node, f"{where}: expected a list, got {_show(node)}")
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            kinds = (kinds[0],) * len(node.value)
        if len(kinds) != len(node.value):
            raise self.error(node, f"{where}: expected {len(kinds)} values, got {len(node.value)}")
        return tuple(
            self.read(item, kind, f"{where}[{i}]")
            for i, (item, kind) in enumerate(zip(node.value, kinds, strict=True))
        )

    def _scalar(self, node: yaml.Node, kind: Any, where: str) -> Any:
        expected = _TYPE_WORDS.get(kind, kind.__name__)
        wrong = self.error(node, f"{where}: expected {expected}, got {_show(node)}")
        if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:null":
            raise wrong
        if kind in (str, Path):
            if not is_text(node.value):
                raise wrong
            return kind(node.value)
        if kind is float:
            # PyYAML takes 1e-3 for text, so numbers are converted from their spelling.
            try:
                value = float(node.value.replace("_", ""))
            except ValueError:
                raise wrong from None
            if not math.isfinite(value):
                raise wrong
            return value
        if kind not in _SCALAR_TAGS:
            raise TypeError(f"{where}: fields of type {kind} cannot be read from YAML")
        if node.tag not in _SCALAR_TAGS[kind]:
            raise wrong
        found = _constructed(node)
        if type(found) is not kind or not -(2**63) <= found < 2**63:
            raise wrong
        return found


def _constructed(node: yaml.ScalarNode) -> Any:
    """The number, or true or false, that a node stands for; None for none, or a very long one."""
    if len(node.value) > MAX_DIGITS:
        return None
    with suppress(ValueError, LookupError):  # a tag may say what the text is not
        return yaml.constructor.SafeConstructor().construct_object(node)
    return None


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@cache
def _by_kind(kinds: tuple[Any, ...]) -> dict[str, type]:
    """The dataclasses of a union by the value of their field `kind`; empty if one has none."""
    found: dict[str, type] = {}
    for cls in kinds:
        hint = _hints(cast(type, cls)).get("kind") if dataclasses.is_dataclass(cls) else None
        if typing.get_origin(hint) is not typing.Literal:
            return {}
        found |= {value: cast(type, cls) for value in typing.get_args(hint)}
    return found


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _changes(node: yaml.Node) -> list[str]:
    """The overrides that a mapping, or what is in it, was changed by."""
    found = dict[str, None]()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.start_mark is not None and key.start_mark.name.startswith(_OVERRIDE):
            found[key.start_mark.name] = None
        else:
            found |= dict.fromkeys(_changes(value))
    return list(found)


def _show(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "nothing" if node.tag == "tag:yaml.org,2002:null" else reprlib.repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys and values"
