"""UnifiedReward: a vision-language model trained to score pictures against their captions.

Source: Wang et al., "Unified Reward Model" (arXiv 2503.05236). Weights: ``CodeGoat24/UnifiedReward
-qwen-7b`` and its successors, MIT. Range 1 to 5; higher is better. It runs behind a server, for
example ``vllm serve CodeGoat24/UnifiedReward-qwen-7b``; ``DGPO_UNIFIED_REWARD_URL`` says where.

The question below is this project's wording. The authors' own, which they trained with, is in
their repository: save it to a file with ``{prompt}`` in the caption's place and set
``DGPO_UNIFIED_REWARD_TEMPLATE`` to it where numbers must compare with theirs.
"""

from __future__ import annotations

import os
from pathlib import Path

from dgpo.errors import UserError
from dgpo.rewards.loading import Lazy
from dgpo.rewards.vlm_judge import VLMJudge

MODEL = "CodeGoat24/UnifiedReward-qwen-7b"
VARIABLE = "DGPO_UNIFIED_REWARD"
TEMPLATE = """\
The picture was generated for this caption: "{prompt}"
Judge two things: does the picture agree with the caption (objects, attributes, relations, style),
and is it of good visual quality (sharp, free of artefacts, pleasing)?
Think briefly, then end with the line: Final Score: <a number from 1 (poor) to 5 (excellent)>"""
PATTERN = r"[Ff]inal [Ss]core\W*?(\d+(?:\.\d+)?)"


def unified_judge(
    url: str | None = None, model: str | None = None, template: str | None = None
) -> VLMJudge:
    """The judge with UnifiedReward's scale; arguments override the environment.

    Args:
        url: the endpoint's base; default: ``DGPO_UNIFIED_REWARD_URL``.
        model: its name there; default: ``DGPO_UNIFIED_REWARD_MODEL``, else the 7B model's.
        template: the question; default: the file ``DGPO_UNIFIED_REWARD_TEMPLATE`` names, else
            this module's.

    Raises:
        UserError: the template's file cannot be read.
    """
    file = os.environ.get(f"{VARIABLE}_TEMPLATE")
    if template is None and file:
        try:
            template = Path(file).read_text("utf-8")
        except OSError as error:
            raise UserError(f"{VARIABLE}_TEMPLATE = {file!r}: {error.strerror}") from error
    return VLMJudge(
        url,
        model or os.environ.get(f"{VARIABLE}_MODEL") or MODEL,
        template=template or TEMPLATE,
        pattern=PATTERN,
        limits=(1.0, 5.0),
        name="unified_reward",
        variable=VARIABLE,
    )


unified_reward = Lazy("unified_reward", unified_judge)
