"""Replays arrays recorded from an original network on the imported one.

An array's key says what it is of; arrays of other keys are left alone. Of `ENAT` and `AutoNAT`,
below any prefix or none, a forward pass: `ids` (B, L), mask ids among them, with `logits`
(B, L, V), `feat` (B, L, D) and `masking` (B, L) beside them, and one `context` (B, 1) of class ids
in the file. ENAT's passes `<chain>/0/`, `<chain>/1/`, ... reuse each other's features.

Of `VQGAN`, channels first and images in [0, 1]: `image` (B, 3, Y, X) with `encoder_out`
(B, C, V, U), `indices` (B, V, U) and their `decode` (B, 3, Y, X); `random_ids` (B, V, U) with
`random_decode`. Of `Inception`: `<name>/images` (B, 3, Y, X) with `<name>/features` (B, 2048).

Of `CLIPText`: `ids/<name>` (B, T) with any of `<name>/hidden_states` (K+1, B, T, D), what the first
block reads and what each block gives, `<name>/last_hidden_state` (B, T, D), of which the last norm
is, `<name>/penultimate_final_ln` (B, T, D), and `<name>/text_embeds` (B, P).
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
from enat_jax.core.network import RowPlan, Tokens
from enat_jax.core.plans import Plan
from enat_jax.errors import UserError
from enat_jax.evaluation.inception import Inception
from enat_jax.files import Path
from enat_jax.models.autonat.network import AutoNAT
from enat_jax.models.enat.network import ENAT
from enat_jax.text.clip import CLIPText
from enat_jax.tokenizers.vqgan import VQGAN

Arrays = Mapping[str, np.ndarray]
Replayed = Iterator[tuple[str, Any]]  # keys, and our arrays for them


class Comparison(NamedTuple):
    """How far an imported network is from one recorded array of `size` numbers, by its key.

    The difference is the largest absolute one, of logits and of Inception's features as a fraction
    of the largest; or, where it is `exact`, how many integers differ.
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
    replays = {ENAT: _tokens, AutoNAT: _tokens, VQGAN: _vqgan, Inception: _inception,
               CLIPText: _clip_text}  # fmt: skip
    replay_all = next(each for kind, each in replays.items() if isinstance(model, kind))
    with jax.default_matmul_precision("highest"):
        ours = {key: np.asarray(x) for key, x in replay_all(model, recorded) if key in recorded}
    if not ours:
        raise UserError(f"nothing to verify among the keys {sorted(recorded)[:8]} ...")
    every = isinstance(model, Inception)
    return [compare(k, x, recorded[k], every or k.endswith("logits")) for k, x in ours.items()]


def compare(name: str, ours: np.ndarray, theirs: np.ndarray, relative: bool = False) -> Comparison:
    """Compares two arrays; `relative` where differences are fractions of the largest number."""
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
    """All forward passes, links of a chain in their order."""
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


def _clip_text(model: CLIPText, recorded: Arrays) -> Replayed:
    """Features of every group of captions, whatever the config's `output`."""
    for key in recorded:
        if key.startswith("ids/"):
            name, ids = key.removeprefix("ids/"), recorded[key]
            states = _run(CLIPText.states, model, (), ids)
            yield f"{name}/hidden_states", states
            yield f"{name}/last_hidden_state", model.norm_out(states[-1])
            yield f"{name}/penultimate_final_ln", model.norm_out(states[-2])
            if model.projection is not None:
                yield f"{name}/text_embeds", _run(CLIPText.project, model, (), ids)
