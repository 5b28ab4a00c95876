"""What a reward is: a base class with every hook and its default.

Whoever asks rewards knows :class:`Reward` alone. A plain function, or an object of a class that
knows nothing of this library, becomes one where it enters: :func:`as_reward`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.user_classes import make, refuse_misspelt, refuse_options

Media: TypeAlias = Sequence[Any]
"""What is scored: pictures in any mode, videos as tensors uint8 [frames, 3, height, width], or
sounds as tensors float32 [channels, samples]."""
Texts: TypeAlias = Sequence[str]
"""The prompt of each."""
RewardFunction: TypeAlias = Callable[..., Sequence[float]]
"""A function ``(images, prompts, **columns) -> one number for each``; see :class:`Reward`."""


class RewardFailure(UserError):
    """A reward gave no usable answer.

    Args:
        message: which reward failed, and why.
        gone: it hangs or cannot be reached, so asking it about fewer pictures is no use.
        skips: the run goes on without the groups concerned.
    """

    def __init__(self, message: str, gone: bool = False, skips: bool = False) -> None:
        super().__init__(message)
        self.gone = gone
        self.skips = skips


class Reward:
    """Gives each picture, video or sound a number; higher is better.

    A subclass must write ``__call__``; every other hook has a default that does nothing.

    >>> from PIL import Image
    >>> from dgpo.prompts import Prompt
    >>> from dgpo.rewards import Reward, load_rewards
    >>> class Brighter(Reward):
    ...     def __init__(self, than=0):
    ...         self.than = than
    ...
    ...     def __call__(self, images, prompts, **columns):
    ...         return [image.convert("L").getpixel((0, 0)) - self.than for image in images]
    >>> rewards = load_rewards(Brighter(than=100))
    >>> rewards.names
    ['Brighter']
    >>> rewards([Image.new("RGB", (8, 8), "white")], [Prompt("snow")]).total
    tensor([155.])
    """

    name: str = ""
    """What figures, tables and errors call the reward; by default its class's name."""
    media: str = "pictures"
    """What it scores: ``pictures``, ``videos`` or ``sounds``."""
    group_wise: bool = False
    """True if it compares the pictures of a group, and so is called once for each group."""
    asks_people: bool = False
    """True if people answer: the trial before a run does not ask them."""
    of_set: bool = False
    """True if it is a metric of all pictures together: it then returns ``(value, low, high)``, and
    stands under ``eval.metrics`` alone."""
    columns: frozenset[str] | None = None
    """The metadata columns that ``__call__`` is given, None for all; by default those it names."""
    needs: frozenset[str] = frozenset()
    """Those of them that no prompt row may lack; by default those it names without a default."""

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        own = vars(cls)
        if "name" not in own:
            cls.name = cls.__name__
        if "__call__" in own:
            call = functools.partial(own["__call__"], None)
            if "columns" not in own:
                cls.columns = columns_of(cls.name, call)
            if "needs" not in own:
                cls.needs = needs_of(call)

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> Sequence[float]:
        """Score pictures.

        Args:
            images: B pictures, videos or sounds.
            prompts: the text of each.
            columns: what else the prompt rows say, lists of B values, None where a row says
                nothing; for sounds also ``sampling_rate``.

        Returns:
            B finite numbers, as a list, an array or a tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it scores")

    def alone(self, images: Media, prompts: Texts, **columns: Any) -> Sequence[float]:
        """Score pictures that are in no group, such as held-out ones; by default as others.

        Raises:
            UserError: the reward compares the pictures of a group.
        """
        if self.group_wise:
            raise UserError(
                f"reward {self.name!r} compares the pictures of a group, and these are in none: "
                "name others in eval.metrics"
            )
        return self(images, prompts, **columns)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompt rows that cannot be scored, before any compute is spent.

        Args:
            prompts: all rows that ask the reward. There may be none: then it loads its model and
                misses what it lacks.

        Raises:
            UserError: for such a row, or what is missing.
        """

    def announce(self, images: Media, prompts: Texts, **columns: Any) -> None:
        """See a whole group before being asked about it: for rewards that take their time."""

    def run_in(self, folder: Path) -> None:
        """Learn the run's folder: for rewards that keep something."""

    def close(self) -> None:
        """Put in order what is open; it is opened again when the reward is asked again."""

    def modules(self) -> Iterable[nn.Module]:
        """The networks that ``memory.offload_rewards`` moves: by default those among the object's
        attributes, in lists and dicts of them, and those of rewards among them."""
        return _networks(vars(self).values())


