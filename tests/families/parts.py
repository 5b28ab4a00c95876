"""What the tiny pipelines are made of: a tokenizer, text encoders, and two lines that build."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

WORDS = ["a", "photo", "of", "cat", "dog", "red", "blue", "house", "the", "on"]
WORDS += ["table", "small", "big"]
TOKENS = 16
VOCABULARY = 32
SIZE = {"height": 32, "width": 32}
TEXT = {**SIZE, "max_sequence_length": TOKENS}
_CHAT = (
    "{% for m in messages %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    " </s> {% endfor %}"
)


@dataclass(frozen=True)
class Tiny:
    """How to build a tiny pipeline, how to call it, and its embeddings if it cannot encode.

    Args:
        refused: part of the message with which dgpo refuses the pipeline; None for the others.
        without: questions whose answer is that the pipeline has no such thing.
        no_sde: part of the message with which a stochastic sampler is refused; None for the others.
        picture: what it starts from, if it does.
        mask: where it paints, if it paints in a mask.
        fast: whether the family is in the quick tests.
    """

    pipeline: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=lambda: dict(SIZE))
    embeddings: Callable[[int, int], dict[str, Any]] | None = None
    refused: str | None = None
    without: tuple[str, ...] = ()
    no_sde: str | None = None
    picture: Callable[[], Image.Image] | None = None
    mask: Callable[[], Image.Image] | None = None
    fast: bool = False


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nudge(module: nn.Module) -> Any:
    """Give zero-initialised parameters values: a denoiser that answers zero would prove nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.numel() and not parameter.detach().any():
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def network(kind: Any, seed: int = 0, **config: Any) -> Any:
    """A denoiser of random weights, none of them zero."""
    torch.manual_seed(seed)
    return nudge(kind(**config))


def decoder(kind: Any, **config: Any) -> Any:
    """An autoencoder of random weights."""
    torch.manual_seed(1)
    return kind(**config).eval()


def assemble(kind: Any, **components: Any) -> Any:
    """A pipeline; what it wants and is not given is None."""
    wanted = inspect.signature(kind.__init__).parameters.items()
    required = [n for n, p in wanted if p.default is p.empty and n != "self"]
    return kind(**{**dict.fromkeys(required), **components})


def tokenizer(longest: int = TOKENS) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=longest,
    )
    made.chat_template = _CHAT
    return made


def clip(hidden: int = 32, projection: int | None = None, positions: int = TOKENS) -> Any:
    torch.manual_seed(7)
    config = transformers.CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        hidden_size=hidden,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=VOCABULARY,
        max_position_embeddings=positions,
        projection_dim=projection or hidden,
    )
    if projection is None:
        return transformers.CLIPTextModel(config).eval()
    return transformers.CLIPTextModelWithProjection(config).eval()


def t5(multilingual: bool = False) -> Any:
    torch.manual_seed(8)
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2}
    if multilingual:
        config = transformers.UMT5Config(**sizes, num_heads=4)
        return transformers.UMT5EncoderModel(config).eval()
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, num_heads=4)).eval()


def language_model(family: str, hidden: int = 32, layers: int = 3) -> Any:
    """The decoder called ``family`` in transformers: Qwen3, Gemma2, Glm, Llama ..."""
    torch.manual_seed(9)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=37,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    return getattr(transformers, f"{family}Model")(config).eval()


def bert() -> Any:
    torch.manual_seed(10)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=128,
    )
    return transformers.BertModel(config).eval()


def kl_vae(blocks: int = 2) -> AutoencoderKL:
    return decoder(
        AutoencoderKL,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        layers_per_block=1,
        scaling_factor=1.5,
        shift_factor=0.06,
    )
