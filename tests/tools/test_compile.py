"""Compiling a run's programs for devices that are not here, and what is reported of them."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from enat_jax.__main__ import main
from enat_jax.models.flops import training_flops
from enat_jax.parallel.accelerators import Accelerator
from enat_jax.parallel.placement import Placement
from enat_jax.parallel.topologies import describe
from enat_jax.tools import compile as tool
from enat_jax.tools.compile import HEADER, Program, Report, compile_program, programs
from enat_jax.training.programs import TrainingPrograms
from tests.support.on_hosts import xla_flags

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
REPORT = Report("train0", 1e12, True, {"arguments": 2**30, "outputs": 2**30, "aliased": 2**30,
                "temporaries": 2**31, "code": 0, "peak": 3 * 2**30}, "", 12.5)  # fmt: skip
REFUSED = dataclasses.replace(
    REPORT, fits=False, memory=None, problem="RESOURCE_EXHAUSTED: Used 94.70G of 15.75G hbm."
)


def program(lower=None):
    """One matrix product of a square."""
    shape = jax.ShapeDtypeStruct((8, 8), "float32")
    product = jax.jit(lambda x: jnp.tanh(x) @ x)
    return Program("train0", lower or (lambda: product.lower(shape)), 1e12, jax.devices()[0])


class Full(jax.stages.Lowered):
    """A program that its compiler refuses."""

    def __init__(self, message):
        self.message = message

    def compile(self, *_, **__):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.fixture
def card(monkeypatch):
    """Makes a CPU an accelerator of so many bytes."""

    def of(memory):
        monkeypatch.setattr(tool, "accelerator_of", lambda _: Accelerator("card", (), 1e12, memory))

    return of


@pytest.fixture
def verb(tiny_overrides, monkeypatch):
    """Runs the verb in this process, whose configuration of JAX stays as it is."""
    monkeypatch.setattr(type(jax.config), "update", lambda *_: None)
    flags = ["--config=configs/digits.py", *(f"--config.{text}" for text in tiny_overrides)]
    return lambda *arguments: main(["compile", *flags, *arguments])


def test_every_program_of_a_run_is_there_and_nothing_is_allocated(tiny_config):
    config = tiny_config("train.programs=2")
    placement = Placement.of(config.mesh, describe("cpux1"))
    before = len(jax.live_arrays())
    made = {each.name: each for each in programs(config, placement)}
    made["init"].lower()
    assert max((array.size for array in jax.live_arrays()[before:]), default=0) < 100
    assert list(made) == ["init", "train0", "train1", "sample"]
    shapes = [stratum.shape for stratum in TrainingPrograms(config, placement).rows[1]]
    assert made["train1"].model_flops == 8 * training_flops(config.model, shapes)
    first = programs(config, placement, ["train"], only_first=True)
    assert [each.name for each in first] == ["train0"]


def test_bytes_are_the_compilers():
    report = compile_program(program())
    analysis = program().lower().compile().memory_analysis()
    memory = report.memory
    assert memory["arguments"] == analysis.argument_size_in_bytes == 8 * 8 * 4
    assert memory["outputs"] == analysis.output_size_in_bytes
    assert memory["temporaries"] == analysis.temp_size_in_bytes
    parts = sum(memory[part] for part in ("arguments", "outputs", "temporaries", "code"))
    assert memory["peak"] == parts - memory["aliased"]
    assert report.fits is None  # nobody knows the memory of a device called cpu


def test_a_program_fits_if_its_peak_does(card):
    peak = compile_program(program()).memory["peak"]
    for memory, fits in ((peak, True), (peak - 1, False)):
        card(memory)
        assert compile_program(program()).fits is fits


def test_what_the_compiler_refuses_for_memory_is_a_result():
    report = compile_program(program(lower=lambda: Full(REFUSED.problem)))
    assert report == dataclasses.replace(REFUSED, compile_seconds=report.compile_seconds)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID"):
        compile_program(program(lower=lambda: Full("INVALID_ARGUMENT: no")))


def test_a_line_has_the_headers_columns():
    line = REPORT.line()
    assert line.startswith("train0  yes")
    assert line.split("|")[1].split() == ["1.00", "1.00", "2.00", "3.00"]
    assert line.rindex("|") == HEADER.rindex("|")


def test_what_does_not_fit_is_shown_and_the_exit_code_says_so(verb, monkeypatch, capsys):
    monkeypatch.setattr(tool, "compile_programs", lambda *_: [REPORT, REFUSED])
    assert verb("--topology=cpux1") == 1
    *_, fitting, refused = capsys.readouterr().out.splitlines()
    assert fitting == REPORT.line()
    assert refused.startswith("train0  NO")
    assert "Used 94.70G of 15.75G" in refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e"], "topology 'v5e' is unknown; known are v5e:16x16"),
        (["--topology=cpux1", "--programs=train,evaluate"], "no program is called 'evaluate'"),
        (["--topology=cpux1", "--config.model.num_classes=0"], "model.num_classes = 0"),
        (["--topology=cpux1", "--suggest"], "the memory of 'cpu' is not known"),
        (["--topology=cpux1", "--config.mesh.fsdp=3"], "mesh"),
        (["--topology=cpux1", "--config.train.batch_size=7"], "train.batch_size = 7"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_a_line(arguments, message, verb, capsys):
    assert verb(*arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("limit", [0, 1, 3, 7, 8, 100])
@pytest.mark.parametrize("start", [1, 8])
def test_the_largest_batch_is_looked_for_by_doubling_and_halving(limit, start):
    asked = []

    def fits(rows):
        asked.append(rows)
        return rows <= limit

    best = tool.largest_fitting(fits, start, most=8)
    assert best <= limit < max(2 * best, 1)
    assert len(asked) == len(set(asked))
    assert tool.largest_fitting(fits, 1, most=2) == min(limit, 2)


@pytest.mark.parametrize(
    ("batch", "limit", "remat", "images"),
    [(8, 30, "none", 8), (16, 30, "dots", 16), (64, 30, "block", 32), (64, 1, "none", 0)],
)
def test_the_policy_that_computes_least_again_is_suggested(
    batch, limit, remat, images, tiny_config, monkeypatch
):
    """Of those that take the config's batch, or of all if none does."""
    per_image = {"none": 3.0, "dots": 1.5, "block": 0.6}

    def compile_program(config):
        needs = config.train.batch_size * per_image[config.model.remat]
        return dataclasses.replace(REPORT, fits=needs <= limit)

    class Known:
        model_flops = 1.0

        def __init__(self, config):
            self.train, self.model = config.train, config.model

    monkeypatch.setattr(tool, "compile_program", compile_program)
    monkeypatch.setattr(tool, "programs", lambda config, *_: [Known(config)])
    log = []
    config = tiny_config(f"train.batch_size={batch}")
    best, *_ = fits = tool.suggest(config, describe("cpux1"), most=18, log=log.append)
    assert (best.remat, best.batch_size, best.images_per_device) == (remat, images, images)
    assert len(log) - 1 == sum(fit.compilations for fit in fits) <= 18
    advice = f"--config.model.remat={remat} --config.train.batch_size={images}"
    assert (advice if images else "nothing fits") in log[-1]


