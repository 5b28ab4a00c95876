"""The registry knows the names that recipes take and where each one lives; it imports none.

The entries are data: ``registry.yaml``, one line each. Wherever a name is accepted,
``package.module:attribute`` and ``path/to/file.py:attribute`` are accepted too, so what a user
writes needs no registration.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from dgpo.errors import UserError, message, told
from dgpo.user_code import user_code

try:
    from yaml import CSafeLoader as SafeLoader  # ten times as fast, where libyaml is there
except ImportError:
    from yaml import SafeLoader

FILE = Path(__file__).with_name("registry.yaml")
"""The file with the entries, one line each."""


@dataclass(frozen=True)
class Entry:
    """An ``Entry`` is a line of the registry: where an object lives, and what lists tell about it.

    Args:
        path: ``module:attribute`` of the object.
        about: what it is, in half a sentence.
        paper: the arXiv number of an algorithm's paper.
        points: what an algorithm trains on: ``"forward"``, clean samples that are noised again, or
            ``"trajectory"``, the steps of the rollout.
        flow: ``module:attribute`` of a sampler for flow matching; its ``path`` is the one for noise
            and v prediction.
        unfit: why a sampler does not fit flow matching.
        range: the values that a reward has in practice.
        licence: the licence of code and weights beyond this project's own.
        weights: how much a reward downloads at its first use, or where else its weights lie; empty
            if nothing is downloaded.
        hub: where a reward's weights come from.
        call: arguments of a model's call with which it was trained, and with which recipes and
            ``dgpo sample`` call it.
        models: the networks that a reward holds, each with its millions of parameters. Rewards
            share a network of one name.
        half: whether they lie in half precision on a GPU.
        variables: the environment variables that a reward reads.
        needs: what else a reward needs.
        package: a module that must be importable.
        install: the line that installs it.
        setting: an environment variable that must be set, and to what (``NAME=VALUE``).
    """

    path: str
    about: str = ""
    paper: str = ""
    points: str = ""
    flow: str = ""
    unfit: str = ""
    range: str = ""
    licence: str = "own"
    weights: str = ""
    hub: str = ""
    models: Mapping[str, int] = field(default_factory=dict)
    half: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)
    variables: str = ""
    needs: str = ""
    package: str = ""
    install: str = ""
    setting: str = ""

    def missing(self) -> str:
        """Return what must be done before the object can be used; empty if it is ready.

        >>> Entry("json:loads", package="no_such_module", install="pip install it").missing()
        'pip install it'
        """
        if self.package and importlib.util.find_spec(self.package) is None:
            return self.install
        name, _, value = self.setting.partition("=")
        if name and not os.environ.get(name):
            return f"export {name}={value}"
        return ""


def _read(file: Path) -> tuple[dict[str, dict[str, Entry]], dict[str, str]]:
    kinds = SafeLoader(file.read_text(encoding="utf-8")).get_single_data()
    moved = kinds.pop("moved")
    tables = {
        kind: {name: Entry(**facts) for name, facts in rows.items()} for kind, rows in kinds.items()
    }
    return tables, moved


TABLES, MOVED = _read(FILE)
"""The entries of each kind by their names, and the modules that have moved with their new names."""
ALGORITHMS, REWARDS, BENCHMARKS, MODELS, PROMPTS, SAMPLERS = (
    TABLES[kind] for kind in ("algorithm", "reward", "benchmark", "model", "prompts", "sampler")
)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest valid names; empty if none is close.

    >>> nearest("brightnes", ["brightness", "redness"])
    " (did you mean 'brightness'?)"
    """
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.55)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""


def known(kind: str, name: str) -> bool:
    """Return whether a name is registered, or has the form of a path to the user's own object."""
    return name in TABLES[kind] or ":" in name


def unknown(kind: str, name: str) -> str:
    """Return the message for an unknown name: the nearest names, all names, and the way out."""
    table = TABLES[kind]
    built_in = f"built in: {', '.join(sorted(table))}; or " if table else ""
    return (
        f"unknown {kind} {name!r}{nearest(name, table)}; {built_in}"
        "name your own as package.module:attribute or path/to/file.py:attribute"
    )


def resolve(kind: str, name: str) -> Any:
    """Return the object behind a name. Its module is imported only now.

    >>> resolve("reward", "math:sqrt")
    <built-in function sqrt>

    Args:
        kind: a key of ``TABLES``: ``"algorithm"``, ``"reward"``, ``"model"`` and so on.
        name: a registered name, ``package.module:attribute`` or ``path/to/file.py:attribute``. A
            module of this package may have the place that it had before it moved.

    Raises:
        UserError: the name is unknown, or what it points at cannot be imported or is not there.
    """
    entry = TABLES[kind].get(name)
    where, colon, attribute = (entry.path if entry else name).rpartition(":")
    where = MOVED.get(where, where)
    if not colon:
        raise UserError(unknown(kind, name))
    with nullcontext() if entry else user_code(f"importing {kind} {name!r}"):
        read = (
            _from_file(kind, name, where)
            if where.endswith(".py")
            else _from_name(kind, name, where)
        )
        found: Any = read
        for part in attribute.split("."):
            if not hasattr(found, part):
                names = [n for n in vars(read) if not n.startswith("_")]
                hint = nearest(part, names)
                if where == "__main__":
                    hint = (
                        "; it stood in the script that began the run: put it into a file of its own"
                    )
                raise UserError(f"{kind} {name!r}: {where} has no {part!r}{hint}")
            found = getattr(found, part)
        return found


def path_of(found: Any) -> str:
    """Return the path of a class or a function, by which :func:`resolve` finds it again.

    >>> path_of(difflib.get_close_matches)
    'difflib:get_close_matches'
    """
    module = found.__module__
    if module.startswith("dgpo_user_"):  # it came from a file, not from the import path
        module = str(sys.modules[module].__file__)
    return f"{module}:{found.__qualname__}"


def _from_name(kind: str, name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except Exception as error:  # the user's module may raise anything while it is imported
        # one line tells a misspelt module from a dependency that is not installed
        raise UserError(f"{kind} {name!r}: importing {where} failed: {_told(error)}") from error


def _told(error: Exception) -> str:
    # one line tells a misspelt module from a dependency that is not installed
    return message(error) if isinstance(error, ImportError) else told(error)


def _from_file(kind: str, name: str, where: str) -> ModuleType:
    try:
        file = Path(where).expanduser().resolve()
        there = file.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name or a home that cannot be
        raise UserError(f"{kind}: no file {where!r:.200}: {error}"[:400]) from error
    if not there:
        beside = "" if Path(where).is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"{kind} {name!r}: there is no file {where}{beside}")
    name = f"dgpo_user_{file.stem}_{abs(hash(file)):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # registered first: dataclasses and pickling look their module up while it is executed
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise UserError(f"{kind}: {where} failed: {_told(error)}") from error
        raise
    return module
