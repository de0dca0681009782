import contextlib
import gc
import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from enat_jax.checkpoint import CheckpointError, Checkpoints

# When one read fails, Orbax gives up the others, which complain as they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LARGE = 300_000  # floats: enough that a limit on the size of a file stops the save


class Model(nnx.Module):
    def __init__(self, width, *, rngs):
        self.embed = nnx.Linear(4, width, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(width, width, rngs=rngs)])


def make_trees(step, width=8):
    params = nnx.split(Model(width, rngs=nnx.Rngs(step)), nnx.Param)[1]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    ema = jax.tree.map(lambda x: x + 1, params)
    return {
        "params": params,
        "ema": ema,
        "opt_state": tx.init(params),
        "step": jnp.int32(step),
    }


def abstract(trees):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)


def save_steps(directory, *steps):
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_trees(step), metadata={"step": step})


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def data_iterator():
    dataset = grain.MapDataset.range(1000).seed(3).shuffle().batch(4)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


@pytest.fixture
def failed_reads():
    yield
    gc.collect()


@pytest.fixture
def small_files():
    """Makes writing a file over 200 kB fail, like a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_restored_is_what_was_saved(tmp_path):
    save_steps(tmp_path, 10, 20)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        step, trees = checkpoints.restore(abstract(make_trees(0)))
    assert step == 20
    assert_same(trees, make_trees(20))


def test_a_directory_without_checkpoints_restores_nothing(tmp_path):
    assert Checkpoints(tmp_path / "new", read_only=True).restore({"step": jnp.int32(0)}) is None
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.restore({"step": jnp.int32(0)}) is None


def test_only_the_named_tree_is_read(tmp_path):
    save_steps(tmp_path, 10)
    for name in "params", "opt_state", "step":
        shutil.rmtree(tmp_path / "10" / name)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    _, trees = checkpoints.restore(abstract({"ema": make_trees(0)["ema"]}))
    assert_same(trees, {"ema": make_trees(10)["ema"]})


def test_leaves_land_on_the_mesh_asked_for(tmp_path):
    save_steps(tmp_path, 10)
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    wanted = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
    tree = abstract(make_trees(0)["ema"])
    tree["blocks"][0]["kernel"] = tree["blocks"][0]["kernel"].replace(wanted)
    _, trees = Checkpoints(tmp_path, read_only=True).restore({"ema": tree})
    assert trees["ema"]["blocks"][0]["kernel"][...].sharding == sharding


def test_a_grain_iterator_continues_where_it_was_saved(tmp_path):
    data = data_iterator()
    for _ in range(3):
        next(data)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(3, {"step": jnp.int32(3)}, data=data, metadata={})
        expected = [next(data) for _ in range(5)]  # while the save may be under way
    continued = data_iterator()
    Checkpoints(tmp_path, read_only=True).restore({"step": jnp.int32(0)}, data=continued)
    np.testing.assert_array_equal([next(continued) for _ in range(5)], expected)


def test_arrays_given_away_after_save_returns_are_saved_as_they_were(tmp_path):
    overwrite = jax.jit(lambda x: x - 1, donate_argnums=0)
    x = jnp.ones(LARGE)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {"x": x}, metadata={})
        for _ in range(20):
            x = overwrite(x)
        _, trees = checkpoints.restore({"x": jax.ShapeDtypeStruct((LARGE,), jnp.float32)})
    assert (trees["x"] == 1).all()


def test_the_last_keep_steps_stay(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        for step in 1, 2, 3, 4:
            checkpoints.save(step, {"step": jnp.int32(step)}, metadata={})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]


def test_a_step_already_saved_is_left_alone(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1)}, metadata={"first": True})
        checkpoints.save(1, {"step": jnp.int32(2)}, metadata={"first": False})
        assert checkpoints.metadata() == {"first": True}
        assert checkpoints.restore({"step": jnp.int32(0)})[1]["step"] == 1


def test_metadata_comes_back_as_it_was_given(tmp_path):
    config = {"model": {"width": 8, "dropout": None}, "steps": [1, 2.5, "three", True]}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1)}, metadata=config)
        checkpoints.save(2, {"step": jnp.int32(2)}, metadata={})
        assert checkpoints.metadata(1) == config
        (tmp_path / "2" / "_CHECKPOINT_METADATA").write_text("{")
        assert checkpoints.metadata() == config
        with pytest.raises(CheckpointError, match=r"no readable checkpoint .* step 2: JSON"):
            checkpoints.metadata(2)
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 in .*: 1, 2"):
            checkpoints.metadata(3)


def test_another_models_shapes_are_all_named(tmp_path):
    save_steps(tmp_path, 10, 20)
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path, read_only=True).restore(abstract(make_trees(0, width=6)))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / '20'} is of another model: ")
    assert "ema.embed.kernel is [4, 8] in it, not [4, 6]" in message
    assert "ema.blocks.0.kernel is [8, 8] in it, not [6, 6]" in message
    # 4 arrays in each of params, ema and Adam's two moments; 8 of them are named
    assert message.count(" in it, not ") == 8
    assert message.endswith("; and 8 more")
    assert "\n" not in message


def test_missing_and_extra_fields_are_named(tmp_path):
    save_steps(tmp_path, 10)
    tree = abstract(make_trees(0)["ema"])
    del tree["embed"]["bias"]
    tree["head"] = tree["embed"]
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path, read_only=True).restore({"ema": tree, "key": jnp.int32(0)})
    assert str(error.value).endswith(
        "is of another model: key is not in it; ema.embed.bias is only in it; "
        "ema.head.kernel is not in it"
    )


def test_a_data_position_of_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1)}, data=data_iterator(), metadata={})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match="has the data position of 1 processes, not 2"):
        Checkpoints(tmp_path, read_only=True).restore({"step": jnp.int32(0)}, data=data_iterator())


def test_a_data_position_of_another_pipeline_is_no_damage(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1)}, data=data_iterator(), metadata={})
    part = grain.MapDataset.range(8).to_iter_dataset()
    other = iter(grain.IterDataset.mix([part, part]))
    with pytest.raises(CheckpointError, match="KeyError: 'parents'") as error:
        Checkpoints(tmp_path, read_only=True).restore({"step": jnp.int32(0)}, data=other)
    assert str(error.value).startswith(f"{tmp_path / '1'} is of another data pipeline: ")


@pytest.mark.usefixtures("failed_reads")
def test_a_truncated_newest_step_falls_back_to_the_one_before_and_says_so(tmp_path):
    save_steps(tmp_path, 10, 20)
    halve(largest_file(tmp_path / "20" / "ema"))
    lines = []
    checkpoints = Checkpoints(tmp_path, read_only=True)
    step, trees = checkpoints.restore(abstract(make_trees(0)), warn=lines.append)
    assert step == 10
    assert_same(trees, make_trees(10))
    (line,) = lines
    assert line.startswith(f"skipped the damaged checkpoint {tmp_path / '20'} (")
    assert "\n" not in line
    assert checkpoints.steps() == [10, 20]  # read only: nothing is moved


@pytest.mark.usefixtures("failed_reads")
def test_whatever_file_is_lost_or_cut_the_values_restored_are_ones_that_were_saved(tmp_path):
    x, data, batches = jnp.linspace(0, 1, 900).reshape(30, 30), data_iterator(), {}
    with contextlib.closing(Checkpoints(tmp_path / "whole")) as checkpoints:
        for step in 1, 2:
            checkpoints.save(step, {"x": x * step}, data=data, metadata={})
            batches[step] = next(data).tolist()
    files = [p for p in (tmp_path / "whole" / "2").rglob("*") if p.is_file()]
    assert len(files) > 8
    fell_back = 0
    for file in files:
        for harm in pathlib.Path.unlink, halve:
            run = tmp_path / "run"
            shutil.copytree(tmp_path / "whole", run)
            harm(run / file.relative_to(tmp_path / "whole"))
            lines, continued = [], data_iterator()
            step, trees = Checkpoints(run, read_only=True).restore(
                {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}, data=continued, warn=lines.append
            )
            assert (step, len(lines)) in ((2, 0), (1, 1))
            np.testing.assert_array_equal(trees["x"], x * step)
            assert next(continued).tolist() == batches[step]
            fell_back += len(lines)
            shutil.rmtree(run)
    assert fell_back >= 8  # at least the description, the array and the data position, twice


@pytest.mark.usefixtures("failed_reads")
def test_a_damaged_step_is_set_aside_so_that_it_is_saved_again(tmp_path):
    save_steps(tmp_path, 10, 20)
    lines = []
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        for _ in range(2):
            halve(largest_file(tmp_path / "20" / "ema"))
            assert checkpoints.restore(abstract(make_trees(0)), warn=lines.append)[0] == 10
            assert checkpoints.steps() == [10]
            assert (tmp_path / "20.damaged").is_dir()
            checkpoints.save(20, make_trees(20), metadata={})
            assert checkpoints.restore(abstract(make_trees(0)), warn=lines.append)[0] == 20
        checkpoints.save(30, make_trees(30), metadata={})
        checkpoints.wait()
        assert checkpoints.steps() == [20, 30]
    assert len(lines) == 2


@pytest.mark.usefixtures("failed_reads")
def test_when_all_are_damaged_the_error_names_them(tmp_path):
    save_steps(tmp_path, 10, 20)
    (tmp_path / "20" / "_CHECKPOINT_METADATA").unlink()
    halve(largest_file(tmp_path / "10" / "ema"))
    with pytest.raises(CheckpointError, match=r"step 20: .*; step 10: ") as error:
        Checkpoints(tmp_path, read_only=True).restore(abstract(make_trees(0)))
    assert "\n" not in str(error.value)


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 1 bytes")

    save_steps(tmp_path, 10, 20)
    monkeypatch.setattr("orbax.checkpoint.v1.load", load)
    with pytest.raises(CheckpointError, match=r"no room for 20: .*Out of memory$"):
        Checkpoints(tmp_path, read_only=True).restore({"step": jnp.int32(0)})


def test_a_save_that_fails_surfaces_at_the_next_and_leaves_the_others(tmp_path, small_files):
    x = np.random.default_rng(0).normal(size=LARGE).astype(np.float32)
    trees = {"x": jnp.asarray(x)}
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(LARGE)}, metadata={})
        checkpoints.save(2, trees, metadata={})
        with pytest.raises(CheckpointError, match=r"step 2 was not saved to .*: .*large") as error:
            checkpoints.save(3, trees, metadata={})
        assert "\n" not in str(error.value)
        assert checkpoints.steps() == [1]
        checkpoints.wait()  # told once
        checkpoints.save(3, trees, metadata={})
        with pytest.raises(CheckpointError, match="step 3 was not saved"):
            checkpoints.wait()
        small_files()
        checkpoints.save(3, trees, metadata={})
        checkpoints.wait()
        assert checkpoints.steps() == [3]
        _, restored = checkpoints.restore(abstract(trees))
    np.testing.assert_array_equal(restored["x"], x)


def test_a_failed_save_prints_no_traces(tmp_path, small_files, caplog):
    x = np.random.default_rng(0).normal(size=LARGE).astype(np.float32)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.asarray(x)}, metadata={})
    with pytest.raises(CheckpointError, match="step 1 was not saved"):
        checkpoints.close()
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write to ") as error:
        Checkpoints(tmp_path / "file" / "checkpoints")
    assert "\n" not in str(error.value)


def test_read_only_neither_creates_nor_cleans_nor_saves(tmp_path):
    missing, unfinished = tmp_path / "missing", tmp_path / "run" / "7.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    Checkpoints(missing, read_only=True).close()
    assert not missing.exists()
    checkpoints = Checkpoints(tmp_path / "run", read_only=True)
    assert checkpoints.steps() == []
    with pytest.raises(CheckpointError, match="read only"):
        checkpoints.save(1, {"step": jnp.int32(1)}, metadata={})
    assert unfinished.exists()


KILLED = """
import sys, jax.numpy as jnp, numpy as np
from enat_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"x": jnp.arange(1000.0)}, metadata={})
checkpoints.wait()
x = np.frombuffer(np.random.default_rng(0).bytes(200_000_000), np.uint8)
checkpoints.save(2, {"x": jnp.asarray(x)}, metadata={})
checkpoints.wait()
"""


def test_kill_9_during_a_save_leaves_the_step_before_and_its_debris_is_cleaned(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("2.orbax-checkpoint-tmp")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "2").exists()
    tree = {"x": jax.ShapeDtypeStruct((1000,), jnp.float32)}
    assert Checkpoints(tmp_path, read_only=True).restore(tree)[0] == 1
    assert list(tmp_path.glob("*tmp*"))
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        step, trees = checkpoints.restore(tree)
        assert step == 1
        np.testing.assert_array_equal(trees["x"], np.arange(1000.0))
        checkpoints.save(3, trees, metadata={})
        checkpoints.wait()
        assert not list(tmp_path.glob("*tmp*"))
        assert checkpoints.steps() == [1, 3]
