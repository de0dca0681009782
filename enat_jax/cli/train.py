"""Trains, or goes on where a workdir ends."""

from absl import flags

from enat_jax.cli import host_flags
from enat_jax.cli.shared_flags import required


def define(values: flags.FlagValues) -> None:
    required(values, config="the config file", workdir="where the run lives")
    host_flags.define(values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    host_flags.connect(args, listens=True)
    from enat_jax.config import load_config
    from enat_jax.training.train import train

    train(load_config(args.config, overrides), args.workdir)
    return 0
