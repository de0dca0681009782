import json

import numpy as np
import pytest

from enat_jax import files
from enat_jax.files import atomic, read_json, write_arrays, write_json, write_text


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


def test_a_file_has_its_name_only_once_its_bytes_are_on_disk(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files, "fsync", lambda path: seen.append((names(tmp_path), path.name)))
    write_text(tmp_path / "a", "all of it")
    assert seen == [(["a.partial"], "a.partial")]
    assert names(tmp_path) == ["a"]


def test_processes_that_write_the_same_file_do_not_meet(tmp_path):
    with (
        atomic(tmp_path / "a", partial="1") as one,
        atomic(tmp_path / "a", partial="2") as other,
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
