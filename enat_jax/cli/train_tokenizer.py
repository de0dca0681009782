"""Trains a VQGAN on one's own images, or goes on."""

from absl import flags

from enat_jax.cli import host_flags
from enat_jax.cli.shared_flags import required


def define(values: flags.FlagValues) -> None:
    required(values, config="the config file", workdir="where the run lives")
    host_flags.define(values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    host_flags.connect(args, listens=True)
    from enat_jax.config import load_tokenizer_config
    from enat_jax.parallel.compilation import keep_compiled_programs
    from enat_jax.training.train_tokenizer import train_tokenizer

    keep_compiled_programs()
    train_tokenizer(load_tokenizer_config(args.config, overrides), args.workdir)
    return 0
