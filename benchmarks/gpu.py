"""What a GPU makes of the loop: whether it is right, and the milliseconds, MFU, memory and waits.

    python benchmarks/gpu.py [--out FILE.jsonl] [--no-compile] [--minutes 8] [--tiny]

The pipeline has the shape of Stable Diffusion 3.5 Medium and random weights that are made on the
device; nothing is downloaded. Each part prints a JSON line as soon as it knows something, so that a
run that is cut off has told what it has; a part that fails or takes too long is a line with its
error, and the next one follows. The tables go to stderr at the end. ``--tiny`` tries the program
out on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any
from unittest.mock import patch

import sd35m
import torch

from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.self_check import self_check
from dgpo.models.policy import Policy
from dgpo.planning import advice, measure
from dgpo.recipe import Recipe
from dgpo.trainer import Trainer
from dgpo.training.collector import Collector
from dgpo.training.updater import Updater

STEPS = 10


class LateError(BaseException):
    """A part has taken its time. No handler of errors on the way should keep it."""


@dataclass
class Bench:
    """What is measured where, and what has been told.

    Args:
        tiny: whether shapes are tiny.
        compiled: whether compiled blocks are measured, too.
        minutes: all parts together.
        out: a file that the lines are added to.
    """

    tiny: bool
    compiled: bool
    minutes: float
    out: Path | None
    lines: list[dict[str, Any]] = field(default_factory=list)
    passes: dict[str, list[measure.Measured]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began, self._lines = monotonic(), sys.stdout
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = "bfloat16" if self.device.type == "cuda" else "float32"
        self.rows = (2,) if self.tiny else (8, 16, 32)
        side = 16 if self.tiny else 512
        self.call = {"height": side, "width": side, "max_sequence_length": 16 if self.tiny else 128}

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return 60 * self.minutes - (monotonic() - self._began)

    def say(self, part: str, **facts: Any) -> None:
        """Tell one line."""
        line = {"part": part, "at": round(monotonic() - self._began, 1), **facts}
        self.lines.append(line)
        text = json.dumps(line)
        print(text, file=self._lines, flush=True)
        if self.out is not None:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def pipeline(self) -> Any:
        """A pipeline with the same random weights every time."""
        layers = 2 if self.tiny else None
        return sd35m.pipeline(self.device, self.precision, narrow=self.tiny, layers=layers)

    def run(self, name: str, part: Callable[[Bench], None], limit: float) -> None:
        """Run a part; its error is a line."""
        try:
            # a run tells of itself, and the lines are for programs
            with limited(min(limit, self.left)), redirect_stdout(sys.stderr):
                part(self)
        except (Exception, LateError) as error:
            where = traceback.format_exc()[-600:]
            self.say(name, error=f"{type(error).__name__}: {error}"[:500], where=where)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise LateError in the block once its seconds are over.

    Raises:
        LateError: none are left.
    """
    if seconds <= 0:
        raise LateError("no time is left")

    def late(*_: Any) -> None:
        raise LateError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    # again and again: what is raised inside a callback of C is lost
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def recipe(bench: Bench, folder: str, *more: str) -> Recipe:
    """The published GenEval run, with a reward that costs nothing."""
    return Recipe.load(
        "sd35m-geneval",
        [
            f"run.dir={folder}",
            "rewards={redness: 1.0}",
            "eval={metrics: [], every: 0, at_start: false, limit: 1}",
            f"rollout.call={json.dumps(bench.call)}",
            "prompts={train: pocket-geneval/train, eval: null}",
            "samples.count=0",
            "checkpoint.every=0",
            f"precision={bench.precision}",
            "memory.vae_precision=null",
            "groups_per_iteration=2",
            *(["group_size=4", "rollout.steps=6"] if bench.tiny else []),
            *more,
        ],
    )


def machine(bench: Bench) -> None:
    """What runs here."""
    cuda = bench.device.type == "cuda"
    bench.say(
        "machine",
        device=measure.described(bench.device),
        precision=bench.precision,
        peak_tflops=(measure.peak_of(bench.device, torch.bfloat16) or 0) / 1e12 or None,
        memory_gb=round(torch.cuda.mem_get_info()[1] / 1e9, 1) if cuda else None,
        tf32=torch.backends.cuda.matmul.allow_tf32,
    )


def right(bench: Bench) -> None:
    """The self-check, and the weights of each pass, bit for bit."""
    model = PipelineModel(bench.pipeline(), call=bench.call)
    cond = model.encode(sd35m.PROMPTS[:2], guidance=True)
    report = self_check(model, cond, guidance_scale=4.5, steps=STEPS)
    bench.say("self-check", ok=report.ok, points=len(report.points), step_error=report.step_error)
    seeds = [torch.Generator().manual_seed(row) for row in range(2)]
    made = model.rollout(cond, steps=4, generators=seeds, decode=False)
    point = made.x0, made.levels[1], cond
    with torch.no_grad():
        base = model.predict(*point)
        policy = Policy(model, recipe(bench, "unused").lora)
        for parameter in policy.parameters():
            parameter.normal_(std=0.01)
        policy.old.update(0.0)
        found = {weights: policy.predict(*point, weights) for weights in ("policy", "old", "ref")}
    graph = policy.predict(*point).detach()
    bench.say(
        "weights",
        reference_is_base=torch.equal(found["ref"], base),
        old_is_policy=torch.equal(found["old"], found["policy"]),
        same_with_gradients=torch.equal(graph, found["policy"]),
        finite=bool(base.isfinite().all()),
        lora_moves=float((found["policy"] - base).abs().max()),
    )


