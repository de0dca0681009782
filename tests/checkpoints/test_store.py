import contextlib
import gc
import logging
import os
import resource
import shutil
import signal
import socket
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
from orbax.checkpoint import v1 as ocp

from enat_jax.checkpoints import digests as checkpoint_digests
from enat_jax.checkpoints.store import CheckpointError, Checkpoints

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
        assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


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
        with pytest.raises(CheckpointError, match=r"no readable checkpoint .* step 2: _CHECK"):
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


def truncated(content):
    return content[: len(content) // 2]


def emptied(content):
    return b""


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Steps 1 and 2 of small trees; tests leave them as they are."""
    directory = tmp_path_factory.mktemp("two_steps")
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        for step in 1, 2:
            checkpoints.save(step, small_trees(step), metadata={"step": step})
    return directory


def small_trees(step):
    x = jnp.linspace(0, step, 900).reshape(30, 30)  # too large to lie in an index
    return {"x": {"kernel": x, "bias": x[0]}, "step": jnp.int32(step)}


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (truncated, " is truncated: "),
        (emptied, " is truncated: 0 of "),
        (flipped, " is not as it "),
    ],
)
def test_damage_to_any_file_is_named_and_the_step_before_is_used(two_steps, harm, words):
    files = sorted(p for p in (two_steps / "2").rglob("*") if p.is_file())
    assert len(files) > 18
    kinds = {"_CHECKPOINT_METADATA", "_METADATA", "_sharding", "manifest.ocdbt", "process_0",
             "commit_success.txt", "digests.0-of-1.json"}  # fmt: skip
    assert {file.name for file in files if file.parent.name != "d"} == kinds
    tree, checkpoints = abstract(small_trees(0)), Checkpoints(two_steps, read_only=True)
    for file in files:
        name = str(file.relative_to(two_steps / "2"))
        told = f"{name} is damaged: " if name.startswith("digests.") else name + words
        content, lines = file.read_bytes(), []
        file.write_bytes(harm(content))
        assert checkpoints.metadata() == {"step": 1}, name
        step, trees = checkpoints.restore(tree, warn=lines.append)
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(tree, step=2)
        file.write_bytes(content)
        assert step == 1
        assert_same(trees, small_trees(1))
        (line,) = lines
        assert line.startswith(f"skipped the damaged checkpoint {two_steps / '2'} ({told}")
        assert str(error.value).startswith(f"no readable checkpoint in {two_steps}; step 2: {told}")
        assert "\n" not in line + str(error.value)
    assert checkpoints.restore(tree, warn=lines.append)[0] == 2  # each file is as it was again


def test_a_lost_file_is_damage(tmp_path):
    save_steps(tmp_path, 10, 20)
    (tmp_path / "20" / "ema" / "_sharding").unlink()
    lines = []
    Checkpoints(tmp_path, read_only=True).restore(abstract(make_trees(0)), warn=lines.append)
    assert lines == [f"skipped the damaged checkpoint {tmp_path / '20'} (ema/_sharding is missing)"]


def test_one_line_names_a_few_of_many_damaged_files(tmp_path):
    save_steps(tmp_path, 10)
    for path in (tmp_path / "10").rglob("_sharding"):
        halve(path)
    with pytest.raises(CheckpointError, match=r"truncated.*; .*truncated.*; .*; and 1 more$"):
        Checkpoints(tmp_path, read_only=True).restore(abstract(make_trees(0)))


@pytest.mark.parametrize("harm", [truncated, emptied, flipped])
def test_the_only_checkpoint_damaged_is_refused_and_not_moved(tmp_path, harm):
    save_steps(tmp_path, 10)
    file = tmp_path / "10" / "_CHECKPOINT_METADATA"
    file.write_bytes(harm(file.read_bytes()))
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(CheckpointError, match=r"; step 10: _CHECKPOINT_METADATA is ") as error:
            checkpoints.restore(abstract(make_trees(0)))
        assert "\n" not in str(error.value)
        assert checkpoints.steps() == [10]


def test_files_without_digests_are_let_be(tmp_path):
    save_steps(tmp_path, 10)
    for folder in "10", "10/ema", "10/ema/d":
        (tmp_path / folder / "note.txt").write_text("?")
    (tmp_path / "10" / "digests.0-of-1.unfinished").write_text("{")  # a kill while it was written
    lines = []
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.restore(abstract(make_trees(0)), warn=lines.append)[0] == 10
    assert lines == []


@pytest.mark.parametrize("file", ["digests.0-of-1.json", "digests.0-of-2.json"])
def test_a_checkpoint_without_all_digests_is_used_with_a_warning(tmp_path, file):
    save_steps(tmp_path, 10, 20)
    (tmp_path / "20" / "digests.0-of-1.json").rename(tmp_path / "20" / "kept")
    if file == "digests.0-of-2.json":  # one of two processes was killed
        (tmp_path / "20" / "kept").rename(tmp_path / "20" / file)
    lines = []
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.metadata() == {"step": 20}
    step, trees = checkpoints.restore(abstract(make_trees(0)), warn=lines.append)
    assert_same(trees, make_trees(20))
    assert (step, len(lines)) == (20, 1)
    assert lines[0].startswith(f"{tmp_path / '20'} was read but could not be verified: ")
    assert "\n" not in lines[0]


@pytest.mark.usefixtures("failed_reads")
@pytest.mark.parametrize("lost", ["the array", "_METADATA", "_CHECKPOINT_METADATA"])
def test_without_digests_what_cannot_be_read_is_passed_over(tmp_path, lost):
    save_steps(tmp_path, 10, 20)
    (tmp_path / "20" / "digests.0-of-1.json").unlink()
    if lost == "the array":
        halve(largest_file(tmp_path / "20" / "ema" / "d"))
    else:
        halve(next((tmp_path / "20").rglob(lost)))
    lines = []
    checkpoints = Checkpoints(tmp_path, read_only=True)
    step, trees = checkpoints.restore(abstract(make_trees(0)), warn=lines.append)
    assert step == 10
    assert_same(trees, make_trees(10))
    (line,) = lines
    assert line.startswith(f"skipped the damaged checkpoint {tmp_path / '20'} (")
    assert "\n" not in line
    assert checkpoints.steps() == [10, 20]  # read only: nothing is moved


def test_only_the_files_of_the_named_trees_are_verified(tmp_path):
    save_steps(tmp_path, 10, 20)
    halve(largest_file(tmp_path / "20" / "params"))
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.metadata() == {"step": 10}
    assert checkpoints.metadata(trees=["ema"]) == {"step": 10}  # known from the call before
    lines, ema = [], abstract({"ema": make_trees(0)["ema"]})
    assert checkpoints.restore(ema, warn=lines.append)[0] == 10  # the same
    assert len(lines) == 1
    assert checkpoints.restore(ema)[0] == 20
    assert checkpoints.metadata(trees=["ema"]) == {"step": 20}
    assert checkpoints.metadata(20) == {"step": 20}


def test_what_metadata_has_verified_the_next_restore_alone_takes_as_verified(tmp_path, monkeypatch):
    save_steps(tmp_path, 10)
    digested = []
    digest = checkpoint_digests._digest
    monkeypatch.setattr(
        checkpoint_digests, "_digest", lambda path: digested.append(path.name) or digest(path)
    )
    tree, checkpoints = abstract(make_trees(0)), Checkpoints(tmp_path, read_only=True)
    checkpoints.metadata()
    files = len(digested)
    assert files > 30
    checkpoints.restore(tree)
    assert len(digested) == files
    checkpoints.restore(tree)
    assert len(digested) == 2 * files
    del digested[:]
    checkpoints.metadata(10)
    assert sorted(digested) == ["_CHECKPOINT_METADATA", "commit_success.txt"]


def test_digests_follow_the_commit_by_themselves(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last_save_seconds is None
    checkpoints.save(1, make_trees(1), metadata={})
    deadline = time.monotonic() + 60
    while not (tmp_path / "1" / "digests.0-of-1.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert checkpoints.last_save_seconds > 0
    checkpoints.close()


def test_digests_that_cannot_be_written_are_a_warning(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("enat_jax.checkpoints.store.write_digests", full)
    save_steps(tmp_path, 10)
    (record,) = [r for r in caplog.records if r.name == "enat_jax.checkpoints.store"]
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"no digests for {tmp_path / '10'}: OSError: ")
    assert Checkpoints(tmp_path, read_only=True).steps() == [10]


def test_a_checkpoint_of_an_older_version_with_a_data_iterator_is_read(tmp_path):
    data = iter(grain.MapDataset.range(8).to_iter_dataset())
    fields = {"step": []}
    with ocp.training.Checkpointer(tmp_path) as old:
        for step in 1, 2:
            old.save_checkpointables(
                step,
                {"step": jnp.int32(step), "data": data},
                custom_metadata={"fields": fields, "data_processes": 4, "metadata": {"a": step}},
            )
    lines = []
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.metadata() == {"a": 2}
        step, trees = checkpoints.restore({"step": jnp.int32(0)}, warn=lines.append)
        assert (step, trees["step"], len(lines)) == (2, 2, 1)
        checkpoints.save(3, trees, metadata={})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3]


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
    with pytest.raises(CheckpointError, match=r"no room for .*20: .*Out of memory$"):
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


def test_a_directory_that_cannot_be_listed_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot list .*file: NotADirectory") as error:
        Checkpoints(tmp_path / "file", read_only=True).restore({"step": jnp.int32(0)})
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
from enat_jax.checkpoints.store import Checkpoints
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


KILLED_AFTER_THE_COMMIT = """
import os, signal, sys, jax.numpy as jnp
import enat_jax.checkpoints.store
checkpoints = enat_jax.checkpoints.store.Checkpoints(sys.argv[1])
checkpoints.save(1, {"x": jnp.arange(1000.0)}, metadata={})
checkpoints.wait()
enat_jax.checkpoints.store.write_digests = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save(2, {"x": jnp.arange(1000.0) + 1}, metadata={})
checkpoints.close()
"""


def test_kill_9_between_the_commit_and_the_digests_costs_no_step(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED_AFTER_THE_COMMIT, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    tree, lines = {"x": jax.ShapeDtypeStruct((1000,), jnp.float32)}, []
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        step, trees = checkpoints.restore(tree, warn=lines.append)
        np.testing.assert_array_equal(trees["x"], np.arange(1000.0) + 1)
        checkpoints.save(3, trees, metadata={})
        checkpoints.wait()
        assert checkpoints.restore(tree, warn=lines.append)[0] == 3
    assert step == 2
    (line,) = lines
    assert "2 was read but could not be verified" in line


HOSTS = """
import pathlib, sys
import jax, numpy as np
port, processes, process, directory, *arguments = sys.argv[1:]
if processes == "2":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
from jax.experimental.multihost_utils import sync_global_devices as sync
from enat_jax.checkpoints.store import Checkpoints
assert jax.device_count() == 4
directory, process = pathlib.Path(directory), int(process)
mesh = jax.make_mesh((4,), ("fsdp",))

def put(array, *axes):
    sharding = jax.NamedSharding(mesh, jax.P(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda where: array[where])

x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
trees = lambda k: {"ema": {"w": put(x * k, "fsdp"), "b": put(x[0] * k)}, "step": put(np.int32(k))}
abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
                        trees(0))

def assert_restored(step):
    lines = []
    found, got = checkpoints.restore(abstract, warn=lines.append)
    assert found == step, (found, lines)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(trees(step)), strict=True):
        assert a.sharding == b.sharding
        for shard, wanted in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(shard.data, wanted.data)
    return lines

