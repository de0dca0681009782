"""ENAT's matrix-product FLOPs by formula, two per multiply-add."""

from collections.abc import Sequence

from enat_jax.core.plans import Plan
from enat_jax.models.captions import text_projection_flops
from enat_jax.models.enat.config import ContextAttention, ENATConfig

VECTORS: dict[ContextAttention, int] = {"none": 6, "joint": 8, "alternating": 11}
"""How many vectors adaLN makes per block and image."""


def condition_flops(cfg: ENATConfig) -> float:
    """What is done once for a condition of one image: adaLN's vectors of all blocks, or a caption.

    A caption runs through the encoder's blocks alone.
    """
    if cfg.condition == "text":
        once = 0 if cfg.text_every_step else cfg.text_length
        return text_projection_flops(cfg) + encoder_flops(cfg, once, 0)
    vectors = cfg.encoder_depth * VECTORS[cfg.encoder_attention]
    vectors += cfg.decoder_depth * VECTORS[cfg.decoder_attention]
    return 2.0 * vectors * cfg.width**2


def _block_flops(cfg: ENATConfig, own: int, context: int, attention: ContextAttention) -> float:
    d = cfg.width
    own_products = own * (d * d + 2 * d * d + d * d + 2 * cfg.mlp_ratio * d * d)
    if attention == "alternating" and context:  # its own queries and output projection
        own_products += own * 2 * d * d
    context_products = context * 2 * d * d
    weighting = 2 * own * (own + context) * d
    return 2.0 * (own_products + context_products + weighting)


def encoder_flops(cfg: ENATConfig, own: int, reused: int) -> float:
    """The encoder on one image's own tokens; nothing where there are none."""
    block = _block_flops(cfg, own, reused, cfg.encoder_attention)
    return cfg.encoder_depth * block if own else 0.0


def _encoder_flops(cfg: ENATConfig, new: int, reused: int) -> float:
    """A call of the encoder on new tokens, with a caption beside them or as their context."""
    beside = cfg.text_length if cfg.text_every_step else 0
    return encoder_flops(cfg, new + beside, reused + cfg.text_length - beside)


def _decoder_flops(cfg: ENATConfig, masked: int, visible: int) -> float:
    return cfg.decoder_depth * _block_flops(cfg, masked, visible, cfg.decoder_attention)


def _projections(cfg: ENATConfig) -> int:
    if not (cfg.carries_features and cfg.reuse_projection):
        return 0
    return cfg.encoder_depth if cfg.reuse == "all_layers" else 1


def step_flops(cfg: ENATConfig, plan: Plan, *, reuse: bool = True) -> float:
    """One network call on one branch of one image, without what is done once for a condition.

    Args:
        cfg: the network's.
        plan: the image's (padded) plan.
        reuse: whether it reads features of the step before, where the plan does not tell: with
            `reuse = "all_tokens"` and no previous token.
    """
    head = 2.0 * plan.masked * cfg.width * (cfg.width + cfg.codebook_size)
    if cfg.stacks == "shared":
        return encoder_flops(cfg, cfg.length, 0) + head
    reused, text = plan.previous, cfg.text_length
    if cfg.reuse == "all_tokens":
        reused = cfg.length if reuse and plan.previous + plan.new else 0
    projection = 2.0 * reused * 2 * cfg.mlp_ratio * cfg.width**2
    encoder = _encoder_flops(cfg, plan.new, reused)
    decoder = _decoder_flops(cfg, plan.masked, text + reused + plan.new)
    return _projections(cfg) * projection + encoder + decoder + head


def training_flops(cfg: ENATConfig, plan: Plan) -> float:
    """One image of a training step.

    The student's forward pass counts three times (the backward pass is two), the EMA network's
    pass over the previous tokens once. What remat computes again is not counted.
    """
    student = step_flops(cfg, plan, reuse=plan.previous > 0) + condition_flops(cfg)
    # the head's word matrix is detached: no product for its gradient
    detached = 2.0 * plan.masked * cfg.width * cfg.codebook_size
    ema = 0.0
    if plan.previous:
        ema += _encoder_flops(cfg, plan.previous, 0) + condition_flops(cfg)
        if cfg.reuse == "all_tokens":
            ema += _decoder_flops(cfg, plan.new + plan.masked, plan.previous)
    return 3 * student - detached + ema


def paper_gflops(cfg: ENATConfig, plans: Sequence[Plan]) -> float:
    """A generation in the unit of the paper's ablations: multiply-adds, in billions.

    Its figures fit (within 5%, each of them) a sampler that runs both branches and adaLN at every
    step, which the reference does; ours leaves out what no step reads. What is done once for a
    caption counts once.
    """
    conditions = 1 if cfg.condition == "text" else len(plans)
    steps = sum(step_flops(cfg, plan) for plan in plans)
    return (steps + conditions * condition_flops(cfg)) / 1e9
