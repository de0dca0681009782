"""Scores, speed and FLOPs of many generation settings."""

from absl import flags

from enat_jax.cli.shared_flags import required


def define(values: flags.FlagValues) -> None:
    required(values, config="the config file", out="the folder to write")
    flags.DEFINE_string("workdir", None, "the run of points that name none", values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    from enat_jax.config_file import read_config
    from enat_jax.experiments.ablate.config import AblateConfig
    from enat_jax.experiments.ablate.loop import ablate

    # no programs kept from earlier processes: what compiling takes is measured
    ablate(read_config(AblateConfig, args.config, overrides), args.out, workdir=args.workdir)
    return 0
