from __future__ import annotations

import pytest
from pydantic import ValidationError

from dgpo.core import StepWindow
from dgpo.errors import UserError


def test_a_sliding_window_moves_on_and_begins_again():
    window = StepWindow(size=2, mode="sliding", every=3, first=1, last=4)
    places = [window.place(10, iteration, 0) for iteration in range(15)]
    assert [place.start for place in places] == [1] * 3 + [2] * 3 + [3] * 3 + [1] * 3 + [2] * 3
    assert all(len(place) == 2 for place in places)


def test_a_random_window_visits_every_place_and_is_the_seeds():
    window = StepWindow(size=2, every=2)
    places = [window.place(6, iteration, 7).start for iteration in range(60)]
    assert set(places) == {0, 1, 2, 3}  # step 5 is the last and has no noise
    assert places[::2] == places[1::2]
    assert places == [window.place(6, iteration, 7).start for iteration in range(60)]
    assert places != [window.place(6, iteration, 8).start for iteration in range(60)]


def test_a_window_that_does_not_fit_is_refused():
    assert StepWindow(size=3).place(4, 0, 0) == range(0, 3)
    with pytest.raises(UserError, match=r"window.size = 4.*leaves 3 steps"):
        StepWindow(size=4).place(4, 0, 0)
    with pytest.raises(UserError, match=r"window.last = 3: rollout.steps = 4 has noise in steps 0"):
        StepWindow(last=3).place(4, 0, 0)
    with pytest.raises(ValidationError, match="hold fewer"):
        StepWindow(size=3, first=2, last=3)
