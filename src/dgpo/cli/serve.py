"""`dgpo serve`: rewards for other programs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from dgpo.errors import UserError
from dgpo.serve.access import token_for

CONNECTIONS = 64
"""Open at once; a client keeps up to four."""


def serve(
    reward: Annotated[
        list[str],
        typer.Option("--reward", metavar="R", help="As in `dgpo list rewards`; may be repeated."),
    ],
    host: Annotated[
        str, typer.Option("--host", metavar="H", help="0.0.0.0 for all networks; wants a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="N")] = 8765,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="F", help="A file with what clients must know."),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, metavar="N", help="Pictures of several requests scored at once.")
    ] = 64,
    max_images: Annotated[int, typer.Option(min=1, metavar="N", help="Of one request.")] = 64,
    max_mb: Annotated[int, typer.Option(min=1, metavar="N", help="Body of one request.")] = 64,
    max_megapixels: Annotated[
        int, typer.Option(min=1, metavar="N", help="All pictures of one request together.")
    ] = 64,
) -> None:
    """Serve rewards over HTTP; the reward `http` is the client."""
    for module in ("fastapi", "uvicorn", "python_multipart"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"dgpo serve needs {module}: pip install 'dgpo[serve]'")
    token = token_for(host, token_file)
    import uvicorn

    from dgpo.serve.app import make_app
    from dgpo.serve.limits import Limits
    from dgpo.serve.ready import ready

    sets = ready(reward)
    limits = Limits(body=max_mb * 2**20, images=max_images, pixels=max_megapixels * 10**6)
    app = make_app(sets, token, limits, batch=batch)
    typer.echo(
        f"serving {', '.join(own.names[0] for own in sets)}; the interface is described at /docs"
    )
    # more at once are told to come again: their pictures would all be unpacked in memory
    uvicorn.run(app, host=host, port=port, access_log=False, limit_concurrency=CONNECTIONS)
