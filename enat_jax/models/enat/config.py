"""ENAT's config: its sizes, how it computes, and which variant of the paper's it is."""

from dataclasses import dataclass, field
from typing import Literal

from enat_jax.models.config import TransformerConfig

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
class ENATConfig(TransformerConfig):
    """Sizes of ENAT, how it computes, and which of the paper's ablations it is (section 5.2).

    Attributes:
        encoder_depth: blocks that new tokens run through; all tokens where the stack is shared.
        decoder_depth: blocks that masked tokens run through; 0 where the stack is shared.
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
        key_value: whether context has a projection to keys and values of its own, the paper's for
            classes, or shares that of own tokens.
        text_every_step: whether a caption is encoded beside the new tokens at every step, instead
            of once.
        reproject: whether a step of sampling projects what earlier steps have projected again, as
            the reference does. If not, features are read projected once, as in training.
    """

    name: Literal["enat"] = "enat"
    encoder_depth: int = field(default=15, metadata={"at_least": 1, "at_most": 1024})
    decoder_depth: int = field(default=1, metadata={"at_least": 0, "at_most": 1024})
    stacks: Literal["separate", "shared"] = "separate"
    blocked: Blocked = "none"
    context_attention: Literal["joint", "alternating"] = "joint"
    reuse: Reuse = "last_layer"
    reuse_projection: bool = True
    reproject: bool = True
    key_value: Literal["separate", "shared"] = "separate"
    text_every_step: bool = False

    RULES = (
        ("condition stacks reuse context_attention",
         lambda condition, stacks, reuse, how: condition == "class" or (
             stacks == "separate" and reuse in ("last_layer", "none") and how == "joint"),
         "needs stacks = 'separate', reuse = 'last_layer' or 'none' and context_attention ="
         " 'joint', not {1}, {2} and {3}"),
        ("decoder_depth stacks", lambda depth, stacks: (depth == 0) == (stacks == "shared"),
         "must be 0 where one stack is shared, else at least 1: {1}"),
        ("reuse stacks", lambda reuse, stacks: stacks == "separate" or reuse == "none",
         "must be 'none' with {1}"),
        ("context_attention stacks", lambda how, stacks: stacks == "separate" or how == "joint",
         "must be 'joint' with {1}, which has no context"),
        ("blocked stacks", lambda blocked, stacks: stacks == "shared" or blocked == "none",
         "must be 'none' where no stack is shared: {1}"),
        ("reuse_projection reuse", lambda projects, reuse: projects or reuse != "none",
         "must be True with {1}, which projects nothing"),
        ("key_value context_attention", lambda of, read: of == "separate" or read == "joint",
         "must be 'separate' with {1}"),
        ("text_every_step condition", lambda every, condition: not every or condition == "text",
         "needs {1} to be 'text'"),
    )  # fmt: skip

    @property
    def carries_features(self) -> bool:
        """Whether a step can read what earlier steps computed."""
        return self.reuse != "none"

    @property
    def carries_masked_features(self) -> bool:
        """Whether a step reads what the one before computed of tokens then masked."""
        return self.reuse == "all_tokens"

    @property
    def encoder_attention(self) -> ContextAttention:
        """How the encoder's blocks read context: reused features and captions."""
        reads = self.carries_features or self.condition == "text"
        return self.context_attention if reads else "none"

    @property
    def decoder_attention(self) -> ContextAttention:
        """How the decoder's blocks read context: visible tokens' features."""
        return self.context_attention
