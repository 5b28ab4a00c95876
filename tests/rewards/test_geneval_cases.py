"""GenEval's verdict, case by case: every expected number is worked out by hand from the rules.

Objects are written ``(class, confidence, centre x, centre y[, colour])`` and are 20 x 20 pixels
unless a box is given instead of the centre. With two of them the position threshold is
0.1 * (20 + 20) = 4 pixels on each axis, so that an offset of d along one axis is a relation where
(d - 4) / d > 0.5, which is d > 8; along both axes where (d - 4) / (d * sqrt 2) > 0.5, d > 13.66.
"""

import pytest

from dgpo.rewards.shipped.geneval_judge import (
    Detection,
    Limits,
    check_row,
    class_name,
    judge,
    kept,
    overlap,
    relations,
)

FAR = 100


def dog(count=1, **more):
    return {"class": "dog", "count": count, **more}


def cat(count=1, **more):
    return {"class": "cat", "count": count, **more}


def dogs(number, score=0.95, color=None):
    return [("dog", score, FAR * i, 0, color) for i in range(number)]


LEFT, RIGHT = {"position": ["left of", 0]}, {"position": ["right of", 0]}
ABOVE, BELOW = {"position": ["above", 0]}, {"position": ["below", 0]}
RED, BLUE = {"color": "red"}, {"color": "blue"}
DOG = ("dog", 0.9, 200, 200)  # the usual target of a position
THIRD = 1 / 3


def beside(x, y):
    """The target dog and a cat so far from it."""
    return [DOG, ("cat", 0.8, 200 + x, 200 + y)]


def many(clause, exclude=None):
    return {"tag": "counting", "include": [clause], "exclude": [exclude] if exclude else None}


def plain(*include, exclude=None):
    return {"tag": "two_object", "include": list(include), "exclude": exclude}


