"""Any vision-language model behind an OpenAI-compatible endpoint as a judge (vLLM, SGLang, ...).

Licence and quality: the model's. Range: the template's, by default 0 to 10; higher is better.
Answers cost a request for each picture; they are sent in parallel.
"""

from __future__ import annotations

import base64
import io
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from dgpo.errors import UserError
from dgpo.rewards.call_limits import RewardFailure
from dgpo.rewards.loading import need

TEMPLATE = """\
You are given a picture that was made for this description: "{prompt}"
How well does the picture show what the description asks for, and how well is it made?
Answer with one line: Score: <a number from 0 (not at all) to 10 (perfectly)>"""
PATTERN = r"[Ss]core\W*?(-?\d+(?:\.\d+)?)"
NUMBERS = (0.0, 10.0)
_AWAY = (408, 429, 502, 503, 504)
"""Statuses of a server that is busy, or of a proxy whose server is gone."""


class _Retry(Exception):
    """An answer that may be better the next time.

    Args:
        gone: no answer came, so that asking about other pictures is no use either.
    """

    def __init__(self, reason: str, gone: bool = False) -> None:
        super().__init__(reason)
        self.gone = gone


class VLMJudge:
    """Asks a model about each picture and reads a number from its answer.

    Args:
        url: the endpoint's base, such as ``http://localhost:8000/v1``; default: the environment
            variable ``<variable>_URL``.
        model: its name there; default: ``<variable>_MODEL``.
        template: the question; ``{prompt}`` in it becomes the caption.
        sources: columns of the prompt rows with pictures that are shown before the one that is
            judged, such as ``image``, the picture that was to be edited.
        pattern: regular expression; group 1 of its last match in the answer is the score.
        limits: least and greatest score; another number counts as no answer.
        fallback: score where an answer came and no number could be read in it after all tries;
            None: the reward has failed. A server that does not answer is a failure in any case.
        retries: further tries after a broken connection, a busy server or an unreadable answer.
        timeout: seconds for one answer.
        pause: seconds before the first further try; each next one waits twice as long.
        workers: requests at once.
        key: sent as the bearer token; default: ``<variable>_KEY``.
        temperature, max_tokens: of the answer.
        name, variable: what errors name and where defaults are looked up.
    """

    def __init__(
        self,
        url: str | None = None,
        model: str | None = None,
        *,
        template: str = TEMPLATE,
        sources: Sequence[str] = (),
        pattern: str = PATTERN,
        limits: tuple[float, float] = NUMBERS,
        fallback: float | None = None,
        retries: int = 3,
        timeout: float = 60.0,
        pause: float = 1.0,
        workers: int = 8,
        key: str | None = None,
        temperature: float = 0.0,
        max_tokens: int = 512,
        name: str = "vlm_judge",
        variable: str = "DGPO_JUDGE",
    ) -> None:
        if "{prompt}" not in template:
            raise UserError(f"reward {name!r}: the template has no {{prompt}}: {template!r:.120}")
        if re.compile(pattern).groups < 1:
            raise UserError(f"reward {name!r}: the pattern {pattern!r} has no group (...)")
        self.__name__ = name
        self._variable = variable
        self._given = (url, model, key)
        self._template, self._pattern, self._limits = template, re.compile(pattern), limits
        self._sources = tuple(sources)
        self._fallback, self._retries, self._pause = fallback, retries, pause
        self._timeout, self._workers = timeout, workers
        self._options = {"temperature": temperature, "max_tokens": max_tokens}

    def _setting(self, place: int, what: str) -> str:
        variable = f"{self._variable}_{what}"
        value = self._given[place] or os.environ.get(variable, "")
        if not value and what != "KEY":
            example = "http://localhost:8000/v1" if what == "URL" else "the served model's name"
            raise UserError(f"reward {self.__name__!r} asks a server: set {variable} to {example}")
        return value

    def _client(self) -> Any:
        need(self.__name__, "httpx", "pip install httpx")
        import httpx

        url, key = self._setting(0, "URL"), self._setting(2, "KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            return httpx.Client(
                base_url=url,
                headers=headers,
                timeout=self._timeout,
                # as many as may be asked at once: httpx's own limit would make the others too late
                limits=httpx.Limits(max_connections=self._workers),
            )
        except httpx.InvalidURL as error:
            raise UserError(f"reward {self.__name__!r}: {url!r}: {error}") from error

    def check(self, prompts: Sequence[Any]) -> None:
        """See that the endpoint is set, that something answers there, and that every row has the
        pictures that are shown.

        Raises:
            UserError: something of this is missing.
        """
        for row, prompt in enumerate(prompts):
            for name in self._sources:
                if not isinstance(prompt.column(name), Image.Image):
                    raise UserError(
                        f"reward {self.__name__!r} shows the column {name!r}, and "
                        f"{prompt.place(row)} ({prompt.text!r:.80}) has no picture there"
                    )
        self._setting(1, "MODEL")
        with self._client() as client:
            import httpx

            try:
                client.get("/models")
            except httpx.HTTPError as error:
                raise UserError(
                    f"reward {self.__name__!r}: no server at {client.base_url} ({error}); start "
                    f"one, or set {self._variable}_URL"
                ) from error

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **columns: Any
    ) -> list[float]:
        """One score for each picture.

        Raises:
            RewardFailure: no answer from the server after all tries.
            UserError: none that could be read, and no ``fallback``.
        """
        model = self._setting(1, "MODEL")
        shown = [
            [*(columns[name][row] for name in self._sources), image]
            for row, image in enumerate(images)
        ]
        with self._client() as client, ThreadPoolExecutor(self._workers) as pool:
            jobs = [
                pool.submit(self._score, client, model, row, pictures, text)
                for row, (pictures, text) in enumerate(zip(shown, prompts, strict=True))
            ]
            try:
                return [job.result() for job in jobs]
            except UserError:
                for job in jobs:
                    job.cancel()  # the answers of the others would not be used
                raise

    def _score(
        self, client: Any, model: str, row: int, pictures: Sequence[Image.Image], text: str
    ) -> float:
        content = [
            *({"type": "image_url", "image_url": {"url": _data_url(one)}} for one in pictures),
            {"type": "text", "text": self._template.replace("{prompt}", text)},
        ]
        messages = [{"role": "user", "content": content}]
        body = {"model": model, "messages": messages, **self._options}
        reason, gone = "", False
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            try:
                return self._read(self._ask(client, body))
            except _Retry as error:
                reason, gone = str(error), error.gone
        failure = (
            f"reward {self.__name__!r}, row {row} (prompt {text!r:.80}): no score after "
            f"{self._retries + 1} tries; the last: {reason}"
        )
        if gone:  # no fallback: every picture would get it, and nothing would tell
            raise RewardFailure(failure, gone=True)
        if self._fallback is None:
            raise UserError(f"{failure}; give a fallback to go on without")
        return self._fallback

    def _ask(self, client: Any, body: dict[str, Any]) -> str:
        import httpx

        try:
            response = client.post("/chat/completions", json=body)
        except httpx.HTTPError as error:
            gone = isinstance(error, httpx.TransportError)
            raise _Retry(f"{type(error).__name__} {error}", gone) from error
        if response.status_code in _AWAY or response.status_code >= 500:
            reason = f"status {response.status_code}: {response.text[:160]}"
            raise _Retry(reason, response.status_code in _AWAY)
        if response.status_code != 200:
            raise UserError(
                f"reward {self.__name__!r}: {client.base_url} refused the request with status "
                f"{response.status_code}: {response.text[:200]}"
            )
        try:
            return str(response.json()["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _Retry(f"not a chat completion: {response.text[:160]}") from error

    def _read(self, answer: str) -> float:
        found = list(self._pattern.finditer(answer))
        if not found:
            raise _Retry(f"no score in {answer!r:.160}")
        try:
            score = float(found[-1][1])
        except (ValueError, TypeError) as error:
            raise _Retry(f"{found[-1][1]!r} is no number") from error
        low, high = self._limits
        if not low <= score <= high:
            raise _Retry(f"{score} is not in {low} to {high}")
        return score


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


vlm_judge = VLMJudge()
"""By ``DGPO_JUDGE_URL``, ``DGPO_JUDGE_MODEL`` and, where a server wants it, ``DGPO_JUDGE_KEY``."""
