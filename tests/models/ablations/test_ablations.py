"""The paper's ablations: what each may read, and what it carries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.core.network import RowPlan
from enat_jax.core.plans import Plan
from enat_jax.models.ablations.shared_stack import readable
from tests.support.networks import (
    VARIANTS,
    in_reveal_order,
    network,
    without_previous,
)

ORDER = jnp.arange(16)[None]
PLAN = Plan(4, 5, 7)
NEW = {4, 5, 6, 7, 8}
VISIBLE, MASKED = set(range(6)), set(range(6, 16))


def positions_read(model, plan, outputs, recalled=None):
    """Per output token, the positions whose embedding its features depend on, in reveal order."""
    graphdef, params, others = nnx.split(model, lambda path, _: path[0] == "embedding", ...)
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(model.cfg.width), "f4")

    def run(params, recalled):
        model = nnx.merge(graphdef, params, others)
        tokens, row = in_reveal_order(jnp.zeros_like(ORDER), ORDER, plan)
        condition = model.embed_condition(jnp.zeros((1, 1), jnp.int32))
        return outputs(model(condition, tokens, row, recalled=recalled)) @ direction

    by_params, by_recalled = jax.jit(jax.jacrev(run, argnums=(0, 1)))(params, recalled)
    position = np.abs(by_params["embedding"]["position"][...]).max(axis=-1)
    assert position[position > 0].min() > 1e-6  # nothing between not at all and clearly
    read = [set(np.flatnonzero(row)) for row in position]
    if recalled is None:
        return read
    return read, np.abs(by_recalled)[:, 0].max(axis=-1) > 0


@pytest.mark.parametrize(
    ("name", "of_visible", "of_masked"),
    [
        ("nat", VISIBLE | MASKED, VISIBLE | MASKED),
        ("masked_to_visible", VISIBLE | MASKED, MASKED),
        ("visible_to_masked", VISIBLE, VISIBLE | MASKED),
        ("visible_to_visible", {1} | MASKED, VISIBLE | MASKED),
        ("masked_to_masked", VISIBLE | MASKED, VISIBLE | {8}),
    ],
)
def test_one_shared_block_reads_all_tokens_but_the_blocked(name, of_visible, of_masked):
    model = network(name, encoder_depth=1)
    outputs = lambda out: jnp.stack([out.new[0, 1], out.masked[0, 2]])  # noqa: E731
    assert positions_read(model, Plan(0, 6, 10), outputs) == [of_visible, of_masked]


def test_blocked_attention_as_rows_of_what_a_token_reads():
    rows = {name: np.asarray(readable(name, jnp.asarray(2), 4)).squeeze().astype(int).tolist()
            for name in VARIANTS if "_to_" in name}  # fmt: skip
    assert rows == {
        "masked_to_visible": [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]],
        "visible_to_masked": [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]],
        "visible_to_visible": [[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        "masked_to_masked": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 1]],
    }


@pytest.mark.parametrize("name", ["disentangled", "alternating", "all_tokens"])
def test_new_tokens_never_read_masked_ones_whatever_is_recalled(name):
    model = network(name)
    plan = without_previous(PLAN, model.cfg)
    count = {"disentangled": 0, "all_tokens": 16}.get(name, plan.previous)
    recalled = jnp.asarray(np.random.default_rng(2).standard_normal((1, count, 16)), "f4")
    outputs = lambda out: jnp.stack([out.new[0, 1], out.masked[0, 2]])  # noqa: E731
    read, reused = positions_read(model, plan, outputs, recalled)
    new = NEW if plan == PLAN else NEW | set(range(4))
    assert read == [new, set(range(16)) - (set() if plan != PLAN else set(range(4)))]
    assert np.all(reused)


def test_a_block_reads_the_features_of_its_own_depth_alone():
    model = network("all_layers")
    recalled = jnp.asarray(np.random.default_rng(2).standard_normal((1, 4, 2, 16)), "f4")
    outputs = lambda out: jnp.stack(  # noqa: E731
        [*out.new[0, 1], out.masked[0, 2], *out.previous[0, 3]]
    )
    read, reused = positions_read(model, PLAN, outputs, recalled)
    assert read == [NEW, NEW, NEW | set(range(9, 16)), set(), set()]
    every, own = np.ones(4, bool), np.arange(4) == 3
    none = ~every
    expected = [  # by layer: what its features are read by
        [every, none],  # new tokens after the first block
        [every, every],  # and after the second
        [every, every],  # masked tokens
        [own, none],  # the projections, layer by layer
        [none, own],
    ]
    np.testing.assert_array_equal(reused, np.stack([np.stack(e, axis=-1) for e in expected]))


@pytest.mark.parametrize("kind", ["last_layer", "all_tokens", "all_layers"])
@pytest.mark.parametrize("again", [True, False])
def test_features_are_handed_on_projected_again_or_as_the_encoder_put_them_out(kind, again):
    model = network("enat", reuse=kind, reproject=again)

    @jax.jit
    def two_steps():
        condition, memory, memories = model.embed_condition(jnp.array([[1]])), None, []
        for plan in (Plan(0, 3, 13), Plan(3, 4, 9)):
            memory = model.initial_memory(1, 16) if memory is None else memory
            memory = model.predict(condition, memory, *in_reveal_order(ORDER % 11, ORDER, plan))[1]
            memories.append(memory)
        return *memories, model.memory.project(model.reuse_projection, memories[0])

    first, second, projected = two_steps()
    expected = projected if again else first
    np.testing.assert_allclose(second[:, :3], expected[:, :3], rtol=1e-5, atol=1e-5)
    assert not np.allclose(projected[:, :3], first[:, :3], atol=0.1)


def test_without_a_projection_features_are_handed_on_as_they_are():
    model = network("no_projection")
    recalled = jax.random.normal(jax.random.key(0), (1, 4, 16))
    tokens, row = in_reveal_order(ORDER % 11, ORDER, PLAN)
    condition = model.embed_condition(jnp.zeros((1, 1), jnp.int32))
    out = jax.jit(lambda: model(condition, tokens, row, recalled=recalled))()
    np.testing.assert_array_equal(out.previous, recalled)


def test_the_features_of_all_tokens_are_kept_by_position():
    model = network("all_tokens")
    order = jnp.asarray(np.random.default_rng(0).permutation(16)[None])
    tokens, row = in_reveal_order(jnp.zeros_like(order), order, PLAN)
    memory = jax.random.normal(jax.random.key(0), (1, 16, 16))

    @jax.jit
    def step():
        condition = model.embed_condition(jnp.zeros((1, 1), jnp.int32))
        _, after = model.predict(condition, memory, tokens, row)
        return after, model(condition, tokens, RowPlan((PLAN,)), recalled=memory)

    after, out = step()
    expected = [out.previous[:, order[0, :4]], out.new, out.masked]
    np.testing.assert_allclose(after[:, order[0]], np.concatenate(expected, axis=1), atol=1e-5)
