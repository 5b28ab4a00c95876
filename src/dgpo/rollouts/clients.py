"""A client speaks with one server that makes rollouts, in the server's own way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgpo.errors import UserError
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.policy import Policy
from dgpo.rewards.call_limits import Again
from dgpo.rewards.http_client import connect, send, text_of
from dgpo.rollouts.engine import RolloutRequest
from dgpo.rollouts.wire import Ask, unpack
from dgpo.secrets import token_in

if TYPE_CHECKING:
    import httpx

TOKEN = "DGPO_ROLLOUT_TOKEN"
"""The name of the environment variable that holds the servers' token."""


@dataclass(frozen=True)
class Weights:
    """The LoRA that shall sample.

    Args:
        name: :func:`dgpo.rollouts.wire.hash_of` the file.
        file: the file, as diffusers writes it.
    """

    name: str
    file: Path


class Server:
    """A ``Server`` is the client of ``python -m dgpo.rollouts.server`` or a server like it.

    Args:
        url: the server's address.
        policy: the policy; its arguments are asked for.
        scheduler: the sampler's name in the recipe; None for the pipeline's own.
        timeout: how many seconds the server may take for one answer.

    Raises:
        UserError: httpx is not installed, or the address is none.
    """

    start = "python -m dgpo.rollouts.server MODEL"
    """The command that starts such a server."""
    tolerance: float | None = 0.1
    """The largest relative difference (root mean square) that the first sample may have from the
    policy's own; None where nobody can know. Other kernels round otherwise; another model differs
    by about 1."""

    def __init__(self, url: str, policy: Policy, scheduler: str | None, timeout: float) -> None:
        self.url, self.policy, self.scheduler = url, policy, scheduler
        self.client: httpx.Client = connect("rollout.engine", url, token_in(TOKEN), timeout)
        self.has: str | None = None
        """The name of the weights that are known to be in place."""
        self.checked = False
        """True once a sample was compared with the policy's own."""
        self.difference = float("nan")
        """How far the first sample was from the policy's own, relative."""
        self.bytes_sent = self.bytes_received = 0
        """How many bytes of weights were sent, and how many bytes of answers came back."""

    def prepare(self, request: RolloutRequest) -> None:
        """Learn from the policy what a first sample needs, while nobody uses it."""

    def make(self, request: RolloutRequest, weights: Weights) -> Rollout:
        """Return the rollout of a request with these weights, which are sent if need be.

        Raises:
            Again: there is no answer, or the server is busy or has lost the weights.
            UserError: the server cannot do what the request asks for.
        """
        if self.has != weights.name:
            self.has = None  # if anything fails now, nobody knows which weights the server has
            self.take(weights)
            self.has = weights.name
        return self.sample(request, weights)

    def take(self, weights: Weights) -> None:
        """Send weights; the server answers with the hash of the tensors that it has read."""
        data = weights.file.read_bytes()
        answer = text_of(self.ask("PUT", f"/v1/weights/{weights.name}", content=data))
        self.bytes_sent += len(data)
        try:
            there = json.loads(answer)["weights"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"rollout.engine = {self.url!r}: its answer does not say which weights it has: "
                f"{answer[:100]!r}"
            ) from error
        if there != weights.name:
            raise UserError(
                f"rollout.engine = {self.url!r}: it has the weights {there!r:.20}, but "
                f"{weights.name[:12]} were sent: they were changed on the way, or another run uses "
                "the server"
            )

    def sample(self, request: RolloutRequest, weights: Weights) -> Rollout:
        """Ask for the pictures of a request."""
        ask = Ask(
            texts=[str(text) for text in request.texts],
            seeds=list(request.seeds),
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            scheduler=self.scheduler,
            call=self.policy.model.call,
            weights=weights.name,
        )
        data = self.ask("POST", "/v1/rollout", json=ask.model_dump()).content
        self.bytes_received += len(data)
        return unpack(data, len(request.seeds), weights.name)

    def refuse_gone(self) -> None:
        """See that the server answers.

        Raises:
            Again: it does not.
        """
        self.ask("GET", "/health")

    def ask(self, method: str, path: str, **body: Any) -> httpx.Response:
        """Return the answer to a request.

        Raises:
            Again: there is none, or the server is busy or has other weights.
            UserError: the server refuses the request.
        """
        response = send(self.client, method, path, **body)
        if response.status_code == 409:  # it was started anew, without weights
            self.has = None
            raise Again(text_of(response)[:300])
        if not response.is_success:
            hint = f"; set {TOKEN}" if response.status_code == 401 else ""
            raise UserError(
                f"rollout.engine = {self.url!r} refused with status {response.status_code}: "
                f"{text_of(response)[:300]}{hint}"
            )
        return response
