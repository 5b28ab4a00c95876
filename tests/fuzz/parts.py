"""What the fuzzing tests share: values that settings do not expect, and what an error must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st

from dgpo.errors import UserError

T = TypeVar("T")
PROFILE = settings.get_profile("dgpo")
LONGEST = 20_000
"""Characters of a message that somebody may still read."""

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**30, -(2**63), 0.0, -0.0, 1e-320, 1e308, float("inf"),
    float("nan"), "", " ", "null", "no", "dgpo", "a:b", ":", ".:x", "x.py:y", "../../etc/passwd",
    "~nobody/x", "x" * 5000, "{}", "{x!r:{y}}", "%s%n", "\u202ereversed", "\x00", "\n", "猫",
    "$(touch x)", "`id`", [], [None], {}, {"name": "dgpo"}, {"kind": "x"}, [[[]]], {"a": {"b": []}},
]  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
) | st.sampled_from(NASTY)
VALUES = st.recursive(
    SCALARS,
    lambda inside: (
        st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3)
    ),
    max_leaves=6,
)


def value_or_error(make: Callable[[], T]) -> T | None:
    """What ``make`` returns, or None for one clear error; anything else it raises is a defect."""
    try:
        return make()
    except UserError as error:
        message = str(error)
        assert 10 < len(message) < LONGEST, message
        assert "Traceback" not in message, message
        return None


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A file's content with a few bits, bytes or stretches changed."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(made) - 1)))
        end = place + draw(st.integers(0, 40))
        kind = draw(st.sampled_from(["bit", "bytes", "cut", "end", "twice"]))
        if kind == "bit" and made:
            made[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            made[place:end] = draw(st.binary(max_size=12))
        elif kind == "cut":
            del made[place:end]
        elif kind == "end":
            del made[place:]
        else:
            made[place:place] = made[place:end]
    return bytes(made)
