"""Says who may reach a server: those who know a token, or this machine alone."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from dgpo.errors import UserError
from dgpo.secrets import token_of


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
        return token_of(file)
    if not loopback(host):
        raise UserError(f"{names[0]} {host}: anyone who reaches it could ask; give {names[1]} too")
    return None
