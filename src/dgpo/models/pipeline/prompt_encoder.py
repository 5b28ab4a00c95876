"""Prompt embeddings: the pipeline's own ``encode_prompt`` encodes each distinct prompt once.

The names of what ``encode_prompt`` returns are read from its return statement. Those that the
pipeline's call takes become keyword arguments of the call. No pipeline family is written out here.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgpo.errors import UserError
from dgpo.models.pipeline.arguments import parameters_of
from dgpo.models.pipeline.byte_cache import ByteCache
from dgpo.models.pipeline.families import family_of
from dgpo.models.pipeline.prompt_cache import Embedding, PromptCache
from dgpo.models.weights.memory import TextEncoders

CACHE_BYTES = 4 * 2**30
"""The memory that embeddings may take, on the CPU."""
_NEGATIVE = "negative_"
_WHICH = "text_encoder_index"


class Ragged(list[Tensor]):
    """``Ragged`` rows, ``[1, L, ...]`` each, differ in length and cannot be padded.

    The pipeline takes no mask for them, so a call is given rows of one length
    (:mod:`dgpo.models.pipeline.row_groups`).
    """


@dataclass(frozen=True)
class Conditioning:
    """``Conditioning`` is what the pipeline is told about ``size`` pictures.

    Args:
        kwargs: keyword arguments of its call: tensors with one row a picture, lists with one entry
            a picture, or None; :class:`Ragged` where lengths differ and there is no mask.
        size: the number of pictures.
    """

    kwargs: Mapping[str, Any]
    size: int

    @property
    def guided(self) -> bool:
        """Return whether it holds the embeddings of the negative prompt, which guidance needs."""
        return any(name.startswith(_NEGATIVE) for name in self.kwargs)

    @property
    def ragged(self) -> bool:
        """Return whether prompts of different length need calls of their own."""
        return any(isinstance(value, Ragged) for value in self.kwargs.values())

    def rows(self, index: Tensor) -> Conditioning:
        """Return the conditioning of some pictures, in the order of ``index`` (integers, [n])."""
        chosen = index.tolist()
        taken = {name: _take(value, index, chosen) for name, value in self.kwargs.items()}
        return Conditioning(taken, len(chosen))

    def repeat(self, times: int) -> Conditioning:
        """Return every row ``times`` times in succession: members of a group stay together."""
        return self.rows(torch.arange(self.size).repeat_interleave(times))

    def to(self, device: torch.device | str) -> Conditioning:
        """Return the same on a device."""
        moved = {name: _moved(value, device) for name, value in self.kwargs.items()}
        return Conditioning(moved, self.size)

    def call_kwargs(self, guidance: bool) -> dict[str, Any]:
        """Return keyword arguments for one call; the negative prompt only where it is used."""
        if guidance:
            return dict(self.kwargs)
        return {k: v for k, v in self.kwargs.items() if not k.startswith(_NEGATIVE)}


def _moved(value: Any, device: torch.device | str) -> Any:
    """Return tensors and lists of them on a device; without numbers (dgpo plan) they stay."""
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to(device)
    if isinstance(value, list):
        return type(value)(_moved(one, device) for one in value)
    return value


def _take(value: Any, index: Tensor, chosen: list[int]) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, index.to(value.device))
    if isinstance(value, Ragged):
        return _together([value[row] for row in chosen]) if chosen else value[0][:0]
    if isinstance(value, list):
        return [value[row] for row in chosen]
    return value


def _together(rows: Sequence[Tensor]) -> Tensor | Ragged:
    """Return rows [1, L, ...] as one tensor if they have one length."""
    alike = all(row.shape == rows[0].shape for row in rows)
    return torch.cat(list(rows)) if alike else Ragged(rows)


class PromptEncoder:
    """A ``PromptEncoder`` encodes prompts through the pipeline and remembers them on the CPU.

    The denoiser's device holds those of the pictures that are being made alone.

    Args:
        pipe: a diffusers pipeline.
        call: the user's extra arguments of the pipeline's call. Those that ``encode_prompt`` takes
            reach it too (``max_sequence_length``, ``clip_skip``, ``negative_prompt`` ...).
        cache_bytes: the memory that embeddings may take.
        disk: keeps embeddings in files as well; None for memory only.
    """

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        cache_bytes: int = CACHE_BYTES,
        disk: PromptCache | None = None,
    ) -> None:
        self._pipe = pipe
        self.disk = disk
        self._call = dict(call)
        self._cache = ByteCache(cache_bytes)
        self._negative: Embedding | None = None
        self.offloaded: TextEncoders | None = None
        """The text encoders, if they are on their device only while they are asked."""
        self._reader = ThreadPoolExecutor(1, "prompts")
        self._coming: dict[Path, Future[Embedding | None]] = {}
        self._call_parameters = parameters_of(pipe)
        self.parameters = inspect.signature(type(pipe).encode_prompt).parameters
        self._names = family_of(pipe).encode_names or returned_names(type(pipe).encode_prompt)

    def encode(self, prompts: Sequence[str], guidance: bool) -> Conditioning:
        """Return the conditioning of ``prompts``, one row each; equal prompts share one encoding.

        Raises:
            UserError: there are no prompts.
        """
        if not prompts:
            raise UserError("no prompts to encode")
        # one by one, not as a batch: padding beside a longer prompt may change an embedding's bits
        keys = [self.key(prompt) for prompt in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        try:
            rows = [self._row(prompt, guidance) for prompt in distinct.values()]
        finally:
            if self.offloaded is not None:
                self.offloaded.send_away()
        position = {key: row for row, key in enumerate(distinct)}
        index = torch.tensor([position[key] for key in keys])
        return Conditioning(_join(rows), len(rows)).to(self._pipe.device).rows(index)

    def prefetch(self, prompts: Sequence[str]) -> None:
        """Read the files of prompts that will be asked for next, while the caller goes on."""
        if self.disk is None:
            return
        missing = [prompt for prompt in prompts if self.key(prompt) not in self._cache]
        files = {self.file(prompt) for prompt in missing}
        self._coming = {file: self._reader.submit(self.disk.load, file) for file in files}

    def file(self, prompt: str, guidance: bool = False) -> Path:
        """Return the file of a prompt in the prompt cache, which there must be."""
        assert self.disk is not None
        return self.disk.file(self.key(prompt), self._arguments(prompt, guidance))

    def key(self, prompt: str) -> str:
        """Return a text that is equal for prompts with equal embeddings."""
        return str(prompt)

    def _row(self, prompt: str, guidance: bool) -> Embedding:
        """Return the embedding of one prompt; with ``guidance`` the negative prompt's as well."""
        return {**self._positive(prompt), **(self.negative() if guidance else {})}

    def _positive(self, prompt: str) -> Embedding:
        return self._cache.remember(self.key(prompt), lambda: self._made(prompt, guidance=False))

    def negative(self) -> Embedding:
        """Return the negative prompt as the pipeline encodes it: some zero it, some mask it."""
        if self._negative is None:
            found: Embedding = {}
            if "do_classifier_free_guidance" in self.parameters:
                both = self._made("", guidance=True)
                found = {k: v for k, v in both.items() if k.startswith(_NEGATIVE)}
            if not found:
                plain = self._made(self._call.get("negative_prompt") or "", guidance=False)
                found = {_NEGATIVE + k: v for k, v in plain.items()}
            self._negative = {k: v for k, v in found.items() if k in self._call_parameters}
        return self._negative

    def _made(self, prompt: str, guidance: bool) -> Embedding:
        """Return an embedding from the disk; or a new one, which is written there."""
        if self.disk is None:
            return self.encoded(prompt, guidance)
        file = self.file(prompt, guidance)
        coming = self._coming.pop(file, None)
        found = self.disk.load(file) if coming is None else coming.result()
        if found is None:
            found = self.encoded(prompt, guidance)
            self.disk.save(file, found)
        return found

    def encoded(self, prompt: Any, guidance: bool = False) -> Embedding:
        """Return the embedding of a prompt, or of a list of them together, made now."""
        if self.offloaded is not None:
            self.offloaded.fetch()
        return {name: _moved(v, "cpu") for name, v in self._run(prompt, guidance).items()}

    def _arguments(self, prompt: Any, guidance: bool) -> dict[str, Any]:
        """Return the keyword arguments of ``encode_prompt`` for a prompt or several."""
        arguments: dict[str, Any] = {}
        for name in self.parameters:
            if name in ("self", "kwargs", "dtype", "prompt_embeds") or name.endswith("_embeds"):
                continue
            if name in ("prompt", "prompt_2", "prompt_3"):
                arguments[name] = prompt
            elif name == "device":
                arguments[name] = self._pipe.device
            elif name.startswith("num_") and name.endswith("_per_prompt"):
                arguments[name] = 1
            elif name == "do_classifier_free_guidance":
                arguments[name] = guidance
            elif name in self._call:
                arguments[name] = self._call[name]
            elif name in self._call_parameters:
                # the default of the call, not of encode_prompt: they differ in some pipelines
                arguments[name] = self._call_parameters[name].default
        return arguments

    @torch.no_grad()
    def _run(self, prompt: Any, guidance: bool) -> Embedding:
        arguments = self._arguments(prompt, guidance)
        named = self._named(self._pipe.encode_prompt(**arguments))
        if _WHICH in self.parameters:
            # the encoders are asked one by one; the call's names for the second end in _2
            second = self._named(self._pipe.encode_prompt(**{**arguments, _WHICH: 1}))
            named |= {f"{name}_2": value for name, value in second.items()}
        return {
            k: v
            for k, v in named.items()
            if k in self._call_parameters and (guidance or not k.startswith(_NEGATIVE))
            if v is not None or k.endswith("_mask")
        }

    def _named(self, returned: Any) -> Embedding:
        # strict: a source that was read wrongly must not shift the names
        values = returned if isinstance(returned, tuple) else (returned,)
        return dict(zip(self._names, values, strict=True))


