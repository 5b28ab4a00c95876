"""YAML as plain data: what JSON could hold, of a bounded size, from files that may be anything."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from dgpo.errors import UserError

MOST_NODES = 100_000
"""Values and keys that a file may have, those behind aliases counted each time."""
_PLAIN = frozenset(
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
)
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads ``3e-4`` as the number it is."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _check(node, {}, ())
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag.endswith(":merge"):
                continue  # `<<: *above` is no key; the keys beside it win
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise UserError(f"line {line}: key {key!r} is given twice; keep one of them")
                seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML reads, wants a dot and a signed exponent; people write 3e-4 and 1e3
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
# a date is a text here: no setting is one
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if not pair[0].endswith(":timestamp")]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    """YAML as plain data.

    Raises:
        UserError: not YAML, a key twice, a tag beyond plain data, or too much of it; ``where``
            and, where it is known, the line are named.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{line}: not YAML: {problem}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check(node: yaml.Node, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Nodes in and below this one, aliases followed.

    Raises:
        UserError: too many, one that holds itself, a tag or a character that has no place here.
    """
    line, name = node.start_mark.line + 1, id(node)
    if name in above:
        raise UserError(f"line {line}: it holds itself")
    if name in sizes:
        return sizes[name]
    if node.tag not in _PLAIN:
        raise UserError(f"line {line}: {node.tag.rpartition(':')[2]!r} is no plain value")
    if isinstance(node, yaml.ScalarNode):
        if found := _UNWRITABLE.search(node.value):
            raise UserError(f"line {line}: {found[0]!r} stands in a text; leave it out")
        return 1
    parts = node.value
    if isinstance(node, yaml.MappingNode):
        parts = [one for pair in parts for one in pair]
    size = 1 + sum(_check(one, sizes, (*above, name)) for one in parts)
    if size > MOST_NODES:
        raise UserError(f"line {line}: more than {MOST_NODES} values, aliases followed")
    sizes[name] = size
    return size
