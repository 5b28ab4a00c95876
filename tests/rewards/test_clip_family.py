"""CLIP score, aesthetic, HPSv2 and per-frame rewards, through their real loading paths."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dgpo.errors import UserError
from dgpo.rewards.loading import pad_square
from dgpo.rewards.shipped.aesthetic import Aesthetic
from dgpo.rewards.shipped.clip import ClipScore
from dgpo.rewards.shipped.hpsv2 import HPSv2
from dgpo.rewards.shipped.video import PerFrame
from rewards.tiny import clip_vectors, held, pictures, save_clip, save_clip_processors

TEXTS = ["a cat", "two dogs", "x", "a long text with many words"]
IMAGES = pictures(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def test_clip_score_is_a_hundred_cosines(folder):
    got = ClipScore(folder, batch=3)(IMAGES, TEXTS)
    seen, read = clip_vectors(folder, IMAGES, TEXTS)
    assert got == pytest.approx(
        [100 * float(a @ b) for a, b in zip(seen, read, strict=True)], abs=1e-3
    )
    assert max(got) - min(got) > 0.1  # the pictures are not all alike to it
    assert ClipScore(folder)([], []) == []


def test_clip_from_the_environment_and_a_folder_without_it(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("DGPO_CLIP", folder)
    assert ClipScore()(IMAGES, TEXTS) == ClipScore(folder)(IMAGES, TEXTS)
    with pytest.raises(UserError, match="set DGPO_CLIP"):
        ClipScore(str(tmp_path))


def head_weights(inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = [inputs, 1024, 128, 64, 16, 1]
    state = {}
    for place, a, b in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"layers.{place}.weight"] = torch.randn(b, a, generator=generator) / math.sqrt(a)
        state[f"layers.{place}.bias"] = torch.randn(b, generator=generator)
    return state


def apply_head(state, vector):
    for place in (0, 2, 4, 6, 7):
        vector = state[f"layers.{place}.weight"] @ vector + state[f"layers.{place}.bias"]
    return float(vector)


@pytest.mark.parametrize("kind", ["pth", "safetensors", "folder"])
def test_the_aesthetic_head_is_affine_on_the_unit_vector(kind, folder, tmp_path):
    state = head_weights(8)
    if kind == "safetensors":
        file = tmp_path / "head.safetensors"
        save_file(state, file)
    else:
        file = tmp_path / "aesthetic-model.pth"
        torch.save(state, file)
    place = tmp_path if kind == "folder" else file
    reward = Aesthetic(str(place), folder, batch=3)
    got = reward(IMAGES, TEXTS)
    assert len(held(reward)) == 2
    seen, _ = clip_vectors(folder, IMAGES, [])
    assert got == pytest.approx([apply_head(state, vector) for vector in seen], abs=1e-3)
    assert np.std(got) > 1e-3


class Trap:
    def __reduce__(self):
        return (print, ("this pickle was run",))


def test_heads_that_are_refused(folder, tmp_path, capsys):
    file = tmp_path / "head.pth"
    torch.save({"0.weight": Trap()}, file)
    with pytest.raises(UserError, match="more than tensors"):
        Aesthetic(str(file), folder)
    assert "was run" not in capsys.readouterr().out
    torch.save(head_weights(12), file)
    with pytest.raises(UserError, match="takes vectors of 12 numbers"):
        Aesthetic(str(file), folder)
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="no weights of a linear head"):
        Aesthetic(str(file), folder)
    state = head_weights(8)
    del state["layers.4.bias"]
    torch.save(state, file)
    with pytest.raises(UserError, match="not the published head"):
        Aesthetic(str(file), folder)
    with pytest.raises(UserError, match=r"holds no aesthetic-model.pth.*DGPO_AESTHETIC"):
        Aesthetic(folder, folder)


def open_clip_state(seed=0, width=16, layers=2, out=8):
    """Random weights by open_clip's names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    state = {
        "logit_scale": torch.tensor(4.6),
        "positional_embedding": draw(77, width),
        "text_projection": draw(width, out),
        "token_embedding.weight": draw(64, width),
        "attn_mask": torch.zeros(77, 77),
        "visual.class_embedding": draw(width),
        "visual.positional_embedding": draw(17, width),
        "visual.conv1.weight": draw(width, 3, 8, 8),
        "visual.proj": draw(width, out),
    }
    norms = ["ln_final", "visual.ln_pre", "visual.ln_post"]
    for tower in ("transformer", "visual.transformer"):
        for layer in range(layers):
            at = f"{tower}.resblocks.{layer}."
            norms += [f"{at}ln_1", f"{at}ln_2"]
            state[f"{at}attn.in_proj_weight"] = draw(3 * width, width)
            state[f"{at}attn.in_proj_bias"] = draw(3 * width)
            for name, rows, columns in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 32, width),
                ("mlp.c_proj", width, 32),
            ):
                state[f"{at}{name}.weight"] = draw(rows, columns)
                state[f"{at}{name}.bias"] = draw(rows)
    for name in norms:
        state[f"{name}.weight"] = 1 + draw(width)
        state[f"{name}.bias"] = draw(width)
    return state


def norm(state, name, x):
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"]
    )


