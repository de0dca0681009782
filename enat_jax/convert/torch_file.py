"""Reads PyTorch weight files without torch.

A torch file is a zip archive: raw storages beside a pickle that says which tensor views which
storage. A pickle is a program, so it never reaches `pickle`: the few instructions of a state dict
are interpreted here, where nothing that the file names can be imported or called.
"""

import itertools
import json
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # its import also gives numpy the name "bfloat16", which safetensors looks up
import numpy as np
import safetensors.numpy
from jaxtyping import Shaped

from enat_jax.errors import UserError

_MAX_PICKLE_BYTES = 16 * 2**20  # a thousand tensors take about 200 kB
_MAX_AXES = 32
_MAX_EMPTY = 2**48  # product of an empty tensor's other sizes; numpy overflows later
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error)
_TYPES = {
    "collections.OrderedDict": None,
    "torch.Size": None,
    "torch._utils._rebuild_parameter": None,
    "torch._utils._rebuild_tensor_v2": None,
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
}  # all that a pickle may name; the dtype of those that are storages
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "BUILD": 1}
_TAKES |= {"STACK_GLOBAL": 2, "BINPERSID": 1, "REDUCE": 2, "NEWOBJ": 2}  # values off the stack
_FOREIGN = object()  # stands for whatever a class that is not allowed would have made


class WeightFileError(UserError):
    """A weight file that cannot be read, told in one line that names the file."""


def read_weights(
    path: str | os.PathLike, key: str | None = None
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads the tensors of a state dict saved by `torch.save` (since 1.6) or as safetensors.

    The file's first bytes tell its kind. Nothing of the file is executed.

    Args:
        path: the weight file.
        key: entry of a training checkpoint's dict that holds the state dict; None where the file
            holds the state dict itself.

    Returns:
        Name to array: read-only, C-contiguous, possibly sharing memory with each other, in the
        file's dtypes (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
        WeightFileError: a file that is missing, damaged, of another kind, or that asks for
            anything beyond plain tensors.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        if head.startswith(b"PK"):
            weights = _read_torch_zip(path, key)
        elif Path(path).suffix == ".safetensors" or head[8:9] == b"{":
            weights = _read_safetensors(path, key)
        elif head.startswith(b"\x80"):
            raise WeightFileError("a bare pickle (torch < 1.6); save it again with torch >= 1.6")
        elif head[257:262] == b"ustar":
            raise WeightFileError("a tar archive; pass the weight file inside it")
        else:
            raise WeightFileError("neither a torch zip file nor a safetensors file")
    except OSError as error:
        raise WeightFileError(f"{path}: {error.strerror or error}") from error
    except WeightFileError as error:
        raise WeightFileError(f"{path}: {' '.join(str(error).split())}") from error
    for array in weights.values():
        array.flags.writeable = False
    return weights


@dataclass(frozen=True)
class _Global:
    """One of `_TYPES`, by name only."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """The archive member `data/<key>`, which must hold `count` elements."""

    dtype: np.dtype
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage as the file claims it, in elements; `_view_problem` checks it."""

    storage: _Storage
    offset: Any
    shape: tuple
    strides: tuple


def _read_safetensors(path: str | os.PathLike, key: str | None) -> dict[str, np.ndarray]:
    if key is not None:
        raise WeightFileError(f"key {key!r} is given, but a safetensors file is one flat dict")
    try:
        weights = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, AttributeError, TypeError, KeyError) as error:
        raise WeightFileError(f"safetensors cannot read it ({error})") from error
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    # Of two entries with one name the library silently keeps the last.
    json.loads(header, object_pairs_hook=lambda pairs: _fill({}, itertools.chain(*pairs), dict))
    return weights


