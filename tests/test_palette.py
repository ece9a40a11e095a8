"""A method has one colour, in figures of all notebooks, and its students shades of it."""

from __future__ import annotations

import pytest
from matplotlib.colors import rgb_to_hsv, to_rgb

from turbo_lab.errors import BadInput
from turbo_lab.palette import METHODS, colour_of, shades
from turbo_lab.recipes import trajectory
from turbo_lab.studies import adversarial, distribution, warm_start


def test_every_method_that_is_compared_has_a_colour_of_its_own() -> None:
    families = (*trajectory.FAMILIES, "dmd2", "pcm", "warm", "turbo")
    assert len({colour_of(family) for family in families}) == len(families)
    for family in (
        *distribution.TITLES,
        *warm_start.TITLES,
        *warm_start.STARTS,
        *adversarial.TITLES,
    ):
        assert colour_of(family) in METHODS.values()


def test_a_changed_student_has_the_colour_of_its_method() -> None:
    assert colour_of("dmd2-second-0.5") == METHODS["dmd2"]
    assert colour_of("warm-second-0.5") == METHODS["warm"] != colour_of("warm-start")
    with pytest.raises(BadInput, match="family='dmd9'"):
        colour_of("dmd9")


def test_shades_go_from_light_to_dark_through_one_hue() -> None:
    assert shades("dmd2", 1) == (METHODS["dmd2"],)
    colours = [to_rgb(shade) for shade in shades("dmd2", 3)]
    assert sorted((sum(c) for c in colours), reverse=True) == [sum(c) for c in colours]
    hues = [float(rgb_to_hsv(c)[0]) for c in colours]
    assert hues == pytest.approx([hues[0]] * 3, abs=0.01)
