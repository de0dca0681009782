"""What is read from a weight file, and that every other file is refused in one line.

`golden/torch_file.pth` was written by `torch.save` (2.13); `torch_file.npz` holds its values as
torch sees them, bfloat16 widened to float32.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict, deque

import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors.numpy
from flax import serialization

from enat_jax.convert.weight_file import read_weights
from enat_jax.errors import UserError
from tests.support.golden import GOLDEN
from tests.support.torch_file import (
    FLOATS,
    HOOKS,
    Call,
    Class,
    Raw,
    State,
    Stored,
    code,
    save,
    storage,
    tensor,
)

TORCH = GOLDEN / "torch_file.pth"
GRID = FLOATS.reshape(2, 3)
TREE = {"params": {"encoder": {"kernel": GRID, "bias": np.ones(3)}, "codebook": GRID.T}}


@pytest.fixture
def put(tmp_path):
    """Writes bytes, or a tree as flax does; returns the path."""

    def put(content, name="weights"):
        if not isinstance(content, bytes):
            content = serialization.to_bytes(content)
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return put


def refusal(path, key=None):
    """The message of a refused file, without the path that it must start with."""
    with pytest.raises(UserError) as caught:
        read_weights(path, key)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


class TestTorch:
    def test_every_tensor_that_torch_wrote_is_read_with_its_dtype_shape_and_values(self):
        weights, expected = read_weights(TORCH), np.load(TORCH.with_suffix(".npz"))
        assert list(weights) == expected.files
        assert weights["scalar"].shape == ()
        assert weights["bfloat16"].dtype == ml_dtypes.bfloat16
        for name, array in weights.items():
            assert array.shape == expected[name].shape, name
            assert name == "bfloat16" or array.dtype == expected[name].dtype, name
            np.testing.assert_array_equal(array.astype(expected[name].dtype), expected[name], name)
            assert array.flags.c_contiguous, name
            assert not array.flags.writeable, name

    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_views_may_share_a_storage_compressed_or_not(self, tmp_path, compression):
        views = {"w": tensor(), "b": tensor((3,), (2,), 1), "one": tensor((1, 6), (2**62, 1))}
        weights = read_weights(save(tmp_path, views, compression))
        np.testing.assert_array_equal(weights["w"], GRID)
        np.testing.assert_array_equal(weights["b"], FLOATS[1::2])
        np.testing.assert_array_equal(weights["one"], FLOATS[None])  # its stride is never taken

    @pytest.mark.parametrize("put", [b"q\x00", b"r\x00\x00\x00\x00", b"\x94"])
    def test_a_tensor_may_be_named_twice(self, tmp_path, put):
        value = {"w": Raw(code(tensor()) + put), "tied": Raw(b"h\x00")}
        weights = read_weights(save(tmp_path, value))
        np.testing.assert_array_equal(weights["w"], weights["tied"])

    def test_an_untyped_storage_holds_bytes(self, tmp_path):
        untyped = Stored(("storage", Class("torch.storage.UntypedStorage"), "0", "cpu", 24))
        array = read_weights(save(tmp_path, {"w": tensor((24,), (1,), base=untyped)}))["w"]
        assert array.dtype == np.uint8
        assert array.tobytes() == FLOATS.tobytes()

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_an_ordered_dict_of_any_protocol_is_a_dict(self, tmp_path, protocol):
        assert read_weights(save(tmp_path, pickle.dumps(OrderedDict(), protocol))) == {}

    def test_a_file_without_a_byteorder_member_is_little_endian(self, tmp_path):
        path = tmp_path / "old.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("old/data.pkl", b"\x80\x02" + code({"w": tensor()}) + b".")
            archive.writestr("old/data/0", FLOATS.tobytes())
        np.testing.assert_array_equal(read_weights(path)["w"], GRID)
        big = save(tmp_path, {"w": tensor()}, byteorder=b"big")
        assert "byte order" in refusal(big)

    @pytest.mark.parametrize(
        "change",
        [
            {"offset": 1},
            {"offset": -1},
            {"offset": True},
            {"offset": 2**64},
            {"shape": (7,), "strides": (1,)},
            {"shape": (7,), "strides": (0,)},
            {"shape": (2**40, 2**40), "strides": (0, 0)},
            {"strides": (4, 1)},
            {"strides": (2**62, 1)},
            {"strides": (-3, 1)},
            {"strides": (3,)},
            {"shape": (-2, 3)},
            {"shape": (2, "3")},
            {"base": storage(count=5)},
        ],
    )
    def test_a_view_that_does_not_fit_its_storage_is_refused(self, tmp_path, change):
        path = save(tmp_path, {"fine": tensor(), "wrong": tensor(**change)})
        assert refusal(path).startswith("'wrong': does not fit its storage of ")

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"base": storage(count=7)}, "data/0 has not"),
            ({"base": storage("Double")}, "data/0 has not 6 float64"),
            ({"base": storage(key="1")}, "KeyError"),
            ({"base": storage(key="../data/0")}, "KeyError"),
            ({"base": storage(count=-6)}, "-6 elements"),
            ({"base": storage(count="6")}, "'w' (torch.FloatStorage)"),
            ({"shape": (0, 2**62)}, "ValueError"),
            ({"shape": (1,) * 99, "strides": (1,) * 99}, "ValueError"),
        ],
    )
    def test_a_storage_that_is_not_there_is_refused(self, tmp_path, change, problem):
        assert problem in refusal(save(tmp_path, {"w": tensor(**change)}))


class Touch:
    """Pickles as a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class TestNothingIsExecuted:
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_a_call_stays_a_name(self, tmp_path, protocol):
        pickled = pickle.dumps({"w": Touch(tmp_path / "touched")}, protocol)
        assert "'w' (_io.open)" in refusal(save(tmp_path, pickled)).replace("(io.", "(_io.")
        beside = pickle.dumps({"weights": {}, "w": Touch(tmp_path / "touched")}, protocol)
        assert read_weights(save(tmp_path, beside), "weights") == {}
        assert not (tmp_path / "touched").exists()
        pickle.loads(pickled)["w"].close()
        assert (tmp_path / "touched").exists(), "the file was harmless, and the test proves nothing"

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_classes_beyond_tensors_are_named(self, tmp_path, protocol):
        value = {"a": deque([1]), "b": np.float32(1), "c": [OrderedDict], "d": struct.Struct}
        message = refusal(save(tmp_path, pickle.dumps(value, protocol)))
        for name in ("'a' (collections.deque)", "'b' (numpy.dtype)", "'c' (list)", "Struct)"):
            assert name in message

    def test_what_lies_beside_the_entry_may_be_of_any_class(self, tmp_path):
        value = {"ema": {"w": tensor()}, "callbacks": {"x": Call(Class("pathlib.Path"), ("/",))}}
        np.testing.assert_array_equal(read_weights(save(tmp_path, value), "ema")["w"], GRID)
        keyed = Raw(b"}(" + code("ema") + code({"w": tensor()}) + code(Class("a.B")) + b"Nu")
        np.testing.assert_array_equal(read_weights(save(tmp_path, keyed), "ema")["w"], GRID)
        assert "'callbacks' (dict)" in refusal(save(tmp_path, value))

    @pytest.mark.parametrize(
        ("value", "name"),
        [
            (Class("torch.float32"), "torch.float32"),
            (tensor(base=storage("ComplexFloat")), "torch.ComplexFloatStorage"),
            (Call(Class("torch.FloatStorage"), ()), "torch.FloatStorage"),
            (Call(Class("collections.OrderedDict"), ([("a", 1)],)), "collections.OrderedDict"),
            (Call(tensor().function, ()), "torch._utils._rebuild_tensor_v2"),
            (Call(tensor().function, (*tensor().arguments, {"neg": True})), "_rebuild_tensor_v2"),
            (Call(Class("torch._utils._rebuild_parameter"), (1, True, HOOKS)), "_rebuild_param"),
            (tensor(base="text"), "_rebuild_tensor_v2"),
            (tensor(shape=[2, 3]), "_rebuild_tensor_v2"),
            (Call(Class("torch.Size"), ((6,),)), "tuple"),
            (State(tensor(), {"_metadata": HOOKS}), "an object with a state"),
            ([tensor()], "list"),
            (3, "int"),
        ],
    )
    def test_whatever_is_no_tensor_is_refused(self, tmp_path, value, name):
        message = refusal(save(tmp_path, {"fine": tensor(), "w": value}))
        assert message.startswith("entries that are not named tensors: 'w' (")
        assert name in message

    @pytest.mark.parametrize(
        ("value", "problem"),
        [
            (Call("text", ()), "calls what is no function"),
            (Stored(("storage", Class("torch.Size"), "0", "cpu")), "got a Named"),
            (Stored("0"), "other than a storage"),
            (Raw(b")" + code("a") + b"a"), "adds to a tuple"),
            (Raw(b"}(" + code("a") + b"u"), "ValueError"),
            (Raw(code(1) + code(2) + b"\x93"), "TypeError"),
            (Raw(b"(ios\nsystem\n"), "instruction INST"),
            (Raw(b"\x82\x01"), "instruction EXT1"),
            (Raw(b"h\x05"), "KeyError"),
            (Raw(b"0"), "instruction POP"),
            (Raw(b"u"), "IndexError"),
            (Raw(b"NN"), "ValueError"),
            (Raw(b"\xff"), "ValueError"),
            (Raw(b"X\xff\xff\xff\xffa"), "ValueError"),
            (b"\x80\x02" + code({}), "ValueError"),  # no end
            (tensor(), "want a dict of arrays, got a Tensor"),
            ("text", "want a dict of arrays, got a str"),
        ],
    )
    def test_a_pickle_that_torch_does_not_write_is_refused(self, tmp_path, value, problem):
        assert problem in refusal(save(tmp_path, value))

    def test_a_nest_of_tuples_is_never_hashed(self, tmp_path):
        """`pickle` itself would overflow the C stack here."""
        nest = Raw(b"})" + 100_000 * b"\x85" + b"Ns")
        assert "(NoneType)" in refusal(save(tmp_path, nest))

    def test_a_pickle_has_at_most_sixteen_megabytes(self, tmp_path):
        path = save(tmp_path, b"N" * (2**24 + 1), zipfile.ZIP_DEFLATED)
        assert f"data.pkl has {2**24 + 1} bytes, must be at most {2**24}" in refusal(path)

    @pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of pickletools, about a name
    def test_a_pickle_of_random_instructions_raises_nothing_else(self, tmp_path):
        pickled, rng = zipfile.ZipFile(TORCH).read("torch_file/data.pkl"), np.random.default_rng(0)
        for _ in range(300):
            damaged = np.frombuffer(pickled, np.uint8).copy()
            damaged[rng.integers(len(damaged), size=3)] = rng.integers(256, size=3)
            assert refusal(save(tmp_path, damaged.tobytes()))  # it has only storage 0


