"""An autoencoder whose weights have another precision than the rest of its pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dgpo.models.pipeline.probes import replaced


@contextmanager
def vae_in_its_precision(pipe: Any) -> Iterator[None]:
    """Inside the block the VAE is given tensors of its own precision.

    Some pipelines convert by themselves, others hand on what they have. Encodings come back in the
    precision of the picture; what is decoded stays as it is.
    """
    vae = getattr(pipe, "vae", None)
    # of the class: to answer, the property looks at the weights
    if not isinstance(vae, nn.Module) or not hasattr(type(vae), "dtype"):
        yield
        return
    own: Any = vae
    methods = {name: getattr(own, name) for name in ("encode", "decode") if hasattr(own, name)}

    def cast(value: Any) -> Any:
        return value.to(own.dtype) if _floating(value) else value

    def decode(*given: Any, **named: Any) -> Any:
        return methods["decode"](*map(cast, given), **{n: cast(v) for n, v in named.items()})

    def encode(*given: Any, **named: Any) -> Any:
        made = methods["encode"](*map(cast, given), **{n: cast(v) for n, v in named.items()})
        asked = [v.dtype for v in (*given, *named.values()) if _floating(v)]
        return made if not asked or asked[0] == own.dtype else _given_back(made, asked[0])

    # replaced on the instance: the pipeline calls them by name, wherever it does
    every = {"encode": encode, "decode": decode}
    with replaced(own, **{name: every[name] for name in methods}):
        yield


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _given_back(made: Any, dtype: torch.dtype) -> Any:
    """Return an encoding in another precision: a distribution to draw from, or the latents
    themselves."""
    spread = getattr(made, "latent_dist", None)
    if spread is not None:
        sample, mode = spread.sample, spread.mode
        spread.sample = lambda *given, **named: sample(*given, **named).to(dtype)
        spread.mode = lambda: mode().to(dtype)
    for name in ("latent", "latents"):
        if isinstance(value := getattr(made, name, None), Tensor):
            setattr(made, name, value.to(dtype))
    return made
