"""The rollout server is the reference for the wire, and the engine where no other one runs.

    python -m dgpo.rollouts.server MODEL --port 8770

``PUT /v1/weights/HASH`` takes a LoRA file, and ``POST /v1/rollout`` makes pictures with it
(:mod:`dgpo.rollouts.wire`). Requests run one after the other.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import torch
import typer
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError

from dgpo.errors import UserError, told
from dgpo.models.loras import put_lora
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.models.weights import lora_files
from dgpo.models.weights.lora_passes import LoraPasses
from dgpo.models.weights.snapshots import exchanged
from dgpo.registry import SAMPLERS
from dgpo.rollouts.wire import Ask, hash_of, pack
from dgpo.serve.access import token_for
from dgpo.serve.guard import Guard, uvicorn_settings, why

LARGEST = 2**32
"""How many bytes a LoRA file may have."""


class Stale(UserError):
    """A request names other weights than those that are in place."""


class Sampler:
    """A ``Sampler`` is a pipeline that samples with the LoRA that was sent last.

    Args:
        pipe: the pipeline as it was before training.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._models: dict[str, PipelineModel] = {}
        self._lock = Lock()
        self._weights: str | None = None
        self._lora = LoraPasses([])

    def take(self, name: str, data: bytes) -> str:
        """Replace the LoRA by another one.

        Args:
            name: its name, :func:`dgpo.rollouts.wire.hash_of` the file.
            data: a LoRA file as diffusers writes it.

        Returns:
            The hash of the tensors that are in place now.

        Raises:
            UserError: the tensors do not fit their name, or are no LoRA for this pipeline.
        """
        found = hash_of(data)
        if found != name:
            raise UserError("the weights do not fit their name: they were changed on the way")
        with self._lock, tempfile.TemporaryDirectory() as folder:
            if self._lora.layers:
                self._pipe.unload_lora_weights()
            self._weights, self._lora = (
                None,
                LoraPasses([]),
            )  # until the new ones are known to be in place
            (Path(folder) / "pytorch_lora_weights.safetensors").write_bytes(data)
            try:
                put_lora(self._pipe, lora_files.read(Path(folder)), fresh=True)
            except Exception as error:  # diffusers and peft raise many kinds
                raise UserError(f"this is no LoRA for the pipeline: {error}") from error
            parts = self._pipe.components.values()
            modules = (m for p in parts if isinstance(p, torch.nn.Module) for m in p.modules())
            self._lora = LoraPasses([module for module in modules if isinstance(module, LoraLayer)])
            self._weights = found
            return found

    def sample(self, ask: Ask) -> Rollout:
        """Make pictures with the weights that the request names.

        Raises:
            Stale: other weights are in place.
            UserError: the pipeline cannot do what the request asks for.
        """
        with self._lock:
            if ask.weights != self._weights:
                raise Stale(f"weights {self._weights} are in place, not {ask.weights!s:.80}")
            if len(ask.seeds) != len(ask.texts):
                raise UserError(f"{len(ask.seeds)} seeds for {len(ask.texts)} texts")
            if ask.scheduler is not None and ask.scheduler not in SAMPLERS:
                # a path would import what the asker names: code from outside is never run here
                raise UserError(f"scheduler = {ask.scheduler!r:.80}: only {', '.join(SAMPLERS)}")
            with self._merged(), _blamed(ask.call):
                model = self._model(ask.call)
                own = ask.scheduler and make_scheduler(ask.scheduler, self._pipe.scheduler)
                return model.rollout(
                    model.encode(ask.texts, guidance=ask.guidance_scale != 1),
                    steps=ask.steps,
                    guidance_scale=ask.guidance_scale,
                    scheduler=own,
                    generators=[torch.Generator().manual_seed(seed) for seed in ask.seeds],
                )

    def _model(self, call: dict[str, Any]) -> PipelineModel:
        key = repr(sorted(call.items()))
        if key not in self._models:
            self._models = {key: PipelineModel(self._pipe, call=call)}
        return self._models[key]

    @contextmanager
    def _merged(self) -> Iterator[None]:
        """Merge the LoRA into the base weights inside the block, as the policy does to sample."""
        if not self._lora.merges:
            yield
            return
        with exchanged(*self._lora.merged()), self._lora.off():
            yield


def make_app(pipe: Any, token: str | None = None) -> Any:
    """Make an ASGI application around a pipeline.

    Args:
        pipe: the pipeline as it was before training.
        token: the bearer token that every request must bring; None asks for no token.
    """
    sampler = Sampler(pipe)
    app = FastAPI(title="dgpo rollouts")

    @app.put("/v1/weights/{name}")
    async def weights(name: str, request: Request) -> dict[str, str]:
        """Take a LoRA file."""
        data = await request.body()
        return {"weights": await run_in_threadpool(_answered, sampler.take, name, data)}

    @app.post("/v1/rollout")
    async def rollout(request: Request) -> Response:
        """Make pictures; the body is an :class:`Ask`."""
        # not a parameter: the framework fails on bytes that are no text instead of saying so
        try:
            ask = Ask.model_validate_json(await request.body())
        except ValidationError as error:
            raise HTTPException(422, why(error)) from None
        made = await run_in_threadpool(_answered, sampler.sample, ask)
        return Response(pack(made, ask.weights), media_type="application/octet-stream")

    return Guard(app, token, LARGEST, "application/json")


@contextmanager
def _blamed(call: dict[str, Any]) -> Iterator[None]:
    """Blame the request for whatever a pipeline raises: its arguments are the asker's."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the pipeline cannot sample with {call!r:.200}: {told(error):.500}"
        ) from error


def _answered(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Stale as error:
        raise HTTPException(409, str(error)) from None
    except UserError as error:
        raise HTTPException(422, str(error)) from None


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    host: Annotated[str, typer.Option("--host", metavar="H")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="N")] = 8770,
    token_file: Annotated[Path | None, typer.Option("--token-file", metavar="F")] = None,
    precision: Annotated[str, typer.Option("--precision", metavar="P")] = "float32",
) -> None:
    """Make rollouts for a run elsewhere."""
    import uvicorn

    from dgpo.models.load import load_for_sampling

    try:
        token = token_for(host, token_file)
        app = make_app(load_for_sampling(model, precision), token)
    except UserError as error:
        raise SystemExit(str(error)) from error
    uvicorn.run(app, host=host, port=port, **uvicorn_settings())


if __name__ == "__main__":
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(main)
    command()
