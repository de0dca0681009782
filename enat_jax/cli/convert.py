"""Published weights to a checkpoint."""

import sys

from absl import flags

from enat_jax.errors import UserError


def define(values: flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.DEFINE_enum("kind", None, ["enat", "autonat", "vqgan", "inception"],
                      "whose weights; inception's are read straight from the published file and"
                      " are only checked here", values, required=True)  # fmt: skip
    flags.DEFINE_string("source", None,
                        "a .pth, .ckpt or .safetensors file; vqgan: MaskGIT's Flax files as well",
                        values, required=True)  # fmt: skip
    flags.DEFINE_string("key", None, "the entry of a training checkpoint; not inception", values)
    flags.DEFINE_string("config", None, "says what weights cannot; enat, autonat", values)
    flags.DEFINE_multi_string("verify", [], "recorded arrays (.npz) to replay", values)
    flags.DEFINE_float("tolerance", None, "largest difference accepted; by default 5e-5 (enat),"
                       " 1e-4 (autonat, vqgan), 1e-3 of the largest feature (inception)",
                       flag_values=values)  # fmt: skip
    flags.DEFINE_string("out", None, "the workdir to write; not inception", values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    """Does the job; returns the exit code."""
    from functools import partial

    from enat_jax.config import load_config
    from enat_jax.convert import published
    from enat_jax.evaluation import inception_weights as inception

    idle = {"vqgan": ["config"], "inception": ["config", "key", "out"]}.get(args.kind, [])
    if given := [f"--{name}" for name in idle if args[name].value is not None]:
        raise UserError(f"--kind={args.kind} takes no {', '.join(given)}")
    write = None
    if args.kind in ("enat", "autonat"):
        config = load_config(args.config, overrides) if args.config else None
        config, params = published.convert_network(
            args.source, name=args.kind, config=config, key=args.key
        )
        print(f"{args.source} fits: {config.model}")
        found = published.replay_network(config, params, args.verify)
        tolerance = 5e-5 if args.kind == "enat" else 1e-4
        write = partial(published.write_checkpoint, config, params)
    elif args.kind == "vqgan":
        vqgan, params = published.convert_vqgan(args.source, key=args.key)
        print(f"{args.source} fits: {vqgan}")
        found, tolerance = published.replay_vqgan(vqgan, params, args.verify), 1e-4
        write = partial(published.write_vqgan, vqgan, params, source=args.source)
    else:
        network = inception.load_inception(args.source)
        print(f"{args.source} is FID's Inception; give its path where the network is wanted")
        found, tolerance = published.replay_inception(network, args.verify), 1e-3
    tolerance = tolerance if args.tolerance is None else args.tolerance
    if not published.report(found, tolerance, print):
        print(f"beyond tolerance {tolerance:g}", file=sys.stderr)
        return 1
    if write and args.out:
        write(args.out)
        print(f"wrote the checkpoint to {args.out}")
    return 0
