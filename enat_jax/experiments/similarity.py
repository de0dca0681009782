"""How alike each token's features are at adjacent generation steps (ENAT, figure 5)."""

import itertools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from enat_jax.core.generate import Layout, TracedStrategy, generate, image_noise
from enat_jax.core.plans import Plan
from enat_jax.errors import UserError
from enat_jax.experiments.similarity_figure import draw
from enat_jax.files import write_arrays, write_json
from enat_jax.models.autonat.network import AutoNAT
from enat_jax.models.networks import Network
from enat_jax.parallel.hosts import several
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.program import GenerationProgram, abstract_params
from enat_jax.sampling.sampler import Restored

GROUPS = ("new", "previous", "masked", "all")
"""Tokens that the earlier step revealed; those revealed before; those not yet; and all."""
_EPSILON = 1e-12  # below any product of norms that means something


class SimilarityError(UserError):
    """Features that cannot be compared."""


class Similarities(NamedTuple):
    """How alike features are at steps t and t + 1, t from 0, tokens in raster order.

    Attributes:
        cosine: in [-1, 1], `[b t-1 n]`.
        revealed_at: the step, from 0, that revealed each token, `[b n]`.
    """

    cosine: Float[np.ndarray, "b s n"]
    revealed_at: Int[np.ndarray, "b n"]

    def group(self, name: str) -> np.ndarray:
        """Which tokens are of a group at each pair of steps, `[b t-1 n]`; see `GROUPS`."""
        earlier = np.arange(self.cosine.shape[1])[:, None]
        at = self.revealed_at[:, None]
        groups = {"new": at == earlier, "previous": at < earlier, "masked": at > earlier}
        return groups.get(name, np.ones(self.cosine.shape, bool))


