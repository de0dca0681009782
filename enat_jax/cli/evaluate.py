"""FID and other scores of a workdir."""

import json

from absl import flags

from enat_jax.cli import host_flags


def define(values: flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.DEFINE_string("workdir", None, "a run, or its checkpoints", values, required=True)
    flags.DEFINE_string(
        "out", None, "the .json to write; what is stopped goes on from beside it", values
    )
    flags.DEFINE_integer("seed", 0, "of the noise", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_integer(
        "step", None, "which checkpoint; the newest by default", flag_values=values
    )
    host_flags.define(values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    """Does the job; returns the exit code."""
    host_flags.connect(args)
    from enat_jax.config import override_config
    from enat_jax.evaluation.evaluate import evaluate
    from enat_jax.parallel.compilation_cache import keep_compiled_programs
    from enat_jax.parallel.hosts import speaker
    from enat_jax.sampling.sampler import restore

    keep_compiled_programs()
    restored = restore(
        args.workdir, step=args.step, overrides=lambda fields: override_config(fields, overrides)
    )
    result = evaluate(restored, args.out, seed=args.seed)
    say = speaker(print)
    say(json.dumps(result["scores"], indent=2))
    if args.out is not None:
        say(f"wrote {args.out}")
    return 0
