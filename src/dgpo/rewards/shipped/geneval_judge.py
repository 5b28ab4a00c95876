"""Gives GenEval's verdict from detections alone, without a model or pixels.

Source: Ghosh et al., "GenEval" (arXiv 2310.11513), whose published evaluation sets the numbers of
:class:`Limits`; the partial score is the training reward of Flow-GRPO (arXiv 2505.05470), which the
DGPO paper (arXiv 2510.08425) uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgpo.registry import nearest

COLORS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80 classes by the names of GenEval's prompts."""
_OTHER_NAMES = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "cellphone": "cell phone",
    "hair dryer": "hair drier",
}


def class_name(label: str) -> str:
    """GenEval's name of a class that a detector may call otherwise (``sofa`` is ``couch``)."""
    plain = " ".join(label.lower().replace("_", " ").split())
    return _OTHER_NAMES.get(plain, plain)


@dataclass(frozen=True)
class Limits:
    """The numbers of the published evaluation."""

    confidence: float = 0.3
    """The confidence above which a detection counts."""
    counting: float = 0.9
    """The same for rows whose tag is ``counting``."""
    objects: int = 16
    """The most objects of a class that count, the most confident first."""
    overlap: float = 1.0
    """The intersection over union at which the less confident of two boxes of a class is dropped; 1
    keeps all."""
    position: float = 0.1
    """The share of the two objects' summed size that an offset must exceed."""


LIMITS = Limits()
Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Detection:
    """An object that a detector saw.

    Args:
        label: its class, by GenEval's name.
        score: confidence, 0 to 1.
        box: left, top, right, bottom in pixels.
        mask: bool [H, W] where the detector makes one, for the colour; else None.
    """

    label: str
    score: float
    box: Box
    mask: Any = None


@dataclass(frozen=True)
class Verdict:
    """Both scores of a picture, and a sentence for each clause that failed strictly."""

    strict: bool
    partial: float
    reasons: tuple[str, ...] = ()


ColorsOf = Callable[[Sequence[Detection], str], Sequence[str]]
"""``(objects of one class, its name) -> the colour of each``; only asked where a clause does."""


def kept(
    detections: Sequence[Detection], tag: str | None, limits: Limits = LIMITS
) -> dict[str, list[Detection]]:
    """The detections that count, by class, the most confident first."""
    least = limits.counting if tag == "counting" else limits.confidence
    by_class: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > least:
            by_class.setdefault(detection.label, []).append(detection)
    return {label: _apart(found[: limits.objects], limits) for label, found in by_class.items()}


def _apart(found: list[Detection], limits: Limits) -> list[Detection]:
    if limits.overlap >= 1:
        return found
    apart: list[Detection] = []
    for one in found:
        if all(overlap(one.box, other.box) < limits.overlap for other in apart):
            apart.append(one)
    return apart


