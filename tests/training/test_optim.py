from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.config import OptimConfig
from enat_jax.training.optim import (
    learning_rate_schedule,
    make_optimizer,
    skip_unless_finite,
)


def rates(steps, total_steps=1000, **fields):
    cfg = OptimConfig(**{"learning_rate": 1.0, "warmup_steps": 10, **fields})
    schedule = learning_rate_schedule(cfg, total_steps)
    return np.array([float(schedule(step)) for step in steps])


def test_the_rate_is_0_for_two_steps_then_warms_up_linearly_and_stays():
    np.testing.assert_array_equal(rates([0, 1]), 0)  # as the references'
    np.testing.assert_allclose(rates(range(1, 12)), np.arange(11) / 10, rtol=1e-6)
    np.testing.assert_array_equal(rates([11, 12, 500, 999, 5000]), 1)


def test_a_cosine_falls_from_the_end_of_the_warm_up_to_0_at_the_last_step():
    np.testing.assert_allclose(
        rates([2, 11, 506, 1001], decay="cosine"), [0.1, 1, 0.5, 0], atol=1e-6
    )
    assert np.all(np.diff(rates(range(11, 1001, 10), decay="cosine")) < 0)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_without_a_warm_up_only_the_first_two_steps_differ(decay):
    np.testing.assert_allclose(rates([0, 1, 2], warmup_steps=0, decay=decay), [0, 0, 1], atol=1e-4)


PARAMS = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, -1.0), "scale": jnp.ones(())}


def updates_of(grads, **fields):
    optimizer = make_optimizer(OptimConfig(**fields), 0.1)
    return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]


def test_every_parameter_decays():
    updates = updates_of(jax.tree.map(jnp.zeros_like, PARAMS), weight_decay=0.3)
    for name, param in PARAMS.items():
        np.testing.assert_allclose(updates[name], -0.1 * 0.3 * param, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(("share", "kept"), [(1 / 4, 1 / 4), (2, 1)])
def test_a_large_gradient_is_clipped_to_the_norm(share, kept):
    grads = {"kernel": jnp.full((2, 3), 3.0), "bias": jnp.zeros(3), "scale": jnp.zeros(())}
    # epsilon far above the gradient makes the update proportional to it
    unclipped = updates_of(grads, weight_decay=0.0, epsilon=1e6)["kernel"]
    clipped = updates_of(grads, weight_decay=0.0, epsilon=1e6, max_grad_norm=share * 3 * 6**0.5)
    np.testing.assert_allclose(clipped["kernel"], kept * unclipped, rtol=1e-4)


def test_the_defaults_are_enats_recipe():
    assert OptimConfig() == OptimConfig(
        learning_rate=4e-4, warmup_steps=5000, decay="constant", weight_decay=0.03,
        betas=(0.99, 0.99), max_grad_norm=0.0, ema_decay=0.9999,
    )  # fmt: skip


class State(NamedTuple):
    step: jax.Array
    params: dict
    count: jax.Array


@pytest.mark.parametrize(
    ("values", "skipped"),
    [((1.0, 2.0), 0), ((np.nan, 2.0), 1), ((1.0, np.inf), 1), ((-np.inf, 1.0), 1),
     ((1.0, {"w": [2.0, np.nan]}), 1)],
)  # fmt: skip
def test_a_step_that_is_not_finite_changes_nothing_but_the_count_of_steps(values, skipped):
    before = State(jnp.int32(4), {"w": jnp.arange(3.0)}, jnp.int32(7))
    after = State(jnp.int32(5), {"w": jnp.array([1.0, np.nan, 2.0])}, jnp.int32(8))
    state, flag = skip_unless_finite(before, after, *jax.tree.map(jnp.float32, values))
    assert (flag, state.step) == (skipped, 5)
    kept = before if skipped else after
    np.testing.assert_array_equal(state.params["w"], kept.params["w"])
    assert state.count == kept.count
