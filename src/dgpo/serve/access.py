"""Says who may reach a server: tokens in files, and addresses of this machine alone."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from dgpo.errors import UserError


def read_token(file: Path) -> str:
    """Read the token in a file.

    Raises:
        UserError: the file cannot be read, or holds no word that can be a token.
    """
    try:
        token = file.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"token file {file}: {error}") from error
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"token file {file}: should hold one word of ASCII letters and digits")
    return token


def loopback(host: str) -> bool:
    """Return whether an address, or the name ``localhost``, is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_for(
    host: str, file: Path | None, names: tuple[str, str] = ("--host", "--token-file")
) -> str | None:
    """The token that clients of ``host`` must know; None where this machine alone reaches it and no
    file is given.

    Args:
        host: the address to listen at.
        file: the file with the token.
        names: what the user calls the two settings.

    Raises:
        UserError: others reach the host and there is no token, or its file cannot be read.
    """
    if file is not None:
        return read_token(file)
    if not loopback(host):
        raise UserError(f"{names[0]} {host}: anyone who reaches it could ask; give {names[1]} too")
    return None
