"""Servers of vLLM-Omni and SGLang-diffusion, as stand-ins that speak their documented HTTP."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from threading import Lock
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from dgpo.errors import UserError
from dgpo.models.loras import put_lora
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.picture_encoder import PictureEncoder
from dgpo.models.weights import lora_files
from dgpo.recipe import Recipe
from dgpo.training.collector import Collector
from families.tiny import sd3_small
from tiny_runs import light, rows, settings, trainer

RUN: dict[str, Any] = {
    "train": {"iterations": 2, "lr": 1e-2},
    "rollout": {"guidance_scale": 2.0, "scheduler": None},
    "lora": {"rank": 2, "alpha": 6},
}
IMAGES = {"prompt", "n", "size", "response_format", "seed", "num_inference_steps"}
IMAGES |= {"negative_prompt", "guidance_scale", "true_cfg_scale"}


class StandIn:
    """What both servers have: pictures of a pipeline, from a body of the images API."""

    taken = IMAGES

    def __init__(self) -> None:
        self.pipe, self.lock = sd3_small(), Lock()
        self.bodies: list[dict[str, Any]] = []
        self.pictures: list[Any] = []
        self.merged: str | None = None
        self.files: list[dict[str, torch.Tensor]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else {}
        with self.lock:
            status, answer = self.answer(request.url.path, body)
        return httpx.Response(status, json=answer)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/health":
            return 200, {}
        if path != "/v1/images/generations":
            return 404, {"detail": "Not Found"}
        if unknown := body.keys() - self.taken:
            return 422, {"detail": f"unknown: {unknown}"}
        assert isinstance(body["prompt"], str) and 1 <= body["n"] <= 10
        assert re.fullmatch(r"\d+x\d+", body["size"]) and body["response_format"] == "b64_json"
        self.bodies.append(body)
        width, height = map(int, body["size"].split("x"))
        made = self.pipe(
            body["prompt"],
            negative_prompt=body.get("negative_prompt"),
            height=height,
            width=width,
            num_inference_steps=body["num_inference_steps"],
            guidance_scale=body["guidance_scale"],
            generator=torch.Generator().manual_seed(body["seed"]),
        ).images[0]
        self.pictures.append(made)
        file = io.BytesIO()
        made.save(file, "PNG")
        text = base64.b64encode(file.getvalue()).decode()
        return 200, {"created": 1, "data": [{"b64_json": text, "url": None}]}

    def put(self, path: Path) -> None:
        if self.merged:
            self.pipe.unload_lora_weights()
        put_lora(self.pipe, lora_files.read(path), fresh=True)


class VllmOmni(StandIn):
    taken = IMAGES | {"lora"}

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/images/generations":
            lora = body["lora"]
            folder = Path(lora["local_path"])
            config = json.loads((folder / "adapter_config.json").read_text())
            assert folder.is_absolute() and (config["r"], config["lora_alpha"]) == (2, 6)
            assert set(lora) <= {"name", "local_path", "scale", "int_id"} and lora["scale"] == 1.0
            if self.merged != lora["name"]:
                self.files.append(load_file(folder / "adapter_model.safetensors"))
                self.put(folder)
                self.merged = lora["name"]
        return super().answer(path, body)


class Sglang(StandIn):
    taken = IMAGES | {"generator_device", "max_sequence_length"}

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/unmerge_lora_weights":
            had, self.merged = self.merged, None
            if had:
                self.pipe.unload_lora_weights()
            return (200, {}) if had else (400, {"detail": "no LoRA is merged"})
        if path == "/v1/set_lora":
            if self.merged:
                return 400, {"detail": "unmerge first"}
            file = Path(body["lora_path"])
            assert file.is_absolute() and file.suffix == ".safetensors"
            self.files.append(load_file(file))
            self.put(file)
            self.merged = body["lora_nickname"]
            return 200, {"message": "ok"}
        if path == "/v1/list_loras":
            one = {"nickname": self.merged, "path": "x", "merged": True, "strength": 1.0}
            active = {"transformer": [one]} if self.merged else {}
            return 200, {"loaded_adapters": [], "active": active}
        return super().answer(path, body)


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


def stand_in(kind: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = kind()

    def connect(who: str, url: str, token: str, timeout: float) -> httpx.Client:
        assert url == "http://there:1"
        return httpx.Client(transport=httpx.MockTransport(made), base_url=url)

    monkeypatch.setattr("dgpo.rollouts.clients.connect", connect)
    return made


@pytest.mark.parametrize(("kind", "prefix"), [(VllmOmni, "vllm-omni+"), (Sglang, "sglang+")])
def test_a_run_learns_from_the_servers_pictures(
    kind: type[StandIn], prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, seen = stand_in(kind, monkeypatch), []
    score = Collector.score
    monkeypatch.setattr(
        Collector, "score", lambda self, made: seen.append(made) or score(self, made)
    )
    rollout = {**RUN["rollout"], "engine": f"{prefix}http://there:1"}
    run = trainer(tmp_path, **{**RUN, "rollout": rollout})
    run.train()
    assert len(server.bodies) == 16 and len({body["seed"] for body in server.bodies}) == 16
    body = server.bodies[0]
    assert (body["num_inference_steps"], body["guidance_scale"]) == (run.recipe.rollout.steps, 2.0)
    assert body["negative_prompt"] == "" and {b["prompt"] for b in server.bodies} <= {
        row.text for row in run.prompts
    }
    # each iteration's LoRA, and what the policy had when it asked
    first, second = server.files
    assert first.keys() == second.keys() and len(first) == len(run.policy.parameters())
    assert any(not torch.equal(first[name], second[name]) for name in first)
    ups = [tensor for name, tensor in second.items() if "lora_B" in name]
    assert max(float(tensor.abs().max()) for tensor in ups) == pytest.approx(
        1e-2 * (3 if kind is Sglang else 1),
        rel=0.01,  # one step of Adam, times alpha / rank
    )
    # a sample is what the pipeline's VAE makes of the picture
    made = seen[1].rollout
    model = PipelineModel(sd3_small(), call={"height": 16, "width": 16})
    encoder = PictureEncoder(model, "a")
    for image, x0 in zip(made.images, made.x0, strict=True):
        torch.testing.assert_close(encoder.encode(image), x0, rtol=1e-4, atol=1e-4)
        assert any(image.tobytes() == one.tobytes() for one in server.pictures)
    levels = [level.sigma for level in made.levels]
    assert len(levels) == run.recipe.rollout.steps and levels == sorted(levels, reverse=True)
    assert rows(tmp_path)[1]["grad_norm"] > 0


def test_what_such_a_server_says_wrongly_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = stand_in(Sglang, monkeypatch)
    rollout = {**RUN["rollout"], "engine": "sglang+http://there:1"}
    changes = {**RUN, "rollout": rollout}
    answer = server.answer
    for path, given, words in (
        ("/v1/list_loras", (200, {"active": {}}), r"the server has merged \[\]"),
        ("/v1/set_lora", (500, {"detail": "no such file"}), "status 500.*no such file"),
        ("/v1/images/generations", (200, {"data": []}), "its answer holds no picture"),
        ("/v1/images/generations", (200, {"data": [{"b64_json": "AAAA"}]}), "holds no picture"),
    ):
        server.answer = lambda at, body, path=path, given=given: (  # pyright: ignore
            given if at == path else answer(at, body)
        )
        with pytest.raises(UserError, match=words):
            trainer(tmp_path / f"{len(list(tmp_path.iterdir()))}", **changes).train()


def test_what_a_request_cannot_carry_is_refused(tmp_path: Path) -> None:
    engine = "vllm-omni+http://there:1"
    rollout = {"engine": engine, "call": {"height": 16, "width": 16, "max_sequence_length": 8}}
    with pytest.raises(UserError, match=r"rollout.call.max_sequence_length cannot be sent"):
        trainer(tmp_path, **{**RUN, "rollout": {**RUN["rollout"], **rollout}})
    with pytest.raises(UserError, match=r"own sampler; set rollout.scheduler to null"):
        Recipe.from_dict(settings(rollout={"engine": engine, "scheduler": "euler"}))
    for wrong, words in (
        ("vllm+http://there:1", "should be an address"),
        ("http://a:1,http://a:1", "is there twice"),
        ([], "should be an address"),
        (7, "should be an address"),
    ):
        with pytest.raises(UserError, match=words):
            Recipe.from_dict(settings(rollout={"engine": wrong}))
    several = Recipe.from_dict(settings(rollout={"engine": "http://a:1, http://b:1"}))
    assert several.rollout.engine == ["http://a:1", "http://b:1"]