def compile_tiny(overrides, folder, *arguments):
    """What the verb prints and writes of a tiny run, in a process of its own."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(8)}
    command = [sys.executable, "-m", "enat_jax", "compile", "--config=configs/digits.py",
               "--only_first", f"--out={folder / 'out.json'}", "--config.train.batch_size=16",
               *(f"--config.{text}" for text in overrides), *arguments]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), json.loads((folder / "out.json").read_text())


def test_a_tiny_run_compiles_for_eight_devices(tiny_overrides, tmp_path):
    overrides = [text for text in tiny_overrides if "train.batch_size" not in text]
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    lines, fields = compile_tiny(
        overrides, tmp_path, "--topology=cpux8", "--programs=init,train", *mesh
    )
    assert lines[0].startswith("cpux8: 8 x cpu, mesh data=2 fsdp=4")
    assert [line.split()[0] for line in lines[1:]] == ["program", "init", "train0"]
    init, train = fields["programs"]
    assert init["memory"]["outputs"] == pytest.approx(train["memory"]["arguments"], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
def test_a_tiny_run_compiles_for_a_tpu_slice(tiny_overrides, tmp_path):
    overrides = [text for text in tiny_overrides if "train.batch_size" not in text]
    _, fields = compile_tiny(overrides, tmp_path, "--topology=v5e:2x4")
    assert all(program["fits"] is True for program in fields["programs"])
