"""Digests of a checkpoint's files, by which damage to them is found.

Orbax keeps no checksum of the bytes of arrays: a flipped one would be read as a weight. The enemy
is damage, not malice, so it is CRC-32: it misses no flipped byte and one in 4 billion of other
damaged files, and takes half to two thirds of the time of SHA-256, less where a processor has no
instructions for that.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

_FILE = re.compile(r"digests\.(\d+)-of-(\d+)\.json")
_WRITER = re.compile(r"\bprocess_(\d+)")  # how Orbax names what one process has written
_CHUNK = 1 << 22  # bytes read at once
_READERS = 4  # files read at once: one alone rarely gets all that a network gives
_MOST_NAMED = 3  # files named in one line


def write_digests(directory: epath.Path, process: int, processes: int) -> None:
    """Writes the digests of a process's share of a checkpoint beside its files.

    A process's share is what it has written itself, which its host still has in memory, and for
    process 0 what belongs to none. So processes need not speak with each other: every one writes
    `digests.{process}-of-{processes}.json`, which appears whole or not at all.

    Raises:
        OSError: a file cannot be read or written.
    """
    files = {
        name: _digest(directory / name)
        for name in _names(directory)
        if _writer(name, processes) == process
    }
    unfinished = directory / f"digests.{process}-of-{processes}.unfinished"
    unfinished.write_text(json.dumps({"crc32": _of_all(files), "files": files}))
    unfinished.rename(directory / f"digests.{process}-of-{processes}.json")


def find_damage(
    directory: epath.Path, trees: Collection[str] | None, process: int, processes: int
) -> tuple[str, bool]:
    """Compares a process's share of a checkpoint's files with their digests.

    Args:
        directory: the checkpoint; files in it that have no digest are let be.
        trees: the folders to look into, None for all. The files beside them always count.
        process: whose share. All shares together are all files, spread by size, whatever the
            number of processes that wrote them.
        processes: how many processes share the work.

    Returns:
        The damage in a phrase that names the files, empty if there is none; and whether all
        digests are there, so that no damage means more than that none was found.

    Raises:
        OSError: the directory cannot be read.
    """
    files: dict[str, list[int]] = {}
    there: set[tuple[int, int]] = set()
    for path in directory.iterdir():
        if match := _FILE.fullmatch(path.name):
            try:
                saved = json.loads(path.read_text())
                whole = saved["crc32"] == _of_all(saved["files"])
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                return f"{path.name} is damaged: without it nothing can be verified", False
            files |= saved["files"]
            there.add((int(match[1]), int(match[2])))
    wanted = [
        name
        for name in sorted(files, key=lambda name: (-files[name][0], name))
        if trees is None or "/" not in name or name.partition("/")[0] in trees
    ]
    with ThreadPoolExecutor(_READERS) as pool:
        compare = pool.map(
            lambda n: _difference(directory, n, files[n]), wanted[process::processes]
        )
        differences = [difference for difference in compare if difference]
    more = len(differences) - _MOST_NAMED
    told = differences[:_MOST_NAMED] + ([f"and {more} more"] if more > 0 else [])
    complete = bool(there) and there == {(p, n) for _, n in there for p in range(n)}
    return "; ".join(told), complete


def _names(directory: epath.Path, prefix: str = "") -> Iterator[str]:
    """The files in a directory, digests excepted, by their paths from it."""
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _names(path, f"{prefix}{path.name}/")
        elif prefix or not path.name.startswith("digests."):
            yield prefix + path.name


def _writer(name: str, processes: int) -> int:
    match = _WRITER.search(name)
    return int(match[1]) if match and int(match[1]) < processes else 0


def _digest(path: epath.Path) -> list[int]:
    """A file's length in bytes and CRC-32."""
    length = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            length, crc = length + len(chunk), zlib.crc32(chunk, crc)
    return [length, crc]


def _difference(directory: epath.Path, name: str, saved: list[int]) -> str:
    """What is wrong with a file, empty if it is as it was saved."""
    try:
        length, crc = _digest(directory / name)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    if length < saved[0]:
        return f"{name} is truncated: {length} of {saved[0]} bytes"
    if length > saved[0]:
        return f"{name} has {length} bytes, not {saved[0]}"
    if crc != saved[1]:
        return f"{name} is not as it was written: CRC-32 {crc:08x}, not {saved[1]:08x}"
    return ""


def _of_all(files: dict[str, list[int]]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())
