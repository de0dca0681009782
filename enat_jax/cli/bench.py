"""Speed, FLOPs and memory as JSON."""

import json
import sys

from absl import flags

from enat_jax.cli.shared_flags import required, whole_number, whole_numbers


def define(values: flags.FlagValues) -> None:
    required(values, config="the config file")
    flags.DEFINE_list("what", ["sample"], "sample, train, encode, decode, flops", values)
    flags.DEFINE_list("batch_sizes", ["1"], "images per call of the sampler", values)
    flags.DEFINE_list("dtypes", [], "float32, bfloat16; the config's by default", values)
    flags.DEFINE_enum("layers", "auto", ["auto", "stacked", "unstacked"],
                      "how the sampler lays out depth", values)  # fmt: skip
    whole_number(values, "repeats", 5, "timed calls of each case")
    flags.DEFINE_string("out", None, "where to write the JSON as well", values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    from enat_jax.config import load_config
    from enat_jax.files import write_text
    from enat_jax.tools.bench import bench

    result = bench(
        load_config(args.config, overrides),
        what=args.what,
        batch_sizes=whole_numbers(args, "batch_sizes"),
        dtypes=args.dtypes,
        layers=args.layers,
        repeats=args.repeats,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        write_text(args.out, text + "\n")
    return 0
