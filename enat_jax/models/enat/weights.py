"""The rule table of ENAT's published PyTorch weights."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from enat_jax.models.enat.network import ENATConfig
from enat_jax.models.import_table import ConvertError, Rule, flatten, transpose


def key_value_kernel(x: np.ndarray) -> np.ndarray:
    """A linear's `(key and value, in)` weight as our `(in, 2, out)` kernel."""
    return rearrange(x, "(k o) i -> i k o", k=2)


def key_value_bias(x: np.ndarray) -> np.ndarray:
    """Its bias, `(2, out)`."""
    return rearrange(x, "(k o) -> k o", k=2)


# PyTorch name, our path, what happens to the tensor; AutoNAT's head has the same names
HEAD_TABLE = [
    ("norm.weight", "head.norm_in.scale", None),
    ("norm.bias", "head.norm_in.bias", None),
    ("mlm_layer.fc.weight", "head.linear.kernel", transpose),
    ("mlm_layer.fc.bias", "head.linear.bias", None),
    ("mlm_layer.ln.weight", "head.norm_out.scale", None),
    ("mlm_layer.ln.bias", "head.norm_out.bias", None),
    ("mlm_layer.bias", "head.bias", flatten),
]

TABLE = [
    ("x_embedder.word_embeddings.weight", "embedding.word", None),
    ("x_embedder.position_embeddings.weight", "embedding.position", None),
    ("x_embedder.LayerNorm.weight", "embedding.norm.scale", None),
    ("x_embedder.LayerNorm.bias", "embedding.norm.bias", None),
    ("y_embedder.embedding_table.weight", "class_embedding", None),
    ("prev_proj.norm.weight", "reuse_projection.norm.scale", None),
    ("prev_proj.norm.bias", "reuse_projection.norm.bias", None),
    ("prev_proj.mlp.fc1.weight", "reuse_projection.mlp.up.kernel", transpose),
    ("prev_proj.mlp.fc1.bias", "reuse_projection.mlp.up.bias", None),
    ("prev_proj.mlp.fc2.weight", "reuse_projection.mlp.down.kernel", transpose),
    ("prev_proj.mlp.fc2.bias", "reuse_projection.mlp.down.bias", None),
    *HEAD_TABLE,
]

# within `blocks.N`: the first blocks are the encoder, the others the decoder
BLOCK_TABLE = [
    ("adaLN_modulation.1.weight", "modulation.kernel", transpose),
    ("adaLN_modulation.1.bias", "modulation.bias", None),
    ("attn.q.weight", "attention.query.kernel", transpose),
    ("attn.q.bias", "attention.query.bias", None),
    ("attn.kv.A.weight", "attention.context_key_value.kernel", key_value_kernel),
    ("attn.kv.A.bias", "attention.context_key_value.bias", key_value_bias),
    ("attn.kv.B.weight", "attention.own_key_value.kernel", key_value_kernel),
    ("attn.kv.B.bias", "attention.own_key_value.bias", key_value_bias),
    ("attn.proj.weight", "attention.out.kernel", transpose),
    ("attn.proj.bias", "attention.out.bias", None),
    ("mlp.fc1.weight", "mlp.up.kernel", transpose),
    ("mlp.fc1.bias", "mlp.up.bias", None),
    ("mlp.fc2.weight", "mlp.down.kernel", transpose),
    ("mlp.fc2.bias", "mlp.down.bias", None),
]

BESIDE = "num_heads and enc_dec"  # what weights do not tell, as a `config.json` beside them has it

RECIPE: dict[str, dict[str, Any]] = {}  # a config's defaults are ENAT's already


def never_read(name: str) -> bool:
    """Whether a published tensor belongs to the MLP that the reference builds and never calls."""
    return name.startswith("prev_embedder.")


