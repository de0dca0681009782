"""The optimiser step against the reference's recordings, and what its parts promise."""

import dataclasses
import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from enat_jax.config import OptimConfig, TrainConfig
from enat_jax.core.plans import Plan
from enat_jax.models.enat.weights import never_read
from enat_jax.training.optim import learning_rate_schedule, make_optimizer
from enat_jax.training.step import (
    Draws,
    TrainState,
    make_draws,
    row_loss,
    training_step,
)
from enat_jax.training.strata import Stratum, training_strata
from tests.support.golden import enat_from, torch_arrays

# What only steps with reused features train; the reference leaves it alone in the other steps.
ONLY_WITH_REUSE = ("reuse_projection", "context_key_value")


@functools.partial(jax.jit, static_argnums=(0, 5))
def loss_and_grad(graphdef, params, ema, token_ids, draws, plans):
    """A row's loss and its gradient, without dropout."""

    def loss(params):
        models = (nnx.merge(graphdef, weights) for weights in (params, ema))
        return row_loss(*models, token_ids, draws, plans, label_smoothing=0.1)

    return jax.value_and_grad(loss)(params)


def recorded_row(recorded, mask_id):
    """The tokens, draws and plans of one recorded step: one image a row."""
    masked = recorded["xn"] == mask_id
    hidden = recorded.get("prev_xn", np.full_like(recorded["xn"], mask_id)) == mask_id
    group = np.where(masked, 2, np.where(hidden, 1, 0))
    (counts,) = {tuple(int((row == part).sum()) for part in range(3)) for row in group}
    order = np.argsort(group, axis=1, kind="stable")
    return (
        jnp.asarray(recorded["x0"])[:, None],
        Draws(jnp.asarray(order, jnp.int32)[:, None], jnp.asarray(recorded["context"])),
        (Plan(*counts),),
    )


def moved(name, w):
    """The moving average that was recorded: the weights with noise, seeded by the name."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(w.shape)
    return w + np.float32(0.02) * noise.astype(np.float32)


@pytest.mark.parametrize("name", ["train_noreuse", "train_reuse"])
def test_loss_and_gradients_are_the_references(enat, enat_weights, golden, name):
    recorded = golden(f"enat/{name}.npz")
    graphdef, params = nnx.split(enat)
    ema = nnx.state(enat_from({key: moved(key, w) for key, w in enat_weights.items()}))
    row = recorded_row(recorded, enat.cfg.mask_id)
    loss, grads = loss_and_grad(graphdef, params, ema, *row)
    np.testing.assert_allclose(loss, recorded["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(optax.tree.norm(grads), recorded["grad_norm"], rtol=1e-5)

    ours = torch_arrays(grads)
    compared = 0
    for key, expected in recorded.items():
        if key.startswith("grad/"):
            grad = ours[key.removeprefix("grad/")].reshape(expected.shape)
            largest = np.max(np.abs(expected))
            np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-4 * largest, err_msg=key)
            compared += 1
    assert compared >= 50
    untrained = {key for key in ours if not np.any(ours[key])}
    expected = {*recorded["none_grad_params"], *recorded["zero_grad_params"]}
    assert untrained == {key for key in expected if not never_read(key)}


class Learner(NamedTuple):
    """A run that leaves some parameters alone in some steps, each group with its own optimiser."""

    params: nnx.State
    ema: nnx.State
    always: optax.OptState
    only_with_reuse: optax.OptState


def by_use(tree):
    """Leaves by path: those trained in every step, and those trained with reused features only."""
    groups = ({}, {})
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        decoder = "decoder" in name
        rare = not decoder and any(part in name for part in ONLY_WITH_REUSE)
        groups[rare][name] = leaf
    return groups


@functools.partial(jax.jit, static_argnums=(3, 4))
def learn(learner, grads, rate, reuse, cfg):
    """One step of the package's optimiser and moving average."""
    optimizer = make_optimizer(cfg, lambda _: rate)
    states = [learner.always, learner.only_with_reuse]
    leaves = {}
    groups = zip(by_use(learner.params), by_use(grads), strict=True)
    for group, (params, grad) in enumerate(groups):
        if group == 0 or reuse:
            updates, states[group] = optimizer.update(grad, states[group], params)
            params = optax.apply_updates(params, updates)
        leaves |= params
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[jax.tree_util.keystr(path)], learner.params
    )
    ema = optax.incremental_update(params, learner.ema, 1 - cfg.ema_decay)
    return Learner(params, ema, *states)


