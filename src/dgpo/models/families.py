"""The few facts about a pipeline family that cannot be read from the pipeline itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Overrides for one pipeline class.

    Args:
        encode_names: what ``encode_prompt`` returns, where its source does not say it.
        refusal: why this pipeline cannot be trained; None for those that can.
    """

    encode_names: tuple[str, ...] | None = None
    refusal: str | None = None


FAMILIES: dict[str, Family] = {
    "LTX2Pipeline": Family(refusal="it steps two schedulers (video and audio) in each iteration"),
    "Cosmos2TextToImagePipeline": Family(refusal="its sigmas are those of EDM, not of a flow"),
}


def family_of(pipe: Any) -> Family:
    """The overrides for the class of ``pipe``, or none."""
    return FAMILIES.get(type(pipe).__name__, Family())
