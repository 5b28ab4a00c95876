"""UnifiedReward: a vision-language model trained to score pictures against their captions.

Source: Wang et al., "Unified Reward Model" (arXiv 2503.05236). Weights: ``CodeGoat24/UnifiedReward
-qwen-7b`` and its successors, MIT. Range 1 to 5; higher is better. It runs behind a server, for
example ``vllm serve CodeGoat24/UnifiedReward-qwen-7b``; ``DGPO_UNIFIED_REWARD_URL`` says where.

This is the paper's pointwise scoring of generated pictures: the answer takes the caption apart
("red fox (animal): 1" for what is there, 0 for what is not) and ends with "Final Score:" and a
number. Differs from the paper: the question below is this project's wording. The authors' own,
which they trained with, is in their repository: save it to a file with ``{prompt}`` in the
caption's place and set ``DGPO_UNIFIED_REWARD_TEMPLATE`` to it where numbers must compare with
theirs.
"""

from __future__ import annotations

from dgpo.rewards.loading import chosen, file_of
from dgpo.rewards.shipped.vlm_judge import VLMJudge
from dgpo.rewards.wrappers import Lazy

MODEL = "CodeGoat24/UnifiedReward-qwen-7b"
VARIABLE = "DGPO_UNIFIED_REWARD"
TEMPLATE = """\
Here are a caption and a picture that was generated for it. Judge it by two things.
1. Agreement: are the objects of the caption there, with their attributes, relations and style?
2. Quality: is the picture sharp, detailed, right in its colours and pleasing?
Take the caption apart: write each element as "element (kind): 1" where the picture has it and as
"element (kind): 0" where it has not. Then write a number from 1 (poor) to 5 (excellent) after
"Final Score:".
Caption: [{prompt}]"""
PATTERN = (
    r"[Ff]inal [Ss]core(?:\s*\(1\s*(?:-|–|to)\s*5\))?[^\w-]*"
    r"(\d+(?:\.\d+)?)\b(?!\s*(?:-|–|to)\s*5|[.,]\d)"
)
"""The number after the last "Final Score:", in marks of emphasis or not; a minus is no part of an
answer, and neither is the scale ("1-5") that some answers repeat."""


class UnifiedReward(VLMJudge):
    """The judge with UnifiedReward's question and scale; arguments override the environment.

    Args:
        url: the endpoint's base; default: ``DGPO_UNIFIED_REWARD_URL``.
        model: its name there; default: ``DGPO_UNIFIED_REWARD_MODEL``, else the 7B model's.
        template: the question; default: the file ``DGPO_UNIFIED_REWARD_TEMPLATE`` names, else
            this module's.

    Raises:
        UserError: the template's file cannot be read.
    """

    name = "unified_reward"

    def __init__(
        self, url: str | None = None, model: str | None = None, template: str | None = None
    ) -> None:
        super().__init__(
            url,
            chosen(model, f"{VARIABLE}_MODEL", MODEL),
            template=template or file_of(f"{VARIABLE}_TEMPLATE") or TEMPLATE,
            pattern=PATTERN,
            limits=(1.0, 5.0),
            name=self.name,
            variable=VARIABLE,
        )


unified_reward = Lazy(UnifiedReward)
