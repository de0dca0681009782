"""Published weights to a checkpoint."""

import sys

from absl import flags

from enat_jax.errors import UserError


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("kind", None, ["enat", "autonat", "vqgan", "clip_text", "inception"],
                      "whose weights; inception's are read straight from the published file and"
                      " are only checked here", values, required=True)  # fmt: skip
    flags.DEFINE_string("source", None,
                        "a .pth, .ckpt or .safetensors file; vqgan: MaskGIT's Flax files as well",
                        values, required=True)  # fmt: skip
    flags.DEFINE_string("key", None, "the entry of a training checkpoint; not inception", values)
    flags.DEFINE_string("config", None, "says what weights cannot; enat, autonat", values)
    flags.DEFINE_multi_string("verify", [], "recorded arrays (.npz) to replay", values)
    flags.DEFINE_float("tolerance", None, "largest difference accepted; by default 5e-5 (enat),"
                       " 1e-4 (autonat, vqgan), 1e-5 (clip_text), 1e-3 of the largest feature"
                       " (inception)",
                       0, 1e30, flag_values=values)  # fmt: skip
    flags.DEFINE_string("out", None, "the workdir to write; not inception", values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    from enat_jax.config import load_config
    from enat_jax.convert.published import KINDS, write_checkpoint
    from enat_jax.convert.verify import verify_files

    kind = KINDS[args.kind]
    given = [name for name in ("config", "key", "out") if args[name].value is not None]
    if idle := [f"--{name}" for name in given if name not in kind.takes]:
        raise UserError(f"--kind={args.kind} takes no {', '.join(idle)}")
    how = {name: args[name].value for name in given if name != "out"}
    if "config" in how:
        how["config"] = load_config(args.config, overrides)
    imported = kind.read(args.source, **how)
    print(f"{args.source} fits: {imported.what}")
    comparisons = verify_files(imported.model, args.verify)
    tolerance = kind.tolerance if args.tolerance is None else args.tolerance
    for comparison in comparisons:
        print(comparison.row(tolerance))
    if any(comparison.fails(tolerance) for comparison in comparisons):
        print(f"beyond tolerance {tolerance:g}", file=sys.stderr)
        return 1
    if args.out:
        write_checkpoint(imported, args.out)
        print(f"wrote the checkpoint to {args.out}")
    return 0
