"""Compiled passes are few graphs and the same numbers; what a machine cannot do is said clearly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from dgpo import Callback
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.self_check import self_check
from dgpo.models.policy import Policy
from dgpo.models.weights import compute
from dgpo.models.weights.compute import compile_denoisers, is_compiled, missing_compiler, set_up
from dgpo.recipe import Recipe
from dgpo.recipe.sections import ComputeSettings, LoraSettings
from families.tiny import build, sd3_small
from tiny_runs import settings, trainer, without_times

CALL = {"height": 16, "width": 16}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    set_up({}, ComputeSettings())
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that are made, in place of a compiler: each runs as it was traced."""
    made: list[Any] = []

    def note(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(compute, "BACKEND", note)
    return made


class Case:
    """A compiled policy whose LoRA has moved, and a point."""

    def __init__(self, how: Any, dtype: torch.dtype) -> None:
        self.model = PipelineModel(sd3_small().to(dtype), call=CALL)
        self.cond = self.model.encode(["a photo of cat", "red dog"], guidance=True)
        rows = [torch.Generator().manual_seed(row) for row in range(2)]
        made = self.model.rollout(self.cond, steps=2, generators=rows, decode=False, record=True)
        self.point = made.steps[0].sample, made.steps[0].level, self.cond
        compile_denoisers(self.model.denoisers, how)
        self.policy = Policy(self.model, LoraSettings(rank=2, alpha=6), 0)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        self.base = made.steps[0].output

    def passes(self) -> dict[str, Tensor]:
        """What every kind of pass answers."""
        predict, point = self.policy.predict, self.point
        with torch.no_grad():
            made = {"ref": predict(*point, "ref"), "old": predict(*point, "old")}
            made["policy"] = predict(*point, "policy")
        with self.policy.rolling(), torch.no_grad():
            made["rollout"] = self.model.predict(*point)
        trained = predict(*point, "policy")
        found = torch.autograd.grad(trained.float().square().mean(), self.policy.parameters())
        gradient = torch.cat([one.flatten() for one in found])
        return {**made, "trained": trained.detach(), "gradient": gradient}


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("blocks", torch.bfloat16),
        ("blocks", torch.float32),
        pytest.param("full", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("full", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_all_weights_are_one_graph_and_the_numbers_are_the_eager_ones(
    how: Any, dtype: torch.dtype, graphs: list[Any]
) -> None:
    case = Case(how, dtype)
    assert is_compiled(case.model.denoisers) and case.policy.passes.gated == (
        dtype != torch.float32
    )
    found = case.passes()
    # with gradients and without, and the last block of SD3 is of another kind
    assert len(graphs) == 2 * (2 if how == "blocks" else 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        again = case.passes()
    with torch.compiler.set_stance("force_eager"):
        eager = case.passes()
    for name, one in found.items():
        assert torch.equal(one, again[name]), name
        assert torch.equal(one, eager[name]), name
    assert torch.equal(found["ref"], case.base)
    assert not torch.equal(found["policy"], case.base)


@pytest.mark.slow
@pytest.mark.skipif(
    missing_compiler({"net": nn.Linear(1, 1)}) is not None, reason="torch finds no C++ compiler"
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_the_compiler_s_numbers_are_near_the_eager_ones(
    dtype: torch.dtype, tolerance: float
) -> None:
    case = Case("blocks", dtype)
    found = case.passes()
    with torch.compiler.set_stance("fail_on_recompile"):
        again = case.passes()
    with torch.compiler.set_stance("force_eager"):
        eager = case.passes()
    for name, one in found.items():
        assert torch.equal(one, again[name]), name
        assert (one - eager[name]).abs().max() <= tolerance * eager[name].abs().max(), name


class Graphs(Callback):
    """How many graphs there are at the end of each iteration."""

    def __init__(self, graphs: list[Any]) -> None:
        self.graphs, self.counts = graphs, []

    def on_iteration_end(self, state: Any, control: Any, **what: Any) -> None:
        self.counts.append(len(self.graphs))


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_run_and_goes_on_as_it(
    tmp_path: Path, graphs: list[Any]
) -> None:
    """The self-check passes, and no iteration after the first compiles anything."""
    changes: dict[str, Any] = {
        "train": {"iterations": 3, "micro_batch": 4},
        "checkpoint": {"every": 2},
    }
    trainer(tmp_path / "eager", **changes).train()
    changes["compute"] = {"compile": "blocks"}
    watch = Graphs(graphs)
    trainer(tmp_path / "whole", callbacks=[watch], **changes).train()
    assert graphs and watch.counts == [watch.counts[0]] * 3
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "eager")

    stopped = {**changes, "train": {**changes["train"], "iterations": 2}}
    trainer(tmp_path / "stopped", **stopped).train()
    trainer(tmp_path / "stopped", resume=True, **changes).train()
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "whole")


@pytest.mark.slow
def test_the_self_check_holds_with_guidance_and_one_row(graphs: list[Any]) -> None:
    model = PipelineModel(sd3_small(), call=CALL)
    compile_denoisers(model.denoisers, "blocks")
    assert self_check(model, guidance_scale=3.0, steps=5).ok and graphs


def refused(**asked: Any) -> str:
    with pytest.raises(UserError) as caught:
        set_up({"transformer": sd3_small().transformer}, ComputeSettings(**asked))
    return str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where no GPU is")
def test_what_only_a_gpu_can_do_is_refused() -> None:
    assert refused(tf32=True).startswith("compute.tf32 = true: TF32 is")
    assert refused(cudnn_benchmark=True).startswith("compute.cudnn_benchmark = true: there is no")
    assert "kernel of NVIDIA GPUs" in refused(attention="_native_cudnn")


def test_an_attention_that_cannot_be_chosen_is_refused() -> None:
    assert "has no such backend (did you mean '_native_math'" in refused(attention="native_math")
    assert "SD3Transformer2DModel) calls torch's own attention; use native," in refused(
        attention="xformers"
    )
    flux = build("flux").transformer
    with pytest.raises(UserError, match=r"compute\.attention = 'flash': Flash Attention"):
        set_up({"transformer": flux}, ComputeSettings(attention="flash"))


def test_attention_is_chosen_for_the_denoiser_and_put_back() -> None:
    sd3, flux = sd3_small().transformer, build("flux").transformer
    active = _AttentionBackendRegistry._active_backend
    before = _cur_sdpa_kernel_backends(with_priority=True)
    set_up({"transformer": sd3}, ComputeSettings(attention="_native_math"))
    assert _cur_sdpa_kernel_backends(with_priority=True)[0] == SDPBackend.MATH
    set_up({"transformer": flux}, ComputeSettings(attention="_native_math"))
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
    chosen = {p._attention_backend.value for p in flux.attn_processors.values()}
    assert chosen == {"_native_math"} and _AttentionBackendRegistry._active_backend == active


def test_switches_of_the_process_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    set_up({}, ComputeSettings(tf32=True, cudnn_benchmark=True))
    assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (True, True, True)
    set_up({}, ComputeSettings(tf32=False))
    assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (False, False, before[2])
    set_up({}, ComputeSettings())
    assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == before


def test_without_a_compiler_or_blocks_compiling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "missing_compiler", lambda denoisers: "there is no compiler")
    assert refused(compile="blocks") == (
        "compute.compile = 'blocks': there is no compiler; use off"
    )
    monkeypatch.setattr(compute, "BACKEND", "eager")
    with pytest.raises(UserError, match=r"transformer \(Linear\) repeats no blocks; use full"):
        compile_denoisers({"transformer": nn.Linear(2, 2)}, "blocks")


def test_the_blocks_are_those_that_diffusers_names() -> None:
    net: Any = nn.Sequential(nn.Linear(1, 1), nn.ModuleList([nn.ReLU(), nn.Linear(1, 1)]))
    assert [type(one) for one in compute.repeated_blocks(net)] == [nn.Linear]
    net._repeated_blocks = ["Linear"]
    assert len(compute.repeated_blocks(net)) == 2


def test_settings_of_recipes() -> None:
    for given, meant in ((True, "blocks"), (False, "off"), ("full", "full")):
        recipe = Recipe.from_dict(settings(compute={"compile": given}))
        assert recipe.compute.compile == meant
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(UserError, match=r"compute\.compile"):
        Recipe.from_dict(settings(compute={"compile": "some"}))
    with pytest.raises(UserError, match=r"compute\.compile = 'full': not possible with train"):
        Recipe.from_dict(settings(compute={"compile": "full"}, train={"sharding": "fsdp2"}))
