"""ENAT's matrix-product FLOPs by formula, two per multiply-add."""

from enat_jax.models.enat import ENATConfig
from enat_jax.plans import Plan


def modulation_flops(cfg: ENATConfig) -> float:
    """AdaLN's vectors of all blocks, for one class of one image."""
    return 2.0 * (cfg.encoder_depth + cfg.decoder_depth) * 8 * cfg.width**2


def _block_flops(cfg: ENATConfig, own: int, context: int) -> float:
    d = cfg.width
    own_products = own * (d * d + 2 * d * d + d * d + 2 * cfg.mlp_ratio * d * d)
    context_products = context * 2 * d * d
    attention = 2 * own * (own + context) * d
    return 2.0 * (own_products + context_products + attention)


def encoder_flops(cfg: ENATConfig, plan: Plan) -> float:
    """The encoder on one image's new tokens; nothing where there are none."""
    return cfg.encoder_depth * _block_flops(cfg, plan.new, plan.previous) if plan.new else 0.0


def step_flops(cfg: ENATConfig, plan: Plan) -> float:
    """One network call on one branch of one image, modulation left out."""
    reuse = 2.0 * plan.previous * 2 * cfg.mlp_ratio * cfg.width**2
    decoder = cfg.decoder_depth * _block_flops(cfg, plan.masked, plan.previous + plan.new)
    head = 2.0 * plan.masked * cfg.width * (cfg.width + cfg.codebook_size)
    return reuse + encoder_flops(cfg, plan) + decoder + head


def training_flops(cfg: ENATConfig, plan: Plan) -> float:
    """One image of a training step.

    The student's forward pass counts three times (the backward pass is two), the EMA network's
    pass over the previous tokens once. What remat computes again is not counted.
    """
    student = step_flops(cfg, plan) + modulation_flops(cfg)
    # the head's word matrix is detached: no product for its gradient
    detached = 2.0 * plan.masked * cfg.width * cfg.codebook_size
    ema = encoder_flops(cfg, Plan(0, plan.previous, plan.masked + plan.new))
    ema += modulation_flops(cfg) if plan.previous else 0.0
    return 3 * student - detached + ema
