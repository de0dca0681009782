import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.config_file import ConfigError
from enat_jax.data.batches import DataError
from enat_jax.errors import UserError
from enat_jax.models.flops import training_flops
from enat_jax.parallel.accelerators import Accelerator
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.training import programs as run_module
from enat_jax.training.loop import TrainError
from enat_jax.training.programs import Run
from enat_jax.training.train import train

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def workdir(trained, tmp_path):
    """A finished run of four steps that a test may change."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


class Killed(Exception):
    pass


def saved(workdir, step=None):
    """All arrays of a checkpoint by name, and where it is in the data."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step = step or checkpoints.steps()[-1]
    folder = workdir / "checkpoints" / str(step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax guesses where arrays lie when it is not told
        trees = {name: ocp.load(folder, checkpointable_name=name)
                 for name in ("params", "ema", "opt_state")}  # fmt: skip
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return arrays, checkpoints.metadata(step)["position"]


def assert_same(found, expected):
    (arrays, position), (their_arrays, their_position) = found, expected
    assert position == their_position
    assert arrays.keys() == their_arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, their_arrays[name], err_msg=name)


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def watch(monkeypatch, *, kill_after=None):
    """Records the batches a run sees; raises in place of a step if asked to."""
    seen = {}
    step = Run.step

    def watched(self, index, state, batch, key):
        if index == kill_after:
            raise Killed
        seen[index] = {name: np.array(value) for name, value in batch.items()}
        return step(self, index, state, batch, key)

    monkeypatch.setattr(Run, "step", watched)
    return seen


