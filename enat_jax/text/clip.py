"""CLIP's text tower (arXiv:2103.00020): a causal Transformer whose features describe captions."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from enat_jax.config_file import limited
from enat_jax.models.attention import attend
from enat_jax.models.layers import EMBEDDING_STD, LayerNorm, Linear
from enat_jax.models.stack import make_stack, run_stack


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text tower; the defaults are those of OpenAI's ViT-L/14.

    Attributes:
        vocabulary: number of token ids.
        length: most tokens of a caption.
        width: features per token.
        depth: number of blocks.
        num_heads: attention heads; divides `width`.
        mlp_width: hidden width of the MLPs.
        activation: OpenAI's weights have `quick_gelu`, x sigmoid(1.702 x), LAION's the exact GELU.
        projection: width of the space that captions share with images; 0 for weights without.
        norm_epsilon: of every norm.
        output: what is given of each token: what the last block gives, normalised; what the block
            before it gives (as open-muse and Meissonic read it); or that, normalised.
        dtype: type of activations and matrix operands; parameters stay float32.
    """

    vocabulary: int = limited(49408, at_least=1)
    length: int = limited(77, at_least=2)
    width: int = limited(768, at_least=1)
    depth: int = limited(12, at_least=1)
    num_heads: int = limited(12, at_least=1)
    mlp_width: int = limited(3072, at_least=1)
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int = limited(0, at_least=0)
    norm_epsilon: float = limited(1e-5, above=0)
    output: Literal["last", "penultimate", "penultimate_normed"] = "last"
    dtype: Literal["float32", "bfloat16"] = "float32"

    RULES = (
        ("width num_heads", lambda width, heads: width % heads == 0, "must be a multiple of {1}"),
    )


class Block(nnx.Module):
    """Causal attention, then an MLP, each on what is normalised before it."""

    def __init__(self, cfg: CLIPTextConfig, *, rngs: nnx.Rngs):
        def linear(features_in: int, features_out: int) -> Linear:
            return Linear(features_in, features_out, dtype=jnp.dtype(cfg.dtype), rngs=rngs)

        self.num_heads, self.activation = cfg.num_heads, cfg.activation
        self.attention_norm = LayerNorm(cfg.width, epsilon=cfg.norm_epsilon)
        self.query = linear(cfg.width, cfg.width)
        self.key = linear(cfg.width, cfg.width)
        self.value = linear(cfg.width, cfg.width)
        self.out = linear(cfg.width, cfg.width)
        self.mlp_norm = LayerNorm(cfg.width, epsilon=cfg.norm_epsilon)
        self.up = linear(cfg.width, cfg.mlp_width)
        self.down = linear(cfg.mlp_width, cfg.width)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Updates float32 features; each token reads itself and those before it."""

        def heads(x: Float[Array, "b t d"]) -> Float[Array, "b t h c"]:
            return rearrange(x, "b t (h c) -> b t h c", h=self.num_heads)

        y = self.attention_norm(x)
        causal = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))
        read = attend(heads(self.query(y)), heads(self.key(y)), heads(self.value(y)), valid=causal)
        x = x + self.out(rearrange(read, "b t h c -> b t (h c)"))
        y = self.up(self.mlp_norm(x)).astype(jnp.float32)
        if self.activation == "quick_gelu":
            y = y * jax.nn.sigmoid(1.702 * y)
        else:
            y = jax.nn.gelu(y, approximate=False)
        return x + self.down(y)


class CLIPText(nnx.Module):
    """The text tower; no padding is masked, as none of its users masks it."""

    def __init__(self, cfg: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        key = rngs.params
        self.words = nnx.Param(
            EMBEDDING_STD * jax.random.normal(key(), (cfg.vocabulary, cfg.width))
        )
        self.positions = nnx.Param(
            EMBEDDING_STD * jax.random.normal(key(), (cfg.length, cfg.width))
        )
        self.blocks = make_stack(lambda rngs: Block(cfg, rngs=rngs), cfg.depth, rngs=rngs)
        self.norm_out = LayerNorm(cfg.width, epsilon=cfg.norm_epsilon)
        options: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "rngs": rngs, "use_bias": False}
        self.projection = Linear(cfg.width, cfg.projection, **options) if cfg.projection else None

    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Features of all tokens, those of padding included, as `cfg.output` says."""
        if self.cfg.output == "last":
            return self.norm_out(self._run(self.blocks, self.embed(ids)))
        x = self._run(jax.tree.map(lambda x: x[:-1], self.blocks), self.embed(ids))
        return self.norm_out(x) if self.cfg.output == "penultimate_normed" else x

    def embed(self, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """What the first block reads: words and positions."""
        return self.words[...][ids] + self.positions[...][: ids.shape[1]]

    def states(self, ids: Int[Array, "b t"]) -> Float[Array, "k b t d"]:
        """What the first block reads, then what each block gives, not normalised."""
        _, given = self._run(self.blocks, self.embed(ids), keep=True)
        return jnp.concatenate([self.embed(ids)[None], rearrange(given, "b k t d -> k b t d")])

    def project(self, ids: Int[Array, "b t"]) -> Float[Array, "b p"]:
        """Captions in the space that they share with images, not of length 1.

        Read where the largest id stands first, which is where a caption ends: published configs
        mean that by `eos_token_id = 2`.
        """
        assert self.projection is not None, "these weights have no projection"
        last = self.norm_out(self._run(self.blocks, self.embed(ids)))
        ends = jnp.argmax(ids, axis=1)
        return self.projection(jnp.take_along_axis(last, ends[:, None, None], axis=1)[:, 0])

    def _run(self, blocks: Any, x: Float[Array, "b t d"], *, keep: bool = False) -> Any:
        return run_stack(blocks, x, None, lambda block, x, _: block(x), keep=keep)


def abstract_clip(cfg: CLIPTextConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The network's structure and the shapes of its parameters, without any memory."""
    return nnx.split(nnx.eval_shape(lambda: CLIPText(cfg, rngs=nnx.Rngs(0))), nnx.Param)


def caption_flops(cfg: CLIPTextConfig, length: int) -> float:
    """Matrix-product FLOPs of one caption's features, two per multiply-add.

    Attention counts all pairs of tokens, as it computes them.
    """
    depth = cfg.depth - (cfg.output != "last")
    products = length * (4 * cfg.width**2 + 2 * cfg.width * cfg.mlp_width)
    return 2.0 * depth * (products + 2 * length**2 * cfg.width)


@dataclass(frozen=True)
class CLIPEncoder:
    """A text tower and its weights as an encoder; attributes as `TextEncoder`'s."""

    cfg: CLIPTextConfig
    params: nnx.State = field(repr=False)
    digest: str
    name: str = "clip"

    @property
    def width(self) -> int:
        """Features per token."""
        return self.cfg.width

    def encode(self, params: nnx.State, ids: Int[Array, "b t"]) -> Float[Array, "b t e"]:
        """Features of captions' tokens, float32, those of padding included."""
        return nnx.merge(abstract_clip(self.cfg)[0], params)(ids)
