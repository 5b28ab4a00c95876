"""HPSv3: how much people prefer a picture for a prompt, judged by a vision-language model.

Source: Ma et al., "HPSv3" (arXiv 2508.03789). Weights: ``MizzenAI/HPSv3`` (``HPSv3.safetensors``,
17 GB), Apache-2.0: a Qwen2-VL-7B whose last hidden state at the token ``<|Reward|>`` goes through
three layers to the mean and the spread of the preference. Configuration, tokenizer and image
processor are those of ``Qwen/Qwen2-VL-7B-Instruct``. It runs on the classes of transformers and
wants a GPU of 24 GB. Unbounded, in practice 0 to 15; higher is better.

Differs from the paper: the instruction below is this project's wording. The authors', with which
the model was trained, is in their repository (``hpsv3/dataset/data_collator_qwen.py``): save it to
a file and set ``DGPO_HPSV3_TEMPLATE`` to that where numbers must compare with theirs. The published
weights have not been run here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dgpo.errors import UserError
from dgpo.pictures import rgb
from dgpo.rewards.loading import ModelReward, file_of, loading, precision, processors, read_weights
from dgpo.rewards.reward import Media, Texts
from dgpo.rewards.wrappers import Lazy

WEIGHTS = "MizzenAI/HPSv3"
FILE = "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
VARIABLE = "DGPO_HPSV3"
TOKEN = "<|Reward|>"
"""The network's answer is read at this token."""
PICTURE = "<|image_pad|>"
PIXELS = 256 * 28 * 28
"""The area to which every picture is scaled: 256 tokens, give or take some for its shape."""
TEMPLATE = f"""\
Rate a generated picture by its visual quality and by its agreement with the text it was made for.
Say with one number from 0 (worst) to 10 (best) how much people would prefer it.

Visual quality: nothing in it is impossible, such as broken bodies or senseless surroundings; it is
sharp and easy to read; it is rich in detail; colours, composition and atmosphere are pleasing; it
shows nothing harmful.
Agreement: subjects, their number, looks and actions are those of the text; so are the style, the
surroundings and the attributes; nothing contradicts what the text means.
The text: {{prompt}}

The overall rating of this picture: {TOKEN}
END
"""


class HPSv3(ModelReward):
    """The mean of the preference that the model predicts.

    ``mu, sigma = head(hidden[<|Reward|>])`` with ``head`` = linear, ReLU, linear, ReLU, linear in
    float32; the score is ``mu``. Tokens of picture and text have the positions 0, 1, 2, ... on all
    three axes of Qwen2-VL's rotary embedding, as in the published program.

    Args:
        weights: the published file, or a folder or hub repository with it; default: what
            ``DGPO_HPSV3`` says, else the published one.
        base: hub id or folder of configuration, tokenizer and image processor; default: what
            ``DGPO_HPSV3_BASE`` says, else Qwen2-VL-7B-Instruct.
        template: the question, with ``{prompt}`` (or ``{text_prompt}``) for the caption and one
            ``<|Reward|>``; default: the file ``DGPO_HPSV3_TEMPLATE`` names, else this module's.
        batch: how many pictures are scored at once.
        dtype: the vision-language model's type; None: float32 on a CPU, bfloat16 on a GPU.

    Raises:
        UserError: something cannot be loaded, or the template lacks one of its two places.
    """

    name = "hpsv3"

    def __init__(
        self,
        weights: str | None = None,
        base: str | None = None,
        template: str | None = None,
        batch: int = 4,
        dtype: torch.dtype | None = None,
    ) -> None:
        from transformers import AutoConfig

        self._template, self.batch = _template(template), batch
        with loading(self.name, base, f"{VARIABLE}_BASE", BASE) as base:
            config = AutoConfig.from_pretrained(base)
            self._pixels, self._tokens = processors(base, padding_side="right")
        if not getattr(self._tokens, "chat_template", None):
            raise UserError(
                f"reward 'hpsv3': the tokenizer of {base!r} has no chat template, so the question "
                f"cannot be put; {BASE} has one: set {VARIABLE}_BASE to a copy of it"
            )
        self._tokens.add_tokens([TOKEN], special_tokens=True)
        self._token = self._tokens.convert_tokens_to_ids(TOKEN)
        with loading(self.name, weights, VARIABLE, WEIGHTS) as place:
            backbone, head = parts(read_weights(place, FILE))
            self._model = _backbone(config, backbone, self._token).to(dtype or precision())
            self._head = _head(head)

    def check(self, prompts: Sequence[Any]) -> None:
        """Refuse prompts that spell out the model's own tokens.

        Raises:
            UserError: the first such row.
        """
        self._refuse((prompt.place(row), prompt.text) for row, prompt in enumerate(prompts))

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        """One score for each picture.

        Raises:
            UserError: see :meth:`check`.
        """
        self._refuse((f"prompt row {row}", text) for row, text in enumerate(prompts))
        return super().__call__(images, prompts)

    def _refuse(self, prompts: Iterable[tuple[str, str]]) -> None:
        for place, prompt in prompts:
            for token in (TOKEN, PICTURE):
                if token in prompt:
                    raise UserError(
                        f"reward 'hpsv3', {place}: {prompt!r:.80} holds {token}, which "
                        "means something else to the model; take it out of the prompt"
                    )

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        """The mean of the preference, float32 [B]; the head gives its spread as well."""
        pixels = self._pixels.own(
            images=[rgb(image) for image in images],
            size={"shortest_edge": PIXELS, "longest_edge": PIXELS},
            return_tensors="pt",
        ).to(self._model.device)
        grid = pixels["image_grid_thw"]  # [B, 3]: patches in time, height and width
        counts = (grid.prod(-1) // self._pixels.own.merge_size**2).tolist()
        texts = [self._text(*pair) for pair in zip(prompts, counts, strict=True)]
        tokens = self._tokens(texts, padding=True, return_tensors="pt").to(self._model.device)
        ids = tokens["input_ids"]  # [B, L], padded at the end
        hidden = self._model(
            **tokens,
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape),
            pixel_values=pixels["pixel_values"],
            image_grid_thw=grid,
            use_cache=False,
        ).last_hidden_state
        return self._head(hidden[ids == self._token].float())[:, 0]

    def _text(self, prompt: str, count: int) -> str:
        question = self._template.replace("{prompt}", prompt)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = self._tokens.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        return text.replace(PICTURE, PICTURE * count)


