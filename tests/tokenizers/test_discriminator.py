import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.tokenizers.discriminator import Discriminator, DiscriminatorConfig, hinge_loss


@pytest.fixture(scope="module")
def discriminator():
    return Discriminator(DiscriminatorConfig(channels=4, levels=2), rngs=nnx.Rngs(0))


def images(size, seed=0):
    return jax.random.uniform(jax.random.key(seed), (2, size, size, 3))


def test_there_is_a_verdict_for_every_patch(discriminator):
    assert discriminator(images(16)).shape == (2, 4, 4)
    assert discriminator(images(32)).shape == (2, 8, 8)


def test_channels_double_up_to_eight_times():
    assert DiscriminatorConfig(channels=2, levels=5).widths == [2, 4, 8, 16, 16, 16]


def test_a_verdict_depends_on_its_own_patch_alone(discriminator):
    gradient = jax.grad(lambda x: discriminator(x)[0, 0, 0])(images(48))
    seen = np.abs(np.asarray(gradient)).max(axis=-1)
    assert seen[0, :8, :8].max() > 0
    assert seen[0, 24:].max() == 0
    assert seen[0, :, 24:].max() == 0
    assert seen[1].max() == 0


def test_the_hinge_loss_is_its_formula():
    real, made = jnp.array([[[2.0, 0.5]]]), jnp.array([[[-3.0, 1.0]]])
    assert hinge_loss(real, made) == pytest.approx(0.5 * (0 + 0.5) / 2 + 0.5 * (0 + 2) / 2)
