"""Atomic files: each appears under its name complete and on disk, or not at all."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Path = str | os.PathLike[str]


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