def _read_torch_zip(path: str | os.PathLike, key: str | None) -> dict[str, np.ndarray]:
    try:
        archive = zipfile.ZipFile(path)
    except _ZIP_ERRORS as error:
        raise WeightFileError(f"the zip archive is damaged or cut short ({error})") from error
    with archive:
        names = archive.namelist()
        roots = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1 or len(set(names)) != len(names):
            raise WeightFileError(f"{len(roots)} members */data.pkl (want 1), or a repeated member")
        root = roots[0].removesuffix("data.pkl")
        if root + "byteorder" in names and _read(archive, root + "byteorder", 16) != b"little":
            raise WeightFileError("the byte order is not 'little'")
        tensors = _state_dict(_parse_pickle(_read(archive, roots[0], _MAX_PICKLE_BYTES)), key)
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        problems = {name: _view_problem(tensor, root, sizes) for name, tensor in tensors.items()}
        if bad := [f"{name!r:.120} {problem}" for name, problem in problems.items() if problem]:
            raise WeightFileError(f"{len(bad)} unsound tensors: {'; '.join(bad[:8])}")
        storages = {
            name: _read(archive, root + "data/" + name, sizes[root + "data/" + name])
            for name in {tensor.storage.key: None for tensor in tensors.values()}
        }
    return {name: _view(storages[tensor.storage.key], tensor) for name, tensor in tensors.items()}


def _read(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > limit:
        raise WeightFileError(f"member {name!r} has {info.file_size} bytes, limit {limit}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise WeightFileError(f"member {name!r} has compression {info.compress_type}, want 0 or 8")
    try:
        return archive.read(info)  # at most file_size bytes, and checked by their sum
    except _ZIP_ERRORS as error:
        raise WeightFileError(f"member {name!r} is damaged ({error})") from error


def _state_dict(top: Any, key: str | None) -> dict[str, _Tensor]:
    if key is not None:
        if type(top) is not dict or key not in top:
            entries = _listing(top) if type(top) is dict else "none"
            raise WeightFileError(f"no entry {key!r}; entries: {entries}")
        top = top[key]
    if type(top) is not dict:
        raise WeightFileError(f"want a dict of tensors, got a {type(top).__name__.strip('_')}")
    if odd := [k for k, v in top.items() if type(k) is not str or not isinstance(v, _Tensor)]:
        dicts = [k for k in odd if type(top[k]) is dict]
        hint = f"; choose a dict inside with key=: {_listing(dicts)}" if dicts else ""
        raise WeightFileError(f"entries that are not named tensors: {_listing(odd)}{hint}")
    return top


def _view_problem(tensor: _Tensor, root: str, sizes: dict[str, int]) -> str | None:
    """What is wrong with a tensor's view or its storage, given the members' sizes in bytes."""
    shape, strides, offset, storage = tensor.shape, tensor.strides, tensor.offset, tensor.storage
    if len(shape) != len(strides) or len(shape) > _MAX_AXES:
        return f"has {len(shape)} sizes, {len(strides)} strides: want as many, up to {_MAX_AXES}"
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *strides)):
        return "has an offset, size or stride that is no integer in [0, 2**63)"
    elements, last = math.prod(max(n, 1) for n in shape), offset - 1
    if 0 not in shape:
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if elements > (_MAX_EMPTY if 0 in shape else storage.count) or last >= storage.count:
        view = f"offset {offset}, shape {shape}, strides {strides}"
        return f"has {view}, which do not fit a storage of {storage.count} elements"
    size, want = sizes.get(f"{root}data/{storage.key}"), storage.count * storage.dtype.itemsize
    return None if size == want else f"has a storage of {size} bytes, want {want}"


def _view(data: bytes, tensor: _Tensor) -> np.ndarray:
    """The tensor as a C-contiguous array, once `_view_problem` has found none."""
    dtype, shape = tensor.storage.dtype, tensor.shape
    if 0 in shape:
        return np.empty(shape, dtype)
    # An axis of size 1 never steps, and its stride may be too large for numpy.
    steps = [stride if n > 1 else 0 for n, stride in zip(shape, tensor.strides, strict=True)]
    base = np.frombuffer(data, dtype)[tensor.offset :]
    strides = [step * dtype.itemsize for step in steps]
    view = np.lib.stride_tricks.as_strided(base, shape, strides, writeable=False)
    return view if view.flags.c_contiguous else view.copy()


def _parse_pickle(data: bytes) -> Any:
    """The pickle's value; every class that is not allowed is named in one error."""
    foreign: dict[str, None] = {}
    try:
        value = _interpret(data, foreign)
    except (IndexError, KeyError, ValueError) as error:
        if not foreign:
            damage = "" if isinstance(error, WeightFileError) else f"{type(error).__name__}, "
            raise WeightFileError(f"data.pkl: {damage}{error}") from error
    if foreign:
        raise WeightFileError(f"asks for classes beyond plain tensors: {_listing(foreign)}")
    return value


