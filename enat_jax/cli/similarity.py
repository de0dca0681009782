"""How alike features are at adjacent generation steps."""

from absl import flags


def define(values: flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.DEFINE_string("workdir", None, "a run, or its checkpoints", values, required=True)
    flags.DEFINE_string("out", None, "the folder to write", values, required=True)
    flags.DEFINE_integer("images", 3, "images to show maps of", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "samples", 1000, "images to average over", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "of the noise", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_integer(
        "step", None, "which checkpoint; the newest by default", flag_values=values
    )


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    """Does the job; returns the exit code."""
    from enat_jax.config import override_config
    from enat_jax.experiments.similarity import similarity
    from enat_jax.parallel.compilation_cache import keep_compiled_programs
    from enat_jax.sampling.sampler import restore

    keep_compiled_programs()
    restored = restore(
        args.workdir, step=args.step, overrides=lambda fields: override_config(fields, overrides)
    )
    similarity(
        restored,
        args.out,
        images=args.images,
        samples=args.samples,
        seed=args.seed,
        log=lambda line: print(line, flush=True),
    )
    return 0