def rules(cfg: ENATConfig) -> list[Rule]:
    """One rule per parameter of `ENAT(cfg)`."""
    depth = cfg.encoder_depth + cfg.decoder_depth
    stacks = {
        "encoder": range(cfg.encoder_depth),
        "decoder": range(cfg.encoder_depth, depth),
    }
    table = [Rule(source, target, how or (lambda x: x)) for source, target, how in TABLE]
    for stack, blocks in stacks.items():
        for source, target, how in BLOCK_TABLE:
            names = tuple(f"blocks.{block}.{source}" for block in blocks)
            table.append(Rule(names, f"{stack}.{target}", how or (lambda x: x)))
    return table


def sizes_from_weights(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields of `ENATConfig` that the weights tell; heads and encoder depth they do not.

    Returns:
        Field values, and under "depth" the number of all blocks.

    Raises:
        ConvertError: a tensor that tells a size is missing or not a matrix.
    """
    shapes = matrix_shapes(
        weights,
        "ENAT",
        word="x_embedder.word_embeddings.weight",
        position="x_embedder.position_embeddings.weight",
        classes="y_embedder.embedding_table.weight",
        hidden="blocks.0.mlp.fc1.weight",
    )
    width = shapes["word"][1]
    blocks = {int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "length": shapes["position"][0],
        "codebook_size": shapes["word"][0] - 1,
        "num_classes": shapes["classes"][0] - 1,
        "width": width,
        "mlp_ratio": shapes["hidden"][0] / width,
        "depth": max(blocks) + 1,
    }


def matrix_shapes(
    weights: Mapping[str, np.ndarray], network: str, **needed: str
) -> dict[str, tuple[int, ...]]:
    """The shapes of matrices that tell sizes.

    Args:
        weights: tensors by name.
        network: whose they should be.
        needed: what each is to be called, and its name among the weights.

    Raises:
        ConvertError: one is missing or not a matrix; all such are named.
    """
    absent = [name for name in needed.values() if np.ndim(weights.get(name, 0)) != 2]
    if absent:
        raise ConvertError(f"these are not {network}'s weights: no matrix {', '.join(absent)}")
    return {key: weights[name].shape for key, name in needed.items()}


def differences(cfg: ENATConfig, sizes: Mapping[str, Any]) -> list[str]:
    """Where a config is of another network than the weights, one phrase each."""
    wrong = [
        f"model.{name} = {getattr(cfg, name)}, the weights have {value}"
        for name, value in sizes.items()
        if name != "depth" and getattr(cfg, name) != value
    ]
    ours = cfg.encoder_depth + cfg.decoder_depth
    if ours != sizes["depth"]:
        both = "model.encoder_depth + model.decoder_depth"
        wrong.append(f"{both} = {ours}, the weights have {sizes['depth']} blocks")
    return wrong


def complete(sizes: Mapping[str, Any], recorded: Any) -> dict[str, Any]:
    """All sizes: what the weights tell, and of the reference's own config what they do not.

    Raises:
        KeyError, TypeError, ValueError: the reference's config does not have it.
        ConvertError: its depths are not the weights'.
    """
    heads, (encoder, decoder) = recorded["num_heads"], recorded["enc_dec"]
    if not all(isinstance(number, int) for number in (heads, encoder, decoder)):
        raise TypeError(f"{BESIDE} must be whole numbers")
    told = {name: value for name, value in sizes.items() if name != "depth"}
    if encoder + decoder != sizes["depth"]:
        raise ConvertError(
            f"enc_dec = {[encoder, decoder]}, the weights have {sizes['depth']} blocks"
        )
    return {**told, "num_heads": heads, "encoder_depth": encoder, "decoder_depth": decoder}


def grid_of(length: int) -> tuple[int, int]:
    """The square token grid of an image of `length` tokens.

    Raises:
        ConvertError: the length is no square.
    """
    side = math.isqrt(length)
    if side * side != length:
        raise ConvertError(f"{length} positions are no square grid")
    return side, side
