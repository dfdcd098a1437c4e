"""YAML and JSON text of which nobody knows who wrote it: parsed within limits, or one line of why.

Nothing in a text can name code to run, take memory or time out of proportion to its size, or reach
the screen other than as printable characters.
"""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml
from yaml.composer import ComposerError

YAML_BYTES = 2**18
"""YAML files are written by people; larger ones are refused."""
YAML_NODES = 5_000
"""Keys and values of a YAML text, each alias counted as all that it stands for."""
YAML_DEPTH = 40
"""Levels of lists and mappings in each other, in YAML."""
JSON_BYTES = 2**26
"""JSON files are written by programs, such as the lists of frames of large data sets."""
JSON_DEPTH = 64
JSON_DIGITS = 40
"""Of a whole number: 128 bits, and far from what no floating-point number can hold."""
MAX_MESSAGE = 1000
"""Characters of a message; more of a bad value help nobody."""

# All but tab and the ends of lines; and halves of surrogate pairs, which no file can hold.
_CONTROL = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")
_YAML_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "timestamp", "merge", "value", "seq", "map")
)
_YAML_PREFIX = "tag:yaml.org,2002:"


def one_line(text: str) -> str:
    """A message as one line of bounded length in which nothing can steer a terminal."""
    line = " ".join(text.split())
    if len(line) > MAX_MESSAGE:
        line = f"{line[: MAX_MESSAGE - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def is_text(value: str) -> bool:
    """Whether a file, a page or a terminal can show it: no control character, no half of a pair."""
    return _CONTROL.search(value) is None


def read_limited(path: Path, limit: int) -> str:
    """Text of a UTF-8 file, with or without a byte order mark.

    Args:
        path: the file.
        limit: its most bytes.

    Raises:
        FileNotFoundError: if there is no such file, or it is a device or a pipe.
        ValueError: if it is larger, or no UTF-8 text; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path}: {size} bytes, more than the {limit} that are read")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error.reason}") from None


# YAML ---------------------------------------------------------------------------------------


def compose_yaml(text: str, source: str) -> yaml.Node | None:
    """The nodes of a YAML text, each with its place; None for an empty one.

    Aliases are written out, so that no node is part of two others or of itself.

    Args:
        text: one document of plain values: no tag but those of YAML's core.
        source: names the text in messages.

    Raises:
        ValueError: for another text, or one beyond the limits; names source and line.
    """
    if len(text) > YAML_BYTES:
        raise ValueError(
            f"{source}: {len(text)} characters of YAML, more than the {YAML_BYTES} that are read"
        )
    try:
        loader = _Loader(text)
        loader.name = source  # marks carry it
        return loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"character U+{ord(text[error.position]):04X} is not allowed"
        raise ValueError(one_line(f"{source}:{line}: not valid YAML: {problem}")) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ValueError(one_line(f"{source}{where}: not valid YAML: {problem}")) from None
    except (ValueError, OverflowError) as error:
        # An escape such as "\UFFFFFFFF" that stands for no character.
        raise ValueError(one_line(f"{source}: not valid YAML: {error}")) from None


class _Loader(yaml.SafeLoader):
    """Composes nodes and stops where they become too many or too deep."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        self._sizes: dict[str, int] = {}
        """Nodes of what each anchor stands for; 0 while that is not at its end."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """The next node, counted."""
        event = self.peek_event()
        anchor: str | None = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            size = self._sizes.get(str(anchor), 1)
            if size == 0:
                self._refuse(f"*{anchor} stands within what it stands for", event)
            self._take(size, event)
            return _copied(self._composed(parent, index))
        before = self._count
        self._take(1, event)
        self._depth += 1
        if self._depth > YAML_DEPTH:
            self._refuse(f"more than {YAML_DEPTH} levels in each other", event)
        if anchor is not None:
            self._sizes[anchor] = 0
        node = self._composed(parent, index)
        if node.tag not in _YAML_TAGS:
            tag = node.tag.replace(_YAML_PREFIX, "!!")
            self._refuse(f"tag {tag} is not one of plain values", event)
        if anchor is not None:
            self._sizes[anchor] = self._count - before
        self._depth -= 1
        return node

    def _composed(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        node = super().compose_node(parent, index)
        assert node is not None, "an event stands for a node"
        return node

    def _take(self, count: int, event: yaml.Event) -> None:
        self._count += count
        if self._count > YAML_NODES:
            self._refuse(f"more than {YAML_NODES} keys and values", event)

    def _refuse(self, problem: str, event: yaml.Event) -> NoReturn:
        raise ComposerError(None, None, problem, cast(yaml.Mark, event.start_mark))


def _copied(node: yaml.Node) -> yaml.Node:
    marks = node.start_mark, node.end_mark
    if isinstance(node, yaml.MappingNode):
        pairs = [(_copied(key), _copied(value)) for key, value in node.value]
        return yaml.MappingNode(node.tag, pairs, *marks)
    if isinstance(node, yaml.SequenceNode):
        return yaml.SequenceNode(node.tag, [_copied(item) for item in node.value], *marks)
    return yaml.ScalarNode(node.tag, node.value, *marks)


# JSON ---------------------------------------------------------------------------------------


def parse_json(text: str, source: str) -> Any:
    """The value of a JSON text.

    Args:
        text: finite numbers only, no key twice in an object.
        source: names the text in messages.

    Raises:
        ValueError: for another text, or one beyond the limits; names the source.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_whole,
        )
        if "\\u" in text:
            _check_text(value)
        if _is_deep(value):
            raise ValueError(f"more than {JSON_DEPTH} levels in each other")
    except RecursionError:
        raise ValueError(
            f"{source}: not valid JSON: more than {JSON_DEPTH} levels in each other"
        ) from None
    except ValueError as error:
        raise ValueError(one_line(f"{source}: not valid JSON: {error}")) from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return found


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"number {digits[:JSON_DIGITS]} is too large")
    return value


def _whole(digits: str) -> int:
    if len(digits) > JSON_DIGITS:
        raise ValueError(f"number {digits[:JSON_DIGITS]}... is too large")
    return int(digits)


def _check_text(value: Any) -> None:
    """Refuse halves of surrogate pairs, which no file can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("text with half of a surrogate pair") from None


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(JSON_DEPTH + 1):
        level = [each for each in level if isinstance(each, (list, dict))]
        if not level:
            return False
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = list(itertools.chain.from_iterable(inside))
    return True
