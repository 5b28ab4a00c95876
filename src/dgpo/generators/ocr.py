"""The generator ``ocr`` makes prompts that quote what is to be read in the picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

PLACES = (
    'a wooden sign at a garden gate that says "{}"',
    'a shop window with the words "{}" painted on the glass',
    'a chalkboard in front of a café that reads "{}"',
    'a birthday cake with "{}" written in icing',
    'a road sign on an empty country road that says "{}"',
    'a poster on a brick wall with the headline "{}"',
    'a neon sign at night that spells "{}"',
    'a T-shirt on a hanger printed with "{}"',
    'a book on a table whose cover is titled "{}"',
    'a coffee mug with "{}" on its side',
    'a train station display that shows "{}"',
    'a paper note on a fridge with "{}" in neat handwriting',
    'a brass plate beside a door engraved with "{}"',
    'a banner above a market stall that says "{}"',
    'a city bus whose front display reads "{}"',
    'a glass jar on a shelf with a label that says "{}"',
    'a stone wall with the word "{}" sprayed on it in bright paint',
    'a laptop whose screen shows "{}" in large letters',
    'a wrapped parcel with a tag that says "{}"',
    'a lighthouse with "{}" painted down its tower',
)
OPENINGS = (
    "Open", "Welcome", "Hello", "Fresh", "Quiet", "Golden", "Happy", "Little", "Silver", "Warm",
    "North", "Summer", "Winter", "Lucky", "Blue", "Wild", "Early", "Second", "Simple", "Bright",
    "Hidden", "Gentle", "Brave", "Sunny", "Slow", "Modern", "Daily", "Royal", "Velvet", "Crystal",
)  # fmt: skip
MIDDLES = (
    "River", "Garden", "Coffee", "Bakery", "Street", "Harbor", "Market", "Morning", "Forest",
    "Kitchen", "Mountain", "Music", "Paper", "Window", "Apple", "Cloud", "Ocean", "Station",
    "Library", "Bridge", "Candle", "Meadow", "Orchard", "Planet", "Rocket", "Thunder", "Village",
    "Bicycle", "Lantern", "Puzzle",
)  # fmt: skip
ENDINGS = (
    "Today", "Club", "House", "Company", "Festival", "Only", "Society", "Room", "Express", "Tours",
    "Studio", "Shop", "Hall", "Corner", "Works", "Parade", "Season", "Report", "Line", "Park",
)  # fmt: skip


def rows(random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Yield rows without end: one word, two words, three words and a number, in turn.

    A row has ``prompt``, ``text`` (what is to be read) and ``tag`` (which of the four it is); a
    number has one to five digits.
    """
    while True:
        for tag, text in (
            ("1 word", _pick(OPENINGS + MIDDLES + ENDINGS, random)),
            ("2 words", f"{_pick(OPENINGS, random)} {_pick(MIDDLES, random)}"),
            ("3 words", " ".join(_pick(w, random) for w in (OPENINGS, MIDDLES, ENDINGS))),
            ("number", str(int(random.integers(10 ** int(random.integers(1, 6)))))),
        ):
            yield {"prompt": _pick(PLACES, random).format(text), "text": text, "tag": tag}


def _pick(values: tuple[str, ...], random: np.random.Generator) -> str:
    return values[int(random.integers(len(values)))]
