"""Embeddings on disk: bit for bit the same, nobody else's, and whole or made again."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_cache import PromptCache, encoder_fingerprint
from families.image import sd3_small
from families.tiny import TINY

PROMPTS = ["red dog", "a photo of cat"]


def model(folder: Path, pipe: Any = None, **call: Any) -> PipelineModel:
    return PipelineModel(
        pipe or sd3_small(), call={**TINY["sd3"].call, **call}, prompt_cache=folder
    )


def count_encodings(pipe: Any) -> list[str]:
    """The prompts that the pipeline encodes from now on."""
    seen, own = [], pipe.encode_prompt

    def encode_prompt(**given: Any) -> Any:
        seen.append(given["prompt"])
        return own(**given)

    vars(pipe)["encode_prompt"] = encode_prompt
    return seen


def test_another_process_reads_bit_for_bit_what_was_encoded(tmp_path: Path) -> None:
    pipe = sd3_small().to(torch.bfloat16)
    made = model(tmp_path, pipe).encode(PROMPTS, guidance=True)
    again = sd3_small().to(torch.bfloat16)
    encoded = count_encodings(again)
    read = model(tmp_path, again).encode(PROMPTS, guidance=True)
    assert encoded == []
    assert read.kwargs.keys() == made.kwargs.keys()
    for name, value in made.kwargs.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(read.kwargs[name], value), name


def test_another_model_prompt_or_setting_is_encoded_anew(tmp_path: Path) -> None:
    model(tmp_path).encode(PROMPTS, guidance=False)
    pipe = sd3_small()
    encoded = count_encodings(pipe)
    model(tmp_path, pipe).encode([*PROMPTS, "big table"], guidance=False)
    assert encoded == ["big table"]
    model(tmp_path, pipe, max_sequence_length=12).encode(PROMPTS, guidance=False)
    assert encoded == ["big table", *PROMPTS]
    with torch.no_grad():
        pipe.text_encoder_2.text_projection.weight[0, 0] += 1e-2
    before = model(tmp_path, sd3_small()).encode(PROMPTS, guidance=False)
    changed = model(tmp_path, pipe).encode(PROMPTS, guidance=False)
    assert encoded == ["big table", *PROMPTS, *PROMPTS]
    name = "pooled_prompt_embeds"
    assert not torch.equal(changed.kwargs[name], before.kwargs[name])


def test_the_denoiser_does_not_count(tmp_path: Path) -> None:
    pipe = sd3_small()
    known = encoder_fingerprint(pipe)
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1.0)
    assert encoder_fingerprint(pipe) == known
    pipe.tokenizer_2.add_tokens(["zebra"])
    assert encoder_fingerprint(pipe) != known


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_another_version_of_a_library_is_another_file(library: str, monkeypatch: Any) -> None:
    pipe = sd3_small()
    known = encoder_fingerprint(pipe)
    versions = {name: version(name) for name in ("diffusers", "transformers")}
    versions[library] = "0.0.1"
    monkeypatch.setattr("dgpo.models.pipeline.prompt_cache.version", versions.__getitem__)
    assert encoder_fingerprint(pipe) != known


@pytest.mark.parametrize("left", [0, 7, 100, -3])
def test_a_file_that_was_cut_short_is_made_again(tmp_path: Path, left: int) -> None:
    made = model(tmp_path).encode(PROMPTS[:1], guidance=False)
    (file,) = tmp_path.glob("*/*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    pipe = sd3_small()
    encoded = count_encodings(pipe)
    again = model(tmp_path, pipe).encode(PROMPTS[:1], guidance=False)
    assert encoded == PROMPTS[:1] and file.read_bytes() == whole
    assert torch.equal(again.kwargs["prompt_embeds"], made.kwargs["prompt_embeds"])


def test_lists_and_what_is_none_come_back_as_they_were(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, sd3_small())
    shared = torch.arange(6.0).reshape(2, 3)
    given = {"prompt_embeds": [shared[0], shared], "mask": None, "pooled": shared[1], "none": []}
    file = cache.file("a", {})
    cache.save(file, given)
    read = cache.load(file)
    assert cache.holds(file) and not cache.holds(file.with_suffix(".other"))
    assert read is not None and read["mask"] is None and read["none"] == []
    assert torch.equal(read["pooled"], shared[1])
    parts: list[Tensor] = read["prompt_embeds"]
    assert [part.tolist() for part in parts] == [shared[0].tolist(), shared.tolist()]
    assert list(tmp_path.glob("**/*.tmp")) == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"memory\.prompt_cache"):
        PromptCache(tmp_path / "file", sd3_small())


def test_the_next_prompts_are_read_before_they_are_asked_for(tmp_path: Path) -> None:
    made = model(tmp_path).encode(PROMPTS, guidance=False)
    reading = model(tmp_path)
    read: list[Path] = []
    disk = reading._encoder.disk
    load = disk.load

    def noting(file: Path) -> Any:
        read.append(file)
        return load(file)

    disk.load = noting
    reading.prefetch([*PROMPTS, "big table"])
    again = reading.encode(PROMPTS, guidance=False)
    assert sorted(read) == sorted(map(reading._encoder.file, [*PROMPTS, "big table"]))
    assert torch.equal(again.kwargs["prompt_embeds"], made.kwargs["prompt_embeds"])
    reading.encode(["big table"], guidance=False)  # its file was not there, and it is made
    assert len(read) == 3 and disk.holds(reading._encoder.file("big table"))
    reading.prefetch(PROMPTS)
    assert len(read) == 3  # they are in memory
