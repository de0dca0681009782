"""What is read from a weight file, and that every other file is refused in one line.

`golden/torch_file.pth` was written by `torch.save` (2.13); `torch_file.npz` holds its values as
torch sees them, bfloat16 widened to float32. Bad files are assembled here, instruction by
instruction, because torch does not write them.
"""

import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict, deque
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from enat_jax.convert.torch_file import WeightFileError, read_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "torch_file.pth"
DTYPES = {
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "bool")},
    **{name: np.dtype(name) for name in ("int8", "int16", "int32", "int64", "uint8")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Class(NamedTuple):
    name: str


class Call(NamedTuple):
    function: object
    arguments: tuple


class Stored(NamedTuple):
    reference: object


class State(NamedTuple):
    target: object
    state: object


class Raw(NamedTuple):
    code: bytes


def code(value: object) -> bytes:
    """The pickle instructions that leave `value` on the stack."""
    match value:
        case Raw(raw):
            return raw
        case Class(name):
            return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()
        case Call(function, arguments):
            return code(function) + code(arguments) + b"R"
        case Stored(reference):
            return code(reference) + b"Q"
        case State(target, state):
            return code(target) + code(state) + b"b"
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[value]
        case int():
            digits = pickle.encode_long(value)
            return b"\x8a" + bytes([len(digits)]) + digits
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(code(k) + code(v) for k, v in value.items()) + b"u"
    raise TypeError(value)


HOOKS = Call(Class("collections.OrderedDict"), ())
PARAMETER = Class("torch._utils._rebuild_parameter")
FLOATS = np.arange(6, dtype=np.float32)


def storage(kind: str = "Float", key: str = "0", count: object = 6) -> Stored:
    return Stored(("storage", Class(f"torch.{kind}Storage"), key, "cpu", count))


def tensor(
    shape: object = (2, 3), strides: object = (3, 1), offset: object = 0, base: object = None
) -> Call:
    arguments = (base or storage(), offset, shape, strides, False, HOOKS)
    return Call(Class("torch._utils._rebuild_tensor_v2"), arguments)


def save(
    folder: Path, value: object, compression: int = zipfile.ZIP_STORED, **members: bytes
) -> Path:
    """Writes a torch zip file with the six float32 values of `FLOATS` as storage 0."""
    path = folder / "weights.pth"
    pickled = value if isinstance(value, bytes) else b"\x80\x02" + code(value) + b"."
    content = {"data.pkl": pickled, "byteorder": b"little", "data/0": FLOATS.tobytes()} | members
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(f"weights/{name}", data)
    return path


def refusal(path: Path, key: str | None = None) -> str:
    """The message of a refused file, without the path that it must start with."""
    with pytest.raises(WeightFileError) as caught:
        read_weights(path, key)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_every_tensor_that_torch_wrote_is_read_with_its_dtype_shape_and_values():
    weights, expected = read_weights(GOLDEN), np.load(GOLDEN.with_suffix(".npz"))
    assert list(weights) == expected.files
    assert weights["scalar"].shape == ()
    for name, array in weights.items():
        assert array.shape == expected[name].shape, name
        assert array.dtype == DTYPES.get(name, expected[name].dtype), name
        np.testing.assert_array_equal(array.astype(expected[name].dtype), expected[name], name)


def test_a_size_is_a_value_like_any_other(tmp_path):
    path = save(tmp_path, {"model": {"w": tensor()}, "size": Call(Class("torch.Size"), ((2, 3),))})
    np.testing.assert_array_equal(read_weights(path, "model")["w"], FLOATS.reshape(2, 3))


def test_arrays_are_contiguous_and_read_only(tmp_path):
    safetensors.numpy.save_file({"w": FLOATS}, tmp_path / "w.safetensors")
    for path in (GOLDEN, tmp_path / "w.safetensors"):
        for name, array in read_weights(path).items():
            assert array.flags.c_contiguous, name
            assert not array.flags.writeable, name


def test_compressed_members_read_the_same(tmp_path):
    path = save(tmp_path, {"w": tensor()}, zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(read_weights(path)["w"], FLOATS.reshape(2, 3))


def test_compressions_that_torch_does_not_write_are_refused(tmp_path):
    assert "compression 14" in refusal(save(tmp_path, {"w": tensor()}, zipfile.ZIP_LZMA))


def test_views_may_share_a_storage(tmp_path):
    weights = read_weights(save(tmp_path, {"w": tensor(), "b": tensor((3,), (2,), 1)}))
    np.testing.assert_array_equal(weights["w"], FLOATS.reshape(2, 3))
    np.testing.assert_array_equal(weights["b"], FLOATS[1::2])


def test_the_stride_of_an_axis_of_size_one_is_ignored(tmp_path):
    path = save(tmp_path, {"w": tensor((1, 6), (2**62, 1))})
    np.testing.assert_array_equal(read_weights(path)["w"], FLOATS[None])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"offset": 1}, "do not fit a storage of 6 elements"),
        ({"offset": -1}, "no integer in"),
        ({"offset": True}, "no integer in"),
        ({"offset": 2**64}, "no integer in"),
        ({"shape": (7,), "strides": (1,)}, "do not fit a storage of 6 elements"),
        ({"shape": (7,), "strides": (0,)}, "do not fit a storage of 6 elements"),
        ({"shape": (2**40, 2**40), "strides": (0, 0)}, "do not fit a storage of 6 elements"),
        ({"strides": (4, 1)}, "do not fit a storage of 6 elements"),
        ({"strides": (2**62, 1)}, "do not fit a storage of 6 elements"),
        ({"strides": (-3, 1)}, "no integer in"),
        ({"shape": (-2, 3)}, "no integer in"),
        ({"shape": (2, "3")}, "no integer in"),
        ({"shape": (0, 3), "offset": 7}, "do not fit a storage of 6 elements"),
        ({"shape": (0, 2**62)}, "do not fit a storage of 6 elements"),
        ({"strides": (3,)}, "2 sizes, 1 strides"),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, "65 sizes, 65 strides"),
        ({"base": storage(count=5)}, "do not fit a storage of 5 elements"),
        ({"base": storage(count=7)}, "storage of 24 bytes, want 28"),
        ({"base": storage("Double")}, "storage of 24 bytes, want 48"),
        ({"base": storage(key="1")}, "storage of None bytes, want 24"),
        ({"base": storage(key="../data/0")}, "storage of None bytes, want 24"),
        ({"base": storage(count=-6)}, "other than a storage"),
        ({"base": storage(count="6")}, "other than a storage"),
    ],
)
def test_a_view_that_does_not_fit_its_storage_is_refused(tmp_path, change, problem):
    message = refusal(save(tmp_path, {"fine": tensor(), "wrong": tensor(**change)}))
    assert problem in message
    assert "'fine'" not in message


