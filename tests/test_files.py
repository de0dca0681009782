import json
import os
import resource
import socket
import subprocess
import sys

import numpy as np
import pytest

from enat_jax import files
from enat_jax.data.pictures import write_png
from enat_jax.errors import UserError
from enat_jax.files import atomic, lock, read_json, write_arrays, write_json, write_text


@pytest.fixture
def small_files():
    """Makes writing a file over 200 bytes fail, like a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_one_before_and_leaves_nothing_beside_it(tmp_path):
    for text in ("one\n", "two\r\nthree"):
        write_text(tmp_path / "a.csv", text)
        assert (tmp_path / "a.csv").read_bytes() == text.encode()
    assert names(tmp_path) == ["a.csv"]


def test_a_block_that_raises_leaves_the_file_as_it_was(tmp_path):
    write_text(tmp_path / "a.csv", "complete")
    with pytest.raises(KeyError), atomic(tmp_path / "a.csv") as part:  # noqa: PT012
        part.write_text("com")
        raise KeyError
    assert (tmp_path / "a.csv").read_text() == "complete"
    assert names(tmp_path) == ["a.csv"]


def test_a_link_is_replaced_and_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "other").write_text("other")
    (tmp_path / "a").symlink_to("other")
    write_text(tmp_path / "a", "mine")
    assert (tmp_path / "other").read_text() == "other"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"no file: '.*/pipe'"):
        write_text(tmp_path / "pipe", "mine")
    assert names(tmp_path) == ["a", "other", "pipe"]


@pytest.mark.parametrize("write", [
    lambda path: write_png(path, np.zeros((300, 300, 3), np.uint8)),
    lambda path: write_arrays(path, {"a": np.zeros(3000)}),
    lambda path: write_json(path, list(range(3000))),
])  # fmt: skip
def test_what_does_not_fit_on_the_disk_is_named_and_the_file_stays(tmp_path, small_files, write):
    (tmp_path / "a.png").write_text("complete")
    with pytest.raises(OSError, match=r"too large: '.*/a\.png'"):
        write(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text() == "complete"
    assert names(tmp_path) == ["a.png"]


def test_a_lock_names_who_holds_it_and_a_kill_lets_go_of_it(tmp_path):
    code = "import sys, time; from enat_jax.files import lock\n"
    code += "with lock(sys.argv[1]): print(1, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, tmp_path / "lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        who = f"in use by process {holder.pid} on {socket.gethostname()}$"
        with pytest.raises(UserError, match=who), lock(tmp_path / "lock"):
            pass
        holder.kill()
    with lock(tmp_path / "lock"):
        pass
    assert names(tmp_path) == []


def test_a_file_has_its_name_only_once_its_bytes_are_on_disk(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files, "fsync", lambda path: seen.append((names(tmp_path), path.name)))
    write_text(tmp_path / "a", "all of it")
    ((during, part),) = seen
    assert during == [part] != ["a"]
    assert names(tmp_path) == ["a"]


def test_processes_that_write_the_same_file_do_not_meet(tmp_path):
    with (
        atomic(tmp_path / "a") as one,
        atomic(tmp_path / "a") as other,
    ):
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"  # whose block ended last


def test_json_and_arrays_read_back(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 0.1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 0.1]}
    write_arrays(tmp_path / "a.npz", {"b": np.arange(3)})
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["b"], [0, 1, 2])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[" * 100_000, "nested deeper than 64"),
        ("[" * 100 + "]" * 100, "nested deeper than 64"),
        ('{"a": [{"b": 1, "b": 2}]}', "has the key 'b' twice"),
        ("{" + " " * 2**26, "has more than 67108864 bytes"),
        ("{", "Expecting"),
    ],
)
def test_json_that_is_made_to_harm_is_refused(tmp_path, text, part):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=part):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": [1, "bc", {"d": null}]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, "bc", {"d": None}]}
