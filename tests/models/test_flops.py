"""The FLOP formula against the compiler's own count."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from enat_jax.config import load_config
from enat_jax.core.generate import generate, plan_generation
from enat_jax.core.plans import Plan
from enat_jax.core.strategy import StrategyConfig, make_strategy
from enat_jax.models.enat.flops import modulation_flops
from enat_jax.models.enat.network import ENAT, ENATConfig, Modulation
from enat_jax.models.flops import (
    generation_flops,
    step_flops,
    training_flops,
)
from enat_jax.training.step import Draws, row_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Wide enough that what the formula leaves out (norms, GELU, softmax, modulation of activations)
# stays a few percent of it; at ENAT-L's width it is a quarter of that.
CFG = ENATConfig(
    length=64,
    codebook_size=512,
    num_classes=4,
    width=256,
    num_heads=4,
    encoder_depth=2,
    decoder_depth=1,
    dropout=0.0,
)
ELEMENTWISE = 1.03


@pytest.fixture(scope="module")
def network():
    """Structure and parameter shapes, layer by layer: the compiler counts a loop's body once."""
    return nnx.split(nnx.eval_shape(lambda: ENAT(CFG, rngs=nnx.Rngs(0)).unstacked()))


def counted(function, *shapes):
    """FLOPs that the compiler counts in a program."""
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    "plan", [Plan(0, 0, 64), Plan(0, 10, 54), Plan(20, 12, 32), Plan(9, 0, 55), Plan(48, 15, 1)]
)
def test_a_network_call_costs_what_the_formula_says(network, plan):
    graphdef, params = network
    vectors = floats(1, 1, 8 * CFG.width)
    modulation = Modulation([vectors] * CFG.encoder_depth, [vectors] * CFG.decoder_depth)

    def call(params, modulation, token_ids, positions, masked_positions, features):
        model = nnx.merge(graphdef, params)
        out = model(modulation, token_ids, positions, masked_positions, [plan], features=features)
        return model.logits(out.masked)

    features = floats(1, plan.previous, CFG.width)
    shapes = (ids(1, plan.new), ids(1, plan.new), ids(1, plan.masked), features)
    formula = step_flops(CFG, plan)
    assert formula <= counted(call, params, modulation, *shapes) <= ELEMENTWISE * formula


def test_modulation_costs_what_the_formula_says(network):
    graphdef, params = network
    count = counted(lambda params, c: nnx.merge(graphdef, params).modulate(c), params, ids(1, 1))
    assert modulation_flops(CFG) <= count <= ELEMENTWISE * modulation_flops(CFG)


def test_a_generation_costs_what_the_formula_says(network):
    graphdef, params = network
    strategy = make_strategy(StrategyConfig(steps=4))
    layout, traced = plan_generation(strategy, CFG.length, lambda plan: step_flops(CFG, plan))

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
    plans = (Plan(0, 20, 44), Plan(9, 7, 48))

    def loss(params, ema, token_ids, draws):
        models = (nnx.merge(graphdef, weights) for weights in (params, ema))
        return row_loss(*models, token_ids, draws, plans, label_smoothing=0.1)

    shapes = (params, params, ids(1, 2, CFG.length), Draws(ids(1, 2, CFG.length), ids(1, 2)))
    formula = len(plans) * training_flops(CFG, plans)
    assert formula <= counted(jax.grad(loss), *shapes) <= ELEMENTWISE * formula


def test_padding_is_counted_only_where_asked_for():
    strategy = make_strategy(StrategyConfig(steps=8))
    totals = {}
    for buckets in (8, 3, 1):
        layout, _ = plan_generation(
            strategy, CFG.length, lambda plan: step_flops(CFG, plan), buckets=buckets
        )
        totals[buckets] = [
            generation_flops(CFG, layout.buckets, padded=padded) for padded in (False, True)
        ]
    assert totals[8][0] == totals[8][1]
    assert totals[8][1] < totals[3][1] < totals[1][1]


def test_enat_l_generates_an_image_for_the_published_cost():
    # the paper's 0.3 TFLOPs count multiply-adds, of which this is 0.24, and the VQGAN's decoder too
    config = load_config(str(pathlib.Path(__file__).parents[2] / "configs" / "enat_l_256.py"))
    layout, _ = plan_generation(
        make_strategy(config.strategy), 256, lambda plan: step_flops(config.model, plan)
    )
    assert layout.steps == 8
    assert 450e9 < generation_flops(config.model, layout.buckets, padded=True) <= 485e9