class TestFlax:
    def test_arrays_are_named_by_their_path(self, put):
        arrays = read_weights(put(TREE))
        assert sorted(arrays) == ["codebook", "encoder.bias", "encoder.kernel"]
        np.testing.assert_array_equal(arrays["codebook"], GRID.T)
        assert not arrays["codebook"].flags.writeable
        assert sorted(read_weights(put({"model": TREE}))) == [
            f"model.params.{name}" for name in sorted(arrays)
        ]
        beside = put({"model": TREE, "step": 7})
        assert sorted(read_weights(beside, "model.params.encoder")) == ["bias", "kernel"]

    @pytest.mark.parametrize(
        "dtype", ["float32", "float16", "float64", "int32", "uint8", "bool", ml_dtypes.bfloat16]
    )
    def test_they_keep_their_type(self, put, dtype):
        (array,) = read_weights(put({"x": GRID.astype(dtype)})).values()
        assert array.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(array, GRID.astype(dtype))

    def test_scalars_and_empty_arrays_are_arrays(self, put):
        arrays = read_weights(
            put({"scalar": np.float32(2.5), "none": np.zeros((0, 3), np.float32)})
        )
        assert arrays["scalar"].shape == ()
        assert arrays["scalar"] == 2.5
        assert arrays["none"].shape == (0, 3)

    def test_large_ones_written_in_chunks_are_put_together(self, put, monkeypatch):
        monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 8)
        written = serialization.to_bytes({"a": {"b": GRID}})
        assert b"chunked" in written
        np.testing.assert_array_equal(read_weights(put(written))["a.b"], GRID)

    @pytest.mark.parametrize("leaf", [7, "vqgan", None, np.ones(1, np.complex64)])
    def test_leaves_that_are_no_numbers_are_named(self, put, leaf):
        message = refusal(put({"a": {"step": leaf, "x": FLOATS}}))
        assert message.startswith("entries that are not named tensors: 'a.step' (")

    @pytest.mark.parametrize(
        "array",
        [
            msgpack.ExtType(1, msgpack.packb(((2, 3), "float32", bytes(20)))),
            msgpack.ExtType(1, msgpack.packb(((2**62, 2**62), "float32", bytes(24)))),
            msgpack.ExtType(1, msgpack.packb(((3,), "O", bytes(24)))),
            msgpack.ExtType(1, msgpack.packb(((3,), "no such type", bytes(24)))),
            msgpack.ExtType(1, b""),
            msgpack.ExtType(9, b"other"),
            {"__msgpack_chunked_array__": True, "shape": {"1": 3}, "chunks": {"0": 5}},
        ],
    )
    def test_arrays_whose_parts_disagree_are_refused(self, put, array):
        assert refusal(put(msgpack.packb({"x": array})))

    @pytest.mark.parametrize("depth", [300, 5000])
    def test_a_deeply_nested_tree_is_refused(self, put, depth):
        assert refusal(put(b"\x81\xa1a" * depth + b"\x01"))


