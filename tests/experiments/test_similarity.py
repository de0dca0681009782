import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from enat_jax.core.generate import generate, image_noise
from enat_jax.errors import UserError
from enat_jax.experiments import similarity as module
from enat_jax.experiments.similarity import (
    cosine_similarity,
    draw,
    image_means,
    similarity,
    step_features,
    token_groups,
)
from enat_jax.sampling.sampler import Sampler
from tests.support.made_up import made_up

CASES = {
    "enat": ("digits",),
    "without reuse": ("digits", "strategy.reuse=False"),
    "projected once": ("digits", "model.reproject=False"),
    "autonat": ("digits_autonat",),
}


def restored(name, *overrides):
    return made_up(name, "sample.batch_size=2", "strategy.steps=3", *overrides)


@functools.cache
def recorded(case):
    """A case's checkpoint, and the first two images of it: records, plans, features, logits."""
    checkpoint = restored(*CASES[case])
    sampler = Sampler(checkpoint.config, checkpoint.ema)
    layout, traced = sampler.program.plan()
    plans = [plan for bucket in layout.buckets for plan in bucket.plans]

    @jax.jit
    def run(params):
        network, class_ids = sampler.program.network(params), jnp.arange(2)
        noise = image_noise(jax.random.key(3), jnp.arange(2), network.cfg.codebook_size)
        token_ids, records = generate(
            network, class_ids, traced, noise, layout=layout,
        )  # fmt: skip
        order = records[-1].order[-1][:, :16]
        features = step_features(network, class_ids, token_ids, order, plans)
        projection = getattr(network, "reuse_projection", lambda x: x)
        return (records, order, features, [network.logits(x) for x in features],
                [projection(x) for x in features])  # fmt: skip

    return checkpoint, plans, *run(sampler.params)


