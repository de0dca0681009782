"""Digests: of a checkpoint's files, which show corrupt ones, and of weights, which tell them apart.

Orbax keeps no checksum of the bytes of arrays: a flipped one would be read as a weight. What is
feared there is not malice, so it is CRC-32: it misses no flipped byte and one in 4 billion of
other corrupt files, and takes half to two thirds of the time of SHA-256.
"""

import contextlib
import hashlib
import json
import os
import re
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from flax import nnx

from enat_jax.files import read_json

_DIGESTS = re.compile(r"digests\.\d+-of-\d+\.json")  # one of each process in earlier versions
_CHUNK = 1 << 22  # bytes read at once
_READERS = 4  # files read at once: one alone rarely gets all that a network gives
_MOST_NAMED = 3  # files named in one line


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
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


def write_digests(directory: epath.Path) -> None:
    """Writes length and CRC-32 of all files of a checkpoint beside them, in an atomic file."""
    files = _digests(directory, _names(directory))
    unfinished = directory / "digests.0-of-1.unfinished"
    unfinished.write_text(json.dumps({"crc32": _crc_of_all(files), "files": files}))
    unfinished.rename(directory / "digests.0-of-1.json")


def find_corruption(directory: epath.Path, trees: Collection[str]) -> str:
    """Compares a checkpoint's files with their digests; names those that differ, "" for none.

    Files without a digest do not matter, nor folders but `trees`; the files beside them always do.
    """
    saved: dict[str, list[int]] = {}
    for path in directory.iterdir():
        if _DIGESTS.fullmatch(path.name):
            try:
                content = read_json(path)
                intact = content["crc32"] == _crc_of_all(content["files"])
            except (ValueError, KeyError, TypeError, AttributeError):
                intact = False
            if not intact:
                return f"{path.name} is corrupt: without it nothing can be verified"
            saved |= content["files"]
    wanted = [n for n in sorted(saved) if "/" not in n or n.split("/")[0] in trees]
    phrases = [
        f"{name} is {'missing' if now is None else 'not as it was written'}"
        for name, now in _digests(directory, wanted).items()
        if now != saved[name]
    ]
    more = [f"and {len(phrases) - _MOST_NAMED} more"] if len(phrases) > _MOST_NAMED else []
    return "; ".join(phrases[:_MOST_NAMED] + more)


def _names(directory: epath.Path, prefix: str = "") -> list[str]:
    """The files in a directory, digests excepted, by their paths from it."""
    names = []
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            names += _names(path, f"{prefix}{path.name}/")
        elif not path.name.startswith("digests."):
            names.append(prefix + path.name)
    return names


def _digests(directory: epath.Path, names: list[str]) -> dict[str, list[int] | None]:
    """Length in bytes and CRC-32 of files; None for one that is not there."""

    def digest(name: str) -> list[int] | None:
        length = crc = 0
        with contextlib.suppress(FileNotFoundError), (directory / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                length, crc = length + len(chunk), zlib.crc32(chunk, crc)
            return [length, crc]
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _crc_of_all(files: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())