@pytest.mark.slow
def test_six_optimiser_steps_are_the_references(enat, enat_weights, golden):
    recorded = golden("enat/train_trajectory.npz")
    cfg = OptimConfig(
        learning_rate=float(recorded["lr_max"]),
        warmup_steps=int(recorded["warmup_steps"]),
        weight_decay=float(recorded["weight_decay"]),
        ema_decay=float(recorded["ema_rate"]),
    )
    schedule = learning_rate_schedule(cfg, total_steps=len(recorded["lr_used"]))
    graphdef, params = nnx.split(enat)
    optimizer = make_optimizer(cfg, schedule)
    learner = Learner(params, params, *(optimizer.init(group) for group in by_use(params)))
    names = [str(name) for name in recorded["param_names"] if not never_read(name)]
    columns = [list(recorded["param_names"]).index(name) for name in names]

    for step, reuse in enumerate(recorded["plan_reuse"]):
        assert schedule(step) == pytest.approx(recorded["lr_used"][step], rel=1e-6, abs=1e-12)
        prefix = f"{step}/"
        arrays = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
        row = recorded_row(arrays, enat.cfg.mask_id)
        assert bool(row[-1][0].previous) == reuse
        loss, grads = loss_and_grad(graphdef, learner.params, learner.ema, *row)
        learner = learn(learner, grads, schedule(step), bool(reuse), cfg)

        assert loss == pytest.approx(recorded["loss"][step], abs=1e-3)
        assert optax.tree.norm(grads) == pytest.approx(recorded["grad_norm"][step], rel=1e-3)
        for weights, norms in (("params", "param_norms"), ("ema", "ema_param_norms")):
            arrays = torch_arrays(getattr(learner, weights))
            ours = [np.linalg.norm(arrays[name]) for name in names]
            np.testing.assert_allclose(ours, recorded[norms][step, columns], rtol=1e-3)

    taken = recorded["adam_step_counts"][-1, columns]
    assert int(learner.always[0].count) == taken.max()
    assert int(learner.only_with_reuse[0].count) == taken.min()
    compared = 0
    for folder, weights in (("final/", learner.params), ("final_ema/", learner.ema)):
        arrays = torch_arrays(weights) | {k: w for k, w in enat_weights.items() if never_read(k)}
        for key, expected in recorded.items():
            if key.startswith(folder):
                ours = arrays[key.removeprefix(folder)].reshape(expected.shape)
                np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3, err_msg=key)
                compared += 1
    assert compared >= 30


