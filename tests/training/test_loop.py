import dataclasses
import itertools
import os
import shutil
import signal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from enat_jax.checkpoints.store import CheckpointError
from enat_jax.config import LoopConfig, OptimConfig
from enat_jax.errors import UserError
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.training.loop import Meter, training_loop
from enat_jax.training.programs import Programs
from enat_jax.training.workdir import Workdir
from tests.support.runs import Killed, assert_same, entries, losses, saved


@dataclasses.dataclass(frozen=True)
class Settings:
    train: LoopConfig
    optim: OptimConfig


class State(NamedTuple):
    step: jax.Array
    params: nnx.State


class Summing(Programs):
    """Adds up its batches, which are their losses; some steps are not finite, some do more."""

    def __init__(self, config, bad=(), at=None):
        self.bad, self.at, self.shown = set(bad), at or {}, 0
        super().__init__(config, Placement.of(MeshConfig(), jax.devices()[:1]))

    def _first_state(self):
        return State(jnp.int32(0), nnx.State({"sum": nnx.Param(jnp.float32(0))}))

    def step(self, step, state, batch, key):
        self.at.get(step + 1, lambda: None)()
        skipped = step + 1 in self.bad
        loss = np.nan if skipped else batch
        after = jax.tree.map(lambda x: x + 0 if skipped else x + batch, state.params)
        metrics = {"loss": loss, "grad_norm": 1, "skipped": skipped}
        return State(state.step + 1, after), jax.tree.map(jnp.float32, metrics)

    def show(self, state):
        self.shown += 1
        return np.full((3, 5, 3), self.shown, np.uint8), {"score": float(self.shown)}


def settings(**fields):
    learning_rate = fields.pop("learning_rate", 1.0)
    fields = {"steps": 6, "log_every": 2, "checkpoint_every": 3, "sample_every": 0, **fields}
    return Settings(LoopConfig(batch_size=4, **fields), OptimConfig(learning_rate, warmup_steps=2))


def run(folder, *, log=None, seed=7, bad=(), at=None, **fields):
    config = settings(**fields)
    workdir = Workdir(
        folder, config, metadata={}, stream={"seed": seed}, sections=("optim",), may_differ=(),
        log=(log if log is not None else []).append,
    )  # fmt: skip
    with workdir:
        training_loop(
            Summing(config, bad, at),
            workdir,
            lambda share: itertools.count(share.first, share.batch_size),
            data="numbers",
        )


