"""GenEval: are the objects of a prompt in the picture, in number, colour and place?

An object detector of transformers finds COCO's 80 classes, CLIP names the colour of each object,
and :mod:`dgpo.rewards.shipped.geneval_judge` gives the verdict. Prompt rows are those of the public
metadata files: ``{"tag": ..., "include": [...], "exclude": [...], "prompt": ...}``.

``geneval`` is the partial score for training, in (-inf, 1], almost always [0, 1];
``geneval_strict`` is the benchmark's verdict, 0 or 1. Higher is better.

Differs from the published evaluation: Mask2Former (Swin-S, COCO instances) and CLIP ViT-L/14 are
those of transformers, not of mmdet and open_clip, so that no compiled extension is needed. Image
size and post-processing are the library's: expect scores that differ, and compare only numbers of
one detector; by how much is not measured. Licence: detector "other" on the hub, CLIP MIT.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from dgpo.errors import UserError
from dgpo.pictures import rgb
from dgpo.prompts import Prompt
from dgpo.rewards.loading import batches, device, loading
from dgpo.rewards.pixels import Processor
from dgpo.rewards.reward import Media
from dgpo.rewards.rows import RowReward
from dgpo.rewards.shipped import clip
from dgpo.rewards.shipped.geneval_judge import (
    COLORS,
    LIMITS,
    Detection,
    Verdict,
    check_row,
    class_name,
    judge,
)

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
VARIABLE = "DGPO_GENEVAL_DETECTOR"
WITH_MASKS = {"mask2former": 384, "maskformer": None}
"""The detectors that make masks, and the side to which the library scales them."""
BACKGROUND = (153, 153, 153)
"""The grey that covers all but the object whose colour is named."""
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


class Detector:
    """A detector with the library's own post-processing: instances with masks, or boxes alone.

    Args:
        weights: hub id or folder of a Mask2Former or MaskFormer model, or of any model for
            ``AutoModelForObjectDetection`` (DETR, RT-DETR, YOLOS, ...), with COCO's classes;
            default: what ``DGPO_GENEVAL_DETECTOR`` says, else Mask2Former.
        batch: how many pictures are looked at together.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(self, weights: str | None = None, batch: int = 8) -> None:
        import transformers

        with loading("geneval", weights, VARIABLE, DETECTOR) as weights:
            self.weights = weights
            config = transformers.AutoConfig.from_pretrained(weights)
            self._masks = config.model_type in WITH_MASKS
            kind = "UniversalSegmentation" if self._masks else "ObjectDetection"
            auto: Any = getattr(transformers, f"AutoModelFor{kind}")
            self.model: Any = auto.from_pretrained(weights).eval().requires_grad_(False)
            self._pixels = Processor(
                transformers.AutoImageProcessor.from_pretrained(weights, use_fast=False)
            )
        self._names = {int(i): class_name(name) for i, name in self.model.config.id2label.items()}
        self._batch = batch

    @property
    def classes(self) -> set[str]:
        """The classes that it can see, by GenEval's names."""
        return set(self._names.values())

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], least: float) -> list[list[Detection]]:
        """Find the objects of each picture.

        Args:
            images: RGB, any size.
            least: the confidence below which nothing is reported.
        """
        self.model.to(device())
        read = self._instances if self._masks else self._boxes
        found: list[list[Detection]] = []
        for (some,) in batches(self._batch, images):
            outputs = self.model(**self._pixels(some, self.model.device))
            sizes = [(image.height, image.width) for image in some]
            found += read(outputs, sizes, least)
        return found

    def _boxes(self, outputs: Any, sizes: list[tuple[int, int]], least: float) -> Any:
        # a few numbers, which the library reads one by one
        outputs = type(outputs)(logits=outputs.logits.cpu(), pred_boxes=outputs.pred_boxes.cpu())
        results = self._pixels.own.post_process_object_detection(
            outputs, threshold=least, target_sizes=torch.tensor(sizes)
        )
        rows = []
        for result in results:
            parts = (result[key].tolist() for key in ("labels", "scores", "boxes"))
            rows.append(
                [Detection(self._names[i], s, tuple(b)) for i, s, b in zip(*parts, strict=True)]
            )
        return rows

    def _instances(self, outputs: Any, sizes: list[tuple[int, int]], least: float) -> Any:
        rows: list[list[Detection]] = [[] for _ in sizes]
        for found in instances(outputs, sizes, least, WITH_MASKS[self.model.config.model_type]):
            name = self._names[found.label]
            rows[found.row].append(Detection(name, found.score, _box(found.mask), found.mask))
        return rows


