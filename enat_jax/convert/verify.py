"""Replays arrays recorded from the PyTorch network on an imported one."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from enat_jax.core.generate import StepRecord, generate, plan_generation
from enat_jax.core.network import RowPlan, Tokens
from enat_jax.core.plans import Plan
from enat_jax.core.strategy import GenerationStrategy
from enat_jax.models.enat.network import ENAT
from enat_jax.models.flops import step_flops
from enat_jax.models.import_table import ConvertError

Arrays = Mapping[str, np.ndarray]


class Comparison(NamedTuple):
    """How far an imported network is from one recorded array.

    Attributes:
        name: the array's key, steps and samples taken together.
        difference: the largest absolute difference, or how many integers differ.
        exact: whether it counts integers.
        size: numbers compared.
    """

    name: str
    difference: float
    exact: bool
    size: int

    def fails(self, tolerance: float) -> bool:
        """Whether it is out of tolerance; integers must be equal, and nothing must be NaN."""
        return not self.difference <= (0 if self.exact else tolerance)


def verify(model: ENAT, recorded: Arrays) -> list[Comparison]:
    """Compares the network with recorded forward passes, chains of them, and generations.

    Forward passes are keys `<group>/ids` (B, L) with `logits` (B, L, V) and `feat` (B, L, D)
    beside them and one `context` (B, 1) of class ids; groups `<chain>/0`, `<chain>/1`, ... reuse
    each other's features. Generations are keys `<trace>/<variant>/final_ids` with per-step arrays
    beside them, and `labels`, `gumbel_sample`, `gumbel_conf` under `<trace>`.

    Args:
        model: the imported network, in float32.
        recorded: arrays by key.

    Raises:
        ConvertError: no such keys.
    """
    with jax.default_matmul_precision("highest"):
        found = [*_forward_passes(model, recorded), *_generations(model, recorded)]
    return something(found, recorded)


def something(found: list[Comparison], recorded: Arrays) -> list[Comparison]:
    """The comparisons, of which there must be any.

    Raises:
        ConvertError: there are none.
    """
    if not found:
        raise ConvertError(f"nothing to verify among the keys {sorted(recorded)[:8]} ...")
    return found


def compare(name: str, ours: Any, theirs: np.ndarray) -> Comparison:
    """How far an array of ours is from the recorded one.

    Raises:
        ConvertError: they have different shapes.
    """
    ours = np.asarray(ours)
    if ours.shape != theirs.shape:
        raise ConvertError(f"{name}: recorded {theirs.shape}, the network gives {ours.shape}")
    if theirs.dtype.kind in "biu":
        return Comparison(name, float(np.sum(ours != theirs)), True, theirs.size)
    with np.errstate(invalid="ignore"):  # equal infinities differ by nothing
        largest = np.max(np.where(ours == theirs, 0, np.abs(ours - theirs)))
    return Comparison(name, float(largest), False, theirs.size)


class Pass(NamedTuple):
    """A replayed forward pass in raster order."""

    logits: Float[Array, "b l v"]
    features: Float[Array, "b l d"]
    masked: np.ndarray


def replay(
    model: ENAT, ids: Int[np.ndarray, "b l"], class_ids: Int[np.ndarray, " b"], before: Pass | None
) -> Pass:
    """One forward pass on token ids, mask ids among them, reusing the pass before.

    Raises:
        ConvertError: images with different numbers of masked tokens.
    """
    masked = ids == model.cfg.mask_id
    previous = np.zeros_like(masked) if before is None else ~before.masked
    group = np.where(masked, 2, np.where(previous, 0, 1))
    counts = {tuple((row == g).sum() for g in range(3)) for row in group}
    if len(counts) > 1:
        raise ConvertError(f"images of one recording have different counts of tokens: {counts}")
    plan = Plan(*map(int, counts.pop()))
    order = np.argsort(group, axis=1, kind="stable")
    graphdef, params = nnx.split(model)
    features = jnp.zeros((*ids.shape, model.cfg.width)) if before is None else before.features
    logits, features = _replay(graphdef, params, ids, order, class_ids, features, plan)
    return Pass(logits, features, masked)


def _replay_uncompiled(
    graphdef: Any, params: Any, ids: Any, order: Any, class_ids: Any, features: Any, plan: Plan
) -> tuple[Array, Array]:
    model = nnx.merge(graphdef, params)
    new = slice(plan.previous, plan.previous + plan.new)
    in_order = jnp.take_along_axis(ids, order, axis=1)
    out = model(
        model.embed_condition(class_ids[:, None]),
        Tokens(in_order[:, new], order[:, new], order[:, new.stop :]),
        RowPlan((plan,)),
        recalled=jnp.take_along_axis(features, order[:, : plan.previous, None], axis=1),
    )
    together = jnp.concatenate([part for part in out if part is not None], axis=1)
    together = jnp.take_along_axis(together, jnp.argsort(order, axis=1)[..., None], axis=1)
    return model.logits(together), together


_replay = jax.jit(_replay_uncompiled, static_argnums=(0, 6))


def _forward_passes(model: ENAT, recorded: Arrays) -> list[Comparison]:
    groups = [key.removesuffix("/ids") for key in recorded if key.endswith("/ids")]
    groups = [group for group in groups if f"{group}/logits" in recorded and "context" in recorded]
    groups = [group for group in groups if np.ndim(recorded[f"{group}/ids"]) == 2]
    found, passes = [], {}
    for group in sorted(groups, key=lambda g: (len(g.rsplit("/", 1)[-1]), g)):
        chain, _, link = group.rpartition("/")
        before = passes.get(f"{chain}/{int(link) - 1}") if link.isdigit() else None
        if link.isdigit() and int(link) and before is None:
            raise ConvertError(f"{group} continues a chain whose link before is not recorded")
        out = replay(model, recorded[f"{group}/ids"], recorded["context"][:, 0], before)
        passes[group] = out
        ours = {"logits": out.logits, "feat": out.features, "masking": out.masked}
        found += [
            compare(f"{group}/{name}", value, recorded[f"{group}/{name}"])
            for name, value in ours.items()
            if f"{group}/{name}" in recorded
        ]
    return found


def _generations(model: ENAT, recorded: Arrays) -> list[Comparison]:
    found = []
    for key in recorded:
        if match := re.fullmatch(r"(.+)/(.+)/final_ids", key):
            trace, variant = match.groups()
            own = {
                name.removeprefix(f"{trace}/{variant}/"): value
                for name, value in recorded.items()
                if name.startswith(f"{trace}/{variant}/")
            }
            shared = {
                name: recorded[f"{trace}/{name}"]
                for name in ("labels", "gumbel_sample", "gumbel_conf")
            }
            results = {**_sampled(model, own, shared), **_branches(model, own, shared)}
            found += [
                compare(f"{trace}/{variant}/{name}", value, own[name])
                for name, value in results.items()
                if name in own
            ]
    return found


def _sampled(model: ENAT, own: Arrays, shared: Arrays) -> dict[str, np.ndarray]:
    """What our own sampler decides at every step on the recorded noise, in raster order."""
    strategy = GenerationStrategy(
        mask_ratio=np.append((own["n_mask_next"][:-1] + 0.5) / model.cfg.length, 0.0),
        choice_temperature=own["mask_temp"],
        sampling_temperature=own["samp_temp"],
        guidance_scale=own["cfg_scale"],
    )
    return decisions(model, strategy, shared, own["n_mask_next"])


def decisions(
    model: Any, strategy: GenerationStrategy, shared: Arrays, masked_after: np.ndarray
) -> dict[str, np.ndarray]:
    """What our own sampler decides at every step, in raster order.

    Args:
        model: an imported network.
        strategy: the steps.
        shared: `labels` (B, 1) and the noise, `gumbel_sample` (T, B, L, V) and `gumbel_conf`
            (T, B, L).
        masked_after: how many tokens the recording calls masked after each step.

    Returns:
        `final_ids` (B, L); and (T, B, L) each, `ids` and `is_mask` before every step,
        `sampled_ids`, `sampled_logp`, `confidence` (infinite where visible), `new_mask`.
    """
    length = model.cfg.length
    layout, traced = plan_generation(
        strategy,
        length,
        lambda plan: step_flops(model.cfg, plan),
        reuse=model.cfg.carries_features,
        reads_masked=model.cfg.carries_masked_features,
        buckets=strategy.steps,
    )
    graphdef, params = nnx.split(model)

    def run(params: Any, class_ids: Array) -> tuple[Array, list[StepRecord]]:
        return generate(
            nnx.merge(graphdef, params),
            class_ids,
            traced,
            recorded_noise(shared["gumbel_sample"], shared["gumbel_conf"]),
            layout=layout,
            record=True,
        )

    final, records = jax.jit(run)(params, jnp.asarray(shared["labels"][:, 0], jnp.int32))
    batch = final.shape[0]
    ids = np.full((batch, length), model.cfg.mask_id, np.int32)
    out: dict[str, list[np.ndarray]] = {}
    for step, record in enumerate(jax.tree.map(lambda x: np.asarray(x)[0], records)):
        is_mask = np.zeros((batch, length), bool)
        np.put_along_axis(is_mask, record.positions, True, axis=1)
        sampled = ids.copy()
        np.put_along_axis(sampled, record.positions, record.sampled_ids, axis=1)
        picked = np.take_along_axis(record.logits, record.sampled_ids[..., None], axis=-1)[..., 0]
        values = {"sampled_logp": picked, "confidence": record.confidence}
        for name, value in values.items():
            raster = np.full((batch, length), np.inf, np.float32)
            np.put_along_axis(raster, record.positions, value, axis=1)
            values[name] = raster
        new_mask = np.ones((batch, length), bool)
        np.put_along_axis(new_mask, record.order[:, : length - masked_after[step]], False, axis=1)
        values |= {"ids": ids, "is_mask": is_mask, "sampled_ids": sampled, "new_mask": new_mask}
        for name, value in values.items():
            out.setdefault(name, []).append(value)
        ids = np.where(new_mask, model.cfg.mask_id, sampled).astype(np.int32)
    return {"final_ids": np.asarray(final), **{name: np.stack(v) for name, v in out.items()}}


def recorded_noise(
    token_noise: Float[np.ndarray, "t b l v"], choice_noise: Float[np.ndarray, "t b l"]
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Noise for `generate` that was recorded by position instead of drawn."""
    tokens, choices = jnp.asarray(token_noise), jnp.asarray(choice_noise)

    def noise(step: Array, positions: Array) -> tuple[Array, Array]:
        return (
            jnp.take_along_axis(tokens[step], positions[..., None], axis=1),
            jnp.take_along_axis(choices[step], positions, axis=1),
        )

    return noise


def _branches(model: ENAT, own: Arrays, shared: Arrays) -> dict[str, np.ndarray]:
    """Logits and features of both branches at all positions, as a chain over the recorded ids."""
    labels = shared["labels"][:, 0]
    branches = {"cond": labels, "uncond": np.full_like(labels, model.cfg.null_class_id)}
    out: dict[str, Any] = {}
    for name, class_ids in branches.items():
        passes: list[Pass] = []
        for ids in own["ids"]:
            passes.append(replay(model, ids, class_ids, passes[-1] if passes else None))
        out[f"{name}_logits"] = np.stack([each.logits for each in passes])
        out[f"{name}_feat"] = np.stack([each.features for each in passes])
    scale = own["cfg_scale"][:, None, None, None]
    guided = out["cond_logits"] + scale * (out["cond_logits"] - out["uncond_logits"])
    out["logits"] = np.asarray(jax.nn.log_softmax(guided, axis=-1))
    chosen = own["sel_steps"] if "sel_steps" in own else slice(None)
    return {**out, **{f"{name}_sel": value[chosen] for name, value in out.items()}}
