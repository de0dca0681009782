import contextlib
import gc
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx

from enat_jax.checkpoints import digests
from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from tests.support.on_hosts import on_devices, on_two_hosts

# When one read fails, Orbax gives up the others, which complain as they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LARGE = 300_000  # floats: enough that a limit on the size of a file stops the save


@pytest.fixture
def checkpoints(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as opened:
        yield opened
    gc.collect()


@pytest.fixture
def small_files():
    """Makes writing a file over 200 kB fail, like a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def make_trees(step):
    x = jnp.linspace(0, step, 900).reshape(30, 30)  # too large to lie in an index
    return {"ema": {"kernel": x, "bias": x[0]}, "step": jnp.int32(step)}


def abstract(trees):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)


ABSTRACT = abstract(make_trees(0))


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, make_trees(step), metadata={"step": step})
    checkpoints.wait()


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def halve_array(directory):
    halve(max(files(directory), key=lambda path: path.stat().st_size))


class TestSaving:
    def test_what_is_restored_is_what_was_saved(self, checkpoints):
        params = nnx.state(nnx.List([nnx.Linear(4, 8, rngs=nnx.Rngs(0))]), nnx.Param)
        opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
        trees = {"params": params, "opt_state": opt_state, "step": jnp.int32(20)}
        checkpoints.save(10, jax.tree.map(lambda x: x + 1, trees), metadata={})
        checkpoints.save(20, trees, metadata={})
        step, restored = checkpoints.restore(abstract(trees))
        assert step == 20
        assert_same(restored, trees)

    def test_a_directory_without_checkpoints_restores_nothing(self, checkpoints, tmp_path):
        assert Checkpoints(tmp_path / "new", read_only=True).restore(ABSTRACT) is None
        assert checkpoints.restore(ABSTRACT) is None
        with pytest.raises(CheckpointError, match="no checkpoint in "):
            checkpoints.metadata()

    def test_arrays_given_away_after_save_returns_are_saved_as_they_were(self, checkpoints):
        overwrite = jax.jit(lambda x: x - 1, donate_argnums=0)
        x = jnp.ones(LARGE)
        checkpoints.save(1, {"x": x}, metadata={})
        for _ in range(20):
            x = overwrite(x)
        _, trees = checkpoints.restore({"x": jax.ShapeDtypeStruct((LARGE,), jnp.float32)})
        assert (trees["x"] == 1).all()

    def test_the_last_keep_steps_stay(self, tmp_path):
        with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
            save(checkpoints, 1, 2, 3, 4)
            assert checkpoints.steps() == [3, 4]
            assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]
            assert checkpoints.last_save_seconds > 0

    def test_a_step_already_saved_is_left_alone(self, checkpoints):
        checkpoints.save(1, {"step": jnp.int32(1)}, metadata={"first": True})
        checkpoints.save(1, {"step": jnp.int32(2)}, metadata={"first": False})
        assert checkpoints.metadata() == {"first": True}
        assert checkpoints.restore({"step": jnp.int32(0)})[1]["step"] == 1

    def test_digests_follow_the_commit_by_themselves(self, checkpoints, tmp_path):
        checkpoints.save(1, make_trees(1), metadata={})
        while not (tmp_path / "1" / "digests.0-of-1.json").exists():
            time.sleep(0.01)

    def test_digests_that_cannot_be_written_are_a_warning(
        self, checkpoints, tmp_path, monkeypatch, caplog
    ):
        monkeypatch.setattr("enat_jax.checkpoints.store.write_digests", lambda _: 1 // 0)
        save(checkpoints, 10)
        (record,) = [r for r in caplog.records if r.name == "enat_jax.checkpoints.store"]
        assert record.getMessage().startswith(f"no digests for {tmp_path / '10'}: ZeroDivisionErr")
        assert checkpoints.steps() == [10]

    def test_a_save_that_fails_surfaces_at_the_next_and_leaves_the_others(
        self, tmp_path, small_files, caplog
    ):
        x = np.random.default_rng(0).normal(size=LARGE).astype(np.float32)
        trees = {"x": jnp.asarray(x)}
        with contextlib.closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
            checkpoints.save(1, {"x": jnp.zeros(LARGE)}, metadata={})
            checkpoints.save(2, trees, metadata={})
            with pytest.raises(CheckpointError, match=r"step 2 was not saved .*: .*large") as error:
                checkpoints.save(3, trees, metadata={})
            assert "\n" not in str(error.value)
            assert not [r for r in caplog.records if r.levelno >= logging.ERROR]  # no traces
            assert checkpoints.steps() == [1]
            checkpoints.wait()  # told once
            small_files()
            checkpoints.save(3, trees, metadata={})
            checkpoints.wait()
            assert checkpoints.steps() == [3]
            assert_same(checkpoints.restore(abstract(trees))[1], trees)

    def test_read_only_neither_creates_nor_cleans_nor_saves(self, tmp_path):
        unfinished = tmp_path / "run" / "7.orbax-checkpoint-tmp"
        unfinished.mkdir(parents=True)
        Checkpoints(tmp_path / "missing", read_only=True).close()
        assert not (tmp_path / "missing").exists()
        checkpoints = Checkpoints(tmp_path / "run", read_only=True)
        assert checkpoints.steps() == []
        with pytest.raises(CheckpointError, match="read only"):
            checkpoints.save(1, {"step": jnp.int32(1)}, metadata={})
        assert unfinished.exists()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Steps 10 and 20; tests leave them as they are."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        save(checkpoints, 10, 20)
    return directory


class TestReading:
    @pytest.fixture
    def copy(self, directory, tmp_path):
        """Steps 10 and 20, to be changed."""
        yield shutil.copytree(directory, tmp_path / "copy")
        gc.collect()

    def test_a_step_is_chosen_by_its_number(self, directory):
        checkpoints = Checkpoints(directory, read_only=True)
        step, trees = checkpoints.restore(ABSTRACT, step=10)
        assert step == 10
        assert_same(trees, make_trees(10))
        assert checkpoints.metadata(10) == {"step": 10}
        assert checkpoints.metadata() == {"step": 20}
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 in .*: 10, 20"):
            checkpoints.metadata(3)

    def test_only_the_named_tree_is_read_and_verified(self, copy):
        shutil.rmtree(copy / "20" / "step")
        checkpoints, ema = Checkpoints(copy, read_only=True), {"ema": ABSTRACT["ema"]}
        assert_same(checkpoints.restore(ema)[1], {"ema": make_trees(20)["ema"]})
        assert checkpoints.restore(ABSTRACT, warn=lambda line: None)[0] == 10

    def test_leaves_land_on_the_mesh_asked_for(self, directory):
        mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
        tree = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), ABSTRACT["ema"]
        )
        _, trees = Checkpoints(directory, read_only=True).restore({"ema": tree})
        assert trees["ema"]["kernel"].sharding == sharding

    def test_shapes_and_fields_of_another_model_are_named(self, directory):
        ema = {"kernel": jnp.zeros((30, 8)), "scale": jnp.zeros(3)}
        with pytest.raises(CheckpointError) as error:
            Checkpoints(directory, read_only=True).restore({"ema": ema, "key": jnp.int32(0)})
        assert str(error.value) == (
            f"{directory / '20'} is of another model: ema.kernel = [30, 8], there [30, 30];"
            ' ema.scale = [3], there "nothing"; key = [], there "nothing";'
            ' ema.bias = "nothing", there [30]'
        )

    @pytest.mark.parametrize("harm", [
        lambda content: content[: len(content) // 2], lambda content: b"",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    ], ids=["truncated", "emptied", "flipped"])  # fmt: skip
    def test_whichever_file_is_corrupt_is_named_and_the_step_before_is_used(self, directory, harm):
        checkpoints = Checkpoints(directory, read_only=True)
        kinds = {"_CHECKPOINT_METADATA", "_METADATA", "_sharding", "manifest.ocdbt", "process_0",
                 "commit_success.txt", "digests.0-of-1.json"}  # fmt: skip
        there = files(directory / "20")
        assert {file.name for file in there if file.parent.name != "d"} == kinds
        for file in there:
            name = str(file.relative_to(directory / "20"))
            words = "corrupt: without it" if "digests." in name else "not as it was written"
            content, lines = file.read_bytes(), []
            file.write_bytes(harm(content))
            step, trees = checkpoints.restore(ABSTRACT, warn=lines.append)
            with pytest.raises(CheckpointError) as error:
                checkpoints.restore(ABSTRACT, step=20)
            file.write_bytes(content)
            assert step == 10
            assert_same(trees, make_trees(10))
            (line,) = lines
            where = directory / "20"
            assert line.startswith(f"skipped the damaged checkpoint {where} ({name} is {words}")
            assert f"no readable checkpoint in {directory}; step 20: {name} is" in str(error.value)
            assert "\n" not in line + str(error.value)
        assert checkpoints.restore(ABSTRACT)[0] == 20  # each file is as it was again

    def test_one_line_names_a_few_of_many_files(self, copy):
        for path in files(copy / "20" / "ema"):
            path.unlink()
        with pytest.raises(CheckpointError, match=r"step 20: .* missing; .*; .*; and \d+ more$"):
            Checkpoints(copy, read_only=True).restore(ABSTRACT, step=20)

    def test_a_corrupt_step_is_set_aside_so_that_it_is_saved_again(self, copy):
        lines = []
        with contextlib.closing(Checkpoints(copy, keep=2)) as checkpoints:
            for _ in range(2):
                halve_array(copy / "20" / "ema")
                assert checkpoints.restore(ABSTRACT, warn=lines.append)[0] == 10
                assert checkpoints.steps() == [10]
                assert (copy / "20.damaged").is_dir()
                save(checkpoints, 20)
                assert checkpoints.restore(ABSTRACT, warn=lines.append)[0] == 20
            save(checkpoints, 30)
            assert checkpoints.steps() == [20, 30]
        assert len(lines) == 2

    def test_when_all_are_corrupt_they_are_named_and_not_moved(self, copy):
        (copy / "20" / "_CHECKPOINT_METADATA").unlink()
        halve_array(copy / "10" / "ema")
        with contextlib.closing(Checkpoints(copy)) as checkpoints:
            with pytest.raises(CheckpointError, match=r"step 20: .*missing; step 10: ") as error:
                checkpoints.restore(ABSTRACT)
            assert "\n" not in str(error.value)
            assert checkpoints.steps() == [10, 20]

    @pytest.mark.parametrize(
        ("name", "value", "part"),
        [
            ("metadata", [1], "TypeError"),
            ("fields", [1], "fields of its metadata"),
            ("metadata", {"config": [1], "class_names": 5}, "config, class_names of its metadata"),
            ("metadata", {"position": {"images": "9"}}, "images of its metadata"),
            ("metadata", {"position": {}}, "KeyError: 'images'"),
        ],
    )
    def test_metadata_of_somebody_else_are_passed_over(self, copy, name, value, part):
        (copy / "20" / "digests.0-of-1.json").unlink()
        file = copy / "20" / "_CHECKPOINT_METADATA"
        content = json.loads(file.read_text())
        content["custom_metadata"][name] = value
        file.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=part):
            Checkpoints(copy, read_only=True).metadata(20)
        assert Checkpoints(copy, read_only=True).restore(ABSTRACT, warn=print)[0] == 10

    @pytest.mark.parametrize("lost", ["the array", "_METADATA", "_CHECKPOINT_METADATA"])
    def test_without_digests_what_cannot_be_read_is_passed_over(self, copy, lost):
        (copy / "20" / "digests.0-of-1.json").unlink()
        if lost == "the array":
            halve_array(copy / "20" / "ema" / "d")
        else:
            halve(next((copy / "20").rglob(lost)))
        lines = []
        step, trees = Checkpoints(copy, read_only=True).restore(ABSTRACT, warn=lines.append)
        assert step == 10
        assert_same(trees, make_trees(10))
        (line,) = lines
        assert line.startswith(f"skipped the damaged checkpoint {copy / '20'} (")
        assert "\n" not in line

    def test_files_without_digests_do_not_matter(self, copy):
        for folder in "20", "20/ema", "20/ema/d":
            (copy / folder / "note.txt").write_text("?")
        (copy / "20" / "digests.0-of-1.unfinished").write_text("{")  # a kill while it was written
        assert Checkpoints(copy, read_only=True).restore(ABSTRACT)[0] == 20

    def test_digests_of_each_process_as_earlier_versions_wrote_them_are_verified(self, copy):
        whole = copy / "20" / "digests.0-of-1.json"
        content = json.loads(whole.read_text())["files"]
        whole.unlink()
        for process in range(2):
            share = dict(list(content.items())[process::2])
            text = json.dumps({"crc32": digests._crc_of_all(share), "files": share})
            (copy / "20" / f"digests.{process}-of-2.json").write_text(text)
        checkpoints = Checkpoints(copy, read_only=True)
        assert checkpoints.restore(ABSTRACT)[0] == 20
        halve_array(copy / "20" / "ema")
        assert checkpoints.restore(ABSTRACT, warn=lambda line: None)[0] == 10

    def test_no_byte_of_the_digests_can_change_unseen(self, copy):
        path = epath.Path(copy / "20" / "digests.0-of-1.json")
        content = path.read_bytes()
        for index, byte in enumerate(content):
            path.write_bytes(content[:index] + bytes([byte ^ 1]) + content[index + 1 :])
            assert "digests.0-of-1.json is corrupt" in digests.find_corruption(path.parent, ())

    def test_values_that_are_not_finite_are_passed_over(self, copy, tmp_path):
        with contextlib.closing(Checkpoints(copy)) as checkpoints:
            trees = make_trees(29)
            trees["ema"]["bias"] = trees["ema"]["bias"].at[3].set(np.nan)
            checkpoints.save(29, trees, metadata={"step": 29})
            said = []
            step, _ = checkpoints.restore(ABSTRACT, warn=said.append)
            assert step == 20
            assert said[0].endswith("29 (ema.bias is not finite)")

    def test_too_little_memory_is_no_corruption(self, directory, monkeypatch):
        def load(*_, **__):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 1 bytes")

        monkeypatch.setattr("orbax.checkpoint.v1.load", load)
        with pytest.raises(CheckpointError, match=r"cannot read .*20: .*Out of memory$"):
            Checkpoints(directory, read_only=True).restore(ABSTRACT)


KILLED = """
import os, signal, sys, jax.numpy as jnp, numpy as np
from enat_jax.checkpoints import store
checkpoints = store.Checkpoints(sys.argv[1])
checkpoints.save(1, {"x": jnp.arange(1000.0)}, metadata={})
checkpoints.wait()
if sys.argv[2] == "before the digests":
    store.write_digests = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    x = jnp.arange(1000.0) + 1
else:
    x = jnp.asarray(np.frombuffer(np.random.default_rng(0).bytes(200_000_000), np.uint8))
checkpoints.save(2, {"x": x}, metadata={})
checkpoints.wait()
"""


def test_kill_9_during_a_save_leaves_the_step_before_and_its_debris_is_cleaned(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), "during the save"])
    while not list(tmp_path.glob("2.orbax-checkpoint-tmp")):
        assert process.poll() is None
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


def test_kill_9_between_the_commit_and_the_digests_costs_no_step(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), "before the digests"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    tree = {"x": jax.ShapeDtypeStruct((1000,), jnp.float32)}
    step, trees = Checkpoints(tmp_path, read_only=True).restore(tree)
    assert step == 2
    np.testing.assert_array_equal(trees["x"], np.arange(1000.0) + 1)


HOSTS = """
import pathlib
from jax.experimental.multihost_utils import sync_global_devices as sync
from enat_jax.checkpoints.store import Checkpoints
directory = pathlib.Path(arguments[0])
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
    at, got = checkpoints.restore(abstract, warn=lines.append)
    assert at == step, (at, lines)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(trees(step)), strict=True):
        assert a.sharding == b.sharding
        for shard, wanted in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(shard.data, wanted.data)
    return lines

