"""The few facts about a pipeline family that cannot be read from the pipeline itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A ``Family`` holds the overrides for one pipeline class.

    Args:
        encode_names: the names of what ``encode_prompt`` returns, if its source does not tell.
        refusal: why this pipeline cannot be trained; None if it can.
        guidance: False if guidance remembers earlier steps, so that it cannot be trained with.
        encodes_itself: whether every call encodes the text, because the embeddings of
            ``encode_prompt`` cannot be handed back to it.
        one_row: whether a call makes a single sample.
        negative_text: the text for every row where the recipe has no negative prompt.
    """

    encode_names: tuple[str, ...] | None = None
    refusal: str | None = None
    guidance: bool = True
    encodes_itself: bool = False
    one_row: bool = False
    negative_text: str | None = None


FAMILIES: dict[str, Family] = {
    # its guidance has momentum from step to step
    "AceStepPipeline": Family(guidance=False),
    # its call projects given embeddings once more
    "StableAudioPipeline": Family(encodes_itself=True),
    "QwenImageEditPlusPipeline": Family(one_row=True),
    # its call wants the text beside given embeddings, and without a negative prompt makes one row
    "LongCatImagePipeline": Family(encodes_itself=True, negative_text=""),
    "Cosmos2TextToImagePipeline": Family(refusal="its sigmas are those of EDM, not of a flow"),
}


def family_of(pipe: Any) -> Family:
    """Return the overrides for the class of ``pipe``, or none."""
    return FAMILIES.get(type(pipe).__name__, Family())
