"""How alike each token's features are at adjacent generation steps (ENAT, figure 5)."""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from enat_jax.config import TokenizerConfig
from enat_jax.core.generate import Layout, TracedStrategy, generate, image_noise
from enat_jax.core.network import RowPlan, Tokens
from enat_jax.core.plans import Plan
from enat_jax.errors import UserError
from enat_jax.files import Path, atomic, write_arrays, write_json
from enat_jax.sampling.program import GenerationProgram
from enat_jax.sampling.sampler import Restored, Sampler

_GROUPS = {  # name: in the figure, and its colour
    "new": ("newly revealed tokens", "#c8502a"),
    "previous": ("tokens revealed before", "#1f5fa8"),
    "masked": ("masked tokens", "#4c9150"),
    "all": ("all tokens", "#555555"),
}
_EPSILON = 1e-12  # below any norm that means something


def similarity(
    restored: Restored,
    out: Path,
    *,
    images: int = 3,
    samples: int = 1000,
    seed: int = 0,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Compares adjacent steps of generations; image i is of class i modulo the number of classes.

    Writes to `out`: `similarity.png`, maps of the first images beside the tokens newly revealed,
    and the averages; `similarity.json`, the averages; `similarity.npz`, the maps shown
    (`cosine [b t-1 n]`, `revealed_at [b n]`) and the averages by group (`mean_new [t-1]`, ...).

    Maps are shown of `images`, averages are over `samples`. Where the config has `strategy.reuse =
    False`, visible tokens are encoded anew at every step.

    Returns:
        What `similarity.json` holds: per group, the mean and the sample deviation over images of
        an image's mean, one value per pair of steps; None where a group is empty.

    Raises:
        UserError: a strategy of one step, or a network whose features cannot be had.
    """
    if jax.process_count() > 1:
        raise UserError("similarity runs on one host, with any number of devices")
    if not 1 <= images <= samples:
        raise UserError(f"images = {images}, must be between 1 and samples = {samples}")
    config = restored.config
    no_tokenizer = TokenizerConfig(grid=config.tokenizer.grid)  # token ids are all that is made
    sampler = Sampler(dataclasses.replace(config, tokenizer=no_tokenizer), restored.ema)
    layout, _ = sampler.program.plan()
    if config.model.condition != "class":
        raise UserError("similarity compares images of classes, this model makes them of captions")
    if layout.steps < 2:
        raise UserError(f"strategy.steps = {layout.steps}, must be at least 2 to compare")
    kind = getattr(config.model, "reuse", "last_layer")
    if kind != "last_layer" and layout.buckets[-1].plans[-1].previous:
        raise UserError(
            f"model.reuse = {kind!r} carries more than the last layer's features of visible tokens:"
            " give --config.strategy.reuse=False"
        )
    compare = jax.jit(
        functools.partial(_compare, sampler.program),
        static_argnames=("layout", "output"),
        out_shardings=sampler.placement.batch,
    )
    classes = np.arange(samples) % config.model.num_classes
    made: list[tuple[np.ndarray, ...]] = []
    for count, batch in sampler.batches(classes, output="token_ids", seed=seed, run=compare):
        made.append(tuple(np.asarray(x)[:count] for x in batch))
        log(f"{sum(len(part) for part, _ in made)} of {samples} images compared")
    cosine, revealed_at = (np.concatenate(parts) for parts in zip(*made, strict=True))
    groups = token_groups(revealed_at, layout.steps)
    means = {name: image_means(cosine, group) for name, group in groups.items()}
    averages = {name: {"mean": x.mean(axis=0), "deviation": x.std(axis=0, ddof=min(samples - 1, 1))}
                for name, x in means.items()}  # fmt: skip
    result = {
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
    write_json(folder / "similarity.json", result)
    arrays = {f"{k}_{name}": v for name, both in averages.items() for k, v in both.items()}
    maps = {"cosine": cosine[:images], "revealed_at": revealed_at[:images]}
    write_arrays(folder / "similarity.npz", {**maps, **arrays})
    shown = maps["cosine"], groups["new"][:images]
    draw(folder / "similarity.png", *shown, averages, config.tokenizer.grid)
    log(f"wrote similarity.png, similarity.json and similarity.npz to {folder}")
    return result


def step_features(
    network: Any,
    class_ids: Int[Array, " b"],
    token_ids: Int[Array, "b n"],
    order: Int[Array, "b n"],
    plans: Sequence[Plan],
) -> list[Float[Array, "b n d"]]:
    """Features of all tokens at every step of a generation, by running its steps again.

    They are what the last block puts out; of previous tokens, with reuse, the projected ones. The
    network sees at every step what it saw then: tokens revealed before it, and the others masked.
    `token_ids` and what is returned, one float32 array per step, are in raster order; `order` holds
    positions as they were revealed.
    """
    condition = network.embed_condition(class_ids[:, None])
    ids = jnp.take_along_axis(token_ids, order, axis=1)
    back = jnp.argsort(order, axis=1)[..., None]
    carried: Any = None
    found = []
    for plan in plans:
        new = slice(plan.previous, plan.previous + plan.new)
        tokens = Tokens(ids[:, new], order[:, new], order[:, new.stop :])
        recalled = carried if plan.previous else None
        out = network(condition, tokens, RowPlan((plan,)), recalled=recalled)
        old = recalled if not getattr(network.cfg, "reproject", True) else out.previous
        handed_on = [part for part in (old, out.new) if part is not None]
        carried = jnp.concatenate(handed_on, axis=1) if handed_on else None
        features = jnp.concatenate([part for part in out if part is not None], axis=1)
        found.append(jnp.take_along_axis(features.astype(jnp.float32), back, axis=1))
    return found


def token_groups(
    revealed_at: Int[np.ndarray, "b n"], steps: int
) -> dict[str, Bool[np.ndarray, "b s n"]]:
    """Which tokens are of a group at each pair of steps t and t + 1, from 0.

    They are `new`, revealed by step t; `previous`, before it; `masked`, after it; and `all`.
    """
    at, step = revealed_at[:, None], np.arange(steps - 1)[:, None]
    return {"new": at == step, "previous": at < step, "masked": at > step, "all": at >= 0 * step}


def cosine_similarity(
    one: Float[Array, "b n d"], other: Float[Array, "b n d"]
) -> Float[Array, "b n"]:
    """The cosine of the angle between each token's features; 0 where one of them is 0."""
    return optax.losses.cosine_similarity(one, other, epsilon=_EPSILON)


def image_means(values: Float[np.ndarray, "b s n"], chosen: np.ndarray) -> Float[np.ndarray, "b s"]:
    """The mean over each image's chosen tokens, NaN where there are none."""
    return np.ma.array(values, mask=~chosen).mean(axis=-1).filled(np.nan)


def draw(
    path: Path,
    cosine: Float[np.ndarray, "b s n"],
    new: Bool[np.ndarray, "b s n"],
    averages: Mapping[str, Mapping[str, Float[np.ndarray, " s"]]],
    grid: tuple[int, int],
) -> None:
    """Draws per image a row of newly revealed tokens over a row of similarities, then averages.

    `cosine` is between each token's features at steps t and t + 1, `new` are the tokens that step t
    revealed; `averages` are `mean` and `deviation` by group of tokens.
    """
    images, pairs = cosine.shape[:2]
    height = 1.35 * 2 * images
    figure = Figure(figsize=(max(1.35 * pairs + 1.6, 8.0), height + 4.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(height + 0.6, 3.6))
    maps, below = parts
    panels: Any = maps.subplots(2 * images, pairs, squeeze=False)
    lowest = min(float(np.floor(10 * cosine.min()) / 10), 0.9)
    for image, pair in np.ndindex(images, pairs):
        above, under = panels[2 * image : 2 * image + 2, pair]
        above.imshow(new[image, pair].reshape(grid), cmap="Greys", vmin=0, vmax=1.4)
        shown = under.imshow(cosine[image, pair].reshape(grid), vmin=lowest, vmax=1)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    for pair in range(pairs):
        panels[0, pair].set_title(f"steps {pair + 1}-{pair + 2}", fontsize=9)
    for row, axes in enumerate(panels[:, 0]):
        axes.set_ylabel("similarity" if row % 2 else "revealed", fontsize=8)
    maps.colorbar(shown, ax=panels, shrink=0.6, label="cosine similarity")

    axes: Any = below.subplots()
    steps = np.arange(1, pairs + 1)
    for place, (name, average) in enumerate(averages.items()):
        label, colour = _GROUPS[name]
        axes.errorbar(
            steps + 0.04 * (place - 1.5), average["mean"], yerr=average["deviation"], fmt="o-",
            markersize=4, capsize=2, linewidth=1.2, color=colour, label=label,
        )  # fmt: skip
    axes.set_xticks(steps, [f"{step}-{step + 1}" for step in steps])
    axes.set(xlabel="adjacent steps", ylabel="cosine similarity, mean")
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with atomic(path) as part:
        figure.savefig(part, format=os.path.splitext(path)[1][1:], dpi=110)


def _compare(
    program: GenerationProgram,
    params: nnx.State,
    decoder: Any,
    class_ids: Int[Array, " b"],
    image_ids: Int[Array, " b"],
    traced: TracedStrategy,
    key: jax.Array,
    *,
    layout: Layout,
    output: str,
) -> tuple[Float[Array, "b s n"], Int[Array, "b n"]]:
    """Generates images, runs their steps again, and compares features.

    Returns:
        The cosine at each pair of adjacent steps, and the step, from 0, that revealed each token;
        tokens in raster order.
    """
    network = program.network(params)
    cfg, noise = network.cfg, image_noise(key, image_ids, network.cfg.codebook_size)
    token_ids, records = generate(
        network,
        class_ids,
        traced,
        noise,
        layout=layout,
    )
    order = records[-1].order[-1][:, : cfg.length]
    plans = [plan for bucket in layout.buckets for plan in bucket.plans]
    features = step_features(network, class_ids, token_ids, order, plans)
    cosine = [cosine_similarity(a, b) for a, b in itertools.pairwise(features)]
    visible = jnp.array([cfg.length - plan.masked for plan in plans])  # before each step
    revealed_at = jnp.searchsorted(visible, jnp.argsort(order, axis=1), side="right") - 1
    return jnp.stack(cosine, axis=1), revealed_at
