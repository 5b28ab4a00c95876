"""All settings are frozen models; each wrong one gets one line that says how to put it right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dgpo.errors import UserError
from dgpo.secrets import masked


class _Clear(type(BaseModel)):
    """``DGPO(bta=3)`` raises the same clear error as a wrong recipe file.

    Only a direct call comes through here. Within a recipe pydantic validates the sections itself,
    and the recipe gathers the problems of all of them.
    """

    if not TYPE_CHECKING:  # type checkers shall see the fields

        def __call__(cls, *given: Any, **settings: Any) -> Any:
            try:
                return super().__call__(*given, **settings)
            except ValidationError as error:
                raise_problems(problems(error, key_tree(cls)), cls.__name__)
                raise


class Settings(BaseModel, metaclass=_Clear):
    """Settings are frozen, and refuse an unknown key, an infinite number or a NaN.

    Raises:
        UserError: names everything that is wrong: the keys, the values and what would work.

    >>> from dgpo.algorithms.dgpo import DGPO
    >>> DGPO(bta=3)
    Traceback (most recent call last):
    dgpo.errors.UserError: DGPO: unknown key bta (did you mean beta?)
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


_FOREIGN = {
    "lr": "learning_rate",
    "steps": "num_inference_steps sampling_steps num_steps",
    "guidance_scale": "cfg cfg_scale guidance",
    "scheduler": "sampler solver",
    "group_size": "num_generations num_image_per_prompt",
    "iterations": "epochs num_epochs max_steps",
    "micro_batch": "batch_size train_batch_size",
    "rank": "r lora_rank",
    "alpha": "lora_alpha",
    "targets": "target_modules",
    "max_grad_norm": "max_norm grad_clip",
    "warmup": "warmup_steps",
    "run.dir": "output_dir",
    "rewards": "reward reward_fn",
    "prompts.train": "dataset",
    "clip": "clip_range",
    "kl": "kl_weight kl_beta",
    "precision": "mixed_precision dtype",
}
SYNONYMS = {name: own for own, names in _FOREIGN.items() for name in names.split()}
"""The names that other trainers use for our keys; their spelling alone would not find ours."""


def key_tree(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every dotted key of a settings model and of the models inside it."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            part = getattr(part, "__origin__", part)  # the type inside an Annotated
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys += key_tree(part, f"{prefix}{name}.")
    return keys


def suggest_key(key: str, valid: Iterable[str]) -> str:
    """Return a hint such as `` (did you mean train.lr?)`` for an unknown key.

    Keys of the same section come first, then the same name in another section.

    >>> suggest_key("train.learning_rate", ["train.lr", "rollout.steps"])
    ' (did you mean train.lr?)'
    """
    valid = list(valid)
    parent, _, leaf = key.rpartition(".")
    prefix = parent + "." if parent else ""
    beside = {k.removeprefix(prefix): k for k in valid if k.startswith(prefix)}
    beside = {name: k for name, k in beside.items() if "." not in name}
    by_leaf: dict[str, str] = {}
    for k in valid:
        by_leaf.setdefault(k.rpartition(".")[2], k)
    other = SYNONYMS.get(leaf, leaf)
    found = beside.get(other) or by_leaf.get(other) or (other if other in valid else None)
    for names, cutoff in ((beside, 0.6), (by_leaf, 0.75)):
        close = difflib.get_close_matches(leaf, names, n=1, cutoff=cutoff)
        if found is None and close:
            found = names[close[0]]
    if found:
        return f" (did you mean {found}?)"
    return f" (keys there: {', '.join(sorted(beside))})" if beside else ""


def problems(error: ValidationError, valid: Iterable[str], prefix: str = "") -> list[str]:
    """Return one line for each problem that pydantic found.

    Args:
        error: what pydantic raised.
        valid: all dotted keys there are, from which the nearest one is suggested.
        prefix: stands before every key, such as ``"train."``.
    """
    lines: list[str] = []
    valid = list(valid)
    for one in error.errors(include_url=False):
        context = one.get("ctx", {})
        if one["type"] == "problems":
            lines += context["lines"]
            continue
        key = _key(prefix, one["loc"], valid)
        lines.append(_line(key, one["type"], one["msg"], one["input"], context, valid))
    return lines


def _key(prefix: str, place: Sequence[int | str], valid: Sequence[str]) -> str:
    """Return the dotted key of pydantic's location, without the parts that are no keys: the
    ``kind`` of a section, and ``<type>`` where several types are allowed."""
    parts: list[str] = []
    chosen = ""
    for part in place:
        above = prefix + ".".join(parts)
        if str(part).startswith("<"):
            continue
        if above != chosen and f"{above}.kind" in valid:
            chosen = above
        else:
            parts.append(str(part))
    return prefix + ".".join(parts)


def _line(
    key: str, kind: str, message: str, got: Any, context: Mapping[str, Any], valid: Iterable[str]
) -> str:
    if kind == "extra_forbidden":
        return f"unknown key {key}{suggest_key(key, valid)}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "value_error":
        message = str(context.get("error", message))
        return message if not key or key in message else f"{key}: {message}"
    # masked together with its name, by which a secret is known
    got = masked({key.rpartition(".")[2]: got}).popitem()[1]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} = {got!r:.80}: should hold keys and values"
    wanted = message.removeprefix("Input ").partition(", unable to parse")[0]
    wanted = wanted[:1].lower() + wanted[1:]
    return f"{key} = {got!r:.80}: {wanted}"


def raise_problems(lines: list[str], where: str) -> None:
    """Raise one :class:`UserError` with all lines; return if there is no line."""
    if len(lines) == 1:
        raise UserError(f"{where}: {lines[0]}")
    if lines:
        raise UserError(f"{where}: {len(lines)} problems\n" + "\n".join(f"  - {x}" for x in lines))
