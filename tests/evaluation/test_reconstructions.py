import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.errors import UserError
from enat_jax.evaluation import reconstructions as module
from enat_jax.evaluation.frechet import frechet_distance
from enat_jax.evaluation.reconstructions import Reconstructions, psnr, read_images, usage
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.tokenizers.vqgan import VQGAN, VQGANConfig
from tests.support.fake_inception import FakeInception, gaussian
from tests.support.images import numbered
from tests.support.on_hosts import on_two_hosts

CFG = VQGANConfig(channels=2, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4,
                  codebook_size=8, norm_groups=1)  # fmt: skip
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def split():
    return nnx.split(VQGAN(CFG, rngs=nnx.Rngs(0)), nnx.Param)


def reconstruct(split, batch_size, **options):
    options = {"name": "held_out", "pictures": 3, **options}
    placement = Placement.of(MeshConfig())
    run = Reconstructions(split[0], 8, IMAGES, placement, batch_size=batch_size, **options)
    return run(split[1])


def test_scores_are_those_of_the_reconstructions(split, monkeypatch):
    monkeypatch.setattr(module, "load_inception", lambda path: FakeInception())
    model = nnx.merge(*split)
    token_ids = model.encode(jnp.asarray(IMAGES / np.float32(255)))
    made = np.asarray(jnp.clip(model.decode(token_ids, (4, 4)), 0, 1))
    scores, _ = reconstruct(split, 5, inception="weights.pth")
    errors = ((made - IMAGES / 255) ** 2).mean(axis=(1, 2, 3))
    assert scores["psnr"] == pytest.approx((-10 * np.log10(errors)).mean(), rel=1e-5)
    assert scores["images"] == 5
    assert scores["codes_used"] == len(np.unique(token_ids)) / 8
    features = [
        np.asarray(FakeInception()(jnp.float32(x / 255)).pool)
        for x in (np.round(255 * made), IMAGES)
    ]
    expected = frechet_distance(*map(gaussian, features))
    assert scores["rfid"] == pytest.approx(expected, rel=0.02)  # a value may round the other way
    assert "rfid" not in reconstruct(split, 5)[0]


def test_scores_and_picture_are_the_same_in_any_batches(split):
    (scores, picture), (in_halves, picture_in_halves) = reconstruct(split, 5), reconstruct(split, 2)
    assert in_halves == pytest.approx(scores, rel=1e-5)
    np.testing.assert_allclose(picture_in_halves.astype(int), picture.astype(int), atol=1)
    # originals above their reconstructions
    assert picture.shape == (2 * (68 + 18), 3 * 68 + 4, 3)
    np.testing.assert_array_equal(picture[18 : 18 + 64 : 8, 4 : 4 + 64 : 8], IMAGES[0])


def test_peak_signal_to_noise_is_its_formula_image_by_image():
    assert psnr(np.array([0.01, 0.0001])) == pytest.approx(30)
    assert psnr(np.zeros(2)) == pytest.approx(100)


def test_usage_counts_codes():
    assert usage(np.array([[0, 0], [3, 3]]), 8) == pytest.approx({"codes_used": 0.25,
                                                                  "perplexity": 2.0})  # fmt: skip


TWO_HOSTS = """
import json
import tests.evaluation.test_reconstructions as t
t.module.load_inception = lambda path: t.FakeInception()
graphdef, params = t.nnx.split(t.VQGAN(t.CFG, rngs=t.nnx.Rngs(0)), t.nnx.Param)
params = t.Placement.of(t.MeshConfig()).put(params)
scores, picture = t.reconstruct((graphdef, params), 5, inception="weights.pth")
with open(f"{arguments[0]}/{process}.json", "w") as file:
    json.dump([scores, picture.tolist()], file)
"""


@pytest.mark.slow
def test_two_hosts_see_what_one_sees(split, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_inception", lambda path: FakeInception())
    on_two_hosts(TWO_HOSTS, tmp_path)
    expected, expected_picture = reconstruct(split, 5, inception="weights.pth")
    for process in range(2):
        scores, picture = json.loads((tmp_path / f"{process}.json").read_text())
        assert scores.keys() == expected.keys()
        for name, score in scores.items():
            assert score == pytest.approx(expected[name], rel=0.02 if name == "rfid" else 1e-5)
        np.testing.assert_allclose(picture, expected_picture.astype(int), atol=1)


def test_images_are_taken_evenly_and_unreadable_ones_left_out():
    warnings = []
    images = read_images(numbered(9, broken=(4,)), 5, 8, warn=warnings.append)
    assert images[:, 0, 0, 0].tolist() == [0, 2, 6, 8]
    (warning,) = warnings
    assert warning.startswith("skipped 4: ")
    assert len(read_images(numbered(9), 100, 8, warn=warnings.append)) == 9
    with pytest.raises(UserError, match="numbers: no image is readable"):
        read_images(numbered(9, broken=range(9)), 5, 8, warn=warnings.append)
