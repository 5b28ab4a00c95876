"""Secrets are found by their name or by their form, and kept out of everything that is written.

Recipes are copied into run folders, so no secret may stand in one, however deep it is nested.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NAME = re.compile(
    r"(?i)(.*[^a-z0-9])?(token|secret|passw(or)?d|passphrase|((api|access|private|secret)[_-]?)?key"
    r"|credentials?|authorization|auth|cookie)"
)
"""Matches the names of settings that hold a secret."""
PASSWORD = re.compile(r"\w+://[^/?#\s]*@")
"""Matches the beginning of an address that contains a password, such as ``http://me:pw@``."""
_FORM = re.compile(r"(?i:bearer)\s+\S{16,}|(hf_|sk-|ghp_|gho_|github_pat_|glpat-)[\w-]{16,}")
"""Matches texts that are secrets, whatever the setting is called."""
_WORD = re.compile(
    r"(?i)token|secret|passw|passphrase|api.?key|\bkey\b|credential|authorization|\bauth\b|cookie"
    r"|bearer\s|://[^/?#\s]*@|^(hf_|sk-|ghp_|gho_|github_pat_|glpat-)"
)
"""Matches a word of a command that mentions a secret; hiding too much does no harm here."""
HIDDEN = "***"
"""Stands where a secret was."""


def secrets_in(value: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names below ``name`` where nested data holds secrets, never the secrets.

    >>> list(secrets_in({"address": "http://x", "login": [{"token": "abc"}]}, "options"))
    ['options.login[0].token']
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            below = f"{name}.{key}" if name else str(key)
            if _names_one(key, part):
                yield below
            else:
                yield from secrets_in(part, below)
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            yield from secrets_in(part, f"{name}[{place}]")
    elif _is_one(value):
        yield name


def masked(value: Any) -> Any:
    """Return the same nested data with :data:`HIDDEN` in place of every secret, ready to be shown.

    >>> masked({"lr": 1e-4, "api_key": "abc"})
    {'lr': 0.0001, 'api_key': '***'}
    """
    if isinstance(value, Mapping):
        return {k: HIDDEN if _names_one(k, part) else masked(part) for k, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [masked(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return HIDDEN if _is_one(value) else value


def masked_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command, without anything that looks like a secret.

    >>> masked_words(["dgpo", "serve", "--token", "abc"])
    ['dgpo', 'serve', '--token', '***']
    """
    shown, hide = [], False
    for word in words:
        key, equals, value = word.partition("=")
        if hide or _WORD.search(value):
            shown.append(f"{key}={HIDDEN}" if equals and not hide else HIDDEN)
            hide = False
        elif _WORD.search(key):
            shown.append(f"{key}={HIDDEN}" if equals else (key if key[:2] == "--" else HIDDEN))
            hide = key.startswith("--") and not equals
        else:
            shown.append(word)
    return shown


def _names_one(name: Any, value: Any) -> bool:
    empty = value is None or isinstance(value, bool) or value in ("", [], {})
    return not empty and _NAME.fullmatch(str(name)) is not None


def _is_one(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    return bool(PASSWORD.search(value) or _FORM.fullmatch(value.strip()))
