"""Interprets the pickle of a torch file, without letting it import or call anything.

A pickle is a program, so it never reaches `pickle`: the few instructions that `torch.save` writes
are interpreted here, where whatever the file names stays a name.
"""

import pickletools
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
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
}
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "BUILD": 1,
          "STACK_GLOBAL": 2, "BINPERSID": 1, "REDUCE": 2, "NEWOBJ": 2}  # values  # fmt: skip
_MAKES = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
          "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Named:
    """A class or function by its name alone, or whatever it would have made."""

    name: str


@dataclass(frozen=True)
class Storage:
    """The archive member `data/<key>`, which must hold `count` elements."""

    dtype: np.dtype
    key: str
    count: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage as the file claims it, in elements: nothing of it is checked."""

    storage: Storage
    offset: Any
    shape: tuple
    strides: tuple


def parse_pickle(data: bytes) -> Any:
    """The pickle's value, with a `Tensor` for each tensor and a `Named` for what is not allowed.

    Training checkpoints hold callbacks and the like beside their weights; nothing is made of them.

    Raises:
        Exception: of any class, for bytes that no `torch.save` has written.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, marks.pop()
        else:
            items = [stack.pop() for _ in range(_TAKES.get(opcode.name, 0))][::-1]
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                marks.append(stack)
                stack = []
            case name if name in _MAKES:
                stack.append(_MAKES[name]())
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(argument)
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS":
                _add(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(Named(str(argument).replace(" ", ".", 1)[:200]))
            case "STACK_GLOBAL":
                stack.append(Named(".".join(items)[:200]))
            case "BINPERSID":
                stack.append(_storage(items[0]))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*items))
            case "BUILD":  # a state dict's is its _metadata, of which no tensor is made
                if type(stack[-1]) not in (dict, Named):
                    stack[-1] = Named("an object with a state")
            case name:
                raise ValueError(f"instruction {name} has no place in a state dict")
    (value,) = stack
    return value


def _add(target: Any, items: list) -> None:
    """Appends to a list, or sets the alternating keys and values of a dict."""
    if type(target) is list:
        target.extend(items)
    elif type(target) is dict:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # No other keys: hashing a deeply nested tuple overflows the C stack.
            target[key if type(key) in (str, int, Named) else Named("a key")] = value
    elif not isinstance(target, Named):
        raise ValueError(f"adds to a {type(target).__name__}")


def _storage(reference: Any) -> Storage | Named:
    match reference:
        case ("storage", Named(name), str(key), str(), int(count)) if name in _DTYPES:
            return Storage(_DTYPES[name], key, count)
        case ("storage", Named() as unknown, *_):
            return unknown
    raise ValueError("a reference to something other than a storage")


def _call(function: Any, arguments: Any) -> Any:
    """What an allowed function returns, as a plain value without gradient or hooks."""
    match function, arguments:
        case Named("collections.OrderedDict"), ():
            return {}
        case Named("torch.Size"), (tuple(sizes),):
            return sizes
        case Named("torch._utils._rebuild_parameter"), (Tensor() as tensor, *_):
            return tensor
        case (
            Named("torch._utils._rebuild_tensor_v2"),
            (Storage() as base, offset, tuple(shape), tuple(strides), _, _, *metadata),
        ) if not any(metadata):  # a conjugate's or a negative's
            return Tensor(base, offset, shape, strides)
        case Named(), (Named() as unknown, *_):
            return unknown
        case Named(), _:
            return function
    raise ValueError("calls what is no function")
