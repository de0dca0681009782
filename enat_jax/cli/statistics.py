"""Real images' statistics, for FID."""

from absl import flags

from enat_jax.cli import host_flags
from enat_jax.cli.shared_flags import required, whole_number
from enat_jax.errors import UserError


def define(values: flags.FlagValues) -> None:
    required(values, config="the config file", out="the .npz to write")
    whole_number(values, "size", None, "pixels per side; the config's by default")
    host_flags.define(values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    host_flags.connect(args)
    from enat_jax.checkpoints.tokenizer import load_tokenizer
    from enat_jax.config import load_config
    from enat_jax.evaluation.statistics import reference_statistics
    from enat_jax.parallel.placement import Placement

    config = load_config(args.config, overrides)
    size = args.size
    if size is None:
        tokenizer = load_tokenizer(config.tokenizer, config.model.codebook_size)
        if tokenizer is None:
            raise UserError("tokenizer.name = 'none' does not tell the images' size: give --size")
        size = config.tokenizer.grid[0] * tokenizer.patch
    placement = Placement.of(config.mesh)
    reference_statistics(config.images, config.evaluate, args.out, size=size, placement=placement)
    return 0
