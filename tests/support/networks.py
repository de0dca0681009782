"""All networks there are, as small as they can be, for the tests that each of them must pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from enat_jax.core.network import RowPlan, Tokens
from enat_jax.core.plans import Plan
from enat_jax.models.autonat.network import AutoNATConfig
from enat_jax.models.captions import Captions
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.networks import abstract_params, make_network

SIZES = {"length": 16, "codebook_size": 11, "num_classes": 3, "width": 16, "num_heads": 2,
         "dropout": 0.0}  # fmt: skip
BASE = ENATConfig(**SIZES, encoder_depth=2, decoder_depth=1)
NAT = {"stacks": "shared", "reuse": "none", "decoder_depth": 0}
VARIANTS = {
    "enat": {},
    "projected_once": {"reproject": False},
    "no_projection": {"reuse_projection": False},
    "disentangled": {"reuse": "none"},
    "alternating": {"context_attention": "alternating"},
    "all_tokens": {"reuse": "all_tokens"},
    "all_layers": {"reuse": "all_layers"},
    "alternating_all_tokens": {"reuse": "all_tokens", "context_attention": "alternating"},
    "nat": NAT,
    "masked_to_visible": {**NAT, "blocked": "masked_to_visible"},
    "visible_to_masked": {**NAT, "blocked": "visible_to_masked"},
    "visible_to_visible": {**NAT, "blocked": "visible_to_visible"},
    "masked_to_masked": {**NAT, "blocked": "masked_to_masked"},
}
CONFIGS = {name: dataclasses.replace(BASE, **changes) for name, changes in VARIANTS.items()}
CONFIGS["autonat"] = AutoNATConfig(**SIZES, depth=2)
WORDS = {"condition": "text", "text_length": 3, "text_width": 8, "text_vocabulary": 5}
FEATURES = WORDS | {"text_vocabulary": 0}
CONFIGS["text"] = dataclasses.replace(BASE, **WORDS)
CONFIGS["text_features"] = dataclasses.replace(BASE, **FEATURES, reuse="none")
CONFIGS["text_every_step"] = dataclasses.replace(
    BASE, **WORDS, text_every_step=True, key_value="shared", reuse_projection=False
)
CONFIGS["autonat_text"] = AutoNATConfig(**SIZES, **FEATURES, depth=2)
"""A new network joins here, and is tested for nothing."""


@functools.cache
def network(name, **changes):
    """A network with weights that let everything through; fresh blocks of ENAT's are identities."""
    cfg = dataclasses.replace(CONFIGS[name], **changes)
    graphdef, params = nnx.split(make_network(cfg, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    noisy = [x + 0.3 * rng.standard_normal(x.shape).astype("f4") for x in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, noisy))


def condition(cfg, class_ids):
    """What a network is given for classes: their ids, or a caption of each (of 3 the empty one)."""
    ids = jnp.asarray(class_ids)
    if cfg.condition == "class":
        return ids
    words = jnp.array([[1, 2, 0], [3, 2, 4], [4, 0, 0], [0, 0, 0]])
    table = words
    if not cfg.text_vocabulary:
        rng = np.random.default_rng(7)
        table = jnp.asarray(rng.standard_normal((4, cfg.text_length, cfg.text_width)), "f4")
    return Captions(table[ids], table[jnp.full_like(ids, 3)])


def changed(model, **changes):
    """The same weights under another config."""
    graphdef, _ = abstract_params(dataclasses.replace(model.cfg, **changes))
    return nnx.merge(graphdef, nnx.state(model))


def without_previous(plan, cfg):
    """The plan as a network gets it that carries no features."""
    return plan if cfg.carries_features else Plan(0, plan.previous + plan.new, plan.masked)


def in_reveal_order(token_ids, order, plan):
    """The tokens of one image a row, given in raster order with the order of their reveal."""
    ids = jnp.take_along_axis(jnp.asarray(token_ids), jnp.asarray(order), axis=1)
    end = plan.previous + plan.new
    new = slice(plan.previous, end)
    return Tokens(ids[:, new], order[:, new], order[:, end:]), RowPlan((plan,))


def parameter_count(cfg):
    """How many numbers a network holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg)[1]))
