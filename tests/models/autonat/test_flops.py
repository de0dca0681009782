"""AutoNAT's FLOP formula against the compiler's own count."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from enat_jax.core.generate import generate, plan_generation
from enat_jax.core.plans import Plan
from enat_jax.core.strategy import StrategyConfig, make_strategy
from enat_jax.models.autonat.flops import step_flops
from enat_jax.models.autonat.network import AutoNAT, AutoNATConfig
from enat_jax.models.flops import generation_flops, training_flops
from enat_jax.training.step import Draws, row_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

# So wide that what the formula leaves out (norms, the exact GELU, softmax) is a few percent of it.
CFG = AutoNATConfig(
    length=64, codebook_size=512, num_classes=4, width=512, num_heads=4, depth=2, dropout=0.0
)
ELEMENTWISE = 1.03


@pytest.fixture(scope="module")
def network():
    """Structure and parameter shapes, layer by layer: the compiler counts a loop's body once."""
    return nnx.split(nnx.eval_shape(lambda: AutoNAT(CFG, rngs=nnx.Rngs(0)).unstacked()))


def counted(function, *shapes):
    """FLOPs that the compiler counts in a program."""
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("plan", [Plan(0, 0, 64), Plan(0, 32, 32), Plan(0, 63, 1)])
@pytest.mark.parametrize("traced", [False, True])
def test_a_network_call_costs_what_the_formula_says(network, plan, traced):
    graphdef, params = network

    def call(params, class_ids, token_ids, positions, masked_positions):
        model = nnx.merge(graphdef, params)
        condition = model.condition(class_ids)
        counts = Plan(*map(jnp.int32, plan)) if traced else None
        return model.predict(condition, (), token_ids, positions, masked_positions, plan, counts)

    shapes = (ids(1), ids(1, plan.new), ids(1, plan.new), ids(1, plan.masked))
    formula = step_flops(CFG, plan)
    assert formula <= counted(call, params, *shapes) <= ELEMENTWISE * formula


def planned(buckets):
    strategy = make_strategy(StrategyConfig(steps=4, masking="autonat"))
    return plan_generation(
        strategy, CFG.length, lambda plan: step_flops(CFG, plan), reuse=False, buckets=buckets
    )


def test_a_generation_costs_what_the_formula_says(network):
    graphdef, params = network
    layout, traced = planned(4)

    def silence(step, positions):
        return jnp.zeros((*positions.shape, CFG.codebook_size)), jnp.zeros(positions.shape)

    def run(params, class_ids):
        model = nnx.merge(graphdef, params)
        return generate(
            model, class_ids, traced, silence, layout=layout, null_class_id=CFG.null_class_id
        )[0]

    formula = generation_flops(CFG, layout.buckets, padded=False)
    assert [bucket.guided for bucket in layout.buckets] == [False, True, True, True]
    assert formula <= counted(run, params, ids(1)) <= ELEMENTWISE * formula


def test_a_training_step_costs_what_the_formula_says(network):
    graphdef, params = network
    plans = (Plan(0, 20, 44), Plan(0, 9, 55))

    def loss(params, token_ids, draws):
        model = nnx.merge(graphdef, params)
        return row_loss(model, model, token_ids, draws, plans, label_smoothing=0.1)

    shapes = (params, ids(1, 2, CFG.length), Draws(ids(1, 2, CFG.length), ids(1, 2)))
    formula = len(plans) * training_flops(CFG, plans)
    assert formula <= counted(jax.grad(loss), *shapes) <= ELEMENTWISE * formula


def test_padding_adds_an_unguided_steps_other_branch_and_rows_of_the_head():
    exact, one = (planned(buckets)[0].buckets for buckets in (4, 1))
    assert generation_flops(CFG, exact, padded=True) == generation_flops(CFG, exact, padded=False)
    heads = 2 * CFG.width * (CFG.width + CFG.codebook_size)
    unguided, *guided = (bucket.plans[0] for bucket in exact)
    padding = sum(64 - plan.masked for plan in guided) * 2 * heads + step_flops(CFG, unguided)
    added = generation_flops(CFG, one, padded=True) - generation_flops(CFG, exact, padded=True)
    assert added == pytest.approx(padding)