def resumed(bench: Bench) -> None:
    """A run that was stopped and went on ends with the weights of one that was not."""
    small = ["groups_per_iteration=1", "group_size=4", "rollout.batch=4", "train.micro_batch=4",
             "rollout.steps=4", "algorithm.timesteps={count: 2, indices: [0, 3]}"]  # fmt: skip

    def trained(folder: str, iterations: int, resume: bool = False) -> list[torch.Tensor]:
        own = recipe(bench, folder, *small, f"train.iterations={iterations}")
        trainer = Trainer(bench.pipeline(), train_dataset=sd35m.PROMPTS, recipe=own, resume=resume)
        trainer.train()
        return [parameter.detach().clone() for parameter in trainer.policy.parameters()]

    with TemporaryDirectory() as folder:
        whole, again = (trained(f"{folder}/{name}", 2) for name in ("whole", "again"))
        trained(f"{folder}/parts", 1)
        parts = trained(f"{folder}/parts", 2, resume=True)
    bench.say(
        "resume",
        equal=all(map(torch.equal, whole, parts)),
        largest=_largest(whole, parts),
        # where two equal runs differ, kernels add up in no fixed order
        repeats=all(map(torch.equal, whole, again)),
        largest_of_repeats=_largest(whole, again),
    )


def _largest(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def passes(bench: Bench) -> None:
    """Each pass of the loop alone, without and with compiled blocks."""
    model = PipelineModel(bench.pipeline(), call=bench.call)
    policy = Policy(model, recipe(bench, "unused").lora)
    own = measure.Passes(policy, model.encode(sd35m.PROMPTS[:1], guidance=True))
    for compiled in (False, True)[: 1 + bench.compiled]:
        if compiled:
            measure.compile_blocks(model.denoisers.values())
        found = bench.passes["compiled" if compiled else "as it is"] = []
        for rows in bench.rows:
            for one in own.measure(rows, seconds=0.05 if bench.tiny else 0.5):
                found.append(one)
                bench.say("pass", compiled=compiled, **asdict(one))


@contextmanager
def waits_of(iteration: int, device: torch.device) -> Iterator[Counter[str]]:
    """Count where the host waits while pictures are collected and learned from."""
    found: Counter[str] = Counter()

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        begun = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            begun += 1
            if begun < iteration:
                return call(*args, **kwargs)
            with measure.waits(device) as waits:
                made = call(*args, **kwargs)
            found.update(waits)
            return made

        return run

    collect, update = watched(Collector.__call__), watched(Updater.update)
    with patch.object(Collector, "__call__", collect), patch.object(Updater, "update", update):
        yield found


def loop(bench: Bench, micro_batch: int, compiled: bool = False) -> None:
    """An iteration by phase: the second of three, of which the first warms up and the last is
    looked at for waits."""
    with TemporaryDirectory() as folder:
        own = recipe(bench, folder + "/run", "train.iterations=3",
                     f"train.micro_batch={4 if bench.tiny else micro_batch}")  # fmt: skip
        pipe = bench.pipeline()
        if compiled:
            measure.compile_blocks([pipe.transformer])
        if cuda := bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(pipe, train_dataset=sd35m.PROMPTS, recipe=own)
        with waits_of(3, bench.device) as waits:
            trainer.train()
        text = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8")
    before, row, _ = map(json.loads, text.splitlines())
    phases = ("rollout", "reward", "train", "iteration")
    seconds = {phase: round(row[f"seconds_{phase}"], 3) for phase in phases}
    bench.say(
        "iteration",
        compiled=compiled,
        micro_batch=own.train.micro_batch,
        pictures=own.images_per_iteration,
        seconds=seconds,
        pictures_a_second=round(own.images_per_iteration / row["seconds_iteration"], 3),
        forwards=row["forwards"] - before["forwards"],
        backwards=row["backwards"] - before["backwards"],
        peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        waits=dict(waits.most_common()),
    )


def tables(bench: Bench) -> str:
    """What a reader wants to know first."""
    told: list[str] = []
    for line in bench.lines:
        facts = {k: v for k, v in line.items() if k not in ("part", "at", "waits", "where")}
        if line["part"] != "pass":
            told.append(f"{line['part']}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    for name, found in bench.passes.items():
        told += ["", f"passes, {name}", advice.table(found)]
    plain, compiled = (bench.passes.get(name, []) for name in ("as it is", "compiled"))
    told += ["", *advice.told_of_waits(plain), *advice.advice(plain, compiled, bench.precision)]
    waits = [line for line in bench.lines if line["part"] == "iteration"]
    for place, count in (waits[0].get("waits") or {}).items() if waits else ():
        told.append(f"  {count} in an iteration: {place}")
    return "\n".join(told)


def main(arguments: list[str] | None = None) -> Bench:
    """Run every part; what they have told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a file for the JSON lines")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    given = parser.parse_args(arguments)
    compiled = torch.cuda.is_available() if given.compile is None else given.compile
    bench = Bench(given.tiny, compiled, given.minutes, given.out)
    bench.run("machine", machine, 60)
    bench.run("right", right, 60)
    bench.run("passes", passes, 210)
    for size in (8, 16)[given.tiny :]:
        bench.run("iteration", lambda own, size=size: loop(own, size), 90)
    bench.run("resume", resumed, 90)
    if compiled:
        bench.run("iteration", lambda own: loop(own, 16, compiled=True), 150)
    print(tables(bench), file=sys.stderr)
    return bench


if __name__ == "__main__":
    main()
