"""Replays arrays recorded from AutoNAT's PyTorch network on an imported one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from enat_jax.convert.verify import Arrays, Comparison, compare, decisions, something
from enat_jax.core.network import RowPlan, Tokens
from enat_jax.core.plans import Plan
from enat_jax.core.strategy import GenerationStrategy
from enat_jax.models.autonat.network import AutoNAT


def verify_autonat(model: AutoNAT, recorded: Arrays) -> list[Comparison]:
    """Compares the network with recorded forward passes or a recorded generation.

    Forward passes are keys `<group>/ids` (B, L), or `ids` alone, with `logits` (B, L, V) beside
    them and one `context` (B, 1) of class ids. A generation is the keys `labels`, `gumbel_sample`,
    `gumbel_conf`, `mask_len` and the strategy's `manual_*`, with per-step arrays beside them.

    Args:
        model: the imported network, in float32.
        recorded: arrays by key.

    Raises:
        ConvertError: no such keys.
    """
    with jax.default_matmul_precision("highest"):
        found = _forward_passes(model, recorded)
        if "final_ids" in recorded:
            results = _generation(model, recorded)
            found += [
                compare(name, value, recorded[name])
                for name, value in results.items()
                if name in recorded
            ]
    return something(found, recorded)


def replay_autonat(
    model: AutoNAT, ids: Int[np.ndarray, "b l"], class_ids: Int[np.ndarray, " b"]
) -> Float[Array, "b l v"]:
    """Logits at all positions of token ids, mask ids among them."""
    graphdef, params = nnx.split(model)
    return _replay(graphdef, params, ids, class_ids)


def _replay_uncompiled(graphdef: Any, params: Any, ids: Any, class_ids: Any) -> Array:
    model = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    tokens = Tokens(ids, positions, positions[:, :0])  # mask ids are among the visible ones
    row = RowPlan((Plan(0, ids.shape[1], 0),))
    return model.logits(model(model.embed_condition(class_ids[:, None]), tokens, row).new)


_replay = jax.jit(_replay_uncompiled, static_argnums=0)


def _forward_passes(model: AutoNAT, recorded: Arrays) -> list[Comparison]:
    prefixes = [key.removesuffix("ids") for key in recorded if f"/{key}".endswith("/ids")]
    return [
        compare(
            f"{prefix}logits",
            replay_autonat(model, recorded[f"{prefix}ids"], recorded["context"][:, 0]),
            recorded[f"{prefix}logits"],
        )
        for prefix in prefixes
        if f"{prefix}logits" in recorded and "context" in recorded
    ]


def _generation(model: AutoNAT, recorded: Arrays) -> dict[str, np.ndarray]:
    """What our sampler decides at every step, and the network's logits on the recorded ids."""
    sampling = np.maximum(recorded["manual_samp_temp"], 1e-4)
    strategy = GenerationStrategy(
        mask_ratio=np.append((recorded["mask_len"][:-1] + 0.5) / model.cfg.length, 0.0),
        choice_temperature=np.append(recorded["manual_temp"], 0.0),
        sampling_temperature=sampling,
        guidance_scale=recorded["manual_cfg"],
    )
    out = decisions(model, strategy, recorded, recorded["mask_len"])
    ranked = np.where(out["new_mask"], out["confidence"], -np.inf)  # the least confident
    out |= {"cut_off": ranked.max(axis=-1), "n_newly_masked": out["new_mask"].sum(axis=-1)}

    labels = recorded["labels"][:, 0].astype(np.int32)
    null = np.full_like(labels, model.cfg.null_class_id)
    for name, class_ids in {"cond_logits": labels, "uncond_logits": null}.items():
        steps = [np.asarray(replay_autonat(model, ids, class_ids)) for ids in recorded["ids"]]
        out[name] = np.stack(steps)
    scale, temperature = (
        x[:, None, None, None] for x in (strategy.guidance_scale, strategy.sampling_temperature)
    )
    guided = out["cond_logits"] + scale * (out["cond_logits"] - out["uncond_logits"])
    noisy = guided / temperature + recorded["gumbel_sample"]
    return {**out, "sampled_raw": noisy.argmax(axis=-1).astype(np.int32)}