def similarity(
    restored: Restored,
    out: str | os.PathLike[str],
    *,
    images: int = 3,
    samples: int = 1000,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Compares adjacent steps of generations; image i is of class i modulo the number of classes.

    Writes to `out`: `similarity.png`, maps of the first images beside the tokens newly revealed,
    and the averages; `similarity.json`, the averages; `similarity.npz`, the maps shown
    (`cosine [b t-1 n]`, `revealed_at [b n]`) and the averages by group (`mean_new [t-1]`, ...).

    Args:
        restored: the generator and its config; with `strategy.reuse = False`, visible tokens are
            encoded anew at every step.
        out: the folder.
        images: images whose maps are shown.
        samples: images that are averaged over.
        seed: of the noise.
        say: called with lines for the user.

    Returns:
        What `similarity.json` holds: per group, the mean and the sample deviation over images of
        an image's mean, one value per pair of steps; None where a group is empty.

    Raises:
        UserError: a strategy of one step, or a network whose features cannot be had.
    """
    if several():
        raise SimilarityError("similarity runs on one host, with any number of devices")
    if not 1 <= images <= samples:
        raise SimilarityError(f"images = {images}, must be between 1 and samples = {samples}")
    config = restored.config
    placement = Placement.of(config.mesh)
    program = GenerationProgram(config, placement, None)
    layout, traced = program.plan()
    if layout.steps < 2:
        raise SimilarityError(f"strategy.steps = {layout.steps}, must be at least 2 to compare")
    kind = getattr(config.model, "reuse", "last_layer")
    if kind != "last_layer" and layout.buckets[-1].plans[-1].previous:
        raise SimilarityError(
            f"model.reuse = {kind!r} carries more than the last layer's features of visible tokens:"
            " give --config.strategy.reuse=False"
        )
    graphdef, _ = abstract_params(config.model)
    compare = jax.jit(_compare, static_argnums=(0, 1), out_shardings=placement.batch)
    inputs = placement.put((restored.ema, traced, jax.random.key(seed)))
    classes = np.arange(samples, dtype=np.int32) % config.model.num_classes
    size = program.batch_size(samples)
    shown: list[Similarities] = []
    means: list[dict[str, np.ndarray]] = []
    for start in range(0, samples, size):
        ids = np.arange(start, start + size, dtype=np.int32)
        batch = placement.put((classes[np.minimum(ids, samples - 1)], ids), placement.batch)
        made = compare(graphdef, layout, *inputs, *batch)
        part = Similarities(*(np.asarray(x)[: samples - start] for x in made))
        if start < images:
            shown.append(Similarities(*(x[: images - start] for x in part)))
        means.append({name: image_means(part.cosine, part.group(name)) for name in GROUPS})
        say(f"{min(start + size, samples)} of {samples} images compared")
    maps = Similarities(*(np.concatenate(parts) for parts in zip(*shown, strict=True)))
    averages = {name: _average(np.concatenate([each[name] for each in means])) for name in GROUPS}
    found = {
        "samples": samples,
        "seed": seed,
        "checkpoint": restored.step,
        "reuse": any(plan.previous for bucket in layout.buckets for plan in bucket.plans),
        "steps": layout.steps,
        "pairs": [f"{t + 1}-{t + 2}" for t in range(layout.steps - 1)],
        **{name: {k: [None if np.isnan(v) else float(v) for v in each] for k, each in both.items()}
           for name, both in averages.items()},
    }  # fmt: skip
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "similarity.json", found)
    arrays = {f"{k}_{name}": v for name, both in averages.items() for k, v in both.items()}
    write_arrays(folder / "similarity.npz", {**maps._asdict(), **arrays})
    draw(folder / "similarity.png", maps.cosine, maps.group("new"), averages, config.tokenizer.grid)
    say(f"wrote similarity.png, similarity.json and similarity.npz to {folder}")
    return found


def step_features(
    network: Network,
    class_ids: Int[Array, " b"],
    token_ids: Int[Array, "b n"],
    order: Int[Array, "b n"],
    plans: Sequence[Plan],
) -> list[Float[Array, "b n d"]]:
    """Features of all tokens at every step of a generation, by running its steps again.

    They are what the last block puts out; of previous tokens, with reuse, the projected ones. The
    network sees at every step what it saw then: tokens revealed before it, and the others masked.

    Args:
        network: what generated.
        class_ids: of the branch to look at.
        token_ids: the finished images, raster order.
        order: positions in the order in which they were revealed.
        plans: of the steps.

    Returns:
        One array per step, float32, in raster order.
    """
    condition: Any = network.condition(class_ids)
    ids = jnp.take_along_axis(token_ids, order, axis=1)
    back = jnp.argsort(order, axis=1)[..., None]
    carried: Any = None
    found = []
    for plan in plans:
        new = slice(plan.previous, plan.previous + plan.new)
        if isinstance(network, AutoNAT):
            masks = jnp.full_like(ids[:, new.stop :], network.cfg.mask_id)
            features = network(condition, jnp.concatenate([ids[:, new], masks], axis=1), order)
        else:
            reused = carried if plan.previous else None
            parts = network(
                condition,
                ids[:, new],
                order[:, new],
                order[:, new.stop :],
                [plan],
                features=reused,
            )
            there = [part for part in parts if part is not None]
            old = parts.previous if network.cfg.reproject else reused
            handed_on = [part for part in (old, parts.new) if part is not None]
            carried = jnp.concatenate(handed_on, axis=1) if handed_on else None
            features = jnp.concatenate(there, axis=1)
        found.append(jnp.take_along_axis(features.astype(jnp.float32), back, axis=1))
    return found


def cosine_similarity(
    one: Float[Array, "b n d"], other: Float[Array, "b n d"]
) -> Float[Array, "b n"]:
    """The cosine of the angle between each token's features; 0 where one of them is 0."""
    norms = jnp.linalg.norm(one, axis=-1) * jnp.linalg.norm(other, axis=-1)
    return jnp.sum(one * other, axis=-1) / jnp.maximum(norms, _EPSILON)


def image_means(values: Float[np.ndarray, "b s n"], chosen: np.ndarray) -> Float[np.ndarray, "b s"]:
    """The mean over each image's chosen tokens, NaN where there are none."""
    count = chosen.sum(axis=-1)
    total = np.where(chosen, values, 0.0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _average(means: Float[np.ndarray, "b s"]) -> dict[str, Float[np.ndarray, " s"]]:
    """Mean and sample deviation over images; 0 for a single image."""
    deviation = np.std(means, axis=0, ddof=1) if len(means) > 1 else np.zeros(means.shape[1])
    return {"mean": np.mean(means, axis=0), "deviation": deviation}


def _compare(
    graphdef: Any,
    layout: Layout,
    params: nnx.State,
    traced: TracedStrategy,
    key: jax.Array,
    class_ids: Int[Array, " b"],
    image_ids: Int[Array, " b"],
) -> tuple[Float[Array, "b s n"], Int[Array, "b n"]]:
    """Generates images, runs their steps again, and compares features; as `Similarities`."""
    network = nnx.merge(graphdef, params)
    cfg = network.cfg
    token_ids, records = generate(
        network,
        class_ids,
        traced,
        image_noise(key, image_ids, cfg.codebook_size),
        layout=layout,
        null_class_id=cfg.null_class_id,
        record=True,
    )
    order = records[-1].order[-1][:, : cfg.length]
    plans = [plan for bucket in layout.buckets for plan in bucket.plans]
    features = step_features(network, class_ids, token_ids, order, plans)
    cosine = [cosine_similarity(a, b) for a, b in itertools.pairwise(features)]
    left = [plan.masked for plan in plans[1:]] + [0]
    revealed = [plan.masked - after for plan, after in zip(plans, left, strict=True)]
    in_order = jnp.asarray(np.repeat(np.arange(len(plans)), revealed))
    revealed_at = in_order[jnp.argsort(order, axis=1)]
    return jnp.stack(cosine, axis=1), revealed_at
