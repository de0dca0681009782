"""Digests that tell weights apart: SHA-256 of files, and of parameters wherever they came from."""

import hashlib
import os

import numpy as np
from flax import nnx


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(params: nnx.State) -> str:
    """SHA-256 of parameters: their paths, shapes and float32 values, in the order of the paths."""
    digest = hashlib.sha256()
    named = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(params)}
    for name in sorted(named):
        array = np.asarray(named[name], np.float32)
        digest.update(f"{name} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
