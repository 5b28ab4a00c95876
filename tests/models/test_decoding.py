"""The gate between decoders and rewards: what cannot be judged is lost, and never learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgpo.check.examination import Case, check_rows
from dgpo.errors import UserError
from dgpo.evaluation import Metrics, Sampling, evaluate
from dgpo.media import Lost, Sound, Video, made_of, save_media
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.decoding import Decoded, decoders_watched, pictures_of
from dgpo.models.pipeline.probes import replaced
from dgpo.models.pipeline.rollout import Rollout
from dgpo.pictures import Picture, array_of
from dgpo.pocket import load_pocket_sd
from dgpo.prompts import Prompt
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.rollouts.wire import pack, unpack
from dgpo.run.pictures import thumbnail
from families.tiny import sd3_small
from tiny_runs import rows, trainer

NOT_FINITE = r"the decoder \(AutoencoderKL\) returned numbers that are not finite"


@contextmanager
def broken(pipe: Any, which: Callable[[Tensor], Tensor], value: float) -> Iterator[None]:
    """Put a number into some of the pictures that the VAE decodes.

    Args:
        which: from latents to the rows that are broken, bool [B].
    """
    own = pipe.vae.decode

    def decode(latents: Tensor, *given: Any, **named: Any) -> Any:
        (made,) = own(latents, *given, **{**named, "return_dict": False})
        made[which(latents), :, 3, 5] = value
        return (made,)

    with replaced(pipe.vae, decode=decode):
        yield


def some(*places: int) -> Callable[[Tensor], Tensor]:
    return lambda latents: torch.tensor([row in places for row in range(len(latents))])


def half(latents: Tensor) -> Tensor:
    """About half of the pictures, whatever batch they are made in."""
    return latents.flatten(1).sum(1) > 0


class Blackens(nn.Module):
    """A safety checker in the form of Stable Diffusion's, which suspects every second picture."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, images: Tensor, clip_input: Tensor) -> tuple[Tensor, list[bool]]:
        flagged = [row % 2 == 1 for row in range(len(images))]
        images[torch.tensor(flagged)] = 0.0
        return images, flagged


class Extractor:
    def __call__(self, images: Any, return_tensors: str) -> Any:
        class Given(dict):
            pixel_values = torch.zeros(1)

            def to(self, device: Any) -> Any:
                return self

        return Given()


def with_checker(pipe: Any) -> Any:
    pipe.safety_checker, pipe.feature_extractor = Blackens(), Extractor()
    return pipe


def rollout(model: PipelineModel, count: int = 4) -> list[Any]:
    generators = [torch.Generator().manual_seed(row) for row in range(count)]
    cond = model.encode(["cat"] * count, guidance=False)
    return model.rollout(cond, steps=2, generators=generators).images or []


@pytest.fixture(scope="module")
def model() -> PipelineModel:
    return PipelineModel(sd3_small(), call={"height": 16, "width": 16})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_a_decoder_returns_is_finite_or_lost(model: PipelineModel, value: float) -> None:
    whole = rollout(model)
    with broken(model.pipe, some(1, 3), value):
        made = rollout(model)
    assert [isinstance(one, Lost) for one in made] == [False, True, False, True]
    assert made[1].why == "the decoder (AutoencoderKL) returned numbers that are not finite"
    for place in (0, 2):  # the others are what they were, bit for bit
        assert np.array_equal(np.asarray(made[place]), np.asarray(whole[place]))


def test_the_decoder_is_as_it_was_afterwards(model: PipelineModel) -> None:
    rollout(model)
    assert "decode" not in vars(model.pipe.vae)


def test_a_safety_checker_is_off_and_that_is_said_once() -> None:
    plain = rollout(PipelineModel(load_pocket_sd()))
    model = PipelineModel(with_checker(load_pocket_sd()))
    with pytest.warns(UserWarning, match=r"safety checker of StableDiffusionPipeline \(Blackens\)"):
        made = rollout(model)
    assert [one.tobytes() for one in made] == [one.tobytes() for one in plain]
    assert isinstance(model.pipe.safety_checker, Blackens)  # it is the user's


def test_dgpo_check_speaks_of_the_safety_checker() -> None:
    pipe = with_checker(load_pocket_sd())
    case = Case(lambda: pipe, PipelineModel, PipelineModel(pipe), check_rows(None, None))
    with pytest.warns(UserWarning, match="safety checker"):
        assert case.decoded().cell == "yes: its safety checker (Blackens) is off in dgpo"


def picture(size: int = 4) -> Image.Image:
    return Image.new("RGB", (size, size))


