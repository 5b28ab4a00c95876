"""Whatever a family decodes with, the sample whose numbers are not finite is lost, and no other."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgpo.check.examination import check_rows
from dgpo.media import Lost
from dgpo.models.pipeline.probes import replaced
from families.tiny import TINY, tiny_model

SAMPLED = [name for name, tiny in TINY.items() if tiny.refused is None]


@pytest.mark.parametrize("name", SAMPLED)
def test_only_the_row_that_is_broken_is_lost(name: str) -> None:
    model, tiny, sizes = tiny_model(name), TINY[name], []

    def breaking(own: Any) -> Any:
        def decode(*given: Any, **named: Any) -> Any:
            made = own(*given, **named)
            tensor = made if isinstance(made, Tensor) else made[0]
            tensor[-1].fill_(torch.nan)
            sizes.append(len(tensor))
            return made

        return decode

    prompts = check_rows(tiny.picture and tiny.picture(), tiny.mask and tiny.mask())
    cond = model.encode([row.text for row in prompts], guidance=True)
    with ExitStack() as patches:
        for part in model.pipe.components.values():
            if isinstance(part, nn.Module) and hasattr(part, "decode"):
                patches.enter_context(replaced(part, decode=breaking(part.decode)))
        made = model.rollout(cond, steps=3).images or []
    one_by_one = sizes == [1, 1]
    assert one_by_one or sizes == [2]
    assert [isinstance(one, Lost) for one in made] == [one_by_one, True]