class TestResumption:
    def test_a_run_that_was_killed_ends_bit_for_bit_as_one_that_was_not(
        self, trained, tiny_config, tmp_path, monkeypatch
    ):
        whole = watch(monkeypatch)
        train(tiny_config("train.sample_every=0"), tmp_path / "whole")
        assert_same(saved(tmp_path / "whole"), saved(trained))  # sampling changes nothing
        monkeypatch.undo()

        first = watch(monkeypatch, kill_after=3)  # a step later than the checkpoint
        with pytest.raises(Killed):
            train(tiny_config(), tmp_path / "run")
        monkeypatch.undo()
        second = watch(monkeypatch)
        said = []
        train(tiny_config(), tmp_path / "run", say=said.append)
        assert said[0] == "resuming from step 2"

        assert_same(saved(tmp_path / "run"), saved(trained))
        assert losses(tmp_path / "run") == losses(trained)
        assert list(first) == [0, 1, 2]
        assert list(second) == [2, 3]
        for step, batch in (first | second).items():
            for name, value in batch.items():
                np.testing.assert_array_equal(value, whole[step][name])

    def test_a_finished_run_says_so_and_stays_as_it_is(self, workdir, tiny_config):
        before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
        said = []
        train(tiny_config(), workdir, say=said.append)
        assert said == ["resuming from step 4", f"{workdir} is trained already: 4 of 4 steps"]
        after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
        assert after == before

    def test_a_finished_run_can_go_on_to_more_steps(self, workdir, tiny_config):
        train(tiny_config("train.steps=6", "train.sample_every=0"), workdir)
        assert sorted(losses(workdir)) == [2, 4, 6]
        assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [2, 4, 6]

    def test_a_damaged_checkpoint_is_passed_over_and_said(self, workdir, trained, tiny_config):
        newest = workdir / "checkpoints/4"
        largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        said = []
        train(tiny_config("train.sample_every=0"), workdir, say=said.append)
        assert said[0].startswith(f"skipped the damaged checkpoint {newest} (")
        assert said[1] == "resuming from step 2"
        assert (workdir / "checkpoints/4.damaged").is_dir()
        assert_same(saved(workdir, 4), saved(trained, 4))

    @pytest.mark.slow
    def test_a_run_survives_kill_9(self, trained, tiny_overrides, tmp_path):
        flags = [f"--config.{text}" for text in tiny_overrides]
        # long enough to be killed in the middle; the first four steps are the other run's
        flags += ["--config.train.sample_every=0", "--config.train.steps=100000"]
        command = [sys.executable, "-m", "enat_jax", "train", "--config=configs/digits.py",
                   f"--workdir={tmp_path / 'run'}", *flags]  # fmt: skip
        env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu",
               "JAX_DEFAULT_MATMUL_PRECISION": "highest", "PYTHONPATH": "."}  # fmt: skip
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 240
            while not (tmp_path / "run/checkpoints/10").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        checkpoints = Checkpoints(tmp_path / "run/checkpoints", read_only=True)
        last = checkpoints.steps()[-1]
        again = subprocess.run(
            [*command[:-1], f"--config.train.steps={last + 2}"],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert again.returncode == 0, again.stderr
        assert f"resuming from step {last}" in again.stdout
        first = losses(trained)
        resumed = losses(tmp_path / "run")
        assert {step: resumed[step] for step in first} == first
        assert sorted(resumed) == list(range(2, last + 3, 2))


class TestLogs:
    def test_every_line_of_the_log_is_complete(self, trained):
        lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 4]
        for line in lines:
            assert set(line) - {"checkpoint_write_seconds"} == {
                "step", "time", "loss", "grad_norm", "learning_rate", "images_per_second",
                "steps_per_second", "teraflops_per_second", "data_wait", "skipped",
                "compile_seconds", "checkpoint_seconds",
            }  # fmt: skip
            assert 1 < line["loss"] < 4
            assert line["grad_norm"] > 0
            assert line["steps_per_second"] > 0
            assert line["images_per_second"] == pytest.approx(8 * line["steps_per_second"])
            assert 0 <= line["data_wait"] <= 1

    def test_the_rate_of_learning_is_the_last_steps(self, trained, tiny_config):
        schedule = Run(tiny_config(), Placement.of(MeshConfig())).schedule
        lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        assert [line["learning_rate"] for line in lines] == [float(schedule(1)), float(schedule(3))]

    def test_a_line_averages_the_steps_since_the_one_before(self, trained, tiny_config, tmp_path):
        train(tiny_config("train.log_every=1", "train.sample_every=0"), tmp_path)
        each, pairs = losses(tmp_path), losses(trained)
        assert pairs[2] == pytest.approx((each[1] + each[2]) / 2, rel=1e-6)
        assert pairs[4] == pytest.approx((each[3] + each[4]) / 2, rel=1e-6)

    def test_flops_are_images_times_the_formula(self, tiny_config):
        run = Run(tiny_config(), Placement.of(MeshConfig()))
        found = run.summary(4, images_per_second=1e12)
        flops = np.mean([training_flops(run.config.model, plans) for plans in run.plans])
        assert found["teraflops_per_second"] == pytest.approx(flops)
        assert "mfu" not in found  # nobody specifies a CPU's peak

    def test_mfu_is_the_rate_over_all_devices_peak(self, tiny_config, monkeypatch):
        run = Run(tiny_config(), Placement.of(MeshConfig()))
        card = Accelerator("card", ("cpu",), 8e12, 1)
        monkeypatch.setattr(run_module, "accelerator_of", {"cpu": card}.get)
        found = run.summary(4, images_per_second=1e3)
        assert found["mfu"] == pytest.approx(found["teraflops_per_second"] / 8)

    def test_there_is_a_sample_grid_of_every_class(self, trained):
        with Image.open(trained / "samples/step_0000004.png") as grid:
            assert grid.size == (10 * 68 + 4, 10 * (68 + 18))
        assert [p.name for p in (trained / "samples").iterdir()] == ["step_0000004.png"]
        assert list((trained / "tensorboard").iterdir())

    def test_progress_is_said_where_there_is_no_terminal(self, tiny_config, tmp_path):
        said = []
        train(tiny_config("train.sample_every=0"), tmp_path, say=said.append)
        first, second, third, last = said
        assert first.startswith(
            "training 0.01591M parameters on 1797 records of digits, steps 0 to"
        )
        assert second.startswith("step 2/4 loss ")
        assert second.endswith(" min left")
        assert third.startswith("step 4/4 loss ")
        assert last == f"trained 4 steps; the checkpoint is in {tmp_path / 'checkpoints'}"

    def test_token_records_without_tokenizer_train_without_grids(self, tiny_config, tmp_path):
        train(tiny_config("tokenizer.name='none'", "train.steps=2"), tmp_path)
        assert not (tmp_path / "samples").exists()
        assert sorted(losses(tmp_path)) == [2]