checkpoints = Checkpoints(directory)
"""

SAVE = """
for step in 1, 2:
    checkpoints.save(step, trees(step), metadata={"images": 64 * step})
checkpoints.close()
"""

RESTORE_AND_SAVE = """
assert checkpoints.metadata() == {"images": 128}
assert assert_restored(2) == []
checkpoints.save(3, trees(3), metadata={"images": 192})
checkpoints.close()
"""

DAMAGE_ONE_HOST_SEES = """
import enat_jax.checkpoints.digests as digests
seen = []
digest = digests._digest
digests._digest = lambda path: seen.append(path) or digest(path)
assert assert_restored(3) == []
if process == 1:
    path = next(path for path in seen if path.name == "_METADATA")
    content = path.read_bytes()
    path.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
sync("flipped")
assert checkpoints.metadata() == {"images": 128}
(line,) = assert_restored(2)
assert line.startswith(f"skipped the damaged checkpoint {directory / '3'} (process 1: "), line
assert "_METADATA is not as it was written" in line, line
assert (directory / "3.damaged").is_dir()
sync("restored")
if process == 0:  # which reads none of the rows that process 1 has written
    for path in (directory / "2").glob("digests.*"):
        path.unlink()
    for path in (directory / "2" / "ema" / "ocdbt.process_1" / "d").iterdir():
        path.write_bytes(b"")
sync("truncated")
(line,) = assert_restored(1)
assert line.startswith(f"skipped the damaged checkpoint {directory / '2'} (process 1: "), line
checkpoints.save(4, trees(4), metadata={})
checkpoints.wait()
assert assert_restored(4) == []
assert checkpoints.steps() == [1, 4]
local = checkpoints.restore({"step": jax.ShapeDtypeStruct((), np.int32)})[1]["step"]
assert local.is_fully_addressable and local == 4
checkpoints.close()
"""


def run_hosts(code, processes, *arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {
        "PATH": "",
        "PYTHONPATH": ".",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", HOSTS + code, *map(str, (port, processes, each, *arguments))],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in range(processes)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()


def test_hosts_may_change_and_agree_on_damage_that_one_of_them_sees(tmp_path):
    run_hosts(SAVE, 2, tmp_path)
    assert len(list((tmp_path / "2").glob("digests.*-of-2.json"))) == 2
    run_hosts(RESTORE_AND_SAVE, 1, tmp_path)
    assert len(list((tmp_path / "3").glob("digests.0-of-1.json"))) == 1
    run_hosts(DAMAGE_ONE_HOST_SEES, 2, tmp_path)
