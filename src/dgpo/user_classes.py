"""What a user's class can be refused for before anything is asked of it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from dgpo.errors import UserError
from dgpo.registry import nearest


def refuse_misspelt(kind: type, base: type, where: str) -> None:
    """See that no method of a user's class only almost has the name of a hook: nothing would ever
    call it.

    Args:
        kind: the class.
        base: what it is derived from, which has the hooks.
        where: what the error calls the place.

    Raises:
        UserError: one does.
    """
    hooks = [name for name in vars(base) if not name.startswith("_")]
    for name in vars(kind):
        if name.startswith("_") or name in dir(base) or not callable(getattr(kind, name)):
            continue
        # every name of a callback's hook begins so, and no other should
        meant = name.startswith("on_") and hooks[0].startswith("on_")
        hint = nearest(name, hooks) if meant else ""
        if meant or difflib.get_close_matches(name, hooks, n=1, cutoff=0.85):
            raise UserError(
                f"{where}: {kind.__name__}.{name} is no hook of {base.__name__}"
                f"{hint or nearest(name, hooks)}; begin the name of a method of your own with _"
            )


def refuse_options(kind: type, options: Mapping[str, Any], where: str) -> None:
    """See that a class takes options as the arguments of its constructor.

    Raises:
        UserError: it does not; the message names those that it takes.
    """
    signature = inspect.signature(kind)
    try:
        signature.bind(**options)
    except TypeError as error:
        names = [name for name in signature.parameters if name not in ("args", "kwargs")]
        hint = "".join(nearest(name, names) for name in options if name not in names)
        takes = f"takes {', '.join(names)}" if names else "takes no options"
        raise UserError(f"{where}: {error}{hint}; {kind.__name__} {takes}") from error


def unfinished(kind: type) -> list[str]:
    """Return what a user's class of an algorithm lacks, one line for each thing."""
    lines = []
    own = [name for name, value in vars(kind).items() if callable(value)]
    for method in sorted(getattr(kind, "__abstractmethods__", ())):
        hint = nearest(method, own)
        lines.append(f"algorithm {kind.__name__} has no method {method!r}{hint}; write it")
    if not isinstance(getattr(kind, "name", None), str):
        lines.append(
            f"algorithm {kind.__name__} has no name; give it one in the class: "
            f"name: ClassVar[str] = {kind.__name__.lower()!r}"
        )
    return lines
