"""Runs of several gloo processes on this machine, of the tiny pipelines in float64."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

import dgpo.distributed.watch
from algorithms.table import predicts_noise
from dgpo import Callback
from dgpo.cli import main
from dgpo.distributed.processes import current_processes, leave
from dgpo.evaluation.benchmarks import Benchmark
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.trainer import Trainer
from families.tiny import build, sd3_small, sd15
from reliable import processes, steps_twice
from tiny_runs import PROMPTS, rows, settings

ENOUGH = 300.0
"""Seconds for a world of processes to end; a slow machine needs a part of it."""


class Ended(NamedTuple):
    """How a world of processes ended: exit codes and what each wrote to stderr, by rank, and the
    time when the last of them was gone."""

    codes: list[int]
    errors: list[str]
    gone: float


def world(size: int, target: Callable[..., None], folder: Path, *arguments: Any) -> Ended:
    """Run ``target(*arguments)`` in so many processes that a launcher would have started."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = processes()
    files = [folder / f"stderr-{rank}.txt" for rank in range(size)]
    started = [
        context.Process(target=_process, args=(rank, size, port, str(file), target, arguments))
        for rank, file in enumerate(files)
    ]
    for process in started:
        process.start()
    until = time.monotonic() + ENOUGH
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
    gone = time.time()
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()
    codes = [process.exitcode for process in started]
    return Ended(codes, [file.read_text() if file.exists() else "" for file in files], gone)


