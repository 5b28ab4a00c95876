"""Prompt embeddings: encoded once, named after what the pipeline returns, padded with masks."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.call_encoders import encodes_itself, remembered_encoding
from dgpo.models.pipeline.prompt_encoder import Conditioning, PromptEncoder, returned_names
from dgpo.models.pipeline.row_groups import parts
from families.tiny import TINY, build, tiny_model


class Ragged:
    """Encodes a prompt into as many tokens as it has words; a mask only where told to."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode_prompt(
        self, prompt: str, device: Any = None, num_images_per_prompt: int = 1, width_of: int = 3
    ) -> tuple[Tensor, None]:
        self.encoded.append(prompt)
        prompt_embeds = torch.full((1, len(prompt.split()), width_of), float(len(prompt)))
        prompt_embeds_mask = None
        return prompt_embeds, prompt_embeds_mask

    def __call__(
        self,
        prompt_embeds: Any = None,
        prompt_embeds_mask: Any = None,
        negative_prompt_embeds: Any = None,
        negative_prompt_embeds_mask: Any = None,
        negative_prompt: Any = None,
        width_of: int = 2,
    ) -> None: ...


class Unmasked(Ragged):
    def __call__(self, prompt_embeds: Any = None) -> None: ...


class Listed(Ragged):
    def encode_prompt(self, prompt: str, device: Any = None) -> list[Tensor]:
        prompt_embeds = [torch.ones(len(prompt.split()), 2)]
        return prompt_embeds


class Masked:
    """Its call takes all that its ``encode_prompt`` returns."""

    def encode_prompt(self, prompt: str) -> Any:
        prompt_embeds = prompt_embeds_mask = prompt
        return prompt_embeds, prompt_embeds_mask

    def __call__(self, prompt: str, prompt_embeds: Any, prompt_embeds_mask: Any) -> None: ...


class LosesTheMask(Masked):
    def __call__(self, prompt: str, prompt_embeds: Any) -> None: ...


class OtherName(Masked):
    def encode_prompt(self, prompt: str) -> Any:
        text_states = prompt
        return text_states


class NoName(Masked):
    def encode_prompt(self, prompt: str) -> Any:
        return [prompt]


@pytest.mark.parametrize(
    ("kind", "itself"),
    [
        (Masked, False),
        (LosesTheMask, True),
        (OtherName, True),
        (NoName, True),
        (diffusers.FluxPipeline, False),
        (diffusers.QwenImageEditPipeline, False),
        (diffusers.PRXPipeline, False),
        (diffusers.HiDreamImagePipeline, True),  # a row for each layer of its encoder
        (diffusers.Kandinsky5T2IPipeline, True),  # packed, with the lengths of the prompts
        (diffusers.LongCatImagePipeline, True),
    ],
)
def test_the_text_is_given_where_its_embedding_cannot_be(kind: Any, itself: bool) -> None:
    assert encodes_itself(object.__new__(kind)) == itself


def test_names_come_from_the_return_statement() -> None:
    assert returned_names(Ragged.encode_prompt) == ("prompt_embeds", "prompt_embeds_mask")
    assert returned_names(Listed.encode_prompt) == ("prompt_embeds",)
    sd3 = returned_names(type(build("sd3")).encode_prompt)
    assert sd3[0] == "prompt_embeds" and sd3[3] == "negative_pooled_prompt_embeds"
    with pytest.raises(UserError, match="source"):
        returned_names(len)


def test_names_are_found_under_a_condition_and_before_a_device() -> None:
    longcat = returned_names(diffusers.LongCatImagePipeline.encode_prompt)
    assert longcat == ("prompt_embeds", "text_ids")
    prx = returned_names(diffusers.PRXPipeline.encode_prompt)
    assert prx[:3] == ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds")

    def encode_prompt(size: int) -> Any:
        return torch.zeros(size)

    with pytest.raises(UserError, match="plain names"):
        returned_names(encode_prompt)


@pytest.mark.parametrize("name", ["stable_audio", "ace_step"])
def test_a_pipeline_that_is_given_the_text_encodes_it_once(name: str) -> None:
    model = tiny_model(name)
    seen: list[int] = []
    model.pipe.text_encoder.register_forward_hook(lambda *_: seen.append(1))
    cond = model.encode(["red dog"], guidance=False).repeat(2)
    rollout = model.rollout(cond, steps=3, decode=False)
    known = len(seen)
    for level in rollout.levels:
        model.predict(rollout.x0, level, cond)
    model.rollout(cond, steps=3, decode=False)
    assert known and len(seen) == known
    model.rollout(model.encode(["a cat"], guidance=False), steps=3, decode=False)
    assert len(seen) > known