def parts(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the published weights into those of transformers' ``Qwen2VLModel`` and of the head.

    The file has the names of an older transformers (``model.layers.``, ``visual.``); newer ones
    (``model.language_model.layers.``, ``model.visual.``) are read as well. ``lm_head`` is left out.

    Raises:
        ValueError: there is no head among them.
    """
    backbone: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for key, value in state.items():
        kind, _, rest = key.removeprefix("model.").partition(".")
        if kind == "rm_head":
            head[rest] = value
        elif kind in ("visual", "language_model"):
            backbone[f"{kind}.{rest}"] = value
        elif kind != "lm_head":
            backbone[f"language_model.{kind}.{rest}"] = value
    if not head:
        raise ValueError("no rm_head among the weights: this is not a reward model")
    return backbone, head


def _backbone(config: Any, state: dict[str, Tensor], token: int) -> Any:
    """Build a ``Qwen2VLModel`` with these weights; its vocabulary is as large as theirs."""
    from transformers import Qwen2VLModel

    name = "language_model.embed_tokens.weight"
    rows = len(state[name]) if name in state else 0
    if token >= rows:
        raise ValueError(f"{rows} embedded tokens, and {TOKEN} would be number {token}")
    config.text_config.vocab_size = rows
    loaded: Any = Qwen2VLModel.from_pretrained(
        None,
        config=config,
        state_dict=state,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, found = loaded
    # transformers puts random weights in these places and goes on
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if wrong := [str(key) for kind in kinds for key in found.get(kind, ())]:
        raise ValueError(f"weights missing, too many or of another size: {', '.join(wrong)}")
    return model.eval().requires_grad_(False)


def _head(state: Mapping[str, Tensor]) -> nn.Sequential:
    """Build linear layers 0, 3 and 5 of the published sequence; 2 is an idle dropout."""
    sizes = [state[f"{layer}.weight"].shape for layer in (0, 3, 5)]  # (to, from)
    first, second, last = (nn.Linear(size[1], size[0]) for size in sizes)
    head = nn.Sequential(first, nn.ReLU(), nn.Identity(), second, nn.ReLU(), last)
    head.load_state_dict({key: value.float() for key, value in state.items()})
    return head.eval().requires_grad_(False)


def _template(given: str | None) -> str:
    if given is None:
        given = file_of(f"{VARIABLE}_TEMPLATE")
    text = (given or TEMPLATE).replace("{text_prompt}", "{prompt}")
    if "{prompt}" not in text or text.count(TOKEN) != 1:
        raise UserError(
            f"reward 'hpsv3': the template needs {{prompt}} for the caption and {TOKEN} once for "
            f"the score: {text!r:.120}"
        )
    return text


hpsv3 = Lazy(HPSv3)
