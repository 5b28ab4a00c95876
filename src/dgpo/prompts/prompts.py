"""Prompts: reading them from files, lists and datasets, and choosing those of an iteration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dgpo.errors import UserError
from dgpo.prompts.caption import PICTURES, Caption, pictures_of
from dgpo.prompts.datasets import PREFIX, dataset_rows, without_gaps
from dgpo.prompts.files import read_rows
from dgpo.registry import PROMPTS, resolve

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Prompt:
    """A caption and what else its row says (GenEval clauses, the text to be read, a seed, ...).

    Where the row names an ``image`` or a ``mask``, the text is a
    :class:`~dgpo.prompts.caption.Caption`.
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False, repr=False, kw_only=True)
    """Where it stands, for errors: ``rows.jsonl, line 3``; empty: not known."""

    def place(self, row: int) -> str:
        """What errors call it: where it stands, else its number in a list."""
        return self.where or f"prompt row {row}"

    def column(self, key: str) -> Any:
        """What a reward is given of this row: pictures as pictures, the rest as it is written."""
        return pictures_of(self.text).get(key, self.metadata.get(key))


def load_prompts(
    source: str | Path | Sequence[str | dict[str, Any] | Prompt] | datasets.Dataset | None,
) -> list[Prompt]:
    """Read prompts.

    Args:
        source: a registered name (``pocket-geneval/train``), ``package.module:function`` that
            returns rows, a ``.txt`` file (one prompt a line), a ``.jsonl`` file (an object a line
            with ``"prompt"``; what else it has is metadata), ``datasets:...`` (see
            :mod:`dgpo.prompts.datasets`), or the rows themselves: strings, dicts with ``"prompt"``,
            :class:`Prompt`, or a ``datasets.Dataset``. ``"image"`` and ``"mask"`` are pictures, or
            their files, relative to the prompt file (or to the folder one stands in, for rows that
            come from no file). Blank lines are skipped; a row that comes twice counts twice.

    Raises:
        UserError: nothing there, no prompt in it, or a broken row (its line is named).
    """
    if source is None:
        raise UserError(
            "no prompts: set prompts.train in the recipe or give train_dataset; "
            f"built-in sets: {', '.join(sorted(PROMPTS))}"
        )
    if isinstance(source, Path) or (isinstance(source, str) and _names_file(source)):
        return _from_file(Path(source))
    if isinstance(source, str) and source.startswith(PREFIX):
        return _from_dataset(source)
    if isinstance(source, str):
        return _from_rows(_made_by(source), source)
    if isinstance(splits := getattr(source, "column_names", None), dict):
        names = ", ".join(map(repr, splits))
        raise UserError(
            f"prompts: {type(source).__name__} holds the splits {names}; give one of them, such as "
            f"dataset[{next(iter(splits), 'train')!r}]"
        )
    if hasattr(source, "column_names"):  # a datasets.Dataset
        return _from_rows(map(without_gaps, source))
    return _from_rows(source)


def refuse_sizes(prompts: Sequence[Prompt], call: Mapping[str, Any]) -> None:
    """See that no row asks for a size of its own: all samples of a run have one.

    Args:
        prompts: of the run.
        call: the recipe's ``rollout.call``.

    Raises:
        UserError: a row has a ``height`` or ``width`` that is not the call's.
    """
    for prompt in prompts:
        for key in ("height", "width"):
            asked = prompt.metadata.get(key)
            if asked is not None and asked != call.get(key):
                raise UserError(
                    f"prompts: the row {str(prompt.text)!r:.80} has {key} = {asked!r:.20}, but all "
                    f"samples of a run have one size: set rollout.call.{key} (now "
                    f"{call.get(key)!r}), and take the key out of the rows, or give it another "
                    "name if a reward needs it"
                )


def _made_by(name: str) -> Any:
    function = resolve("prompts", name)
    if not callable(function):
        raise UserError(f"prompts {name!r} is {function!r:.80}, not a function that returns rows")
    try:
        return function()
    except Exception as error:  # the user's own code may raise anything
        raise UserError(f"prompts {name!r} raised {type(error).__name__}: {error}") from error