checkpoints = Checkpoints(directory)
"""


@pytest.mark.slow
def test_the_number_of_processes_may_change_and_all_pass_over_what_is_corrupt(tmp_path):
    on_two_hosts(
        HOSTS
        + """
for step in 1, 2:
    checkpoints.save(step, trees(step), metadata={"images": 64 * step})
checkpoints.close()
""",
        tmp_path,
    )
    assert [path.name for path in (tmp_path / "2").glob("digests.*")] == ["digests.0-of-1.json"]
    on_devices(
        HOSTS
        + """
assert checkpoints.metadata() == {"images": 128}
assert assert_restored(2) == []
checkpoints.save(3, trees(3), metadata={"images": 192})
checkpoints.close()
""",
        tmp_path,
        devices=4,
    )
    halve_array(tmp_path / "3" / "ema")
    on_two_hosts(
        HOSTS
        + """
(line,) = assert_restored(2)
assert line.startswith(f"skipped the damaged checkpoint {directory / '3'} (ema/"), line
assert (directory / "3.damaged").is_dir()
checkpoints.save(4, trees(4), metadata={})
checkpoints.wait()
assert assert_restored(4) == []
assert checkpoints.steps() == [1, 2, 4]
local = checkpoints.restore({"step": jax.ShapeDtypeStruct((), np.int32)})[1]["step"]
assert local.is_fully_addressable and local == 4
checkpoints.close()
""",
        tmp_path,
    )
