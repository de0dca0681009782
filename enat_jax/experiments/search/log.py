"""The record of a search: a CSV of every evaluation, from which a search goes on."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from enat_jax.errors import UserError
from enat_jax.files import write_text

EVALUATIONS = "evaluations.csv"
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
            write_text(self.path, whole or header)

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
