"""Reads weight files written by `flax.serialization`: msgpack with arrays in it.

Msgpack is data: nothing in such a file can be executed.
"""

import os
from typing import Any

import ml_dtypes
import numpy as np
from flax import serialization
from jaxtyping import Shaped

from enat_jax.convert.torch_pickle import WeightFileError, listing

_MAPS = {*range(0x81, 0x90), 0xDE, 0xDF}  # how a msgpack dict begins, the empty one left out


def is_flax_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as `flax.serialization` writes a tree, and as no other weight file.

    False where there is no file to read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError:
        return False
    return bool(head) and head[0] in _MAPS and head[8:] != b"{"  # the brace begins safetensors


def read_flax(
    path: str | os.PathLike[str], key: str | None = None
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads the arrays of a tree written by `flax.serialization.to_bytes`.

    Args:
        path: the weight file.
        key: dotted path of the dict inside that holds the weights; None for the whole tree.

    Returns:
        Dotted path below `key` to array, read-only where flax gives it so.

    Raises:
        WeightFileError: a file that is missing or damaged, or a tree of other things than arrays.
    """
    try:
        with open(path, "rb") as file:
            tree = serialization.msgpack_restore(file.read())
    except OSError as error:
        raise WeightFileError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # whatever msgpack, NumPy and flax say of damaged bytes
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise WeightFileError(f"{path}: damaged, or no Flax weight file ({text:.200})") from error
    try:
        return _flatten(_inside(tree, key))
    except WeightFileError as error:
        raise WeightFileError(f"{path}: {error}") from error


def _inside(tree: Any, key: str | None) -> dict:
    for name in key.split(".") if key is not None else ():
        if not isinstance(tree, dict) or name not in tree:
            entries = listing(tree) if isinstance(tree, dict) else "none"
            raise WeightFileError(f"no entry {name!r} of {key!r}; entries: {entries}")
        tree = tree[name]
    if not isinstance(tree, dict):
        raise WeightFileError(f"want a dict of arrays, got a {type(tree).__name__}")
    return tree


def _flatten(tree: dict) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    odd, left = [], [("", tree)]
    while left:  # no recursion: the file says how deep the tree is
        prefix, branch = left.pop()
        for name, value in branch.items():
            path = f"{prefix}{name}"
            if isinstance(value, dict):
                left.append((f"{path}.", value))
            elif not isinstance(name, str) or not _is_numbers(value) or path in arrays:
                odd.append(path)
            else:
                arrays[path] = np.asarray(value)
    if odd:
        raise WeightFileError(
            f"entries that are not arrays with a name of their own: {listing(odd)}"
        )
    return arrays


def _is_numbers(value: Any) -> bool:
    if not isinstance(value, np.ndarray | np.generic):
        return False
    return value.dtype.kind in "fiub" or value.dtype == ml_dtypes.bfloat16
