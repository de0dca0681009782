"""The import tables of CLIP's text weights, under Hugging Face's names and under open_clip's.

Files of the whole of CLIP hold them beside the image tower, which is not read. The two layouts
differ in more than names: open_clip fuses the rows of query, key and value, and keeps its
projection transposed.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from enat_jax.config_file import make_config
from enat_jax.errors import UserError
from enat_jax.models.import_table import Rule, Weights, below, count_names, transpose
from enat_jax.text.clip import CLIPTextConfig

Layout = Literal["hugging_face", "open_clip"]

_WORDS: dict[str, Layout] = {
    "text_model.embeddings.token_embedding.weight": "hugging_face",
    "token_embedding.weight": "open_clip",
}
_BLOCKS = {"hugging_face": "text_model.encoder.layers", "open_clip": "transformer.resblocks"}


def third(number: int) -> Callable[[np.ndarray], np.ndarray]:
    """Of open_clip's fused rows those of query (0), key (1) or value (2), as our kernel or bias."""

    def rows(x: np.ndarray) -> np.ndarray:
        each = np.atleast_1d(x).shape[0] // 3
        return np.atleast_1d(x)[number * each : (number + 1) * each].T

    return rows


HUGGING_FACE = [
    Rule("text_model.embeddings.token_embedding.weight", "words"),
    Rule("text_model.embeddings.position_embedding.weight", "positions"),
    Rule("text_model.final_layer_norm.weight", "norm_out.scale"),
    Rule("text_model.final_layer_norm.bias", "norm_out.bias"),
]
HUGGING_FACE_BLOCK = [
    Rule("layer_norm1.weight", "attention_norm.scale"),
    Rule("layer_norm1.bias", "attention_norm.bias"),
    Rule("self_attn.q_proj.weight", "query.kernel", transpose),
    Rule("self_attn.q_proj.bias", "query.bias"),
    Rule("self_attn.k_proj.weight", "key.kernel", transpose),
    Rule("self_attn.k_proj.bias", "key.bias"),
    Rule("self_attn.v_proj.weight", "value.kernel", transpose),
    Rule("self_attn.v_proj.bias", "value.bias"),
    Rule("self_attn.out_proj.weight", "out.kernel", transpose),
    Rule("self_attn.out_proj.bias", "out.bias"),
    Rule("layer_norm2.weight", "mlp_norm.scale"),
    Rule("layer_norm2.bias", "mlp_norm.bias"),
    Rule("mlp.fc1.weight", "up.kernel", transpose),
    Rule("mlp.fc1.bias", "up.bias"),
    Rule("mlp.fc2.weight", "down.kernel", transpose),
    Rule("mlp.fc2.bias", "down.bias"),
]

OPEN_CLIP = [
    Rule("token_embedding.weight", "words"),
    Rule("positional_embedding", "positions"),
    Rule("ln_final.weight", "norm_out.scale"),
    Rule("ln_final.bias", "norm_out.bias"),
]
OPEN_CLIP_BLOCK = [
    Rule("ln_1.weight", "attention_norm.scale"),
    Rule("ln_1.bias", "attention_norm.bias"),
    Rule("attn.in_proj_weight", "query.kernel", third(0)),
    Rule("attn.in_proj_bias", "query.bias", third(0)),
    Rule("attn.in_proj_weight", "key.kernel", third(1)),
    Rule("attn.in_proj_bias", "key.bias", third(1)),
    Rule("attn.in_proj_weight", "value.kernel", third(2)),
    Rule("attn.in_proj_bias", "value.bias", third(2)),
    Rule("attn.out_proj.weight", "out.kernel", transpose),
    Rule("attn.out_proj.bias", "out.bias"),
    Rule("ln_2.weight", "mlp_norm.scale"),
    Rule("ln_2.bias", "mlp_norm.bias"),
    Rule("mlp.c_fc.weight", "up.kernel", transpose),
    Rule("mlp.c_fc.bias", "up.bias"),
    Rule("mlp.c_proj.weight", "down.kernel", transpose),
    Rule("mlp.c_proj.bias", "down.bias"),
]
PROJECTION = {
    "hugging_face": Rule("text_projection.weight", "projection.kernel", transpose),
    "open_clip": Rule("text_projection", "projection.kernel"),
}

