"""One optimiser step of a VQGAN's training, with its losses and the care of its codebook."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8

from enat_jax.config import LossConfig
from enat_jax.models.layers import UNPLACED
from enat_jax.tokenizers.discriminator import hinge_loss
from enat_jax.tokenizers.vqgan import VQGAN
from enat_jax.training.optim import skip_unless_finite, update_ema

_ROUNDS = 8  # of Lloyd's algorithm for the first codebook


class TokenizerState(NamedTuple):
    """Everything a run changes, besides its position in the data.

    Attributes:
        step: optimiser steps done.
        params: of the VQGAN.
        ema: their moving average.
        opt_state: of their optimiser.
        idle: steps since each code was last used.
        discriminator: its parameters, None without one.
        discriminator_opt_state: of its own optimiser.
    """

    step: Int[Array, ""]
    params: nnx.State
    ema: nnx.State
    opt_state: Any
    idle: Int32[Array, " k"]
    discriminator: Any = None
    discriminator_opt_state: Any = None


class Networks(NamedTuple):
    """The structures of the networks of a step; None for one that takes no part."""

    vqgan: Any
    discriminator: Any = None
    lpips: Any = None


class Outcome(NamedTuple):
    """What a pass over images gave, besides its loss.

    Attributes:
        terms: the losses, each before its weight.
        latents: the encoder's outputs.
        token_ids: the codes nearest to them.
        reconstruction: the images they make.
    """

    terms: dict[str, Float[Array, ""]]
    latents: Float[Array, "b v u c"]
    token_ids: Int32[Array, "b v u"]
    reconstruction: Float[Array, "b y x 3"]


def straight_through(
    latents: Float[Array, "b v u c"], codes: Float[Array, "b v u c"]
) -> Float[Array, "b v u c"]:
    """The codes; their gradient goes to the latents unchanged (van den Oord et al. 2017)."""
    return latents + jax.lax.stop_gradient(codes - latents)


def vqgan_loss(
    model: VQGAN,
    images: Float[Array, "b y x 3"],
    cfg: LossConfig,
    *,
    quantised: bool = True,
    lpips: Any = None,
    discriminator: Any = None,
) -> tuple[Float[Array, ""], Outcome]:
    """The weighted sum of a VQGAN's losses on images in [0, 1].

    Args:
        model: the network that learns.
        images: of a size that is a multiple of its patch.
        cfg: the weights.
        quantised: whether the decoder sees codes, or the encoder's outputs themselves.
        lpips: `(images, images) -> distances [b]`, None leaves the perceptual distance out.
        discriminator: `images -> verdicts`, None leaves its opinion out.
    """
    latents = model.encoder(images).astype(jnp.float32)
    token_ids = model.nearest(jax.lax.stop_gradient(latents))
    codes = model.codebook[...][token_ids]
    seen = straight_through(latents, codes) if quantised else latents
    reconstruction = model.decoder(seen).astype(jnp.float32)
    error = reconstruction - images
    terms = {"l1": jnp.mean(jnp.abs(error)), "l2": jnp.mean(jnp.square(error))}
    if quantised:
        terms["codebook"] = jnp.mean(jnp.square(jax.lax.stop_gradient(latents) - codes))
        terms["commitment"] = jnp.mean(jnp.square(latents - jax.lax.stop_gradient(codes)))
    if lpips is not None:
        terms["lpips"] = jnp.mean(lpips(images, reconstruction))
    if discriminator is not None:
        terms["adversarial"] = -jnp.mean(discriminator(reconstruction))
    loss = jnp.float32(0)
    for name, term in terms.items():
        loss += getattr(cfg, name) * term
    return loss, Outcome(terms, latents, token_ids, reconstruction)


def initial_codebook(
    latents: Float[Array, "b v u c"], size: int, key: jax.Array
) -> Float[Array, "k c"]:
    """A codebook that covers the encoder's outputs: some of them, moved by Lloyd's algorithm."""
    points = rearrange(latents, "b v u c -> (b v u) c").astype(jnp.float32)
    fewer = size > len(points)  # then some codes are equal, and restarted later
    chosen = jax.random.choice(key, len(points), (size,), replace=fewer)

    def move(codes: Array, _: None) -> tuple[Array, None]:
        products = jnp.einsum("nc,kc->nk", points, codes, precision=jax.lax.Precision.HIGHEST)
        nearest = jnp.argmin(jnp.sum(jnp.square(codes), axis=-1) - 2 * products, axis=-1)
        counts = jax.ops.segment_sum(jnp.ones(len(points)), nearest, size)
        sums = jax.ops.segment_sum(points, nearest, size)
        means = sums / jnp.maximum(counts, 1)[:, None]
        return jnp.where(counts[:, None] > 0, means, codes), None

    return jax.lax.scan(move, points[chosen], None, length=_ROUNDS)[0]


def restart_codes(
    idle: Int32[Array, " k"],
    token_ids: Int32[Array, "b v u"],
    latents: Float[Array, "b v u c"],
    key: jax.Array,
    *,
    after: int,
) -> tuple[Int32[Array, " k"], Bool[Array, " k"], Float[Array, "k c"]]:
    """Which codes no token used for `after` steps, and an output of the encoder for each code.

    Returns:
        Steps since each code was last used (0 for one that starts anew); which ones start anew;
        and what they start from, of which only those rows are meant.
    """
    used = jnp.zeros(len(idle), bool).at[token_ids.reshape(-1)].set(True)
    idle = jnp.where(used, 0, idle + 1)
    dead = idle >= after if after else jnp.zeros_like(used)
    points = rearrange(latents, "b v u c -> (b v u) c")
    chosen = jax.random.choice(key, len(points), idle.shape, replace=len(idle) > len(points))
    return jnp.where(dead, 0, idle), dead, points[chosen]


def perplexity(token_ids: Int32[Array, "b v u"], size: int) -> Float[Array, ""]:
    """How many codes would be as varied if all were used equally: exp of the usage's entropy."""
    share = jnp.bincount(token_ids.reshape(-1), length=size) / token_ids.size
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))


