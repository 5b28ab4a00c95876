"""Writes rankings as a dataset that offline training reads.

A folder with ``groups.jsonl``, an object a line: ``prompt``, ``images`` (files relative to the
folder), ``rewards`` (one a picture, higher is better: the mean over raters), ``raters`` (the
rewards that each gave) and ``metadata`` (what else the prompt row says).
"""

from __future__ import annotations

import json
from typing import Any

from dgpo.disk import replace_text, sync
from dgpo.ranking.answers import mean
from dgpo.ranking.store import Store

FILE = "groups.jsonl"


def export(store: Store) -> int:
    """Write ``groups.jsonl`` beside the pictures, in place of an earlier one.

    Groups that nobody has an opinion of are left out.

    Returns:
        The number of groups in the file.
    """
    lines = []
    for group in store.groups():
        rewards = store.rewards(group)
        if rewards:
            row: dict[str, Any] = {
                "prompt": group.prompt,
                "images": group.files,
                "rewards": mean(rewards.values()),
                "raters": rewards,
                "metadata": group.metadata,
            }
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    replace_text(store.folder / FILE, "".join(lines))
    sync(store.folder)
    return len(lines)
