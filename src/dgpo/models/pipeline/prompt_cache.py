"""Prompt embeddings on disk: each prompt is encoded once in the life of a folder.

The name of a file is a hash of all that its embedding depends on: the weights of the text encoders,
the vocabularies, the versions of the libraries that run them, the arguments of ``encode_prompt``,
and the prompt. Another model or prompt has another file, so no file is ever stale.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dgpo.errors import UserError
from dgpo.models.weights.snapshots import base_fingerprints

Embedding = dict[str, Any]
"""Keyword arguments of a pipeline's call: tensors, lists of tensors, or None."""
_NOT_ENCODERS = ("transformer", "transformer_2", "unet", "vae", "vocoder")


class PromptCache:
    """A ``PromptCache`` keeps embeddings as safetensors files in a folder.

    Args:
        folder: made if it is missing; several runs and models may share it.
        pipe: its text encoders are fingerprinted now, before anything frees them.

    Raises:
        UserError: ``folder`` cannot be made.
    """

    def __init__(self, folder: str | Path, pipe: Any) -> None:
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"memory.prompt_cache = {str(folder)!r}: the folder cannot be made "
                f"({error.strerror})"
            ) from error
        self._model = encoder_fingerprint(pipe)

    def file(self, prompt: str, arguments: Mapping[str, Any]) -> Path:
        """Return the file that holds the embedding of a prompt, or would.

        Args:
            prompt: the text.
            arguments: all arguments of ``encode_prompt``.
        """
        known = {name: value for name, value in arguments.items() if name != "device"}
        key = json.dumps([self._model, prompt, known], sort_keys=True, default=repr)
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def load(self, file: Path) -> Embedding | None:
        """Return what :meth:`save` wrote, bit for bit, on the CPU; None if the file is missing or
        damaged."""
        try:
            with safe_open(str(file), "pt") as stored:
                layout = json.loads((stored.metadata() or {})["layout"])
                return {
                    name: None if parts is None else _unpacked(stored, name, parts)
                    for name, parts in layout.items()
                }
        except (OSError, SafetensorError, KeyError, ValueError):
            return None  # the prompt is encoded and written again

    def holds(self, file: Path) -> bool:
        """Return whether the file is there and whole, by its header and its length."""
        try:
            with safe_open(str(file), "pt") as stored:
                return "layout" in (stored.metadata() or {})
        except (OSError, SafetensorError):
            return False

    def save(self, file: Path, embedding: Embedding) -> None:
        """Write an embedding. A stop in between leaves no file of its name."""
        layout: dict[str, int | None] = {}
        tensors: dict[str, Tensor] = {}
        for name, value in embedding.items():
            parts = [value] if isinstance(value, Tensor) else value or []
            layout[name] = _WHOLE if isinstance(value, Tensor) else None
            if isinstance(value, list):
                layout[name] = len(value)
            tensors |= {f"{name}.{place}": part for place, part in enumerate(parts)}
        # cloned: the format refuses names that share memory, as two embeddings may
        plain = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        file.parent.mkdir(exist_ok=True)
        # under a name of this process until it is whole: several runs may write the same prompt
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")
        save_file(plain, unfinished, metadata={"layout": json.dumps(layout)})
        unfinished.replace(file)


_WHOLE = -1  # a single tensor, no list of them


def _unpacked(stored: Any, name: str, parts: int) -> Any:
    if parts == _WHOLE:
        return stored.get_tensor(f"{name}.0")
    return [stored.get_tensor(f"{name}.{place}") for place in range(parts)]


def encoder_fingerprint(pipe: Any) -> str:
    """Return a short text that is equal only for pipelines that encode prompts in the same way.

    It depends on the tokenizers, on the weights and precision of every network but the denoisers
    and the decoders, and on the versions of diffusers and transformers, whose code runs them.
    """
    parts = {n: c for n, c in pipe.components.items() if n not in _NOT_ENCODERS}
    networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    words = {
        name: [type(part).__name__, part.get_vocab(), part.model_max_length, part.padding_side]
        for name, part in parts.items()
        if hasattr(part, "get_vocab")
    }
    versions = [version("diffusers"), version("transformers")]
    facts = [type(pipe).__name__, base_fingerprints(networks), words, versions]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
