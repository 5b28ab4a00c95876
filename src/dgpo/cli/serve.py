"""The command `dgpo serve`."""

from __future__ import annotations

import importlib.util
from typing import Annotated

from typer import Option

from dgpo.cli.checks import check_rewards
from dgpo.cli.options import Host, Port, Rewards, TokenFile
from dgpo.errors import UserError
from dgpo.serve.access import token_for

_MAX_MEGAPIXELS = "Most pixels in the pictures of a request."


def serve(
    reward: Rewards,
    host: Host = "127.0.0.1",
    port: Port = 8765,
    token_file: TokenFile = None,
    batch: Annotated[int, Option(min=1, metavar="N", help="Pictures scored at once.")] = 64,
    max_images: Annotated[int, Option(min=1, metavar="N", help="Most pictures in a request.")] = 64,
    max_mb: Annotated[int, Option(min=1, metavar="N", help="Largest body of a request.")] = 64,
    max_megapixels: Annotated[int, Option(min=1, metavar="N", help=_MAX_MEGAPIXELS)] = 64,
) -> None:
    """Serve rewards over HTTP; the reward `http` is the client."""
    for module in ("fastapi", "uvicorn", "python_multipart"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"dgpo serve needs {module}: pip install 'dgpo[serve]'")
    token = token_for(host, token_file)
    check_rewards(reward)
    import uvicorn

    from dgpo.serve.app import Limits, make_app
    from dgpo.serve.guard import uvicorn_settings
    from dgpo.serve.ready import ready

    sets = ready(reward)
    limits = Limits(body=max_mb * 2**20, images=max_images, pixels=max_megapixels * 10**6)
    app = make_app(sets, token, limits, batch=batch)
    print(f"serving {', '.join(own.names[0] for own in sets)}; the interface is described at /docs")
    uvicorn.run(app, host=host, port=port, **uvicorn_settings())
