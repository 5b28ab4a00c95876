"""Prompts are read from files, lists and datasets, and chosen for each iteration."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dgpo.errors import UserError, told
from dgpo.pictures import rgb, size_of
from dgpo.prompts.caption import PICTURES, Caption, pictures_of
from dgpo.prompts.datasets import PREFIX, dataset_rows, without_gaps
from dgpo.prompts.files import read_rows
from dgpo.registry import PROMPTS, resolve
from dgpo.user_code import user_code

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Prompt:
    """A ``Prompt`` is a text and what else its row says (GenEval clauses, a text to read, a seed).

    If the row names an ``image`` or a ``mask``, the text is a
    :class:`~dgpo.prompts.caption.Caption`.

    Args:
        text: what the model is asked for.
        metadata: the other columns of the row, which rewards may read.

    >>> prompt = Prompt("a photo of two cats", {"tag": "counting"})
    >>> prompt.column("tag"), prompt.column("seed")
    ('counting', None)
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False, repr=False, kw_only=True)
    """The place that errors name, such as ``rows.jsonl, line 3``; empty if it is not known."""

    def place(self, row: int) -> str:
        """Return what errors call the row: its place, or else its number in a list."""
        return self.where or f"prompt row {row}"

    def column(self, key: str) -> Any:
        """Return what a reward is given for a column: a picture, or the value as it is written."""
        return pictures_of(self.text).get(key, self.metadata.get(key))


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Return what rewards are given for all columns of rows: None where a row has no such column.

    >>> columns_of([Prompt("a", {"tag": "x"}), Prompt("b")])
    {'tag': ['x', None]}
    """
    keys = dict.fromkeys(key for prompt in prompts for key in prompt.metadata)
    return {key: [prompt.column(key) for prompt in prompts] for key in keys}


def load_prompts(
    source: str | Path | Sequence[str | dict[str, Any] | Prompt] | datasets.Dataset | None,
) -> list[Prompt]:
    """Read prompts.

    Args:
        source: where the prompts are, one of

            - a registered name (``pocket-geneval/train``),
            - ``package.module:function``, a function that returns rows,
            - a ``.txt`` file with one prompt a line,
            - a ``.jsonl`` file with one object a line, ``"prompt"`` and metadata,
            - ``datasets:...`` (see :mod:`dgpo.prompts.datasets`),
            - the rows: strings, dicts with ``"prompt"``, :class:`Prompt`, a ``datasets.Dataset``.

            ``"image"`` and ``"mask"`` of a row are pictures or files; a relative file is looked for
            beside the prompt file, or in the working directory for rows that come from no file.
            Blank lines are skipped; a row that comes twice counts twice.

    Raises:
        UserError: there is nothing to read, there is no prompt in it, or a row is broken (the error
            names its line).

    >>> load_prompts(["a red cat", {"prompt": "two dogs", "tag": "counting"}])
    [Prompt(text='a red cat', metadata={}), Prompt(text='two dogs', metadata={'tag': 'counting'})]
    >>> len(load_prompts("pocket-geneval/test"))
    660
    """
    if source is None:
        raise UserError(
            "there are no prompts: set prompts.train in the recipe or give train_dataset; "
            f"built-in sets: {', '.join(sorted(PROMPTS))}"
        )
    if isinstance(source, Path) or (isinstance(source, str) and _names_file(source)):
        path = Path(source)
        prompts = [_row(row, where, path.parent) for where, row in read_rows(path)]
    elif isinstance(source, str) and source.startswith(PREFIX):
        prompts = [_row(row, where) for where, row in dataset_rows(source)]
    elif isinstance(source, str):
        prompts = _from_rows(_made_by(source), source)
    else:
        prompts = _from_rows(_without_gaps(source))
    if not prompts:
        name = f"prompts {source}" if isinstance(source, (str, Path)) else "prompts"
        raise UserError(f"{name}: it is empty; at least one prompt is needed")
    return prompts


def refuse_sizes(prompts: Sequence[Prompt], call: Mapping[str, Any]) -> None:
    """Refuse a row that asks for a size of its own, since all samples of a run have one size.

    Args:
        prompts: all prompts of the run.
        call: the recipe's ``rollout.call``.

    Raises:
        UserError: a row has another ``height`` or ``width`` than the call.
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
        with user_code(f"prompts {name!r}"):
            made = function()
            # a generator is the user's code as well, until its end
            return list(made) if isinstance(made, Iterator) else made
    except UserError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise UserError(f"prompts {name!r} raised {told(error)}") from error


