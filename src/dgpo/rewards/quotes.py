"""Texts in quotes: which part of a prompt a picture should say, where that is beyond doubt."""

from __future__ import annotations

import re
import unicodedata

_DECADE = re.compile(r"\d\ds\b(?!['’])")  # '90s
_FOLD = str.maketrans(
    dict.fromkeys("‘’‚‛′ʹʼ`´", "'") | dict.fromkeys("“”„‟″«»", '"') | dict.fromkeys("‐‑‒–—―−", "-")
)


def folded(text: str) -> str:
    """Return a text in NFKC, with typographic quotes and dashes as on a keyboard."""
    # before NFKC, which would make a space and an accent of ´
    return unicodedata.normalize("NFKC", text.translate(_FOLD)).translate(_FOLD)


def quoted(prompt: str) -> list[str]:
    """Return what a prompt says in double quotes (``"``, ``“ ”``), else in single ones.

    Quotes with nothing but space between them do not count. Apostrophes, inches and feet
    (``12"``, ``6'``) and decades (``'90s``) are no quotes.

    Raises:
        ValueError: a mark has no partner, or quotes stand inside quotes of the same or a
            weaker kind; the message says which.

    >>> quoted('a 12" vinyl record with the label "Blue"')
    ['Blue']
    """
    double, single = _double(prompt), []
    try:
        single = _single(prompt)
    except ValueError:
        if not double:
            raise
    for first, last in single:
        if any(first < start and end < last for start, end in double):
            raise ValueError(f"{prompt[first : last + 1]!r:.60} has quotes inside quotes")
    found = [prompt[start + 1 : end] for start, end in double or single]
    return [text for text in found if text.strip()]


def _double(prompt: str) -> list[tuple[int, int]]:
    """Return the places of the pairs of double quotes."""
    pairs: list[tuple[int, int]] = []
    start = -1
    for found in re.finditer('["“”„]', prompt):
        place, mark = found.start(), found[0]
        before, after = _around(prompt, place)
        measure = before.isdigit()
        # a mark between two letters leans to neither side: a space was forgotten
        between = _in_word(before) and _in_word(after) and not measure
        if start < 0 and (mark in "“„" or not _in_word(before) or between):
            start = place
        elif start >= 0 and (
            mark == "”"
            or (mark == "“" and prompt[start] == "„")
            or (mark == '"' and (not _in_word(after) or between))
        ):
            pairs.append((start, place))
            start = -1
        elif not measure:
            raise ValueError(_stray(prompt, place))
    if start >= 0:
        raise ValueError(_stray(prompt, start))
    return [pair for pair in pairs if prompt[pair[0] + 1 : pair[1]].strip()]


def _single(prompt: str) -> list[tuple[int, int]]:
    """Return the places of the one pair of single quotes, or none."""
    pairs: list[tuple[int, int]] = []
    start = -1
    for found in re.finditer("['‘’]", prompt):
        place, mark = found.start(), found[0]
        before, after = _around(prompt, place)
        if (_in_word(before) and _in_word(after)) or _DECADE.match(prompt, place + 1):
            continue  # an apostrophe
        if start < 0 and mark != "’" and not _in_word(before):
            if pairs:  # the first of several may be part of a word: rock 'n' roll
                raise ValueError(_stray(prompt, place))
            start = place
        elif start >= 0 and mark != "‘" and not _in_word(after):
            pairs.append((start, place))
            start = -1
        elif start >= 0 or (pairs and not before.isdigit()):
            # it may end the quoted text as well as be the apostrophe of a plural: the dogs' door
            raise ValueError(_stray(prompt, place))
    if start >= 0:
        raise ValueError(_stray(prompt, start))
    return [pair for pair in pairs if prompt[pair[0] + 1 : pair[1]].strip()]


def _around(prompt: str, place: int) -> tuple[str, str]:
    return prompt[:place][-1:], prompt[place + 1 : place + 2]


def _in_word(character: str) -> bool:
    """Return whether it is a letter or digit of words between spaces, so not of Chinese."""
    return character.isalnum() and character < "\u2e80"


def _stray(prompt: str, place: int) -> str:
    near = prompt[max(0, place - 12) : place + 13]
    return f"the mark {prompt[place]} in {near!r} is not part of one clear pair of quotes"
