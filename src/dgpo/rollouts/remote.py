"""Servers make the rollouts: they get the LoRA when that has changed, and return the pictures."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Condition

import torch
from torch import Tensor

from dgpo.errors import UserError
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.policy import Policy, RollingWeights
from dgpo.prompts.caption import Caption
from dgpo.rewards.call_limits import Again, in_thread
from dgpo.rollouts.clients import Server, Weights
from dgpo.rollouts.engine import LocalEngine, RolloutEngine, RolloutRequest
from dgpo.rollouts.foreign import client_of
from dgpo.rollouts.wire import hash_of

PATIENCE = 120.0
"""The seconds in which a server that has answered before may come back."""
TRIES = 6
"""How often in a row a server may fail although it answers when it is asked whether it is there."""


class RemoteEngine(RolloutEngine):
    """A ``RemoteEngine`` drives servers, which divide the batches of an iteration.

    A batch goes to the next server that is free, and its result to its place: which server made it
    changes nothing. A server that does not answer gives its batch back. It is asked for
    :data:`PATIENCE` seconds whether it is there again, and while others work nobody waits for it.

    The policy also makes the first row of each server's first batch: a server that has another
    model or sampler, or does not apply the LoRA, is found before it is learned from. One that comes
    back is taken for the same program.

    Args:
        policy: the policy, whose LoRA is sent.
        urls: the servers' addresses (:func:`dgpo.rollouts.foreign.client_of`).
        scheduler: the sampler's name in the recipe; None for the pipeline's own.
        folder: where the LoRA lies for servers that read it from a disk; None for a temporary one.
        timeout: how many seconds a server may take for one answer.

    Raises:
        UserError: the policy has no LoRA, httpx is not installed, or an address is none.
    """

    def __init__(
        self,
        policy: Policy,
        urls: str | Sequence[str],
        scheduler: str | None = None,
        folder: Path | None = None,
        timeout: float = 600.0,
    ) -> None:
        if policy.lora is None:
            raise UserError(
                "rollout.engine: the servers get a LoRA, and lora: null trains none; set lora or "
                "rollout.engine: null"
            )
        every = [urls] if isinstance(urls, str) else list(urls)
        self.clients = [client_of(url, policy, scheduler, timeout) for url in every]
        self.servers = len(every)
        self._policy = policy
        self._weights: Weights | None = None
        self._held: RollingWeights = "policy"
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="dgpo-engine-")
        self._folder = folder or Path(self._temporary.name if self._temporary else "")

    @property
    def apart(self) -> bool:
        """Return whether it may make pictures while the policy is trained: once every server was
        compared with the policy, which is busy then."""
        return all(client.checked for client in self.clients)

    @contextmanager
    def holding(self, weights: RollingWeights) -> Iterator[None]:
        """Have the servers sample with the policy's weights, as they are now, until the next call
        of this method. Each gets them with its next batch."""
        with tempfile.TemporaryDirectory() as made:
            self._policy.save(made, weights)
            files = sorted(Path(made).rglob("*.safetensors"))
            if len(files) != 1:
                raise UserError(f"rollout.engine: one LoRA file can be sent, got {len(files)}")
            data = files[0].read_bytes()
        name = hash_of(data)
        if self._weights is None or self._weights.name != name:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / f"{name[:16]}.safetensors"
            file.write_bytes(data)
            before, self._weights = self._weights, Weights(name, file)
            if before is not None:
                before.file.unlink(missing_ok=True)
        self._held = weights
        yield

    def rollout(self, request: RolloutRequest) -> Rollout:
        return next(self.rollouts([request]))

    def rollouts(self, requests: Iterable[RolloutRequest]) -> Iterator[Rollout]:
        asked = list(requests)
        for request in asked:
            _refuse(request)
        assert self._weights is not None, "holding() says which weights sample"
        for client in self.clients if asked else ():
            if not client.checked:
                client.prepare(asked[0])
        work = _Work(len(asked), len(self.clients))
        for client in self.clients:
            in_thread(partial(work.by, client, asked, self._weights), name="rollouts")
        try:
            for place, request in enumerate(asked):
                made, client = work.result(place)
                if not client.checked and client.tolerance is not None:
                    self._compare(request, made, client, client.tolerance)
                client.checked = True
                device = self._policy.model.device
                yield Rollout(made.x0.to(device), made.images, made.levels)
        finally:
            work.end()

    def _compare(
        self, request: RolloutRequest, made: Rollout, client: Server, allowed: float
    ) -> None:
        """Check the first row of an answer against the policy's own sample."""
        row = request.cond.rows(torch.tensor([0]))
        one = replace(request, texts=request.texts[:1], cond=row, seeds=request.seeds[:1])
        with self._policy.rolling(self._held):
            own = LocalEngine(self._policy).rollout(one)
        sigmas = [level.sigma for level in made.levels]
        wanted = [level.sigma for level in own.levels]
        same = len(sigmas) == len(wanted) and own.x0.shape[1:] == made.x0.shape[1:]
        same = same and all(abs(a - b) < 1e-3 for a, b in zip(sigmas, wanted, strict=True))
        client.difference = _apart(made.x0[:1], own.x0) if same else float("inf")
        if not client.difference <= allowed:
            model = self._policy.model.pipe.config.get("_name_or_path") or "of the recipe"
            raise UserError(
                f"rollout.engine = {client.url!r}: the first picture differs from the policy's own "
                f"by {client.difference:.3g} (allowed {allowed}): start the server with the model "
                f"{model!r}, the same sampler and precision, and see that it applies the LoRA"
            )