def _names_file(source: str) -> bool:
    if source in PROMPTS:
        return False
    try:
        return Path(source).is_file() or ":" not in source
    except (OSError, ValueError):  # a name that no file can have
        return ":" not in source


def _from_file(path: Path) -> list[Prompt]:
    prompts = [_row(row, where, path.parent) for where, row in read_rows(path)]
    if not prompts:
        raise UserError(f"prompts {path}: the file is empty; it needs at least one prompt")
    return prompts


def _from_dataset(source: str) -> list[Prompt]:
    prompts = [_row(row, where) for where, row in dataset_rows(source)]
    if not prompts:
        raise UserError(f"prompts {source}: no row in it; at least one is needed")
    return prompts


def _row(row: dict[str, Any], where: str, folder: Path = Path()) -> Prompt:
    if "prompt" not in row:
        keys = ", ".join(map(repr, row)) or "nothing"
        raise UserError(f"{where}: no 'prompt' in the row, only {keys}")
    text = row["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: 'prompt' must be a text that is not empty, got {text!r:.80}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(
            f"{where}: 'prompt' holds half a character, which no file can: {text!r:.80}"
        )
    files = {
        key: _picture(key, row[key], where, folder) for key in PICTURES if row.get(key) is not None
    }
    metadata = {key: value for key, value in row.items() if key != "prompt"}
    return Prompt(Caption(text, files) if files else text, {**metadata, **files}, where=where)


def _picture(key: str, given: Any, where: str, folder: Path) -> Any:
    """The file of a picture, or the picture that a dataset holds."""
    if isinstance(given, Image.Image):
        return given.convert(PICTURES[key])
    if not isinstance(given, (str, Path)):
        raise UserError(f"{where}: {key!r} must be a file or a picture, got {given!r:.80}")
    if "://" in str(given):
        raise UserError(f"{where}: {key!r} is the address {given!r:.200}; give a downloaded file")
    try:
        file = (folder / Path(given).expanduser()).absolute()
        there = file.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name or a home that cannot be
        raise UserError(f"{where}: {key!r} is {str(given)!r:.200}: {error}") from error
    if not there:
        raise UserError(f"{where}: {key!r} is {str(given)!r}, but there is no file {file}")
    try:
        with Image.open(file):
            return str(file)
    except Exception as error:  # broken files raise many things; all mean that it is none
        raise UserError(f"{where}: {key!r}: {file} is no picture that can be read") from error


def _from_rows(rows: Any, name: str = "") -> list[Prompt]:
    if not isinstance(rows, Iterable):
        raise UserError(
            f"{name or 'prompts'}: {rows!r:.80} holds no rows; give texts, or dicts with 'prompt'"
        )
    prompts = []
    for index, row in enumerate(rows):
        where = f"{name}, row {index}" if name else f"prompt row {index}"
        if isinstance(row, Prompt):
            prompts.append(row)
        elif isinstance(row, dict):
            prompts.append(_row(row, where))
        else:
            prompts.append(_row({"prompt": row}, where))
    if not prompts:
        raise UserError(f"{name or 'prompts'}: no prompts; at least one is needed")
    return prompts


class PromptSampler:
    """Chooses the prompts of each iteration: shuffled epochs without replacement.

    The choice is a function of ``(seed, iteration)`` alone, so a run that goes on after a stop
    needs no state to see the prompts it would have seen.

    Args:
        prompts: all of them.
        per_iteration: how many an iteration takes (groups).
        seed: of the shuffles; not negative.
    """

    def __init__(self, prompts: Sequence[Prompt], per_iteration: int, seed: int) -> None:
        if not prompts:
            raise UserError("no prompts to sample from")
        self.prompts = prompts
        self.per_iteration = per_iteration
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def at(self, iteration: int) -> list[Prompt]:
        """The prompts of an iteration (counted from 0), ``per_iteration`` of them."""
        first = iteration * self.per_iteration
        places = range(first, first + self.per_iteration)
        size = len(self.prompts)
        return [self.prompts[self._order(place // size)[place % size]] for place in places]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            # the epochs of one iteration are neighbours: older ones are not needed again
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = random.permutation(len(self.prompts))
        return self._orders[epoch]
