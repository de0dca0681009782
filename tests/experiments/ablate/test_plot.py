import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from enat_jax.experiments.ablate.plot import draw_pareto, pareto_front


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws points, given as (name, gigaflop, seconds, score, deviation); returns the figure."""
    kept, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))[1]
    )

    def draw(*points):
        rows = [{"point": name, "gigaflop_per_image": gigaflop, "images_per_second": 1 / seconds,
                 "fid_score": score, "fid_score_deviation": deviation}
                for name, gigaflop, seconds, score, deviation in points]  # fmt: skip
        draw_pareto(tmp_path / "pareto.png", rows, "fid_score")
        with Image.open(tmp_path / "pareto.png") as image:
            assert image.size[0] > 1000
        return kept[0]

    return draw


def test_the_front_is_what_nothing_beats_by_rising_cost():
    costs, scores = [4.0, 1.0, 2.0, 3.0, 2.0, 5.0], [1.0, 9.0, 5.0, 6.0, 7.0, 1.0]
    assert pareto_front(costs, scores) == [1, 2, 0]
    assert pareto_front([1.0, 1.0, 2.0], [3.0, 3.0, 3.0]) == [0, 1]  # both of two equals


def test_both_panels_show_every_point_and_name_the_front(drawn):
    points = [(f"steps={n}", n / 10, n / 100, 50 / n, 1.0) for n in (4, 6, 8)]
    figure = drawn(*points, ("worse", 0.8, 0.09, 40.0, ""))
    assert len(figure.axes) == 2
    for axes, unit in zip(figure.axes, ("GFLOP per image", "ms per image"), strict=True):
        assert unit in axes.get_xlabel()
        front = next(line for line in axes.lines if line.get_label() == "Pareto front")
        np.testing.assert_allclose(front.get_ydata(), [50 / 4, 50 / 6, 50 / 8])
    (legend,) = figure.legends
    names = {text.get_text() for text in legend.get_texts()}
    assert names == {"steps=4", "steps=6", "steps=8", "worse", "Pareto front"}
    assert figure.axes[1].lines[0].get_xdata()[0] == pytest.approx(40.0)  # ms
    assert "fid score" in figure.axes[0].get_ylabel()


def test_a_single_point_is_drawn(drawn):
    drawn(("alone", 0.1, 0.01, 0.0, ""))
