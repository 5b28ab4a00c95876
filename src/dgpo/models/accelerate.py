"""Rollouts that are faster and inexact, while every other pass of the model stays exact.

A loss on noised samples asks what a picture is worth, and not how likely it was. So it can train on
pictures that the policy's own sampler would have made a little differently. What is changed for a
rollout is gone after it, also after an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol

import diffusers
import torch
from diffusers import hooks
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor, nn

from dgpo.errors import UserError, told
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.policy import Policy, RollingWeights
from dgpo.models.weights.compute import compile_denoisers, repeated_blocks
from dgpo.models.weights.restoring import restoring

Cache = Literal["first_block", "taylorseer", "fastercache"]
RolloutPrecision = Literal["merged", "int8", "fp8"]
_KEY = "rollout.accelerate"
_CACHES: dict[Cache, tuple[str, Callable[..., None]]] = {
    "first_block": ("FirstBlockCacheConfig", hooks.apply_first_block_cache),
    "taylorseer": ("TaylorSeerCacheConfig", hooks.apply_taylorseer_cache),
    "fastercache": ("FasterCacheConfig", hooks.apply_faster_cache),
}
_HOOKED = ("forward", "_diffusers_hook")
"""What diffusers sets on a module that it hooks."""
_MULTIPLE = 16
"""Products of 8-bit numbers on a GPU take matrices whose sides are multiples of this."""
_FEWEST_ROWS = 32
"""They take more than 16 rows."""


class AccelerateSettings(Protocol):
    """``AccelerateSettings`` are what a recipe says about inexact rollouts."""

    steps: int | None
    """The number of sampling steps; None for that of exact rollouts."""
    cache: Cache | None
    """What diffusers keeps from one step for the next; None for nothing."""
    cache_options: dict[str, Any]
    """Fields of the cache's configuration in diffusers."""
    precision: RolloutPrecision | None
    """How the denoiser's products are rounded; None for as in training."""
    compile: bool
    """The denoiser's blocks are compiled."""