def alone(target: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Run it in one process, without a launcher."""
    ended = world(1, target, folder, *arguments)
    assert ended.codes == [0], ended.errors[0]


def all_well(size: int, target: Callable[..., None], folder: Path, *arguments: Any) -> None:
    ended = world(size, target, folder, *arguments)
    assert ended.codes == [0] * size, "\n".join(ended.errors)


def _process(
    rank: int, size: int, port: int, file: str, target: Callable[..., None], arguments: Any
) -> None:
    torch.set_num_threads(1)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 2)
    sys.stderr = os.fdopen(handle, "w", buffering=1)
    if size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import dgpo.run.loggers.tensorboard
    import dgpo.run.tracking

    dgpo.run.tracking.curve = lambda *args: None  # pyright: ignore
    dgpo.run.loggers.tensorboard.event_writer = lambda *args: _NoEvents()
    code = 0
    try:
        target(*arguments)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if code:
            traceback.print_exc()
    leave()
    sys.stderr.flush()
    os._exit(int(code or 0))


class _NoEvents:
    def add_scalar(self, *args: Any) -> None: ...
    def close(self) -> None: ...


def patchy(images: Any, prompts: list[str]) -> list[float]:
    """The brightness, but no difference between the pictures of a dog."""
    values = brightness(images, prompts)
    return [0.5 if "dog" in text else value for text, value in zip(prompts, values, strict=True)]


def run(
    folder: Path,
    name: str,
    reward: Any = patchy,
    dtype: torch.dtype = torch.float64,
    resume: bool = False,
    callbacks: Any = (),
    **changes: Any,
) -> Trainer:
    """A trainer by a registered algorithm whose groups no number of processes divides."""
    own = steps_twice(name)
    eval_dataset = changes.pop("eval_dataset", None)
    train_dataset = changes.pop("train_dataset", PROMPTS)
    recipe = settings(
        **{
            "group_size": 5,
            # a policy gradient takes two steps, each on half of the groups
            "groups_per_iteration": 2 if "updates" in own else 3,
            "rollout": {"batch": 2},
            "lora": None,
            "guards": {"hang_minutes": 2.0},
            **changes,
            "train": {"iterations": 2, "lr": 1e-3, "micro_batch": 2, **changes.pop("train", {})},
        }
    )
    recipe |= {"algorithm": {"name": name, **own}, "run": {"dir": str(folder)}}
    pipe = sd3_small()
    if predicts_noise(name):
        pipe = sd15()
        recipe["lora"] = recipe["lora"] and {"rank": 4, "targets": ["to_q", "to_k"]}
    return Trainer(
        model=pipe.to(dtype),
        reward_funcs=reward,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        recipe=recipe,
        resume=resume,
        callbacks=callbacks,
    )


def train(folder: Path, name: str, changes: dict[str, Any] | None = None) -> None:
    run(folder, name, **(changes or {})).train()


RAGGED = [
    "a cat",
    "a photo of the red dog on the small blue house on the big table of the cat",
    "red dog",
]
"""Of different length where a pipeline takes no mask."""


def train_ragged(folder: Path, changes: dict[str, Any]) -> None:
    """Train a pipeline that makes a pass of its own for each length of a prompt, for one iteration;
    the lengths of its training passes go to a file of each process."""
    changes = {**(changes or {}), "group_size": 3, "groups_per_iteration": 3}
    changes["train"] = {**changes.get("train", {}), "iterations": 1}
    recipe = settings(**changes, eval={"at_start": True}, run={"dir": str(folder)})
    trainer = Trainer(build("cogview4"), brightness, RAGGED, RAGGED, recipe=recipe)
    (denoiser,) = trainer.model.denoisers.values()
    lengths: list[int] = []

    def note(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            lengths.append(named["encoder_hidden_states"].shape[1])

    denoiser.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    file = folder / f"lengths-{os.environ.get('RANK', 0)}.json"
    file.write_text(json.dumps(lengths))


def train_with(folder: Path, reward: Any, changes: dict[str, Any]) -> None:
    run(folder, "dgpo", reward, **{"rollout": {"batch": None}, **changes}).train()


class OneOf(Callback):
    """A callback of which only process 1 does something, after the first iteration."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_iteration_end(self, state: Any, control: Any, **what: Any) -> None:
        if state.is_main_process or state.iteration != 1:
            return
        if self.what == "raise":
            raise LookupError("no such shelf")
        setattr(control, self.what, True)


def train_with_callback(folder: Path, what: str) -> None:
    """Train three iterations; the history of each process goes to a file."""
    changes: dict[str, Any] = {"train": {"iterations": 3}, "eval_dataset": PROMPTS[:2]}
    trainer = run(folder, "dgpo", callbacks=[OneOf(what)], **changes)
    trainer.train()
    done = [("overall" in row, row["iteration"]) for row in trainer.state.log_history]
    rank = os.environ.get("RANK", "0")
    (folder / f"history-{rank}.json").write_text(json.dumps(done))


def train_losing(folder: Path) -> None:
    """The decoder breaks some pictures, the same ones in whatever process and batch."""
    changes: dict[str, Any] = {"eval_dataset": PROMPTS * 4, "eval": {"every": 1}}
    trainer = run(folder, "dgpo", **changes)
    vae = trainer.model.pipe.vae
    decode = vae.decode

    def broken(latents: torch.Tensor, *given: Any, **named: Any) -> Any:
        (made,) = decode(latents, *given, **{**named, "return_dict": False})
        return (made.masked_fill((latents[:, :1, :1, :1] > 1), torch.nan),)

    vae.decode = broken
    trainer.train()


def train_on_other_rows(folder: Path, key: str) -> None:
    """Each process is given another value in a column of its training or held-out rows."""
    given = [{"prompt": text, "want": int(os.environ["RANK"])} for text in PROMPTS]
    run(folder, "dgpo", **{"eval_dataset": PROMPTS, key: given}).train()


def on_training_pass(trainer: Trainer, number: int, act: Callable[[], Any]) -> None:
    """Act in this process's training pass of that number."""
    passes = itertools.count(1)

    def note(module: Any, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled() and next(passes) == number:
            act()

    (denoiser,) = trainer.model.denoisers.values()
    denoiser.register_forward_hook(note)


def train_until(folder: Path, name: str, number: int, changes: dict[str, Any]) -> None:
    """Train; process 1 gets a SIGTERM in its training pass of that number."""
    trainer = run(folder, name, **changes)
    if os.environ["RANK"] == "1":
        on_training_pass(trainer, number, lambda: signal.raise_signal(signal.SIGTERM))
    trainer.train()


def counted(folder: Path, name: str, changes: dict[str, Any], what: str) -> None:
    """Train; how often FSDP2 sums gradients (``foreach_reduce``) or gathers weights
    (``foreach_all_gather``) in each update goes to a file, and the number of its units."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as inside

    right, calls, counts = getattr(inside, what), itertools.count(), list[int]()

    def count(*args: Any, **kwargs: Any) -> Any:
        next(calls)
        return right(*args, **kwargs)

    setattr(inside, what, count)
    trainer = run(folder, name, **changes)
    update = trainer.updater.update

    def counting(*args: Any, **kwargs: Any) -> Any:
        before = next(calls)
        found = update(*args, **kwargs)
        counts.append(next(calls) - before - 1)
        return found

    trainer.updater.update = counting
    trainer.train()
    (denoiser,) = trainer.model.denoisers.values()
    units = sum(isinstance(module, FSDPModule) for module in denoiser.modules())
    (folder / "counts.json").write_text(json.dumps([units, counts]))


def hang_in_pieces(folder: Path, where: str) -> None:
    """Process 1 never comes out of a block of the sharded denoiser, in the forward or the backward
    pass, where the other one waits for it inside FSDP2."""
    trainer = run(folder, "dgpo", train={"sharding": "fsdp2"}, groups_per_iteration=2)
    everyone = current_processes()
    (denoiser,) = trainer.model.denoisers.values()

    def hang(*_: Any) -> None:
        assert everyone.watch is not None
        everyone.watch.hang_seconds = 3.0
        if everyone.rank == 1:
            time.sleep(30_000)

    def note(module: Any, inputs: Any, output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        if not made.requires_grad:
            return
        if where == "forward":
            hang()
        else:
            made.register_hook(hang)

    denoiser.get_submodule("transformer_blocks.0.attn").register_forward_hook(note)
    trainer.train()


def train_unlike(folder: Path) -> None:
    """Each process is given another learning rate."""
    run(folder, "dgpo", train={"lr": 1e-3 * (1 + int(os.environ["RANK"]))}).train()


def sleep_in_one(folder: Path) -> None:
    """The processes meet once, then one of them never comes back."""
    everyone = current_processes()
    everyone.all_gather_object(None, "the first meeting")
    assert everyone.watch is not None
    everyone.watch.hang_seconds = 1.0
    if everyone.rank == 1:
        time.sleep(10_000)
    everyone.all_gather_object(None, "the second meeting")


def _asked(limit: int) -> bool:
    """Whether process 1 is asked about more pictures than the two of the trial."""
    return os.environ.get("RANK") == "1" and limit > 2


def raises(images: Any, prompts: list[str]) -> list[float]:
    if _asked(len(images)):
        print(f"raised at {time.time()}", file=sys.stderr, flush=True)
        raise LookupError("no such judge")
    return brightness(images, prompts)


def hangs(images: Any, prompts: list[str]) -> list[float]:
    if _asked(len(images)):
        time.sleep(20_000)
    return brightness(images, prompts)


def kills(images: Any, prompts: list[str]) -> list[float]:
    """As the kernel does to the process whose number is in ``KILLED`` when memory runs out."""
    if len(images) > 2 and os.environ.get("RANK") == os.environ["KILLED"]:
        print(f"killed at {time.time()}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return brightness(images, prompts)


def train_one_killed(folder: Path, rank: int) -> None:
    os.environ["KILLED"] = str(rank)
    train_with(folder, kills, {})


def terminates(images: Any, prompts: list[str]) -> list[float]:
    if _asked(len(images)):
        signal.raise_signal(signal.SIGTERM)
    return brightness(images, prompts)


def train_and_note(folder: Path, notes: str, changes: dict[str, Any]) -> None:
    """Train; ``noted`` writes into the file ``notes``."""
    os.environ["NOTES"] = notes
    train(folder, "best_of_n", changes)


def five_dogs() -> list[dict[str, Any]]:
    return [{"prompt": f"{n} red dog", "seed": n} for n in range(5)]


HERE = "distributed.together:"
SIZE = {"height": 16, "width": 16}
DOGS = Benchmark("dogs", HERE + "five_dogs", (HERE + "noted", HERE + "of_all"), 2, call=SIZE)


def evaluate(folder: Path) -> None:
    """``dgpo eval``; what it prints goes to a file of each process."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["NOTES"] = str(folder / "scored.txt")
    handle = os.open(folder / f"printed-{os.environ.get('RANK', 0)}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    sys.stdout = os.fdopen(handle, "w")
    sys.argv = ["dgpo", "eval", "--model", "families.tiny:sd3_small", "--benchmark", HERE + "DOGS"]
    sys.argv += ["--batch", "2", "--json", str(folder / "report.json")]
    try:
        main()
    finally:
        sys.stdout.flush()


def hangs_in_one(images: Any, prompts: list[str]) -> list[float]:
    if os.environ.get("RANK") == "1":
        time.sleep(40_000)
    return brightness(images, prompts)


HANGING = Benchmark("hanging", HERE + "five_dogs", (HERE + "hangs_in_one",), 2, call=SIZE)


def evaluate_hanging(folder: Path) -> None:
    """``dgpo eval``, which has no recipe with a limit."""
    dgpo.distributed.watch.HANG = 10.0
    sys.argv = ["dgpo", "eval", "--model", "families.tiny:sd3_small"]
    sys.argv += ["--benchmark", HERE + "HANGING"]
    main()


def noted(images: Any, prompts: list[str]) -> list[float]:
    """The brightness; the prompts that it was asked about are written down."""
    with open(os.environ["NOTES"], "a") as file:
        file.writelines(f"{text}\n" for text in prompts)
    return brightness(images, prompts)


def of_all(images: Any, prompts: list[str]) -> tuple[float, float, float]:
    """A metric of the whole set that tells a wrong order or a missing picture."""
    values = brightness(images, prompts)
    found = sum((place + 1) * value for place, value in enumerate(values))
    return found, float(len(images)), float(len(prompts))


of_all.of_set = True  # pyright: ignore[reportFunctionMemberAccess]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and moments of the last checkpoint."""
    last = max((folder / "checkpoints").glob("[0-9]" * 8))
    return load_file(last / "tensors.safetensors")


def apart(one: Path, two: Path) -> float:
    """The largest difference of a weight, an average or a moment."""
    here, there = weights(one), weights(two)
    assert here.keys() == there.keys() and any(name.endswith("exp_avg") for name in here)
    return max(float((here[name] - there[name]).abs().max()) for name in here)


def check_figures(one: Path, two: Path, tolerance: float, counts: bool = True) -> None:
    """What was measured is that of all pictures, each counted once; sharded processes make passes
    for nothing, which count (``counts`` is false)."""
    first, second = rows(one), rows(two)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.startswith("seconds") or (name == "backwards" and not counts):
                continue
            if name == "forwards":  # groups that are split are predicted twice
                continue
            assert b[name] == pytest.approx(a[name], rel=tolerance, abs=tolerance), name
