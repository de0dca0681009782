"""Images to token records with a tokenizer."""

from absl import flags

from enat_jax.cli import host_flags
from enat_jax.cli.shared_flags import required, whole_number
from enat_jax.errors import UserError


def define(values: flags.FlagValues) -> None:
    required(values, config="the config file")
    whole_number(values, "batch_size", 16, "images per device")
    flags.DEFINE_string("check", None, "a .png: decode some of the records into it", values)
    host_flags.define(values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    host_flags.connect(args)
    from enat_jax.checkpoints.tokenizer import load_tokenizer
    from enat_jax.config import load_config
    from enat_jax.data.preview import preview
    from enat_jax.data.tokenize import tokenize
    from enat_jax.parallel.hosts import is_primary, primary_only
    from enat_jax.parallel.placement import Placement

    config = load_config(args.config, overrides)
    placement = Placement.of(config.mesh).local  # each host works on images of its own
    tokenizer = load_tokenizer(config.tokenizer, config.model.codebook_size, placement)
    if tokenizer is None:
        raise UserError("config: tokenizer.name = 'none' makes no tokens")
    size, log = args.batch_size * placement.batch_shards, primary_only(print)
    text = encoder = None
    if config.text.name == "clip":
        from enat_jax.checkpoints.text_encoder import load_text_encoder

        text, encoder = load_text_encoder(config.text.weights, placement, warn=log)
    tokenize(
        config,
        tokenizer,
        batch_size=size,
        placement=placement,
        text=text,
        encoder=encoder,
        log=log,
    )
    if args.check and is_primary():
        preview(config.data, tokenizer, args.check)
        print(f"decoded some of the records into {args.check}")
    return 0
