import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.config import override_config
from enat_jax.core.generate import generate, image_noise, plan_generation
from enat_jax.core.strategy import StrategyConfig, make_strategy
from enat_jax.experiments import similarity as module
from enat_jax.experiments.similarity import (
    GROUPS,
    Similarities,
    SimilarityError,
    cosine_similarity,
    image_means,
    similarity,
    step_features,
)
from enat_jax.models.autonat.network import AutoNAT, AutoNATConfig
from enat_jax.models.enat.network import ENAT, ENATConfig
from enat_jax.models.flops import step_flops
from enat_jax.sampling.sampler import restore

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = {"length": 16, "codebook_size": 5, "num_classes": 3, "width": 8, "num_heads": 2}


def enat(**changes):
    cfg = ENATConfig(**SIZES, encoder_depth=2, decoder_depth=1, **changes)
    return ENAT(cfg, rngs=nnx.Rngs(0))


NETWORKS = {
    "enat": enat,
    "once": lambda: enat(reproject=False),
    "autonat": lambda: AutoNAT(AutoNATConfig(**SIZES, depth=2), rngs=nnx.Rngs(0)),
}


@pytest.fixture(params=["enat", "enat without reuse", "once", "autonat"])
def case(request):
    """A network that says different things everywhere, and whether its steps reuse features."""
    name = request.param.split()[0]
    network = NETWORKS[name]()
    graphdef, params = nnx.split(network, nnx.Param)
    noisy = jax.tree.map(
        lambda x: x + 0.5 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    return nnx.merge(graphdef, noisy), request.param in ("enat", "once")


def generation(network, reuse, steps=4):
    """A generation of two images: class ids, token ids, records, plans, layout, strategy."""
    strategy = make_strategy(StrategyConfig(steps=steps))
    layout, traced = plan_generation(
        strategy, 16, lambda plan: step_flops(network.cfg, plan), reuse=reuse
    )
    class_ids = jnp.array([0, 2])
    noise = image_noise(jax.random.key(1), jnp.arange(2), network.cfg.codebook_size)
    graphdef, params = nnx.split(network)

    @jax.jit
    def run(params):
        return generate(nnx.merge(graphdef, params), class_ids, traced, noise, layout=layout,
                        null_class_id=network.cfg.null_class_id, record=True)  # fmt: skip

    token_ids, records = run(params)
    plans = [plan for bucket in layout.buckets for plan in bucket.plans]
    return class_ids, token_ids, records, plans, layout, traced


class TestCosine:
    def test_features_that_point_the_same_way_are_1_and_opposite_ones_minus_1(self):
        x = jax.random.normal(jax.random.key(0), (2, 3, 4))
        np.testing.assert_allclose(cosine_similarity(x, x), 1, atol=1e-6)
        np.testing.assert_allclose(cosine_similarity(x, 7 * x), 1, atol=1e-6)
        np.testing.assert_allclose(cosine_similarity(x, -x), -1, atol=1e-6)

    def test_it_is_the_cosine_of_the_angle(self):
        one, other = jnp.array([[[1.0, 0.0], [2.0, 0.0]]]), jnp.array([[[1.0, 1.0], [0.0, 3.0]]])
        np.testing.assert_allclose(cosine_similarity(one, other), [[0.5**0.5, 0]], atol=1e-6)

    def test_features_of_length_0_are_like_nothing(self):
        zero, one = jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 2))
        assert cosine_similarity(zero, zero)[0, 0] == 0
        assert cosine_similarity(zero, one)[0, 0] == 0


