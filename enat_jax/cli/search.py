"""Search for a generation strategy of a trained model."""

from absl import flags

from enat_jax.cli.shared_flags import generates, required


def define(values: flags.FlagValues) -> None:
    required(values, config="the search's config file")
    generates(values, out="the search's folder, made or gone on in", seed=False)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    from enat_jax.config import override_config
    from enat_jax.config_file import read_config
    from enat_jax.experiments.search.config import SearchConfig
    from enat_jax.experiments.search.loop import search
    from enat_jax.experiments.search.training import alternate
    from enat_jax.parallel.compilation import keep_compiled_programs
    from enat_jax.sampling.sampler import restore

    keep_compiled_programs()
    cfg = read_config(SearchConfig, args.config, overrides)
    restored = restore(
        args.workdir,
        step=args.step,
        overrides=lambda fields: override_config(fields, cfg.generator),
    )
    best = (alternate if cfg.training.rounds else search)(cfg, restored, args.out)
    print(f"wrote {best.path}: {best.value:.6g}, the best of {best.evaluations} evaluations")
    return 0