def test_the_loss_goes_down(tiny_config, tmp_path):
    config = tiny_config(
        "train.steps=60", "train.log_every=10", "train.sample_every=0", "train.checkpoint_every=60"
    )
    train(config, tmp_path)
    found = losses(tmp_path)
    assert found[10] > 2.2  # near log(17), which knows nothing
    assert found[60] < 0.85 * found[10]


class TestNotFinite:
    def poison(self, monkeypatch, steps):
        """Makes the parameters of some steps, counted from 1, give no finite loss."""
        step = Run.step

        def poisoned(self, index, state, batch, key):
            if index + 1 not in steps:
                return step(self, index, state, batch, key)
            before = jax.tree.map(jnp.copy, state)
            bad = state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
            after, metrics = step(self, index, bad, batch, key)
            kept = (after.ema, after.opt_state), (before.ema, before.opt_state)
            for ours, theirs in zip(*map(jax.tree.leaves, kept), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            assert after.step == before.step + 1
            return before._replace(step=after.step), metrics

        monkeypatch.setattr(Run, "step", poisoned)

    def test_a_step_that_is_not_finite_is_said_counted_and_not_applied(
        self, tiny_config, tmp_path, monkeypatch
    ):
        self.poison(monkeypatch, {3})
        said = []
        train(tiny_config("train.sample_every=0"), tmp_path, say=said.append)
        assert "step 3 was not applied: loss nan, gradient norm nan" in said
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["skipped"] for line in lines] == [0, 1]
        assert all(line["loss"] > 1 for line in lines)  # the mean of those applied
        arrays, _ = saved(tmp_path)
        assert all(np.all(np.isfinite(array)) for array in arrays.values())

    def test_too_many_in_a_row_stop_the_run(self, tiny_config, tmp_path, monkeypatch):
        self.poison(monkeypatch, {2, 4, 5})
        config = tiny_config("train.sample_every=0", "train.max_bad_steps=2", "train.steps=9")
        with pytest.raises(TrainError) as caught:
            train(config, tmp_path)
        assert str(caught.value) == (
            "step 5: loss nan, gradient norm nan: the last 2 steps were not finite and not applied;"
            " train.max_bad_steps = 2"
        )
        assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [2, 4]

    @pytest.mark.slow
    def test_a_learning_rate_beyond_all_reason_ends_in_one_line(self, tiny_config, tmp_path):
        config = tiny_config(
            "optim.learning_rate=1e37", "train.sample_every=0", "train.checkpoint_every=1",
            "train.steps=20",
        )  # fmt: skip
        with pytest.raises(
            TrainError, match=r"^step \d+: loss .*the last 10 steps were not finite"
        ):
            train(config, tmp_path)