def test_rows_of_one_text_have_a_negative_prompt_each() -> None:
    model = tiny_model("longcat")
    cond = model.encode(["red dog"], guidance=True).repeat(2)
    assert cond.kwargs["negative_prompt"] == ["", ""]
    given = [torch.Generator().manual_seed(0) for _ in range(2)]
    made = model.rollout(cond, steps=2, guidance_scale=3.0, generators=given, decode=False).x0
    torch.testing.assert_close(made[0], made[1])


def test_what_is_remembered_of_texts_is_bounded() -> None:
    pipe = build("ace_step")
    seen: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda *_: seen.append(1))
    encode = remembered_encoding(pipe, cache_bytes=1)["encode_prompt"]
    for text in ("red dog", "red dog", "a cat", "red dog"):
        encode(prompt=text, lyrics="", device=torch.device("cpu"))
    assert len(seen) == 3


def test_each_distinct_prompt_is_encoded_once() -> None:
    pipe = Ragged()
    encoder = PromptEncoder(pipe, {})
    encoder.encode(["one two", "three four", "one two"], guidance=False)
    encoder.encode(["three four", "five six"], guidance=False)
    assert pipe.encoded == ["one two", "three four", "five six"]


def test_the_negative_prompt_is_encoded_once() -> None:
    pipe = Ragged()
    encoder = PromptEncoder(pipe, {"negative_prompt": "no thing"})
    cond = encoder.encode(["one two", "three four"], guidance=True)
    encoder.encode(["one two"], guidance=True)
    assert pipe.encoded.count("no thing") == 1
    assert cond.guided
    assert cond.kwargs["negative_prompt_embeds"].shape == (2, 2, 2)
    assert not encoder.encode(["one two"], guidance=False).guided


def test_the_cache_is_bounded() -> None:
    pipe = Ragged()
    encoder = PromptEncoder(pipe, {}, cache_bytes=2 * 2 * 2 * 4)  # two prompts of two tokens
    encoder.encode(["a b", "c d", "e f"], guidance=False)
    encoder.encode(["e f", "c d"], guidance=False)
    assert pipe.encoded == ["a b", "c d", "e f"]
    encoder.encode(["a b"], guidance=False)
    assert pipe.encoded[-1] == "a b"


def test_the_default_of_the_call_wins_over_that_of_encode_prompt() -> None:
    assert PromptEncoder(Ragged(), {}).encode(["a"], False).kwargs["prompt_embeds"].shape[-1] == 2
    given = PromptEncoder(Ragged(), {"width_of": 5}).encode(["a"], False)
    assert given.kwargs["prompt_embeds"].shape[-1] == 5


def test_prompts_of_different_length_are_padded_and_masked() -> None:
    cond = PromptEncoder(Ragged(), {}).encode(["a", "a b c", "a"], guidance=False)
    assert cond.kwargs["prompt_embeds"].shape == (3, 3, 2)
    assert cond.kwargs["prompt_embeds_mask"].tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert cond.kwargs["prompt_embeds"][0, 1:].abs().sum() == 0
    equal = PromptEncoder(Ragged(), {}).encode(["a b", "c d"], guidance=False)
    assert equal.kwargs["prompt_embeds_mask"] is None


def test_prompts_of_different_length_without_a_mask_stay_apart() -> None:
    cond = PromptEncoder(Unmasked(), {}).encode(["a", "a b", "c"], guidance=False)
    assert cond.ragged and [row.shape[1] for row in cond.kwargs["prompt_embeds"]] == [1, 2, 1]
    assert [part.tolist() for part in parts(cond)] == [[0, 2], [1]]
    again = cond.repeat(2)
    assert [part.tolist() for part in parts(again)] == [[0, 1, 4, 5], [2, 3]]
    picked = cond.rows(torch.tensor([2, 0, 2]))
    assert not picked.ragged and picked.kwargs["prompt_embeds"].shape == (3, 1, 3)
    assert cond.rows(torch.tensor([], dtype=torch.long)).kwargs["prompt_embeds"].shape[0] == 0


def test_a_mask_that_is_not_returned_says_nothing_of_padding() -> None:
    class Silent(Ragged):
        def encode_prompt(self, prompt: str, device: Any = None) -> Tensor:
            prompt_embeds = torch.ones(1, len(prompt.split()), 3)
            return prompt_embeds

    assert PromptEncoder(Silent(), {}).encode(["a", "a b"], guidance=False).ragged