def _interpret(data: bytes, foreign: dict[str, None]) -> Any:
    """Runs the pickle's stack machine; adds the classes that are not allowed to `foreign`."""
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        items: tuple = ()
        if opcode.name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = tuple(stack), marks.pop()
        elif opcode.name in _TAKES:
            items = tuple([stack.pop() for _ in range(_TAKES[opcode.name])][::-1])
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                marks.append(stack)
                stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANTS[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(argument)
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(items)
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if opcode.name == "EMPTY_LIST" else {})
            case "APPEND" | "APPENDS":
                _fill(stack[-1], items, list)
            case "SETITEM" | "SETITEMS":
                _fill(stack[-1], items, dict)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_global(tuple(str(argument).split(" ", 1)), foreign))
            case "STACK_GLOBAL":
                stack.append(_global(items, foreign))
            case "BINPERSID":
                stack.append(_storage(*items))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*items))
            case "BUILD":
                (state,), target = items, stack[-1]
                if target is not _FOREIGN and not (
                    type(target) is type(state) is dict and state.keys() <= {"_metadata"}
                ):
                    raise WeightFileError("sets attributes other than a state dict's _metadata")
            case name:
                raise WeightFileError(f"instruction {name} has no place in a state dict")
    if len(stack) != 1 or marks:
        raise WeightFileError(f"leaves {len(stack)} values and {len(marks)} marks, want 1 and 0")
    return stack[0]


def _fill(target: Any, items: Iterable[Any], kind: type) -> None:
    """Appends to a list, or sets the alternating keys and values of a dict."""
    if target is _FOREIGN:
        return
    if type(target) is not kind:
        raise WeightFileError(f"adds to a {type(target).__name__} as if it were a {kind.__name__}")
    if kind is list:
        target.extend(items)
        return
    pairs = list(items)
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        # No tuples: hashing a deeply nested one overflows the C stack.
        if key is not _FOREIGN and type(key) not in (str, int):
            raise WeightFileError(f"a dict key is a {type(key).__name__}, want str or int")
        if key is not _FOREIGN and key in target:
            raise WeightFileError(f"the key {key!r:.120} occurs twice in one dict")
        target[key] = value


def _global(path: tuple, foreign: dict[str, None]) -> Any:
    module, name = path
    if type(module) is not str or type(name) is not str:
        raise WeightFileError("a class is named by something other than text")
    full = f"{module}.{name}"
    if full in _TYPES:
        return _Global(full)
    foreign[full] = None
    return _FOREIGN


def _storage(reference: Any) -> Any:
    match reference:
        case ("storage", _Global(name), str(key), str(), int(count)):
            dtype = _TYPES[name]
            if dtype is not None and count >= 0:
                return _Storage(dtype, key, count)
        case ("storage", made, *_) if made is _FOREIGN:
            return _FOREIGN
    raise WeightFileError("a reference to something other than a storage")


def _call(function: Any, arguments: Any) -> Any:
    """What an allowed function returns, as a plain value without gradient or hooks."""
    if function is _FOREIGN or (type(arguments) is tuple and _FOREIGN in arguments):
        return _FOREIGN
    match function, arguments:
        case _Global("collections.OrderedDict"), ():
            return {}
        case _Global("torch.Size"), (tuple(sizes),):
            return sizes
        case _Global("torch._utils._rebuild_parameter"), (_Tensor() as tensor, bool(), hooks):
            if not hooks:
                return tensor
        case (
            _Global("torch._utils._rebuild_tensor_v2"),
            (_Storage() as base, offset, tuple(shape), tuple(strides), bool(), hooks, *metadata),
        ):
            if not hooks and metadata in ([], [None], [{}]):
                return _Tensor(base, offset, shape, strides)
    name = function.name if isinstance(function, _Global) else "a value"
    raise WeightFileError(f"calls {name} in a way that torch.save does not write")


def _listing(names: Iterable[Any]) -> str:
    """At most eight names, each cut at 120 characters."""
    texts = [f"{name!r:.120}" for name in names]
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")