class TestRefusals:
    def snapshot(self, workdir):
        return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}

    def test_a_workdir_of_another_model_is_refused_and_left_as_it_is(self, workdir, tiny_config):
        before = self.snapshot(workdir)
        with pytest.raises(CheckpointError) as caught:
            train(tiny_config("model.width=32", "model.decoder_depth=2", "train.steps=9"), workdir)
        message = str(caught.value)
        assert message.startswith("the workdir holds another model: ")
        assert "model.width = 32, there 16" in message
        assert "model.decoder_depth = 2, there 1" in message
        assert "num_heads" not in message
        assert self.snapshot(workdir) == before

    def test_how_a_model_computes_may_change(self, workdir, tiny_config):
        said = []
        config = tiny_config("model.remat='block'", "train.steps=4")
        train(config, workdir, say=said.append)
        assert "trained already" in said[-1]

    def test_a_workdir_that_cannot_be_is_refused(self, tiny_config, tmp_path):
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "run"):
            with pytest.raises(UserError, match="cannot write to workdir") as caught:
                train(tiny_config(), path)
            assert str(path) in str(caught.value)

    def test_an_empty_data_set_is_refused_before_anything_is_written(self, tiny_config, tmp_path):
        with pytest.raises(DataError, match="the split is empty"):
            train(tiny_config("data.split=train[:0]"), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_records_that_do_not_fit_the_config_are_refused(self, tiny_config, tmp_path):
        config = tiny_config(
            "tokenizer.grid=(4, 16)", "model.codebook_size=18", "model.num_classes=11",
        )  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            train(config, tmp_path / "run")
        message = str(caught.value)
        for part in (
            "tokenizer.grid = (4, 16), the records have (8, 8)",
            "model.codebook_size = 18, the records have 17",
            "model.num_classes = 11, the records have 10",
        ):
            assert part in message
        assert "tokenizer.name" not in message
        assert not (tmp_path / "run").exists()

    def test_a_batch_that_the_devices_cannot_share_is_refused(self, tiny_config):
        placement = Placement.of(MeshConfig(), jax.devices()[:1] * 3)
        with pytest.raises(ConfigError, match="batch_size = 8 must be a multiple of 6: 3 devices"):
            Run(tiny_config(), placement)

    def test_heads_that_the_devices_cannot_share_are_refused(self, tiny_config):
        placement = Placement.of(MeshConfig(tensor=4), jax.devices()[:1] * 4)
        message = r"config: mesh\.tensor = 4 must divide model\.num_heads = 2"
        with pytest.raises(UserError, match=message):
            Run(tiny_config(), placement)


class TestPrograms:
    @pytest.fixture
    def run(self, tiny_config):
        return Run(tiny_config("train.programs=4"), Placement.of(MeshConfig()))

    def test_every_program_runs_once_in_each_cycle(self, run):
        drawn = np.array([run.program(step) for step in range(400)]).reshape(100, 4)
        np.testing.assert_array_equal(np.sort(drawn, axis=1), np.tile(np.arange(4), (100, 1)))
        assert len({tuple(cycle) for cycle in drawn.tolist()}) > 12  # in ever other orders

    def test_what_a_step_runs_depends_on_seed_and_step_alone(self, run, tiny_config):
        again = Run(tiny_config("train.programs=4"), Placement.of(MeshConfig()))
        other = Run(tiny_config("train.programs=4", "train.seed=1"), Placement.of(MeshConfig()))
        steps = [397, 3, 12, 5, 0, 1000000]  # as after a resumption, in any order
        drawn = [run.program(step) for step in steps]
        assert [again.program(step) for step in steps] == drawn
        assert [other.program(step) for step in range(40)] != [run.program(s) for s in range(40)]
        assert again.plans == run.plans != other.plans

    def test_there_is_one_program_per_row_of_plans(self, run):
        assert len(run.programs) == len(run.plans) == 4
        assert all(len(row) == 2 for row in run.plans)

    def test_more_than_four_programs_are_refused(self, tiny_config):
        with pytest.raises(ConfigError, match=r"train\.programs = 5 must be between 1 and 4"):
            tiny_config("train.programs=5")


def test_the_first_state_depends_on_the_seed_alone(tiny_config):
    states = [Run(tiny_config(f"train.seed={seed}"), Placement.of(MeshConfig())).initial_state()
              for seed in (0, 0, 1)]  # fmt: skip
    first, again, other = (jax.tree.leaves(state.params) for state in states)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(first, other, strict=True))
    for a, b in zip(first, jax.tree.leaves(states[0].ema), strict=True):
        np.testing.assert_array_equal(a, b)
