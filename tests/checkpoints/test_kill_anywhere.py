"""A run that is killed again and again, and goes on with other numbers of processes."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import zlib

import jax
import numpy as np
import pytest

from enat_jax.checkpoints.store import Checkpoints
from enat_jax.config import load_config
from enat_jax.data.batches import Share, record_info, shuffled, training_batches
from enat_jax.parallel.placement import Placement
from enat_jax.training.programs import TrainingPrograms
from tests.support.on_hosts import xla_flags

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("ENAT_KILLS", "30"))
STEPS, BATCH = 360, 16  # three epochs and some of 1,797 records

# `enat train`, which also writes down what every step saw
DRIVER = """
import json, pathlib, sys, zlib
import numpy as np
from absl import flags
from enat_jax.parallel import hosts
from enat_jax.parallel.compilation import keep_compiled_programs
from enat_jax.config import load_config
from enat_jax.training.programs import TrainingPrograms
from enat_jax.training.train import train
from enat_jax.parallel.placement import Placement

out, attempt, *rest = sys.argv[1:]
given = dict(text[2:].split("=", 1) for text in rest if text.startswith("--"))
process = int(given.get("process_id", 0))
if "coordinator" in given:
    hosts.connect(given["coordinator"], int(given["num_processes"]), process, wait=60)
keep_compiled_programs()
seen = open(pathlib.Path(out) / f"seen.{attempt}.{process}", "a", buffering=1)
step = TrainingPrograms.step

def watched(self, index, state, batch, key):
    rows = self.placement.own_rows(self.config.train.batch_size).tolist()
    tokens = [zlib.crc32(row.tobytes()) for row in batch["token_ids"]]
    seen.write(json.dumps([index, rows, tokens]) + "\\n")
    return step(self, index, state, batch, key)

TrainingPrograms.step = watched
config = load_config("configs/digits.py", [text for text in rest if not text.startswith("--")])
try:
    train(config, pathlib.Path(out) / "run")
except Exception as error:  # what Gloo says of a process that is gone
    sys.exit(hosts.end(f"driver: {error}"))
"""


class Runs:
    """Starts the run with so many processes, again and again."""

    def __init__(self, out, overrides):
        self.out, self.attempt = out, 0
        self.fields = [*overrides, f"train.batch_size={BATCH}", "train.images_per_row=2",
                       "train.checkpoint_every=9", "train.log_every=20", "train.sample_every=0",
                       f"train.steps={STEPS}", "train.keep=3"]  # fmt: skip
        (out / "driver.py").write_text(DRIVER)

    def start(self, processes):
        self.attempt += 1
        command = [sys.executable, str(self.out / "driver.py"), str(self.out), str(self.attempt)]
        launcher = ["launch/local_multiprocess.sh", str(processes)] if processes > 1 else []
        return subprocess.Popen(
            [*launcher, *command, *self.fields], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu", "GRACE": "5",
                 "XLA_FLAGS": xla_flags(2 // processes)},
        )  # fmt: skip

    def workers(self):
        """The pids of the driver's processes."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if words[1:4] == [str(self.out / "driver.py").encode(), str(self.out).encode(),
                              str(self.attempt).encode()]:  # fmt: skip
                found.append(int(path.parent.name))
        return found

    def steps_seen(self):
        lines = self.out / f"seen.{self.attempt}.0"
        return len(lines.read_text().splitlines()) if lines.exists() else 0

    def finish(self, processes, timeout=900):
        run = self.start(processes)
        said, _ = run.communicate(timeout=timeout)
        assert run.returncode == 0, said[-3000:]
        return said

    def kill(self, rng, processes):
        """Lets a run go on for a while and ends it; returns what it said, None if it was done."""
        run = self.start(processes)
        hard = rng.random() < 0.6
        early = rng.random() < 0.2
        wanted = 0 if early else rng.randrange(1, 25)
        deadline = time.monotonic() + 300
        while run.poll() is None and (not self.workers() or self.steps_seen() < wanted):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(rng.random() * (6 if early else 0.5))
        workers = self.workers()
        if run.poll() is None and workers:
            os.kill(rng.choice(workers), signal.SIGKILL if hard else signal.SIGTERM)
        said, _ = run.communicate(timeout=300)
        if not hard and not early and "trained" not in said:
            assert run.returncode == 0, said[-3000:]
            assert "told to stop: step" in said
        return said


def examples(out):
    """By step, what it saw each time it was taken: the rows that processes wrote down together."""
    found = {}
    for attempt in {path.name.split(".")[1] for path in out.glob("seen.*")}:
        taken = {}
        for path in out.glob(f"seen.{attempt}.*"):
            for line in path.read_text().splitlines():
                try:
                    step, rows, tokens = json.loads(line)
                except ValueError:
                    continue  # the line it was killed in
                taken.setdefault(step, {}).update(zip(rows, tokens, strict=True))
        for step, rows in taken.items():
            found.setdefault(step, []).append(rows)
    return found


def final_arrays(out, config):
    checkpoints = Checkpoints(out / "run/checkpoints", read_only=True)
    run = TrainingPrograms(config, Placement.of(config.mesh, jax.devices()[:1]))
    names = ("params", "ema", "opt_state")
    found = checkpoints.restore({name: getattr(run.abstract, name) for name in names})
    assert found[0] == STEPS
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found[1])]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny_overrides):
    out = tmp_path_factory.mktemp("unbroken")
    Runs(out, tiny_overrides).finish(2)
    return out


@pytest.mark.parametrize("counts", [(2,), (1, 2)])
def test_a_run_killed_anywhere_uses_every_example_once(counts, unbroken, tmp_path, tiny_overrides):
    rng = random.Random(len(counts))
    runs = Runs(tmp_path, tiny_overrides)
    for _ in range(KILLS // 2):
        runs.kill(rng, rng.choice(counts))
    runs.finish(counts[-1])

    config = load_config("configs/digits.py", runs.fields)
    batches = training_batches(config.data, Share(BATCH), seed=0)
    seen = examples(tmp_path)
    assert sorted(seen) == list(range(STEPS))
    for step in range(STEPS):
        expected = [zlib.crc32(row.tobytes()) for row in next(batches)["token_ids"]]
        for rows in seen[step]:
            # a process that was killed may not have written its line: none may be another's
            assert all(expected[row] == token for row, token in rows.items()), step
        assert any(len(rows) == BATCH for rows in seen[step]), step
    count = record_info(config.data).num_records
    stream = shuffled(count, 0)
    for epoch in range(STEPS * BATCH // count):
        numbers = [stream[epoch * count + i] for i in range(count)]
        assert sorted(numbers) == list(range(count))

    arrays = (final_arrays(out, config) for out in (tmp_path, unbroken))
    for ours, theirs in zip(*arrays, strict=True):
        if counts == (2,):
            np.testing.assert_array_equal(ours, theirs)
        else:  # sums over devices come in another order
            np.testing.assert_allclose(ours, theirs, atol=2e-3 * max(np.max(np.abs(theirs)), 1e-3))
