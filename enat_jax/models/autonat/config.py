"""AutoNAT's config: its sizes, and how it computes."""

from dataclasses import dataclass, field
from typing import Literal

from enat_jax.models.config import TransformerConfig


@dataclass(frozen=True)
class AutoNATConfig(TransformerConfig):
    """Sizes of AutoNAT and how it computes; AutoNAT-L's by default.

    Attributes:
        depth: blocks beside the middle one, an even number: half of them hand skips to the others.
    """

    name: Literal["autonat"] = "autonat"
    depth: int = field(default=24, metadata={"at_least": 2, "at_most": 1024})

    RULES = (("depth", lambda depth: depth % 2 == 0, "must be an even number"),)
