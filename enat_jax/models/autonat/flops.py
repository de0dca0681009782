"""AutoNAT's matrix-product FLOPs by formula, two per multiply-add."""

from enat_jax.core.plans import Plan
from enat_jax.models.autonat.config import AutoNATConfig
from enat_jax.models.captions import text_projection_flops


def step_flops(cfg: AutoNATConfig, plan: Plan) -> float:
    """One network call on one branch of one image: all tokens, and the head on the masked ones."""
    d = cfg.width
    tokens = cfg.length + (cfg.text_length or 1)
    block = tokens * (4 * d * d + 2 * cfg.mlp_ratio * d * d) + 2 * tokens * tokens * d
    skips = cfg.depth // 2 * tokens * 2 * d * d
    head = plan.masked * d * (d + cfg.codebook_size)
    return 2.0 * ((cfg.depth + 1) * block + skips + head)


def condition_flops(cfg: AutoNATConfig) -> float:
    """What is done once for a condition of one image: a caption's tokens."""
    return text_projection_flops(cfg)


def training_flops(cfg: AutoNATConfig, plan: Plan) -> float:
    """One image of a training step: the forward pass, and the backward pass of twice as much.

    What remat computes again is not counted.
    """
    # the head's word matrix is detached: no product for its gradient
    detached = 2.0 * plan.masked * cfg.width * cfg.codebook_size
    return 3 * (step_flops(cfg, plan) + condition_flops(cfg)) - detached