CASES = [
    # name, metadata, objects, strict, partial
    # --- counts: 1 - |want - found| / want; strict wants at least so many
    ("one as wanted", plain(dog()), dogs(1), True, 1),
    ("none of one", plain(dog()), [], False, 0),
    ("another class", plain(dog()), [("cat", 0.9, 0, 0)], False, 0),
    ("two of one", plain(dog()), dogs(2), True, 0),
    ("three of one", plain(dog()), dogs(3), True, -1),
    ("others do not matter", plain(dog()), [*dogs(1), ("cat", 0.9, 0, 0)], True, 1),
    ("one of two", plain(dog(2)), dogs(1), False, 0.5),
    ("three of two", plain(dog(2)), dogs(3), True, 0.5),
    ("four of two", plain(dog(2)), dogs(4), True, 0),
    ("one of four", plain(dog(4)), dogs(1), False, 0.25),
    ("both classes", plain(dog(), cat()), [*dogs(1), ("cat", 0.9, 0, 0)], True, 1),
    ("one class of two", plain(dog(), cat()), dogs(1), False, 0.5),
    ("one class twice", plain(dog(), cat()), [*dogs(2), ("cat", 0.9, 0, 0)], True, 0.5),
    ("neither class", plain(dog(), cat()), [("bus", 0.9, 0, 0)], False, 0),
    ("a clause twice", plain(dog(), dog()), dogs(1), True, 1),
    # --- confidence: above 0.3, above 0.9 when counting
    ("at the threshold", plain(dog()), dogs(1, 0.3), False, 0),
    ("above the threshold", plain(dog()), dogs(1, 0.31), True, 1),
    ("below the threshold", plain(dog()), dogs(1, 0.29), False, 0),
    ("weak ones are not too many", plain(dog()), [*dogs(1), ("dog", 0.2, 9, 9)], True, 1),
    ("counting at its threshold", many(dog()), dogs(1, 0.9), False, 0),
    ("counting above its threshold", many(dog()), dogs(1, 0.91), True, 1),
    ("counting, one is unsure", many(dog(3)), [*dogs(2), ("dog", 0.85, 9, 9)], False, 2 / 3),
    ("the same, not counting", plain(dog(3)), [*dogs(2), ("dog", 0.85, 9, 9)], True, 1),
    # --- exclude: reached means wrong; it is not in the partial score
    ("as many as wanted", many(dog(2), dog(3)), dogs(2), True, 1),
    ("too many", many(dog(2), dog(3)), dogs(3), False, 0.5),
    ("far too many", many(dog(2), dog(3)), dogs(5), False, -0.5),
    ("too few", many(dog(2), dog(3)), dogs(1), False, 0.5),
    ("too many, but one is unsure", many(dog(2), dog(3)), [*dogs(2), ("dog", 0.9, 9, 9)], True, 1),
    ("a class that must not be", plain(dog(), exclude=[cat()]), beside(50, 0), False, 1),
    ("it is not there", plain(dog(), exclude=[cat()]), [DOG], True, 1),
    ("it is too weak", plain(dog(), exclude=[cat()]), [DOG, ("cat", 0.3, 0, 0)], True, 1),
    ("one of it is allowed", plain(dog(), exclude=[cat(2)]), beside(50, 0), True, 1),
    ("any exclude is enough", plain(dog(), exclude=[cat(2), cat(1)]), beside(50, 0), False, 1),
    # --- at most 16 objects of a class
    ("twenty of sixteen", plain(dog(16)), dogs(20), True, 1),
    ("twenty of seventeen", plain(dog(17)), dogs(20), False, 16 / 17),
    ("twenty of four", plain(dog(4)), dogs(20), True, -2),
    ("sixteen reach an exclude", plain(dog(4), exclude=[dog(16)]), dogs(20), False, -2),
    ("twenty never reach seventeen", plain(dog(4), exclude=[dog(17)]), dogs(20), True, -2),
    # --- colours, of the most confident objects; judged where the count is right
    ("the colour", plain(dog(**RED)), dogs(1, color="red"), True, 1),
    ("another colour", plain(dog(**RED)), dogs(1, color="blue"), False, 0.5),
    ("no object to be red", plain(dog(**RED)), [], False, 0),
    ("two red of one", plain(dog(**RED)), dogs(2, color="red"), True, 0),
    (
        "the surer one is red",
        plain(dog(**RED)),
        [("dog", 0.5, 0, 0, "blue"), ("dog", 0.9, 99, 0, "red")],
        True,
        0,
    ),
    (
        "the surer one is blue",
        plain(dog(**RED)),
        [("dog", 0.9, 0, 0, "blue"), ("dog", 0.5, 99, 0, "red")],
        False,
        0,
    ),
    ("two red", plain(dog(2, **RED)), dogs(2, color="red"), True, 1),
    (
        "one red of two",
        plain(dog(2, **RED)),
        [("dog", 0.9, 0, 0, "red"), ("dog", 0.8, 99, 0, "pink")],
        False,
        0.75,
    ),
    ("no red of two", plain(dog(2, **RED)), dogs(2, color="pink"), False, 0.5),
    ("three red of two", plain(dog(2, **RED)), dogs(3, color="red"), True, 0.25),
    ("one red, two wanted", plain(dog(2, **RED)), dogs(1, color="red"), False, 0.25),
    (
        "both colours",
        plain(dog(**RED), cat(**BLUE)),
        [("dog", 0.9, 0, 0, "red"), ("cat", 0.9, 99, 0, "blue")],
        True,
        1,
    ),
    (
        "colours swapped",
        plain(dog(**RED), cat(**BLUE)),
        [("dog", 0.9, 0, 0, "blue"), ("cat", 0.9, 99, 0, "red")],
        False,
        0.5,
    ),
    (
        "one colour of two",
        plain(dog(**RED), cat(**BLUE)),
        [("dog", 0.9, 0, 0, "red"), ("cat", 0.9, 99, 0, "red")],
        False,
        0.75,
    ),
    ("the other is missing", plain(dog(**RED), cat(**BLUE)), dogs(1, color="red"), False, 0.5),
    # --- positions in the four directions, at and past the threshold
    ("left, past it", plain(dog(), cat(**LEFT)), beside(-9, 0), True, 1),
    ("left, at it", plain(dog(), cat(**LEFT)), beside(-8, 0), False, 2 / 3),
    ("left, but it is right", plain(dog(), cat(**LEFT)), beside(50, 0), False, 2 / 3),
    ("right, past it", plain(dog(), cat(**RIGHT)), beside(9, 0), True, 1),
    ("right, at it", plain(dog(), cat(**RIGHT)), beside(8, 0), False, 2 / 3),
    ("right, but it is above", plain(dog(), cat(**RIGHT)), beside(0, -50), False, 2 / 3),
    ("above, past it", plain(dog(), cat(**ABOVE)), beside(0, -9), True, 1),
    ("above, at it", plain(dog(), cat(**ABOVE)), beside(0, -8), False, 2 / 3),
    ("above, but it is below", plain(dog(), cat(**ABOVE)), beside(0, 50), False, 2 / 3),
    ("below, past it", plain(dog(), cat(**BELOW)), beside(0, 9), True, 1),
    ("below, at it", plain(dog(), cat(**BELOW)), beside(0, 8), False, 2 / 3),
    ("below, but it is left", plain(dog(), cat(**BELOW)), beside(-50, 0), False, 2 / 3),
    ("in the same place", plain(dog(), cat(**LEFT)), beside(0, 0), False, 2 / 3),
    ("a diagonal is both, left", plain(dog(), cat(**LEFT)), beside(-14, -14), True, 1),
    ("a diagonal is both, above", plain(dog(), cat(**ABOVE)), beside(-14, -14), True, 1),
    ("a short diagonal is neither", plain(dog(), cat(**LEFT)), beside(-13, -13), False, 2 / 3),
    ("mostly left is not above", plain(dog(), cat(**ABOVE)), beside(-30, -10), False, 2 / 3),
    # --- positions and what they stand on
    ("no target", plain(dog(), cat(**LEFT)), [("cat", 0.9, 0, 0)], False, THIRD),
    ("nothing to be placed", plain(dog(), cat(**LEFT)), [DOG], False, THIRD),
    (
        "two targets: strict takes the surer, partial none",
        plain(dog(), cat(**LEFT)),
        [*beside(-50, 0), ("dog", 0.4, 0, 0)],
        True,
        THIRD,
    ),
    (
        "two targets, the surer is wrong",
        plain(dog(), cat(**RIGHT)),
        [*beside(-50, 0), ("dog", 0.4, 0, 0)],
        False,
        THIRD,
    ),
    (
        "two to be placed: strict takes the surer, partial none",
        plain(dog(), cat(**LEFT)),
        [*beside(-50, 0), ("cat", 0.4, 400, 200)],
        True,
        THIRD,
    ),
    (
        "both cats left",
        plain(dog(), cat(2, **LEFT)),
        [*beside(-50, 0), ("cat", 0.7, 100, 200)],
        True,
        1,
    ),
    (
        "one cat of two left",
        plain(dog(), cat(2, **LEFT)),
        [*beside(-50, 0), ("cat", 0.7, 400, 200)],
        False,
        2 / 3,
    ),
    (
        "the target has a wrong colour",
        plain(dog(**RED), cat(**LEFT)),
        [("dog", 0.9, 200, 200, "blue"), ("cat", 0.8, 100, 200)],
        False,
        0.5,
    ),
    (
        "colour and position",
        plain(dog(), cat(**RED, **LEFT)),
        [DOG, ("cat", 0.8, 100, 200, "red")],
        True,
        1,
    ),
    (
        "wrong colour: the place is not looked at",
        plain(dog(), cat(**RED, **LEFT)),
        [DOG, ("cat", 0.8, 100, 200, "pink")],
        False,
        2 / 3,
    ),
    (
        "right colour, wrong place",
        plain(dog(), cat(**RED, **LEFT)),
        [DOG, ("cat", 0.8, 300, 200, "red")],
        False,
        0.75,
    ),
    ("wrong count: one 0 for both", plain(dog(), cat(**RED, **LEFT)), [DOG], False, THIRD),
    (
        "the target is the clause that is named",
        plain(dog(), {"class": "bus", "count": 1}, cat(position=["left of", 1])),
        [DOG, ("bus", 0.9, 0, 200), ("cat", 0.8, 100, 200)],
        False,
        0.75,
    ),
    # --- sizes: 100 and 20 wide, threshold 0.1 * 120 = 12; (d - 12) / d > 0.5 is d > 24
    (
        "a wide one must be further left",
        plain(dog(), cat(**LEFT)),
        [DOG, ("cat", 0.8, (126, 190, 226, 210))],
        False,
        2 / 3,
    ),
    (
        "a wide one far enough left",
        plain(dog(), cat(**LEFT)),
        [DOG, ("cat", 0.8, (125, 190, 225, 210))],
        True,
        1,
    ),
]