HOOKS = tuple(hook for hook in vars(Reward) if not hook.startswith("_"))
"""The names of all that a reward may say or do besides being called."""
FACTS = tuple(hook for hook in HOOKS if not callable(vars(Reward)[hook]))
"""Those that a class says without being built."""


def name_of(given: Any) -> str:
    """The name of what may be given as a reward."""
    own = given.name if isinstance(given, Reward) else getattr(given, "__name__", "")
    return own or type(given).__name__


def columns_of(name: str, function: Callable[..., Any]) -> frozenset[str] | None:
    """The metadata columns that a function names after images and prompts; None: it takes any.

    Raises:
        UserError: it does not take images and prompts.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return None  # a builtin without a signature: it is handed everything
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise UserError(f"reward {name!r} must take (images, prompts, **metadata columns)")
    return frozenset(p.name for p in parameters) - {p.name for p in positional[:2]}


def needs_of(function: Callable[..., Any]) -> frozenset[str]:
    """The metadata columns that a function names after images and prompts without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return frozenset()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, kinds[0])]
    return frozenset(required) - set(positional[:2])


def _networks(values: Iterable[Any]) -> Iterator[nn.Module]:
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, Reward):
            yield from value.modules()
        elif isinstance(value, (Mapping, list, tuple)):
            yield from _networks(value.values() if isinstance(value, Mapping) else value)


class _Plain(Reward):
    """A function, or an object that has some of the hooks as attributes."""

    def __init__(self, given: Callable[..., Any], name: str) -> None:
        self._given = given
        self.name = name
        self.columns, self.needs = columns_of(name, given), needs_of(given)
        for hook in set(HOOKS) - {
            "name",
            "columns",
            "needs",
        }:  # which may mean anything in a foreign class
            if hasattr(given, hook):
                setattr(self, hook, getattr(given, hook))

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> Sequence[float]:
        return self._given(images, prompts, **columns)

    def modules(self) -> Iterable[nn.Module]:
        return _networks(getattr(self._given, "__dict__", {}).values())


def as_reward(given: Any, name: str = "", options: Mapping[str, Any] | None = None) -> Reward:
    """A :class:`Reward` of whatever may be given as one.

    Args:
        given: a reward, a function ``(images, prompts, **columns) -> numbers``, an object that is
            called like one and may have hooks as attributes, or a class of either.
        name: what errors call it; by default its own name.
        options: arguments of a class.

    Raises:
        UserError: it cannot be called as a reward, or does not take the options.
    """
    name = name or name_of(given)
    if inspect.isclass(given):
        refuse_options(given, options or {}, f"rewards.{name}.options")
        if issubclass(given, Reward):
            refuse_misspelt(given, Reward, f"rewards.{name}")
        given = make(given, options or {}, f"reward {name!r}", f"rewards.{name}")
    elif options:
        raise UserError(f"rewards.{name}.options: {name!r} takes none, as it is no class")
    if isinstance(given, Reward):
        return given
    if not callable(given):
        raise UserError(
            f"reward {name!r} is {given!r:.80} ({type(given).__name__}), and no function (images, "
            "prompts, **columns); give one, or derive a class from dgpo.rewards.Reward and define "
            "__call__"
        )
    return _Plain(given, name)