def returned_names(function: Any) -> tuple[str, ...]:
    """Return the names in the last return statement of a function such as ``encode_prompt``.

    Raises:
        UserError: the source cannot be read, or something else than names is returned.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError) as error:
        raise UserError(f"cannot read the source of {function.__qualname__}") from error
    returns = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return) and n.value is not None]
    last = max(returns, key=lambda node: node.lineno, default=None)
    elements = last.elts if isinstance(last, ast.Tuple) else [last]
    names = tuple(e.id for e in map(_plain, elements) if isinstance(e, ast.Name))
    if len(names) != len(elements):
        raise UserError(f"{function.__qualname__} does not return plain names")
    return names


def _plain(node: ast.expr | None) -> ast.expr | None:
    """Return what is returned, without its condition (``x if y else None``) or device
    (``x.to(y)``)."""
    if isinstance(node, ast.IfExp):
        return _plain(node.body)
    match node:
        case ast.Call(func=ast.Attribute(value=moved, attr="to")):
            return _plain(moved)
    return node


def _join(rows: list[Embedding]) -> dict[str, Any]:
    """Return rows of one prompt each as keyword arguments for all of them, padded to the longest
    where a mask says what is padding."""
    joined: dict[str, Any] = {}
    masked = {_masked_by(name, row) for row in rows for name in row if name.endswith("_mask")}
    for name in {key: None for row in rows for key in row}:
        values = [row[name] for row in rows]
        if isinstance(values[0], list):
            joined[name] = [entry for value in values for entry in value]
        elif name.endswith("_mask"):
            joined[name] = _join_masks(values, [row[_masked_by(name, row)] for row in rows])
        else:
            joined[name] = _together(_padded(values) if name in masked else values)
    return joined


def _masked_by(mask: str, row: Embedding) -> str:
    """Return the name of the embedding that a mask belongs to.

    ``prompt_embeds_mask``, ``prompt_attention_mask`` and a bare ``attention_mask`` all belong to
    ``prompt_embeds``.
    """
    stem = mask.removesuffix("_mask").removesuffix("attention").removesuffix("_")
    return next(n for n in (stem, f"{stem}_embeds", "prompt_embeds") if n in row)


def _join_masks(masks: list[Tensor | None], embeddings: list[Tensor]) -> Tensor | None:
    longest = max(e.shape[1] for e in embeddings)
    # no mask was given, and none is needed: no row is padded
    if all(m is None for m in masks) and all(e.shape[1] == longest for e in embeddings):
        return None
    given = [m for m in masks if m is not None]
    if len({m.shape for m in given}) == 1 and len(given) == len(masks):
        return torch.cat(given)  # AuraFlow's masks are as wide as its embeddings, not one a token
    filled = [
        m if m is not None else torch.ones(e.shape[:2], dtype=torch.long, device=e.device)
        for m, e in zip(masks, embeddings, strict=True)
    ]
    return torch.cat([_pad(m, longest) for m in filled])


def _padded(values: list[Tensor]) -> list[Tensor]:
    if all(value.shape == values[0].shape for value in values):
        return values
    return [_pad(value, max(v.shape[1] for v in values)) for value in values]


def _pad(value: Tensor, length: int) -> Tensor:
    missing = value.new_zeros((value.shape[0], length - value.shape[1], *value.shape[2:]))
    return torch.cat([value, missing], dim=1)
