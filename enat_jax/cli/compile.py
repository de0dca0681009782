"""Compiles a run's programs for devices that are not here: what fits, bytes, FLOPs, speed."""

import json
import pathlib

from absl import flags

from enat_jax.cli.shared_flags import required


def define(values: flags.FlagValues) -> None:
    required(
        values,
        config="the config file",
        topology="v5e:16x16, v5p:4x4x8, 2xv5e:16x16, h100x8, 4xh100x8",
    )
    flags.DEFINE_list("programs", ["init", "train", "sample"], "init, train, sample", values)
    flags.DEFINE_bool("only_first", False, "the first training program alone", values)
    flags.DEFINE_bool("suggest", False, "also the largest batch and the remat policy", values)
    flags.DEFINE_integer("max_compilations", 12, "of --suggest", 3, flag_values=values)
    flags.DEFINE_string("out", None, "where to write the figures as JSON", values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    import jax

    # this process compiles on its CPU, whatever else the machine has; jax's own cache writes
    # programs for described devices, but cannot read them
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    from enat_jax.config import load_config
    from enat_jax.errors import UserError
    from enat_jax.parallel.accelerators import accelerator_of
    from enat_jax.parallel.topologies import describe
    from enat_jax.tools.compiler_answers import answers_folder
    from enat_jax.tools.largest_batch import suggest
    from enat_jax.tools.programs import compile_programs
    from enat_jax.tools.report import HEADER, as_fields, lines, suggestion_lines

    config = load_config(args.config, overrides)
    devices = describe(args.topology)
    accelerator = accelerator_of(devices[0].device_kind)
    if args.suggest and accelerator is None:
        raise UserError(f"--suggest: the memory of {devices[0].device_kind!r} is not known")
    folder = answers_folder()
    mesh = config.mesh
    print(f"{args.topology}: {len(devices)} x {devices[0].device_kind}, mesh data={mesh.data}"
          f" fsdp={mesh.fsdp} tensor={mesh.tensor} {mesh.placement}, remat {config.model.remat},"
          f" batch {config.train.batch_size}; all figures of one device", flush=True)  # fmt: skip
    print(HEADER, flush=True)
    reports, fits = [], []
    found = compile_programs(
        config, devices, args.programs, only_first=args.only_first, folder=folder
    )
    for report in found:
        reports.append(report)
        print("\n".join(lines(report)), flush=True)
    if args.suggest and accelerator:
        fits = suggest(
            config, devices, accelerator, most=args.max_compilations, folder=folder,
            say=lambda line: print(line, flush=True),
        )  # fmt: skip
        print("\n".join(suggestion_lines(fits)), flush=True)
    if args.out:
        fields = as_fields(args.topology, devices, accelerator, config, reports, fits)
        pathlib.Path(args.out).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return 0 if all(report.fits is not False for report in reports) else 1
