"""The command line: `enat VERB --flag=value ...`, one verb per job."""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from enat_jax.errors import UserError


class Verb(NamedTuple):
    """A job: what it does, the flags it takes, and the function that does it."""

    summary: str
    define: Callable[[flags.FlagValues], None]
    run: Callable[[flags.FlagValues, list[str]], int]


def _define_train(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "the config file", values, required=True)
    flags.DEFINE_string("workdir", None, "where the run lives", values, required=True)


def _train(args: flags.FlagValues, overrides: list[str]) -> int:
    from enat_jax.compilation_cache import keep_compiled_programs
    from enat_jax.config import load_config
    from enat_jax.train import train

    keep_compiled_programs()
    train(load_config(args.config, overrides), args.workdir)
    return 0


def _define_sample(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "a run, or its checkpoints", values, required=True)
    flags.DEFINE_string("out", None, "a .png, a folder, or a .npz", values, required=True)
    flags.DEFINE_enum("format", "grid", ["grid", "png", "npz", "tokens"],
                      "a labelled grid, single PNGs, the ADM suite's npz, or token ids",
                      values)  # fmt: skip
    flags.DEFINE_list("classes", [], "class ids, such as 3,7; all by default", values)
    flags.DEFINE_integer("per_class", 10, "images of each class", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the noise", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_integer(
        "step", None, "which checkpoint; the newest by default", flag_values=values
    )


def _sample(args: flags.FlagValues, overrides: list[str]) -> int:
    import numpy as np
    from tqdm import tqdm

    from enat_jax import images
    from enat_jax.compilation_cache import keep_compiled_programs
    from enat_jax.config import override_config
    from enat_jax.sample import load

    keep_compiled_programs()
    sampler = load(
        args.workdir, step=args.step, overrides=lambda fields: override_config(fields, overrides)
    )
    try:
        classes = [int(text) for text in args.classes]
    except ValueError as error:
        raise UserError(f"--classes={','.join(args.classes)}: {error}") from error
    wanted = np.repeat(classes or np.arange(sampler.config.model.num_classes), args.per_class)
    out = pathlib.Path(args.out)
    if args.format in ("npz", "tokens") and out.suffix != ".npz":
        raise UserError(f"--out={out} must end in .npz for --format={args.format}")
    print(sampler.describe())
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "tokens":
        tokens = np.concatenate(list(sampler.token_batches(wanted, seed=args.seed)))
        np.savez(out, token_ids=tokens, class_ids=wanted)
    else:
        with tqdm(total=len(wanted), unit="image", disable=None) as bar:
            pictures = sampler.sample(wanted, seed=args.seed, progress=bar.update)
        if args.format == "grid":
            names = [*sampler.class_names, "any"]
            images.write_png(out, images.image_grid(pictures, [names[c] for c in wanted]))
        elif args.format == "png":
            images.write_pngs(out, pictures, wanted)
        else:
            images.write_npz(out, pictures, wanted)
    print(f"wrote {len(wanted)} images to {out}")
    return 0


def _define_convert(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("kind", None, ["enat"], "whose weights", values, required=True)
    flags.DEFINE_string("source", None, "a .pth or .safetensors file", values, required=True)
    flags.DEFINE_string("key", None, "the entry of a training checkpoint", values)
    flags.DEFINE_string("config", None, "says what weights cannot", values)
    flags.DEFINE_multi_string("verify", [], "recorded arrays (.npz) to replay", values)
    flags.DEFINE_float("tolerance", 5e-5, "largest difference accepted", flag_values=values)
    flags.DEFINE_string("out", None, "the workdir to write", values)


def _convert(args: flags.FlagValues, overrides: list[str]) -> int:
    from enat_jax.config import load_config
    from enat_jax.convert.published import convert_enat, report, verify_enat, write_checkpoint

    config = load_config(args.config, overrides) if args.config else None
    config, params = convert_enat(args.source, config=config, key=args.key)
    print(f"{args.source} fits: {config.model}")
    if args.verify and not report(verify_enat(config, params, args.verify), args.tolerance, print):
        print(f"beyond tolerance {args.tolerance:g}", file=sys.stderr)
        return 1
    if args.out:
        write_checkpoint(config, params, args.out)
        print(f"wrote the checkpoint to {args.out}")
    return 0


def _define_bench(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "the config file", values, required=True)
    flags.DEFINE_list("what", ["sample"], "sample, train, or both", values)
    flags.DEFINE_list("batch_sizes", ["1"], "images per call of the sampler", values)
    flags.DEFINE_list("dtypes", [], "float32, bfloat16; the config's by default", values)
    flags.DEFINE_enum("layers", "auto", ["auto", "stacked", "unstacked"],
                      "how the sampler lays out depth", values)  # fmt: skip
    flags.DEFINE_integer(
        "repeats", 5, "timed calls of each case", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("out", None, "where to write the JSON as well", values)


def _bench(args: flags.FlagValues, overrides: list[str]) -> int:
    from enat_jax.bench import bench
    from enat_jax.config import load_config

    try:
        batch_sizes = [int(text) for text in args.batch_sizes]
    except ValueError as error:
        raise UserError(f"--batch_sizes={','.join(args.batch_sizes)}: {error}") from error
    result = bench(
        load_config(args.config, overrides),
        what=args.what,
        batch_sizes=batch_sizes,
        dtypes=args.dtypes,
        layers=args.layers,
        repeats=args.repeats,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        pathlib.Path(args.out).write_text(text + "\n", encoding="utf-8")
    return 0


VERBS = {
    "train": Verb("trains, or goes on where a workdir ends", _define_train, _train),
    "sample": Verb("images of given classes from a workdir", _define_sample, _sample),
    "convert": Verb("published weights to a checkpoint", _define_convert, _convert),
    "bench": Verb("speed, FLOPs and memory as JSON", _define_bench, _bench),
}


def main(arguments: list[str]) -> int:
    """Runs one verb; returns the exit code."""
    if not arguments or arguments[0] not in VERBS:
        lines = [f"  {name:10}{verb.summary}" for name, verb in VERBS.items()]
        asked = arguments and arguments[0] not in ("-h", "--help", "help")
        complaint = [f"enat: no verb {arguments[0]!r}"] if asked else []
        print("\n".join([*complaint, "usage: enat VERB --flag=value ...", *lines,
                         "`enat VERB --help` lists a verb's flags."]),
              file=sys.stderr if asked else sys.stdout)  # fmt: skip
        return 2 if asked else 0
    name, *rest = arguments
    verb = VERBS[name]
    values = flags.FlagValues()
    verb.define(values)
    if any(argument in ("-h", "--help") for argument in rest):
        print(f"enat {name}: {verb.summary}\n{values.get_help()}")
        print("\n  --config.SECTION.FIELD=value overrides a field of the config.")
        return 0
    prefix = "--config."
    overrides = [text.removeprefix(prefix) for text in rest if text.startswith(prefix)]
    try:
        left = values([name, *(text for text in rest if not text.startswith(prefix))])
        if len(left) > 1:
            raise UserError(f"no such argument: {' '.join(left[1:])}")
        return verb.run(values, overrides)
    except (UserError, flags.Error, OSError) as error:
        message = " ".join(str(error).split())
        print(f"enat {name}: {message}", file=sys.stderr)
        return 1


def run() -> Any:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
