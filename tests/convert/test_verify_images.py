"""Replaying recordings of VQGAN and Inception: what is compared, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.convert.verify_images import verify_inception, verify_vqgan
from enat_jax.evaluation.inception import Features, Inception
from enat_jax.models.import_table import ConvertError, apply_rules
from enat_jax.tokenizers.vqgan import VQGANConfig, abstract_vqgan
from enat_jax.tokenizers.vqgan_weights import rules
from tests.golden.vqgan.load_state import load_state
from tests.support.golden import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = 1e-4
CFG = VQGANConfig(channels=32, latent_channels=32, codebook_size=64)


def vqgan_from(weights):
    graphdef, abstract = abstract_vqgan(CFG)
    return nnx.merge(graphdef, apply_rules(rules(CFG, "torch"), weights, abstract))


@pytest.fixture(scope="module")
def weights():
    return load_state(GOLDEN / "vqgan")


@pytest.fixture(scope="module")
def model(weights):
    return vqgan_from(weights)


@pytest.fixture
def recorded():
    return dict(np.load(GOLDEN / "vqgan/io.npz"))


def failed(comparisons):
    return {each.name for each in comparisons if each.fails(TOLERANCE)}


class TestVqgan:
    def test_the_recorded_network_passes(self, model, recorded):
        found = verify_vqgan(model, recorded)
        assert {each.name.removeprefix("vqgan/") for each in found} == {
            "encoder_out", "indices", "codebook_quant", "decode", "random_decode",
        }  # fmt: skip
        assert failed(found) == set()
        assert [each.name for each in found if each.exact] == ["vqgan/indices"]

    @pytest.mark.parametrize(
        ("name", "outputs"),
        [
            ("encoder.conv_out.bias", {"encoder_out"}),
            ("decoder.conv_out.bias", {"decode", "random_decode"}),
            ("quantize.embedding.weight", {"codebook_quant", "decode", "random_decode"}),
        ],
    )
    def test_one_perturbed_weight_fails(self, weights, recorded, name, outputs):
        changed = vqgan_from({**weights, name: weights[name] + np.float32(0.001)})
        found = failed(verify_vqgan(changed, recorded))
        assert found - {"vqgan/indices"} == {f"vqgan/{each}" for each in outputs}

    def test_another_token_fails(self, model, recorded):
        recorded["indices"][1, 2, 3] ^= 1
        assert {"vqgan/indices", "vqgan/decode"} <= failed(verify_vqgan(model, recorded))

    def test_what_is_recorded_is_compared(self, model, recorded):
        few = {name: recorded[name] for name in ("random_ids", "random_decode", "decode")}
        assert [each.name for each in verify_vqgan(model, few)] == ["vqgan/random_decode"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"image": np.zeros((1, 64, 64, 3), np.float32)},
                "image is (1, 64, 64, 3), want (B, 3",
            ),
            ({"image": np.zeros((1, 3, 64, 40), np.float32)}, "sides multiples of 16"),
            ({"image": np.zeros((0, 3, 64, 64), np.float32)}, "image is (0, 3, 64, 64)"),
            ({"image": np.zeros((1, 3, 64, 64), np.uint8)}, "image is uint8, want floats"),
            ({"indices": np.zeros(32, np.int32)}, "indices is int32 (32,), want ids (B, V, U)"),
            ({"indices": np.zeros((2, 4, 4), np.float32)}, "indices is float32 (2, 4, 4)"),
            ({"random_ids": np.full((1, 8, 8), 64)}, "random_ids lie in [64, 64], must lie in"),
            ({"random_ids": np.full((1, 8, 8), -1)}, "random_ids lie in [-1, -1]"),
            ({"decode": np.zeros((2, 64, 64, 3))}, "vqgan/decode: recorded (2, 64, 64, 3)"),
        ],
    )
    def test_arrays_that_are_something_else_are_told(self, model, recorded, change, message):
        with pytest.raises(ConvertError) as caught:
            verify_vqgan(model, {**recorded, **change})
        assert message in str(caught.value)

    def test_a_recording_of_something_else_is_told(self, model):
        with pytest.raises(ConvertError, match="nothing to verify among the keys"):
            verify_vqgan(model, {"context": np.zeros(3)})


class Means(Inception):
    """In place of Inception: pool features that are the means of the channels."""

    def __init__(self):
        self.scale = nnx.Param(jnp.full(2048, 2.0))

    def __call__(self, images):
        pool = jnp.tile(images.mean((1, 2)), 683)[:, :2048] * self.scale[...]
        return Features(pool, jnp.zeros((len(images), 2023)), jnp.zeros((len(images), 1008)))


class TestInception:
    @pytest.fixture
    def recorded(self):
        images = np.random.default_rng(0).random((2, 3, 20, 30), np.float32)
        features = np.tile(images.mean((2, 3)), 683)[:, :2048] * 2
        return {"20/images": images, "20/features": features}

    def test_features_of_recorded_images_are_compared(self, recorded):
        (found,) = verify_inception(Means(), {**recorded, "other/features": np.zeros(3)})
        assert not found.fails(1e-5)
        assert found.size == 2 * 2048

    def test_the_difference_is_a_fraction_of_the_largest_feature(self, recorded):
        recorded["20/features"][1, 7] += 0.25
        (found,) = verify_inception(Means(), recorded)
        assert found.difference == pytest.approx(0.25 / recorded["20/features"].max(), rel=1e-3)

    def test_what_cannot_be_replayed_is_told(self, recorded):
        with pytest.raises(ConvertError, match="nothing to verify among the keys"):
            verify_inception(Means(), {"20/features": recorded["20/features"]})
        bad = {**recorded, "20/images": recorded["20/images"][:, :2]}
        with pytest.raises(ConvertError, match=r"20/images is \(2, 2, 20, 30\), want \(B, 3,"):
            verify_inception(Means(), bad)