def kill():
    raise Killed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a finished run, which tests leave as it is."""
    workdir = tmp_path_factory.mktemp("finished")
    run(workdir)
    return workdir


def test_a_run_leaves_its_states_where_it_was_in_the_data_means_and_a_table(finished):
    for step, total in ((3, 0 + 4 + 8), (6, 0 + 4 + 8 + 12 + 16 + 20)):
        arrays, position = saved(finished, step)
        assert list(arrays.values()) == [total]
        assert position == {"images": 4 * step, "seed": 7}
    assert losses(finished) == {2: 2, 4: 10, 6: 18}  # means since the entry before
    assert [entry["learning_rate"] for entry in entries(finished)] == [0, 1, 1]
    table = (finished / "parameters.txt").read_text()
    assert "| sum  | ()    | float32 | 1    | ()       |" in table


def test_a_run_that_was_killed_ends_as_one_that_was_not(finished, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, at={6: kill})
    lines = []
    run(tmp_path, log=lines)
    assert lines[0] == "resuming from step 3"
    assert_same(saved(tmp_path), saved(finished))
    assert losses(tmp_path)[6] == losses(finished)[6]


def test_a_finished_run_says_so_and_stays_as_it_is(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    lines = []
    run(finished, log=lines)
    assert lines == ["resuming from step 6", f"{finished} is trained already: 6 of 6 steps"]
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}


def test_a_finished_run_goes_on_to_more_steps_and_the_last_is_always_logged_and_saved(
    finished, tmp_path
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    lines = []
    run(workdir, steps=9, log_every=4, checkpoint_every=4, log=lines)
    assert lines[1] == (
        "differs from the run so far: train.steps = 9, there 6; train.log_every = 4, there 2;"
        " train.checkpoint_every = 4, there 3"
    )
    assert [entry["step"] for entry in entries(workdir)] == [2, 4, 6, 8, 9]
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [6, 8, 9]


def test_the_log_of_a_run_without_checkpoints_is_set_aside(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    for number in (1, 2):
        shutil.rmtree(workdir / "checkpoints")
        run(workdir)
        aside = (workdir / f"metrics.{number}.jsonl").read_text()
    assert (workdir / "metrics.1.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
    assert aside != (workdir / "metrics.jsonl").read_text()


def test_a_workdir_is_one_runs_at_a_time(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {os.getpid()} on"):
        run(tmp_path, at={2: lambda: run(tmp_path)})
    assert not (tmp_path / "lock").exists()


def test_pictures_and_scores_are_shown_every_so_often_and_at_the_end(tmp_path):
    lines = []
    run(tmp_path, sample_every=4, log=lines)
    assert [entry["step"] for entry in entries(tmp_path) if "score" in entry] == [4, 6]
    assert "step 4: score 1" in lines
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in pictures] == ["step_0000004.png", "step_0000006.png"]
    with Image.open(pictures[1]) as picture:
        np.testing.assert_array_equal(picture, np.full((3, 5, 3), 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_a_run_saves_the_step_it_is_at_and_returns(tmp_path, number):
    lines, before = [], signal.getsignal(number)
    stop = {4: lambda: os.kill(os.getpid(), number)}
    run(tmp_path, at=stop, sample_every=5, log=lines)
    assert lines[-1] == (
        f"told to stop: step 4 of 6 is saved in {tmp_path / 'checkpoints'}; the same command"
        " goes on from there"
    )
    assert signal.getsignal(number) is before
    assert saved(tmp_path)[1]["images"] == 16
    assert not (tmp_path / "samples").exists()  # no pictures on the way out


def test_skipped_steps_are_told_counted_and_no_part_of_the_means(tmp_path):
    lines = []
    run(tmp_path, bad=(1, 2, 4, 5), max_bad_steps=3, log=lines)
    told = [line for line in lines if "not applied" in line]
    expected = "step {} was not applied: loss nan, gradient norm 1.0"
    assert told == [expected.format(step) for step in (1, 2, 4, 5)]
    assert [entry["skipped"] for entry in entries(tmp_path)] == [2, 1, 1]
    assert [entry["loss"] for entry in entries(tmp_path)] == [None, 8, 20]


@pytest.mark.parametrize(("bad", "limit", "at"), [((2,), 1, 2), ((2, 4, 5, 6), 3, 6)])
def test_too_many_skipped_in_a_row_stop_the_run(tmp_path, bad, limit, at):
    with pytest.raises(UserError) as caught:
        run(tmp_path, bad=bad, max_bad_steps=limit)
    assert str(caught.value) == (
        f"step {at}: loss nan, gradient norm 1.0: the last {limit} steps were not finite and not"
        f" applied; train.max_bad_steps = {limit}"
    )


def test_nothing_is_saved_while_the_last_step_was_not_finite(tmp_path):
    run(tmp_path / "a", bad=(3,), steps=5)
    assert sorted(int(path.name) for path in (tmp_path / "a/checkpoints").iterdir()) == [4, 5]
    with pytest.raises(UserError, match="step 6, the last, was not finite: it is not saved"):
        run(tmp_path / "b", bad=(5, 6))
    assert [path.name for path in (tmp_path / "b/checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize("steps", [(2, 3), (5, 9)])  # the run may end before the trace
def test_a_trace_of_the_steps_asked_for_is_written(tmp_path, steps):
    lines = []
    run(tmp_path, log=lines, profile_steps=steps)
    assert f"wrote a profiler trace to {tmp_path / 'profile'}" in lines
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"learning_rate": 2.0, "steps": 9},
         "the workdir holds another model: optim.learning_rate = 2.0, there 1.0"),
        ({"seed": 8, "steps": 9}, "in the middle of other data: seed = 8, there 7"),
    ],
)  # fmt: skip
def test_another_run_is_refused_and_the_workdir_left_as_it_is(finished, fields, problem):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=problem):
        run(finished, **fields)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_workdir_that_cannot_be_made_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write to workdir {tmp_path / name}"):
        run(tmp_path / name)


def test_rates_are_of_the_steps_alone_and_means_of_those_that_have_the_term(monkeypatch):
    now, compiled = [0.0], [0.0]
    monkeypatch.setattr("enat_jax.training.loop.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("enat_jax.training.loop.compile_seconds", lambda: compiled[0])
    meter = Meter(1, print)
    for step in range(8):
        late = {"term": step} if step > 4 else {}  # has the mean of the steps that have it
        meter.add(step, {"loss": jnp.float32(1), "skipped": jnp.float32(0), **late})
    now[0], compiled[0] = 6.0, 3.0  # 3 s of compilation, 4 s of steps
    with meter.measure("data"):
        now[0] += 1
    with meter.measure("checkpoint"):
        now[0] += 10
    with meter.measure("show"):
        now[0] += 5
        compiled[0] += 2
    entry = meter.entry(images_per_step=3)
    entry.pop("peak_memory_gib", None)
    assert entry == {
        "loss": 1, "term": 6, "skipped": 0, "steps_per_second": 2, "images_per_second": 6,
        "data_wait": 0.25,
        "compile_seconds": 3, "checkpoint_seconds": 10,
    }  # fmt: skip
