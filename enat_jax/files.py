"""Files that have their name only once they are whole and on disk."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str], *, partial: str = "") -> Iterator[pathlib.Path]:
    """Gives a path to write to; what is there when the block ends becomes the file.

    A process that is killed, or a block that raises, leaves the file as it was before.

    Args:
        path: the file, in a folder that is there.
        partial: name of the file meanwhile, in the same folder; the file's with `.partial` by
            default, which suits files that one process writes.
    """
    whole = pathlib.Path(path)
    part = whole.with_name(partial or f"{whole.name}.partial")
    yield part
    to_disk(part)
    part.replace(whole)


def to_disk(path: pathlib.Path) -> None:
    """Makes sure that a file's bytes are there before its name is, also if the power fails."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 as it is given, line ends included."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes what JSON can hold, for people to read, too."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes an `.npz`, uncompressed."""
    with written_whole(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)
