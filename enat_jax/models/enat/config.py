"""ENAT's config: its sizes, how it computes, and which variant of the paper's it is."""

from dataclasses import dataclass
from typing import Literal

from enat_jax.models.attention import Implementation
from enat_jax.models.stack import Remat

Blocked = Literal[
    "none",
    "masked_to_visible",
    "visible_to_masked",
    "visible_to_visible",
    "masked_to_masked",
]
ContextAttention = Literal["joint", "alternating", "none"]
Reuse = Literal["last_layer", "none", "all_tokens", "all_layers"]


@dataclass(frozen=True)
class ENATConfig:
    """Sizes of ENAT, how it computes, and which of the paper's ablations it is (section 5.3).

    Attributes:
        name: which network this is.
        length: tokens per image.
        codebook_size: number of discrete codes; also the mask token's id.
        num_classes: number of classes; also the null class's id.
        width: features per token.
        num_heads: attention heads; divides `width`.
        encoder_depth: blocks that new tokens run through; all tokens where the stack is shared.
        decoder_depth: blocks that masked tokens run through; 0 where the stack is shared.
        mlp_ratio: hidden width of the MLPs over `width`.
        dropout: rate on the embeddings, in training only.
        dtype: type of activations and matrix operands; parameters stay float32.
        attention: implementation of attention.
        remat: what the backward pass recomputes.
        stacks: `separate` gives visible tokens to the encoder and masked ones to the decoder;
            `shared` is the paper's baseline: all tokens run through one stack, the encoder, and
            read each other.
        blocked: which attention a shared stack leaves out, queries first: with `masked_to_visible`
            masked tokens do not read visible ones. A token always reads itself.
        context_attention: how own and context tokens are read: `joint` in one softmax, the paper's
            SC-attention; `alternating` in a self-attention, then a cross-attention in every block.
        reuse: what a step reads of what an earlier one computed: `last_layer` of the visible
            tokens; `none` (the encoder then reads all visible tokens anew); `all_tokens`, the
            last layer of all tokens, of masked ones the decoder's; `all_layers` of the visible
            tokens, each encoder block those of its own depth.
        reuse_projection: whether reused features are projected before they are read.
        reproject: whether a step of sampling projects what earlier steps have projected again, as
            the reference does. If not, features are read projected once, as in training.
    """

    name: Literal["enat"] = "enat"
    length: int = 256
    codebook_size: int = 1024
    num_classes: int = 1000
    width: int = 768
    num_heads: int = 8
    encoder_depth: int = 15
    decoder_depth: int = 1
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Implementation = "xla"
    remat: Remat = "none"
    stacks: Literal["separate", "shared"] = "separate"
    blocked: Blocked = "none"
    context_attention: Literal["joint", "alternating"] = "joint"
    reuse: Reuse = "last_layer"
    reuse_projection: bool = True
    reproject: bool = True

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token."""
        return self.codebook_size

    @property
    def carries_features(self) -> bool:
        """Whether a step can read what earlier steps computed."""
        return self.reuse != "none"

    @property
    def carries_masked_features(self) -> bool:
        """Whether a step reads what the one before computed of tokens then masked."""
        return self.reuse == "all_tokens"

    @property
    def null_class_id(self) -> int:
        """The class of the unconditional branch."""
        return self.num_classes

    @property
    def encoder_attention(self) -> ContextAttention:
        """How the encoder's blocks read context: reused features."""
        return self.context_attention if self.carries_features else "none"

    @property
    def decoder_attention(self) -> ContextAttention:
        """How the decoder's blocks read context: visible tokens' features."""
        return self.context_attention


def problems(cfg: ENATConfig) -> list[str]:
    """Which fields do not go together, one phrase per problem, each with value, limit and field."""
    shared = cfg.stacks == "shared"
    rules = [
        (cfg.encoder_depth >= 1, "encoder_depth", "must be at least 1"),
        (shared or cfg.decoder_depth >= 1, "decoder_depth", "must be at least 1"),
        (not shared or cfg.decoder_depth == 0, "decoder_depth",
         "must be 0 with model.stacks = 'shared': all blocks are the encoder's"),
        (not shared or cfg.reuse == "none", "reuse",
         "must be 'none' with model.stacks = 'shared'"),
        (not shared or cfg.context_attention == "joint", "context_attention",
         "must be 'joint' with model.stacks = 'shared', which has no context"),
        (shared or cfg.blocked == "none", "blocked",
         "must be 'none' but with model.stacks = 'shared'"),
        (cfg.reuse_projection or cfg.carries_features, "reuse_projection",
         "must be True with model.reuse = 'none', which projects nothing"),
    ]  # fmt: skip
    return [
        f"model.{name} = {getattr(cfg, name)!r} {limit}"
        for holds, name, limit in rules
        if not holds
    ]
