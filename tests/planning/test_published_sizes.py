"""Plans of published models, from their configs alone, beside sizes that were counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dgpo.errors import UserError
from dgpo.planning import Machine, Plan, make_plan
from dgpo.recipe import Recipe
from tiny_runs import settings

CONFIGS = Path(__file__).with_name("configs")
FILE = CONFIGS / "prompts.txt"
PICTURE = {"height": 512, "width": 512}
# billions of parameters, as the models' cards and papers give them
PUBLISHED = {
    "sd35m": {"transformer": 2.24, "text_encoder": 0.124, "text_encoder_2": 0.695, "vae": 0.084},
    "flux": {"transformer": 11.9, "text_encoder": 0.123, "text_encoder_2": 4.76, "vae": 0.084},
    "qwen": {"transformer": 20.4, "text_encoder": 8.29, "vae": 0.127},
    "wan22": {"transformer": 14.3, "transformer_2": 14.3, "text_encoder": 5.68, "vae": 0.127},
}
CALLS = {"wan22": {"height": 64, "width": 64, "num_frames": 5}}
LAYERS = {"sd35m": 191, "flux": 266, "qwen": 480, "wan22": 640}


def planned(name: str, machine: Machine, **changes: Any) -> Plan:
    given: dict[str, Any] = {
        "model": str(CONFIGS / name),
        "rewards": {"brightness": 1.0},
        "prompts": {"train": str(FILE)},
        "precision": "bfloat16",
        "lora": {"rank": 32, "alpha": 64},
        "group_size": 8,
        "groups_per_iteration": 2,
        "rollout": {"steps": 4, "batch": 2, "call": CALLS.get(name, PICTURE if name else {})},
        "train": {"micro_batch": 2, "iterations": 2},
    }
    return make_plan(Recipe.from_dict(settings(**{**given, **changes})), machine)


@pytest.mark.parametrize(
    "name", ["sd35m", *(pytest.param(name, marks=pytest.mark.slow) for name in list(PUBLISHED)[1:])]
)
def test_a_published_model_has_its_published_size(name: str, tmp_path: Path) -> None:
    made = planned(name, Machine("cuda"))
    for part, billions in PUBLISHED[name].items():
        assert made.parameters[part] == pytest.approx(billions * 1e9, rel=0.02)
        # two bytes each; SD3's table of positions, 384 x 384 x 1536, is no parameter
        table = 2 * 384 * 384 * 1536 if (name, part) == ("sd35m", "transformer") else 0
        assert made.memory.parts[part] - table == pytest.approx(2e9 * billions, rel=0.02)
    assert made.layers == LAYERS[name]
    assert not made.memory.notes
    # float32: the LoRA, its gradient, Adam's two moments and two averages
    trained = sum(made.memory.parts[part] for part in ("LoRA", "gradients", "AdamW", "averages"))
    assert trained == 6 * 4 * made.trained


def test_a_pass_costs_what_was_counted_by_hand() -> None:
    made = planned("sd35m", Machine("cuda"))
    # a product of every weight with the 1,024 tokens of a picture or the 333 of its text, and
    # attention; the LoRA of rank 32 adds 1 %
    assert made.flops is not None
    assert made.flops.forward == pytest.approx(2.46e12, rel=0.1)
    assert 1.0 < made.flops.backward / made.flops.forward < 1.5
    # what a phase makes is small beside the weights, which it only reads
    assert made.memory.phases["rollout"] < 0.5 * made.memory.parts["transformer"]


def test_activations_are_those_that_were_counted_by_hand() -> None:
    made = planned("sd35m", Machine("cuda"))
    # Bytes that the graph keeps of a token. A frozen linear layer keeps nothing, nor do shifts,
    # gates and residuals, since what modulates has no gradient.
    half, full, rank = 2 * 1536, 4 * 1536, 2 * 32  # bfloat16, float32, A's answer
    adapted = 2 * half + 4 * rank  # four LoRAs, of which q, k and v keep one input
    normed = full + half  # an RMS norm keeps its input for the mean of squares, and for the product
    attention = 4 * half  # q, k, v and the answer
    second = 2 * normed + attention  # no LoRA in it
    # two layer norms, q and k, attention, the LoRAs, GELU of four times the width
    block = 2 * half + 2 * normed + attention + adapted + 4 * half
    last = half + 2 * normed + attention + half + 3 * rank  # the text's last ends at attention
    picture, text = 1024, 77 + 256
    # 24 blocks, 13 with a second attention, less what has no gradient yet in the first; a last norm
    kept = picture * (24 * block + 12 * second - half + half) + text * (23 * block + last - half)
    assert kept == pytest.approx(2.19e9, rel=0.01)
    # of 2 pictures; the backward pass begins with a little more
    assert made.memory.phases["training"] == pytest.approx(2 * kept, rel=0.1)


def test_gpus_share_the_pictures_and_pieces_of_the_weights() -> None:
    small: dict[str, Any] = {"model": "pocket", "precision": "float32"}
    one, two = (planned("", Machine("cuda", gpus), **small) for gpus in (1, 2))
    assert two.memory.parts["samples"] * 2 == one.memory.parts["samples"]
    assert "2 GPUs" in str(two)
    pieces = {"sharding": "fsdp2", "micro_batch": 2, "iterations": 2}
    sharded = planned("", Machine("cuda", 2), **small, train=pieces)
    assert sharded.memory.parts["transformer"] == two.memory.parts["transformer"] // 2
    kept = planned("", Machine("cuda", 2), **small, train={**pieces, "reshard": False})
    assert kept.memory.parts["transformer"] == two.memory.parts["transformer"] * 3 // 2


def test_all_weights_in_half_precision_have_masters_moments_and_averages() -> None:
    def parts(gpus: int = 1, **train: Any) -> dict[str, int]:
        small: dict[str, Any] = {"model": "pocket", "precision": "bfloat16", "lora": None}
        train = {"micro_batch": 2, "iterations": 2, **train}
        return dict(planned("", Machine("cuda", gpus), **small, train=train).memory.parts)

    one = parts()
    weights = one["masters"] // 2
    assert weights == pytest.approx(one["transformer"], rel=0.01)  # which has buffers, too
    assert one["gradients"] == 2 * weights  # float32
    assert one["AdamW"] == 4 * weights
    assert one["averages"] == 2 * 2 * weights + weights  # the reference is in half precision
    four = parts(4, sharding="fsdp2", sharding_size=2)
    for name in ("transformer", "masters", "AdamW", "averages"):
        assert four[name] == one[name] // 2, name
    assert four["gradients"] == one["gradients"]
    sums = {"sharding": "fsdp2", "sum_gradients": "micro_batch"}
    assert parts(2, **sums)["gradients"] == one["gradients"] // 2
    away = parts(2, **sums, sharding_offload=True)
    assert not {"transformer", "masters", "gradients", "AdamW", "averages"} & away.keys()
    with pytest.raises(UserError, match=r"train\.sharding_size = 2: 3 processes"):
        parts(3, sharding="fsdp2", sharding_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["geneval", "ocr", "pickscore"])
def test_the_recipes_for_24_gb_fit(task: str) -> None:
    local = {"model": str(CONFIGS / "sd35m"), "prompts.train": FILE, "prompts.eval": FILE}
    changes = [f"{key}={value}" for key, value in local.items()]
    made = make_plan(Recipe.load(f"sd35m-{task}-24gb", changes), Machine("cuda"))
    made.refuse_beyond(int(0.85 * 24e9))  # the margin that docs/memory.md asks for
    assert not made.memory.notes
