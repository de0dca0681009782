"""Trains a VQGAN on one's own images, or goes on; or learns a codebook of patches."""

from absl import flags

from enat_jax.cli import host_flags, train

define = train.define


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    host_flags.connect(args, listens=True)
    from enat_jax.config import PatchesRunConfig, load_tokenizer_config
    from enat_jax.training.train_patches import train_patches
    from enat_jax.training.train_tokenizer import train_tokenizer

    config = load_tokenizer_config(args.config, overrides)
    if isinstance(config, PatchesRunConfig):
        train_patches(config, args.workdir)
    else:
        train_tokenizer(config, args.workdir)
    return 0
