"""Torch files assembled instruction by instruction, bad ones too, for torch writes none such."""

import pickle
import struct
import zipfile
from typing import NamedTuple

import numpy as np

FLOATS = np.arange(6, dtype=np.float32)


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


def code(value):
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


def storage(kind="Float", key="0", count=6):
    return Stored(("storage", Class(f"torch.{kind}Storage"), key, "cpu", count))


def tensor(shape=(2, 3), strides=(3, 1), offset=0, base=None):
    """A tensor, by default of the six values of `FLOATS`."""
    arguments = (base or storage(), offset, shape, strides, False, HOOKS)
    return Call(Class("torch._utils._rebuild_tensor_v2"), arguments)


def save(folder, value, compression=zipfile.ZIP_STORED, **members):
    """Writes a torch zip file with `FLOATS` as storage 0; of a value, or of a pickle's bytes."""
    path = folder / "weights.pth"
    pickled = value if isinstance(value, bytes) else b"\x80\x02" + code(value) + b"."
    content = {"data.pkl": pickled, "byteorder": b"little", "data/0": FLOATS.tobytes()} | members
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(f"weights/{name}", data)
    return path


def save_arrays(path, arrays, entry=None, compression=zipfile.ZIP_STORED):
    """A file as `torch.save` writes it, of a dict of float32 arrays or of one beside a number."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    value = {}
    for key, (name, x) in enumerate(arrays.items()):
        strides = tuple(n // 4 for n in x.strides)
        value[name] = tensor(x.shape, strides, base=storage(key=str(key), count=x.size))
    members = {f"data/{key}": array.tobytes() for key, array in enumerate(arrays.values())}
    value = value if entry is None else {entry: value, "step": 7}
    return save(path.parent, value, compression, **members).rename(path)