def test_every_unsound_tensor_is_named_in_one_error(tmp_path):
    message = refusal(save(tmp_path, {"a": tensor(offset=1), "b": tensor(strides=(9, 9))}))
    assert message.startswith("2 unsound tensors: 'a' has")
    assert "; 'b' has" in message


class Touch:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_of_a_file_is_executed(tmp_path, protocol):
    pickled = pickle.dumps({"w": Touch(tmp_path / "touched")}, protocol)
    assert "io.open'" in refusal(save(tmp_path, pickled))
    assert not (tmp_path / "touched").exists()
    pickle.loads(pickled)["w"].close()
    assert (tmp_path / "touched").exists(), "the file was harmless, and the test proves nothing"


@pytest.mark.parametrize("protocol", [2, 4])
def test_all_foreign_classes_are_named_at_once(tmp_path, protocol):
    objects = [deque([1]), Touch(tmp_path), np.float32(1), [OrderedDict], struct.Struct]
    message = refusal(save(tmp_path, pickle.dumps(objects, protocol)))
    for name in ("deque", "io.open", "multiarray.scalar", "numpy.dtype", "_struct.Struct"):
        assert name in message
    assert "OrderedDict" not in message


class TestCheckpointsOfATrainingRun:
    """Plain tensors under a key, beside objects of any class."""

    def test_what_lies_beside_the_entry_may_be_of_any_class(self, tmp_path):
        value = {"state_dict": {"w": tensor()}, "callbacks": {"x": Class("pathlib.Path")}}
        path = save(tmp_path, value)
        np.testing.assert_array_equal(
            read_weights(path, "state_dict")["w"],
            read_weights(save(tmp_path, {"w": tensor()}))["w"],
        )

    def test_nothing_beside_the_entry_is_executed(self, tmp_path):
        pickled = pickle.dumps({"state_dict": {}, "callbacks": Touch(tmp_path / "touched")}, 2)
        assert read_weights(save(tmp_path, pickled), "state_dict") == {}
        assert not (tmp_path / "touched").exists()

    @pytest.mark.parametrize("entry", [{"w": Class("torch.float32")}, Class("torch.float32")])
    def test_what_lies_in_the_entry_may_not(self, tmp_path, entry):
        path = save(tmp_path, {"state_dict": entry})
        with pytest.raises(WeightFileError, match=r"beyond plain tensors: 'torch\.float32'"):
            read_weights(path, "state_dict")

    def test_without_a_key_they_are_named(self, tmp_path):
        value = {"state_dict": {"w": tensor()}, "callbacks": Class("pathlib.Path")}
        assert "pathlib.Path" in refusal(save(tmp_path, value))


