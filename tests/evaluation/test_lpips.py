import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.evaluation import lpips as module
from enat_jax.evaluation.lpips import LPIPS


@pytest.fixture(scope="module")
def lpips():
    """The distance with few channels and random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STAGES", ((3, 4), (5,), (6,)))
        network = LPIPS(rngs=nnx.Rngs(0))
        for stage, weights in enumerate(network.weights):
            weights[...] = jax.random.uniform(jax.random.key(stage), weights.shape)
        yield network


@pytest.fixture(scope="module")
def run(lpips):
    """Distances and features of compiled programs."""
    graphdef, state = nnx.split(lpips)
    distances = jax.jit(lambda a, b: nnx.merge(graphdef, state)(a, b))
    return distances, jax.jit(lambda x: nnx.merge(graphdef, state).features(x))


def images(seed, size=16):
    return jax.random.uniform(jax.random.key(seed), (2, size, size, 3))


def test_it_is_its_formula(lpips, run):
    distances, features = run
    expected = np.zeros(2)
    first, second = features(images(0)), features(images(1))
    assert [x.shape for x in first] == [(2, 16, 16, 4), (2, 8, 8, 5), (2, 4, 4, 6)]
    for a, b, weights in zip(first, second, lpips.weights, strict=True):
        lengths = np.sqrt((np.asarray(a) ** 2).sum(-1))
        np.testing.assert_allclose(lengths[lengths > 0], 1, rtol=1e-5)
        expected += (((a - b) ** 2) * weights[...]).sum(-1).mean(axis=(1, 2))
    np.testing.assert_allclose(distances(images(0), images(1)), expected, rtol=1e-5)
    np.testing.assert_allclose(distances(images(1), images(0)), expected, rtol=1e-5)
    np.testing.assert_array_equal(distances(images(0), images(0)), 0)


def test_the_first_features_are_rectified_convolutions_of_scaled_images(lpips, run):
    x = (np.asarray(images(0)) * 2 - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
    x = jnp.asarray(x, jnp.float32)
    for conv in lpips.stages[0]:
        x = jax.nn.relu(conv(x))
    x /= np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10
    np.testing.assert_allclose(run[1](images(0))[0], x, atol=1e-6)


def test_its_gradient_is_finite_where_the_squares_of_features_underflow(lpips):
    graphdef, state = nnx.split(lpips)
    faint = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-25), state)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(nnx.merge(graphdef, faint)(x, 0 * x))))
    assert np.isfinite(gradient(images(0, 8))).all()


def test_sides_may_be_odd(run):
    assert [x.shape[1] for x in run[1](images(0, 15))] == [15, 7, 3]