class Accelerated:
    """An ``Accelerated`` policy samples inexactly inside :meth:`rolling`, and only there.

    Args:
        policy: makes the pictures; its denoisers are whole and on the device where they stay.
        settings: what is inexact.

    Raises:
        UserError: this machine or this model cannot do it, with what would work.
    """

    def __init__(self, policy: Policy, settings: AccelerateSettings) -> None:
        self.model, self._policy, self._settings = policy.model, policy, settings
        self._denoisers = list(policy.model.denoisers.values())
        self._compiled: list[tuple[Any, Any]] = []
        if settings.precision is not None:
            self._check_precision(settings.precision)
        if settings.cache is not None:
            self._cache()
        if settings.compile:
            compile_denoisers(policy.model.denoisers, "blocks", f"{_KEY}.compile")
            blocks: list[Any] = [b for d in self._denoisers for b in repeated_blocks(d)]
            self._compiled = [(block, block._compiled_call_impl) for block in blocks]
            self._hold_compiled(False)

    @contextmanager
    def rolling(self, weights: RollingWeights = "policy") -> Iterator[None]:
        """Put weights in place for inexact rollouts; all is back, bit for bit, after the block.

        Raises:
            ValueError: there are no weights of that name.
        """
        own, model = self._settings, self.model
        with ExitStack() as stack:
            stack.enter_context(self._policy.rolling(weights, merge=own.precision is not None))
            if own.precision in _ROUNDED:
                stack.enter_context(_rounded(self._layers(), _ROUNDED[own.precision]))
            if self._compiled:
                stack.enter_context(restoring(lambda: self._hold_compiled(False)))
                self._hold_compiled(True)
            if own.cache is not None:
                before = model.sampling
                stack.enter_context(restoring(lambda: setattr(model, "sampling", before)))
                model.sampling = self._caching
            yield

    def trial(self, sample: Callable[[], Rollout]) -> None:
        """Sample once, so that what cannot work ends the run at its start.

        Args:
            sample: makes a rollout by :attr:`model`, and records its steps.

        Raises:
            UserError: the model cannot be sampled with these settings.
        """
        calls: list[int] = []
        hooked = [d.register_forward_pre_hook(lambda *_: calls.append(1)) for d in self._denoisers]
        try:
            with self.rolling():
                made = sample()
        except UserError:
            raise
        except Exception as error:  # whatever code for other models leads to
            failed = f"{self._kinds} failed with it: {told(error)}"
            raise UserError(f"{self._said()}: {failed}; use null") from error
        finally:
            for hook in hooked:
                hook.remove()
        # some caches do not tell the two halves of a guided step apart
        mixes = self._settings.cache == "fastercache" or not all(
            hasattr(denoiser, "cache_context") for denoiser in self._denoisers
        )
        if self._settings.cache is not None and mixes and len(calls) >= 2 * len(made.steps) > 2:
            raise UserError(
                f"{self._said()}: the pipeline asks {self._kinds} {len(calls)} times in "
                f"{len(made.steps)} steps, which this cache would mix; use rollout.guidance_scale: "
                "1, another cache, or null"
            )

    @property
    def _kinds(self) -> str:
        return ", ".join(type(denoiser).__name__ for denoiser in self._denoisers)

    def _said(self) -> str:
        """Return the settings that are on."""
        names = ("cache", "precision", "compile", "steps")
        said = {name: getattr(self._settings, name) for name in names}
        return f"{_KEY}: " + ", ".join(f"{k} = {value!r}" for k, value in said.items() if value)

    def _hold_compiled(self, on: bool) -> None:
        for block, compiled in self._compiled:
            block._compiled_call_impl = compiled if on else None

    # the rounding of products

    def _layers(self) -> list[nn.Linear]:
        """Return the linear layers of the repeated blocks that 8-bit products can serve."""
        return [
            layer
            for denoiser in self._denoisers
            for block in repeated_blocks(denoiser)
            for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear) and "lora_" not in name
            if layer.in_features % _MULTIPLE == 0 == layer.out_features % _MULTIPLE
        ]

    def _check_precision(self, precision: RolloutPrecision) -> None:
        key, passes = f"{_KEY}.precision = {precision!r}", self._policy.passes
        if precision == "merged":
            if not passes.layers:
                raise UserError(f"{key}: lora: null leaves nothing to merge; use int8, or null")
            if passes.merges:
                raise UserError(
                    f"{key}: rollouts merge a LoRA into float32 weights anyway, exactly; use null"
                )
            return
        device = self.model.device
        if precision == "fp8" and not (
            device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
        ):
            raise UserError(
                f"{key}: products of 8-bit floats need an NVIDIA GPU from Ada (8.9) on, and the "
                f"denoiser is on {device.type}; use int8, or null"
            )
        layers = self._layers()
        if not layers or any(type(layer.weight.data) is not Tensor for layer in layers):
            raise UserError(
                f"{key}: the repeated blocks of {self._kinds} have no plain linear layers of "
                f"multiples of {_MULTIPLE}; use null"
            )

    # caches

    def _cache(self) -> tuple[Callable[..., None], Any]:
        """Return how diffusers applies the cache, and its configuration."""
        cache, given = self._settings.cache, dict(self._settings.cache_options)
        assert cache is not None
        name, apply = _CACHES[cache]
        pipe, weights = self.model.pipe, next(self._denoisers[0].parameters())
        own: dict[str, Any] = {}
        if cache == "taylorseer":
            own = {"taylor_factors_dtype": weights.dtype}
        elif cache == "fastercache":
            logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)

            def timestep() -> float:
                scheduler = pipe.scheduler  # the rollout's own
                return float(scheduler.timesteps[scheduler.step_index or 0])

            # of the guided and the unguided half alike: the attention alone is kept
            own = {
                "is_guidance_distilled": True,
                "current_timestep_callback": timestep,
                "attention_weight_callback": lambda _: 0.5,
            }
        try:
            return apply, getattr(diffusers, name)(**own, **given)
        except TypeError as error:
            raise UserError(
                f"{_KEY}.cache_options = {given!r:.80}: {error}; use fields of diffusers.{name}"
            ) from error

    @contextmanager
    def _caching(self) -> Iterator[None]:
        """Hook the denoisers for one call of the pipeline: a cache of other rows is of no use."""
        modules = [module for denoiser in self._denoisers for module in denoiser.modules()]
        before = [{k: vars(m)[k] for k in _HOOKED if k in vars(m)} for m in modules]

        def restore() -> None:
            for module, kept in zip(modules, before, strict=True):
                for key in _HOOKED:
                    vars(module).pop(key, None)
                vars(module).update(kept)

        apply, config = self._cache()
        with restoring(restore):
            for module in modules:
                vars(module).pop("_diffusers_hook", None)  # hooks of others stay as they are
            for denoiser in self._denoisers:
                apply(denoiser, config)
                _set_cache_context(denoiser, CacheContext("rollout"))
            if not any("_diffusers_hook" in vars(m) and m not in self._denoisers for m in modules):
                raise UserError(f"{self._said()}: it finds nothing in {self._kinds}; use null")
            yield


