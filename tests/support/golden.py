"""The reference's recordings, and the network they were recorded from."""

import json
import os
import pathlib

import numpy as np
from einops import rearrange
from flax import nnx

from enat_jax.models.enat.network import ENAT, ENATConfig
from enat_jax.models.enat.weights import never_read, rules
from enat_jax.models.import_table import apply_rules

# the committed recordings are a subset of all, and every test reads what is there
GOLDEN = pathlib.Path(os.environ.get("ENAT_GOLDEN", pathlib.Path(__file__).parents[1] / "golden"))


def golden_enat_config():
    """The config of the recorded network."""
    recorded = json.loads((GOLDEN / "enat/config.json").read_text())
    return ENATConfig(
        length=recorded["seq_len"],
        codebook_size=recorded["codebook_size"],
        num_classes=recorded["num_classes"],
        width=recorded["hidden_size"],
        num_heads=recorded["num_heads"],
        encoder_depth=recorded["enc_dec"][0],
        decoder_depth=recorded["enc_dec"][1],
    )


def enat_from(weights, cfg=None):
    """The network with given PyTorch weights."""
    cfg = cfg or golden_enat_config()
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: ENAT(cfg, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, apply_rules(rules(cfg), weights, abstract, unused=never_read))


def torch_arrays(tree, cfg=None):
    """A tree of parameters, or shaped like them, by PyTorch name; vectors lose axes of length 1."""
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(tree)}
    arrays = {}
    for rule in rules(cfg or golden_enat_config()):
        leaf = np.asarray(leaves[rule.target])
        parts = [leaf] if isinstance(rule.source, str) else leaf
        for name, part in zip(rule.names, parts, strict=True):
            if "key_value" in rule.target:
                arrays[name] = rearrange(
                    part, "i k o -> (k o) i" if part.ndim == 3 else "k o -> (k o)"
                )
            else:
                arrays[name] = rule.transform(part)  # its own inverse, but for lost axes
    return arrays
