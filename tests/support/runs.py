"""What training runs leave behind, and how a test breaks into one."""

import json
import warnings

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from enat_jax.checkpoints.store import Checkpoints
from enat_jax.training.programs import TrainingPrograms


class Killed(Exception):
    """In place of a step."""


def saved(workdir, step=None):
    """All arrays of a checkpoint by name, and where it is in the data."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step = step or checkpoints.steps()[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax guesses where arrays lie when it is not told
        trees = ocp.load_checkpointables(workdir / "checkpoints" / str(step))
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return arrays, checkpoints.metadata(step)["position"]


def assert_same(ours, theirs):
    """Compares two of `saved`, bit for bit."""
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    for name, array in ours[0].items():
        np.testing.assert_array_equal(array, theirs[0][name], err_msg=name)


def entries(workdir):
    """The entries of a run's metrics."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    """The loss of every entry of a run's metrics, by step."""
    return {entry["step"]: entry["loss"] for entry in entries(workdir) if "loss" in entry}


def watch(monkeypatch, *, kill_after=None, programs=TrainingPrograms):
    """Records the batches that a run sees; raises `Killed` in place of a step if asked to."""
    seen = {}
    step = programs.step

    def watched(self, index, state, batch, key):
        if index == kill_after:
            raise Killed
        seen[index] = jax.tree.map(np.array, batch)
        return step(self, index, state, batch, key)

    monkeypatch.setattr(programs, "step", watched)
    return seen
