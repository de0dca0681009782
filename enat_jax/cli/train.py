"""Trains, or goes on where a workdir ends."""

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
    from enat_jax.config import load_config
    from enat_jax.parallel.compilation_cache import keep_compiled_programs
    from enat_jax.training.train import train

    keep_compiled_programs()
    train(load_config(args.config, overrides), args.workdir)
    return 0
