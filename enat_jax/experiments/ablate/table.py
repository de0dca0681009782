"""The table of an ablation: one row per point and seed, kept so that a killed run can go on."""

import csv
import io
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from enat_jax.experiments.ablate.points import AblateError
from enat_jax.experiments.study_folder import open_study
from enat_jax.files import write_text

Row = dict[str, Any]
RESULTS = "results.csv"


class Table:
    """Rows by point and seed, in `results.csv`; what they belong to, in `about.json`.

    The file is written whole after every row, under another name first, so that it never holds
    half a row. Numbers are written so that they read back exactly.

    Args:
        folder: where both files are; made if it is not there.
        about: everything that determines the rows, as JSON holds it.
        order: (point, seed) of all rows there are to be; the file is in this order.
        scores: the names of the columns that differ from seed to seed.

    Raises:
        UserError: the folder holds another ablation, the fields that differ named, or a table
            that cannot be read.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        about: Mapping[str, Any],
        order: Sequence[tuple[str, int]],
        scores: Sequence[str],
    ):
        self.folder, self.order, self.scores = folder, list(order), list(scores)
        self.rows: dict[tuple[str, int], Row] = {}
        open_study(folder, about, results=RESULTS)
        if (folder / RESULTS).exists():
            self._read(folder / RESULTS)

    def missing(self) -> list[tuple[str, int]]:
        """(point, seed) of the rows that are still to be made."""
        return [each for each in self.order if each not in self.rows]

    def of(self, point: str) -> list[Row]:
        """The rows of a point, in the order of the seeds."""
        return [self.rows[each] for each in self.order if each[0] == point and each in self.rows]

    def add(self, row: Row) -> None:
        """Adds a row, which names its `point` and `seed`, and writes the table and its summary."""
        self.rows[row["point"], row["seed"]] = row
        rows = [self.rows[each] for each in self.order if each in self.rows]
        write_text(self.folder / RESULTS, _as_csv(rows))
        write_text(self.folder / "summary.csv", _as_csv(self.summary()))

    def summary(self) -> list[Row]:
        """One row per point: the scores' means, and their sample deviations where seeds differ."""
        found = []
        for point in dict.fromkeys(name for name, _ in self.order):
            rows = self.of(point)
            if not rows:
                continue
            row = {name: value for name, value in rows[0].items() if name != "seed"}
            row = {"point": row.pop("point"), "seeds": len(rows), **row}
            for name in self.scores:
                values = [float(each[name]) for each in rows]
                row[name] = statistics.fmean(values)
                spread = statistics.stdev if all(map(math.isfinite, values)) else _nan
                row[f"{name}_deviation"] = spread(values) if len(values) > 1 else ""
            found.append(row)
        return found

    def _read(self, path: pathlib.Path) -> None:
        try:
            with open(path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    values = {name: _value(text) for name, text in row.items()}
                    key = row["point"], int(row["seed"])
                    if key not in self.order or not set(self.scores) <= set(values):
                        raise ValueError(f"row of point {key[0]!r} and seed {key[1]}")
                    self.rows[key] = {**values, "point": key[0], "seed": key[1]}
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise AblateError(f"cannot read {path}: {error}; remove it") from error


def _value(text: str) -> Any:
    """What a cell held: a number, where it reads as one, or text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _nan(values: Sequence[float]) -> float:
    return math.nan


def _as_csv(rows: Sequence[Row]) -> str:
    """Rows under the names of all columns that any of them has."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