def test_frames_belong_to_their_video_and_flags_to_their_picture(model: PipelineModel) -> None:
    video = Decoded(model.pipe)
    frames = torch.zeros(3, 2, 4, 4)
    video.note("the decoder", frames)
    video.note("the decoder", frames.index_fill(0, torch.tensor([1]), torch.nan))
    made = video.samples(([[picture()] * 3 for _ in range(3)],), 3)
    assert [isinstance(one, Lost) for one in made] == [False, True, False]
    assert isinstance(made[1].made, Video)
    parts = Decoded(model.pipe)  # two videos of three frames, row after row
    parts.note("the decoder", torch.zeros(6, 4).index_fill(0, torch.tensor([4]), torch.nan))
    made = parts.samples(([[picture()] * 3] * 2,), 2)
    assert [isinstance(one, Lost) for one in made] == [False, True]
    odd = Decoded(model.pipe)  # nobody knows whose part is broken
    odd.note("the decoder", torch.full((3, 4), torch.nan))
    assert all(isinstance(one, Lost) for one in odd.samples(([picture()] * 2,), 2))
    flagged = Decoded(model.pipe).samples(([picture()] * 2, [False, True]), 2)
    assert isinstance(flagged[0], Image.Image) and flagged[1].why == "a safety checker replaced it"


def test_another_size_is_lost_and_another_number_refused(model: PipelineModel) -> None:
    made = Decoded(model.pipe).samples(([picture(), picture(5)],), 2)
    assert made[1].why == "StableDiffusion3Pipeline made it (5, 5), and others (4, 4)"
    with pytest.raises(UserError, match="StableDiffusion3Pipeline made 1 samples of 2 rows"):
        Decoded(model.pipe).samples(([picture()],), 2)


def test_a_sound_that_is_not_finite_is_lost() -> None:
    pipe: Any = type("Pipe", (), {"sampling_rate": 8000})()
    waves = np.zeros((2, 1, 16), np.float32)
    waves[1, 0, 3] = np.nan
    made = Decoded(pipe).samples((waves,), 2)
    assert isinstance(made[0], Sound) and isinstance(made[1], Lost)


def test_rewards_never_see_what_is_lost() -> None:
    seen: list[int] = []

    def count(images: Any, prompts: Any) -> list[float]:
        seen.append(len(images))
        return [1.0] * len(images)

    rewards = load_rewards(count)
    images = [picture(), Lost("dark", picture()), picture(), picture()]
    prompts = [Prompt("a")] * 4
    scored = rewards.score(images, prompts, [0, 0, 1, 1])  # pyright: ignore[reportArgumentType]
    assert scored.lost == {0: "dark"}
    assert torch.equal(scored.by_name["count"].isnan(), torch.tensor([True, True, False, False]))
    alone = rewards.score(images, prompts)  # pyright: ignore[reportArgumentType]
    assert alone.by_name["count"].isnan().tolist() == [False, True, False, False]
    assert seen == [2, 3]


def test_training_counts_them_and_learns_from_the_others(tmp_path: Path) -> None:
    pipe, seen = sd3_small(), []

    def bright(images: Any, prompts: Any) -> list[float]:
        assert all(np.asarray(image).std() > 1 for image in images)
        seen.extend(images)
        return brightness(images, prompts)

    given = {"groups_per_iteration": 4, "group_size": 2}
    run = trainer(tmp_path / "a", bright, model=pipe, **given)
    with broken(pipe, half, torch.nan), pytest.warns(UserWarning, match=NOT_FINITE):
        run.train()
    found = rows(tmp_path / "a")
    lost = sum(row["samples_lost"] for row in found)
    assert 0 < sum(row["groups_skipped"] for row in found) <= lost < 16
    assert sum(row["groups_skipped"] for row in found) < 8
    assert any(row["grad_norm"] > 0 for row in found if "grad_norm" in row)


def test_a_run_that_has_nothing_else_stops(tmp_path: Path) -> None:
    pipe = sd3_small()
    run = trainer(tmp_path, model=pipe)
    said = f"every picture of an iteration is lost: {NOT_FINITE}"
    with broken(pipe, some(*range(8)), torch.nan), pytest.raises(UserError, match=said):
        run.train()


