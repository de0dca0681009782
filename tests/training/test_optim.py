from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.training.optim import (
    OptimConfig,
    learning_rate_schedule,
    make_optimizer,
    skip_unless_finite,
    update_ema,
)


def rates(steps, total_steps=1000, **fields):
    cfg = OptimConfig(**{"learning_rate": 1.0, "warmup_steps": 10, **fields})
    schedule = learning_rate_schedule(cfg, total_steps)
    return np.array([float(schedule(step)) for step in steps])


class TestLearningRate:
    def test_the_first_two_steps_have_rate_0_as_the_references(self):
        np.testing.assert_array_equal(rates([0, 1]), 0)
        assert rates([2])[0] == pytest.approx(0.1)

    def test_the_warm_up_is_linear(self):
        np.testing.assert_allclose(rates(range(1, 12)), np.arange(11) / 10, rtol=1e-6)

    def test_after_the_warm_up_the_rate_is_constant(self):
        np.testing.assert_array_equal(rates([11, 12, 500, 999, 5000]), 1)

    def test_a_cosine_falls_from_the_end_of_the_warm_up_to_0_at_the_last_step(self):
        found = rates([2, 11, 506, 1001], decay="cosine")
        np.testing.assert_allclose(found, [0.1, 1, 0.5, 0], atol=1e-6)
        assert np.all(np.diff(rates(range(11, 1001), decay="cosine")) < 0)
        assert rates([999], decay="cosine")[0] < 1e-4

    @pytest.mark.parametrize("decay", ["constant", "cosine"])
    def test_without_a_warm_up_only_the_first_two_steps_differ(self, decay):
        found = rates([0, 1, 2], warmup_steps=0, decay=decay)
        np.testing.assert_allclose(found, [0, 0, 1], atol=1e-4)

    def test_the_rate_can_be_traced(self):
        schedule = learning_rate_schedule(OptimConfig(), 10)
        assert jax.jit(schedule)(jnp.int32(2501)) == pytest.approx(2e-4)


PARAMS = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, -1.0), "scale": jnp.ones(())}


class TestOptimizer:
    def updates(self, grads, **fields):
        optimizer = make_optimizer(OptimConfig(**fields), 0.1)
        return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]

    def test_every_parameter_decays(self):
        updates = self.updates(jax.tree.map(jnp.zeros_like, PARAMS), weight_decay=0.3)
        for name, param in PARAMS.items():
            np.testing.assert_allclose(updates[name], -0.1 * 0.3 * param, rtol=1e-6, err_msg=name)

    def test_a_step_is_adams(self):
        # the first bias-corrected step is the gradient over its own size
        grads = {"kernel": jnp.full((2, 3), 5.0), "bias": jnp.full(3, -4.0), "scale": jnp.ones(())}
        updates = self.updates(grads, weight_decay=0.0, epsilon=1.0)
        np.testing.assert_allclose(updates["kernel"], -0.1 * 5 / 6, rtol=1e-5)
        np.testing.assert_allclose(updates["bias"], 0.1 * 4 / 5, rtol=1e-5)

    def test_two_steps_average_by_the_betas(self):
        optimizer = make_optimizer(OptimConfig(betas=(0.8, 0.9), weight_decay=0.0), 1.0)
        param = jnp.zeros(())
        state = optimizer.init(param)
        _, state = optimizer.update(jnp.float32(1.0), state, param)
        update, _ = optimizer.update(jnp.float32(3.0), state, param)
        first = (0.8 * 0.2 * 1 + 0.2 * 3) / (1 - 0.8**2)
        second = (0.9 * 0.1 * 1 + 0.1 * 9) / (1 - 0.9**2)
        assert float(update) == pytest.approx(-first / second**0.5, rel=1e-5)

    def test_a_large_gradient_is_clipped_to_the_norm(self):
        grads = {"kernel": jnp.full((2, 3), 3.0), "bias": jnp.zeros(3), "scale": jnp.zeros(())}
        # epsilon far above the gradient makes the update proportional to it
        kept = {"weight_decay": 0.0, "epsilon": 1e6}
        whole = self.updates(grads, **kept)["kernel"]
        norm = 3 * 6**0.5
        clipped = self.updates(grads, max_grad_norm=norm / 4, **kept)["kernel"]
        np.testing.assert_allclose(clipped, whole / 4, rtol=1e-4)
        kept_whole = self.updates(grads, max_grad_norm=2 * norm, **kept)["kernel"]
        np.testing.assert_array_equal(kept_whole, whole)


def test_the_moving_average_is_its_formula_leaf_by_leaf():
    ema = {"a": jnp.array([1.0, 2.0]), "b": jnp.float32(10.0)}
    params = {"a": jnp.array([3.0, -2.0]), "b": jnp.float32(0.0)}
    after = update_ema(ema, params, 0.75)
    np.testing.assert_allclose(after["a"], [0.75 * 1 + 0.25 * 3, 0.75 * 2 - 0.25 * 2])
    np.testing.assert_allclose(after["b"], 7.5)


def test_the_defaults_are_enats_recipe():
    cfg = OptimConfig()
    assert (cfg.learning_rate, cfg.warmup_steps, cfg.decay) == (4e-4, 5000, "constant")
    assert (cfg.weight_decay, cfg.betas, cfg.max_grad_norm) == (0.03, (0.99, 0.99), 0)
    assert cfg.ema_decay == 0.9999


class State(NamedTuple):
    step: jax.Array
    params: dict
    count: jax.Array


@pytest.mark.parametrize(
    ("told", "skipped"),
    [((1.0, 2.0), 0), ((np.nan, 2.0), 1), ((1.0, np.inf), 1), ((-np.inf, 1.0), 1)],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_count_of_steps(told, skipped):
    before = State(jnp.int32(4), {"w": jnp.arange(3.0)}, jnp.int32(7))
    after = State(jnp.int32(5), {"w": jnp.array([1.0, np.nan, 2.0])}, jnp.int32(8))
    found, flag = skip_unless_finite(before, after, *map(jnp.float32, told))
    assert (flag, found.step) == (skipped, 5)
    kept = before if skipped else after
    np.testing.assert_array_equal(found.params["w"], kept.params["w"])
    assert found.count == kept.count
