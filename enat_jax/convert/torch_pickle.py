"""Interprets the pickle of a state dict, without letting it import or call anything.

A pickle is a program, so it never reaches `pickle`: the few instructions of a state dict are
interpreted here, where nothing that the file names can be imported or called.
"""

import pickletools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from enat_jax.errors import UserError

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


@dataclass(frozen=True)
class _Global:
    """One of `_TYPES`, by name only."""

    name: str


@dataclass(frozen=True)
class Storage:
    """The archive member `data/<key>`, which must hold `count` elements."""

    dtype: np.dtype
    key: str
    count: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage as the file claims it, in elements; `torch_file` checks it."""

    storage: Storage
    offset: Any
    shape: tuple
    strides: tuple


def parse_pickle(data: bytes, key: str | None = None) -> Any:
    """The pickle's value; every class that is not allowed is named in one error.

    Where an entry `key` of a dict is all that is wanted, what lies beside it may be of any class:
    training checkpoints hold callbacks and the like. Nothing is made of these either.
    """
    foreign: dict[str, None] = {}
    value = None
    try:
        value = _interpret(data, foreign)
    except (IndexError, KeyError, ValueError) as error:
        if not foreign:
            damage = "" if isinstance(error, WeightFileError) else f"{type(error).__name__}, "
            raise WeightFileError(f"data.pkl: {damage}{error}") from error
    if foreign and not _is_plain(value, key):
        raise WeightFileError(f"asks for classes beyond plain tensors: {listing(foreign)}")
    return value


def _is_plain(value: Any, key: str | None) -> bool:
    """Whether the entry is a dict into which no class that is not allowed has found its way."""
    entry = value.get(key) if key is not None and type(value) is dict else None
    return type(entry) is dict and not any(x is _FOREIGN for x in (*entry, *entry.values()))


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
                fill(stack[-1], items, list)
            case "SETITEM" | "SETITEMS":
                fill(stack[-1], items, dict)
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


def fill(target: Any, items: Iterable[Any], kind: type) -> None:
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
                return Storage(dtype, key, count)
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
        case _Global("torch._utils._rebuild_parameter"), (Tensor() as tensor, bool(), hooks):
            if not hooks:
                return tensor
        case (
            _Global("torch._utils._rebuild_tensor_v2"),
            (Storage() as base, offset, tuple(shape), tuple(strides), bool(), hooks, *metadata),
        ):
            if not hooks and metadata in ([], [None], [{}]):
                return Tensor(base, offset, shape, strides)
    name = function.name if isinstance(function, _Global) else "a value"
    raise WeightFileError(f"calls {name} in a way that torch.save does not write")


def listing(names: Iterable[Any]) -> str:
    """At most eight names, each cut at 120 characters."""
    texts = [f"{name!r:.120}" for name in names]
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")
