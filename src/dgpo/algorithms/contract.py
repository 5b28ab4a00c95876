"""Every algorithm declares the settings with which the tests of all algorithms try it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contract:
    """A ``Contract`` declares the settings with which an algorithm is tested.

    The points of the tests have two dimensions. Denoising losses are of the order of one there, not
    of 1e-2 as for pictures, so some settings must differ from the published ones.

    Args:
        terms: settings with which every term of the loss has an effect.
        learns: choices of settings, each by a name, with which it learns a small task.
        pulls_to_old: a sample without advantage pulls the policy to the old one, so that the
            gradient is zero only where the two agree.
        each_level: it learns with an optimiser step after each noise level.
    """

    terms: Mapping[str, Any] = field(default_factory=dict)
    learns: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"default": {}})
    pulls_to_old: bool = False
    each_level: bool = False