def overlap(a: Box, b: Box) -> float:
    """The intersection over union of two boxes; a box counts its border pixels, so each side is one
    longer."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0.0) * max(box[3] - box[1] + 1, 0.0)


def relations(a: Box, b: Box, threshold: float = LIMITS.position) -> set[str]:
    """Tell where ``a`` lies from ``b``: none, one or two of the :data:`RELATIONS`.

    >>> relations((0, 0, 10, 10), (50, 0, 60, 10))
    {'left of'}

    Per axis the offset of the centres is shortened by ``threshold`` times the sum of both sizes,
    to no less than 0; what is left counts where it is more than half of the centres' distance.
    """
    offsets = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    left = [max(abs(o) - threshold * s, 0.0) for o, s in zip(offsets, sizes, strict=True)]
    if max(left) < 1e-3:
        return set()
    far = math.hypot(*offsets)
    names = (("left of", "right of"), ("above", "below"))
    return {
        pair[offset > 0]
        for pair, offset, rest in zip(names, offsets, left, strict=True)
        if rest / far > 0.5
    }


def judge(
    detections: Sequence[Detection],
    metadata: Mapping[str, Any],
    colors_of: ColorsOf,
    limits: Limits = LIMITS,
) -> Verdict:
    """Judge one picture.

    Strict (the benchmark): every ``include`` clause is met by the ``count`` most confident objects
    of its class (there may be more), with their colours and positions, and no ``exclude`` clause's
    count is reached. Partial (training): the mean of these numbers over the ``include`` clauses:
    ``1 - |want - found| / want``, which is negative for more than twice too many; where the clause
    has a colour or a position, 0 if the count was wrong; else the same of the colour, and 1 or 0
    for the position if the colours were right. ``exclude`` does not enter it.

    Differs from the published training server: a position that fails counts 0 there and then, by
    an oversight, 1 as well; here it counts 0.

    Args:
        detections: all, in any order.
        metadata: a prompt's ``include``, ``exclude`` and ``tag``.
        colors_of: names the colours of objects.
        limits: the numbers to judge by.
    """
    objects = kept(detections, metadata.get("tag"), limits)
    reasons: list[str] = []
    numbers: list[float] = []
    at_least: list[list[Detection] | None] = []  # what met each clause strictly
    exactly: list[list[Detection] | None] = []  # the same with no object too many
    for clause in metadata["include"]:
        want, found = clause["count"], objects.get(clause["class"], [])
        chosen = found[:want]
        numbers.append(1 - abs(want - len(found)) / want)
        error, color = None, 1.0
        if len(chosen) < want:
            error = f"{len(found)} {clause['class']} for {want}"
        elif "color" in clause:
            colors = list(colors_of(chosen, clause["class"]))
            color = 1 - abs(want - colors.count(clause["color"])) / want
            if color < 1:
                error = f"{clause['class']}: {', '.join(colors)} for {clause['color']}"
        exact = len(found) == want
        if not exact and ("color" in clause or "position" in clause):
            numbers.append(0.0)
        elif exact and "color" in clause:
            numbers.append(color)
        right = exact and error is None
        if error is None and "position" in clause:
            error = _misplaced(chosen, clause, at_least, limits)
            if right:
                right = _misplaced(chosen, clause, exactly, limits) is None
                numbers.append(float(right))
        if error is not None:
            reasons.append(error)
        at_least.append(chosen if error is None else None)
        exactly.append(chosen if right else None)
    for clause in metadata.get("exclude") or ():
        found = objects.get(clause["class"], [])
        if len(found) >= clause["count"]:
            reasons.append(f"{len(found)} {clause['class']}, fewer than {clause['count']} wanted")
    return Verdict(not reasons, sum(numbers) / len(numbers), tuple(reasons))


def _misplaced(
    found: list[Detection],
    clause: Mapping[str, Any],
    groups: Sequence[list[Detection] | None],
    limits: Limits,
) -> str | None:
    """Why not every object stands to every target as it should, or None."""
    relation, target = clause["position"]
    others = groups[target]
    if others is None:
        return f"{clause['class']}: nothing to be {relation}"
    for one in found:
        for other in others:
            seen = relations(one.box, other.box, limits.position)
            if relation not in seen:
                where = " and ".join(sorted(seen)) or "beside"
                return f"{clause['class']} {where} {other.label}, not {relation}"
    return None


def check_row(include: Any, exclude: Any = None) -> None:
    """Refuse clauses that are not GenEval's.

    Raises:
        ValueError: a clause is wrong; the message says which, and why.
    """
    if not isinstance(include, list) or not include:
        raise ValueError(
            f"include = {include!r:.80} is not a list of clauses such as "
            '{"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]}'
        )
    for number, clause in enumerate(include):
        _check_clause(f"include[{number}]", clause)
        if "color" in clause and clause["color"] not in COLORS:
            raise ValueError(f"include[{number}]: color {clause['color']!r}: {', '.join(COLORS)}")
        if "position" in clause:
            _check_position(f"include[{number}]", clause["position"], number)
    if exclude is not None and not isinstance(exclude, list):
        raise ValueError(f"exclude = {exclude!r:.80} is not a list of clauses")
    for number, clause in enumerate(exclude or ()):
        _check_clause(f"exclude[{number}]", clause)


def _check_clause(where: str, clause: Any) -> None:
    if not isinstance(clause, dict) or not {"class", "count"} <= clause.keys():
        raise ValueError(f"{where} = {clause!r:.80} has no 'class' and 'count'")
    name, count = clause["class"], clause["count"]
    if name not in CLASSES:
        raise ValueError(f"{where}: {name!r} is no class of COCO{nearest(str(name), CLASSES)}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{where}: count {count!r} is not a whole number of at least 1")


def _check_position(where: str, position: Any, number: int) -> None:
    if (
        not isinstance(position, (list, tuple))
        or len(position) != 2
        or position[0] not in RELATIONS
        or not isinstance(position[1], int)
        or not 0 <= position[1] < number
    ):
        raise ValueError(
            f"{where}: position {position!r:.60} is not [{' | '.join(RELATIONS)}, the number of an "
            "earlier clause]"
        )
