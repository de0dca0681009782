"""Reads the weight files of other frameworks: `torch.save`'s, safetensors, and Flax's msgpack.

Nothing of a file is executed: a torch file is a zip archive of raw storages beside a pickle, which
`torch_pickle` reads; the other two are data.
"""

import contextlib
import functools
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_dtypes  # its import also gives numpy the name "bfloat16", which safetensors looks up
import numpy as np
import safetensors.numpy
from flax import serialization, traverse_util
from jaxtyping import Shaped

from enat_jax.convert.torch_pickle import Storage, Tensor, parse_pickle
from enat_jax.errors import UserError
from enat_jax.files import Path

_MAX_PICKLE_BYTES = 16 * 2**20  # a thousand tensors take about 200 kB
_MAPS = {*range(0x81, 0x90), 0xDE, 0xDF}  # how a msgpack dict begins, the empty one left out
_ENTRIES = ("params", "state_dict")  # where MaskGIT's and Lightning's files hold their weights


@contextlib.contextmanager
def about(path: object, otherwise: str = "") -> Iterator[None]:
    """Puts a file's name before what is wrong with it.

    `otherwise` is what errors of any other class mean, where they come of the file's bytes.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        if not otherwise:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: {otherwise} ({text:.200})") from error


def read_weights(path: Path, key: str | None = None) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads the arrays of a weight file, whose first bytes tell its kind.

    It is one of `torch.save` (since 1.6), of safetensors, or of `flax.serialization`. The key is of
    the entry of a training checkpoint that holds the weights, dotted where it lies deeper; by
    default `params` or `state_dict` where there is such a dict, or else all.

    Returns:
        Name to array, read-only and in the file's dtypes (bfloat16 as `ml_dtypes.bfloat16`); in
        Flax's files names are dotted paths below `key`.

    Raises:
        UserError: a file that is missing, corrupt, of another kind, or of more than plain tensors.
    """
    with about(path, "corrupt, or no weight file"):
        arrays = _read(path, key)
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def _read(path: Path, key: str | None) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        head = file.read(9)
    if head.startswith(b"PK"):
        return _read_torch(path, key)
    if head[8:] == b"{":
        return _only(_is_numbers, _entry(safetensors.numpy.load_file(path), key))
    if head and head[0] in _MAPS:
        tree = _entry(serialization.msgpack_restore(pathlib.Path(path).read_bytes()), key)
        arrays = _only(_is_numbers, traverse_util.flatten_dict(tree, sep="."))
        return {name: np.asarray(value) for name, value in arrays.items()}
    raise UserError("neither a torch zip file (torch >= 1.6), safetensors nor Flax's msgpack")


def _entry(tree: Any, key: str | None) -> dict:
    """The dict at a key of what a file holds."""
    entries = tree if isinstance(tree, dict) else {}
    if key is None:
        names = [name for name in _ENTRIES if isinstance(entries.get(name), dict)][:1]
    else:
        names = [key] if key in entries else key.split(".")
    for name in names:
        if not isinstance(tree, dict) or name not in tree:
            entries = _listing(map(repr, tree)) if isinstance(tree, dict) else "none"
            raise UserError(f"no entry {name!r}; entries: {entries}")
        tree = tree[name]
    if not isinstance(tree, dict):
        raise UserError(f"want a dict of arrays, got a {type(tree).__name__}")
    return tree


def _only(is_plain: Callable[[Any], bool], entry: dict) -> dict:
    """The entry, once its values are sure to be tensors with names."""
    odd = {n: value for n, value in entry.items() if not (isinstance(n, str) and is_plain(value))}
    if odd:
        kinds = {n: getattr(value, "name", type(value).__name__) for n, value in odd.items()}
        named = _listing(f"{name!r:.120} ({kind})" for name, kind in kinds.items())
        hint = "; give the key of a dict inside" if "dict" in kinds.values() else ""
        raise UserError(f"entries that are not named tensors: {named}{hint}")
    return entry


def _is_numbers(value: Any) -> bool:
    if not isinstance(value, np.ndarray | np.generic):
        return False
    return value.dtype.kind in "fiub" or value.dtype == ml_dtypes.bfloat16


def _listing(names: Iterable[str]) -> str:
    """At most eight names, each cut at 200 characters."""
    texts = [f"{name:.200}" for name in names]
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")


def _read_torch(path: Path, key: str | None) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        roots = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise UserError(f"{len(roots)} members */data.pkl, must be 1")
        root = roots[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise UserError("the byte order is not 'little'")
        if (size := archive.getinfo(roots[0]).file_size) > _MAX_PICKLE_BYTES:
            raise UserError(f"{roots[0]} has {size} bytes, must be at most {_MAX_PICKLE_BYTES}")
        entry = _entry(parse_pickle(archive.read(roots[0])), key)

        @functools.cache
        def content(storage: Storage) -> np.ndarray:
            member = archive.getinfo(f"{root}data/{storage.key}")
            if member.file_size != storage.count * storage.dtype.itemsize:
                raise UserError(f"{member.filename} has not {storage.count} {storage.dtype}")
            return np.frombuffer(archive.read(member), storage.dtype)  # checked by its sum

        tensors = _only(lambda value: isinstance(value, Tensor), entry)
        return {name: _view(name, tensor, content) for name, tensor in tensors.items()}


def _view(name: str, tensor: Tensor, content: Callable[[Storage], np.ndarray]) -> np.ndarray:
    """The tensor as a C-contiguous array; NumPy makes sure that it lies within its storage."""
    shape, count = tensor.shape, tensor.storage.count
    with about(f"{name!r:.120}", f"does not fit its storage of {count} elements"):
        if math.prod(shape) > count:
            raise ValueError(f"{shape} has more")
        elements = content(tensor.storage)
        # An axis of size 1 never steps, and its stride may be too large for numpy.
        size, steps = elements.itemsize, zip(shape, tensor.strides, strict=True)
        strides = [step * size * (n > 1) for n, step in steps]
        view = np.ndarray(shape, elements.dtype, elements, tensor.offset * size, strides)
        return np.ascontiguousarray(view).reshape(shape)  # as it was, if it had no axes
