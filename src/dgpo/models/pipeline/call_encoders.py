"""Prompts of pipelines whose ``encode_prompt`` cannot be asked on its own.

There are two kinds. In the first the text encoder looks at the picture as the call has prepared it
(Qwen-Image-Edit). In the second every call is given the text: it takes no embeddings (ACE-Step),
projects them again (Stable Audio), or has them in another layout than a row for each prompt
(HiDream, Kandinsky 5). What ``encode_prompt`` of the second kind returns is remembered, so that its
encoders run once for a batch.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dgpo.errors import UserError
from dgpo.models.pipeline.arguments import fixed_arguments, no_picture, parameters_of
from dgpo.models.pipeline.byte_cache import ByteCache
from dgpo.models.pipeline.families import family_of
from dgpo.models.pipeline.probes import Evaluated, replaced
from dgpo.models.pipeline.prompt_cache import Embedding, PromptCache
from dgpo.models.pipeline.prompt_encoder import Conditioning, PromptEncoder, returned_names
from dgpo.prompts.caption import pictures_of


def encoder_of(pipe: Any, call: Mapping[str, Any], disk: PromptCache | None) -> Any:
    """Return the encoder that turns the prompts of this pipeline into conditioning."""
    if encodes_itself(pipe):
        return PromptGiver(pipe, call)
    if "image" in inspect.signature(type(pipe).encode_prompt).parameters:
        return PicturePromptEncoder(pipe, call, disk=disk)
    return PromptEncoder(pipe, call, disk=disk)


def check_text_is_given_once(pipe: Any, setting: str) -> None:
    """Refuse a pipeline whose calls need its text encoders, if a setting of ``memory`` is on.

    Raises:
        UserError: it encodes the text at every call.
    """
    if encodes_itself(pipe):
        raise UserError(
            f"memory.{setting}: {type(pipe).__name__} is given the text at every call "
            "and needs its text encoders; use false"
        )


def encodes_itself(pipe: Any) -> bool:
    """Return whether every call of the pipeline is given the text.

    It is not where ``encode_prompt`` returns ``prompt_embeds``, and the call takes them and the
    masks of text that come with them.
    """
    family, taken = family_of(pipe), parameters_of(pipe)
    if family.encodes_itself:
        return True
    try:
        names = family.encode_names or returned_names(type(pipe).encode_prompt)
    except UserError:  # what has no name cannot be handed back, while the text always can
        return True
    masks = [name for name in names if name.startswith("prompt") and name.endswith("_mask")]
    return not {"prompt_embeds", *masks} <= set(names) & set(taken)


def remembered_encoding(pipe: Any, cache_bytes: int = 2**30) -> dict[str, Any]:
    """Return an ``encode_prompt`` that remembers its answers, for a pipeline that is given the
    text.

    Args:
        pipe: the pipeline.
        cache_bytes: the memory that answers may take.

    Returns:
        The attribute to replace while the pipeline is called; none for other pipelines.
    """
    if not encodes_itself(pipe):
        return {}
    own, known = pipe.encode_prompt, ByteCache(cache_bytes)

    @functools.wraps(own)
    def encode_prompt(*given: Any, **named: Any) -> Any:
        if not _is_plain([*given, *named.values()]):
            return own(*given, **named)
        with torch.no_grad():  # no text encoder is trained
            key = repr((given, sorted(named.items())))
            return known.remember(key, lambda: own(*given, **named))

    return {"encode_prompt": encode_prompt}


def _is_plain(value: Any) -> bool:
    """Return whether ``repr`` tells such values apart, as it does not for tensors and pictures."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, torch.device, torch.dtype))


class PromptGiver:
    """A ``PromptGiver`` hands the texts themselves to the pipeline, whose call encodes them."""

    disk = None

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        self._call = {"negative_prompt": family_of(pipe).negative_text, **call}
        self._parameters = parameters_of(pipe)
        self.parameters = inspect.signature(type(pipe).encode_prompt).parameters
        # other texts, such as lyrics: ACE-Step wants one for each row
        self._texts = [
            name
            for name, parameter in self._parameters.items()
            if name in self.parameters
            and not name.endswith("prompt")
            and "list[str]" in str(parameter.annotation).lower()
        ]

    def encode(self, prompts: Sequence[str], guidance: bool) -> Conditioning:
        """Return the texts of ``prompts``, one row each, and the negative prompt beside each.

        Raises:
            UserError: there are no prompts.
        """
        if not prompts:
            raise UserError("no prompts to encode")
        given: dict[str, Any] = {"prompt": [str(prompt) for prompt in prompts]}
        for name in self._texts:
            text = self._call.get(name, self._parameters[name].default)
            if isinstance(text, str):
                given[name] = [text] * len(prompts)
        if guidance and "negative_prompt" in self._parameters:
            # given None, most of them use an unconditional embedding of their own
            negative = self._call["negative_prompt"]
            given["negative_prompt"] = None if negative is None else [negative] * len(prompts)
        return Conditioning(given, len(prompts))

    def prefetch(self, prompts: Sequence[str]) -> None:
        """Do nothing: there are no embeddings."""


class PicturePromptEncoder(PromptEncoder):
    """A ``PicturePromptEncoder`` encodes a prompt together with its picture.

    It calls the pipeline and leaves the call when both are encoded.
    """

    def key(self, prompt: str) -> str:
        digest = hashlib.sha256(str(prompt).encode())
        for name, picture in pictures_of(prompt).items():
            digest.update(f"{name} {picture.mode} {picture.size} ".encode() + picture.tobytes())
        return digest.hexdigest()

    def _row(self, prompt: str, guidance: bool) -> Embedding:
        both = self._positive(prompt)
        return {k: v for k, v in both.items() if guidance or not k.startswith("negative_")}

    def _arguments(self, prompt: Any, guidance: bool) -> dict[str, Any]:
        return {"negative_prompt": "", **self._call}

    @torch.no_grad()
    def _run(self, prompt: Any, guidance: bool) -> Embedding:
        pictures = pictures_of(prompt)
        if "image" not in pictures:
            raise no_picture(self._pipe)
        # the pipeline prepares the picture for its encoder itself, so its call is made that far
        own, returned = self._pipe.encode_prompt, []

        def listening(*given: Any, **named: Any) -> Any:
            returned.append(own(*given, **named))
            return returned[-1]

        def leave(*given: Any, **named: Any) -> Any:
            raise Evaluated

        arguments = {
            **fixed_arguments(self._pipe, self._call),
            "image": pictures["image"],
            "prompt": str(prompt),
            "negative_prompt": self._call.get("negative_prompt") or "",
        }
        try:
            with replaced(self._pipe, encode_prompt=listening, prepare_latents=leave):
                self._pipe(**arguments, output_type="latent")
        except Evaluated:
            pass
        positive, *others = map(self._named, returned)
        negative = {f"negative_{k}": v for k, v in (others[0] if others else {}).items()}
        return {k: v for k, v in {**positive, **negative}.items() if k in self._call_parameters}
