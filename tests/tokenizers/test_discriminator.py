import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.tokenizers.discriminator import Discriminator, DiscriminatorConfig, hinge_loss


def test_there_is_a_verdict_for_every_patch_and_it_depends_on_that_alone():
    discriminator = Discriminator(DiscriminatorConfig(channels=2, levels=2), rngs=nnx.Rngs(0))
    assert jax.eval_shape(discriminator, jnp.zeros((2, 16, 16, 3))).shape == (2, 4, 4)
    images = jax.random.uniform(jax.random.key(0), (2, 48, 48, 3))
    gradient = jax.jit(jax.grad(lambda x: discriminator(x)[0, 0, 0]))(images)
    seen = np.abs(np.asarray(gradient)).max(axis=-1)
    assert seen[0, :8, :8].max() > 0
    assert max(seen[0, 24:].max(), seen[0, :, 24:].max(), seen[1].max()) == 0


def test_channels_double_up_to_eight_times():
    assert DiscriminatorConfig(channels=2, levels=5).widths == [2, 4, 8, 16, 16, 16]


def test_the_hinge_loss_is_its_formula():
    real, made = jnp.array([[[2.0, 0.5]]]), jnp.array([[[-3.0, 1.0]]])
    assert hinge_loss(real, made) == pytest.approx(0.5 * (0 + 0.5) / 2 + 0.5 * (0 + 2) / 2)
