"""The config of a VQGAN's training run: typed, checked whole before anything is allocated."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from enat_jax.config import LoopConfig, OptimConfig, check_loop
from enat_jax.config_file import make_config, read_fields
from enat_jax.data.images import ImageConfig
from enat_jax.parallel.placement import MeshConfig
from enat_jax.tokenizers.discriminator import DiscriminatorConfig
from enat_jax.tokenizers.vqgan import VQGANConfig
from enat_jax.training.tokenizer_step import LossConfig


@dataclass(frozen=True)
class TokenizerTrainConfig(LoopConfig):
    """A VQGAN's training run; its pictures are looks at held-out images, with their scores.

    Attributes:
        image_size: pixels per side.
        random_crops: crops of 0.8 to 1 of an image's shorter side; else its centre.
    """

    steps: int = 100_000
    batch_size: int = 64
    image_size: int = 256
    random_crops: bool = True


@dataclass(frozen=True)
class HeldOutConfig:
    """The held-out images, which are looked at and never learnt from.

    Attributes:
        folder: a folder with a folder of images for each class; or
        split: a split of the TFDS data set that `images` names. Neither: training images are
            looked at, and the log calls them so.
        images: at most so many, evenly out of all.
        pictures: of these in the log.
        batch_size: images per call, over all devices.
        inception: FID's published Inception weights, for rFID; empty leaves it out.
    """

    folder: str = ""
    split: str = ""
    images: int = 1000
    pictures: int = 16
    batch_size: int = 64
    inception: str = ""


@dataclass(frozen=True)
class TokenizerRunConfig:
    """One VQGAN on one set of images."""

    model: VQGANConfig = field(default_factory=VQGANConfig)
    images: ImageConfig = field(default_factory=ImageConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(
        learning_rate=1e-4, betas=(0.9, 0.99), weight_decay=0.0, ema_decay=0.999
    ))  # fmt: skip
    train: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def load_tokenizer_config(path: str, overrides: Sequence[str] = ()) -> TokenizerRunConfig:
    """Reads a config file, applies overrides (`section.field=value` each), and checks the whole.

    Raises:
        ConfigError: an unreadable file, unknown fields, wrong types or values; all at once.
    """
    return make_config(TokenizerRunConfig, read_fields(path), check, overrides)


def check(config: TokenizerRunConfig) -> list[str]:
    """What is wrong with a config, one phrase per problem, each with value, limit and field."""
    model, train, optim, loss = config.model, config.train, config.optim, config.loss
    held_out = config.held_out
    patch = 2 ** max(len(model.channel_multipliers) - 1, 0)  # its own is no integer without levels
    rules = [
        (bool(config.images.folder) != bool(config.images.name), "images.folder",
         repr(config.images.folder), f"or images.name = {config.images.name!r}: give one of them"),
        (not (held_out.folder and held_out.split), "held_out.folder", repr(held_out.folder),
         f"and held_out.split = {held_out.split!r}: give one of them at most"),
        (not held_out.split or bool(config.images.name), "held_out.split", repr(held_out.split),
         "needs images.name: a folder has no splits, give held_out.folder"),
        (train.image_size % patch == 0, "train.image_size", train.image_size,
         f"must be a multiple of {patch}, the pixels of a token with"
         f" {len(model.channel_multipliers)} model.channel_multipliers"),
        (all(width % min(max(model.norm_groups, 1), max(width, 1)) == 0 for width in model.widths),
         "model.norm_groups", model.norm_groups,
         f"must divide the channels of every level that has more: {model.widths}"),
        (min(model.widths, default=0) >= 1, "model.channel_multipliers",
         model.channel_multipliers, f"x model.channels = {model.channels} must be at least 1 each"),
        (2 <= model.codebook_size < 2**16, "model.codebook_size", model.codebook_size,
         f"must be in [2, {2**16})"),
        (loss.codebook_start < train.steps, "loss.codebook_start", loss.codebook_start,
         f"must be below train.steps = {train.steps}"),
        (optim.decay == "constant" or optim.warmup_steps < train.steps, "optim.warmup_steps",
         optim.warmup_steps, f"must be below train.steps = {train.steps}"),
    ]  # fmt: skip
    rules += [
        (value >= 1, name, value, "must be at least 1")
        for name, value in {
            "model.num_res_blocks": model.num_res_blocks,
            "model.latent_channels": model.latent_channels,
            "model.norm_groups": model.norm_groups,
            "train.image_size": train.image_size,
            **{f"held_out.{name}": getattr(held_out, name) for name in
               ("images", "pictures", "batch_size")},
            "discriminator.channels": config.discriminator.channels,
            "images.read_threads": config.images.read_threads,
        }.items()
    ]  # fmt: skip
    rules += [
        (value >= 0, name, value, "must be at least 0")
        for name, value in {
            **{f"loss.{name}": getattr(loss, name) for name in
               ("l1", "l2", "codebook_start", "codebook", "commitment", "restart_after", "lpips",
                "adversarial", "adversarial_start")},
            "discriminator.levels": config.discriminator.levels,
            "discriminator.learning_rate": config.discriminator.learning_rate,
            **{f"optim.{name}": getattr(optim, name) for name in
               ("learning_rate", "warmup_steps", "weight_decay", "epsilon", "max_grad_norm")},
        }.items()
    ]  # fmt: skip
    rules += [
        (0 <= value < 1, name, value, "must be in [0, 1)")
        for name, value in {
            "images.max_unreadable": config.images.max_unreadable,
            "optim.ema_decay": optim.ema_decay,
            **{f"{section}.betas[{i}]": getattr(config, section).betas[i]
               for section in ("optim", "discriminator") for i in (0, 1)},
        }.items()
    ]  # fmt: skip
    problems = [f"{name} = {value} {limit}" for holds, name, value, limit in rules if not holds]
    return problems + check_loop(train)