def test_an_evaluation_counts_them_and_scores_the_others(model: PipelineModel) -> None:
    prompts = [Prompt("cat", {"tag": tag}) for tag in "aabb"]
    metrics, how = Metrics(["brightness"]), Sampling(steps=2)
    report, images = evaluate(model, prompts, metrics, how)
    assert (report.lost, report.n) == (0, 4)
    with (
        broken(model.pipe, some(1), torch.nan),
        pytest.warns(UserWarning, match=f"1 of 4 pictures are lost: {NOT_FINITE}"),
    ):
        report, _ = evaluate(model, prompts, metrics, how)
    first, _, *rest = brightness(images, [""] * 4)
    assert (report.lost, report.n) == (1, 3)
    assert report.overall == pytest.approx((first + sum(rest) / 2) / 2)
    with (
        broken(model.pipe, some(*range(4)), torch.nan),
        pytest.raises(UserError, match=f"every picture is lost: {NOT_FINITE}"),
    ):
        evaluate(model, prompts, metrics, how)


def test_a_metric_of_the_whole_set_is_given_the_others(model: PipelineModel) -> None:
    def size(images: Any, prompts: Any) -> tuple[float, float, float]:
        return len(images), len(prompts), 0.0

    size.of_set = True  # pyright: ignore[reportFunctionMemberAccess]
    with broken(model.pipe, some(1), torch.nan), pytest.warns(UserWarning):
        report, _ = evaluate(model, [Prompt("cat")] * 4, ["brightness", size], Sampling(steps=2))
    assert report.rewards["size"] == 3 and report.intervals["size"] == (3, 0)


def test_a_lost_picture_travels_as_such_and_is_not_written(
    model: PipelineModel, tmp_path: Path
) -> None:
    with broken(model.pipe, some(0), torch.nan):
        cond = model.encode(["cat", "dog"], guidance=False)
        made = model.rollout(cond, steps=2)
    again = unpack(pack(made), rows=2)
    assert again.images is not None and made.images is not None
    assert [isinstance(one, Lost) for one in again.images] == [True, False]
    images = [made_of(image) for image in made.images]
    assert unpack(pack(Rollout(made.x0, images, made.levels)), 2).images
    with pytest.warns(UserWarning, match="00000 is lost and not written"):
        files = save_media(made.images, tmp_path, "gif", 8)
    assert [file.name for file in files] == ["00001.png"]
    assert thumbnail(made.images[0], 64).size == (64, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pictures_are_rounded_early_as_diffusers_rounds_them(dtype: torch.dtype) -> None:
    class Pipe:
        image_processor, video_processor = VaeImageProcessor(), VideoProcessor()

        def __init__(self) -> None:
            self.first, self.second = VaeImageProcessor(), VideoProcessor()

    pipe: Any = Pipe()
    made = 1.2 * torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    made[0, 0, 0] = torch.linspace(-1, 1, 7)
    films = torch.stack([made, made.flip(0)]).transpose(1, 2)  # [B, 3, T, H, W]
    plain, film = pipe.first.postprocess(made), pipe.second.postprocess_video(films, "pil")
    with decoders_watched(pipe):
        early, shot = pipe.first.postprocess(made), pipe.second.postprocess_video(films, "pil")
        assert torch.equal(pipe.first.postprocess(made, "pt"), (made * 0.5 + 0.5).clamp(0, 1))
        grey = pipe.first.postprocess(made[:, :1])
        assert [image.mode for image in grey] == ["L", "L"]
    for one, other in zip([*plain, *film[0], *film[1]], [*early, *shot[0], *shot[1]], strict=True):
        assert isinstance(other, Picture) and not isinstance(one, Picture)
        assert np.array_equal(array_of(other), np.asarray(one))
    assert not isinstance(pipe.first.postprocess(made)[0], Picture)


def test_every_number_is_rounded_as_diffusers_rounds_it() -> None:
    numbers = torch.linspace(0, 1, 3 * 512 * 512).view(1, 3, 512, 512)
    (plain,) = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(numbers))
    assert np.array_equal(array_of(pictures_of(numbers)[0]), np.asarray(plain))


class Reads(TorchFunctionMode):
    """Notes where numbers are read by the program, for which a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("tolist", "item", "__bool__", "__float__", "__int__", "numpy"):
            self.seen.append(func.__name__)
        return func(*args, **kwargs or {})


def test_a_batch_is_waited_for_once() -> None:
    decoded = Decoded(sd3_small())
    with Reads() as reads:
        for part in ("the sampler", "the decoder"):
            decoded.note(part, torch.zeros(2, 3, 4, 4))
        images = decoded.samples((pictures_of(torch.zeros(2, 3, 4, 4)),), 2)
    assert reads.seen == ["tolist"]
    assert [type(image) for image in images] == [Picture, Picture]
