"""Read YAML as plain data: only what JSON could hold, of a bounded size, from any file."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from dgpo.errors import UserError

MOST_NODES = 100_000
"""The most values and keys that a file may have. Those behind an alias count each time."""
_PLAIN = frozenset(
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
)
# YAML's writer takes the next line (U+0085) for the end of a line
_UNWRITABLE = re.compile("[\0\x85\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """A loader of safe YAML that refuses a repeated key and reads plain words by YAML 1.2."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _check(node, {}, ())
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag.endswith(":merge"):
                continue  # `<<: *above` is not a key; the keys beside it win
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise UserError(f"line {line}: key {key!r} is given twice; keep one of them")
                seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML guesses by YAML 1.1: 1:30 is 90, 010 is 8, `no` is false. The core schema of YAML 1.2 does
# not; what it does not know is a text, which the setting itself reads or refuses.
_KINDS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
_Loader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """A writer that quotes each text that YAML 1.1 or 1.2 would not read as a text."""


for _kind, (_pattern, _firsts) in _KINDS.items():
    _tag, _words = f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$")
    _Loader.add_implicit_resolver(_tag, _words, list(_firsts))
    _Dumper.add_implicit_resolver(_tag, _words, list(_firsts))


def write_yaml(data: Any) -> str:
    """Return plain data as YAML that :func:`parse_yaml` reads back equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML as plain data.

    Args:
        text: the YAML.
        where: what the message of an error calls it.

    Raises:
        UserError: it is not YAML, repeats a key, has a tag beyond plain data, or is too large. The
            message names ``where`` and, if it is known, the line.
    """
    try:
        return _Loader(text).get_single_data()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{line}: not YAML: {problem}") from error


def refuse_unwritable(text: str, where: str) -> None:
    """Refuse a text that a recipe cannot hold when it is written down.

    Raises:
        UserError: it has a zero byte, half a character or U+0085; the message begins with
            ``where``.
    """
    if found := _UNWRITABLE.search(text):
        raise UserError(f"{where}: {found[0]!r} stands in a text; leave it out")


def _check(node: yaml.Node, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Count the nodes in and below this one, and follow aliases.

    Raises:
        UserError: there are too many, one contains itself, or a tag or character is not allowed.
    """
    line, name = node.start_mark.line + 1, id(node)
    if name in above:
        raise UserError(f"line {line}: it contains itself")
    if name in sizes:
        return sizes[name]
    if node.tag not in _PLAIN:
        raise UserError(f"line {line}: {node.tag.rpartition(':')[2]!r} is no plain value")
    if isinstance(node, yaml.ScalarNode):
        refuse_unwritable(node.value, f"line {line}")
        return 1
    parts = node.value
    if isinstance(node, yaml.MappingNode):
        parts = [one for pair in parts for one in pair]
    size = 1 + sum(_check(one, sizes, (*above, name)) for one in parts)
    if size > MOST_NODES:
        raise UserError(f"line {line}: more than {MOST_NODES} values, with aliases followed")
    sizes[name] = size
    return size
