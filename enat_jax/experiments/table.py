"""A study's folder: what it was started with, and the table from which it goes on."""

import csv
import io
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from enat_jax.errors import UserError, differences
from enat_jax.files import read_json, write_json, write_text

ABOUT = "about.json"
Row = dict[str, Any]
Key = tuple[Any, ...]


class Table:
    """Rows of typed columns in a CSV file, beside an `about.json` that says what they belong to.

    The file is atomic and holds complete rows alone; numbers are written so that they read back
    exactly.

    Columns are `str`, `int` or `float`; the first ones, so many as `keys`, tell rows apart. `about`
    is everything that determines the rows, as JSON can hold it, sections nested. `order` has the
    keys of all rows that there are to be, in the file's order; by default rows stand as they were
    added, whatever they are.

    Attributes:
        rows: by their keys.

    Raises:
        UserError: a folder of another study, the fields that differ named; a table without
            `about.json`; or files that cannot be read.
    """

    def __init__(
        self,
        path: pathlib.Path,
        columns: Mapping[str, type],
        *,
        keys: int,
        about: Mapping[str, Any],
        order: Sequence[Key] = (),
    ):
        self.path, self.columns, self.rows = path, dict(columns), dict[Key, Row]()
        self._keys, self._order = keys, list(order)
        _open_folder(path, about)
        text = _read(path, lambda path: path.read_text(encoding="utf-8")) if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]  # a line that was cut off is made again
        lines = list(csv.reader(io.StringIO(complete, newline="")))
        if lines and lines[0] != list(columns):
            raise UserError(f"{path}: its columns are not those of this study")
        for number, cells in enumerate(lines[1:], start=2):
            try:
                if len(cells) != len(columns):
                    raise ValueError(f"{len(cells)} columns instead of {len(columns)}")
                self._keep(dict(zip(columns, cells, strict=True)))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from error
        self.add()

    def missing(self) -> list[Key]:
        """Keys of the rows that are still to be made."""
        return [key for key in self._order if key not in self.rows]

    def add(self, *rows: Row) -> None:
        """Adds rows, of which the columns' values are kept; they are on disk when it returns."""
        for row in rows:
            self._keep(row)
        if self._order:
            self.rows = {key: self.rows[key] for key in self._order if key in self.rows}
        write_csv(self.path, self.columns, self.rows.values())

    def _keep(self, row: Row) -> None:
        typed = {name: kind(row[name]) for name, kind in self.columns.items()}
        key = tuple(typed.values())[: self._keys]
        if self._order and key not in self._order:
            raise ValueError(f"this study has no row {key}")
        self.rows[key] = typed


def write_csv(path: pathlib.Path, columns: Iterable[str], rows: Iterable[Row]) -> None:
    """Writes rows under the names of their columns; the file is atomic."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _open_folder(table: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Makes a study's folder, or sees that the one that is there is the same study's."""
    path = table.with_name(ABOUT)
    if path.exists():
        if different := differences(_read(path, read_json), about):
            raise UserError(
                f"{path.parent} was started with something else ({different}): choose another --out"
            )
    elif table.exists():
        raise UserError(f"{path.parent} holds {table.name} but no {ABOUT}: choose another --out")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, about)


def _read(path: pathlib.Path, read: Callable[[pathlib.Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it") from error