def blocks(state, tower, x, mask=None):
    """The transformer with one matrix for query, key and value, by torch's own attention."""
    for layer in range(2):
        at = f"{tower}.resblocks.{layer}."
        normed = norm(state, f"{at}ln_1", x)[:, None]
        attended, _ = torch.nn.functional.multi_head_attention_forward(
            normed, normed, normed, 16, 2,
            state[f"{at}attn.in_proj_weight"], state[f"{at}attn.in_proj_bias"],
            None, None, False, 0.0,
            state[f"{at}attn.out_proj.weight"], state[f"{at}attn.out_proj.bias"],
            attn_mask=mask, need_weights=False,
        )  # fmt: skip
        x = x + attended[:, 0]
        hidden = norm(state, f"{at}ln_2", x) @ state[f"{at}mlp.c_fc.weight"].T
        hidden = hidden + state[f"{at}mlp.c_fc.bias"]
        hidden = hidden * torch.sigmoid(1.702 * hidden)  # the tiny configuration's activation
        x = x + hidden @ state[f"{at}mlp.c_proj.weight"].T + state[f"{at}mlp.c_proj.bias"]
    return x


def open_clip_cosine(state, pixels, tokens):
    """open_clip's forward pass of one picture [3, 32, 32] and one text [L]."""
    patches = torch.nn.functional.conv2d(pixels[None], state["visual.conv1.weight"], stride=8)
    x = torch.cat([state["visual.class_embedding"][None], patches[0].flatten(1).T])
    x = norm(state, "visual.ln_pre", x + state["visual.positional_embedding"])
    x = norm(state, "visual.ln_post", blocks(state, "visual.transformer", x)[0])
    a = x @ state["visual.proj"]
    size = len(tokens)
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][:size]
    mask = torch.full((size, size), -math.inf).triu(1)
    x = norm(state, "ln_final", blocks(state, "transformer", x, mask))[-1]  # the end token's
    b = x @ state["text_projection"]
    return float(a @ b / a.norm() / b.norm())


def test_hpsv2_reads_an_open_clip_checkpoint(tmp_path, monkeypatch):
    from transformers import CLIPImageProcessor, CLIPTokenizer

    save_clip_processors(tmp_path / "base")
    state = open_clip_state()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "HPS_v2.1_compressed.pt")
    monkeypatch.setenv("DGPO_HPSV2_BASE", str(tmp_path / "base"))
    reward = HPSv2(str(tmp_path), batch=3)
    got = reward(IMAGES, TEXTS)
    assert len(held(reward)) == 1
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "base")
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "base")
    for image, text, score in zip(IMAGES, TEXTS, got, strict=True):
        square = Image.new("RGB", (48, 48))
        square.paste(image, (4, 0))
        pixels = processor(square, return_tensors="pt")["pixel_values"][0]
        tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
        assert score == pytest.approx(open_clip_cosine(state, pixels, tokens), abs=1e-5)
    assert np.std(got) > 1e-3


def test_hpsv2_of_a_converted_folder_is_the_cosine(folder):
    square = pictures(4, (32, 32))
    seen, read = clip_vectors(folder, square, TEXTS)
    wanted = [float(a @ b) for a, b in zip(seen, read, strict=True)]
    assert HPSv2(folder)(square, TEXTS) == pytest.approx(wanted, abs=1e-5)


def test_hpsv2_checkpoints_that_are_refused(tmp_path):
    save_clip_processors(tmp_path / "base")
    for change, word in (({"odd": torch.zeros(1)}, "unknown weight 'odd'"), (None, "visual_proj")):
        state = open_clip_state()
        if change is None:
            del state["visual.proj"]
        else:
            state.update(change)
        torch.save(state, tmp_path / "HPS_v2.1_compressed.pt")
        with pytest.raises(UserError, match=word):
            HPSv2(str(tmp_path), str(tmp_path / "base"))
    with pytest.raises(UserError, match="DGPO_HPSV2_BASE"):
        HPSv2(str(tmp_path), str(tmp_path / "nowhere"))


def test_a_wide_picture_is_padded_above_and_below():
    wide = Image.new("RGB", (10, 4), "white")
    square = np.asarray(pad_square(wide))
    assert square.shape == (10, 10, 3)
    assert (square[3:7] == 255).all() and square.sum() == 10 * 4 * 3 * 255


def test_videos_are_the_mean_of_their_frames(folder):
    clip = ClipScore(folder)
    videos = [IMAGES[:3], IMAGES[3:], np.stack([np.asarray(i) for i in IMAGES])]
    got = PerFrame(clip)(videos, TEXTS[:3])
    each = [clip([frame], [text])[0] for text in TEXTS[:3] for frame in IMAGES]
    assert got == pytest.approx([np.mean(each[:3]), each[7], np.mean(each[8:])], abs=1e-3)
    first_last = PerFrame(clip, frames=2)([IMAGES], TEXTS[:1])
    assert first_last == pytest.approx([(each[0] + each[3]) / 2], abs=1e-3)
    assert PerFrame("redness").name == "video_redness"
    with pytest.raises(UserError, match="row 0 is Image, not a video"):
        PerFrame("redness")([IMAGES[0]], ["a"])
    with pytest.raises(UserError, match="at least one"):
        PerFrame("redness", frames=0)


def test_columns_reach_the_reward_of_the_frames():
    def wants(images, prompts, text):
        return [float(t) for t in text]

    assert PerFrame(wants)([IMAGES[:2], IMAGES[:1]], ["a", "b"], text=["1", "2"]) == [1.0, 2.0]
