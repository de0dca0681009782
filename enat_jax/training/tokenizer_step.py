"""One optimiser step of a VQGAN's training, with its losses and the care of its codebook."""

from collections.abc import Callable
from typing import Any, NamedTuple

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
from enat_jax.training.optim import skip_unless_finite

_ROUNDS = 8  # of Lloyd's algorithm for the first codebook


class TokenizerState(NamedTuple):
    """Everything a run changes, besides its position in the data.

    `codes` holds `idle`: the steps since each code was last used.
    """

    step: Int[Array, ""]
    params: nnx.State
    ema: nnx.State
    opt_state: Any
    codes: dict[str, Int32[Array, " k"]]
    discriminator: Any = None
    discriminator_opt_state: Any = None


class Networks(NamedTuple):
    """The structures of the networks of a step; None for one that takes no part."""

    vqgan: Any
    discriminator: Any = None
    lpips: Any = None


class Outcome(NamedTuple):
    """What a pass gave: losses before their weights, what was encoded, codes, what they make."""

    terms: dict[str, Float[Array, ""]]
    latents: Float[Array, "b v u c"]
    token_ids: Int32[Array, "b v u"]
    reconstruction: Float[Array, "b y x 3"]


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
    # the codes, whose gradient goes to the latents unchanged (van den Oord et al. 2017)
    seen = latents + jax.lax.stop_gradient(codes - latents) if quantised else latents
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


def some_latents(
    latents: Float[Array, "b v u c"], count: int, key: jax.Array
) -> Float[Array, "k c"]:
    """So many of the encoder's outputs, each at most once if there are enough."""
    points = rearrange(latents, "b v u c -> (b v u) c")
    return points[jax.random.choice(key, len(points), (count,), replace=count > len(points))]


def initial_codebook(
    latents: Float[Array, "b v u c"], size: int, key: jax.Array
) -> Float[Array, "k c"]:
    """A codebook that covers the encoder's outputs: some of them, moved by Lloyd's algorithm."""
    points = rearrange(latents, "b v u c -> (b v u) c")

    def move(codes: Array, _: None) -> tuple[Array, None]:
        products = jnp.einsum("nc,kc->nk", points, codes, precision=jax.lax.Precision.HIGHEST)
        nearest = jnp.argmin(jnp.sum(jnp.square(codes), axis=-1) - 2 * products, axis=-1)
        counts = jax.ops.segment_sum(jnp.ones(len(points)), nearest, size)
        means = jax.ops.segment_sum(points, nearest, size) / jnp.maximum(counts, 1)[:, None]
        return jnp.where(counts[:, None] > 0, means, codes), None

    return jax.lax.scan(move, some_latents(latents, size, key), None, length=_ROUNDS)[0]


def find_idle(
    idle: Int32[Array, " k"], token_ids: Int32[Array, "b v u"], *, after: int
) -> tuple[Int32[Array, " k"], Bool[Array, " k"]]:
    """Steps since each code was last used, and which codes start anew: after so many, if not 0."""
    used = jnp.zeros(len(idle), bool).at[token_ids.reshape(-1)].set(True)
    idle = jnp.where(used, 0, idle + 1)
    dead = idle >= after if after else jnp.zeros_like(used)
    return jnp.where(dead, 0, idle), dead


def perplexity(token_ids: Int32[Array, "b v u"], size: int) -> Float[Array, ""]:
    """How many codes would be as varied if all were used equally: exp of the usage's entropy."""
    share = jnp.bincount(token_ids.reshape(-1), length=size) / token_ids.size
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))


def codebook_from_images(
    state: TokenizerState, images: UInt8[Array, "b y x 3"], key: jax.Array, *, graphdef: Any
) -> TokenizerState:
    """The state with a codebook that covers what the encoder makes of images."""
    model = nnx.merge(graphdef, state.params)
    latents = model.encoder(images / jnp.float32(255)).astype(jnp.float32)
    codebook = initial_codebook(latents, model.cfg.codebook_size, jax.random.fold_in(key, 0))
    finite = jnp.isfinite(codebook).all()  # else the step that follows is not, and is not applied
    return _with_codebook(state, lambda old: jnp.where(finite, codebook, old))


