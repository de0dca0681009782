"""The masked-token cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.training.losses import masked_cross_entropy

ONES = jnp.ones((2, 5))


@pytest.fixture
def scores():
    """Logits `[2 5 7]` and targets `[2 5]`."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(2, 5, 7)), jnp.float32), jnp.asarray(
        rng.integers(7, size=(2, 5))
    )


def test_loss_and_gradient_are_the_references(golden):
    recorded = {name: jnp.asarray(array) for name, array in golden("enat/loss.npz").items()}
    weights = (recorded["label"] >= 0).astype(jnp.float32)
    loss, grad = jax.value_and_grad(masked_cross_entropy)(
        recorded["pred"], recorded["label"], weights
    )
    np.testing.assert_allclose(loss, recorded["loss"], rtol=0, atol=1e-5)
    largest = np.abs(recorded["grad_pred"]).max()
    np.testing.assert_allclose(grad, recorded["grad_pred"], rtol=0, atol=1e-5 * largest)


def test_without_smoothing_it_is_the_log_probability_of_the_target(scores):
    logits, targets = scores
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    loss = masked_cross_entropy(logits, targets, ONES, label_smoothing=0.0)
    np.testing.assert_allclose(loss, -picked.mean(), rtol=1e-6)


def test_smoothing_spreads_its_share_evenly(scores):
    logits, targets = scores
    goal = 0.7 * jax.nn.one_hot(targets, 7) + 0.3 / 7
    expected = -jnp.mean(jnp.sum(goal * jax.nn.log_softmax(logits), axis=-1))
    loss = masked_cross_entropy(logits, targets, ONES, label_smoothing=0.3)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_only_the_ratio_of_weights_counts(scores):
    weights = jnp.linspace(0.5, 2.0, 10).reshape(2, 5)
    once, thrice = (masked_cross_entropy(*scores, factor * weights) for factor in (1.0, 3.0))
    np.testing.assert_allclose(once, thrice, rtol=1e-6)
    assert abs(once - masked_cross_entropy(*scores, ONES)) > 1e-3


def test_a_token_of_weight_0_counts_for_nothing_whatever_its_target(scores):
    logits, targets = scores
    weights = ONES.at[:, 3:].set(0)
    expected = masked_cross_entropy(logits[:, :3], targets[:, :3], ONES[:, :3])
    for target in (-1, 0, 6, 7, 10_000):
        ours = masked_cross_entropy(logits, targets.at[:, 3:].set(target), weights)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    grad = jax.grad(masked_cross_entropy)(logits, targets, weights)
    assert not np.any(grad[:, 3:])
    assert np.all(np.any(grad[:, :3], axis=-1))


def test_weights_of_a_row_serve_every_row(scores):
    weights = jnp.array([1.0, 0.0, 2.0, 3.0, 0.5])
    once = masked_cross_entropy(*scores, weights)
    np.testing.assert_allclose(once, masked_cross_entropy(*scores, weights * ONES), rtol=1e-6)


def test_logits_of_16_bits_are_summed_in_float32(scores):
    logits, targets = (jnp.tile(x, (1, 400, *[1] * (x.ndim - 2))) for x in scores)
    weights = jnp.ones(targets.shape)
    loss = masked_cross_entropy(logits.astype(jnp.bfloat16), targets, weights)
    assert loss.dtype == jnp.float32
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(loss, masked_cross_entropy(rounded, targets, weights), rtol=1e-6)
