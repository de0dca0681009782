import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from enat_jax.experiments.ablate.plot import Series, draw_pareto, pareto_front


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws points; returns the figure and the PNG's path."""

    def draw(points):
        kept = []
        save = Figure.savefig
        monkeypatch.setattr(
            Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))[1]
        )
        draw_pareto(tmp_path / "pareto.png", points, "frechet_distance")
        return kept[0], tmp_path / "pareto.png"

    return draw


def test_the_front_is_what_nothing_beats_by_rising_cost():
    costs, scores = [4.0, 1.0, 2.0, 3.0, 2.0, 5.0], [1.0, 9.0, 5.0, 6.0, 7.0, 1.0]
    assert pareto_front(costs, scores) == [1, 2, 0]


def test_points_that_are_equal_are_both_on_the_front():
    assert pareto_front([1.0, 1.0, 2.0], [3.0, 3.0, 3.0]) == [0, 1]


def test_both_panels_show_every_point_and_name_the_front(drawn):
    points = [Series(f"steps={n}", n / 10, n / 100, 50 / n, 1.0) for n in (4, 6, 8)]
    points.append(Series("worse", 0.8, 0.09, 40.0, 0.0))
    figure, path = drawn(points)
    assert len(figure.axes) == 2
    for axes, unit in zip(figure.axes, ("GFLOP per image", "ms per image"), strict=True):
        assert unit in axes.get_xlabel()
        assert {text.get_text() for text in axes.texts} == {point.name for point in points}
        front = next(line for line in axes.lines if line.get_label() == "Pareto front")
        np.testing.assert_allclose(front.get_ydata(), [50 / 4, 50 / 6, 50 / 8])
    assert figure.axes[1].lines[0].get_xdata()[0] == pytest.approx(40.0)  # ms
    assert "frechet distance" in figure.axes[0].get_ylabel()
    with Image.open(path) as image:
        assert image.size[0] > 1000


def test_names_of_close_points_do_not_lie_on_each_other(drawn):
    points = [Series(f"point number {n}", 1 + n / 1000, 0.1, 5 + n / 1000, 0.0) for n in range(6)]
    points.append(Series("far", 2.0, 0.2, 4.0, 0.0))
    figure, _ = drawn(points)
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_single_point_is_drawn(drawn):
    _, path = drawn([Series("alone", 0.1, 0.0, 0.0, 0.0)])
    assert path.exists()