# fields of the `config.json` beside the weights, and ours: what weights do not tell, and sizes
BESIDE = {"num_attention_heads": "num_heads", "hidden_act": "activation"}
SIZES = {"vocab_size": "vocabulary", "max_position_embeddings": "length", "hidden_size": "width",
         "num_hidden_layers": "depth", "intermediate_size": "mlp_width"}  # fmt: skip
OPTIONAL = {"layer_norm_eps": "norm_epsilon", "output": "output"}


def never_read(name: str) -> bool:
    """Whether a tensor is of CLIP's other half, or a constant that old files keep."""
    other = ("vision_model.", "visual.", "visual_projection.", "logit_scale", "logit_bias")
    return name.startswith(other) or name.endswith(("position_ids", "attn_mask"))


def layout_of(weights: Weights) -> Layout:
    """Which of the two names these weights, by the words; a UserError if neither does."""
    layouts: list[Layout] = [layout for name, layout in _WORDS.items() if name in weights]
    if len(layouts) != 1:
        names = ", ".join(_WORDS)
        raise UserError(f"these are not CLIP's text weights: {len(layouts)} of {names}, must be 1")
    return layouts[0]


def rules(cfg: CLIPTextConfig, layout: Layout) -> list[Rule]:
    """One rule per parameter of `CLIPText(cfg)`."""
    table, block = {
        "hugging_face": (HUGGING_FACE, HUGGING_FACE_BLOCK),
        "open_clip": (OPEN_CLIP, OPEN_CLIP_BLOCK),
    }[layout]
    blocks = [f"{_BLOCKS[layout]}.{number}" for number in range(cfg.depth)]
    projection = [PROJECTION[layout]] if cfg.projection else []
    return [*table, *below(block, blocks, "blocks"), *projection]


def sizes_from_weights(weights: Weights) -> dict[str, int]:
    """What the weights tell of `CLIPTextConfig`, by field.

    Raises:
        UserError: weights of no text tower, or tensors that tell no size; all such are named.
    """
    layout = layout_of(weights)
    table = {rule.target: str(rule.source) for rule in rules(CLIPTextConfig(depth=0), layout)}
    block, up = (
        {"hugging_face": HUGGING_FACE_BLOCK, "open_clip": OPEN_CLIP_BLOCK}[layout],
        "up.kernel",
    )
    hidden = f"{_BLOCKS[layout]}.0.{next(rule.source for rule in block if rule.target == up)}"
    names = [table["words"], table["positions"], hidden]
    if (projection := str(PROJECTION[layout].source)) in weights:
        names.append(projection)
    shapes = {name: np.shape(weights.get(name, 0)) for name in names}
    if absent := [name for name, shape in shapes.items() if len(shape) != 2 or 0 in shape]:
        raise UserError(f"these are not CLIP's text weights: no matrix {', '.join(absent)}")
    into = 0 if layout == "hugging_face" else 1  # where a projection's matrix has its result
    return {
        "vocabulary": shapes[names[0]][0],
        "length": shapes[names[1]][0],
        "width": shapes[names[0]][1],
        "depth": count_names(rf"{re.escape(_BLOCKS[layout])}\.(\d+)\.", weights),
        "mlp_width": shapes[hidden][0],
        "projection": shapes[projection][into] if projection in shapes else 0,
    }


def config_of(weights: Weights, beside: Mapping[str, Any]) -> CLIPTextConfig:
    """The config of the tower that has these weights, with what the file beside them says.

    Args:
        weights: under either layout's names.
        beside: fields as Hugging Face names them, of the text tower or, in `text_config`, of the
            whole of CLIP; `output` is ours.

    Raises:
        UserError: weights of no text tower or of another than the file's; fields missing or wrong.
    """
    sizes = sizes_from_weights(weights)
    inner = beside.get("text_config")
    told = {**beside, **inner} if isinstance(inner, dict) else beside
    if missing := [name for name in BESIDE if name not in told]:
        raise UserError(f"neither weights nor config.json tell {' and '.join(missing)}")
    wrong = [
        f"{name} = {told[name]}, the weights have {sizes[ours]}"
        for name, ours in SIZES.items()
        if name in told and told[name] != sizes[ours]
    ]
    if wrong:
        raise UserError(f"the weights are of another tower: {'; '.join(wrong)}")
    fields = {ours: told[name] for name, ours in (BESIDE | OPTIONAL).items() if name in told}
    return make_config(CLIPTextConfig, sizes | fields)
