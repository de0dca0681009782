"""How alike features are at adjacent generation steps."""

from absl import flags

from enat_jax.cli.shared_flags import generates, restored, whole_number


def define(values: flags.FlagValues) -> None:
    generates(values, out="the folder to write")
    whole_number(values, "images", 3, "images to show maps of", at_most=10**6)
    whole_number(values, "samples", 1000, "images to average over", at_most=10**8)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    from enat_jax.experiments.similarity import similarity

    shown = {"images": args.images, "samples": args.samples, "seed": args.seed}
    similarity(restored(args, overrides), args.out, **shown)
    return 0