@pytest.mark.parametrize("case", [
    "enat", "autonat", *(pytest.param(case, marks=pytest.mark.slow)
                         for case in ("without reuse", "projected once")),
])  # fmt: skip
def test_features_are_those_that_the_generation_had_its_logits_from(case):
    _, plans, records, _, _, logits, _ = recorded(case)
    assert len(logits) == len(plans) == 3
    for all_logits, record in zip(logits, records, strict=True):
        masked = np.take_along_axis(all_logits, record.positions[0][..., None], axis=1)
        np.testing.assert_allclose(masked, record.conditional[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("case", "reuse"), [("enat", True), ("without reuse", False)])
def test_carried_features_are_projected_and_others_computed_anew(case, reuse):
    _, plans, _, order, features, _, projected = recorded(case)
    seen = order[:, : plans[1].previous + plans[1].new, None]  # visible at the second step
    third, again = (np.take_along_axis(x, seen, axis=1) for x in (features[2], projected[1]))
    assert np.allclose(third, again, atol=1e-4) == reuse


@pytest.mark.parametrize("case", [
    case if case in ("enat", "autonat") else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES
])  # fmt: skip
def test_similarities_and_the_step_of_reveal_are_the_generations(case, tmp_path):
    checkpoint, _, records, _, features, *_ = recorded(case)
    similarity(checkpoint, tmp_path, images=2, samples=2, seed=3)
    made = np.load(tmp_path / "similarity.npz")
    expected = np.zeros((2, 16), int)
    for step, record in enumerate(records):
        np.put_along_axis(expected, np.asarray(record.positions[0]), step, axis=1)
    np.testing.assert_array_equal(made["revealed_at"], expected)
    for pair in range(2):
        one, other = (np.asarray(x, np.float64) for x in features[pair : pair + 2])
        by_hand = (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
        np.testing.assert_allclose(made["cosine"][:, pair], by_hand, atol=1e-4)


def test_averages_are_those_of_the_maps_whatever_the_batch(tmp_path):
    result = similarity(restored("digits"), tmp_path, images=5, samples=5)
    assert result["reuse"]
    assert json.loads((tmp_path / "similarity.json").read_text()) == result
    maps = np.load(tmp_path / "similarity.npz")
    for name, chosen in token_groups(maps["revealed_at"], 3).items():
        values = np.where(chosen, maps["cosine"], np.nan)
        means = [[row[~np.isnan(row)].mean() if (~np.isnan(row)).any() else np.nan
                  for row in image] for image in values]  # fmt: skip
        for kind, expected in (("mean", np.mean(means, axis=0)),
                               ("deviation", np.std(means, axis=0, ddof=1))):  # fmt: skip
            ours = [np.nan if value is None else value for value in result[name][kind]]
            np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert result["previous"]["mean"][0] is None  # nothing was revealed before the first pair
    again = restored("digits", "sample.batch_size=5")
    other = similarity(again, tmp_path / "other", images=1, samples=5)
    np.testing.assert_allclose(other["all"]["mean"], result["all"]["mean"], atol=1e-5)
    assert len(np.load(tmp_path / "other" / "similarity.npz")["cosine"]) == 1


def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch):
    def refused(message, *overrides, **options):
        with pytest.raises(UserError, match=message):
            similarity(restored("digits", *overrides), tmp_path / "out", **options)

    refused(r"strategy\.steps = 1, must be at least 2", "strategy.steps=1")
    refused("images = 3, must be between 1 and samples = 2", images=3, samples=2)
    refused(r"give --config\.strategy\.reuse=False", "model.reuse=all_layers")
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    refused("similarity runs on one host")
    assert not (tmp_path / "out").exists()


def test_the_cosine_is_that_of_the_angle_and_0_for_features_of_length_0():
    one = jnp.array([[[1.0, 0.0], [2.0, 0.0], [3.0, 1.0], [0.0, 0.0], [0.0, 0.0]]])
    other = jnp.array([[[1.0, 1.0], [0.0, 3.0], [-6.0, -2.0], [1.0, 1.0], [0.0, 0.0]]])
    np.testing.assert_allclose(cosine_similarity(one, other), [[0.5**0.5, 0, -1, 0, 0]], atol=1e-6)


def test_a_token_is_new_between_the_step_that_reveals_it_and_the_next():
    # four tokens, revealed by steps 0, 1, 2, 1; three steps, so two pairs
    groups = token_groups(np.array([[0, 1, 2, 1]]), 3)
    cosine = np.array([[[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]])
    expected = {
        "new": ([[1, 0, 0, 0], [0, 1, 0, 1]], [0.1, 0.7]),
        "previous": ([[0, 0, 0, 0], [1, 0, 0, 0]], [np.nan, 0.5]),
        "masked": ([[0, 1, 1, 1], [0, 0, 1, 0]], [0.3, 0.7]),
        "all": ([[1, 1, 1, 1], [1, 1, 1, 1]], [0.25, 0.65]),
    }
    assert list(groups) == list(expected)
    for name, (tokens, means) in expected.items():
        np.testing.assert_array_equal(groups[name][0], tokens)
        np.testing.assert_allclose(image_means(cosine, groups[name])[0], means)


def test_maps_stand_under_the_newly_revealed_tokens_and_averages_below(tmp_path, monkeypatch):
    kept, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))[1]
    )
    rng = np.random.default_rng(0)
    cosine, new = rng.uniform(0.2, 1.0, (2, 3, 6)), rng.random((2, 3, 6)) < 0.5
    averages = {name: {"mean": rng.random(3), "deviation": np.zeros(3)}
                for name in ("new", "previous", "masked", "all")}  # fmt: skip
    averages["previous"]["mean"][0] = np.nan
    draw(tmp_path / "figure.png", cosine, new, averages, (2, 3))
    maps, below = kept[0].subfigs
    shown = [axes.images[0].get_array() for axes in maps.axes if axes.images]
    panels = np.array([x for x in shown if x.shape == (2, 3)]).reshape(2, 2, 3, 6)
    np.testing.assert_array_equal(panels[:, 0], new)
    np.testing.assert_array_equal(panels[:, 1], cosine)
    drawn = [box.lines[0].get_ydata() for box in below.axes[0].containers]
    np.testing.assert_array_equal(drawn, [average["mean"] for average in averages.values()])
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size[0] >= 800
