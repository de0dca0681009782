"""The import table of ENAT's published PyTorch weights."""

import numpy as np
from einops import rearrange

from enat_jax.errors import UserError
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.import_table import Rule, Weights, below, count_names, flatten, transpose


def key_value_kernel(x: np.ndarray) -> np.ndarray:
    """A linear's `(key and value, in)` weight as our `(in, 2, out)` kernel."""
    return rearrange(x, "(k o) i -> i k o", k=2)


def key_value_bias(x: np.ndarray) -> np.ndarray:
    """Its bias, `(2, out)`."""
    return rearrange(x, "(k o) -> k o", k=2)


# PyTorch name, our path, what happens to the tensor; AutoNAT's head has the same names
HEAD_TABLE = [
    Rule("norm.weight", "head.norm_in.scale"),
    Rule("norm.bias", "head.norm_in.bias"),
    Rule("mlm_layer.fc.weight", "head.linear.kernel", transpose),
    Rule("mlm_layer.fc.bias", "head.linear.bias"),
    Rule("mlm_layer.ln.weight", "head.norm_out.scale"),
    Rule("mlm_layer.ln.bias", "head.norm_out.bias"),
    Rule("mlm_layer.bias", "head.bias", flatten),
]

TABLE = [
    Rule("x_embedder.word_embeddings.weight", "embedding.word"),
    Rule("x_embedder.position_embeddings.weight", "embedding.position"),
    Rule("x_embedder.LayerNorm.weight", "embedding.norm.scale"),
    Rule("x_embedder.LayerNorm.bias", "embedding.norm.bias"),
    Rule("y_embedder.embedding_table.weight", "class_embedding"),
    Rule("prev_proj.norm.weight", "reuse_projection.norm.scale"),
    Rule("prev_proj.norm.bias", "reuse_projection.norm.bias"),
    Rule("prev_proj.mlp.fc1.weight", "reuse_projection.mlp.up.kernel", transpose),
    Rule("prev_proj.mlp.fc1.bias", "reuse_projection.mlp.up.bias"),
    Rule("prev_proj.mlp.fc2.weight", "reuse_projection.mlp.down.kernel", transpose),
    Rule("prev_proj.mlp.fc2.bias", "reuse_projection.mlp.down.bias"),
    *HEAD_TABLE,
]

# within `blocks.N`: the first blocks are the encoder, the others the decoder
BLOCK_TABLE = [
    Rule("adaLN_modulation.1.weight", "modulation.kernel", transpose),
    Rule("adaLN_modulation.1.bias", "modulation.bias"),
    Rule("attn.q.weight", "attention.query.kernel", transpose),
    Rule("attn.q.bias", "attention.query.bias"),
    Rule("attn.kv.A.weight", "attention.context_key_value.kernel", key_value_kernel),
    Rule("attn.kv.A.bias", "attention.context_key_value.bias", key_value_bias),
    Rule("attn.kv.B.weight", "attention.own_key_value.kernel", key_value_kernel),
    Rule("attn.kv.B.bias", "attention.own_key_value.bias", key_value_bias),
    Rule("attn.proj.weight", "attention.out.kernel", transpose),
    Rule("attn.proj.bias", "attention.out.bias"),
    Rule("mlp.fc1.weight", "mlp.up.kernel", transpose),
    Rule("mlp.fc1.bias", "mlp.up.bias"),
    Rule("mlp.fc2.weight", "mlp.down.kernel", transpose),
    Rule("mlp.fc2.bias", "mlp.down.bias"),
]

# what weights do not tell: a field of the `config.json` beside them, our fields
BESIDE = {"num_heads": ["num_heads"], "enc_dec": ["encoder_depth", "decoder_depth"]}

RECIPE: dict[str, dict] = {}  # a config's defaults are ENAT's already


def never_read(name: str) -> bool:
    """Whether a published tensor belongs to the MLP that the reference builds and never calls."""
    return name.startswith("prev_embedder.")


def rules(cfg: ENATConfig) -> list[Rule]:
    """One rule per parameter of `ENAT(cfg)`."""
    blocks = [f"blocks.{n}" for n in range(cfg.encoder_depth + cfg.decoder_depth)]
    return [
        *TABLE,
        *below(BLOCK_TABLE, blocks[: cfg.encoder_depth], "encoder"),
        *below(BLOCK_TABLE, blocks[cfg.encoder_depth :], "decoder"),
    ]


def sizes_from_weights(weights: Weights) -> dict[str, int | float]:
    """What the weights tell of `ENATConfig`, by field or sum of fields; see `token_sizes`."""
    sizes = token_sizes(
        weights,
        "ENAT",
        "x_embedder.word_embeddings.weight",
        "x_embedder.position_embeddings.weight",
        "y_embedder.embedding_table.weight",
        "blocks.0.mlp.fc1.weight",
    )
    return sizes | {"encoder_depth + decoder_depth": count_names(r"blocks\.(\d+)\.", weights)}


def token_sizes(
    weights: Weights, network: str, word: str, position: str, classes: str, hidden: str
) -> dict[str, int | float]:
    """The sizes that a network's embeddings and its first MLP tell, by field of its config.

    Raises:
        UserError: one of these tensors is missing or not a matrix; all such are named.
    """
    shapes = {name: np.shape(weights.get(name, 0)) for name in (word, position, classes, hidden)}
    if absent := [name for name, shape in shapes.items() if len(shape) != 2 or 0 in shape]:
        raise UserError(f"these are not {network}'s weights: no matrix {', '.join(absent)}")
    tokens, width = shapes[word]
    return {
        "length": shapes[position][0],
        "codebook_size": tokens - 1,
        "num_classes": shapes[classes][0] - 1,
        "width": width,
        "mlp_ratio": shapes[hidden][0] / width,
    }
