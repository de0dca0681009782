import itertools
import json
import os
import pathlib
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.checkpoints.store import Checkpoints
from enat_jax.config import LoopConfig
from enat_jax.training.loop import Clock, Soundness, TrainError, mean_metrics, run_steps


class Counting:
    """Steps whose state is how many were taken; some are not finite."""

    def __init__(self, bad=(), at=None):
        self.bad, self.at, self.sampled = set(bad), at or {}, []

    def step(self, step, state, batch, key):
        self.at.get(step + 1, lambda: None)()
        skipped = step + 1 in self.bad
        loss = jnp.float32(np.nan if skipped else batch)
        return state + 1, {
            "loss": loss,
            "grad_norm": jnp.float32(1),
            "skipped": jnp.float32(skipped),
        }

    def summary(self, done, images_per_second):
        return {"learning_rate": done / 10}

    def sample(self, done, state, log):
        self.sampled.append(done)

    def trees(self, state):
        return {"state": state}


class Kept(Checkpoints):
    """Checkpoints that remember what they were given."""

    last_save_seconds = None

    def __init__(self):
        self.saved = {}

    def save(self, step, trees, *, metadata):
        self.saved[step] = (trees["state"], metadata["position"])

    def wait(self):
        pass


def run(tmp_path, steps=None, /, *, start=0, images=0, said=None, **fields):
    fields = {"steps": 6, "log_every": 2, "checkpoint_every": 3, "sample_every": 0, **fields}
    cfg, kept = LoopConfig(batch_size=4, **fields), Kept()
    run_steps(
        steps or Counting(), start, start, itertools.count(start), jnp.zeros(()), cfg,
        workdir=tmp_path, checkpoints=kept, metadata={}, position={"images": images, "seed": 7},
        say=(said if said is not None else []).append,
    )  # fmt: skip
    return kept.saved


def lines(workdir):
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in text]


def test_checkpoints_hold_the_state_and_how_many_images_were_taken(tmp_path):
    assert run(tmp_path) == {
        3: (3, {"images": 12, "seed": 7}),
        6: (6, {"images": 24, "seed": 7}),
    }


def test_a_run_that_goes_on_counts_images_from_where_it_was(tmp_path):
    # what was taken before may have been taken by batches of another size
    assert run(tmp_path, start=4, images=100) == {6: (6, {"images": 108, "seed": 7})}


def test_the_last_step_is_always_logged_and_saved(tmp_path):
    assert set(run(tmp_path, log_every=4, checkpoint_every=4)) == {4, 6}
    assert [line["step"] for line in lines(tmp_path)] == [4, 6]


def test_a_line_is_the_mean_since_the_one_before(tmp_path):
    run(tmp_path)
    assert [line["loss"] for line in lines(tmp_path)] == [0.5, 2.5, 4.5]
    assert [line["learning_rate"] for line in lines(tmp_path)] == [0.2, 0.4, 0.6]


def test_pictures_are_made_every_so_often_and_at_the_end(tmp_path):
    steps = Counting()
    run(tmp_path, steps, sample_every=4)
    assert steps.sampled == [4, 6]


class TestToldToStop:
    def test_a_run_saves_the_step_it_is_at_and_returns(self, tmp_path):
        said = []
        steps = Counting(at={4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        before = signal.getsignal(signal.SIGTERM)
        assert set(run(tmp_path, steps, said=said)) == {3, 4}
        assert said[-1] == (
            f"told to stop: step 4 of 6 is saved in {tmp_path / 'checkpoints'}; the same command"
            " goes on from there"
        )
        assert signal.getsignal(signal.SIGTERM) is before
        assert [line["step"] for line in lines(tmp_path)] == [2, 4]

    def test_no_pictures_are_made_on_the_way_out(self, tmp_path):
        steps = Counting(at={2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        run(tmp_path, steps, sample_every=4)
        assert steps.sampled == []


class TestSoundness:
    def test_skipped_steps_are_said_and_a_good_one_ends_the_row(self, tmp_path):
        said = []
        run(tmp_path, Counting(bad=(1, 2, 4, 5)), said=said, max_bad_steps=3)
        told = [line for line in said if "not applied" in line]
        assert told == [f"step {n} was not applied: loss nan, gradient norm 1.0"
                        for n in (1, 2, 4, 5)]  # fmt: skip
        assert [line["skipped"] for line in lines(tmp_path)] == [2, 1, 1]
        assert [line["loss"] for line in lines(tmp_path)] == [None, 2.0, 5.0]

    @pytest.mark.parametrize(("bad", "limit", "at"), [((2,), 1, 2), ((2, 4, 5, 6), 3, 6)])
    def test_too_many_in_a_row_stop_the_run(self, tmp_path, bad, limit, at):
        with pytest.raises(TrainError, match=rf"^step {at}: loss nan.*the last {limit} steps"):
            run(tmp_path, Counting(bad=bad), max_bad_steps=limit)

    def test_a_step_is_looked_at_once(self):
        sound = Soundness(2, lambda line: None)
        bad = {"loss": jnp.float32(np.inf), "grad_norm": jnp.float32(1), "skipped": jnp.float32(1)}
        for _ in range(3):
            sound.look(1, bad)
        with pytest.raises(TrainError, match=r"step 2: loss inf"):
            sound.look(2, bad)


def test_means_are_of_the_steps_that_were_applied():
    def metrics(loss, skipped, **more):
        values = {"loss": loss, "grad_norm": 1, "skipped": skipped, **more}
        return {name: jnp.float32(value) for name, value in values.items()}

    found = mean_metrics([metrics(2, 0), metrics(np.nan, 1), metrics(4, 0, term=5)])
    assert found == {"loss": 3, "grad_norm": 1, "skipped": 1, "term": 5}


def test_rates_are_of_the_steps_alone(monkeypatch):
    now, compiled = [0.0], [0.0]
    monkeypatch.setattr("enat_jax.training.loop.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("enat_jax.training.loop.compile_seconds", lambda: compiled[0])
    clock = Clock()
    now[0], compiled[0] = 7.0, 3.0  # 3 s of compilation, 4 s of steps
    clock.waited = 1.0
    with clock.elsewhere("checkpoints"):
        now[0] += 10
    with clock.elsewhere("samples"):
        now[0] += 5
        compiled[0] += 2
    assert clock.line(steps=8, images_per_step=3) == {
        "steps_per_second": 2,
        "images_per_second": 6,
        "data_wait": 0.25,
        "compile_seconds": 3,
        "checkpoint_seconds": 10,
    }


def test_a_trace_of_the_steps_asked_for_is_written(tmp_path):
    said = []
    run(tmp_path, said=said, profile_steps=(2, 3))
    assert f"wrote a profiler trace to {tmp_path / 'profile'}" in said
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_trace_is_not_lost_where_the_run_ends_first(tmp_path):
    said = []
    run(tmp_path, said=said, profile_steps=(6, 9))
    assert any(line.startswith("wrote a profiler trace") for line in said)
