"""Clients of vLLM-Omni and of SGLang-diffusion, which serve diffusers models and take LoRAs.

They return pictures and no samples. A clean sample is what the pipeline's own VAE makes of the
picture again, so it has the loss of a decoding and an encoding. Their noise is their own: a picture
depends on its seed, but it is not the policy's with that seed, and nothing can be compared with it.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dgpo.core.process import Level
from dgpo.errors import UserError
from dgpo.models.pipeline.arguments import parameters_of
from dgpo.models.pipeline.picture_encoder import PictureEncoder
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.policy import Policy
from dgpo.models.weights import lora_files
from dgpo.pictures import open_picture
from dgpo.rewards.http_client import text_of
from dgpo.rollouts.clients import Server, Weights
from dgpo.rollouts.engine import RolloutRequest

AT_ONCE = 32
"""How many pictures a server is asked for at the same time: it makes its own batches."""


class ImageServer(Server):
    """An ``ImageServer`` is a client of the images API of OpenAI, with the settings that servers
    of diffusion models have added to it: a request for each picture, with its seed.

    Raises:
        UserError: the recipe asks for what such a request cannot carry, or the pipeline's VAE
            encodes no pictures.
    """

    tolerance = None
    known: ClassVar[set[str]] = {"height", "width", "negative_prompt"}
    """The arguments of the pipeline's call that a request can carry."""

    def __init__(self, url: str, policy: Policy, scheduler: str | None, timeout: float) -> None:
        super().__init__(url, policy, scheduler, timeout)
        if other := sorted(policy.model.call.keys() - self.known):
            raise UserError(
                f"rollout.engine = {url!r}: rollout.call.{other[0]} cannot be sent to it, only "
                f"{', '.join(sorted(self.known))}"
            )
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._levels: dict[int, list[Level]] = {}

    def prepare(self, request: RolloutRequest) -> None:
        _ = self._encoder
        model = self.policy.model
        self._levels[request.steps] = model.rollout(
            request.cond.rows(torch.tensor([0])),
            steps=request.steps,
            generators=[torch.Generator().manual_seed(0)],
            decode=False,
        ).levels

    def sample(self, request: RolloutRequest, weights: Weights) -> Rollout:
        def one(text: str, seed: int) -> Image.Image:
            body = {**self._body(request, weights), "prompt": str(text), "seed": seed % 2**31}
            return self._picture(self.ask("POST", "/v1/images/generations", json=body))

        images = list(self._pool.map(one, request.texts, request.seeds))
        encode, where = self._encoder.encode, f"a picture from {self.url}"
        x0 = torch.stack([encode(image, where) for image in images])
        return Rollout(x0, images, self._levels[request.steps])

    def _body(self, request: RolloutRequest, weights: Weights) -> dict[str, Any]:
        call: Mapping[str, Any] = self.policy.model.call
        guidance = "true_cfg_scale" if self._has_true_guidance else "guidance_scale"
        body = {
            "n": 1,
            "response_format": "b64_json",
            "num_inference_steps": request.steps,
            guidance: request.guidance_scale,
        }
        if "height" in call and "width" in call:
            body["size"] = f"{call['width']}x{call['height']}"
        if "negative_prompt" in call or request.guidance_scale != 1:
            body["negative_prompt"] = call.get("negative_prompt", "")
        return body

    def _picture(self, response: Any) -> Image.Image:
        data = response.content
        self.bytes_received += len(data)
        try:
            file = base64.b64decode(response.json()["data"][0]["b64_json"], validate=True)
            return open_picture(io.BytesIO(file), "its picture")
        except (ValueError, KeyError, IndexError, TypeError, UserError) as error:
            raise UserError(
                f"rollout.engine = {self.url!r}: its answer holds no picture ({error}): "
                f"{text_of(response)[:100]!r}"
            ) from error

    @cached_property
    def _encoder(self) -> PictureEncoder:
        return PictureEncoder(self.policy.model, "a picture")

    @cached_property
    def _has_true_guidance(self) -> bool:
        return "true_cfg_scale" in parameters_of(self.policy.model.pipe)


class VllmOmni(ImageServer):
    """A ``VllmOmni`` is a client of ``vllm serve MODEL --omni``.

    Each request names the folder of a LoRA in peft's format, which the server reads, so it must see
    the run folder under the same path.
    """

    start = "vllm serve MODEL --omni"

    def take(self, weights: Weights) -> None:
        folder = self._adapter(weights)
        for old in folder.parent.glob("*.peft"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        lora_files.write(lora_files.read(weights.file), folder, "peft")

    def _body(self, request: RolloutRequest, weights: Weights) -> dict[str, Any]:
        folder = self._adapter(weights)
        lora = {"name": folder.stem, "local_path": str(folder), "scale": 1.0}
        return {**super()._body(request, weights), "lora": lora}

    def _adapter(self, weights: Weights) -> Path:
        return Path(os.path.abspath(weights.file.with_suffix(".peft")))


class Sglang(ImageServer):
    """An ``Sglang`` is a client of ``sglang serve --model-path MODEL``, the server of
    SGLang-diffusion.

    The server merges one LoRA at a time, which it reads from a file, so it must see the run folder
    under the same path.
    """

    start = "sglang serve --model-path MODEL"
    known: ClassVar[set[str]] = {*ImageServer.known, "max_sequence_length"}

    def take(self, weights: Weights) -> None:
        lora = self.policy.lora
        assert lora is not None
        scale, file = lora.alpha / lora.rank, weights.file.with_suffix(".scaled.safetensors")
        for old in file.parent.glob("*.scaled.safetensors"):
            old.unlink()
        # whatever the server knows of an alpha: B holds it, and the rank stands for it
        tensors = load_file(weights.file)
        save_file({key: x * scale if ".lora_B." in key else x for key, x in tensors.items()}, file)
        # one LoRA is merged at a time; where none is, the answer may be an error
        self.client.post("/v1/unmerge_lora_weights", json={})
        body = {"lora_nickname": weights.name, "lora_path": os.path.abspath(file)}
        self.ask("POST", "/v1/set_lora", json=body)
        active = self.ask("GET", "/v1/list_loras").json().get("active", {})
        merged = [one for part in active.values() for one in part if one.get("merged")]
        if [one.get("nickname") for one in merged] != [weights.name] * len(active) or not active:
            raise UserError(
                f"rollout.engine = {self.url!r}: the LoRA {weights.name[:12]} was sent, and the "
                f"server has merged {merged!r:.200}"
            )

    def _body(self, request: RolloutRequest, weights: Weights) -> dict[str, Any]:
        body = {**super()._body(request, weights), "generator_device": "cpu"}
        if "max_sequence_length" in self.policy.model.call:
            body["max_sequence_length"] = self.policy.model.call["max_sequence_length"]
        return body


KINDS = {"": Server, "vllm-omni+": VllmOmni, "sglang+": Sglang}
"""The clients by what stands before ``http://`` in ``rollout.engine``."""


def client_of(url: str, policy: Policy, scheduler: str | None, timeout: float) -> Server:
    """Return the client for an address.

    Args:
        url: ``http://HOST:PORT`` for ``python -m dgpo.rollouts.server``, or such an address after
            ``vllm-omni+`` or ``sglang+``.
        policy: the policy; its arguments, its VAE and its noise levels are asked for.
        scheduler: the sampler's name in the recipe; None for the pipeline's own.
        timeout: how many seconds the server may take for one answer.
    """
    kind = next(kind for kind in reversed(KINDS) if url.startswith(kind))
    return KINDS[kind](url.removeprefix(kind), policy, scheduler, timeout)
