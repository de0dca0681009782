"""The drawing of the architecture is of today's imports."""

import importlib.util
import pathlib

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_the_drawing_is_up_to_date():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.drawing() == (DOCS / "architecture.svg").read_text(), (
        "run `python docs/draw_architecture.py`"
    )
