"""Trains a VQGAN on one's own images, or goes on."""

from absl import flags

from enat_jax.cli import host_flags, train

define = train.define


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    host_flags.connect(args, listens=True)
    from enat_jax.config import TokenizerRunConfig
    from enat_jax.config_file import read_config
    from enat_jax.training.train_tokenizer import train_tokenizer

    train_tokenizer(read_config(TokenizerRunConfig, args.config, overrides), args.workdir)
    return 0
