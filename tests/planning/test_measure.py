"""Passes are measured, waits are found by file and line; the benchmark of GPUs runs on a CPU."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark_files import benchmark
from commands import run
from dgpo.models import PipelineModel
from dgpo.models.policy import Policy
from dgpo.planning import measure
from dgpo.planning.advice import advice, table, told_of_waits
from dgpo.planning.measure import Measured
from dgpo.recipe.sections import LoraSettings
from families.tiny import sd3_small

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def passes() -> measure.Passes:
    model = PipelineModel(sd3_small(), call={"height": 16, "width": 16})
    return measure.Passes(
        Policy(model, LoraSettings(rank=4)), model.encode(["red dog"], guidance=True)
    )


@pytest.fixture(scope="module")
def found(passes: measure.Passes) -> list[Measured]:
    return list(passes.measure(2, seconds=0.0))


def test_every_pass_of_an_iteration_is_measured(found: list[Measured]) -> None:
    assert [one.name for one in found] == [
        "reference", "policy", "training", "rollout step", "decode",
    ]  # fmt: skip
    for one in found:
        assert one.error is None and one.rows == 2
        assert 0 < one.host_ms <= one.ms
        assert one.mfu is None and one.peak_gb is None  # what the CPU does not tell
    by_name = {one.name: one for one in found}
    # guidance doubles the rows
    assert by_name["rollout step"].tflop == pytest.approx(2 * by_name["reference"].tflop, rel=0.01)
    assert by_name["training"].tflop > 1.5 * by_name["policy"].tflop


def test_operations_are_those_of_the_products() -> None:
    a = torch.randn(3, 5)
    assert measure.flops_of(lambda: a @ a.T) == 2 * 3 * 5 * 3
    q = torch.randn(1, 2, 7, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert measure.flops_of(lambda: attention(q, q, q)) == 2 * 2 * (2 * 7 * 8 * 7)


def test_measuring_leaves_no_gradients_and_moves_nothing(passes: measure.Passes) -> None:
    before = [parameter.detach().clone() for parameter in passes.policy.parameters()]
    list(passes.measure(1, seconds=0.0))
    after = passes.policy.parameters()
    assert all(map(torch.equal, before, after))
    assert all(parameter.grad is None for parameter in after)


def test_a_pass_that_fails_hides_no_other(
    passes: measure.Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(passes.policy, "predict", broken)
    found = {one.name: one for one in passes.measure(1, seconds=0.0)}
    assert found["training"].error == "out of memory" and found["decode"].error is None
    assert "gradient_checkpointing" in str(advice(list(found.values()), [], "bfloat16"))


def test_a_number_that_the_host_reads_is_found_by_its_line() -> None:
    with measure.waits(CPU) as found:
        torch.ones(3).sum().item()
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    assert found == {f"planning/test_measure.py:{line}": 1}


def test_waits_for_a_gpu_are_those_that_torch_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    shown = warnings.showwarning
    with measure.waits(torch.device("cuda")) as found:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=1)
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
        warnings.warn("something else", stacklevel=1)
    assert found == {f"planning/test_measure.py:{line}": 2}
    assert modes == [0, "warn", 0] and warnings.showwarning is shown


def test_advice_follows_from_the_figures() -> None:
    slow = Measured("training", 8, ms=80, host_ms=79, peak_gb=10.0, waits={"a.py:1": 3})
    fast = Measured("training", 16, ms=100, host_ms=20, peak_gb=20.0)
    ref = Measured("reference", 8, ms=10, host_ms=1, peak_gb=5.0)
    policy = Measured("policy", 8, ms=14, host_ms=1, peak_gb=5.0)
    compiled = Measured("policy", 8, ms=7, host_ms=1, peak_gb=5.0)
    found = [slow, fast, ref, policy]
    said = "\n".join(advice(found, [compiled], "float32"))
    for part in (
        "precision=bfloat16",
        "train.micro_batch=16: 1.60 times as fast as 8 at once",
        "lora.targets: the LoRA makes a pass 1.40 times as long",
        "compiled blocks: up to 2.00 times as fast",
        "waits for the host (training)",
    ):
        assert part in said
    assert advice([ref], [], "bfloat16") == []
    assert told_of_waits(found) == ["the host waits for the device", "  3 in training: a.py:1"]
    assert table(found).splitlines()[1].split()[:4] == ["training", "8", "80.0", "10.00"]


def test_the_command_prints_passes_and_refuses_rows_that_are_no_numbers() -> None:
    output = run("bench", "pocket", "--rows", "1", "--precision", "float32").output
    assert "StableDiffusion3Pipeline, float32, cpu, torch" in output
    for word in ("reference", "training", "rollout step", "decode", "ms a row"):
        assert word in output
    for rows in ("0", "8,x"):
        refused = run("bench", "pocket", "--rows", rows, code=2)
        assert f"--rows {rows}: give whole numbers" in refused.stderr


def test_the_benchmark_of_gpus_runs_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = benchmark("gpu")
    bench = gpu.main(["--tiny", "--no-compile", "--out", str(tmp_path / "lines.jsonl")])
    written = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert written == bench.lines
    assert not [line for line in bench.lines if line.get("error")]
    of = {line["part"]: line for line in bench.lines}
    assert of["self-check"]["ok"]
    weights = of["weights"]
    assert weights["reference_is_base"] and weights["old_is_policy"] and weights["finite"]
    assert weights["lora_moves"] > 0
    assert of["resume"]["equal"] and of["resume"]["repeats"]
    assert of["iteration"]["pictures"] == 8 and of["iteration"]["backwards"] == 32
    assert of["iteration"]["waits"]
    assert "passes, as it is" in capsys.readouterr().err


def test_a_part_that_fails_or_takes_too_long_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = benchmark("gpu")
    bench = gpu.Bench(tiny=True, compiled=False, minutes=1, out=None)

    def endless(_: Any) -> None:
        while True:
            pass

    def broken(_: Any) -> None:
        raise ValueError("no such card")

    bench.run("first", endless, 0.05)
    bench.run("second", broken, 10)
    bench.minutes = 0
    bench.run("third", broken, 10)
    errors = [line["error"] for line in bench.lines]
    assert errors == [
        "LateError: not done after 0 s", "ValueError: no such card", "LateError: no time is left",
    ]  # fmt: skip
    assert len(capsys.readouterr().out.splitlines()) == 3
