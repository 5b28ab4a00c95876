"""Pictures become clean samples by each pipeline's own convention, which nobody wrote down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.picture_encoder import PictureEncoder
from families.tiny import TINY, sd3_small, tiny_model


def noise(size: int) -> Image.Image:
    pixels = torch.randint(256, (size, size, 3), generator=torch.Generator().manual_seed(3))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def shifted(pipe: Any, z: Tensor) -> Tensor:
    return (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def scaled(pipe: Any, z: Tensor) -> Tensor:
    return z * pipe.vae.config.scaling_factor


def packed(pipe: Any, z: Tensor) -> Tensor:
    return pipe._pack_latents(shifted(pipe, z), *z.shape)


@pytest.mark.parametrize(
    ("name", "convention"), [("sd3", shifted), ("sd15", scaled), ("flux", packed)]
)
def test_a_picture_goes_the_way_of_decoding_back(
    name: str, convention: Callable[[Any, Tensor], Tensor]
) -> None:
    """Against what the pipelines of diffusers do, which the encoder has to find out."""
    model = tiny_model(name)
    pipe, image = model.pipe, noise(TINY[name].call["height"])
    x0 = PictureEncoder(model, "the cat").encode(image)
    with torch.no_grad():
        z = pipe.vae.encode(pipe.image_processor.preprocess(image)).latent_dist.mode()
        wanted = convention(pipe, z)
    assert float((wanted - z.reshape(wanted.shape)).abs().max()) > 0.1  # it is no identity
    torch.testing.assert_close(x0, wanted[0], rtol=1e-5, atol=1e-5)


def test_a_picture_of_another_size_is_refused() -> None:
    encoder = PictureEncoder(
        PipelineModel(sd3_small(), call={"height": 16, "width": 16}), "the cat"
    )
    with pytest.raises(UserError, match=r"the picture is 32 x 32 pixels.*rollout.call.height"):
        encoder.encode(noise(32))
    with pytest.raises(UserError, match=r"the picture is 17 x 17 pixels.*takes only 16 x 16"):
        encoder.encode(noise(17))


def test_what_is_more_than_scaling_and_moving_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PipelineModel(sd3_small(), call={"height": 16, "width": 16})
    decode = model.pipe.vae.decode
    monkeypatch.setattr(model.pipe.vae, "decode", lambda z, **how: (decode(z)[0],))
    PictureEncoder(model, "the cat")  # what comes after the decoder is nobody's business
    rollout = model.rollout

    def bent(*args: Any, **how: Any) -> Any:
        end = how["scheduler"].end
        how["scheduler"].end = lambda x: end(x).tanh()
        return rollout(*args, **how)

    monkeypatch.setattr(model, "rollout", bent)
    with pytest.raises(UserError, match=r"StableDiffusion3Pipeline cannot train on given pictures"):
        PictureEncoder(model, "the cat")


def test_pictures_are_remembered_up_to_a_bound(tmp_path: Any) -> None:
    model = PipelineModel(sd3_small(), call={"height": 16, "width": 16})
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file in files:
        noise(16).save(file)
    one = 4 * 4 * 8 * 8  # bytes of a clean sample
    encoder = PictureEncoder(model, "the cat", cache_bytes=2 * one)
    first = encoder(files[0])
    assert first is encoder(files[0]) and first.nbytes == one
    assert encoder(files[1]) is encoder(files[1])
    encoder(files[0])
    encoder(files[2])  # the second is dropped, which was unused for longest
    assert first is encoder(files[0])
    assert list(encoder._cache) == [files[2], files[0]]
    with pytest.raises(UserError, match="no picture that can be read"):
        files[1].write_bytes(b"gone")
        encoder(files[1])
