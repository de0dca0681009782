"""How alike features are at adjacent generation steps."""

from absl import flags

from enat_jax.cli.shared_flags import generates, restored


def define(values: flags.FlagValues) -> None:
    generates(values, out="the folder to write")
    flags.DEFINE_integer("images", 3, "images to show maps of", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "samples", 1000, "images to average over", lower_bound=1, flag_values=values
    )


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    from enat_jax.experiments.similarity import similarity

    similarity(
        restored(args, overrides),
        args.out,
        images=args.images,
        samples=args.samples,
        seed=args.seed,
    )
    return 0