def _names_file(source: str) -> bool:
    return source not in PROMPTS and (":" not in source or os.path.isfile(source))


def _without_gaps(source: Any) -> Any:
    """Return the rows of a list as they are, those of a ``datasets.Dataset`` without None."""
    columns = getattr(source, "column_names", None)
    if isinstance(columns, dict):  # a DatasetDict
        raise UserError(
            f"prompts: {type(source).__name__} holds the splits {', '.join(map(repr, columns))}; "
            f"give one of them, such as dataset[{next(iter(columns), 'train')!r}]"
        )
    return source if columns is None else map(without_gaps, source)


def _row(row: Any, where: str, folder: Path = Path()) -> Prompt:
    """Return the prompt of a row, which is a dict, a text or a prompt already."""
    if isinstance(row, Prompt):
        return row
    if not isinstance(row, dict):
        row = {"prompt": row}
    if "prompt" not in row:
        keys = ", ".join(map(repr, row)) or "nothing"
        raise UserError(f"{where}: no 'prompt' in the row, only {keys}")
    text = row["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: 'prompt' must be a text that is not empty, got {text!r:.80}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(
            f"{where}: 'prompt' holds half a character, which no file can hold: {text!r:.80}"
        )
    files = {
        key: _picture(key, row[key], where, folder) for key in PICTURES if row.get(key) is not None
    }
    metadata = {key: value for key, value in row.items() if key != "prompt"}
    return Prompt(Caption(text, files) if files else text, {**metadata, **files}, where=where)


def _picture(key: str, given: Any, where: str, folder: Path) -> Any:
    """Return the absolute file of a picture, or the picture that a dataset holds."""
    if isinstance(given, Image.Image):
        return rgb(given, where).convert(PICTURES[key])
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
    size_of(file, f"{where}: {key!r}: {file}")
    return str(file)


def _from_rows(rows: Any, name: str = "") -> list[Prompt]:
    if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes, Mapping)):
        raise UserError(
            f"{name or 'prompts'}: {rows!r:.80} holds no rows; give texts or dicts with 'prompt'"
        )
    place = f"{name}, row" if name else "prompt row"
    return [_row(row, f"{place} {index}") for index, row in enumerate(rows)]


class PromptSampler:
    """A ``PromptSampler`` chooses the prompts of each iteration, in shuffled epochs.

    The choice depends on ``(seed, iteration)`` alone, so a run that goes on after a stop needs no
    state to see the prompts that it would have seen.

    Args:
        prompts: all prompts of the run.
        per_iteration: how many prompts (groups) an iteration takes.
        seed: seeds the shuffles; not negative.

    >>> sampler = PromptSampler(load_prompts(["a", "b", "c", "d"]), per_iteration=2, seed=0)
    >>> sorted(prompt.text for i in (0, 1) for prompt in sampler.at(i))
    ['a', 'b', 'c', 'd']
    """

    def __init__(self, prompts: Sequence[Prompt], per_iteration: int, seed: int) -> None:
        if not prompts:
            raise UserError("prompts: it is empty; at least one prompt is needed")
        self.prompts = prompts
        self.per_iteration = per_iteration
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def at(self, iteration: int) -> list[Prompt]:
        """Return the ``per_iteration`` prompts of an iteration, counted from 0."""
        first = iteration * self.per_iteration
        places = range(first, first + self.per_iteration)
        size = len(self.prompts)
        return [self.prompts[self._order(place // size)[place % size]] for place in places]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            # an iteration may reach into the next epoch; older orders are not needed again
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = random.permutation(len(self.prompts))
        return self._orders[epoch]