def tokenizer_step(
    state: TokenizerState,
    images: UInt8[Array, "b y x 3"],
    key: jax.Array,
    lpips: Any,
    quantised: bool = True,
    adversarial: bool = False,
    *,
    networks: Networks,
    optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    cfg: LossConfig,
    ema_decay: float,
    placement: Any = UNPLACED,
) -> tuple[TokenizerState, dict[str, Float[Array, ""]]]:
    """One optimiser step on a batch; jit it with everything after `lpips` static.

    A step whose losses, gradients or weights are not finite changes nothing but the count of
    steps.
    The codebook learns by gradient, like the rest. The VQGAN is judged by the discriminator as it
    was before the step, and that learns from the same images.

    `key` is the run's: the step's own is folded in from `state.step`. `lpips` are the parameters
    of the perceptual distance, None without one. `quantised` and `adversarial` tell whether the
    codebook and the discriminator take part.

    Returns:
        The state after the step; its losses, gradient norm, use of the codebook, and 1 if it was
        skipped.
    """
    pixels = images / jnp.float32(255)
    judge: Any = networks.discriminator if adversarial else None

    def loss(params: nnx.State) -> tuple[Array, Outcome]:
        return vqgan_loss(
            nnx.merge(networks.vqgan, params),
            pixels,
            cfg,
            quantised=quantised,
            lpips=networks.lpips and nnx.merge(networks.lpips, lpips),
            discriminator=judge and nnx.merge(judge, placement.weights(state.discriminator)),
        )

    def discriminator_loss(params: nnx.State) -> tuple[Array, None]:
        discriminator = nnx.merge(judge, params)
        made = jax.lax.stop_gradient(outcome.reconstruction)
        return hinge_loss(discriminator(pixels), discriminator(made)), None

    def descend(loss: Any, params: nnx.State, opt_state: Any, optimizer: Any) -> tuple[Any, ...]:
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(placement.weights(params))
        grads = placement.gradients(grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return value, aux, optax.tree.norm(grads), optax.apply_updates(params, updates), opt_state

    value, outcome, norm, params, opt_state = descend(
        loss, state.params, state.opt_state, optimizer
    )
    ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
    after = state._replace(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
    metrics, finite = {"loss": value, "grad_norm": norm}, []
    if judge:
        metrics["discriminator"], _, judge_norm, params, opt_state = descend(
            discriminator_loss,
            state.discriminator,
            state.discriminator_opt_state,
            discriminator_optimizer,
        )
        after = after._replace(discriminator=params, discriminator_opt_state=opt_state)
        finite = [metrics["discriminator"], judge_norm, params]
    metrics |= outcome.terms
    if quantised:
        idle, dead = find_idle(state.codes["idle"], outcome.token_ids, after=cfg.restart_after)
        key = jax.random.fold_in(key, after.step)  # from 1 here: 0 is the first codebook's
        fresh = some_latents(outcome.latents, len(idle), key)
        # The EMA would drag a new code behind it: it starts there as well.
        after = _with_codebook(after, lambda codes: jnp.where(dead[:, None], fresh, codes))
        after = after._replace(codes={"idle": idle})
        metrics["perplexity"] = perplexity(outcome.token_ids, len(idle))
        metrics["restarted_codes"] = jnp.sum(dead).astype(jnp.float32)
    finite += [value, norm, after.params]
    after, metrics["skipped"] = skip_unless_finite(state, after, *finite)
    return after, metrics


def _with_codebook(state: TokenizerState, change: Callable[[Array], Array]) -> TokenizerState:
    """The state with another codebook, in the EMA too."""

    def changed(tree: Any) -> Any:
        codebook = nnx.Param(change(tree["codebook"][...]))
        return nnx.merge_state(tree, nnx.State({"codebook": codebook}))

    return state._replace(params=changed(state.params), ema=changed(state.ema))
