"""The import table of MUSE's and AdaNAT's published PyTorch weights: AutoNAT's on captions."""

import numpy as np

from enat_jax.models.autonat import weights as classes
from enat_jax.models.autonat.config import AutoNATConfig
from enat_jax.models.import_table import Rule, Weights, transpose

# in the place of the class token's
TEXT_TABLE = [
    Rule("context_embed.weight", "caption_embedding.linear.kernel", transpose),
    Rule("context_embed.bias", "caption_embedding.linear.bias"),
]

BESIDE = {"num_heads": ["num_heads"], "num_clip_token": ["text_length"]}

# MUSE's on CC3M; captions are dropped as often as AutoNAT's classes are
RECIPE = {
    "model": {"condition": "text", "num_classes": 0},
    "train": {"reuse_probability": 0.0, "class_dropout": 0.15, "mean_over": "tokens"},
    "strategy": {
        "steps": 18,
        "masking": "autonat",
        "ranking": "logit",
        "guidance_scale": 10.0,
        "choice_temperature": 4.5,
        "sampling_temperature": 4.5,
    },
}


def never_read(name: str) -> bool:
    """MUSE's files hold the numbers of the positions, too."""
    return name.endswith("position_ids")


def rules(cfg: AutoNATConfig) -> list[Rule]:
    """One rule per parameter of `AutoNAT(cfg)`."""
    of_classes = classes.rules(cfg)
    return [*TEXT_TABLE, *(rule for rule in of_classes if "class_embedding" not in rule.target)]


def sizes_from_weights(weights: Weights) -> dict[str, int | float]:
    """The fields of `AutoNATConfig` that the weights tell, as of AutoNAT's weights."""
    context = "context_embed.weight"
    sizes = classes.sizes_from_weights(weights, context)
    del sizes["num_classes"]
    return sizes | {"text_width": np.shape(weights[context])[1]}
