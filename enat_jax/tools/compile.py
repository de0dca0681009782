"""Compiles every program of a run for devices that are not here, to see what each needs."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from enat_jax.config import Config
from enat_jax.errors import UserError
from enat_jax.models.flops import generation_flops, training_flops
from enat_jax.parallel.accelerators import accelerator_of
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.program import GenerationProgram
from enat_jax.training.programs import TrainingPrograms

KINDS = ("init", "train", "sample")
HEADER = "program fits |  GiB: args outputs    temp    peak | TFLOP by formula | compile s"

_AT_ONCE = 3  # a compilation keeps less than two cores busy, and takes some GB
# Triton's products have tile sizes that are found by trying them on the GPU: without one, cuBLAS
_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}}


@dataclass(frozen=True)
class Program:
    """A program for a device and its like, there or not; `model_flops` are of one, by formula."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    model_flops: float
    device: Any


@dataclass(frozen=True)
class Report:
    """What a program needs of one device.

    Attributes:
        name: the program's.
        model_flops: matrix products by the model's formula.
        fits: whether the device has room for it; None where its memory is not known.
        memory: bytes of `arguments`, `outputs`, `aliased` (outputs that lie where arguments were),
            `temporaries`, `code`, and of all at once, `peak`; None where it did not compile.
        problem: what the compiler said where it does not fit.
        compile_seconds: to compile it.
    """

    name: str
    model_flops: float
    fits: bool | None
    memory: dict[str, int] | None
    problem: str
    compile_seconds: float

    def line(self) -> str:
        """A line below `HEADER`."""
        fits = {True: "yes", False: "NO", None: "?"}[self.fits]
        needs = f" {self.problem}"
        if self.memory is not None:
            kinds = ("arguments", "outputs", "temporaries", "peak")
            needs = "".join(f"{self.memory[kind] / 2**30:8.2f}" for kind in kinds).rjust(35)
        return (
            f"{self.name:8}{fits:4} |{needs} | {self.model_flops / 1e12:16.4f} |"
            f"{self.compile_seconds:10.1f}"
        )


class Fit(NamedTuple):
    """The largest batch that was seen to fit under a remat policy; 0 images where none did."""

    remat: str
    images_per_device: float
    batch_size: int
    compilations: int


def unknown_sizes(config: Config) -> list[str]:
    """Says which sizes of a network nobody knows without its records."""
    of_condition = {"class": ("num_classes",), "text": ("text_length", "text_width")}
    return [f"model.{name} = 0 is read from records: give a number"
            for name in (*of_condition[config.model.condition], "codebook_size")
            if getattr(config.model, name) == 0]  # fmt: skip


def programs(
    config: Config, placement: Placement, kinds: Sequence[str] = KINDS, *, only_first: bool = False
) -> Iterator[Program]:
    """The programs of a run on devices that need not be there, of the kinds asked for.

    These are `init`, `train` (as many as `train.programs`, which differ in their plans alone; or
    `only_first`) and `sample` (token ids).

    Raises:
        UserError: an unknown kind, a config that leaves numbers to the records, or a batch that
            does not divide over the mesh.
    """
    problems = [f"no program is called {kind!r}, there are {', '.join(KINDS)}" for kind in kinds
                if kind not in KINDS]  # fmt: skip
    if problems := problems + unknown_sizes(config):
        raise UserError("; ".join(problems))
    device, count = placement.mesh.devices.flat[0], placement.mesh.devices.size
    if "init" in kinds or "train" in kinds:
        run = TrainingPrograms(config, placement)
        if "init" in kinds:
            yield Program("init", run.initial_state.lower, 0.0, device)
        if "train" in kinds:
            share = config.train.batch_size / count
            for number, row in enumerate(run.rows[:1] if only_first else run.rows):
                shapes = [stratum.shape for stratum in row]
                flops = share * training_flops(config.model, shapes)
                lower = functools.partial(run.programs[number].lower, *run.arguments)
                yield Program(f"train{number}", lower, flops, device)
    if "sample" in kinds:
        generation = GenerationProgram(config, placement, None)
        layout, _ = generation.plan()
        share = generation.batch_size() / count
        flops = share * generation_flops(config.model, layout.buckets, padded=False)
        yield Program("sample", lambda: generation.lower(output="token_ids"), flops, device)


def compile_programs(wanted: Iterable[Program]) -> Iterator[Report]:
    """Compiles programs, some side by side, as `compile_program` does; reports come in order."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(compile_program, wanted)


def compile_program(program: Program) -> Report:
    """Compiles a program; that it does not fit is a result, not an error.

    Raises:
        jax.errors.JaxRuntimeError: whatever the compiler complains about but memory.
    """
    lowered, device = program.lower(), program.device
    start, memory, problem = time.perf_counter(), None, ""
    try:
        analysis: Any = lowered.compile(_OPTIONS.get(device.platform)).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        if "RESOURCE_EXHAUSTED" not in problem:
            raise
    else:
        memory = {
            "arguments": analysis.argument_size_in_bytes,
            "outputs": analysis.output_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
            "code": analysis.generated_code_size_in_bytes,
            "aliased": analysis.alias_size_in_bytes,
        }
        memory["peak"] = sum(memory.values()) - 2 * memory["aliased"]
    seconds, accelerator = time.perf_counter() - start, accelerator_of(device.device_kind)
    fits = memory is not None and accelerator and memory["peak"] <= accelerator.memory
    return Report(program.name, program.model_flops, fits, memory, problem, seconds)


def suggest(
    config: Config, devices: Sequence[Any], *, most: int, log: Callable[[str], object] = print
) -> list[Fit]:
    """Looks for the largest batch that fits, for each remat policy; the best policy first.

    That is the one that computes least again of those whose batch is at least the config's; where
    none is, the one with the largest batch. Compiled is the training program that does most.
    The search starts from the config's batch and compiles `most` times at most, a third for each
    policy; `devices` are as `topologies.describe` gives them, of a kind whose memory is known.
    """
    placement, cfg = Placement.of(config.mesh, devices), config.train
    unit = placement.batch_shards * cfg.images_per_row * cfg.accumulation
    asked: list[str] = []

    def fit(remat: str, rows: int) -> bool:
        asked.append(remat)
        model = dataclasses.replace(config.model, remat=remat)
        train = dataclasses.replace(cfg, batch_size=unit * rows)
        changed = dataclasses.replace(config, model=model, train=train)
        wanted = max(programs(changed, placement, ("train",)), key=lambda p: p.model_flops)
        report = compile_program(wanted)
        log(f"remat {remat}, batch {unit * rows}: {report.line()}")
        return bool(report.fits)

    fits = []
    for remat in ("none", "dots", "block"):
        start = max(cfg.batch_size // unit, 1)
        rows = largest_fitting(functools.partial(fit, remat), start, most // 3)
        fits.append(Fit(remat, unit * rows / len(devices), unit * rows, asked.count(remat)))
    fits.sort(key=lambda fit: -min(fit.batch_size, cfg.batch_size))
    remat, batch = fits[0].remat, fits[0].batch_size
    advice = f"--config.model.remat={remat} --config.train.batch_size={batch}"
    made = f"after {len(asked)} compilations"
    log(f"suggested {made}: {advice}" if batch else f"nothing fits {made}: take more devices")
    return fits


def largest_fitting(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest number seen to fit, by doubling or halving `start`, `most` times; 0 for none."""
    best, number = 0, start
    for _ in range(most):
        if fits(number):
            best = number
            if number < start:
                return best
            number *= 2
        elif best or number == 1:
            return best
        else:
            number //= 2
    return best
