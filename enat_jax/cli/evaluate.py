"""FID and other scores of a workdir."""

import json

from absl import flags

from enat_jax.cli import host_flags
from enat_jax.cli.shared_flags import generates


def define(values: flags.FlagValues) -> None:
    generates(values, out="the .json to write")
    host_flags.define(values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    host_flags.connect(args)
    from enat_jax.config import override_config
    from enat_jax.evaluation.evaluate import evaluate
    from enat_jax.parallel.compilation import keep_compiled_programs
    from enat_jax.parallel.hosts import primary_only
    from enat_jax.sampling.sampler import restore

    keep_compiled_programs()
    restored = restore(
        args.workdir, step=args.step, overrides=lambda fields: override_config(fields, overrides)
    )
    result = evaluate(restored, args.out, seed=args.seed)
    say = primary_only(print)
    say(json.dumps(result["scores"], indent=2))
    say(f"wrote {args.out}")
    return 0
