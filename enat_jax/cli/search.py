"""Search for a generation strategy of a trained model."""

from absl import flags

from enat_jax.cli.shared_flags import generates, required, restored


def define(values: flags.FlagValues) -> None:
    required(values, config="the search's config file")
    generates(values, out="the search's folder, made or gone on in", seed=False)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    from enat_jax.config_file import read_config
    from enat_jax.experiments.search.config import SearchConfig
    from enat_jax.experiments.search.loop import search
    from enat_jax.experiments.search.training import alternate

    cfg = read_config(SearchConfig, args.config, overrides)
    run = restored(args, cfg.generator)
    best = (alternate if cfg.training.rounds else search)(cfg, run, args.out)
    print(f"wrote {best.path}: {best.value:.6g}, the best of {best.evaluations} evaluations")
    return 0
