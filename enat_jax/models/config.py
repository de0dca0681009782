"""What the configs of all networks share: sizes, and how a network computes."""

from dataclasses import dataclass, field
from typing import Literal

Implementation = Literal["xla", "cudnn"]
Remat = Literal["none", "block", "dots"]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Transformer over tokens, and how it computes.

    Attributes:
        name: which network this is.
        length: tokens per image.
        codebook_size: number of discrete codes, also the mask token's id; 0 is read from the token
            records when training starts.
        num_classes: number of classes, also the null class's id; 0 is read likewise.
        condition: what images are made from.
        text_length: tokens of a caption; 0 is read from the records when training starts.
        text_width: features of each as its encoder gives them, or of a word in the table.
        text_vocabulary: ids of the learned table of words, read likewise; 0 reads an encoder's
            features.
        width: features per token.
        num_heads: attention heads; divides `width`.
        mlp_ratio: hidden width of the MLPs over `width`.
        dropout: rate on the tokens' embeddings, in training only.
        dtype: type of activations and matrix operands; parameters stay float32.
        attention: implementation of attention.
        remat: what the backward pass recomputes.
    """

    name: str = ""
    length: int = field(default=256, metadata={"at_least": 2})
    codebook_size: int = field(
        default=1024, metadata={"at_least": 2, "below": 2**16, "or_zero": True}
    )
    num_classes: int = field(default=1000, metadata={"at_least": 0})
    condition: Literal["class", "text"] = "class"
    text_length: int = field(default=0, metadata={"at_least": 0})
    text_width: int = field(default=0, metadata={"at_least": 0})
    text_vocabulary: int = field(default=0, metadata={"at_least": 0})
    width: int = field(default=768, metadata={"at_least": 1})
    num_heads: int = field(default=8, metadata={"at_least": 1})
    mlp_ratio: float = field(default=4.0, metadata={"above": 0})
    dropout: float = field(default=0.1, metadata={"at_least": 0, "below": 1})
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Implementation = "xla"
    remat: Remat = "none"

    RULES = (
        ("text_length condition", lambda n, condition: n == 0 or condition == "text",
         "must be 0 for classes: {1}"),
        ("text_width condition", lambda n, condition: (n > 0) == (condition == "text"),
         "must be 0 for classes, at least 1 for text: {1}"),
        ("text_vocabulary condition", lambda n, condition: n == 0 or condition == "text",
         "must be 0 for classes: {1}"),
        ("width num_heads", lambda width, heads: width % heads == 0, "must be a multiple of {1}"),
        ("mlp_ratio width", lambda ratio, width: 1 <= int(width * ratio) < 2**31,
         "must give the MLPs of {1} at least 1 hidden feature, and below 2**31"),
        ("attention dtype", lambda how, dtype: how != "cudnn" or dtype == "bfloat16",
         "needs bfloat16, not {1}"),
        ("width num_heads attention",
         lambda width, heads, how: how != "cudnn" or width % (8 * heads) == 0,
         "must be a multiple of 8 x {1} with {2}"),
    )  # fmt: skip

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token."""
        return self.codebook_size

    @property
    def null_class_id(self) -> int:
        """The class of the unconditional branch."""
        return self.num_classes

    @property
    def carries_features(self) -> bool:
        """Whether a step can read what earlier steps computed."""
        return False

    @property
    def carries_masked_features(self) -> bool:
        """Whether a step reads what the one before computed of tokens then masked."""
        return False
