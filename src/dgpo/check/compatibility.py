"""Can this pipeline be trained? Seven questions, each answered by doing it with the pipeline.

``dgpo check MODEL`` asks them about a model. The table of docs/models.md asks them about a tiny
pipeline of every family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from dgpo.check.examination import Answer, Case, Differs, check_rows
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.weights.compute import Compile, compile_denoisers

QUESTIONS: dict[str, str] = {
    "no guidance": "what is trained equals what samples, bit for bit, at every step of a rollout",
    "guidance": "the same with classifier-free guidance",
    "prompts": "precomputed embeddings give what the pipeline gives for the text, bit for bit",
    "SDE": "with a noisy sampler (Flow-SDE, DDIM) a policy gradient's ratio is exactly 1 at first",
    "DGPO": "the updates of two iterations, each with rollouts of its own, lower its objective and "
    "move nothing but the LoRA",
    "reference": "with the LoRA moved, the reference is still the base model, bit for bit, at each "
    "step of a rollout",
    "LoRA file": "a fresh pipeline that loads the saved LoRA samples what the trained one does",
}
"""What is asked, by the title of its column, in the order of the questions."""
COMPILED = "compiled"
"""What is asked beside, where the denoiser is compiled: compiled passes of the policy, the old
policy and the reference equal eager ones within a tolerance, and none is compiled anew."""


@dataclass(frozen=True)
class Examination:
    """An ``Examination`` holds the answers to :data:`QUESTIONS` about one pipeline, and before them
    whether what it makes can be scored."""

    pipeline: str
    answers: Mapping[str, Answer]
    process: str = ""
    decoded: Answer = field(default_factory=lambda: Answer("none"))

    @property
    def ok(self) -> bool:
        """Return whether nothing differs, and what samples can be trained."""
        unusable = any(one.verdict == "no" for one in (self.decoded, *self.answers.values()))
        return not unusable and self.answers["no guidance"].verdict == "yes"

    def __str__(self) -> str:
        if not self.process:  # refused before anything could be asked, for one reason
            return f"{self.pipeline}: {self.answers['no guidance'].cell}"
        lines = [f"{self.pipeline} ({self.process})"]
        width = max(map(len, self.answers))
        for question, answer in {"samples": self.decoded, **self.answers}.items():
            measured = f" ({answer.figures})" if answer.figures else ""
            lines.append(f"  {question:<{width}}  {answer.cell}{measured}")
        return "\n".join(lines)


def examine(
    make: Callable[[], Any],
    wrap: Callable[[Any], PipelineModel] = PipelineModel,
    picture: Image.Image | None = None,
    mask: Image.Image | None = None,
    compiled: Compile = "off",
) -> Examination:
    """Ask all questions about a pipeline.

    Args:
        make: builds or loads the pipeline. It is called twice, so that the saved LoRA meets a
            pipeline that was never trained; the first is let go before the second is made.
        wrap: makes the model of a pipeline, with the arguments of its call.
        picture: goes with one prompt, and its mirror image with the other.
        mask: where the pipeline paints, likewise.
        compiled: how its denoisers are compiled.

    Returns:
        All answers. Nothing is raised: what the pipeline raises is an answer, too.
    """
    pipe = make()
    name = type(pipe).__name__
    try:
        model = wrap(pipe)
        compile_denoisers(model.denoisers, compiled)
    except UserError as refusal:
        return Examination(name, dict.fromkeys(QUESTIONS, Answer("refused", str(refusal))))
    case = Case(make, wrap, model, check_rows(picture, mask))
    del pipe, model  # now the case alone holds them, and can let them go
    process = type(case.model.process).__name__
    asked = (
        case.points,
        case.guidance,
        case.prompts,
        case.noise,
        case.dgpo,
        case.reference,
        case.lora_file,
    )
    questions = dict(zip(QUESTIONS, asked, strict=True))
    if compiled != "off":  # asked before the last, which lets the model go
        last, ask = questions.popitem()
        questions |= {COMPILED: case.compiled, last: ask}
    decoded = _answer(case.decoded)
    answers = {question: _answer(ask) for question, ask in questions.items()}
    return Examination(name, answers, process, decoded)


def _answer(ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except UserError as refusal:
        return Answer("refused", str(refusal).partition("\n")[0], str(refusal).partition("\n")[2])
    except Differs as difference:
        return Answer("no", str(difference))
    except Exception as error:  # one broken question must not hide the answers to the others
        return Answer("no", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


__all__ = ["QUESTIONS", "Answer", "Examination", "examine"]