# --- overlap: boxes count their border pixels, so (0, 0, 9, 9) is 10 x 10 = 100. Of two boxes of a
# class the less confident one is dropped where intersection over union reaches the limit.
WHOLE, HALF = (0, 0, 9, 9), (0, 0, 9, 4)  # 100 and 50, shared 50: 50 / 100 = 0.5
SHIFTED = (5, 0, 14, 9)  # 100, shared with WHOLE 5 x 10 = 50: 50 / (100 + 100 - 50) = 1/3
TWICE = (10, 0, 19, 9)  # shared with SHIFTED 50, with WHOLE nothing: a chain of three
INNER = (4, 4, 5, 5)  # 4 within 100: 0.04
OVERLAPS = [
    # name, limit, metadata, objects, strict, partial
    ("equal boxes are one", 0.5, plain(dog()), [("dog", 0.9, WHOLE), ("dog", 0.8, WHOLE)], True, 1),
    (
        "by the published limit they are two",
        1.0,
        plain(dog()),
        [("dog", 0.9, WHOLE), ("dog", 0.8, WHOLE)],
        True,
        0,  # 1 - |1 - 2| / 1
    ),
    (
        "two wanted, one seen twice",
        0.5,
        plain(dog(2)),
        [("dog", 0.9, WHOLE), ("dog", 0.8, WHOLE)],
        False,
        0.5,
    ),
    ("at the limit", 0.5, plain(dog()), [("dog", 0.9, WHOLE), ("dog", 0.8, HALF)], True, 1),
    ("below it", 0.51, plain(dog()), [("dog", 0.9, WHOLE), ("dog", 0.8, HALF)], True, 0),
    (
        "a third is shared",
        0.33,
        plain(dog(2)),
        [("dog", 0.9, WHOLE), ("dog", 0.8, SHIFTED)],
        False,
        0.5,
    ),
    (
        "and the limit is more",
        0.34,
        plain(dog(2)),
        [("dog", 0.9, WHOLE), ("dog", 0.8, SHIFTED)],
        True,
        1,
    ),
    (
        "a small one inside a large one",
        0.1,
        plain(dog(2)),
        [("dog", 0.9, WHOLE), ("dog", 0.8, INNER)],
        True,
        1,
    ),
    (
        "the surest in the middle drops both sides",
        0.3,
        plain(dog(2)),
        [("dog", 0.9, SHIFTED), ("dog", 0.8, WHOLE), ("dog", 0.7, TWICE)],
        False,
        0.5,
    ),
    (
        "the least sure in the middle is dropped alone",
        0.3,
        plain(dog(2)),
        [("dog", 0.7, SHIFTED), ("dog", 0.8, WHOLE), ("dog", 0.9, TWICE)],
        True,
        1,
    ),
    (
        "what was dropped drops nothing itself",
        0.3,
        plain(dog(2)),
        [("dog", 0.9, WHOLE), ("dog", 0.8, SHIFTED), ("dog", 0.7, TWICE)],
        True,
        1,
    ),
    (
        "classes stay apart",
        0.5,
        plain(dog(), cat()),
        [("dog", 0.9, WHOLE), ("cat", 0.8, WHOLE)],
        True,
        1,
    ),
    (
        "the surer one's colour stays",
        0.5,
        plain(dog(**RED)),
        [("dog", 0.9, WHOLE, "red"), ("dog", 0.8, HALF, "blue")],
        True,
        1,
    ),
    (
        "also where it is the wrong one",
        0.5,
        plain(dog(**RED)),
        [("dog", 0.9, WHOLE, "blue"), ("dog", 0.8, HALF, "red")],
        False,
        0.5,  # the count is right, the colour is not
    ),
    (
        "one seen twice reaches no exclude",
        0.5,
        many(dog(), dog(2)),
        [("dog", 0.99, WHOLE), ("dog", 0.95, WHOLE)],
        True,
        1,
    ),
    (
        "by the published limit it does",
        1.0,
        many(dog(), dog(2)),
        [("dog", 0.99, WHOLE), ("dog", 0.95, WHOLE)],
        False,
        0,
    ),
    (
        "one below the confidence drops nothing",
        0.5,
        plain(dog()),
        [("dog", 0.2, WHOLE), ("dog", 0.9, HALF)],
        True,
        1,
    ),
    (
        "a target seen twice is one target",
        0.5,
        plain(dog(), cat(**LEFT)),
        [("dog", 0.9, 200, 200), ("dog", 0.8, 201, 200), ("cat", 0.9, 100, 200)],
        True,
        1,  # 21 x 21 pixels, shared 20 x 21: 420 / 462 = 0.91
    ),
    (
        "by the published limit it is two",
        1.0,
        plain(dog(), cat(**LEFT)),
        [("dog", 0.9, 200, 200), ("dog", 0.8, 201, 200), ("cat", 0.9, 100, 200)],
        True,
        THIRD,  # dog 0, cat 1, its place 0: it has no single target
    ),
]


