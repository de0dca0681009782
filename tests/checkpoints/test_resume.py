import jax
import numpy as np
import pytest

from enat_jax.checkpoints.resume import resume
from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.parallel.placement import MeshConfig, Placement

CONFIG = {"model": {"width": 8, "grid": (2, 3), "remat": "none"}, "train": {"steps": 5}}
STREAM = {"train.seed": 0, "records": 10}


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints")
    yield opened
    opened.close()


def go_on(checkpoints, config=CONFIG, stream=STREAM, said=None):
    where = Placement.of(MeshConfig(), jax.devices()[:1]).replicated
    abstract = {"params": {"w": jax.ShapeDtypeStruct((3,), np.float32)}}
    return resume(
        checkpoints, abstract, jax.tree.map(lambda _: where, abstract), config=config,
        sections=("model",), may_differ=("remat",), stream=stream,
        say=(said if said is not None else []).append,
    )  # fmt: skip


def save(checkpoints, step, images):
    trees = {"params": {"w": np.full(3, step, np.float32)}}
    position = {**STREAM, "images": images}
    checkpoints.save(step, trees, metadata={"config": CONFIG, "position": position})
    checkpoints.wait()


def test_nothing_saved_is_nothing_to_go_on_from(checkpoints):
    assert go_on(checkpoints) is None


def test_the_newest_step_comes_back_with_its_place_in_the_data(checkpoints):
    save(checkpoints, 2, 16)
    save(checkpoints, 4, 32)
    said = []
    found = go_on(checkpoints, said=said)
    assert (found.step, found.images) == (4, 32)
    np.testing.assert_array_equal(found.trees["params"]["w"], [4, 4, 4])
    assert said == ["resuming from step 4"]


def test_a_damaged_newest_one_gives_the_place_of_the_one_before(checkpoints, tmp_path):
    save(checkpoints, 2, 16)
    save(checkpoints, 4, 32)
    files = [path for path in (tmp_path / "checkpoints/4/params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    said = []
    found = go_on(checkpoints, said=said)
    assert (found.step, found.images) == (2, 16)
    assert said[0].startswith("skipped the damaged checkpoint")


def test_another_model_is_refused_and_how_it_computes_is_not(checkpoints):
    save(checkpoints, 2, 16)
    other = {"model": {**CONFIG["model"], "width": 16, "remat": "block"}, "train": {"steps": 9}}
    with pytest.raises(CheckpointError, match=r"another model: model\.width = 16, there 8$"):
        go_on(checkpoints, other)
    assert go_on(checkpoints, {"model": {**CONFIG["model"], "remat": "block"}}).step == 2


def test_other_data_are_refused(checkpoints):
    save(checkpoints, 2, 16)
    with pytest.raises(CheckpointError, match=r"other data: records = 11, there 10; give a new"):
        go_on(checkpoints, stream={**STREAM, "records": 11})
