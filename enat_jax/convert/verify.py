"""Replays arrays recorded from an original network on the imported one.

An array's key says what it is of; arrays of other keys are left alone. Of `ENAT` and `AutoNAT`,
below any prefix or none:

* a forward pass: `ids` (B, L), mask ids among them, with `logits` (B, L, V), `feat` (B, L, D) and
  `masking` (B, L) beside them, and one `context` (B, 1) of class ids in the file. ENAT's passes
  `<chain>/0/`, `<chain>/1/`, ... reuse each other's features;
* a generation: `final_ids` (B, L) with what `_generation` returns of every step; there or one
  prefix up `labels` (B, 1), the noise `gumbel_sample` (T, B, L, V) and `gumbel_conf` (T, B, L),
  and the strategy (T,), `n_mask_next`, `mask_temp`, `samp_temp` and `cfg_scale`.

Of `VQGAN`, channels first and images in [0, 1]: `image` (B, 3, Y, X) with `encoder_out`
(B, C, V, U), `indices` (B, V, U) and their `decode` (B, 3, Y, X); `random_ids` (B, V, U) with
`random_decode`. Of `Inception`: `<name>/images` (B, 3, Y, X) with `<name>/features` (B, 2048).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from enat_jax.convert.weight_file import about
from enat_jax.core.generate import Layout, StepRecord, TracedStrategy, generate, plan_generation
from enat_jax.core.network import RowPlan, Tokens
from enat_jax.core.plans import Plan
from enat_jax.core.strategy import GenerationStrategy
from enat_jax.errors import UserError
from enat_jax.evaluation.inception import Inception
from enat_jax.files import Path
from enat_jax.models.autonat.network import AutoNAT
from enat_jax.models.enat.network import ENAT
from enat_jax.models.flops import step_flops
from enat_jax.tokenizers.vqgan import VQGAN

Arrays = Mapping[str, np.ndarray]
Replayed = Iterator[tuple[str, Any]]  # keys, and our arrays for them

AUTONAT_NAMES = {"mask_len": "n_mask_next", "manual_temp": "mask_temp",
                 "manual_samp_temp": "samp_temp", "manual_cfg": "cfg_scale"}  # fmt: skip


class Comparison(NamedTuple):
    """How far an imported network is from one recorded array of `size` numbers, by its key.

    The difference is the largest absolute one, of Inception's features as a fraction of the
    largest; or, where it is `exact`, how many integers differ.
    """

    name: str
    difference: float
    exact: bool
    size: int

    def fails(self, tolerance: float) -> bool:
        """Whether it is out of tolerance; integers must be equal, and nothing must be NaN."""
        return not self.difference <= (0 if self.exact else tolerance)

    def row(self, tolerance: float) -> str:
        """The comparison in one line."""
        what = f"largest difference {self.difference:.2e} of {self.size} numbers"
        if self.exact:
            what = f"{int(self.difference)} of {self.size} differ"
        return f"{'FAIL' if self.fails(tolerance) else 'ok  '} {self.name}: {what}"


def verify_files(model: nnx.Module, files: Sequence[Path]) -> list[Comparison]:
    """`verify` with the arrays of each `.npz`.

    Raises:
        UserError: a file that cannot be read or holds nothing that can be replayed.
    """
    comparisons = []
    for file in files:
        with (
            about(file, "no recording, or its arrays are not what their keys say"),
            open(file, "rb") as content,
            np.load(content, allow_pickle=False) as arrays,
        ):
            comparisons += verify(model, dict(arrays))
    return comparisons


def verify(model: nnx.Module, recorded: Arrays) -> list[Comparison]:
    """Compares a network, in float32, with everything in a recording that it can replay.

    Raises:
        UserError: nothing to replay, or arrays of other shapes than the network's.
    """
    replays = {ENAT: _tokens, AutoNAT: _tokens, VQGAN: _vqgan, Inception: _inception}
    replay_all = next(each for kind, each in replays.items() if isinstance(model, kind))
    with jax.default_matmul_precision("highest"):
        ours = {key: np.asarray(x) for key, x in replay_all(model, recorded) if key in recorded}
    if not ours:
        raise UserError(f"nothing to verify among the keys {sorted(recorded)[:8]} ...")
    relative = isinstance(model, Inception)
    return [_compare(key, x, recorded[key], relative) for key, x in ours.items()]


def _compare(name: str, ours: np.ndarray, theirs: np.ndarray, relative: bool) -> Comparison:
    if ours.shape != theirs.shape:
        raise UserError(f"{name}: recorded {theirs.shape}, the network gives {ours.shape}")
    if theirs.dtype.kind in "biu":
        return Comparison(name, float(np.sum(ours != theirs)), True, theirs.size)
    with np.errstate(invalid="ignore"):  # equal infinities differ by nothing
        largest = float(np.max(np.where(ours == theirs, 0, np.abs(ours - theirs))))
    unit = float(np.abs(theirs).max()) if relative else 1.0
    return Comparison(name, largest / unit, False, theirs.size)


@partial(jax.jit, static_argnums=(0, 2))
def _run(function: Callable[..., Any], model: nnx.Module, static: tuple, *arrays: Any) -> Any:
    """`function(model, *arrays, *static)`, compiled once whatever the weights."""
    return function(model, *arrays, *static)


class Pass(NamedTuple):
    """A replayed forward pass in raster order."""

    logits: Float[Array, "b l v"]
    features: Float[Array, "b l d"]
    masked: Bool[np.ndarray, "b l"]


def replay(
    model: ENAT | AutoNAT,
    ids: Int[np.ndarray, "b l"],
    class_ids: Int[np.ndarray, " b"],
    before: Pass | None = None,
) -> Pass:
    """One forward pass on token ids, mask ids among them; ENAT reuses the pass before.

    Raises:
        UserError: images with different numbers of masked tokens, of ENAT.
    """
    masked = ids == model.cfg.mask_id
    if isinstance(model, AutoNAT):
        logits, features = _run(_read_together, model, (), ids, class_ids)
        return Pass(logits, features, masked)
    previous = np.zeros_like(masked) if before is None else ~before.masked
    group = np.where(masked, 2, np.where(previous, 0, 1))
    if np.any(np.sort(group) != np.sort(group[:1])):
        raise UserError("images of one recording have different counts of tokens")
    plan = Plan(*np.bincount(group[0], minlength=3).tolist())
    order = np.argsort(group, axis=1, kind="stable")
    features = jnp.zeros((*ids.shape, model.cfg.width)) if before is None else before.features
    arrays = ids, class_ids, order, features
    logits, features = _run(_read_in_order, model, (plan,), *arrays)
    return Pass(logits, features, masked)


def _read_together(model: AutoNAT, ids: Array, class_ids: Array) -> tuple[Array, Array]:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    tokens = Tokens(ids, positions, positions[:, :0])  # mask ids are among the visible ones
    row = RowPlan((Plan(0, ids.shape[1], 0),))
    features: Any = model(model.embed_condition(class_ids[:, None]), tokens, row).new
    return model.logits(features), features


def _read_in_order(
    model: ENAT, ids: Array, class_ids: Array, order: Array, features: Array, plan: Plan
) -> tuple[Array, Array]:
    new = slice(plan.previous, plan.previous + plan.new)
    token_ids = jnp.take_along_axis(ids, order, axis=1)[:, new]
    recalled = jnp.take_along_axis(features, order[:, : plan.previous, None], axis=1)
    tokens = Tokens(token_ids, order[:, new], order[:, new.stop :])
    condition = model.embed_condition(class_ids[:, None])
    parts = model(condition, tokens, RowPlan((plan,)), recalled=recalled)
    features = jnp.concatenate([part for part in parts if part is not None], axis=1)
    features = jnp.take_along_axis(features, jnp.argsort(order, axis=1)[..., None], axis=1)
    return model.logits(features), features


def _tokens(model: ENAT | AutoNAT, recorded: Arrays) -> Replayed:
    """All forward passes, links of a chain in their order; then all generations."""
    passes: dict[str, Pass] = {}
    for key in sorted(recorded, key=lambda key: (len(key), key)):
        prefix = key.removesuffix("ids")
        if f"{prefix}logits" in recorded and "context" in recorded and recorded[key].ndim == 2:
            chain, _, link = prefix.rstrip("/").rpartition("/")
            before = passes.get(f"{chain}/{int(link) - 1}/") if link.isdigit() else None
            if link.isdigit() and int(link) and before is None:
                raise UserError(f"{prefix} continues a chain whose link before is not recorded")
            passes[prefix] = replay(model, recorded[key], recorded["context"][:, 0], before)
            for name, ours in zip(("logits", "feat", "masking"), passes[prefix], strict=True):
                yield f"{prefix}{name}", ours
    for key in recorded:
        if f"/{key}".endswith("/final_ids"):
            prefix = key.removesuffix("final_ids")
            places = prefix[: prefix.rstrip("/").rfind("/") + 1], prefix
            own = {name.removeprefix(place): array for place in places
                   for name, array in recorded.items() if name.startswith(place)}  # fmt: skip
            for name, ours in _generation(model, own).items():
                yield f"{prefix}{name}", ours


def _generation(model: ENAT | AutoNAT, recorded: Arrays) -> dict[str, np.ndarray]:
    """What our own sampler decides on the recorded noise, in raster order.

    Returns:
        `final_ids` (B, L); `is_mask` (T, B, L) before every step; and of the tokens masked then
        `sampled_ids`, `sampled_logp` and `confidence` (T, B, L), and `logits`, `cond_logits` and
        `uncond_logits` (T, B, L, V), those recorded, of other tokens as they were recorded.
    """
    given = {AUTONAT_NAMES.get(name, name): array for name, array in recorded.items()}
    masked_after, labels = given["n_mask_next"], given["labels"][:, 0].astype(np.int32)
    cfg, steps = model.cfg, len(masked_after)
    strategy = GenerationStrategy(
        mask_ratio=np.append((masked_after[:-1] + 0.5) / cfg.length, 0.0),
        choice_temperature=np.append(given["mask_temp"], 0.0)[:steps],
        sampling_temperature=np.maximum(given["samp_temp"], 1e-4),
        guidance_scale=given["cfg_scale"],
    )
    reads = {"reuse": cfg.carries_features, "reads_masked": cfg.carries_masked_features}
    cost = partial(step_flops, cfg)
    layout, traced = plan_generation(strategy, cfg.length, cost, buckets=1, **reads)
    noise = given["gumbel_sample"], given["gumbel_conf"]
    final, (records,) = _run(_generate, model, (layout,), labels, traced, *noise)
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


def _generate(
    model: ENAT | AutoNAT,
    class_ids: Array,
    strategy: TracedStrategy,
    token_noise: Float[Array, "t b l v"],
    choice_noise: Float[Array, "t b l"],
    layout: Layout,
) -> tuple[Array, list[StepRecord]]:
    """Generates on noise that was recorded by position instead of drawn."""

    def noise(step: Array, positions: Array) -> tuple[Array, Array]:
        tokens = jnp.take_along_axis(token_noise[step], positions[..., None], axis=1)
        return tokens, jnp.take_along_axis(choice_noise[step], positions, axis=1)

    return generate(model, class_ids, strategy, noise, layout=layout, record=True)


def _vqgan(model: VQGAN, recorded: Arrays) -> Replayed:
    """A reconstruction stage by stage, and the decoding of other ids."""

    def decoded(ids: Int[np.ndarray, "b v u"]) -> Array:
        flat, grid = ids.reshape(len(ids), -1), ids.shape[1:]
        return jnp.moveaxis(_run(VQGAN.decode, model, (grid,), flat), -1, 1)

    if "image" in recorded:
        encoder = model.encoder
        latents = _run(type(encoder).__call__, encoder, (), np.moveaxis(recorded["image"], 1, -1))
        indices = np.asarray(_run(VQGAN.nearest, model, (), latents))
        yield "encoder_out", jnp.moveaxis(latents, -1, 1)
        yield "indices", indices
        yield "decode", decoded(recorded.get("indices", indices))
    if "random_ids" in recorded:
        yield "random_decode", decoded(recorded["random_ids"])


def _inception(network: Inception, recorded: Arrays) -> Replayed:
    """Pool features of every group of images."""
    for key in recorded:
        if key.endswith("/images"):
            features = _run(type(network).__call__, network, (), np.moveaxis(recorded[key], 1, -1))
            yield f"{key.removesuffix('images')}features", features.pool
