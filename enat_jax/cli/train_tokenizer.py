"""Trains a VQGAN on one's own images, or goes on."""

from absl import flags

from enat_jax.cli import host_flags


def define(values: flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.DEFINE_string("config", None, "the config file", values, required=True)
    flags.DEFINE_string("workdir", None, "where the run lives", values, required=True)
    host_flags.define(values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    """Does the job; returns the exit code."""
    host_flags.connect(args, listens=True)
    from enat_jax.parallel.compilation_cache import keep_compiled_programs
    from enat_jax.training.tokenizer_config import load_tokenizer_config
    from enat_jax.training.train_tokenizer import train_tokenizer

    keep_compiled_programs()
    config = load_tokenizer_config(args.config, overrides)
    train_tokenizer(config, args.workdir)
    return 0
