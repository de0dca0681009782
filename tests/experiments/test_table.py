import json
import math
import os

import pytest

from enat_jax.errors import UserError
from enat_jax.experiments.table import Table

ABOUT = {"seed": 3, "grid": {"strategy": {"steps": (4, 8)}}}
COLUMNS = {"point": str, "seed": int, "score": float, "reuse": str}
ORDER = [("a, b", 0), ("a, b", 1), ("c", 0)]


def table(folder, about=ABOUT, order=ORDER):
    return Table(folder / "rows.csv", COLUMNS, keys=2, about=about, order=order)


def row(point, seed, score, reuse=True):
    return {"point": point, "seed": seed, "score": score, "reuse": reuse, "other": "not kept"}


def test_another_table_of_the_folder_goes_on_from_the_same_numbers(tmp_path):
    folder, score = tmp_path / "new" / "folder", math.pi * 1e-7
    table(folder).add(row("a, b", 1, score))
    again = table(folder)
    assert again.rows == {
        ("a, b", 1): {"point": "a, b", "seed": 1, "score": score, "reuse": "True"}
    }
    assert again.missing() == [ORDER[0], ORDER[2]]
    assert json.loads((folder / "about.json").read_text()) == json.loads(json.dumps(ABOUT))


def test_rows_stand_in_the_order_given_or_as_they_were_added(tmp_path):
    for folder, order, seeds in (("given", ORDER, "01"), ("added", (), "10")):
        made = table(tmp_path / folder, order=order)
        made.add(row("a, b", 1, 1.0))
        made.add(row("a, b", 0, math.nan))
        lines = (tmp_path / folder / "rows.csv").read_text().splitlines()
        assert lines[0] == "point,seed,score,reuse"
        assert [line[7] for line in lines[1:]] == list(seeds)
        assert '"a, b",0,nan,True' in lines


def test_a_line_that_was_cut_off_is_not_there(tmp_path):
    table(tmp_path).add(row("a, b", 0, 1.25), row("c", 0, 2.5))
    path = tmp_path / "rows.csv"
    text = path.read_text()
    for end in range(len(text) + 1):
        path.write_text(text[:end])
        complete = text[:end].count("\n")
        assert len(table(tmp_path).rows) == max(complete - 1, 0)
        assert path.read_text() == "".join(text.splitlines(keepends=True)[: max(complete, 1)])


def test_writing_that_is_cut_short_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    made = table(tmp_path)
    made.add(row("a, b", 0, 1.0))
    before = (tmp_path / "rows.csv").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *paths: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            made.add(row("c", 0, 2.0))
    assert (tmp_path / "rows.csv").read_bytes() == before


def test_another_study_is_refused_with_the_fields_that_differ(tmp_path):
    table(tmp_path)
    before = (tmp_path / "about.json").read_text()
    other = {"seed": 4, "grid": {"strategy": {"steps": (4, 6)}}}
    with pytest.raises(UserError, match=r"seed = 4, there 3; grid\.strategy\.steps = \[4, 6\], th"):
        table(tmp_path, other)
    assert (tmp_path / "about.json").read_text() == before


def test_a_table_of_unknown_origin_is_left_alone(tmp_path):
    (tmp_path / "rows.csv").write_text("mine\n")
    with pytest.raises(UserError, match=r"holds rows\.csv but no about\.json"):
        table(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("about.json", b"{", r"cannot read .*about\.json: .*; remove it"),
        ("about.json", b"\xff", r"cannot read .*about\.json: .*; remove it"),
        ("rows.csv", b"point,seed\n", r"rows\.csv: its columns are not those of this study"),
        ("rows.csv", b"c,0,1.0\n", r"rows\.csv, line 3: 3 columns instead of 4"),
        ("rows.csv", b"c,x,1.0,True\n", r"rows\.csv, line 3: .*'x'"),
        ("rows.csv", b"d,0,1.0,True\n", r"rows\.csv, line 3: this study has no row \('d', 0\)"),
    ],
)
def test_a_corrupt_file_is_named(tmp_path, name, content, message):
    table(tmp_path).add(row("a, b", 0, 1.0))
    path = tmp_path / name
    kept = path.read_bytes() if content[:1] in b"cd" else b""
    path.write_bytes(kept + content)
    with pytest.raises(UserError, match=message):
        table(tmp_path)
