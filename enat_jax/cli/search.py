"""Search for a generation strategy of a trained model."""

from absl import flags


def define(values: flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.DEFINE_string("config", None, "the search's config file", values, required=True)
    flags.DEFINE_string("workdir", None, "a run, or its checkpoints", values, required=True)
    flags.DEFINE_string("out", None, "the search's folder, made or gone on in", values,
                        required=True)  # fmt: skip
    flags.DEFINE_integer(
        "step", None, "which checkpoint; the newest by default", flag_values=values
    )


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    """Does the job; returns the exit code."""
    from enat_jax.config import override_config
    from enat_jax.experiments.search.config import load_search_config
    from enat_jax.experiments.search.loop import search
    from enat_jax.experiments.search.training import alternate
    from enat_jax.parallel.compilation_cache import keep_compiled_programs
    from enat_jax.sampling.sampler import restore

    keep_compiled_programs()
    cfg = load_search_config(args.config, overrides)
    restored = restore(
        args.workdir,
        step=args.step,
        overrides=lambda fields: override_config(fields, cfg.generator),
    )
    best = (alternate if cfg.training.rounds else search)(cfg, restored, args.out)
    print(f"wrote {best.path}: {best.value:.6g}, the best of {best.evaluations} evaluations")
    return 0
