"""FID and other scores of a workdir."""

import json

from absl import flags

from enat_jax.cli import host_flags
from enat_jax.cli.shared_flags import generates, restored


def define(values: flags.FlagValues) -> None:
    generates(values)
    goes_on = "the .json to write; what is stopped goes on from beside it"
    flags.DEFINE_string("out", None, goes_on, values)
    host_flags.define(values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    host_flags.connect(args)
    from enat_jax.evaluation.evaluate import evaluate
    from enat_jax.parallel.hosts import primary_only

    result = evaluate(restored(args, overrides), args.out, seed=args.seed)
    say = primary_only(print)
    say(json.dumps(result["scores"], indent=2))
    if args.out is not None:
        say(f"wrote {args.out}")
    return 0
