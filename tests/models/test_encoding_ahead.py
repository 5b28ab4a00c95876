"""All prompts of a run are encoded before it: each once, in batches, by all processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo.distributed.processes import SINGLE, Processes
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.encoding_ahead import ROUNDING, TOGETHER, encode_ahead
from families.image import sd3_small
from families.tiny import TINY, build

PROMPTS = [f"{'big ' * (n % 5)}{'red ' * (n // 5)}dog" for n in range(20)]


def made(folder: Path, name: str = "sd3") -> tuple[PipelineModel, list[Any]]:
    """A model with a prompt cache, and what its pipeline is asked to encode from now on."""
    pipe: Any = sd3_small() if name == "sd3" else build(name)
    asked: list[Any] = []
    own = pipe.encode_prompt

    def encode_prompt(**given: Any) -> Any:
        asked.append(given["prompt"])
        return own(**given)

    vars(pipe)["encode_prompt"] = encode_prompt
    return PipelineModel(pipe, call=TINY[name].call, prompt_cache=folder), asked


class Two(Processes):
    """One of two processes; what all are told is what this one says."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2)

    def broadcast_object(self, make: Any, what: str) -> Any:
        return list(range(len(PROMPTS)))

    def all_gather_object(self, value: Any, what: str) -> Any:
        return [value, value]


def test_batches_give_the_embeddings_that_prompts_have_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, asked = made(tmp_path)
    encode_ahead(model._encoder, [*PROMPTS, *PROMPTS], SINGLE)
    batches = [prompts for prompts in asked if isinstance(prompts, list)]
    # a trial with the shortest and the longest, and then all of them, always as many at a time
    assert [len(batch) for batch in batches] == [TOGETHER] * 3
    assert list(dict.fromkeys([*batches[1], *batches[2]])) == PROMPTS
    assert "encoding 20 prompts" in capsys.readouterr().err
    alone = PipelineModel(sd3_small(), call=TINY["sd3"].call).encode(PROMPTS, guidance=True)
    before = len(asked)
    read = model.encode(PROMPTS, guidance=True)
    assert len(asked) == before
    for name, value in alone.kwargs.items():
        far = (read.kwargs[name] - value).abs().max() / value.abs().max()
        assert far <= 1e-5 < ROUNDING[torch.float32], name
    encode_ahead(model._encoder, PROMPTS, SINGLE)
    assert len(asked) == before  # all are there


def test_processes_share_the_work_and_do_what_is_left(tmp_path: Path) -> None:
    found: list[set[str]] = []
    for rank in (0, 1):
        model, asked = made(tmp_path / str(rank))  # machines with a folder each
        encode_ahead(model._encoder, PROMPTS, Two(rank))
        found.append(set(asked[3]))  # after the trial of a batch and of its two prompts alone
        files = list((tmp_path / str(rank)).glob("*/*.safetensors"))
        assert len(files) == len(PROMPTS) + 1
    assert found[0] == set(PROMPTS[:TOGETHER]) and found[1] == set(PROMPTS[TOGETHER:])


def test_a_pipeline_that_pads_to_the_longest_encodes_one_by_one(tmp_path: Path) -> None:
    model, asked = made(tmp_path, "qwen")
    encode_ahead(model._encoder, PROMPTS, SINGLE)
    assert sum(isinstance(prompts, list) for prompts in asked) <= 1  # the trial
    alone = PipelineModel(build("qwen"), call=TINY["qwen"].call)
    for prompt in PROMPTS[:2]:
        one = alone.encode([prompt], guidance=False).kwargs
        other = model.encode([prompt], guidance=False).kwargs
        assert all(value is None or torch.equal(other[name], value) for name, value in one.items())
