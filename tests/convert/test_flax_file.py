"""What is read from a Flax weight file, and that every other file is refused in one line."""

import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization

from enat_jax.convert.flax_file import is_flax_file, read_flax
from enat_jax.convert.torch_pickle import WeightFileError
from tests.support.golden import GOLDEN

FLOATS = np.arange(6, dtype=np.float32).reshape(2, 3)
TREE = {"params": {"encoder": {"kernel": FLOATS, "bias": np.ones(3)}, "codebook": FLOATS.T}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokenizer_checkpoint"


@pytest.fixture
def read(path):
    """Writes a tree as flax does, or bytes as they are, and reads them."""

    def read(tree, key=None):
        path.write_bytes(tree if isinstance(tree, bytes) else serialization.to_bytes(tree))
        return read_flax(path, key)

    return read


@pytest.fixture
def refusal(read, path):
    def refusal(tree, key=None):
        with pytest.raises(WeightFileError) as caught:
            read(tree, key)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return message.removeprefix(f"{path}: ")

    return refusal


def ndarray(shape, dtype, content):
    """An array as flax packs it, whether or not its parts agree."""
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, content), use_bin_type=True))


class TestArrays:
    def test_they_are_named_by_their_path(self, read):
        assert sorted(read(TREE)) == [
            "params.codebook", "params.encoder.bias", "params.encoder.kernel",
        ]  # fmt: skip
        arrays = read(TREE, "params")
        assert sorted(arrays) == ["codebook", "encoder.bias", "encoder.kernel"]
        np.testing.assert_array_equal(arrays["codebook"], FLOATS.T)
        assert sorted(read(TREE, "params.encoder")) == ["bias", "kernel"]

    @pytest.mark.parametrize(
        "dtype", ["float32", "float16", "float64", "int32", "uint8", "bool", ml_dtypes.bfloat16]
    )
    def test_they_keep_their_type(self, read, dtype):
        (array,) = read({"x": FLOATS.astype(dtype)}).values()
        assert array.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(array, FLOATS.astype(dtype))

    def test_scalars_and_empty_arrays_are_arrays(self, read):
        arrays = read({"scalar": np.float32(2.5), "none": np.zeros((0, 3), np.float32)})
        assert arrays["scalar"].shape == ()
        assert arrays["scalar"] == 2.5
        assert arrays["none"].shape == (0, 3)

    def test_large_ones_written_in_chunks_are_put_together(self, read, monkeypatch):
        monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 8)
        written = serialization.to_bytes({"a": {"b": FLOATS}})
        assert b"chunked" in written
        np.testing.assert_array_equal(read(written)["a.b"], FLOATS)

    def test_what_lies_beside_the_entry_is_not_looked_at(self, read):
        assert read({**TREE, "step": 7, "name": "vqgan"}, "params.encoder").keys() == {
            "kernel", "bias",
        }  # fmt: skip


class TestRefusal:
    def test_a_missing_entry_is_told_with_those_there_are(self, refusal):
        assert refusal(TREE, "ema") == "no entry 'ema' of 'ema'; entries: 'params'"
        message = refusal(TREE, "params.decoder")
        assert message == "no entry 'decoder' of 'params.decoder'; entries: 'encoder', 'codebook'"
        assert "entries: none" in refusal(TREE, "params.codebook.x")

    def test_an_entry_that_is_no_dict_is_told(self, refusal):
        assert refusal(TREE, "params.codebook") == "want a dict of arrays, got a ndarray"

    def test_leaves_that_are_no_arrays_are_all_named(self, refusal):
        message = refusal({"a": {"step": 7, "x": FLOATS}, "name": "vqgan", "none": None})
        assert message.startswith("entries that are not arrays with a name of their own: ")
        assert all(repr(name) in message for name in ("a.step", "name", "none"))

    def test_two_paths_that_read_the_same_are_told(self, refusal):
        assert "'a.b'" in refusal({"a": {"b": FLOATS}, "a.b": FLOATS})

    @pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "S8"])
    def test_arrays_of_other_things_than_numbers_are_told(self, refusal, dtype):
        assert "'x'" in refusal(msgpack.packb({"x": ndarray((1,), dtype, bytes(8))}))

    @pytest.mark.parametrize(
        "array",
        [
            ndarray((2, 3), "float32", bytes(20)),
            ndarray((2**62, 2**62), "float32", bytes(24)),
            ndarray(("a",), "float32", bytes(24)),
            ndarray(7.5, "float32", bytes(24)),
            ndarray((6,), "float32", bytes(23)),
            ndarray((3,), "O", bytes(24)),
            ndarray((3,), "no such type", bytes(24)),
            ndarray((3,), "float32", 5),
            msgpack.ExtType(1, b"\x93"),
            msgpack.ExtType(1, b""),
            msgpack.ExtType(2, b"\x91\x01"),
            msgpack.ExtType(3, b"\xc1"),
            msgpack.ExtType(9, b"other"),
            {"__msgpack_chunked_array__": True},
            {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {}},
            {"__msgpack_chunked_array__": True, "shape": {"1": 3}, "chunks": {"0": 5}},
        ],
    )
    def test_arrays_whose_parts_disagree_are_refused(self, refusal, array):
        assert refusal(msgpack.packb({"x": array}))

    def test_a_deeply_nested_tree_is_refused(self, refusal):
        for depth in (300, 5000):
            tree = b"\x81\xa1a" * depth + b"\x01"
            assert refusal(tree)

    def test_a_file_cut_short_is_refused(self, refusal):
        content = serialization.to_bytes(TREE)
        for length in range(1, len(content), 7):
            assert refusal(content[:length])

    def test_a_damaged_file_is_refused_or_reads_as_arrays(self, read, path):
        content, rng, refused = serialization.to_bytes(TREE), np.random.default_rng(0), 0
        for position in rng.integers(0, len(content), 300):
            damaged = bytearray(content)
            damaged[position] ^= 1 << rng.integers(8)
            try:
                arrays = read(bytes(damaged))
            except WeightFileError:
                refused += 1
            else:
                assert all(isinstance(array, np.ndarray) for array in arrays.values())
        assert 100 < refused < 300

    def test_missing_empty_and_foreign_files_are_refused(self, refusal, tmp_path):
        with pytest.raises(WeightFileError, match="No such file"):
            read_flax(tmp_path / "missing")
        with pytest.raises(WeightFileError, match="Is a directory"):
            read_flax(tmp_path)
        for content in (b"", b"<!DOCTYPE html>\n", b"\x93\x01\x02\x03", b"PK\x03\x04"):
            assert refusal(content)


class TestKind:
    def test_a_file_of_flax_is_known_by_how_it_begins(self, path):
        many = {f"layer_{n}": FLOATS for n in range(20)}
        for tree in (TREE, {"model": TREE}, many):
            path.write_bytes(serialization.to_bytes(tree))
            assert is_flax_file(path)

    def test_other_weight_files_are_not_taken_for_one(self, path):
        assert not is_flax_file(path)  # nothing is there
        assert not is_flax_file(path.parent)
        assert not is_flax_file(GOLDEN / "torch_file.pth")
        for content in (b"", b"\x80\x02}q\x00.", b"PK\x03\x04", b"<html>"):
            path.write_bytes(content)
            assert not is_flax_file(path)

    def test_nor_is_a_safetensors_file_whose_length_begins_as_a_dict_would(self, path):
        for longer in range(300):
            safetensors.numpy.save_file({"w" * (longer + 1): FLOATS}, path)
            content = path.read_bytes()
            assert content[8:9] == b"{"
            assert not is_flax_file(path)