def test_foreign_classes_are_named_before_any_other_problem(tmp_path):
    complexes = tensor(base=storage("ComplexFloat"))
    message = refusal(save(tmp_path, [complexes, Class("torch.float32"), Raw(b"0")]))
    assert message.endswith("plain tensors: 'torch.ComplexFloatStorage', 'torch.float32'")


def test_an_untyped_storage_holds_bytes(tmp_path):
    untyped = Stored(("storage", Class("torch.storage.UntypedStorage"), "0", "cpu", 24))
    array = read_weights(save(tmp_path, {"w": tensor((24,), (1,), base=untyped)}))["w"]
    assert array.dtype == np.uint8
    assert array.tobytes() == FLOATS.tobytes()


def test_a_tensor_may_be_named_twice(tmp_path):
    for put in (b"q\x00", b"r\x00\x00\x00\x00", b"\x94"):
        value = {"w": Raw(code(tensor()) + put), "tied": Raw(b"h\x00")}
        weights = read_weights(save(tmp_path, value))
        np.testing.assert_array_equal(weights["w"], weights["tied"])


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_ordered_dict_of_any_protocol_is_a_dict(tmp_path, protocol):
    assert read_weights(save(tmp_path, pickle.dumps(OrderedDict(), protocol))) == {}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (Call("text", ()), "calls a value"),
        (Call(Class("torch.FloatStorage"), ()), "calls torch.FloatStorage"),
        (Call(Class("collections.OrderedDict"), ([("a", 1)],)), "calls collections.OrderedDict"),
        (Call(tensor().function, ()), "calls torch._utils._rebuild_tensor_v2"),
        (Call(tensor().function, (*tensor().arguments, {"neg": True})), "_rebuild_tensor_v2"),
        (Call(tensor().function, (*tensor().arguments[:5], {"hook": 1})), "_rebuild_tensor_v2"),
        (Call(PARAMETER, (tensor(), True, {"hook": 1})), "_rebuild_parameter"),
        (Call(PARAMETER, (1, True, HOOKS)), "_rebuild_parameter"),
        (Call(Class("torch.Size"), (6,)), "calls torch.Size"),
        (tensor(base="text"), "_rebuild_tensor_v2"),
        (tensor(shape=[2, 3]), "_rebuild_tensor_v2"),
        (Stored(("storage", Class("torch.Size"), "0", "cpu", 6)), "other than a storage"),
        (Stored("0"), "other than a storage"),
        (State(HOOKS, {"items": 1}), "sets attributes"),
        (State(HOOKS, [1]), "sets attributes"),
        (State(tensor(), {"_metadata": HOOKS}), "sets attributes"),
        (Raw(b"]" + code("a") + code(1) + b"s"), "adds to a list as if it were a dict"),
        (Raw(b")" + code("a") + b"a"), "adds to a tuple as if it were a list"),
        (Raw(b"}(" + code("a") + b"u"), "ValueError"),
        (Raw(code(1) + code(2) + b"\x93"), "named by something other than text"),
        (Raw(b"(ios\nsystem\n"), "instruction INST"),
        (Raw(b"\x82\x01"), "instruction EXT1"),
        (Raw(b"h\x05"), "KeyError"),
        (Raw(b"0"), "instruction POP"),
        (Raw(b"u"), "IndexError"),
        (Raw(b"NN"), "leaves 2 values"),
        (Raw(b"(N"), "1 marks"),
        (Raw(b"\xff"), "ValueError"),
        (Raw(b"X\xff\xff\xff\xffa"), "ValueError"),
    ],
)
def test_a_pickle_that_torch_does_not_write_is_refused(tmp_path, value, problem):
    message = refusal(save(tmp_path, value))
    assert message.startswith("data.pkl: ")
    assert problem in message


