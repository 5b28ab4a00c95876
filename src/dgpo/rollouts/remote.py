"""A server makes the rollouts: it gets the LoRA when that has changed, and returns the pictures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgpo.errors import UserError
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.policy import Policy, RollingWeights
from dgpo.prompts.caption import Caption
from dgpo.rewards.http_client import connect, text_of, told_by
from dgpo.rollouts.engine import LocalEngine, RolloutEngine, RolloutRequest
from dgpo.rollouts.wire import Ask, hash_of, unpack
from dgpo.secrets import token_in

TOLERANCE = 0.1
"""The largest relative difference (root mean square) that the first sample may have from the
policy's own. Other kernels round otherwise; another model differs by about 1."""
TOKEN = "DGPO_ROLLOUT_TOKEN"
"""The name of the environment variable that holds the server's token."""


class RemoteEngine(RolloutEngine):
    """A ``RemoteEngine`` is a client of ``python -m dgpo.rollouts.server`` or a server like it.

    The policy also makes the first row of the first batch: a server that has another model or
    sampler, or does not apply the LoRA, is found before anything is trained.

    Args:
        policy: the policy, whose LoRA is sent.
        url: the server's address.
        scheduler: the sampler's name in the recipe; None for the pipeline's own.
        timeout: how many seconds the server may take for one answer.

    Raises:
        UserError: the policy has no LoRA, httpx is not installed, or the address is none.
    """

    def __init__(
        self, policy: Policy, url: str, scheduler: str | None = None, timeout: float = 600.0
    ) -> None:
        if policy.lora is None:
            raise UserError(
                "rollout.engine: the server gets a LoRA, and lora: null trains none; set lora or "
                "rollout.engine: null"
            )
        self._client = connect("rollout.engine", url, token_in(TOKEN), timeout)
        self._policy, self._url, self._scheduler = policy, url, scheduler
        self._sent: str | None = None
        self._checked = False
        self.bytes_sent = self.bytes_received = 0
        """How many bytes of weights were sent, and how many bytes of answers came back."""
        self.difference = float("nan")
        """How far the first sample was from the policy's own, relative."""

    @contextmanager
    def holding(self, weights: RollingWeights) -> Iterator[None]:
        with tempfile.TemporaryDirectory() as folder:
            self._policy.save(folder, weights)
            files = sorted(Path(folder).rglob("*.safetensors"))
            if len(files) != 1:
                raise UserError(f"rollout.engine: one LoRA file can be sent, got {len(files)}")
            data = files[0].read_bytes()
        name = hash_of(data)
        if name != self._sent:
            self._send(name, data)
        if self._checked:
            yield
            return
        with self._policy.rolling(weights):  # the first batch is compared with the policy's own
            yield

    def rollout(self, request: RolloutRequest) -> Rollout:
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
        ask = Ask(
            texts=[str(text) for text in request.texts],
            seeds=list(request.seeds),
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            scheduler=self._scheduler,
            call=self._policy.model.call,
            weights=self._sent,
        )
        data = self._ask("POST", "/v1/rollout", json=ask.model_dump()).content
        self.bytes_received += len(data)
        made = unpack(data, len(request.seeds), self._sent)
        if not self._checked:
            self._compare(request, made)
            self._checked = True
        device, dtype = self._policy.model.device, made.x0.dtype
        return Rollout(made.x0.to(device, dtype), made.images, made.levels)

    def _send(self, name: str, data: bytes) -> None:
        """Send weights; the server answers with the hash of the tensors that it has read."""
        self._sent = None  # if anything fails now, nobody knows which weights the server has
        answer = text_of(self._ask("PUT", f"/v1/weights/{name}", content=data))
        self.bytes_sent += len(data)
        try:
            there = json.loads(answer)["weights"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"rollout.engine = {self._url!r}: its answer does not say which weights it has: "
                f"{answer[:100]!r}"
            ) from error
        if there != name:
            raise UserError(
                f"rollout.engine = {self._url!r}: it has the weights {there!r:.20}, but "
                f"{name[:12]} were sent: they were changed on the way, or another run uses the "
                "server"
            )
        self._sent = name

    def _compare(self, request: RolloutRequest, made: Rollout) -> None:
        """Check the first row of an answer against the policy's own sample."""
        row = request.cond.rows(torch.tensor([0]))
        one = replace(request, texts=request.texts[:1], cond=row, seeds=request.seeds[:1])
        own = LocalEngine(self._policy).rollout(one)
        sigmas = [level.sigma for level in made.levels]
        wanted = [level.sigma for level in own.levels]
        same = len(sigmas) == len(wanted) and own.x0.shape[1:] == made.x0.shape[1:]
        same = same and all(abs(a - b) < 1e-3 for a, b in zip(sigmas, wanted, strict=True))
        self.difference = _apart(made.x0[:1], own.x0) if same else float("inf")
        if not self.difference <= TOLERANCE:
            raise UserError(
                f"rollout.engine = {self._url!r}: the first picture differs from the policy's own "
                f"by {self.difference:.3g} (allowed {TOLERANCE}): start the server with the model "
                f"{self._policy.model.pipe.config.get('_name_or_path') or 'of the recipe'!r}, the "
                "same sampler and precision, and see that it applies the LoRA"
            )

    def _ask(self, method: str, path: str, **body: Any) -> Any:
        import httpx

        try:
            response = self._client.request(method, path, **body)
        except httpx.HTTPError as error:
            raise UserError(
                f"rollout.engine = {self._url!r}: no answer ({told_by(self._client, error)}); "
                "start it with: python -m dgpo.rollouts.server MODEL"
            ) from None
        if response.status_code != 200:
            hint = f"; set {TOKEN}" if response.status_code == 401 else ""
            raise UserError(
                f"rollout.engine = {self._url!r} refused with status {response.status_code}: "
                f"{text_of(response)[:300]}{hint}"
            )
        return response


def _apart(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).pow(2).mean().sqrt() / other.pow(2).mean().sqrt().clamp_min(1e-12))
