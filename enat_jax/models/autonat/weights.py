"""The import table of AutoNAT's published PyTorch weights."""

import numpy as np
from einops import rearrange

from enat_jax.models.autonat.config import AutoNATConfig
from enat_jax.models.enat.weights import HEAD_TABLE, token_sizes
from enat_jax.models.import_table import Rule, Weights, below, count_names, transpose


def query_key_value_kernel(x: np.ndarray) -> np.ndarray:
    """A linear's `(query, key and value, in)` weight as our `(in, 3, out)` kernel."""
    return rearrange(x, "(r o) i -> i r o", r=3)


# PyTorch name, our path, what happens to the tensor
TABLE = [
    Rule("token_emb.word_embeddings.weight", "embedding.word"),
    Rule("token_emb.position_embeddings.weight", "embedding.position"),
    Rule("token_emb.LayerNorm.weight", "embedding.norm.scale"),
    Rule("token_emb.LayerNorm.bias", "embedding.norm.bias"),
    Rule("context_embed.word_embeddings.weight", "class_embedding.word"),
    Rule("context_embed.position_embeddings.weight", "class_embedding.position"),
    Rule("context_embed.LayerNorm.weight", "class_embedding.norm.scale"),
    Rule("context_embed.LayerNorm.bias", "class_embedding.norm.bias"),
    *HEAD_TABLE,
]

# within a block
BLOCK_TABLE = [
    Rule("norm1.weight", "attention_norm.scale"),
    Rule("norm1.bias", "attention_norm.bias"),
    Rule("attn.qkv.weight", "query_key_value.kernel", query_key_value_kernel),
    Rule("attn.proj.weight", "out.kernel", transpose),
    Rule("attn.proj.bias", "out.bias"),
    Rule("norm2.weight", "mlp_norm.scale"),
    Rule("norm2.bias", "mlp_norm.bias"),
    Rule("mlp.fc1.weight", "mlp.up.kernel", transpose),
    Rule("mlp.fc1.bias", "mlp.up.bias"),
    Rule("mlp.fc2.weight", "mlp.down.kernel", transpose),
    Rule("mlp.fc2.bias", "mlp.down.bias"),
]

# within a block that reads a skip, too
SKIP_TABLE = [
    Rule("skip_linear.weight", "skip.kernel", transpose),
    Rule("skip_linear.bias", "skip.bias"),
]

# what weights do not tell: a field of the `config.json` beside them, our fields
BESIDE = {"num_heads": ["num_heads"]}

# what a config made from the weights alone says of training and generation
RECIPE = {
    "train": {"reuse_probability": 0.0, "class_dropout": 0.15, "mean_over": "tokens"},
    "strategy": {"masking": "autonat"},
}


def never_read(name: str) -> bool:
    """Whether the network never uses a published tensor; there is none such."""
    return False


def rules(cfg: AutoNATConfig) -> list[Rule]:
    """One rule per parameter of `AutoNAT(cfg)`."""
    half = range(cfg.depth // 2)
    return [
        *TABLE,
        *below(BLOCK_TABLE, [f"in_blocks.{n}" for n in half], "inward"),
        *below(BLOCK_TABLE, "mid_block", "middle"),
        *below([*BLOCK_TABLE, *SKIP_TABLE], [f"out_blocks.{n}" for n in half], "outward"),
    ]


def sizes_from_weights(
    weights: Weights, classes: str = "context_embed.word_embeddings.weight"
) -> dict[str, int | float]:
    """The fields of `AutoNATConfig` that the weights tell: all but the heads; see `token_sizes`."""
    sizes = token_sizes(
        weights,
        "AutoNAT",
        "token_emb.word_embeddings.weight",
        "token_emb.position_embeddings.weight",
        classes,
        "mid_block.mlp.fc1.weight",
    )
    return sizes | {"depth": count_names(r"((?:in|out)_blocks\.\d+)\.", weights)}
