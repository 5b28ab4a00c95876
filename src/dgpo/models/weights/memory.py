"""Ways in which a pipeline needs less memory. None of them changes what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from dgpo.errors import UserError


class MemorySettings(Protocol):
    """``MemorySettings`` are what a recipe says about the memory of the pipeline."""

    gradient_checkpointing: bool
    vae_slicing: bool
    vae_tiling: bool


def save_memory(pipe: Any, denoisers: Mapping[str, nn.Module], settings: MemorySettings) -> None:
    """Switch on what the recipe's ``memory`` asks of the denoisers and the autoencoder.

    Raises:
        UserError: the denoiser or the autoencoder does not have it.
    """
    if settings.gradient_checkpointing:
        for name, denoiser in denoisers.items():
            if not getattr(denoiser, "_supports_gradient_checkpointing", False):
                raise UserError(
                    f"memory.gradient_checkpointing: {name} ({type(denoiser).__name__}) has none; "
                    "use false, and a smaller train.micro_batch"
                )
            denoiser.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    vae = getattr(pipe, "vae", None)
    for key in ("slicing", "tiling"):
        if not getattr(settings, f"vae_{key}"):
            continue
        try:
            getattr(vae, f"enable_{key}")()
        except (AttributeError, NotImplementedError) as error:  # no VAE, or one without the method
            raise UserError(
                f"memory.vae_{key}: {type(vae).__name__} of {type(pipe).__name__} has none; "
                "use false, and a smaller rollout.batch"
            ) from error


class FreedEncoder:
    """A ``FreedEncoder`` takes the place of a text encoder, and tells its precision and config."""

    def __init__(self, name: str, module: Any) -> None:
        self._name = name
        self.dtype: torch.dtype = module.dtype
        self.device: torch.device = module.device
        self.config: Any = module.config

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Refuse the call: the encoder is gone.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"memory.free_text_encoders: {self._name} is gone, and a prompt that was not encoded "
            "before is asked for; use false to keep it"
        )


def text_encoders(pipe: Any) -> dict[str, nn.Module]:
    """Return the networks of a pipeline that read text, by the name of their component."""
    return {
        name: module
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module) and name.startswith(("text_encoder", "language_model"))
    }


def free_text_encoders(pipe: Any) -> None:
    """Let go of the text encoders. Their memory is free once nobody else holds them."""
    for name, module in text_encoders(pipe).items():
        # past __setattr__: the pipeline's config still says which encoders it was made with
        vars(pipe)[name] = FreedEncoder(name, module)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TextEncoders:
    """``TextEncoders`` lie on the CPU, and are on the pipeline's device while they are asked.

    While they are away others stand in their place, so that the pipeline does not take the CPU for
    its device. Their weights do not change, so nothing is copied back.

    Args:
        pipe: the pipeline, with its text encoders on their device.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._encoders, self._here = pipe, text_encoders(pipe), True
        modules = self._encoders.values()
        every = [weight for m in modules for weight in (*m.parameters(), *m.buffers())]
        self._weights = [(weight, weight.device, weight.data.cpu()) for weight in every]
        self.send_away()

    def fetch(self) -> None:
        """Put them on their device, if they are away."""
        if not self._here:
            for weight, device, kept in self._weights:
                weight.data = kept.to(device)
            vars(self._pipe).update(self._encoders)
            self._here = True

    def send_away(self) -> None:
        """Leave them on the CPU alone, if they are here."""
        if self._here:
            free_text_encoders(self._pipe)
            for weight, _, kept in self._weights:
                weight.data = kept
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._here = False
