"""Any vision-language model behind an OpenAI-compatible endpoint as a judge (vLLM, SGLang, ...).

Licence and quality: the model's. Range: the template's, by default 0 to 10; higher is better.
Answers cost a request for each picture; they are sent in parallel.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from PIL import Image

from dgpo.errors import UserError
from dgpo.rewards.call_limits import Again, persist
from dgpo.rewards.http_client import connect, png, send, text_of, told_by
from dgpo.rewards.reward import Media, Reward, RewardFailure, Texts
from dgpo.secrets import token, token_in

TEMPLATE = """\
You are given a picture that was made for this description: "{prompt}"
How well does the picture show what the description asks for, and how well is it made?
Answer with one line: Score: <a number from 0 (not at all) to 10 (perfectly)>"""
PATTERN = r"[Ss]core\W*?(-?\d+(?:\.\d+)?)"
NUMBERS = (0.0, 10.0)


@dataclass(eq=False)
class VLMJudge(Reward):
    """Asks a model about each picture and reads a number from its answer.

    Raises:
        UserError: the template has no place for the caption, or the pattern no group.
    """

    url: str | None = None
    """The endpoint's base, such as ``http://localhost:8000/v1``; default: the environment variable
    ``<variable>_URL``."""
    model: str | None = None
    """The model's name there; default: ``<variable>_MODEL``."""
    _: KW_ONLY
    template: str = TEMPLATE
    """The question; ``{prompt}`` in it becomes the caption."""
    sources: Sequence[str] = ()
    """Columns of the prompt rows with pictures that are shown before the one that is judged, such
    as ``image``, the picture that was to be edited."""
    pattern: str = PATTERN
    """A regular expression; group 1 of its last match in the answer is the score."""
    limits: tuple[float, float] = NUMBERS
    """The least and the greatest score; another number counts as no answer."""
    fallback: float | None = None
    """The score where an answer came and no number could be read in it after all tries; None: the
    reward has failed. A server that does not answer is a failure in any case."""
    retries: int = 3
    """How many more times to ask after a broken connection, a busy server or an unreadable answer.
    """
    timeout: float = 60.0
    """Seconds for one answer."""
    pause: float = 1.0
    """Seconds before the first further try; each next one waits twice as long."""
    workers: int = 8
    """Requests at once."""
    key: str | None = field(default=None, repr=False)
    """Sent as the bearer token; default: ``<variable>_KEY``."""
    temperature: float = 0.0
    """The temperature at which the model answers."""
    max_tokens: int = 512
    """The most tokens of an answer."""
    name: str = "vlm_judge"
    """What errors and figures call the judge."""
    variable: str = "DGPO_JUDGE"
    """The beginning of the environment variables in which defaults are looked up."""

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            text = f"the template has no {{prompt}}: {self.template!r:.120}"
            raise UserError(f"reward {self.name!r}: {text}")
        if re.compile(self.pattern).groups < 1:
            raise UserError(
                f"reward {self.name!r}: the pattern {self.pattern!r} has no group (...)"
            )

    def check(self, prompts: Sequence[Any]) -> None:
        """See that the endpoint is set, that something answers there, and that every row has the
        pictures that are shown.

        Raises:
            UserError: one of these is missing.
        """
        for row, prompt in enumerate(prompts):
            for source in self.sources:
                if not isinstance(prompt.column(source), Image.Image):
                    raise UserError(
                        f"reward {self.name!r} shows the column {source!r}, and "
                        f"{prompt.place(row)} ({prompt.text!r:.80}) has no picture there"
                    )
        self._setting(self.model, "MODEL")
        with self._client() as client:
            import httpx

            try:
                client.get("/models")
            except httpx.HTTPError as error:
                raise UserError(
                    f"reward {self.name!r}: no server at {client.base_url} "
                    f"({told_by(client, error)}); start one, or set {self.variable}_URL"
                ) from None

    def __call__(self, images: Media, prompts: Texts, **columns: Any) -> list[float]:
        """One score for each picture.

        Raises:
            RewardFailure: the server gave no answer after all tries.
            UserError: no answer could be read, and there is no ``fallback``.
        """
        model = self._setting(self.model, "MODEL")
        shown = [
            [*(columns[source][row] for source in self.sources), image]
            for row, image in enumerate(images)
        ]
        with self._client() as client, ThreadPoolExecutor(self.workers) as pool:
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

    def _client(self) -> Any:
        url = self._setting(self.url, "URL")
        variable = f"{self.variable}_KEY"
        key = token_in(variable) if self.key is None else token(self.key, "the option key")
        # as many connections as may be asked at once: httpx's own limit would make others too late
        return connect(f"reward {self.name!r}", url, key, self.timeout, self.workers)

    def _setting(self, given: str | None, what: str) -> str:
        variable = f"{self.variable}_{what}"
        value = given or os.environ.get(variable, "")
        if not value:
            example = "http://localhost:8000/v1" if what == "URL" else "the served model's name"
            raise UserError(f"reward {self.name!r} asks a server: set {variable} to {example}")
        return value

    def _score(
        self, client: Any, model: str, row: int, pictures: Sequence[Image.Image], text: str
    ) -> float:
        content = [
            *map(_shown, pictures),
            {"type": "text", "text": self.template.replace("{prompt}", text)},
        ]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        try:
            return persist(lambda: self._read(self._ask(client, body)), self.retries, self.pause)
        except Again as error:
            failure = (
                f"reward {self.name!r}, row {row} (prompt {text!r:.80}): no score after "
                f"{self.retries + 1} tries; the last: {error}"
            )
            if error.gone:  # no fallback: every picture would get it, and nothing would tell
                raise RewardFailure(failure, gone=True) from error
            if self.fallback is None:
                raise UserError(f"{failure}; give a fallback to go on without") from error
            return self.fallback

    def _ask(self, client: Any, body: dict[str, Any]) -> str:
        response = send(client, "POST", "/chat/completions", json=body)
        if response.status_code >= 500:
            raise Again(f"status {response.status_code}: {text_of(response)[:160]}")
        if response.status_code != 200:
            raise UserError(
                f"reward {self.name!r}: {client.base_url} refused the request with status "
                f"{response.status_code}: {text_of(response)[:200]}"
            )
        try:
            return str(json.loads(text_of(response))["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise Again(f"not a chat completion: {text_of(response)[:160]}") from error

    def _read(self, answer: str) -> float:
        found = list(re.finditer(self.pattern, answer))
        if not found:
            raise Again(f"no score in {answer!r:.160}")
        try:
            score = float(found[-1][1])
        except (ValueError, TypeError) as error:
            raise Again(f"{found[-1][1]!r} is no number") from error
        low, high = self.limits
        if not low <= score <= high:
            raise Again(f"{score} is not in {low} to {high}")
        return score


def _shown(image: Image.Image) -> dict[str, Any]:
    """A picture as a part of a chat message."""
    url = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


vlm_judge = VLMJudge()
"""The judge that ``DGPO_JUDGE_URL``, ``DGPO_JUDGE_MODEL`` and ``DGPO_JUDGE_KEY`` name."""
