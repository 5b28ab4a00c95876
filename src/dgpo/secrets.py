"""Secrets are found by their name or by their form, and kept out of everything that is written.

Recipes are copied into run folders, so no secret may stand in one, however deep it is nested.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo.errors import UserError

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


def token(text: str, name: str) -> str:
    """Return a token without the white space around it.

    Args:
        text: what a variable, an option or a file holds.
        name: what the user calls it.

    Raises:
        UserError: it is no word that the head of a request can hold; the text is not shown.

    >>> token(" abc\\n", "DGPO_REWARD_TOKEN")
    'abc'
    """
    word = text.strip()
    if not word or not word.isascii() or not word.isprintable() or " " in word:
        kind = "something else, which is not shown" if word else "nothing"
        raise UserError(
            f"{name} should hold one word of ASCII letters, digits and signs; it holds {kind}"
        )
    return word


def token_in(variable: str) -> str:
    """Return the token in an environment variable; empty where the variable is not set.

    Raises:
        UserError: see :func:`token`.
    """
    text = os.environ.get(variable)
    return "" if text is None else token(text, variable)


def token_of(file: Path) -> str:
    """Return the token in a file.

    Raises:
        UserError: the file cannot be read; or see :func:`token`.
    """
    try:
        text = file.expanduser().read_bytes().decode("utf-8-sig", "replace")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no such home
        raise UserError(f"token file {file}: {error}") from error
    return token(text, f"token file {file}")


def without(secret: str, text: str) -> str:
    """Return a text with :data:`HIDDEN` in place of a secret, however often it is repeated.

    >>> without("abc", "Bearer abc")
    'Bearer ***'
    """
    return text.replace(secret, HIDDEN) if secret else text


def _names_one(name: Any, value: Any) -> bool:
    empty = value is None or isinstance(value, bool) or value in ("", [], {})
    return not empty and _NAME.fullmatch(str(name)) is not None


def _is_one(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    return bool(PASSWORD.search(value) or _FORM.fullmatch(value.strip()))
