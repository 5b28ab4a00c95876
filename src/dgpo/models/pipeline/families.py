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
        guidance: False where guidance remembers earlier steps, so that it cannot be trained with.
        encodes_itself: every call is given the text, and encodes it: what ``encode_prompt`` makes
            cannot be handed back to the call.
        one_row: a call makes one sample, whatever memory there is.
        negative_text: given for every row where the recipe has no negative prompt.
    """

    encode_names: tuple[str, ...] | None = None
    refusal: str | None = None
    guidance: bool = True
    encodes_itself: bool = False
    one_row: bool = False
    negative_text: str | None = None


FAMILIES: dict[str, Family] = {
    # guidance with momentum, from step to step
    "AceStepPipeline": Family(guidance=False),
    # embeddings that are given are projected once more
    "StableAudioPipeline": Family(encodes_itself=True),
    "QwenImageEditPlusPipeline": Family(one_row=True),
    # wants the text beside embeddings that are given, and makes a single row of no negative prompt
    "LongCatImagePipeline": Family(encodes_itself=True, negative_text=""),
    "Cosmos2TextToImagePipeline": Family(refusal="its sigmas are those of EDM, not of a flow"),
}


def family_of(pipe: Any) -> Family:
    """The overrides for the class of ``pipe``, or none."""
    return FAMILIES.get(type(pipe).__name__, Family())
