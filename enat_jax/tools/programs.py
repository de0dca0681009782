"""Compiles every program of a run for devices that are not here, to see what each needs."""

import functools
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from enat_jax.config import Config
from enat_jax.errors import UserError
from enat_jax.models.flops import generation_flops, training_flops
from enat_jax.parallel.accelerators import Accelerator, accelerator_of
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.program import GenerationProgram
from enat_jax.tools.compiler_answers import Memory, ask_compiler
from enat_jax.tools.hlo import ProgramCounts, count_program
from enat_jax.tools.roofline import Prediction, predict
from enat_jax.training.programs import TrainingPrograms

KINDS = ("init", "train", "sample")


@dataclass(frozen=True)
class Program:
    """A program that can be lowered without its devices.

    Attributes:
        name: `init`, `train0` and so on, `sample`.
        lower: lowers it.
        model_flops: matrix products on one device by the model's formula.
        devices: what it is lowered for.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    model_flops: float
    devices: Sequence[Any]


@dataclass(frozen=True)
class Report:
    """What a program needs.

    Attributes:
        name: the program's.
        fits: whether a device has room for it; None where its memory is not known.
        problem: what the compiler said where it does not fit.
        needed: bytes of a device's memory, as far as the compiler named them.
        memory: in detail, where it compiled.
        model_flops: matrix products on one device by the model's formula.
        counts: what one device does, where it compiled.
        prediction: what that lets expect, of accelerators whose figures are known.
        lower_seconds: to trace and lower it.
        compile_seconds: to compile it, when that was done.
        kept: whether it was compiled at an earlier time.
    """

    name: str
    fits: bool | None
    problem: str
    needed: int | None
    memory: Memory | None
    model_flops: float
    counts: ProgramCounts | None
    prediction: Prediction | None
    lower_seconds: float
    compile_seconds: float
    kept: bool


def programs(
    config: Config, placement: Placement, kinds: Sequence[str] = KINDS
) -> Iterator[Program]:
    """The programs of a run on a mesh, of the kinds asked for.

    Args:
        config: the experiment.
        placement: on devices that need not be there.
        kinds: any of `init`, `train` (as many as `train.programs`) and `sample` (token ids).

    Raises:
        UserError: an unknown kind, a config that leaves numbers to the records, or a batch that
            does not divide over the mesh.
    """
    check(config, kinds)
    devices = list(placement.mesh.devices.flat)
    if "init" in kinds or "train" in kinds:
        run = TrainingPrograms(config, placement)
        if "init" in kinds:
            yield Program("init", run.initial_state.lower, 0.0, devices)
        if "train" in kinds:
            share = config.train.batch_size / placement.mesh.devices.size
            for number, plans in enumerate(run.plans):
                flops = share * training_flops(config.model, plans)
                lower = functools.partial(run.programs[number].lower, *run.arguments)
                yield Program(f"train{number}", lower, flops, devices)
    if "sample" in kinds:
        generation = GenerationProgram(config, placement, None)
        layout, _ = generation.plan()
        share = generation.batch_size() / placement.mesh.devices.size
        flops = share * generation_flops(config.model, layout.buckets, padded=False)
        yield Program("sample", lambda: generation.lower(output="token_ids"), flops, devices)


def check(config: Config, kinds: Sequence[str]) -> None:
    """Refuses what cannot be compiled, in one line."""
    problems = [f"no program is called {kind!r}, there are {', '.join(KINDS)}" for kind in kinds
                if kind not in KINDS]  # fmt: skip
    problems += [f"model.{name} = 0 is read from records: give a number"
                 for name in ("num_classes", "codebook_size")
                 if getattr(config.model, name) == 0]  # fmt: skip
    if problems:
        raise UserError("; ".join(problems))


def compile_programs(
    config: Config,
    devices: Sequence[Any],
    kinds: Sequence[str] = KINDS,
    *,
    only_first: bool = False,
    folder: pathlib.Path | None = None,
    at_once: int = 3,
) -> Iterator[Report]:
    """Compiles the programs of a run; their reports come in order.

    Args:
        config: the experiment; its mesh must fit the devices.
        devices: as `topologies.describe` gives them.
        kinds: as for `programs`.
        only_first: only the first of the training programs, which differ in their plans alone.
        folder: where the compiler's answers are kept, see `ask_compiler`.
        at_once: programs compiled side by side: a compilation keeps less than two cores busy, and
            takes some GB.
    """
    accelerator = accelerator_of(devices[0].device_kind)
    wanted = [
        program
        for program in programs(config, Placement.of(config.mesh, devices), kinds)
        if not (only_first and re.fullmatch(r"train[1-9]\d*", program.name))
    ]
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(lambda each: compile_program(each, accelerator, folder), wanted)


def compile_program(
    program: Program, accelerator: Accelerator | None, folder: pathlib.Path | None = None
) -> Report:
    """Compiles one program and reads what it needs.

    A program that does not fit is a finding, not an error; the compiler's other complaints are
    raised as they are.

    Args:
        program: what to compile.
        accelerator: what its devices are; None where their figures are not known.
        folder: where the compiler's answers are kept, see `ask_compiler`.
    """
    start = time.perf_counter()
    lowered = program.lower()
    seconds = time.perf_counter() - start
    answer = ask_compiler(lowered, program.devices, folder)
    counts = None if answer.text is None else count_program(answer.text)
    fits = False if answer.memory is None else None
    if answer.memory and accelerator:
        fits = answer.memory.peak <= accelerator.memory
    return Report(
        name=program.name,
        fits=fits,
        problem=answer.problem,
        needed=answer.needed,
        memory=answer.memory,
        model_flops=program.model_flops,
        counts=counts,
        prediction=(
            predict(counts, program.model_flops, accelerator) if counts and accelerator else None
        ),
        lower_seconds=seconds,
        compile_seconds=answer.seconds,
        kept=answer.kept,
    )
