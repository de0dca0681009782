"""Scores, speed and FLOPs of many generation settings."""

from absl import flags


def define(values: flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.DEFINE_string("config", None, "the config file", values, required=True)
    flags.DEFINE_string("out", None, "the folder to write", values, required=True)
    flags.DEFINE_string("workdir", None, "the run of points that name none", values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    """Does the job; returns the exit code."""
    from enat_jax.experiments.ablate.config import load_ablation
    from enat_jax.experiments.ablate.loop import ablate

    # no programs kept from earlier processes: what compiling takes is measured
    ablate(
        load_ablation(args.config, overrides),
        args.out,
        workdir=args.workdir,
        log=lambda line: print(line, flush=True),
    )
    return 0
