"""The record of a search: a CSV of every evaluation, from which a search goes on."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from enat_jax.errors import UserError

EVALUATIONS = "evaluations.csv"
CONFIG = "search.json"
_COUNTS = ("update", "candidate", "images")


class SearchError(UserError):
    """A search that cannot be made or gone on with."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One evaluation.

    Attributes:
        update: of the whole search, from 0.
        candidate: its place among what the update asked for.
        images: how many were made.
        numbers: that stand for the strategy.
        scores: by name; the first one is minimised.
    """

    update: int
    candidate: int
    images: int
    numbers: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def value(self) -> float:
        """What is minimised."""
        return self.scores[0]

    def line(self) -> str:
        """The row as the file has it; floats to all digits, so that they are read as they were."""
        whole = (self.update, self.candidate, self.images)
        return ",".join([*map(str, whole), *map(repr, (*self.numbers, *self.scores))]) + "\n"


class Log:
    """The CSV in a search's folder, read back when the search goes on.

    Args:
        folder: of the search.
        numbers: names of the numbers.
        scores: names of the scores.

    Raises:
        SearchError: a file of other columns, or one that cannot be read.
    """

    def __init__(self, folder: pathlib.Path, numbers: Sequence[str], scores: Sequence[str]):
        self.path = folder / EVALUATIONS
        self._numbers, self._scores = len(numbers), len(scores)
        self.rows: dict[tuple[int, int], Row] = {}
        header = ",".join([*_COUNTS, *numbers, *scores]) + "\n"
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a killed search may leave a part of a line
        if whole:
            first, *lines = whole.splitlines(keepends=True)
            if first != header:
                raise SearchError(f"{self.path}: its columns are not those of this search")
            for number, line in enumerate(lines, start=2):
                row = self._read(line, number)
                self.rows[row.update, row.candidate] = row
        if whole != text or not whole:
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(whole or header, encoding="utf-8")
            partial.replace(self.path)

    def _read(self, line: str, number: int) -> Row:
        values = line.rstrip("\n").split(",")
        try:
            if len(values) != len(_COUNTS) + self._numbers + self._scores:
                raise ValueError(f"{len(values)} columns")
            update, candidate, images = map(int, values[:3])
            numbers = tuple(map(float, values[3 : 3 + self._numbers]))
            return Row(update, candidate, images, numbers,
                       tuple(map(float, values[3 + self._numbers :])))  # fmt: skip
        except ValueError as error:
            raise SearchError(f"{self.path}, line {number}: {error}") from error

    def add(self, rows: Sequence[Row]) -> None:
        """Appends evaluations; they are on disk when it returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(row.line() for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {(row.update, row.candidate): row for row in rows}

    def known(
        self, update: int, candidates: Float[np.ndarray, "k n"], images: int
    ) -> dict[int, Row]:
        """The evaluations of an update that are there, by candidate.

        Raises:
            SearchError: one that this search would not have made.
        """
        known = {k: self.rows[update, k] for k in range(len(candidates))
                 if (update, k) in self.rows}  # fmt: skip
        for k, row in known.items():
            if row.images != images or row.numbers != tuple(candidates[k].tolist()):
                raise SearchError(
                    f"{self.path}: candidate {k} of update {update} is not the one that this"
                    " search asks for: remove the folder, or choose another --out"
                )
        return known


def open_folder(out: str | os.PathLike[str], identity: dict[str, Any]) -> pathlib.Path:
    """Makes a search's folder, or refuses one that was started with something else.

    Args:
        out: the folder.
        identity: everything that determines the search, as JSON can hold it, sections nested.

    Raises:
        SearchError: a folder of something else; every field that differs is named.
    """
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG
    here = json.loads(json.dumps(identity))
    if not path.exists():
        if (folder / EVALUATIONS).exists():
            raise SearchError(f"{folder} holds {EVALUATIONS} but no {CONFIG}: choose another --out")
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(here, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        return folder
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SearchError(f"{path} cannot be read: {error}") from error
    ours, theirs = _flat(here), _flat(there)
    wrong = [
        f"{name} = {ours.get(name)!r}, there {theirs.get(name)!r}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    if wrong:
        raise SearchError(
            f"{folder} was started with something else: {'; '.join(wrong)}: choose another --out"
        )
    return folder


def _flat(fields: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{path}{name}.")
        else:
            flat[path + name] = value
    return flat
