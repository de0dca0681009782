"""What ENAT carries from one step to the next: the encoder's features of revealed tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from enat_jax.core.network import Features, RowPlan, Tokens
from enat_jax.core.plans import Plan
from enat_jax.models.attention import Segments
from enat_jax.models.enat.block import BLOCK_EPSILON
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.layers import LayerNorm, Mlp

# Features of tokens, `[b p d]`; where those of every block are carried, `[b p l d]`.
Carried = Float[Array, "b _ ... d"]


class ReuseProjection(nnx.Module):
    """`f(z) = z + MLP(LN(z))`, which carries features from one step to the next (section 4.2)."""

    def __init__(self, cfg: ENATConfig, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(cfg.width, epsilon=BLOCK_EPSILON)
        self.mlp = Mlp(cfg.width, cfg.mlp_ratio, dtype=jnp.dtype(cfg.dtype), rngs=rngs)

    def __call__(self, features: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        """Projects features of previous tokens."""
        return (features + self.mlp(self.norm(features))).astype(features.dtype)


class LastLayer:
    """The last encoder layer's features of revealed tokens, in reveal order (section 4.2).

    A memory decides what a step reads of earlier ones (`read`, and `recall` in training), how it
    is projected, and what the step leaves behind (`write`). It holds no arrays: the network's
    state between steps is handed in. Where nothing is reused, no step reads anything of it.
    """

    def __init__(self, cfg: ENATConfig):
        self.cfg = cfg

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.cfg == getattr(other, "cfg", None)

    def __hash__(self) -> int:
        return hash((type(self), self.cfg))

    def make_projection(self, *, rngs: nnx.Rngs) -> Any:
        """The reuse projection, None where the config has none."""
        if not (self.cfg.carries_features and self.cfg.reuse_projection):
            return None
        return ReuseProjection(self.cfg, rngs=rngs)

    def unstacked_projection(self, projection: Any) -> Any:
        """The projection as a network has it whose blocks' weights are arrays of their own."""
        return projection

    def project(self, projection: Any, features: Carried) -> Carried:
        """Features as a step reads them."""
        return features if projection is None else projection(features)

    def initial(self, batch: int, capacity: int) -> Carried:
        """Room for `capacity` revealed tokens of one image a row."""
        return jnp.zeros((batch, capacity, self.cfg.width), self.cfg.dtype)

    def read(self, memory: Carried, row: RowPlan) -> Carried | None:
        """What a step reads of the memory; None for nothing."""
        (shape,) = row.plans
        return memory[:, : shape.previous]

    def recall(self, network: Any, condition: Any, tokens: Tokens, row: RowPlan) -> Carried:
        """What an earlier step hands on that saw the previous tokens, with all others masked."""
        valid = None
        if row.counts is not None:
            pairs = zip(row.previous, row.counts, strict=True)
            valid = [exist(size, count.previous) for size, count in pairs]
        return network.encode(condition, tokens, Segments(row.previous, valid=valid))[0]

    def counts(self, recalled: Carried | None, row: RowPlan) -> list[int]:
        """How many recalled tokens there are of each image."""
        return [0] * len(row.plans) if recalled is None else row.previous

    def exist(self, recalled: int, counts: Plan) -> Bool[Array, "b 1 1 k"]:
        """Which of an image's recalled tokens are no padding."""
        return exist(recalled, counts.previous)

    def encode(
        self, network: Any, x: Array, vectors: Any, recalled: Carried | None, segments: Segments
    ) -> Carried:
        """New tokens through the encoder, which reads recalled ones; the features to carry."""
        return network.run(network.encoder, x, vectors, recalled, segments)

    def last_layer(self, features: Carried) -> Float[Array, "b p d"]:
        """What the decoder reads of features."""
        return features

    def write(self, memory: Carried, out: Features, tokens: Tokens, row: RowPlan) -> Carried:
        """The memory after a step: new features, and earlier ones as the step projected them.

        Without `reproject` the earlier ones stay as the encoder put them out.
        """
        update = jax.lax.dynamic_update_slice_in_dim
        if self.cfg.reproject and out.previous is not None:
            memory = update(memory, out.previous, 0, axis=1)
        if out.new is not None and memory.shape[1]:
            start = (row.counts or row.plans)[0].previous
            memory = update(memory, out.new, start, axis=1)
        return memory


def exist(size: int, count: Any) -> Bool[Array, "b 1 1 {size}"]:
    """Which of `size` tokens are no padding, of so many in every row (`[]`) or in each (`[b]`)."""
    return jnp.arange(size) < jnp.reshape(count, (-1, 1, 1, 1))
