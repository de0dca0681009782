"""The configs of tokenizers with weights, and of a VQGAN's discriminator."""

from dataclasses import dataclass
from typing import Literal

from enat_jax.config_file import limited


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of a VQGAN; the defaults are those of MaskGIT's and MAGE's (16 pixels a token).

    Attributes:
        channels: of the level with the highest resolution.
        channel_multipliers: one per level, from the highest resolution down; every level but the
            first halves the resolution.
        num_res_blocks: residual blocks per level of the encoder and of the decoder.
        latent_channels: length of a codebook entry.
        codebook_size: number of codebook entries.
        norm_groups: groups of channels in every norm, one per channel where there are fewer. With
            one channel to a group an image's mean colour is normalised away: narrow networks
            want few groups.
        dtype: of activations and convolutions; distances to the codebook are always float32.
    """

    channels: int = limited(128, at_least=1)
    channel_multipliers: tuple[int, ...] = limited((1, 1, 2, 2, 4), at_least=1)
    num_res_blocks: int = limited(2, at_least=1)
    latent_channels: int = limited(256, at_least=1)
    codebook_size: int = limited(1024, at_least=2, below=2**16)
    norm_groups: int = limited(32, at_least=1)
    dtype: Literal["float32", "bfloat16"] = "float32"

    RULES = (
        ("channel_multipliers", bool, "must hold one for each level"),
        ("norm_groups channels channel_multipliers",
         lambda groups, width, multipliers: not any(
             width * m % min(groups, width * m) for m in multipliers
         ), "must divide the channels of every level that has more: {1} x {2}"),
    )  # fmt: skip

    @property
    def patch(self) -> int:
        """Pixels along each side of a token."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the highest resolution down."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]


@dataclass(frozen=True)
class PatchesConfig:
    """Sizes of a codebook of patches.

    Attributes:
        name: tells the config from a VQGAN's.
        patch: pixels along each side of a token.
        codebook_size: number of codebook entries.
    """

    name: Literal["patches"] = "patches"
    patch: int = limited(3, at_least=1)
    codebook_size: int = limited(1024, at_least=2, below=2**16)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of a discriminator and the rate at which it learns.

    Attributes:
        channels: at full resolution; each level doubles them, up to eight times as many.
        levels: halvings of the resolution; a verdict covers about `4 * 2**levels` pixels a side.
        learning_rate: of its own Adam, constant.
        betas: of its own Adam.
    """

    channels: int = limited(64, at_least=1)
    levels: int = limited(3, at_least=0)
    learning_rate: float = limited(1e-4, at_least=0)
    betas: tuple[float, float] = limited((0.5, 0.99), at_least=0, below=1)

    @property
    def widths(self) -> list[int]:
        """Channels at full resolution and after each halving."""
        return [self.channels * min(2**level, 8) for level in range(self.levels + 1)]
