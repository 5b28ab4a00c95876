"""`dgpo serve` asked anything: an answer that its description allows, never a 500, never a hang."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from dgpo.rewards import load_rewards
from dgpo.rewards.call_limits import in_thread
from dgpo.serve.app import Limits, make_app
from fuzz.parts import PROFILE, VALUES, changed_bytes

SECONDS = 60
"""An answer that takes longer is a hang."""
URL = "http://127.0.0.1"
LIMITS = Limits(body=400_000, images=8, pixels=200_000, seconds=30)
APP = make_app([load_rewards([name]) for name in ("redness", "brightness")], None, LIMITS)
HERE = {"Host": "127.0.0.1"}
API = schemathesis.openapi.from_asgi("/openapi.json", APP, headers=HERE)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@PROFILE
@API.parametrize()
def test_whatever_the_description_allows_and_what_it_does_not(case: Any) -> None:
    response = in_thread(lambda: case.call(headers=HERE)).result(SECONDS)
    case.validate_response(response, checks=CHECKS)


@pytest.fixture(scope="module")
def client() -> Any:
    with TestClient(APP, URL, raise_server_exceptions=False) as made:
        yield made


def ask(client: Any, *pictures: bytes, **question: Any) -> Any:
    files = [("images", (f"{n}.png", data, "image/png")) for n, data in enumerate(pictures)]
    asked = {"prompts": ["a"] * len(pictures), **question}
    form = {"request": json.dumps(asked)}
    call = lambda: client.post("/v1/score", data=form, files=files)  # noqa: E731
    return in_thread(call).result(SECONDS)


def encoded(kind: str, size: tuple[int, int] = (9, 7), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes, data: bytes = b"") -> bytes:
    """A PNG of 8-bit grey whose parts need not agree with each other."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = b"".join(chunks) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def gif(frames: int) -> bytes:
    """A GIF of 1 x 1 pixel and many frames."""
    frame = bytes.fromhex("2c000000000100010000 02024c01 00".replace(" ", ""))
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    return head + frame * frames + b";"


def moving(kind: str, frames: int) -> bytes:
    pictures = [Image.new("RGB", (2, 2), (n % 256, n // 256, 0)) for n in range(frames)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


BIG = 2**31 - 1
MALFORMED = {
    "nothing": lambda: b"",
    "a page": lambda: b"<!doctype html><svg onload=alert(1)>",
    "a pickle": lambda: b"\x80\x04\x95\x00cos\nsystem\n(S'touch x'\ntR.",
    "a JPEG": lambda: encoded("JPEG"),
    "a BMP": lambda: encoded("BMP"),
    "a TIFF": lambda: encoded("TIFF"),
    "a GIF of 5,000 frames": lambda: gif(5000),
    "a WebP of 300 frames": lambda: moving("WEBP", 300),
    "a PNG of 300 frames": lambda: moving("PNG", 300),
    "a PNG without pixels": lambda: png(9, 7),
    "a PNG of no width": lambda: png(0, 7, data=bytes(56)),
    "a PNG of 2^62 pixels": lambda: png(BIG, BIG, data=bytes(100_000)),
    "a PNG of 4 gigapixels": lambda: png(65_500, 65_500, data=bytes(300_000)),
    "a PNG whose text unpacks to 200 MB": lambda: png(
        9, 7, chunk(b"zTXt", b"t\0\0" + zlib.compress(bytes(200_000_000), 1)[:300_000])
    ),
    "a PNG with two headers": lambda: png(
        9, 7, chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0))
    ),
    "a WebP of 16,384 pixels a side": lambda: (
        b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0" + bytes(8)
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_pictures_are_refused(client: Any, name: str) -> None:
    data = MALFORMED[name]()
    good = encoded("PNG")
    for pictures in ((data,), (good, data)):
        response = ask(client, *pictures)
        assert response.status_code in (400, 413), (response.status_code, response.text)
        assert isinstance(response.json()["detail"], str) or not data
    assert ask(client, good).status_code == 200  # and the server goes on


@PROFILE
@given(
    data=st.sampled_from([encoded("PNG"), encoded("WEBP"), encoded("WEBP", lossless=True)]).flatmap(
        changed_bytes
    )
)
def test_damaged_pictures(data: bytes) -> None:
    with TestClient(APP, URL, raise_server_exceptions=False) as client:
        response = ask(client, data)
    assert response.status_code in (200, 400, 413), (response.status_code, response.text)
    if response.status_code == 200:
        (number,) = response.json()["scores"]["brightness"]
        assert 0 <= number <= 1


@PROFILE
@given(
    question=VALUES
    | st.fixed_dictionaries(
        {},
        optional={
            "prompts": VALUES | st.lists(st.text(), min_size=1, max_size=1),
            "metadata": VALUES | st.lists(st.dictionaries(st.text(), VALUES), max_size=1),
            "rewards": VALUES | st.just(["redness"]),
        },
    )
)
def test_questions(question: Any) -> None:
    with TestClient(APP, URL, raise_server_exceptions=False) as client:
        files = [("images", ("0.png", encoded("PNG"), "image/png"))]
        form = {"request": json.dumps(question)}
        call = lambda: client.post("/v1/score", data=form, files=files)  # noqa: E731
        response = in_thread(call).result(SECONDS)
    assert response.status_code in (200, 400, 404, 422), (response.status_code, response.text)


@PROFILE
@given(
    body=st.binary(max_size=300),
    kind=st.sampled_from(
        ["multipart/form-data", "multipart/form-data; boundary=b", "application/json", "", "\xff"]
    ),
    length=st.none() | st.sampled_from(["0", "-1", "x", "9" * 40, "1", "\xb2"]),
)
def test_bodies_that_are_none(body: bytes, kind: str, length: str | None) -> None:
    headers = {"content-type": kind.encode("latin-1")}
    if length is not None:
        headers["content-length"] = length.encode("latin-1")
    with TestClient(APP, URL, raise_server_exceptions=False) as client:
        call = lambda: client.post("/v1/score", content=body, headers=headers)  # noqa: E731
        response = in_thread(call).result(SECONDS)
    assert 400 <= response.status_code < 500, (response.status_code, response.text)