class _Work:
    """Batches that several threads divide, each for its server; results are taken in order.

    Args:
        count: the number of batches.
        servers: the number of threads.
    """

    def __init__(self, count: int, servers: int) -> None:
        self._left, self._servers = deque(range(count)), servers
        self._made: dict[int, tuple[Rollout, Server]] = {}
        self._open = count
        self._gone: list[str] = []
        self._error: BaseException | None = None
        self._news = Condition()

    def result(self, place: int) -> tuple[Rollout, Server]:
        """Wait for a batch; return it, and who made it."""
        with self._news:
            self._news.wait_for(lambda: place in self._made or self._error is not None)
            if self._error is not None:
                raise self._error
            return self._made.pop(place)

    def end(self) -> None:
        """Hand out no batch any more."""
        with self._news:
            self._open = 0
            self._news.notify_all()

    def by(self, client: Server, asked: Sequence[RolloutRequest], weights: Weights) -> None:
        """Have a server make batches until none is left."""
        failures = 0
        while (place := self._next()) is not None:
            try:
                made = client.make(asked[place], weights)
            except Again as error:
                self._tell(place, None)
                failures += 1
                if failures > TRIES or not self._returns(client, error, failures):
                    self._leave(f"{client.url}: {error}; start it with: {client.start}")
                    return
            except BaseException as error:
                self._fail(error)
                return
            else:
                failures = 0
                self._tell(place, (made, client))

    def _next(self) -> int | None:
        """Wait for a batch that nobody makes: one that is being made may come back."""
        with self._news:
            self._news.wait_for(lambda: self._left or not self._open or self._error)
            return self._left.popleft() if self._open and self._left and not self._error else None

    def _tell(self, place: int, made: tuple[Rollout, Server] | None) -> None:
        with self._news:
            if made is None:
                self._left.appendleft(place)
            else:
                self._made[place] = made
                self._open -= 1
            self._news.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._news:
            self._error = self._error or error
            self._news.notify_all()

    def _returns(self, client: Server, why: Again, failures: int) -> bool:
        """Wait until a server answers again; return whether it does."""
        until = time.monotonic() + (PATIENCE if client.checked else 0.0)
        pause = 0.1 * 2**failures
        while True:
            with self._news:
                over = self._news.wait_for(lambda: not self._open or self._error, timeout=pause)
            if over:
                return True  # nobody waits for it
            try:
                client.refuse_gone()
                return True
            except Again:
                if time.monotonic() >= until:
                    return False
            except UserError as error:
                self._fail(error)
                return True
            pause = min(2 * pause, 10.0)

    def _leave(self, why: str) -> None:
        self._gone.append(why)
        if len(self._gone) == self._servers:
            told = "\n".join(self._gone)
            self._fail(UserError(f"rollout.engine: no answer from {told}"))


def _refuse(request: RolloutRequest) -> None:
    if request.record:
        raise UserError(
            "rollout.engine: a server returns no steps, which a policy gradient needs; set "
            "rollout.engine: null"
        )
    if any(isinstance(text, Caption) for text in request.texts):
        raise UserError(
            "rollout.engine: the pictures of prompt rows cannot be sent to a server; set "
            "rollout.engine: null"
        )


def _apart(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).pow(2).mean().sqrt() / other.pow(2).mean().sqrt().clamp_min(1e-12))