def test_a_pickle_without_an_end_is_refused(tmp_path):
    assert "data.pkl: ValueError" in refusal(save(tmp_path, b"\x80\x02" + code({})))


def test_a_name_may_occur_once_in_a_dict(tmp_path):
    repeated = Raw(b"}(" + 2 * (code("w") + code(tensor())) + b"u")
    assert "'w' occurs twice" in refusal(save(tmp_path, repeated))


def test_a_nest_of_tuples_is_never_hashed(tmp_path):
    """`pickle` itself would overflow the C stack here."""
    nest = Raw(b"})" + 100_000 * b"\x85" + b"Ns")
    assert "a dict key is a tuple" in refusal(save(tmp_path, nest))


def test_a_pickle_has_at_most_sixteen_megabytes(tmp_path):
    path = save(tmp_path, b"N" * (2**24 + 1), zipfile.ZIP_DEFLATED)
    assert refusal(path) == f"member 'weights/data.pkl' has {2**24 + 1} bytes, limit {2**24}"


def test_a_big_endian_file_is_refused(tmp_path):
    assert "byte order" in refusal(save(tmp_path, {"w": tensor()}, byteorder=b"big"))


def test_a_file_without_a_byteorder_member_is_little_endian(tmp_path):
    path = tmp_path / "old.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("old/data.pkl", b"\x80\x02" + code({"w": tensor()}) + b".")
        archive.writestr("old/data/0", FLOATS.tobytes())
    np.testing.assert_array_equal(read_weights(path)["w"], FLOATS.reshape(2, 3))


def test_a_repeated_member_is_refused(tmp_path):
    path = save(tmp_path, {"w": tensor()})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("weights/data/0", bytes(24))
    assert "a repeated member" in refusal(path)


def test_a_zip_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.jpg", b"")
    assert "0 members */data.pkl" in refusal(path)


def test_a_training_checkpoint_lists_its_entries_and_key_chooses_one(tmp_path):
    path = save(tmp_path, {"model": {"w": tensor()}, "ema": {"w": tensor((6,), (1,))}, "epoch": 3})
    message = refusal(path)
    assert "not named tensors: 'model', 'ema', 'epoch'" in message
    assert "key=: 'model', 'ema'" in message
    np.testing.assert_array_equal(read_weights(path, "model")["w"], FLOATS.reshape(2, 3))
    np.testing.assert_array_equal(read_weights(path, key="ema")["w"], FLOATS)
    assert refusal(path, "net") == "no entry 'net'; entries: 'model', 'ema', 'epoch'"
    assert "got a int" in refusal(path, "epoch")


