"""What a user's class can be refused for before anything is asked of it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dgpo.errors import UserError, told
from dgpo.registry import nearest
from dgpo.user_code import user_code

T = TypeVar("T")


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


def refuse_signatures(kind: type, base: type, where: str) -> None:
    """See that every hook that a user's class overrides can be called as it will be.

    Args:
        kind: the class.
        base: what it is derived from, whose hooks say how.
        where: what the error calls the place.

    Raises:
        UserError: one cannot; the message says what it takes.
    """
    for name, of_base in vars(base).items():
        method = inspect.getattr_static(kind, name)
        if name.startswith("_") or method is of_base or not inspect.isfunction(of_base):
            continue
        parts = inspect.signature(of_base).parameters.values()
        places = [one.name for one in parts if one.kind is one.POSITIONAL_OR_KEYWORD]
        named = [one.name for one in parts if one.kind is one.KEYWORD_ONLY]
        rest = [f"**{one.name}" for one in parts if one.kind is one.VAR_KEYWORD]
        takes = f"write def {name}({', '.join(places + rest)})"
        if not callable(getattr(kind, name)):
            raise UserError(f"{where}: {kind.__name__}.{name} is no method; {takes}")
        if inspect.isfunction(method):
            try:
                inspect.signature(method).bind(*places, **dict.fromkeys(named))
            except TypeError as error:
                said = f"{kind.__name__}.{name}{inspect.signature(method)}: {error}"
                raise UserError(f"{where}: {said}; {takes}") from error


def make(kind: Callable[..., T], options: Mapping[str, Any], who: str, where: str) -> T:
    """Make an object of a user's class.

    Args:
        kind: the class.
        options: the arguments of its constructor.
        who: what warnings call it, such as ``logger 'x'``.
        where: what errors call the place.

    Raises:
        UserError: the constructor raised.
    """
    try:
        with user_code(who):
            return kind(**options)
    except UserError:
        raise
    except Exception as error:
        called = getattr(kind, "__name__", who)
        raise UserError(f"{where}: making {called} raised {told(error)}") from error


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
