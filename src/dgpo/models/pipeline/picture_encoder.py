"""Clean samples of pictures that exist already, in the space in which the pipeline's loop works.

A pipeline scales, shifts, normalises and unpacks a rollout's clean sample in its own way before its
VAE decodes it. All of these steps move and scale single numbers: ``z_j = a_j x0_p(j) + b_j`` with a
permutation p. The pipeline is run on probes whose answers show a, b and p, and what its VAE makes
of a picture goes the same way back. No pipeline family is written out here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.byte_cache import ByteCache
from dgpo.models.pipeline.probes import mixed_in, replaced
from dgpo.pictures import open_picture

_STEPS = 2  # with one step Mochi's schedule is empty
_BASE = 16  # digits up to 15 survive half precision


class _Ending:
    """Mixed in before a scheduler's class; replaces the sample that a step returns."""

    end: Callable[[Tensor], Tensor]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().step(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(result, tuple):
            return (self.end(result[0]), *result[1:])
        result.prev_sample = self.end(result.prev_sample)
        return result


class PictureEncoder:
    """A ``PictureEncoder`` encodes pictures with the pipeline's own VAE.

    The latent is the mode of the VAE's distribution. Every picture is encoded alone, so that its
    latent depends on nothing else.

    Args:
        model: the pipeline, with the arguments of its call (height, width).
        prompt: any prompt to make the probes with; with a picture if the pipeline starts from one.
        cache_bytes: the memory that encoded pictures may take.

    Raises:
        UserError: the pipeline has no VAE that encodes pictures, makes videos, or decodes by more
            than scaling, shifting and moving numbers.
    """

    def __init__(self, model: PipelineModel, prompt: str, cache_bytes: int = 4 * 2**30) -> None:
        self._model, self._pipe = model, model.pipe
        self._name = type(model.pipe).__name__
        vae, processor = (getattr(model.pipe, n, None) for n in ("vae", "image_processor"))
        self._processor: Any = processor or getattr(model.pipe, "video_processor", None)
        if not hasattr(vae, "encode") or not hasattr(self._processor, "preprocess"):
            self._refuse("it has no VAE that encodes pictures")
        self._vae: Any = vae
        self._cond = model.encode([prompt], guidance=False)
        self._cache = ByteCache(cache_bytes)
        self._learn()

    def __call__(self, file: Path) -> Tensor:
        """Return the clean sample of a file, and remember it: float32, one row of ``x0``.

        Raises:
            UserError: the file cannot be read, or the pipeline's samples have another size.
        """
        return self._cache.remember(file, lambda: self.encode(open_picture(file), str(file)))

    @torch.no_grad()
    def encode(self, image: Image.Image, what: str = "the picture") -> Tensor:
        """Return the clean sample of a picture: float32, one row of ``x0``.

        Args:
            image: the picture.
            what: its name, for errors.

        Raises:
            UserError: the pipeline's samples have another size.
        """
        pixels = self._processor.preprocess(image, height=image.height, width=image.width)
        if pixels.shape[-2:] != (image.height, image.width):
            taken = f"{pixels.shape[-1]} x {pixels.shape[-2]}"
            raise UserError(
                f"{what} is {image.width} x {image.height} pixels, and {self._name} takes only "
                f"{taken} of them: give pictures of a size that it makes itself"
            )
        z = self._latent(pixels)
        if z.shape != self._shape:
            raise UserError(
                f"{what} is {image.width} x {image.height} pixels, and {self._name} makes "
                "pictures of another size here: set rollout.call.height and width to the "
                f"pictures' (latents {tuple(z.shape[1:])}, not {tuple(self._shape[1:])})"
            )
        return self._back(z)[0]

    def _latent(self, pixels: Tensor) -> Tensor:
        vae, dtype = self._vae, self._vae.dtype
        # SDXL's VAE overflows in half precision, and its config says so
        widened = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
        if widened:
            vae.to(torch.float32)
        try:
            given = pixels.to(vae.device, torch.float32 if widened else dtype)
            given = given.unsqueeze(2) if len(self._shape) == 5 else given
            made = vae.encode(given)
        finally:
            if widened:
                vae.to(dtype)  # rollouts decode in the pipeline's own precision
        if hasattr(made, "latent_dist"):
            return made.latent_dist.mode()
        return made.latent if hasattr(made, "latent") else made.latents

    def _learn(self) -> None:
        """Find a, b and p, and prove them on random numbers."""
        ends: list[Tensor] = []

        def nothing(x: Tensor) -> Tensor:
            ends.append(x)
            return torch.zeros_like(x)

        shift = self._decoded(nothing)
        self._shape, self._x0_shape = shift.shape, ends[-1].shape
        count = ends[-1].numel()
        if len(shift.shape) == 5 and shift.shape[2] > 1:
            self._refuse("it makes videos, and the groups hold pictures")
        if shift.numel() != count:
            self._refuse(f"its VAE is given {shift.numel()} numbers of the {count} of a sample")
        # two answers give a and b: for x0 = 0 and for x0 = 1
        self._shift = shift.flatten()
        self._scale = self._decoded(torch.ones_like).flatten() - self._shift
        if not bool((self._scale.abs() > 1e-8).all()):
            self._refuse("some of the numbers its VAE is given do not depend on the sample")
        self._place = self._places(count)
        self._prove()

    def _places(self, count: int) -> Tensor:
        """p: the place in the sample of each number that the VAE is given.

        Each probe asks for one digit of all places at once.
        """
        order = torch.arange(count, device=self._shift.device)
        place, weight = torch.zeros_like(order), 1
        while weight < count:
            digits = (order // weight % _BASE).float()
            found = self._decoded(lambda x, d=digits: d.reshape(x.shape).to(x)).flatten()
            place += weight * ((found - self._shift) / self._scale).round().long()
            weight *= _BASE
        if not torch.equal(place.sort().values, order):
            self._refuse("its VAE is not given each number of a sample once")
        return place

    def _prove(self) -> None:
        drawn: list[Tensor] = []

        def random(x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
            drawn.append(noise.to(x))
            return drawn[-1]

        back = self._back(self._decoded(random).reshape(self._shape))
        far = float((back - drawn[-1].float()).abs().max() / drawn[-1].abs().max())
        if not far <= (1e-4 if drawn[-1].dtype.itemsize >= 4 else 5e-2):
            self._refuse(f"its decoding is more than scaling and moving numbers (by {far:.1e})")

    def _back(self, z: Tensor) -> Tensor:
        flat = (z.flatten().float() - self._shift) / self._scale
        return torch.empty_like(flat).scatter_(0, self._place, flat).reshape(self._x0_shape)

    @torch.no_grad()
    def _decoded(self, end: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what the pipeline hands to its VAE, in float32, if its loop ends with ``end``."""
        seen: list[Tensor] = []
        decode = self._vae.decode
        names = list(inspect.signature(decode).parameters)

        def listening(*args: Any, **kwargs: Any) -> Any:
            seen.append(args[0] if args else kwargs[names[0]])
            return decode(*args, **kwargs)

        # the whole pipeline runs, since what it does after its loop is what is asked for
        scheduler = mixed_in(_Ending, self._pipe.scheduler)
        scheduler.end = end
        with replaced(self._vae, decode=listening):
            self._model.rollout(
                self._cond,
                steps=_STEPS,
                scheduler=scheduler,
                generators=[torch.Generator().manual_seed(0)],
            )
        if len(seen) != 1:
            self._refuse(f"it decodes a picture by {len(seen)} calls of its VAE")
        return seen[0].float()

    def _refuse(self, why: str) -> None:
        raise UserError(f"data.preferences: {self._name} cannot train on given pictures: {why}")