def detections(objects):
    found = []
    for label, score, *rest in objects:
        if isinstance(rest[0], tuple):
            box, color = rest[0], rest[1] if len(rest) > 1 else None
        else:
            x, y = rest[:2]
            box, color = (x - 10, y - 10, x + 10, y + 10), rest[2] if len(rest) > 2 else None
        found.append(Detection(label, score, box, color))
    return found


def colors(objects, name):
    assert all(one.label == name for one in objects)
    return [one.mask for one in objects]  # the table keeps them there


@pytest.mark.parametrize(
    ("metadata", "objects", "strict", "partial"),
    [pytest.param(*case[1:], id=case[0]) for case in CASES],
)
def test_case(metadata, objects, strict, partial):
    check_row(metadata["include"], metadata["exclude"])
    for order in (objects, objects[::-1]):
        verdict = judge(detections(order), metadata, colors)
        assert verdict.strict is strict
        assert verdict.partial == pytest.approx(partial, abs=1e-12)
        assert bool(verdict.reasons) is not strict


@pytest.mark.parametrize(
    ("limit", "metadata", "objects", "strict", "partial"),
    [pytest.param(*case[1:], id=case[0]) for case in OVERLAPS],
)
def test_case_of_boxes_that_overlap(limit, metadata, objects, strict, partial):
    check_row(metadata["include"], metadata["exclude"])
    for order in (objects, objects[::-1]):
        verdict = judge(detections(order), metadata, colors, Limits(overlap=limit))
        assert verdict.strict is strict
        assert verdict.partial == pytest.approx(partial, abs=1e-12)


