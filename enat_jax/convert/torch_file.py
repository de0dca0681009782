"""Reads PyTorch weight files without torch.

A torch file is a zip archive: raw storages beside a pickle that says which tensor views which
storage; `torch_pickle` reads the pickle.
"""

import itertools
import json
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - its import also gives numpy the name "bfloat16", which safetensors looks up
import numpy as np
import safetensors.numpy
from jaxtyping import Shaped

from enat_jax.convert.torch_pickle import Tensor, WeightFileError, fill, listing, parse_pickle

_MAX_PICKLE_BYTES = 16 * 2**20  # a thousand tensors take about 200 kB
_MAX_AXES = 32
_MAX_EMPTY = 2**48  # product of an empty tensor's other sizes; numpy overflows later
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error)


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
    json.loads(header, object_pairs_hook=lambda pairs: fill({}, itertools.chain(*pairs), dict))
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
        pickled = _read(archive, roots[0], _MAX_PICKLE_BYTES)
        tensors = _state_dict(parse_pickle(pickled, key), key)
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


def _state_dict(top: Any, key: str | None) -> dict[str, Tensor]:
    if key is not None:
        if type(top) is not dict or key not in top:
            entries = listing(top) if type(top) is dict else "none"
            raise WeightFileError(f"no entry {key!r}; entries: {entries}")
        top = top[key]
    if type(top) is not dict:
        raise WeightFileError(f"want a dict of tensors, got a {type(top).__name__.strip('_')}")
    if odd := [k for k, v in top.items() if type(k) is not str or not isinstance(v, Tensor)]:
        dicts = [k for k in odd if type(top[k]) is dict]
        hint = f"; choose a dict inside with key=: {listing(dicts)}" if dicts else ""
        raise WeightFileError(f"entries that are not named tensors: {listing(odd)}{hint}")
    return top


def _view_problem(tensor: Tensor, root: str, sizes: dict[str, int]) -> str | None:
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


def _view(data: bytes, tensor: Tensor) -> np.ndarray:
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
