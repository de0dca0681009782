"""Compiling a run's programs for devices that are not here, and what is said of them."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from enat_jax.core.plans import training_plans
from enat_jax.models.flops import training_flops
from enat_jax.parallel.accelerators import Accelerator
from enat_jax.parallel.placement import Placement
from enat_jax.parallel.topologies import describe
from enat_jax.tools import largest_batch
from enat_jax.tools.compiler_answers import Memory
from enat_jax.tools.hlo import Collective, ProgramCounts
from enat_jax.tools.largest_batch import largest_fitting, suggest
from enat_jax.tools.programs import Report, programs
from enat_jax.tools.report import HEADER, lines, suggestion_lines
from enat_jax.tools.roofline import predict

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
CHIP = Accelerator("chip", ("chip",), 100e12, 16 * 2**30, 1e12, 100e9)

# runs the verb as the command line does
_VERB = """
import sys
from absl import flags
from enat_jax.cli import compile as verb
values = flags.FlagValues()
verb.define(values)
prefix = "--config."
values(["compile", *(text for text in sys.argv[1:] if not text.startswith(prefix))])
overrides = [text.removeprefix(prefix) for text in sys.argv[1:] if text.startswith(prefix)]
sys.exit(verb.run(values, overrides))
"""


def verb(folder, *arguments, devices=8):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder),
           "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
           "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}  # fmt: skip
    command = [sys.executable, "-c", _VERB, "--config=configs/digits.py", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def tiny(tiny_overrides):
    return [f"--config.{text}" for text in (*tiny_overrides, "model.width=32",
                                            "train.batch_size=16")]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tiny, tmp_path_factory):
    """What the verb says twice of a tiny run on 8 described devices."""
    folder = tmp_path_factory.mktemp("compiled")
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=4"]
    out = []
    for number in range(2):
        path = folder / f"{number}.json"
        done = verb(folder, *tiny, *mesh, "--topology=cpux8", "--only_first", f"--out={path}")
        assert done.returncode == 0, done.stderr
        out.append((done.stdout.splitlines(), json.loads(path.read_text())))
    return out


def test_every_program_of_a_run_is_reported(compiled):
    shown, fields = compiled[0]
    names = [program["name"] for program in fields["programs"]]
    assert names == ["init", "train0", "sample"]
    assert shown[0].startswith("cpux8: 8 x cpu, mesh data=2 fsdp=4")
    assert shown[1] == HEADER
    for name in names:
        assert sum(line.startswith(f"{name} ") for line in shown) == 1


def test_a_report_counts_one_device(compiled, tiny_config):
    fields = compiled[0][1]
    init, train, sample = fields["programs"]
    config = tiny_config("model.width=32", "train.batch_size=16")
    plans = training_plans(
        64, programs=2, images_per_row=2, mask_beta=config.train.mask_beta, seed=0
    )
    assert train["model_flops"] == 16 / 8 * training_flops(config.model, plans[0])
    assert train["counts"]["flops"] == pytest.approx(train["model_flops"], rel=0.1)
    assert sample["counts"]["flops"] == pytest.approx(sample["model_flops"], rel=0.01)
    assert train["counts"]["collectives"]
    assert init["memory"]["outputs"] == pytest.approx(train["memory"]["arguments"], rel=0.05)
    for program in fields["programs"]:
        memory = program["memory"]
        whole = memory["arguments"] + memory["outputs"] + memory["temporaries"] + memory["code"]
        assert memory["peak"] == whole - memory["aliased"]
        assert program["fits"] is None  # nobody knows the memory of a device called cpu
        assert program["prediction"] is None


def test_the_second_start_compiles_nothing(compiled):
    (_, first), (shown, second) = compiled
    for before, after in zip(first["programs"], second["programs"], strict=True):
        assert not before.pop("kept")
        assert after.pop("kept")
        del before["lower_seconds"], after["lower_seconds"]
        assert after == before
    assert sum("(kept)" in line for line in shown) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology=v5e"], "topology 'v5e' is unknown; known are v5e:16x16"),
        (["--topology=cpux1", "--programs=train,evaluate"], "no program is called 'evaluate'"),
        (["--topology=cpux1", "--config.model.num_classes=0"], "model.num_classes = 0"),
        (["--topology=cpux1", "--suggest"], "the memory of 'cpu' is not known"),
        (["--topology=cpux1", "--config.mesh.fsdp=3"], "mesh"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_a_line(arguments, said, tiny, tmp_path):
    done = verb(tmp_path, *tiny, *arguments, devices=1)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]


def test_a_batch_that_does_not_divide_is_refused(tiny, tmp_path):
    done = verb(tmp_path, *tiny, "--topology=cpux8", "--config.train.batch_size=12")
    assert done.returncode == 1
    said = "train.batch_size = 12 must be a multiple of 16: 8 devices x 2 images a row"
    assert said in done.stderr.splitlines()[-1]


def test_nothing_is_allocated_before_something_is_compiled(tiny_config):
    config = tiny_config("train.programs=2")
    before = len(jax.live_arrays())
    found = list(programs(config, Placement.of(config.mesh, describe("cpux1"))))
    assert [program.name for program in found] == ["init", "train0", "train1", "sample"]
    found[1].lower()
    sizes = [array.size for array in jax.live_arrays()[before:]]
    assert max(sizes, default=0) < 100  # a key or a table of counts


def counts(flops=2e12, hbm=1e9, sent=1e8):
    return ProgramCounts(flops, hbm, {"all-reduce": Collective(3.0, {"bf16": sent})})


@pytest.mark.parametrize(
    ("given", "bound", "overlapped", "serial"),
    [
        (counts(), "compute", 0.5, 10 / 22),  # 20 ms of products, 1 of memory, 1 of links
        (counts(hbm=40e9), "memory", 10 / 40, 10 / 61),
        (counts(sent=10e9), "links", 10 / 100, 10 / 121),
    ],
)
def test_a_prediction_says_what_bounds(given, bound, overlapped, serial):
    prediction = predict(given, 1e12, CHIP)
    assert prediction.bound == bound
    assert prediction.mfu_overlapped == pytest.approx(overlapped)
    assert prediction.mfu_serial == pytest.approx(serial)


def report(name="train0", needed=8 * 2**30, limit=CHIP.memory, flops=1e12):
    fits = needed <= limit
    found = counts()
    return Report(
        name=name, fits=fits, problem="" if fits else "RESOURCE_EXHAUSTED: Used 20.00G",
        needed=needed, memory=Memory(2**30, 2**30, 2**30, needed - 2**30, 0) if fits else None,
        model_flops=flops, counts=found if fits else None,
        prediction=predict(found, flops, CHIP) if fits else None,
        lower_seconds=1.0, compile_seconds=12.5, kept=False,
    )  # fmt: skip


def test_a_line_says_what_fits_and_what_bounds():
    line, sent = lines(report())
    assert line.startswith("train0  yes")
    for figure in ("1.00", "7.00", "8.00", "1.0000", "2.0000", "20.00*", "50.0%", "45.5%", "12.5"):
        assert f" {figure}" in line
    assert len(line.split("|")) == len(HEADER.split("|"))
    assert "all-reduce 3x 0.100 GB (0.100 bf16)" in sent
    (refused,) = lines(report(needed=20 * 2**30))
    assert refused.startswith("train0  NO")
    assert "Used 20.00G" in refused


@pytest.mark.parametrize("limit", [5, 10, 30, 130, 1000, 10**6])
@pytest.mark.parametrize("fixed", [0, 4])
def test_the_largest_power_of_two_that_fits_is_found_in_few_steps(limit, fixed):
    asked = []

    def measure(rows):
        asked.append(rows)
        return fixed + rows

    found = largest_fitting(measure, limit, most=5)
    assert found & (found - 1) == 0
    assert fixed + found <= limit < fixed + 2 * found
    assert len(asked) == len(set(asked)) <= 5


def test_the_largest_batch_is_one_that_was_measured():
    crooked = {1: 1, 2: 2, 4: 90, 8: 91, 16: 500, 32: 600, 64: 700}
    assert largest_fitting(crooked.__getitem__, 100, most=5) == 8
    assert largest_fitting(crooked.__getitem__, 100, most=1) == 1
    assert largest_fitting(lambda rows: 101, 100, most=5) == 0


def test_the_fastest_policy_that_fits_is_suggested(tiny_config, monkeypatch):
    """Whatever is saved is computed again: dots takes 10% longer, block 30%."""
    per_image = {"none": 3.0, "dots": 1.5, "block": 0.5}  # GiB
    slower = {"none": 1.0, "dots": 1.1, "block": 1.3}
    compiled = []

    def compile_program(program, accelerator, folder):
        compiled.append(program)
        rows = program.batch // 2
        made = report(needed=int((2 + 2 * rows * per_image[program.remat]) * 2**30))
        if made.fits:
            found = counts(flops=1e12 * rows * slower[program.remat], hbm=1e9, sent=1e9)
            object.__setattr__(made, "prediction", predict(found, 1e12 * rows, CHIP))
        return made

    class Compiled:
        def __init__(self, config):
            self.batch, self.remat = config.train.batch_size, config.model.remat
            self.model_flops = 1.0

    monkeypatch.setattr(largest_batch, "compile_program", compile_program)
    monkeypatch.setattr(largest_batch, "programs", lambda config, *_: [Compiled(config)])
    said = []
    config = tiny_config("train.images_per_row=2")
    fits = suggest(config, describe("cpux1"), CHIP, most=12, say=said.append)
    assert {fit.remat: fit.images_per_device for fit in fits} == {"none": 4, "dots": 8, "block": 16}
    assert len(said) == len(compiled) == sum(fit.compilations for fit in fits) <= 12
    # the exchange of gradients is shared by more images: dots' 8 beat none's 4
    assert [fit.remat for fit in fits] == sorted(
        per_image, key=lambda remat: {f.remat: f.seconds_per_image for f in fits}[remat]
    )
    assert f"--config.train.batch_size={fits[0].batch_size}" in suggestion_lines(fits)[-1]
    assert f"after {len(compiled)} compilations" in suggestion_lines(fits)[-1]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu")
def test_a_tiny_run_compiles_for_a_tpu_slice(tiny, tmp_path):
    path = tmp_path / "report.json"
    done = verb(tmp_path, *tiny, "--topology=v5e:2x4", "--only_first", f"--out={path}",
                "--config.mesh.data=1", "--config.mesh.fsdp=-1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for program in json.loads(path.read_text())["programs"]:
        assert program["fits"] is True
        assert program["counts"]["flops"] == pytest.approx(program["model_flops"], rel=0.2)
        assert program["prediction"]["mfu_serial"] <= program["prediction"]["mfu_overlapped"] < 1
