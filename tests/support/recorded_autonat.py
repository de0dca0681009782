"""AutoNAT as it was recorded from the reference, for the tests."""

import functools
import json

import numpy as np
from einops import rearrange
from flax import nnx
from safetensors.numpy import load_file

from enat_jax.models.autonat.network import AutoNATConfig
from enat_jax.models.autonat.weights import rules
from enat_jax.models.import_table import apply_rules
from enat_jax.models.networks import abstract_params
from tests.support.golden import GOLDEN


@functools.cache
def recorded_config():
    """The config of the recorded network."""
    recorded = json.loads((GOLDEN / "autonat/config.json").read_text())
    return AutoNATConfig(
        length=recorded["seq_len"],
        codebook_size=recorded["codebook_size"],
        num_classes=recorded["null_class_id"],
        width=recorded["embed_dim"],
        num_heads=recorded["num_heads"],
        depth=recorded["depth"],
        mlp_ratio=float(recorded["mlp_ratio"]),
    )


@functools.cache
def recorded_weights():
    """The recorded network's PyTorch weights by name; leave them as they are."""
    return load_file(GOLDEN / "autonat/state_dict.safetensors")


def autonat_from(weights, cfg=None):
    """The network with given PyTorch weights."""
    cfg = cfg or recorded_config()
    graphdef, abstract = abstract_params(cfg)
    return nnx.merge(graphdef, apply_rules(rules(cfg), weights, abstract))


@functools.cache
def recorded_autonat():
    """The recorded network."""
    return autonat_from(recorded_weights())


def torch_arrays(tree, cfg=None):
    """A tree of parameters, or shaped like them, by PyTorch name; vectors lose axes of length 1."""
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(tree)}
    arrays = {}
    for rule in rules(cfg or recorded_config()):
        leaf = np.asarray(leaves[rule.target])
        parts = [leaf] if isinstance(rule.source, str) else leaf
        for name, part in zip(rule.names, parts, strict=True):
            kernel = "query_key_value" in rule.target
            # the others are their own inverse, but for lost axes
            arrays[name] = rearrange(part, "i r o -> (r o) i") if kernel else rule.transform(part)
    return arrays