class TestSafetensors:
    @pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
    def test_they_are_read_whatever_their_suffix(self, put, name):
        arrays = {"float32": GRID, "scalar": np.array(2.5), "empty": np.zeros((0, 3))}
        arrays["bfloat16"] = FLOATS.astype(ml_dtypes.bfloat16)
        weights = read_weights(put(safetensors.numpy.save(arrays), name))
        assert weights.keys() == arrays.keys()
        for entry, array in arrays.items():
            assert weights[entry].dtype == array.dtype
            assert not weights[entry].flags.writeable
            np.testing.assert_array_equal(weights[entry], array)

    @pytest.mark.parametrize(
        "header",
        [
            '{"w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 23]}}',
            '{"w": {"dtype": "F8_E4M3", "shape": [24], "data_offsets": [0, 24]}}',
            '{"w": {"dtype": "F\\n32", "shape": [6], "data_offsets": [0, 24]}}',
            "{",
        ],
    )
    def test_unsound_ones_are_refused(self, put, header):
        content = struct.pack("<Q", len(header)) + header.encode() + FLOATS.tobytes()
        assert refusal(put(content))


class TestEntries:
    @pytest.fixture(params=["torch", "flax"])
    def path(self, request, tmp_path):
        """A training checkpoint of either kind."""
        if request.param == "torch":
            ema = {"w": tensor((6,), (1,))}
            return save(tmp_path, {"model": {"w": tensor()}, "ema": ema, "a.b": {}, "step": 3})
        path = tmp_path / "checkpoint"
        tree = {"model": {"w": GRID}, "ema": {"w": FLOATS}, "a.b": {}, "step": 3}
        path.write_bytes(serialization.to_bytes(tree))
        return path

    def test_a_key_chooses_one(self, path):
        np.testing.assert_array_equal(read_weights(path, "model")["w"], GRID)
        np.testing.assert_array_equal(read_weights(path, key="ema")["w"], FLOATS)
        assert read_weights(path, "a.b") == {}

    def test_a_wrong_key_is_told_with_those_there_are(self, path):
        assert refusal(path, "net") == "no entry 'net'; entries: 'model', 'ema', 'a.b', 'step'"
        assert refusal(path, "model.x") == "no entry 'x'; entries: 'w'"
        assert refusal(path, "step") == "want a dict of arrays, got a int"
        assert refusal(path, "step.x") == "no entry 'x'; entries: none"

    def test_without_one_what_is_no_tensor_is_named(self, path):
        assert "'step' (int)" in refusal(path)

    @pytest.mark.parametrize("entry", ["state_dict", "params"])
    def test_the_usual_ones_need_no_key(self, tmp_path, entry):
        path = save(tmp_path, {"epoch": 3, entry: {"w": tensor()}})
        np.testing.assert_array_equal(read_weights(path)["w"], GRID)


