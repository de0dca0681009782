import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.errors import UserError
from enat_jax.evaluation import reconstructions as held_out_module
from enat_jax.evaluation.inception import Features
from enat_jax.evaluation.reconstructions import HeldOut, psnr, read_images, usage
from enat_jax.evaluation.scores import frechet_distance
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.tokenizers.vqgan import VQGAN, VQGANConfig
from tests.support.images import numbered
from tests.support.on_hosts import on_two_hosts

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = VQGANConfig(channels=2, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4,
                  codebook_size=8, norm_groups=1)  # fmt: skip
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def split():
    return nnx.split(VQGAN(CFG, rngs=nnx.Rngs(0)), nnx.Param)


def look(split, batch_size, **options):
    options = {"name": "held_out", "pictures": 3, **options}
    placement = Placement.of(MeshConfig())
    return HeldOut(split[0], 8, IMAGES, placement, batch_size=batch_size, **options)(split[1])


def test_scores_are_those_of_the_reconstructions(split):
    model = nnx.merge(*split)
    token_ids = model.encode(jnp.asarray(IMAGES / np.float32(255)))
    made = jnp.clip(model.decode(token_ids, (4, 4)), 0, 1)
    scores = look(split, 5).scores
    errors = ((made - IMAGES / 255) ** 2).mean(axis=(1, 2, 3))
    assert scores["psnr"] == pytest.approx((-10 * np.log10(errors)).mean(), rel=1e-5)
    assert scores["images"] == 5
    assert scores["codes_used"] == len(np.unique(token_ids)) / 8


def test_scores_are_the_same_in_any_batches(split):
    whole, halves = look(split, 5), look(split, 2)
    assert halves.scores == pytest.approx(whole.scores, rel=1e-5)
    np.testing.assert_allclose(halves.picture.astype(int), whole.picture.astype(int), atol=1)


def test_the_picture_has_originals_above_reconstructions(split):
    picture = look(split, 5).picture
    assert picture.shape == (2 * (68 + 18), 3 * 68 + 4, 3)
    np.testing.assert_array_equal(picture[18 : 18 + 64 : 8, 4 : 4 + 64 : 8], IMAGES[0])


def test_peak_signal_to_noise_is_its_formula_image_by_image():
    assert psnr(np.array([0.01, 0.0001])) == pytest.approx(30)
    assert psnr(np.zeros(2)) == pytest.approx(100)


def test_usage_counts_codes():
    assert usage(np.array([[0, 0], [3, 3]]), 8) == pytest.approx({"codes_used": 0.25,
                                                                  "perplexity": 2.0})  # fmt: skip


def test_rfid_is_between_originals_and_reconstructions(split, monkeypatch):
    class Extractor:
        """The first 16 values of an image."""

        def __init__(self, inception, placement):
            assert inception == "weights.pth"

        def __call__(self, images):
            values = jnp.float32(images).reshape(len(images), -1)[:, :16]
            return Features(values, values, values)

    monkeypatch.setattr(held_out_module, "FeatureExtractor", Extractor)
    monkeypatch.setattr(held_out_module, "load_inception", lambda path: path)
    monkeypatch.setattr(held_out_module, "_NO_MOMENTS", held_out_module.Moments.empty(16))
    model = nnx.merge(*split)
    made = model.decode(model.encode(jnp.asarray(IMAGES / np.float32(255))), (4, 4))
    made = np.round(255 * np.clip(made, 0, 1))
    expected = frechet_distance(IMAGES.reshape(5, -1)[:, :16], made.reshape(5, -1)[:, :16])
    found = look(split, 2, inception="weights.pth").scores["rfid"]
    assert found == pytest.approx(expected, rel=0.02)  # a value may be rounded the other way


TWO_HOSTS = """
import json
import tests.evaluation.test_reconstructions as t
from flax import nnx
from enat_jax.parallel.placement import MeshConfig, Placement
class Extractor:
    def __init__(self, inception, placement):
        pass
    def __call__(self, images):
        values = images.reshape(len(images), -1)[:, :16].astype("float32")
        return t.Features(values, values, values)
t.held_out_module.FeatureExtractor = Extractor
t.held_out_module.load_inception = lambda path: path
t.held_out_module._NO_MOMENTS = t.held_out_module.Moments.empty(16)
graphdef, params = nnx.split(t.VQGAN(t.CFG, rngs=nnx.Rngs(0)), nnx.Param)
params = Placement.of(MeshConfig()).put(params)
found = t.look((graphdef, params), 5, inception="weights.pth")
with open(f"{arguments[0]}/{process}.json", "w") as file:
    json.dump([found.scores, found.picture.tolist()], file)
"""


def test_two_hosts_see_what_one_sees(split, tmp_path):
    on_two_hosts(TWO_HOSTS, tmp_path)
    one = look(split, 5)
    for process in range(2):
        scores, picture = json.loads((tmp_path / f"{process}.json").read_text())
        assert scores.pop("rfid") >= 0
        assert scores == pytest.approx(one.scores, rel=1e-5)
        np.testing.assert_allclose(picture, one.picture.astype(int), atol=1)


def test_images_are_taken_evenly_and_unreadable_ones_left_out():
    warnings = []
    images = read_images(numbered(9, broken=(4,)), 5, 8, warn=warnings.append)
    assert images[:, 0, 0, 0].tolist() == [0, 2, 6, 8]
    (warning,) = warnings
    assert warning.startswith("skipped 4: ")
    assert len(read_images(numbered(9), 100, 8, warn=warnings.append)) == 9
    with pytest.raises(UserError, match="numbers: no image is readable"):
        read_images(numbered(9, broken=range(9)), 5, 8, warn=warnings.append)
