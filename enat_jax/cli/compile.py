"""Compiles a run's programs for devices that are not here: what fits, bytes, FLOPs."""

import dataclasses

from absl import flags

from enat_jax.cli.shared_flags import required, whole_number


def define(values: flags.FlagValues) -> None:
    topologies = "v5e:16x16, v5p:4x4x8, 2xv5e:16x16, h100x8, 4xh100x8"
    required(values, config="the config file", topology=topologies)
    flags.DEFINE_list("programs", ["init", "train", "sample"], "init, train, sample", values)
    flags.DEFINE_bool("only_first", False, "the first training program alone", values)
    flags.DEFINE_bool("suggest", False, "also the largest batch and the remat policy", values)
    whole_number(values, "max_compilations", 12, "of --suggest", at_least=3)
    flags.DEFINE_string("out", None, "where to write the figures as JSON", values)


def run(args: flags.FlagValues, overrides: list[str]) -> int:
    import jax

    # this process compiles on its CPU, whatever else the machine has
    jax.config.update("jax_platforms", "cpu")
    # JAX's cache writes programs for described devices, but cannot read them without the real ones
    jax.config.update("jax_enable_compilation_cache", False)
    from enat_jax.config import load_config
    from enat_jax.errors import UserError
    from enat_jax.files import write_json
    from enat_jax.parallel.accelerators import accelerator_of
    from enat_jax.parallel.placement import Placement
    from enat_jax.parallel.topologies import describe
    from enat_jax.tools.compile import HEADER, compile_programs, programs, suggest

    config = load_config(args.config, overrides)
    devices = describe(args.topology)
    mesh, kind = config.mesh, devices[0].device_kind
    accelerator = accelerator_of(kind)
    if args.suggest and accelerator is None:
        raise UserError(f"--suggest: the memory of {kind!r} is not known")
    print(f"{args.topology}: {len(devices)} x {kind}, mesh data={mesh.data}"
          f" fsdp={mesh.fsdp} tensor={mesh.tensor} {mesh.placement}, remat {config.model.remat},"
          f" batch {config.train.batch_size}; all figures of one device")  # fmt: skip
    print(HEADER)
    reports, fits = [], []
    placement = Placement.of(mesh, devices)
    wanted = programs(config, placement, args.programs, only_first=args.only_first)
    for report in compile_programs(wanted):
        reports.append(report)
        print(report.line())
    if args.suggest:
        fits = suggest(config, devices, most=args.max_compilations)
    if args.out:
        write_json(args.out, {
            "topology": args.topology, "devices": len(devices), "device_kind": kind,
            "accelerator": dataclasses.asdict(accelerator) if accelerator else None,
            "config": dataclasses.asdict(config),
            "programs": [dataclasses.asdict(report) for report in reports],
            "suggestions": [fit._asdict() for fit in fits],
        })  # fmt: skip
    return 0 if all(report.fits is not False for report in reports) else 1