def test_entries_that_are_not_tensors_are_named(tmp_path):
    message = refusal(save(tmp_path, {"w": tensor(), "step": 3, "sizes": [1], 5: tensor()}))
    assert message == "entries that are not named tensors: 'step', 'sizes', 5"


@pytest.mark.parametrize("value", [tensor(), [1], "text"])
def test_a_file_that_holds_no_dict_is_refused(tmp_path, value):
    assert "want a dict of tensors" in refusal(save(tmp_path, value))
    assert refusal(save(tmp_path, value), "model") == "no entry 'model'; entries: none"


def test_a_legacy_torch_file_is_refused_with_advice(tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    assert "save it again with torch >= 1.6" in refusal(path)


def test_a_tar_archive_is_refused(tmp_path):
    with tarfile.open(tmp_path / "weights.pth", "w") as archive:
        archive.add(save(tmp_path / "..", {"w": tensor()}), "weights/pickle")
    assert "tar archive" in refusal(tmp_path / "weights.pth")


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "missing.pth")
    assert "Is a directory" in refusal(tmp_path)
    for name, content in (("empty.pth", b""), ("page.pth", b"<!DOCTYPE html>\n<html></html>")):
        (tmp_path / name).write_bytes(content)
        assert "neither a torch zip file" in refusal(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path):
    content, path = GOLDEN.read_bytes(), tmp_path / "short.pth"
    for length in range(4, len(content), 211):
        path.write_bytes(content[:length])
        assert "damaged or cut short" in refusal(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_file_is_refused_or_reads_the_same(tmp_path, compression):
    path, rng, sound = tmp_path / "damaged.pth", np.random.default_rng(0), read_weights(GOLDEN)
    with zipfile.ZipFile(GOLDEN) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    content, refused = path.read_bytes(), 0
    for position in rng.integers(2, len(content), 300):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            weights = read_weights(path)
        except WeightFileError:
            refused += 1
        else:
            assert weights.keys() == sound.keys()
            assert all(weights[name].tobytes() == sound[name].tobytes() for name in sound)
    assert 100 < refused < 300


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of pickletools, about a name
def test_a_pickle_of_random_instructions_raises_nothing_else(tmp_path):
    with zipfile.ZipFile(GOLDEN) as archive:
        pickled = archive.read("torch_file/data.pkl")
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        damaged = np.frombuffer(pickled, np.uint8).copy()
        damaged[rng.integers(len(damaged), size=3)] = rng.integers(256, size=3)
        try:
            read_weights(save(tmp_path, damaged.tobytes()))
        except WeightFileError:
            refused += 1
    assert refused == 300, "only storage 0 is in these files"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_safetensors_are_read_whatever_their_suffix(tmp_path, name):
    arrays = {"float32": FLOATS.reshape(2, 3), "scalar": np.array(2.5), "empty": np.zeros((0, 3))}
    arrays["bfloat16"] = FLOATS.astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file(arrays, tmp_path / name)
    weights = read_weights(tmp_path / name)
    assert weights.keys() == arrays.keys()
    for entry, array in arrays.items():
        assert weights[entry].dtype == array.dtype
        np.testing.assert_array_equal(weights[entry], array)


def test_a_torch_file_is_read_whatever_its_suffix(tmp_path):
    path = save(tmp_path, {"w": tensor()}).rename(tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(read_weights(path)["w"], FLOATS.reshape(2, 3))


def test_unsound_safetensors_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"

    def refused(header: str, data: bytes, key: str | None = None) -> str:
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
        return refusal(path, key)

    entry = '"w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}'
    data = FLOATS.tobytes()
    assert "'w' occurs twice" in refused(f"{{{entry}, {entry}}}", data)
    assert "safetensors cannot read it" in refused(f"{{{entry}}}", data[:-1])
    assert "safetensors cannot read it" in refused("{", b"")
    assert "key 'model' is given" in refused(f"{{{entry}}}", data, "model")
    assert "safetensors cannot read it" in refused(f"{{{entry}}}".replace("F32", r"F\n32"), data)
    eights = '{"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}'
    assert "float8" in refused(eights, b"00")
