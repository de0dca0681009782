"""Files: written atomically, complete and on disk or not at all; and JSON read with care."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

Path = str | os.PathLike[str]

_MOST_BYTES, _MOST_DEPTH = 2**26, 64  # of JSON: its length, and brackets in brackets


@contextlib.contextmanager
def atomic(path: Path, *, partial: str = "") -> Iterator[pathlib.Path]:
    """Gives a path to write to; what is there when the block ends becomes the file.

    A process that is killed, or a block that raises, leaves the file as it was before.

    Args:
        path: the file, in a folder that is there.
        partial: name of the file meanwhile, in the same folder; the file's with `.partial` by
            default, which suits files that one process writes.
    """
    final = pathlib.Path(path)
    part = final.with_name(partial or f"{final.name}.partial")
    yield part
    fsync(part)
    part.replace(final)


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


def read_json(path: Any) -> Any:
    """Reads a `pathlib.Path` or alike of JSON that somebody else may have written.

    Raises:
        OSError: the file cannot be read.
        ValueError: no regular file or no JSON; or too long, nested too deep, a key twice.
    """
    if path.exists() and not path.is_file():
        raise ValueError("is no regular file")
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"has more than {_MOST_BYTES} bytes")
    try:
        content = json.loads(text, object_pairs_hook=_keys_once)
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
