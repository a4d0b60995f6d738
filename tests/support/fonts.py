"""Fonts for tests that draw."""

import pytest
from matplotlib.font_manager import findfont, get_font

from tests.runs.made_up_runs import made_up_step
from tinkex_py.runs import scalars
from tinkex_py.runs.curves import Curves
from tinkex_py.runs.pictures import drawings
from tinkex_py.runs.report.drawing import picture_of


@pytest.fixture(scope="module")
def fonts() -> None:
    """Matplotlib opens each font at its first use and keeps it open."""
    curves = Curves()
    for step in (1, 2):
        curves.add(step, scalars(made_up_step(step)))
    for drawing in drawings({"a": curves.names}):
        if drawing.picture.key == "gradient_norms":  # with a log axis, and so with powers of ten
            picture_of(drawing, {"a": curves})
    get_font(findfont("DejaVu Sans:italic"))