def test_lists_stay_lists() -> None:
    cond = PromptEncoder(Listed(), {}).encode(["a", "a b c"], guidance=False)
    assert [len(entry) for entry in cond.kwargs["prompt_embeds"]] == [1, 3]
    picked = cond.repeat(2).rows(torch.tensor([3, 0]))
    assert [len(entry) for entry in picked.kwargs["prompt_embeds"]] == [3, 1]


def test_rows_follow_the_index() -> None:
    cond = Conditioning({"prompt_embeds": torch.arange(4.0)[:, None], "mask": None}, 4)
    picked = cond.rows(torch.tensor([2, 2, 0]))
    assert picked.size == 3
    assert picked.kwargs["prompt_embeds"].flatten().tolist() == [2.0, 2.0, 0.0]
    assert picked.kwargs["mask"] is None


def test_no_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="no prompts"):
        PromptEncoder(Ragged(), {}).encode([], guidance=False)


@pytest.mark.parametrize("name", ["sd3", "sd15", "sdxl", "flux", "wan"])
def test_one_row_is_what_the_pipeline_encodes(name: str) -> None:
    model = PipelineModel(build(name), call=TINY[name].call)
    cond = model.encode(["red dog", "a photo of cat", "red dog"], guidance=True)
    alone = model.encode(["a photo of cat"], guidance=True)
    for key, value in alone.kwargs.items():
        assert torch.equal(cond.kwargs[key][1:2], value), key
        if not key.startswith("negative"):
            assert torch.equal(cond.kwargs[key][0], cond.kwargs[key][2])
            assert not torch.equal(cond.kwargs[key][0], cond.kwargs[key][1])
    assert all(not value.requires_grad for value in cond.kwargs.values())


class OneByOne(Ragged):
    """Its two encoders are asked one by one, and their masks are as wide as the embeddings."""

    def encode_prompt(self, prompt: str, device: Any = None, text_encoder_index: int = 0) -> Any:
        prompt_embeds = torch.full((1, 2, 3), float(text_encoder_index))
        prompt_attention_mask = torch.full((1, 6), len(prompt))
        return prompt_embeds, prompt_attention_mask

    def __call__(
        self,
        prompt_embeds: Any = None,
        prompt_attention_mask: Any = None,
        prompt_embeds_2: Any = None,
        prompt_attention_mask_2: Any = None,
    ) -> None: ...


def test_encoders_that_are_asked_one_by_one() -> None:
    cond = PromptEncoder(OneByOne(), {}).encode(["a", "bc"], guidance=False)
    assert cond.kwargs["prompt_embeds"].unique().tolist() == [0.0]
    assert cond.kwargs["prompt_embeds_2"].unique().tolist() == [1.0]
    for name in ("prompt_attention_mask", "prompt_attention_mask_2"):
        assert cond.kwargs[name].tolist() == [[1] * 6, [2] * 6]


class Unnamed(Ragged):
    """Puts the negative prompt before the prompt, where a name would be wanted."""

    def encode_prompt(self, prompt: str, do_classifier_free_guidance: bool) -> Any:
        prompt_embeds = torch.full((1, 2, 3), float(len(prompt)))
        attention_mask = torch.ones(1, 2)
        if do_classifier_free_guidance:
            prompt_embeds = torch.cat([torch.zeros(1, 2, 3), prompt_embeds])
            attention_mask = torch.cat([attention_mask, attention_mask])
        return prompt_embeds, attention_mask

    def __call__(
        self,
        prompt_embeds: Any = None,
        attention_mask: Any = None,
        negative_prompt_embeds: Any = None,
        negative_attention_mask: Any = None,
    ) -> None: ...


def test_a_negative_prompt_that_is_not_named_is_encoded_as_a_prompt() -> None:
    cond = PromptEncoder(Unnamed(), {"negative_prompt": "bad"}).encode(["a", "bc"], guidance=True)
    assert cond.kwargs["prompt_embeds"][:, 0, 0].tolist() == [1.0, 2.0]
    assert cond.kwargs["negative_prompt_embeds"][:, 0, 0].tolist() == [3.0, 3.0]
    assert cond.kwargs["attention_mask"].shape == cond.kwargs["negative_attention_mask"].shape


def test_embeddings_are_kept_on_the_cpu_and_given_on_the_device() -> None:
    pipe = Ragged()
    encoder = PromptEncoder(pipe, {})
    pipe.device = torch.device("meta")  # where the pipeline computes, for this test
    cond = encoder.encode(["red dog", "a cat", "red dog"], guidance=True)
    assert all(v.is_meta for v in cond.kwargs.values() if isinstance(v, Tensor)) and cond.size == 3
    kept = [encoder._positive("red dog"), encoder.negative()]
    assert {v.device.type for row in kept for v in row.values() if v is not None} == {"cpu"}
