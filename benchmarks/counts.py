"""Count what a pass and an optimiser step cost, by figures that are the same on every machine.

    python benchmarks/counts.py && make docs-tables    # the table of docs/performance.md
    python benchmarks/counts.py --before               # its column "before"

The passes are those of a policy of the shape of Stable Diffusion 3.5 Medium on the meta device: 8
pictures of 512 pixels, bfloat16, the LoRA of the recipe. A kernel is an operation of aten that
writes something; one whose result is a view counts as none, and attention as one. Host times are
those of a network of the same depth and tiny widths on the CPU: ratios to the bare denoiser in one
run. Reads of an optimiser step are those of the pocket model.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import sd35m
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dgpo.core.process import Level
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.probes import replaced
from dgpo.models.policy import Policy
from dgpo.planning.measure import Reads
from dgpo.planning.meta_memory import Numbers
from dgpo.planning.skeleton import skeleton
from dgpo.recipe import Recipe
from dgpo.trainer import Trainer

RESULTS = Path(__file__).resolve().parent / "results" / "counts.json"
ROWS = 8
CALL = {"height": 512, "width": 512, "max_sequence_length": 256}
_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach",
            "_unsafe_view", "_reshape_alias", "alias"}  # fmt: skip
"""Operations that launch no kernel though they return no view."""


class Kernels(TorchDispatchMode):
    """Counts the kernels, operations and bytes of what runs on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def add(self, flops: int, moved: int) -> None:
        """Count one kernel; bytes are those of kernels that multiply no matrices."""
        self.found["kernels"] += 1
        self.found["flops"] += flops
        self.found["bytes"] += 0 if flops else moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if view or func.overloadpacket.__name__ in _NOTHING:
            return made
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        written = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
        tensors = [*read.values(), *written]
        if any(tensor.is_meta for tensor in tensors):
            counted = flop_registry.get(func.overloadpacket)
            flops = counted(*args, **(kwargs or {}), out_val=made) if counted else 0
            self.add(flops, sum(map(_bytes, tensors)))
        return made


def _bytes(tensor: Tensor) -> int:
    # an expanded tensor is read once
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Attention(torch.autograd.Function):
    """Fused attention: one kernel forward, one backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.kernels = kernels
        kernels.add(4 * q.numel() * k.shape[-2], 0)
        return q.new_empty(q.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        ctx.kernels.add(10 * q.numel() * k.shape[-2], 0)  # five products instead of two
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class Asked(Numbers):
    """Answers for meta tensors where code asks for numbers, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asks = func in self._ASKED or func in (Tensor.tolist, Tensor.cpu, Tensor.numpy)
        self.count += bool(asks and args[0].is_meta)
        return super().__torch_function__(func, types, args, kwargs)


def counted(forward: Callable[[], Any], backward: bool = False) -> list[dict[str, float]]:
    """What a pass costs for a picture, and then its backward pass if that is wanted."""
    found = []
    with ExitStack() as stack:
        kernels, asked = Kernels(), stack.enter_context(Asked())
        attention = lambda q, k, v, *_, **__: Attention.apply(q, k, v, kernels)  # noqa: E731
        stack.enter_context(replaced(nn.functional, scaled_dot_product_attention=attention))
        stack.enter_context(kernels)
        stack.enter_context(torch.set_grad_enabled(backward))
        calls = [forward, lambda: made.float().square().mean().backward()][: 1 + backward]
        for call in calls:
            kernels.found.clear()
            asked.count = 0
            made = call()
            found.append(
                {
                    "kernels": kernels.found["kernels"],
                    "TFLOP a picture": round(kernels.found["flops"] / ROWS / 1e12, 3),
                    "memory-bound GB a picture": round(kernels.found["bytes"] / ROWS / 1e9, 2),
                    "numbers read by the host": asked.count,
                }
            )
    return found


