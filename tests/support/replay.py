"""Replays generations recorded from an original network on our own sampler.

A generation is `final_ids` (B, L) with what `_replay` returns of every step; there or one prefix
up `labels` (B, 1), if no condition is given, the noise `gumbel_sample` (T, B, L, V) and
`gumbel_conf` (T, B, L), and the strategy (T,), `n_mask_next`, `mask_temp`, `samp_temp` and
`cfg_scale`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from enat_jax.convert.verify import compare
from enat_jax.core.generate import generate, plan_generation
from enat_jax.core.strategy import GenerationStrategy
from enat_jax.models.flops import step_flops

AUTONAT_NAMES = {"mask_len": "n_mask_next", "manual_temp": "mask_temp",
                 "manual_samp_temp": "samp_temp", "manual_cfg": "cfg_scale"}  # fmt: skip


def verify_generations(model, recorded, condition=None, **strategy):
    """Compares an imported `ENAT` or `AutoNAT`, in float32, with all generations of a recording."""
    comparisons = []
    for key in recorded:
        if not f"/{key}".endswith("/final_ids"):
            continue
        prefix = key.removesuffix("final_ids")
        places = prefix[: prefix.rstrip("/").rfind("/") + 1], prefix
        own = {name.removeprefix(place): array for place in places
               for name, array in recorded.items() if name.startswith(place)}  # fmt: skip
        with jax.default_matmul_precision("highest"):
            ours = _replay(model, own, condition, **strategy)
        comparisons += [compare(f"{prefix}{name}", array, recorded[f"{prefix}{name}"])
                        for name, array in ours.items()
                        if f"{prefix}{name}" in recorded]  # fmt: skip
    return comparisons


def _replay(model, recorded, condition, **changes):
    """What our own sampler decides on the recorded noise, in raster order.

    Returns:
        `final_ids` (B, L); `is_mask` (T, B, L) before every step; and of the tokens masked then
        `sampled_ids`, `sampled_logp` and `confidence` (T, B, L), and `logits`, `cond_logits` and
        `uncond_logits` (T, B, L, V), those recorded, of other tokens as they were recorded.
    """
    given = {AUTONAT_NAMES.get(name, name): array for name, array in recorded.items()}
    masked_after = given["n_mask_next"]
    if condition is None:
        condition = given["labels"][:, 0].astype(np.int32)
    cfg, steps = model.cfg, len(masked_after)
    strategy = GenerationStrategy(
        mask_ratio=np.append((masked_after[:-1] + 0.5) / cfg.length, 0.0),
        choice_temperature=np.append(given["mask_temp"], 0.0)[:steps],
        sampling_temperature=np.maximum(given["samp_temp"], 1e-4),
        guidance_scale=given["cfg_scale"],
        **changes,
    )
    reads = {"reuse": cfg.carries_features, "reads_masked": cfg.carries_masked_features}
    cost = partial(step_flops, cfg)
    layout, traced = plan_generation(strategy, cfg.length, cost, buckets=1, **reads)
    noise = given["gumbel_sample"], given["gumbel_conf"]
    final, (records,) = _generate(model, condition, traced, *noise, layout=layout)
    positions, logits, conditional, unconditional, sampled, confidence, _ = map(np.asarray, records)
    decided = {
        "is_mask": np.ones_like(positions, bool),
        "sampled_ids": sampled,
        "sampled_logp": np.take_along_axis(logits, sampled[..., None], axis=-1)[..., 0],
        "confidence": confidence,
        "logits": logits,
        "cond_logits": conditional,
    }
    if layout.buckets[0].guided:
        decided["uncond_logits"] = unconditional
    exists = np.arange(positions.shape[2]) < np.asarray(traced.masked)[:, None, None]
    exists = np.broadcast_to(exists, positions.shape)  # the others pad the bucket
    where = *np.nonzero(exists)[:2], positions[exists]
    ours = {name: given[name].copy() for name in decided if name in given}
    ours["is_mask"] = np.zeros((steps, *final.shape), bool)
    for name, array in ours.items():
        array[where] = decided[name][exists]
    return {"final_ids": np.asarray(final), **ours}


@partial(jax.jit, static_argnames="layout")
def _generate(model, condition, strategy, token_noise, choice_noise, *, layout):
    """Generates on noise that was recorded by position instead of drawn."""

    def noise(step, positions):
        tokens = jnp.take_along_axis(token_noise[step], positions[..., None], axis=1)
        return tokens, jnp.take_along_axis(choice_noise[step], positions, axis=1)

    return generate(model, condition, strategy, noise, layout=layout)
