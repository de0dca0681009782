import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.config import LoopConfig, OptimConfig
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.training.programs import Programs
from enat_jax.training.workdir import Workdir

MODEL = {"width": 8, "grid": (2, 3), "remat": "none"}
STREAM = {"train.seed": 0, "records": 10}


@dataclasses.dataclass(frozen=True)
class Config:
    model: dict
    train: LoopConfig
    optim: OptimConfig


class State(NamedTuple):
    step: Any
    params: Any


class Zeros(Programs):
    def _first_state(self):
        return State(jnp.int32(0), {"w": jnp.zeros(3)})

    def step(self, step, state, batch, key):
        raise NotImplementedError

    def show(self, state):
        raise NotImplementedError


def go_on(folder, model=MODEL, stream=STREAM, said=None):
    config = Config(model, LoopConfig(), OptimConfig())
    workdir = Workdir(
        folder, config, metadata={}, stream=stream, sections=("model",), may_differ=("remat",),
        log=(said if said is not None else []).append,
    )  # fmt: skip
    with workdir:
        return workdir.resume(Zeros(config, Placement.of(MeshConfig(), jax.devices()[:1])))


def save(folder, *steps):
    """Checkpoints of some steps, each after 8 images a step."""
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in steps:
        trees = {"params": {"w": np.full(3, step, np.float32)}}
        position = {**STREAM, "images": 8 * step}
        metadata = {"config": {"model": MODEL}, "position": position}
        checkpoints.save(step, trees, metadata=metadata)
    checkpoints.close()


def test_nothing_saved_is_nothing_to_go_on_from(tmp_path):
    state, step, images = go_on(tmp_path)
    assert (int(state.step), step, images) == (0, 0, 0)


def test_the_newest_step_comes_back_with_its_place_in_the_data(tmp_path):
    save(tmp_path, 2, 4)
    said = []
    state, step, images = go_on(tmp_path, said=said)
    assert (int(state.step), step, images) == (4, 4, 32)
    np.testing.assert_array_equal(state.params["w"], [4, 4, 4])
    assert said == ["resuming from step 4"]


def test_a_damaged_newest_one_gives_the_place_of_the_one_before(tmp_path):
    save(tmp_path, 2, 4)
    files = [path for path in (tmp_path / "checkpoints/4/params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    said = []
    assert go_on(tmp_path, said=said)[1:] == (2, 16)
    assert said[0].startswith("skipped the damaged checkpoint")


def test_another_model_is_refused_and_how_it_computes_is_not(tmp_path):
    save(tmp_path, 2)
    other = {**MODEL, "width": 16, "remat": "block"}
    with pytest.raises(CheckpointError, match=r"another model: model\.width = 16, there 8$"):
        go_on(tmp_path, other)
    assert go_on(tmp_path, {**MODEL, "remat": "block"})[1] == 2


def test_other_data_are_refused(tmp_path):
    save(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"other data: records = 11, there 10; give a new"):
        go_on(tmp_path, stream={**STREAM, "records": 11})
