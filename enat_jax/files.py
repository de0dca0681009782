"""Files that others may touch meanwhile: atomic ones, locks on folders, and JSON read with care.

An atomic file appears under its name complete and on disk, or not at all.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from enat_jax.errors import UserError

Path = str | os.PathLike[str]
PARTIAL = ".partial-"

_MOST_BYTES, _MOST_DEPTH = 2**26, 64  # of JSON: its length, and brackets in brackets


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[pathlib.Path]:
    """Gives a path to write to; what is there when the block ends becomes the file.

    A process that is killed, or a block that raises, leaves the file as it was before. Meanwhile
    there is a new file beside it, of a random name that begins with `PARTIAL`.

    Args:
        path: the file, in a folder that is there; a link is replaced, not followed.

    Raises:
        OSError: it cannot be written, with its name; or there is something that is no file.
    """
    final = pathlib.Path(path)
    part = final.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
    with naming(final, part):
        if final.exists() and not final.is_file():
            raise FileExistsError(errno.EEXIST, "there is something that is no file", str(final))
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            yield part
            fsync(part)
            part.replace(final)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: pathlib.Path, alias: pathlib.Path | None = None) -> Iterator[None]:
    """Puts a file's name into an OSError that has none, or has an alias of it: a full disk's."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(alias), alias):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds a file that says which process works here; what ends the process lets go of it.

    Raises:
        UserError: another process holds it; on which host, and its id.
    """
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = os.read(held, 200).decode(errors="replace").strip()
            os.close(held)
            where = os.path.dirname(path)
            raise UserError(f"{where} is in use by {who or 'another process'}") from error
        except OSError:  # of a file system without locks
            break
        if os.path.exists(path) and os.path.samestat(os.fstat(held), os.stat(path)):
            break
        os.close(held)  # of a run that has just ended
    try:
        os.ftruncate(held, 0)
        os.write(held, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        pathlib.Path(path).unlink(missing_ok=True)
        os.close(held)


def fsync(path: pathlib.Path) -> None:
    """Makes sure that a file's bytes are there before its name is, also if the power fails."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 as it is given, line ends included."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: object) -> None:
    """Writes what JSON can hold, for people to read, too."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes an `.npz`, uncompressed."""
    with atomic(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)


def read_bytes(path: Any, *, most: int) -> bytes:
    """A regular file's bytes: no pipe's or device's, which may never end.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no regular file, or has more bytes than `most`.
    """
    if path.exists() and not path.is_file():
        raise ValueError("is no regular file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"has more than {most} bytes")
    return content


def read_json(path: Any, *, most: int = _MOST_BYTES) -> Any:
    """Reads a `pathlib.Path` or alike of JSON that somebody else may have written.

    It may have `most` bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: no regular file or no JSON; or too long, nested too deep, a key twice.
    """
    try:
        content = json.loads(read_bytes(path, most=most), object_pairs_hook=_keys_once)
    except RecursionError as error:
        raise ValueError(f"is nested deeper than {_MOST_DEPTH}") from error
    level = [content]
    for _ in range(_MOST_DEPTH + 1):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for parts in inner if isinstance(parts, Iterable) and not
                 isinstance(parts, str) for part in parts]  # fmt: skip
    if level:
        raise ValueError(f"is nested deeper than {_MOST_DEPTH}")
    return content


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"has the key {key!r:.80} twice")
        content[key] = value
    return content