def codebook_from_images(
    state: TokenizerState, images: UInt8[Array, "b y x 3"], key: jax.Array, *, graphdef: Any
) -> TokenizerState:
    """The state with a codebook that covers what the encoder makes of images."""
    model = nnx.merge(graphdef, state.params)
    latents = model.encoder(images / jnp.float32(255))
    codebook = initial_codebook(latents, model.cfg.codebook_size, jax.random.fold_in(key, 0))
    params = with_codebook(state.params, codebook)
    return state._replace(params=params, ema=with_codebook(state.ema, codebook))


def with_codebook(params: nnx.State, codebook: Float[Array, "k c"]) -> nnx.State:
    """The same parameters with another codebook."""
    return cast(nnx.State, nnx.merge_state(params, nnx.State({"codebook": nnx.Param(codebook)})))


def tokenizer_step(
    state: TokenizerState,
    images: UInt8[Array, "b y x 3"],
    key: jax.Array,
    lpips: Any,
    *,
    networks: Networks,
    optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    cfg: LossConfig,
    ema_decay: float,
    quantised: bool = True,
    placement: Any = UNPLACED,
) -> tuple[TokenizerState, dict[str, Float[Array, ""]]]:
    """One optimiser step; jit it with everything after `lpips` fixed.

    A step whose losses or gradient are not finite changes nothing but the count of steps.
    The codebook learns by gradient, like the rest. Where `networks` has a discriminator, the VQGAN
    is judged by it as it was before the step, and it learns from the same images.

    Args:
        state: before the step.
        images: a batch.
        key: the run's key; the step's own is folded in from `state.step`.
        lpips: parameters of the perceptual distance, None without one.
        networks: the networks of the step.
        optimizer: the VQGAN's gradient transformation.
        discriminator_optimizer: the discriminator's.
        cfg: the losses.
        ema_decay: of the parameters' moving average.
        quantised: whether the codebook takes part.
        placement: where weights and gradients lie.

    Returns:
        The state after the step; its losses, gradient norm, use of the codebook, and 1 if it was
        skipped.
    """
    pixels = images / jnp.float32(255)
    judge, distance = networks.discriminator, networks.lpips

    def loss(params: nnx.State) -> tuple[Array, Outcome]:
        return vqgan_loss(
            nnx.merge(networks.vqgan, params),
            pixels,
            cfg,
            quantised=quantised,
            lpips=distance and nnx.merge(distance, lpips),
            discriminator=judge and nnx.merge(judge, placement.weights(state.discriminator)),
        )

    (total, outcome), grads = jax.value_and_grad(loss, has_aux=True)(
        placement.weights(state.params)
    )
    grads = placement.gradients(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = cast(nnx.State, optax.apply_updates(cast(Any, state.params), updates))
    ema = update_ema(state.ema, params, ema_decay)

    metrics = {"loss": total, **outcome.terms, "grad_norm": optax.tree.norm(grads)}
    after = state._replace(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
    if quantised:
        after, restarted = _with_live_codes(after, outcome, key, cfg.restart_after)
        metrics["perplexity"] = perplexity(outcome.token_ids, len(state.idle))
        metrics["restarted_codes"] = restarted
    if judge:

        def verdicts(discriminator: nnx.State) -> Array:
            network = nnx.merge(judge, discriminator)
            made = jax.lax.stop_gradient(outcome.reconstruction)
            return hinge_loss(network(pixels), network(made))

        told, grads = jax.value_and_grad(verdicts)(placement.weights(state.discriminator))
        grads = placement.gradients(grads)
        updates, discriminator_opt_state = discriminator_optimizer.update(
            grads, state.discriminator_opt_state, state.discriminator
        )
        after = after._replace(
            discriminator=optax.apply_updates(state.discriminator, updates),
            discriminator_opt_state=discriminator_opt_state,
        )
        metrics["discriminator"] = told
    told = [metrics[name] for name in ("loss", "grad_norm", "discriminator") if name in metrics]
    after, metrics["skipped"] = skip_unless_finite(state, after, *told)
    return after, metrics


def _with_live_codes(
    state: TokenizerState, outcome: Outcome, key: jax.Array, after: int
) -> tuple[TokenizerState, Float[Array, ""]]:
    """The state with its dead codes restarted, and how many they were."""
    key = jax.random.fold_in(key, state.step)  # counted from 1 here: 0 is the first codebook's
    idle, dead, fresh = restart_codes(
        state.idle, outcome.token_ids, outcome.latents, key, after=after
    )
    # The moving average would drag a new code behind it: it starts there as well.
    params, ema = (
        with_codebook(tree, jnp.where(dead[:, None], fresh, cast(Any, tree["codebook"])[...]))
        for tree in (state.params, state.ema)
    )
    return state._replace(params=params, ema=ema, idle=idle), jnp.sum(dead).astype(jnp.float32)
