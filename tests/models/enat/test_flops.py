"""The FLOP formula of ENAT's variants against the compiler's count and the paper's figures."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from enat_jax.config import load_config
from enat_jax.core.generate import plan_generation
from enat_jax.core.plans import Plan, generation_plans
from enat_jax.core.strategy import make_strategy
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.enat.flops import modulation_flops, paper_gflops, step_flops, training_flops
from enat_jax.models.enat.network import ENAT
from enat_jax.models.flops import generation_flops
from enat_jax.training.step import Draws, row_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"
PAPER = {  # GFLOPs of the paper's ablation tables, multiply-adds
    "enat_s_256": 22.6,
    "ablations/nat": 39.6,
    "ablations/disentangled_8_8": 40.2,
    "ablations/disentangled_12_4": 38.2,
    "ablations/disentangled_15_1": 39.8,
    "ablations/alternating_attention": 25.0,
    "ablations/no_reuse_projection": 20.8,
    "ablations/reuse_all_tokens": 37.5,
    "ablations/reuse_all_layers": 36.1,
}
BLOCKED = {  # no figures: the attention that is left out is masked, not saved
    "masked_to_visible",
    "visible_to_masked",
    "visible_to_visible",
    "masked_to_masked",
}


def ours(path):
    """A config's GFLOPs as the paper counts."""
    config = load_config(str(path))
    strategy = make_strategy(config.strategy)
    counts = strategy.masked_counts(config.model.length)
    plans = generation_plans(counts, config.model.length, reuse=config.model.carries_features)
    assert len(plans) == 8
    return paper_gflops(config.model, plans)


@pytest.mark.parametrize("name", PAPER)
def test_an_ablation_costs_what_the_paper_says(name, record_property):
    gflops = ours(CONFIGS / f"{name}.py")
    record_property("gflops", f"{gflops:.2f}, the paper's {PAPER[name]}")
    assert gflops == pytest.approx(PAPER[name], rel=0.05)


def test_the_papers_ablations_all_have_configs_of_their_sizes():
    blocked = {f"ablations/nat_{name}" for name in BLOCKED}
    paths = sorted((CONFIGS / "ablations").glob("*.py"))
    assert {f"ablations/{path.stem}" for path in paths} | {"enat_s_256"} == {*PAPER, *blocked}
    base = load_config(str(CONFIGS / "enat_s_256.py"))
    for path in paths:
        config = load_config(str(path))
        sizes = (config.model.encoder_depth, config.model.decoder_depth, config.model.width)
        expected = {"nat": (8, 0, 288), "8": (8, 8, 288), "4": (12, 4, 318)}
        family = "nat" if path.stem.startswith("nat") else path.stem.rpartition("_")[2]
        assert sizes == expected.get(family, (15, 1, 366)), path.stem
        if family == "nat":
            assert config.model.blocked == (path.stem.removeprefix("nat_") if "_" in path.stem
                                            else "none")  # fmt: skip
        reuse = base.train.reuse_probability if config.model.carries_features else 0.0
        train = dataclasses.replace(base.train, reuse_probability=reuse)
        assert dataclasses.replace(config, model=base.model) == dataclasses.replace(
            base, train=train
        )


# Wide enough that what the formula leaves out stays a few percent of it.
WIDE = ENATConfig(
    length=64,
    codebook_size=512,
    num_classes=4,
    width=256,
    num_heads=4,
    encoder_depth=2,
    decoder_depth=1,
    dropout=0.0,
)
VARIANTS = {
    "shared": {"stacks": "shared", "reuse": "none", "decoder_depth": 0},
    "disentangled": {"reuse": "none"},
    "alternating": {"context_attention": "alternating"},
    "no_projection": {"reuse_projection": False},
    "all_tokens": {"reuse": "all_tokens"},
    "all_layers": {"reuse": "all_layers"},
}
ELEMENTWISE = 1.03


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def counted(function, *shapes):
    """FLOPs that the compiler counts in a program."""
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def unstacked(name):
    """A variant's config, structure and parameter shapes, layer by layer."""
    cfg = dataclasses.replace(WIDE, **VARIANTS[name])
    model = nnx.eval_shape(lambda: ENAT(cfg, rngs=nnx.Rngs(0)).unstacked())
    return cfg, *nnx.split(model)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_of_a_variant_costs_what_the_formula_says(name):
    cfg, graphdef, params = unstacked(name)
    plan = Plan(20, 12, 32) if cfg.carries_features else Plan(0, 32, 32)
    state = jax.eval_shape(lambda p: nnx.merge(graphdef, p).initial_state(1, 64), params)

    def call(params, classes, state, ids, positions, masked):
        model = nnx.merge(graphdef, params)
        condition = model.condition(classes)
        return model.predict(condition, state, ids, positions, masked, plan, None)

    shapes = (ids(1), state, ids(1, plan.new), ids(1, plan.new), ids(1, plan.masked))
    formula = step_flops(cfg, plan) + modulation_flops(cfg)
    assert formula <= counted(call, params, *shapes) <= ELEMENTWISE * formula


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS])
def test_a_training_step_of_a_variant_costs_what_the_formula_says(name):
    cfg, graphdef, params = unstacked(name)
    plans = (Plan(0, 20, 44), Plan(9, 7, 48) if cfg.carries_features else Plan(0, 16, 48))

    def loss(params, ema, token_ids, draws):
        models = (nnx.merge(graphdef, weights) for weights in (params, ema))
        return row_loss(*models, token_ids, draws, plans, label_smoothing=0.1)

    shapes = (params, params, ids(1, 2, 64), Draws(ids(1, 2, 64), ids(1, 2)))
    formula = sum(training_flops(cfg, plan) for plan in plans)
    idle = 0.0
    if name == "alternating":  # new tokens of the first image ask, forward and back, with nothing
        # to read there: queries and results of a row are one product
        idle = 3 * 2 * plans[0].new * 2 * cfg.width**2 * cfg.encoder_depth
    assert formula <= counted(jax.grad(loss), *shapes) <= ELEMENTWISE * (formula + idle)


@pytest.mark.parametrize("name", ["digits_nat", "digits_disentangled"])
def test_the_paper_in_small_compares_equal_recipes_at_equal_flops(name):
    enat, other = (load_config(str(CONFIGS / f"{each}.py")) for each in ("digits", name))
    per_image = []
    for config in (enat, other):
        layout, _ = plan_generation(
            make_strategy(config.strategy),
            config.model.length,
            functools.partial(step_flops, config.model),
            reuse=config.model.carries_features,
        )
        assert layout.steps == 8
        per_image.append(generation_flops(config.model, layout.buckets, padded=False))
    assert per_image[1] == pytest.approx(per_image[0], rel=0.05)
    train = dataclasses.replace(enat.train, reuse_probability=0.0)
    assert dataclasses.replace(other, model=enat.model) == dataclasses.replace(enat, train=train)