def passes() -> dict[str, dict[str, float]]:
    """The passes of the real shape."""
    pipe = skeleton(str(sd35m.CONFIGS), "bfloat16")
    model = PipelineModel(pipe, call=CALL)
    policy = Policy(model, Recipe.load("sd35m-geneval").lora)
    with Numbers(), torch.no_grad():
        cond = model.encode(sd35m.PROMPTS[:1], guidance=True)
    cond = cond.rows(torch.zeros(ROWS, dtype=torch.long))
    xt = torch.empty(ROWS, 16, 64, 64, device="meta", dtype=torch.bfloat16)
    level = Level(torch.zeros((), device="meta"), 0.5)

    def predicted(weights: Any = "policy", scale: float = 1.0) -> Callable[[], Tensor]:
        return lambda: policy.predict(xt, level, cond, weights, scale)

    predicted("ref")()  # what is found out once is found out
    forward, backward = counted(predicted(), backward=True)
    return {
        "reference": counted(predicted("ref"))[0],
        "policy, no gradient": counted(predicted())[0],
        "policy, training": forward,
        "its backward pass": backward,
        "rollout step with guidance": counted(predicted(scale=4.5))[0],
    }


def host() -> dict[str, dict[str, float]]:
    """Host time of a prediction beside that of the bare denoiser."""
    torch.set_num_threads(1)
    call = {"height": 16, "width": 16, "max_sequence_length": 8}
    model = PipelineModel(sd35m.pipeline("cpu", "bfloat16", narrow=True), call=call)
    policy = Policy(model, Recipe.load("sd35m-geneval", ["lora.rank=4"]).lora)
    cond = model.encode(sd35m.PROMPTS[:2], guidance=True)
    seeds = [torch.Generator().manual_seed(row) for row in range(2)]
    made = model.rollout(cond, steps=4, generators=seeds, decode=False)
    given: dict[str, Any] = {}
    denoiser = model.denoisers["transformer"]
    note = lambda module, args, named: given.update(named)  # noqa: E731
    hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        policy.predict(made.x0, made.levels[1], cond)
    hook.remove()

    def of(weights: Any) -> dict[str, float]:
        place = policy.reference if weights == "ref" else nullcontext
        spent: list[tuple[float, float]] = []
        with torch.no_grad():
            for _ in range(34):  # in turn, so that a busy machine slows both down
                whole = _seconds(lambda: policy.predict(made.x0, made.levels[1], cond, weights))
                with place():
                    spent.append((whole, _seconds(lambda: denoiser(**given))))
        whole, bare = (1e6 * median(times) for times in zip(*spent[4:], strict=True))
        return {
            "host microseconds of the bare denoiser": round(bare),
            "host microseconds of a prediction": round(whole),
            "prediction / bare denoiser": round(whole / bare, 2),
        }

    return {"reference": of("ref"), "policy, no gradient": of("policy")}


def _seconds(call: Callable[[], Any]) -> float:
    began = process_time()
    call()
    return process_time() - began


class Copies(TorchFunctionMode):
    """Counts the tensors that are brought to the host, wherever they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (Tensor.tolist, Tensor.cpu, Tensor.numpy)
        return func(*args, **(kwargs or {}))


def steps() -> dict[str, dict[str, float]]:
    """Reads of one optimiser step of the pocket model, for two sizes of micro-batches."""
    found: dict[str, dict[str, float]] = {}
    for size in (8, 2):
        with TemporaryDirectory() as folder:
            recipe = Recipe.load(
                "pocket-geneval",
                [
                    f"run.dir={folder}/run",
                    "group_size=4",
                    "groups_per_iteration=2",
                    "rewards={brightness: 1.0}",
                    f"train={{iterations: 2, micro_batch: {size}}}",
                    "prompts.eval=null",
                    "eval={every: 0, at_start: false, metrics: []}",
                    "samples.count=0",
                    "checkpoint.every=0",
                ],
            )
            trainer = Trainer(recipe=recipe)
            update, told = trainer.updater.update, []

            def watched(*args: Any, update: Any = update, told: Any = told, **kwargs: Any) -> Any:
                with Copies() as copies, Reads() as reads:
                    figures = update(*args, **kwargs)
                told.append((sum(reads.scalars.values()), copies.count))
                return figures

            with replaced(trainer.updater, update=watched):
                trainer.train()
            batches = recipe.algorithm.timesteps.count * 8 // size  # pyright: ignore
            reads, copies = told[-1]
            name = f"optimiser step of {batches} micro-batches"
            found[name] = {"numbers read by the host": reads, "tensors brought to the host": copies}
    return found


def merged(*parts: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The figures of all parts by what they are about."""
    found: dict[str, dict[str, float]] = {}
    for part in parts:
        for what, figures in part.items():
            found[what] = {**found.get(what, {}), **figures}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Count, and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", action="store_true", help="keep it as the column before")
    given = parser.parse_args(arguments)
    found = merged(passes(), host(), steps())
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known["before" if given.before else "after"] = found
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