class Instance(NamedTuple):
    """An object in one of several pictures."""

    row: int
    """The place of the picture."""
    label: int
    score: float
    mask: np.ndarray
    """bool [H, W]; it holds at least one pixel."""


def instances(
    outputs: Any, sizes: Sequence[tuple[int, int]], least: float, side: int | None
) -> list[Instance]:
    """Find what ``post_process_instance_segmentation`` of transformers finds, with three waits for
    the device instead of two for each of the hundred queries of a picture.

    The score is the probability of a class times the mean probability of the pixels inside the
    mask. Only the masks of those queries are made whose class alone reaches ``least``.

    Args:
        outputs: what Mask2Former or MaskFormer has returned.
        sizes: the height and width of each picture.
        least: the score below which nothing is reported.
        side: the height and width to which masks are scaled before they are judged; None: they
            are not.
    """
    classes = outputs.class_queries_logits.softmax(-1)[..., :-1]  # [B, queries, classes]
    best, places = classes.flatten(1).topk(classes.shape[1], sorted=False)
    rows, chosen = (best >= least).nonzero(as_tuple=True)
    best, places = best[rows, chosen], places[rows, chosen]
    labels = places % classes.shape[-1]
    masks = outputs.masks_queries_logits[rows, places // classes.shape[-1]][:, None]
    if side is not None:
        masks = nn.functional.interpolate(masks, (side, side), mode="bilinear")
    inside = (masks > 0).float()
    area = inside.flatten(1).sum(1) + 1e-6
    scores = best * (masks.sigmoid() * inside).flatten(1).sum(1) / area
    told = torch.stack([rows.double(), labels.double(), scores.double()], 1).tolist()
    facts = [(place, int(row), int(label), score) for place, (row, label, score) in enumerate(told)]
    found: list[Instance] = []
    for size in dict.fromkeys(sizes):
        some = [one for one in facts if sizes[one[1]] == size and one[3] >= least]
        shown = nn.functional.interpolate(inside[[one[0] for one in some]], size, mode="nearest")
        shapes = shown[:, 0].bool().cpu().numpy()
        for (_, row, label, score), mask in zip(some, shapes, strict=True):
            if mask.any():
                found.append(Instance(row, label, round(score, 6), mask))
    return found


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The left and top edge of a mask's pixels, and one past the right and bottom edge."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ColorNamer:
    """Names the colour of objects: the nearest of ten texts to the object cut out of the picture.

    Args:
        encoder: the CLIP model that compares them.
    """

    def __init__(self, encoder: clip.ClipEncoder) -> None:
        self.encoder = encoder
        self._texts: dict[str, torch.Tensor] = {}

    def __call__(self, image: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        """The colour of each object of one class in one picture."""
        if not objects:
            return []
        vectors = self.encoder.images([cut_out(image, one) for one in objects])
        return [COLORS[i] for i in (vectors @ self._colors(name).T).argmax(-1).tolist()]

    def _colors(self, name: str) -> torch.Tensor:
        """The mean direction of the templates for each colour, [10, D]."""
        if name not in self._texts:
            texts = [form.format(color, name) for color in COLORS for form in TEMPLATES]
            vectors = self.encoder.texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._texts[name] = torch.nn.functional.normalize(vectors.mean(1), dim=-1)
        return self._texts[name]


def cut_out(image: Image.Image, one: Detection) -> Image.Image:
    """Cut out the box of an object, with grey around its mask; at least one pixel wide and high."""
    if one.mask is not None:
        grey = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, grey, Image.fromarray(one.mask.astype(np.uint8) * 255))
    left, top = (min(max(round(v), 0), s - 1) for v, s in zip(one.box, image.size, strict=False))
    right, bottom = (min(round(v), s) for v, s in zip(one.box[2:], image.size, strict=True))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


class Eyes:
    """Detector and colour namer together; one pass serves both scores of the same pictures.

    Args:
        detector: hub id or folder; default: what ``DGPO_GENEVAL_DETECTOR`` says, else Mask2Former.
        clip_weights: hub id or folder; default: what ``DGPO_CLIP`` says, else ViT-L/14.
        batch: how many pictures are looked at together.
    """

    def __init__(
        self, detector: str | None = None, clip_weights: str | None = None, batch: int = 8
    ) -> None:
        self.detector = Detector(detector, batch)
        self._colors = ColorNamer(clip.shared_encoder(clip_weights))
        self._last: tuple[list[Any], list[Any], list[Verdict]] = ([], [], [])

    def modules(self) -> list[nn.Module]:
        """The networks of detector and colour namer."""
        return [self.detector.model, self._colors.encoder.model]

    def look(self, image: Image.Image, least: float) -> list[tuple[Detection, str]]:
        """All objects of a picture and their colours, the most confident first.

        Args:
            image: any size.
            least: the confidence below which nothing is reported.
        """
        plain = rgb(image)
        (found,) = self.detector([plain], least)
        found.sort(key=lambda one: -one.score)
        return [(one, self._colors(plain, [one], one.label)[0]) for one in found]

    def verdicts(
        self, images: Sequence[Image.Image], rows: Sequence[dict[str, Any]]
    ) -> list[Verdict]:
        """Judge each picture; ``rows`` are the prompts' metadata."""
        before, told, verdicts = self._last
        # by what they show: each reward is given copies
        if before == list(images) and told == list(rows):
            return verdicts
        plain = [rgb(image) for image in images]
        found = self.detector(plain, LIMITS.confidence)
        verdicts = [
            judge(objects, row, functools.partial(self._colors, image))
            for image, objects, row in zip(plain, found, rows, strict=True)
        ]
        self._last = (list(images), list(rows), verdicts)
        return verdicts


@functools.cache
def published() -> Eyes:
    """The default detector and CLIP, loaded once for both rewards."""
    return Eyes()


class GenEval(RowReward):
    """A reward from GenEval's verdict.

    Args:
        name: what errors call it.
        value: takes the wanted number from a verdict.
        eyes: makes the detector and colour namer, at the first check or call.
    """

    def __init__(
        self,
        name: str = "geneval",
        value: Callable[[Verdict], float] = lambda verdict: verdict.partial,
        eyes: Callable[[], Eyes] = published,
    ) -> None:
        self.name = name
        self._value = value
        self._make = eyes

    @functools.cached_property
    def _eyes(self) -> Eyes:
        return self._make()

    def modules(self) -> list[nn.Module]:
        """The networks, once they are loaded."""
        return self._eyes.modules() if "_eyes" in vars(self) else []

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse rows that are not GenEval's, then load the models and compare the class names.

        Raises:
            UserError: there is such a row, or a model cannot be loaded.
        """
        super().check(prompts)
        classes = self._eyes.detector.classes
        for number, prompt in enumerate(prompts):
            row = prompt.metadata
            for clause in [*row["include"], *(row.get("exclude") or ())]:
                if clause["class"] not in classes:
                    raise UserError(
                        f"reward {self.name!r}, {prompt.place(number)}: the detector does not know "
                        f"{clause['class']!r}, only {', '.join(sorted(classes))[:160]}"
                    )

    def wish(self, where: str, prompt: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """GenEval's metadata of a row.

        Raises:
            UserError: it has no ``include``, or clauses that are not GenEval's.
        """
        wanted = {key: row.get(key) for key in ("include", "exclude", "tag")}
        try:
            check_row(wanted["include"], wanted["exclude"])
        except ValueError as error:
            raise UserError(
                f"reward {self.name!r}, {where}: {error}; the prompts are GenEval's "
                "jsonl with tag, include, exclude and prompt"
            ) from error
        return wanted

    def score(self, images: Media, wishes: list[Any]) -> list[float]:
        """One score for each picture."""
        return [self._value(verdict) for verdict in self._eyes.verdicts(images, wishes)]


geneval = GenEval()
geneval_strict = GenEval("geneval_strict", lambda verdict: float(verdict.strict))