def test_the_learning_rate_warms_up_after_two_steps_at_0():
    cfg = OptimConfig(learning_rate=0.01, warmup_steps=4)
    rates = [float(learning_rate_schedule(cfg, 10)(step)) for step in range(8)]
    expected = [0, 0, 0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


# What a step promises, on rows of several images.

PLANS = (Plan(0, 20, 44), Plan(5, 4, 55))
ROW = tuple(Stratum(plan, np.array([plan])) for plan in PLANS)  # whose plans are always the same


def drawn(key, classes, length, *, row=ROW, dropout=0.0, further=0.0):
    """What a step draws for classes whose null is 10."""
    null = jnp.full_like(classes, 10)
    return make_draws(key, classes, null, length, row, dropout=dropout, further_dropout=further)


@pytest.fixture(scope="module")
def batch():
    """Images and their classes."""
    rng = np.random.default_rng(3)
    return jnp.asarray(rng.integers(64, size=(8, 64))), jnp.asarray(rng.integers(10, size=8))


def test_every_image_of_a_row_counts_the_same(enat, batch):
    tokens, classes = (x[:2].reshape(1, 2, *x.shape[1:]) for x in batch)
    draws = drawn(jax.random.key(0), classes, 64)._replace(plans=None)

    @functools.partial(jax.jit, static_argnums=2)
    def loss(tokens, draws, plans):
        return row_loss(enat, enat, tokens, draws, plans, label_smoothing=0.1)

    alone = [
        loss(tokens[:, i : i + 1], jax.tree.map(lambda x, i=i: x[:, i : i + 1], draws), (plan,))
        for i, plan in enumerate(PLANS)
    ]
    together = loss(tokens, draws, PLANS)
    np.testing.assert_allclose(together, np.mean(alone), rtol=1e-5)
    masked = [plan.masked for plan in PLANS]
    assert abs(together - np.average(alone, weights=masked)) > 1e-3  # not every token the same


def test_accumulation_changes_nothing_but_memory(enat, batch):
    graphdef, params = nnx.split(enat)
    graphdef = nnx.graphdef(
        nnx.eval_shape(
            lambda: type(enat)(dataclasses.replace(enat.cfg, dropout=0.0), rngs=nnx.Rngs(0))
        )
    )
    optimizer = optax.sgd(1.0)  # so that the new parameters show the gradient
    state = TrainState(jnp.int32(4), params, params, optimizer.init(params))
    results = []
    for accumulation in (1, 2):
        step = functools.partial(
            training_step,
            graphdef=graphdef,
            optimizer=optimizer,
            row=ROW,
            cfg=TrainConfig(accumulation=accumulation),
            ema_decay=0.5,
        )
        results.append(jax.jit(step)(state, *batch, jax.random.key(1)))
    (once, metrics), (twice, split_metrics) = results
    np.testing.assert_allclose(metrics["loss"], split_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], split_metrics["grad_norm"], rtol=1e-4)
    pairs = zip(*map(jax.tree.leaves, (once.params, twice.params, params)), strict=True)
    for a, b, before in pairs:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 + 1e-4 * np.abs(a - before).max())
    assert int(once.step) == int(twice.step) == 5
    for ema, after, before in zip(
        *map(jax.tree.leaves, (once.ema, once.params, params)), strict=True
    ):
        np.testing.assert_allclose(ema, (after + before) / 2, rtol=1e-5, atol=1e-6)


def test_the_order_is_a_permutation_and_every_position_as_likely_anywhere():
    images = 4000
    classes = jnp.zeros((images, 1), jnp.int32)
    draws = drawn(jax.random.key(0), classes, 8)
    order = np.asarray(draws.order)[:, 0]
    assert np.all(np.sort(order, axis=1) == np.arange(8))
    counts = np.stack([np.bincount(column, minlength=8) for column in order.T])
    spread = (images / 8 * 7 / 8) ** 0.5
    assert np.abs(counts - images / 8).max() < 4.5 * spread


def test_classes_are_dropped_at_their_rate_and_kept_otherwise():
    classes = jnp.arange(20_000).reshape(-1, 4) % 10
    draws = drawn(jax.random.key(0), classes, 2, row=ROW * 2, dropout=0.15, further=0.1)
    dropped, for_all = (np.asarray(x) == 10 for x in (draws.condition, draws.ema_condition))
    for made, rate in ((for_all, 0.15), (dropped, 0.235)):
        assert abs(made.mean() - rate) < 4 * (rate * (1 - rate) / classes.size) ** 0.5
    assert np.all(dropped[for_all])  # what the moving average does not see the learner does not
    assert np.all((draws.condition == classes) | dropped)
    assert np.all((draws.ema_condition == classes) | for_all)


def test_two_steps_of_a_run_draw_differently(enat, batch):
    keys = [jax.random.fold_in(jax.random.key(1), step) for step in range(2)]
    row = training_strata(64, lambda plan: 1.0, programs=1, images_per_row=8)[0]
    one, other = (drawn(key, batch[1][None], 64, row=row, dropout=0.5) for key in keys)
    assert np.any(one.order != other.order)
    assert np.any(one.condition != other.condition)
    assert np.any(one.plans != other.plans)


def test_the_moving_average_reads_the_class_that_was_given(enat, batch):
    tokens, classes = (x[:2].reshape(1, 2, *x.shape[1:]) for x in batch)
    draws = drawn(jax.random.key(0), classes, 64)

    @jax.jit
    def loss(draws):
        return row_loss(enat, enat, tokens, draws, PLANS, label_smoothing=0.1)

    same, other = (
        loss(draws._replace(ema_condition=given)) for given in (classes, 10 - 0 * classes)
    )
    assert loss(draws) == same != other