class TestDamage:
    def sound(self, kind):
        if kind == "flax":
            return serialization.to_bytes(TREE)
        if kind == "safetensors":
            return safetensors.numpy.save({"w": GRID, "b": FLOATS})
        content = io.BytesIO()
        how = zipfile.ZIP_DEFLATED if kind == "deflated torch" else zipfile.ZIP_STORED
        with zipfile.ZipFile(TORCH) as old, zipfile.ZipFile(content, "w", how) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        return content.getvalue()

    @pytest.mark.parametrize("kind", ["torch", "flax", "safetensors"])
    def test_a_file_cut_short_is_refused(self, put, kind):
        content = self.sound(kind)
        for length in range(1, len(content), max(7, len(content) // 30)):
            assert refusal(put(content[:length]))

    @pytest.mark.parametrize("kind", ["torch", "deflated torch", "flax", "safetensors"])
    def test_a_corrupt_file_is_refused_or_reads_as_arrays(self, put, kind):
        content, rng, refused = self.sound(kind), np.random.default_rng(0), 0
        sound = {n: x.tobytes() for n, x in read_weights(put(content)).items()}
        for position in rng.integers(2, len(content), 300):
            damaged = bytearray(content)
            damaged[position] ^= 1 << rng.integers(8)
            try:
                arrays = read_weights(put(bytes(damaged)))
            except UserError:
                refused += 1
            else:
                assert all(isinstance(array, np.ndarray) for array in arrays.values())
                if "torch" in kind:  # which has a sum of everything that is read
                    assert {n: x.tobytes() for n, x in arrays.items()} == sound
        assert 100 < refused < 300

    @pytest.mark.parametrize(
        "content", [b"", b"<!DOCTYPE html>\n", b"\x93\x01\x02\x03", pickle.dumps(1001, 2)]
    )
    def test_foreign_files_are_refused(self, put, content):
        assert refusal(put(content)).startswith("neither a torch zip file (torch >= 1.6)")

    def test_missing_files_and_archives_of_something_else_are_refused(self, tmp_path):
        assert "No such file" in refusal(tmp_path / "missing.pth")
        assert "Is a directory" in refusal(tmp_path)
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            archive.writestr("photo.jpg", b"")
        assert "0 members */data.pkl" in refusal(tmp_path / "photos.zip")
