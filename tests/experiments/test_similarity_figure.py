import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from enat_jax.experiments.similarity_figure import draw


def test_maps_stand_under_the_newly_revealed_tokens_and_averages_below(tmp_path, monkeypatch):
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))[1]
    )
    rng = np.random.default_rng(0)
    cosine, new = rng.uniform(0.2, 1.0, (2, 3, 6)), rng.random((2, 3, 6)) < 0.5
    names = ("new", "previous", "masked", "all")
    averages = {n: {"mean": rng.random(3), "deviation": np.zeros(3)} for n in names}
    averages["previous"]["mean"][0] = np.nan
    draw(tmp_path / "figure.png", cosine, new, averages, (2, 3))
    maps, below = kept[0].subfigs
    panels = [axes for axes in maps.axes if axes.images and len(axes.images[0].get_array()) == 2]
    assert len(panels) == 2 * 2 * 3
    for image in range(2):
        for pair in range(3):
            above, under = panels[6 * image + pair], panels[6 * image + 3 + pair]
            np.testing.assert_array_equal(
                above.images[0].get_array(), new[image, pair].reshape(2, 3)
            )
            np.testing.assert_array_equal(
                under.images[0].get_array(), cosine[image, pair].reshape(2, 3)
            )
    (axes,) = below.axes
    drawn = [box.lines[0].get_ydata() for box in axes.containers]
    for values, name in zip(drawn, names, strict=True):
        np.testing.assert_array_equal(values, averages[name]["mean"])
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size[0] >= 800
