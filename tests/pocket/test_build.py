"""The parts of the pocket: tokenizer, silent third encoder, and the trick with the text's tail."""

import math

import pytest
import torch

from dgpo.pocket.scenes import CATEGORIES, all_metadata
from dgpo.pocket.signs import caption
from dgpo.pocket.text import TEXT_WIDTH, TOKENS, build_text_encoder, build_tokenizer
from tools.pretrain.build import build_silent_encoder, build_transformer
from tools.pretrain.captions import encode_text, tokenize
from tools.pretrain.transformer import TailAttention


def test_every_caption_fits_and_its_words_are_single_tokens():
    tokenizer = build_tokenizer()
    rows = all_metadata()
    captions = [row["prompt"] for category in CATEGORIES for row in rows[category]]
    for text in [*captions, caption("4072")]:
        ids = tokenizer(text).input_ids
        words = text.replace('"', ' " ').split()
        expected = len(words) if '"' not in text else len(words) + 3  # digits are tokens
        assert len(ids) == expected + 2 <= TOKENS


def test_the_vocabulary_is_the_same_every_time():
    assert build_tokenizer().get_vocab() == build_tokenizer().get_vocab()


def test_other_words_fall_back_to_characters_and_nothing_is_unknown():
    tokenizer = build_tokenizer()
    tokens = tokenizer.tokenize("a zebra!")
    assert tokens[0] == "a</w>"
    assert "".join(tokens[1:]) == "zebra</w>!</w>"


def test_the_third_encoder_says_nothing():
    tokenizer, encoder = build_silent_encoder()
    ids = tokenizer(
        ["a photo of a circle", ""], padding="max_length", max_length=7, return_tensors="pt"
    ).input_ids
    hidden = encoder(ids)[0]
    assert hidden.shape == (2, 7, 2 * TEXT_WIDTH)
    assert not hidden.any()


@pytest.mark.parametrize("length", [1, 9, 256])
def test_one_biased_tail_token_is_exactly_many_equal_ones(length):
    torch.manual_seed(0)
    transformer = build_transformer(8, 8, hidden=64, layers=3).double().eval()
    tokenizer = build_tokenizer()
    encoders = (build_text_encoder(tokenizer), build_text_encoder(tokenizer))
    with torch.no_grad():
        hidden, pooled = encode_text(encoders, tokenize(tokenizer, ["a photo of a circle"] * 2))

    def predict(tail: int) -> torch.Tensor:
        text = torch.nn.functional.pad(hidden.double(), (0, 0, 0, tail))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            return transformer(
                hidden_states=torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64),
                timestep=torch.tensor([300.0, 900.0], dtype=torch.float64),
                encoder_hidden_states=text,
                pooled_projections=pooled.double(),
                return_dict=False,
            )[0]

    stock = predict(length)
    attention = TailAttention()
    attention.bias = torch.full((2,), math.log(length), dtype=torch.float64)
    transformer.set_attn_processor(attention)
    assert (predict(1) - stock).abs().max() < 1e-12
