"""The rollout server is the reference for the wire, and the engine where no other one runs.

    python -m dgpo.rollouts.server MODEL --port 8770

``PUT /v1/weights/HASH`` takes a LoRA file, and ``POST /v1/rollout`` makes pictures with it
(:mod:`dgpo.rollouts.wire`). Requests that wait at the same time are sampled as one batch.
"""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
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
        self.weights: str | None = None
        """The hash of the LoRA that is in place; None for the model as it was."""
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
            # until the new ones are known to be in place
            self.weights, self._lora = None, LoraPasses([])
            (Path(folder) / "pytorch_lora_weights.safetensors").write_bytes(data)
            try:
                put_lora(self._pipe, lora_files.read(Path(folder)), fresh=True)
            except Exception as error:  # diffusers and peft raise many kinds
                raise UserError(f"this is no LoRA for the pipeline: {error}") from error
            parts = self._pipe.components.values()
            modules = (m for p in parts if isinstance(p, torch.nn.Module) for m in p.modules())
            self._lora = LoraPasses([module for module in modules if isinstance(module, LoraLayer)])
            self.weights = found
            return found

    def sample(self, ask: Ask) -> Rollout:
        """Make pictures with the weights that the request names.

        Raises:
            Stale: other weights are in place.
            UserError: the pipeline cannot do what the request asks for.
        """
        with self._lock:
            if ask.weights != self.weights:
                raise Stale(f"weights {self.weights} are in place, not {ask.weights!s:.80}")
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


class Joined:
    """``Joined`` samples requests that wait at the same time as one batch, if they differ in their
    texts and seeds alone.

    Args:
        sample: makes the pictures of a request.
        rows: how many pictures a batch may have; a larger request is a batch of its own.
    """

    def __init__(self, sample: Callable[[Ask], Rollout], rows: int) -> None:
        self._sample, self._rows = sample, rows
        self._waiting: list[tuple[Ask, Future[Rollout]]] = []
        self._turn, self._list = Lock(), Lock()

    def __call__(self, ask: Ask) -> Rollout:
        """Return the rollout of a request, when its turn has come."""
        mine: Future[Rollout] = Future()
        with self._list:
            self._waiting.append((ask, mine))
        with self._turn:
            if not mine.done():
                self._serve(ask)
        return mine.result()

    def _serve(self, first: Ask) -> None:
        kind, rows, taken = _kind(first), 0, []
        with self._list:
            for one in self._waiting:
                fits = not taken or rows + len(one[0].seeds) <= self._rows
                if _kind(one[0]) == kind and fits:
                    taken.append(one)
                    rows += len(one[0].seeds)
            self._waiting = [one for one in self._waiting if one not in taken]
        try:
            texts, seeds = ([x for ask, _ in taken for x in getattr(ask, n)] for n in _OWN)
            made = self._sample(first.model_copy(update={"texts": texts, "seeds": seeds}))
        except Exception:
            for ask, mine in taken:  # one of them may be at fault: each is told its own
                with _told_to(mine):
                    mine.set_result(self._sample(ask))
            return
        images, end = list(made.images or ()), 0
        for ask, mine in taken:
            start, end = end, end + len(ask.seeds)
            mine.set_result(Rollout(made.x0[start:end], images[start:end], made.levels))


_OWN = ("texts", "seeds")
"""What requests of one batch may differ in."""


def _kind(ask: Ask) -> str:
    fits = len(ask.texts) == len(ask.seeds)  # one that does not is refused alone
    return ask.model_dump_json(exclude=set(_OWN)) if fits else str(id(ask))


@contextmanager
def _told_to(future: Future[Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        future.set_exception(error)


def make_app(pipe: Any, token: str | None = None, rows: int = 64) -> Any:
    """Make an ASGI application around a pipeline.

    Args:
        pipe: the pipeline as it was before training.
        token: the bearer token that every request must bring; None asks for no token.
        rows: how many pictures of requests that wait are sampled at once.
    """
    sampler = Sampler(pipe)
    sample = Joined(sampler.sample, rows)
    app = FastAPI(title="dgpo rollouts")

    @app.get("/health")
    async def health() -> dict[str, str | None]:
        """Say that the server is there, and with which LoRA."""
        return {"status": "ok", "weights": sampler.weights}

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
        made = await run_in_threadpool(_answered, sample, ask)
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
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="N")] = 64,
) -> None:
    """Make rollouts for a run elsewhere."""
    import uvicorn

    from dgpo.models.load import load_for_sampling

    try:
        token = token_for(host, token_file)
        app = make_app(load_for_sampling(model, precision), token, rows)
    except UserError as error:
        raise SystemExit(str(error)) from error
    uvicorn.run(app, host=host, port=port, **uvicorn_settings())


if __name__ == "__main__":
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(main)
    command()
