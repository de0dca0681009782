"""The rule table of AutoNAT's published PyTorch weights."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from enat_jax.models.autonat.network import AutoNATConfig
from enat_jax.models.enat.weights import HEAD_TABLE, matrix_shapes
from enat_jax.models.import_table import ConvertError, Rule, transpose


def query_key_value_kernel(x: np.ndarray) -> np.ndarray:
    """A linear's `(query, key and value, in)` weight as our `(in, 3, out)` kernel."""
    return rearrange(x, "(r o) i -> i r o", r=3)


# PyTorch name, our path, what happens to the tensor
TABLE = [
    ("token_emb.word_embeddings.weight", "embedding.word", None),
    ("token_emb.position_embeddings.weight", "embedding.position", None),
    ("token_emb.LayerNorm.weight", "embedding.norm.scale", None),
    ("token_emb.LayerNorm.bias", "embedding.norm.bias", None),
    ("context_embed.word_embeddings.weight", "class_embedding.word", None),
    ("context_embed.position_embeddings.weight", "class_embedding.position", None),
    ("context_embed.LayerNorm.weight", "class_embedding.norm.scale", None),
    ("context_embed.LayerNorm.bias", "class_embedding.norm.bias", None),
    *HEAD_TABLE,
]

# within a block
BLOCK_TABLE = [
    ("norm1.weight", "attention_norm.scale", None),
    ("norm1.bias", "attention_norm.bias", None),
    ("attn.qkv.weight", "query_key_value.kernel", query_key_value_kernel),
    ("attn.proj.weight", "out.kernel", transpose),
    ("attn.proj.bias", "out.bias", None),
    ("norm2.weight", "mlp_norm.scale", None),
    ("norm2.bias", "mlp_norm.bias", None),
    ("mlp.fc1.weight", "mlp.up.kernel", transpose),
    ("mlp.fc1.bias", "mlp.up.bias", None),
    ("mlp.fc2.weight", "mlp.down.kernel", transpose),
    ("mlp.fc2.bias", "mlp.down.bias", None),
]

# within a block that reads a skip, too
SKIP_TABLE = [
    ("skip_linear.weight", "skip.kernel", transpose),
    ("skip_linear.bias", "skip.bias", None),
]

BESIDE = "num_heads"  # what weights do not tell, as a `config.json` beside them has it

# what a config made from the weights alone says of training and generation
RECIPE: dict[str, dict[str, Any]] = {
    "train": {"reuse_probability": 0.0, "class_dropout": 0.15, "mean_over": "tokens"},
    "strategy": {"masking": "autonat"},
}


def never_read(name: str) -> bool:
    """Whether the network never uses a published tensor; there is none such."""
    return False


def rules(cfg: AutoNATConfig) -> list[Rule]:
    """One rule per parameter of `AutoNAT(cfg)`."""
    half = range(cfg.depth // 2)
    stacks = {
        "inward": (tuple(f"in_blocks.{n}" for n in half), BLOCK_TABLE),
        "middle": ("mid_block", BLOCK_TABLE),
        "outward": (tuple(f"out_blocks.{n}" for n in half), [*BLOCK_TABLE, *SKIP_TABLE]),
    }
    table = [Rule(source, target, how or (lambda x: x)) for source, target, how in TABLE]
    for stack, (blocks, rows) in stacks.items():
        for source, target, how in rows:
            one = isinstance(blocks, str)
            names = f"{blocks}.{source}" if one else tuple(f"{b}.{source}" for b in blocks)
            table.append(Rule(names, f"{stack}.{target}", how or (lambda x: x)))
    return table


def sizes_from_weights(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields of `AutoNATConfig` that the weights tell: all but the heads.

    Raises:
        ConvertError: a tensor that tells a size is missing or not a matrix.
    """
    shapes = matrix_shapes(
        weights,
        "AutoNAT",
        word="token_emb.word_embeddings.weight",
        position="token_emb.position_embeddings.weight",
        classes="context_embed.word_embeddings.weight",
        hidden="mid_block.mlp.fc1.weight",
    )
    width = shapes["word"][1]
    outer = {found[0] for name in weights if (found := re.match(r"(in|out)_blocks\.\d+\.", name))}
    if not outer or len(outer) % 2:
        raise ConvertError(
            f"these are not AutoNAT's weights: {len(outer)} blocks in in_blocks and out_blocks,"
            " must be as many in each"
        )
    return {
        "length": shapes["position"][0],
        "codebook_size": shapes["word"][0] - 1,
        "num_classes": shapes["classes"][0] - 1,
        "width": width,
        "mlp_ratio": shapes["hidden"][0] / width,
        "depth": len(outer),
    }


def differences(cfg: AutoNATConfig, sizes: Mapping[str, Any]) -> list[str]:
    """Where a config is of another network than the weights, one phrase each."""
    return [
        f"model.{name} = {getattr(cfg, name)}, the weights have {value}"
        for name, value in sizes.items()
        if getattr(cfg, name) != value
    ]


def complete(sizes: Mapping[str, Any], recorded: Any) -> dict[str, Any]:
    """All sizes: what the weights tell, and of the reference's own config what they do not.

    Raises:
        KeyError, TypeError: the reference's config does not have it.
    """
    heads = recorded["num_heads"]
    if not isinstance(heads, int):
        raise TypeError("num_heads must be a whole number")
    return {**sizes, "num_heads": heads}