def test_there_are_enough_cases():
    assert len(CASES) >= 60 and len({case[0] for case in CASES}) == len(CASES)


TWINS = [Detection("dog", 0.9, (0, 0, 9, 9)), Detection("dog", 0.8, (0, 0, 9, 4))]
"""100 and 50 pixels with their borders, 50 shared: intersection over union 0.5."""


@pytest.mark.parametrize(("threshold", "count"), [(1.0, 2), (0.51, 2), (0.5, 1), (0.1, 1)], ids=str)
def test_of_boxes_that_overlap_the_surer_one_stays(threshold, count):
    assert overlap(TWINS[0].box, TWINS[1].box) == pytest.approx(0.5)
    found = kept(TWINS, None, Limits(overlap=threshold))["dog"]
    assert found == TWINS[:count]


def test_equal_boxes_both_count_by_the_published_threshold():
    same = [Detection("dog", 0.9, (0, 0, 9, 9)), Detection("dog", 0.8, (0, 0, 9, 9))]
    assert len(kept(same, None)["dog"]) == 2
    other = [same[0], Detection("cat", 0.8, (0, 0, 9, 9))]
    assert set(kept(other, None, Limits(overlap=0.5))) == {"dog", "cat"}  # classes apart


def test_the_number_of_objects_is_cut_before_overlaps_are_dropped():
    third = Detection("dog", 0.7, (50, 50, 60, 60))
    found = kept([*TWINS, third], None, Limits(objects=2, overlap=0.4))["dog"]
    assert found == TWINS[:1]


def test_boxes_that_do_not_meet():
    assert overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1


def test_relations_are_opposite_seen_from_the_other():
    a, b = (0, 0, 10, 10), (40, 45, 50, 55)
    assert relations(a, b) == {"left of", "above"}
    assert relations(b, a) == {"right of", "below"}
    assert relations(a, a) == set()


def test_colours_are_asked_only_where_a_clause_wants_one():
    def never(objects, name):
        raise AssertionError

    assert judge(detections(dogs(1)), plain(dog()), never).strict
    judge([], plain(dog(**RED)), never)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("sofa", "couch"), ("tvmonitor", "tv"), ("motorbike", "motorcycle"), ("Dog", "dog"),
        ("mouse", "computer mouse"), ("remote", "tv remote"), ("keyboard", "computer keyboard"),
        ("dining_table", "dining table"), ("pottedplant", "potted plant"), ("cat", "cat"),
    ],
)  # fmt: skip
def test_names_of_other_detectors(label, name):
    assert class_name(label) == name


@pytest.mark.parametrize(
    ("include", "exclude", "word"),
    [
        (None, None, "not a list of clauses"),
        ([], None, "not a list of clauses"),
        ([{"class": "dog"}], None, "include[0]"),
        (["dog"], None, "include[0]"),
        ([{"class": "dgo", "count": 1}], None, "did you mean 'dog'"),
        ([dog(0)], None, "count 0"),
        ([dog(1.5)], None, "1.5"),
        ([dog(True)], None, "True"),
        ([dog(color="mauve")], None, "mauve"),
        ([dog(position=["left of", 0])], None, "earlier"),
        ([dog(), cat(position=["beside", 0])], None, "beside"),
        ([dog(), cat(position=["left of", 2])], None, "earlier"),
        ([dog(), cat(position="left")], None, "position"),
        ([dog()], {"class": "cat"}, "exclude"),
        ([dog()], [{"class": "cat"}], "exclude[0]"),
    ],
)
def test_clauses_that_are_refused(include, exclude, word):
    with pytest.raises(ValueError, match=r"\S") as error:
        check_row(include, exclude)
    assert word in str(error.value)