@contextmanager
def _rounded(layers: list[nn.Linear], prepare: Callable[..., Any]) -> Iterator[None]:
    """Inside the block layers multiply by weights in 8 bits, rounded from those in place now."""
    before = [vars(layer).get("forward") for layer in layers]

    def restore() -> None:
        for layer, forward in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward

    with torch.no_grad(), restoring(restore):
        for layer in layers:
            vars(layer)["forward"] = prepare(layer)
        yield


def _scaled(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Return rows divided by their scales, so that the largest number of each is ``most``, and the
    scales, float32 [rows, 1]. A row's scale is its own: it does not depend on the batch."""
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / most
    return wide / scale, scale


def _in_rows(layer: nn.Linear, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the layer's forward pass, whose product is of float32 rows."""

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        missing = max(0, _FEWEST_ROWS - len(rows))
        made = product(nn.functional.pad(rows, (0, 0, 0, missing)))[: len(rows)]
        if layer.bias is not None:
            made = made + layer.bias
        return made.to(x.dtype).reshape(*x.shape[:-1], layer.out_features)

    return forward


def _int8(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Round weights by output and inputs by row to 8-bit integers, whose products are exact (W8A8;
    arXiv 2208.07339, without outliers)."""
    values, scale = _scaled(layer.weight, 127)
    weight = values.round().to(torch.int8).t()

    def product(rows: Tensor) -> Tensor:
        inputs, by_row = _scaled(rows, 127)
        made: Any = torch._int_mm(inputs.round().to(torch.int8), weight)
        return made.float() * by_row * scale.t()

    return _in_rows(layer, product)


def _fp8(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Round weights by output and inputs by row to 8-bit floats (E4M3, arXiv 2209.05433)."""
    kind = torch.float8_e4m3fn
    most = torch.finfo(kind).max
    values, scale = _scaled(layer.weight, most)
    weight, by_output = values.to(kind).t(), scale.t().contiguous()

    def product(rows: Tensor) -> Tensor:
        inputs, by_row = _scaled(rows, most)
        # a scale for each row is for results in bfloat16 alone
        return torch._scaled_mm(
            inputs.to(kind), weight, by_row, by_output, out_dtype=torch.bfloat16
        ).float()

    return _in_rows(layer, product)


_ROUNDED: dict[Any, Callable[..., Any]] = {"int8": _int8, "fp8": _fp8}


def distance(made: Tensor, exact: Tensor) -> float:
    """Return how far samples of one group are from the exact ones, in units of the group's spread.

    ``|made - exact| / |exact - mean of exact|``, over all numbers of all samples. It is 0 for equal
    samples, and about the root of 2 for other samples of the same prompt.

    Args:
        made: [B, ...], samples of a group.
        exact: [B, ...], made from the same noise.

    >>> exact = torch.tensor([[0.0, 4.0], [2.0, 0.0]])
    >>> distance(exact + 0.5, exact)  # 1 / |(-1, 2, 1, -2)|
    0.31622776601683794
    """
    made, exact = made.double(), exact.double()
    return float((made - exact).norm() / (exact - exact.mean(0)).norm())