class TestGroups:
    # four tokens, revealed by steps 0, 1, 2, 1; three steps, so two pairs
    MADE = Similarities(np.array([[[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]]),
                        np.array([[0, 1, 2, 1]]))  # fmt: skip

    def test_a_token_is_new_between_the_step_that_reveals_it_and_the_next(self):
        np.testing.assert_array_equal(self.MADE.group("new")[0], [[1, 0, 0, 0], [0, 1, 0, 1]])
        np.testing.assert_array_equal(self.MADE.group("previous")[0], [[0, 0, 0, 0], [1, 0, 0, 0]])
        np.testing.assert_array_equal(self.MADE.group("masked")[0], [[0, 1, 1, 1], [0, 0, 1, 0]])

    def test_every_token_is_in_one_group(self):
        found = sum(self.MADE.group(name).astype(int) for name in GROUPS if name != "all")
        np.testing.assert_array_equal(found, 1)
        assert self.MADE.group("all").all()

    def test_means_are_over_a_groups_tokens_and_nan_where_there_are_none(self):
        def means(name):
            return image_means(self.MADE.cosine, self.MADE.group(name))[0]

        np.testing.assert_allclose(means("new"), [0.1, 0.7])
        np.testing.assert_allclose(means("previous"), [np.nan, 0.5])
        np.testing.assert_allclose(means("masked"), [0.3, 0.7])
        np.testing.assert_allclose(means("all"), [0.25, 0.65])


class TestReplay:
    def test_features_are_those_that_the_generation_had_its_logits_from(self, case):
        network, reuse = case
        class_ids, token_ids, records, plans, *_ = generation(network, reuse)
        order = records[-1].order[-1][:, :16]
        found = step_features(network, class_ids, token_ids, order, plans)
        assert len(found) == 4
        for features, record in zip(found, records, strict=True):
            positions = record.positions[0]
            masked = jnp.take_along_axis(features, positions[..., None], axis=1)
            np.testing.assert_allclose(
                network.logits(masked), record.conditional[0], atol=1e-4, rtol=1e-4
            )

    def test_carried_features_are_projected_and_others_computed_anew(self):
        network = NETWORKS["enat"]()
        for reuse in (True, False):
            class_ids, token_ids, records, plans, *_ = generation(network, reuse)
            order = records[-1].order[-1][:, :16]
            found = step_features(network, class_ids, token_ids, order, plans)
            seen = order[:, : plans[2].previous or plans[2].new]  # visible at the third step
            before, after = (jnp.take_along_axis(x, seen[..., None], axis=1) for x in found[1:3])
            projected = network.reuse_projection(before)[:, : plans[2].previous]
            same = np.allclose(after[:, : projected.shape[1]], projected, atol=1e-4)
            assert same
            assert (projected.shape[1] > 0) == reuse

    def test_similarities_and_the_step_of_reveal_are_the_generations(self, case):
        network, reuse = case
        class_ids, token_ids, records, plans, layout, traced = generation(network, reuse)
        graphdef, params = nnx.split(network)
        cosine, revealed_at = module._compare(
            graphdef, layout, params, traced, jax.random.key(1), class_ids, jnp.arange(2)
        )
        expected = np.zeros((2, 16), int)
        for step, record in enumerate(records):
            np.put_along_axis(expected, np.asarray(record.positions[0]), step, axis=1)
        np.testing.assert_array_equal(revealed_at, expected)
        order = records[-1].order[-1][:, :16]
        features = step_features(network, class_ids, token_ids, order, plans)
        for pair in range(3):
            one, other = (np.asarray(x, np.float64) for x in features[pair : pair + 2])
            by_hand = (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
            np.testing.assert_allclose(cosine[:, pair], by_hand, atol=1e-4)


class TestRun:
    def restored(self, trained, *overrides):
        return restore(trained, overrides=lambda f: override_config(f, ["strategy.steps=3",
                                                                        *overrides]))  # fmt: skip

    def test_averages_are_those_of_the_maps_whatever_the_batch(self, trained, tmp_path):
        found = similarity(self.restored(trained), tmp_path, images=25, samples=25, seed=3)
        arrays = np.load(tmp_path / "similarity.npz")
        maps = Similarities(arrays["cosine"], arrays["revealed_at"])
        assert maps.cosine.shape == (25, 2, 64)
        assert np.abs(maps.cosine).max() <= 1 + 1e-5
        for name in GROUPS:
            chosen = np.where(maps.group(name), maps.cosine, np.nan)
            by_image = [[row[~np.isnan(row)].mean() if (~np.isnan(row)).any() else np.nan
                         for row in image] for image in chosen]  # fmt: skip
            expected = np.mean(by_image, axis=0)
            ours = [np.nan if v is None else v for v in found[name]["mean"]]
            np.testing.assert_allclose(ours, expected, atol=1e-5)
        assert found["previous"]["mean"][0] is None  # nothing was revealed before the first pair
        assert json.loads((tmp_path / "similarity.json").read_text()) == found
        assert (tmp_path / "similarity.png").stat().st_size > 1000
        again = self.restored(trained, "sample.batch_size=10")
        other = similarity(again, tmp_path / "other", images=1, samples=25, seed=3)
        np.testing.assert_allclose(other["all"]["mean"], found["all"]["mean"], atol=1e-4)
        assert len(np.load(tmp_path / "other" / "similarity.npz")["cosine"]) == 1

    def test_reuse_off_encodes_visible_tokens_anew(self, trained, tmp_path):
        on = similarity(self.restored(trained), tmp_path / "on", images=1, samples=10)
        off = self.restored(trained, "strategy.reuse=False")
        found = similarity(off, tmp_path / "off", images=1, samples=10)
        assert (on["reuse"], found["reuse"]) == (True, False)
        assert on["previous"]["mean"][1] != found["previous"]["mean"][1]

    @pytest.mark.parametrize(
        ("override", "options", "message"),
        [
            ("strategy.steps=1", {}, r"strategy\.steps = 1, must be at least 2"),
            ("strategy.steps=2", {"images": 3, "samples": 2},
             "images = 3, must be between 1 and samples = 2"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_compared_is_refused(self, trained, tmp_path, override, options,
                                                message):  # fmt: skip
        with pytest.raises(SimilarityError, match=message):
            similarity(self.restored(trained, override), tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def test_several_hosts_are_refused(self, trained, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "several", lambda: True)
        with pytest.raises(SimilarityError, match="similarity runs on one host"):
            similarity(self.restored(trained), tmp_path)
