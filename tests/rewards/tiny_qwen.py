"""A tiny HPSv3 of random weights: the published file and the folder of its base."""

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

WIDTH, HEADS = 16, (12, 4)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer():
    """One token for each byte, and the model's own."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    made = Qwen2Tokenizer(vocab={**vocabulary, "<|endoftext|>": 256}, merges=[])
    made.add_tokens(SPECIAL, special_tokens=True)
    made.chat_template = TEMPLATE
    return made


def save_hpsv3(place, seed=0):
    """Writes ``base`` and ``HPSv3.safetensors`` into a folder.

    Returns:
        The model of transformers with its three linear layers, of the weights that were written.
    """
    tokens = tokenizer()
    rows = len(tokens) + 1  # with <|Reward|>; the base has more, as the real one
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": rows + 40, "hidden_size": WIDTH, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2,
        },
        image_token_id=tokens.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=tokens.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokens.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip
    config.save_pretrained(place / "base")
    tokens.save_pretrained(place / "base")
    Qwen2VLImageProcessorPil().save_pretrained(place / "base")
    config.text_config.vocab_size = rows
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).eval()
    head = [nn.Linear(WIDTH, HEADS[0]), nn.Linear(*HEADS), nn.Linear(HEADS[1], 2)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for layer in head:
            layer.weight.mul_(3)
    state = {
        # the names before the towers became parts of one model
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for key, value in model.state_dict().items()
    }
    for number, layer in zip((0, 3, 5), head, strict=True):
        state |= {f"rm_head.{number}.{key}": value for key, value in layer.state_dict().items()}
    save_file(
        {key: value.contiguous() for key, value in state.items()}, place / "HPSv3.safetensors"
    )
    return model, head
