import csv
import math
import os
import statistics

import pytest

from enat_jax.experiments.ablate.points import AblateError
from enat_jax.experiments.ablate.table import Table
from enat_jax.experiments.study_folder import StudyError

ORDER = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
ABOUT = {"seeds": (0, 1), "grid": {"strategy": {"steps": (4, 8)}}}


def table(folder, about=ABOUT):
    return Table(folder, about, ORDER, ["score"])


def row(point, seed, score, **others):
    return {"point": point, "seed": seed, "score": score, "gigaflop_per_image": 0.1, **others}


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_stand_in_the_order_of_the_points_whenever_they_were_made(tmp_path):
    made = table(tmp_path)
    for point, seed in (("b", 1), ("a", 1), ("a", 0)):
        made.add(row(point, seed, 1.0))
    found = [(each["point"], int(each["seed"])) for each in read(tmp_path / "results.csv")]
    assert found == [("a", 0), ("a", 1), ("b", 1)]
    assert made.missing() == [("b", 0)]


def test_another_table_of_the_folder_goes_on_from_the_same_numbers(tmp_path):
    score = math.pi * 1e-7
    table(tmp_path).add(row("a", 1, score, name="x, y", reuse=True))
    again = table(tmp_path)
    assert again.missing() == [("a", 0), ("b", 0), ("b", 1)]
    assert again.of("a")[0]["score"] == score
    again.add(row("a", 0, 2.0, name="x, y", reuse=True))
    text = (tmp_path / "results.csv").read_text()
    assert "True" in text
    assert repr(score) in text


def test_a_table_whose_writing_was_cut_short_is_as_it_was(tmp_path, monkeypatch):
    made = table(tmp_path)
    made.add(row("a", 0, 1.0))
    before = (tmp_path / "results.csv").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *paths: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            made.add(row("a", 1, 2.0))
    assert (tmp_path / "results.csv").read_bytes() == before
    assert table(tmp_path).missing() == ORDER[1:]


def test_the_summary_has_means_and_deviations_over_seeds(tmp_path):
    made = table(tmp_path)
    for seed, score in enumerate((1.0, 4.0)):
        made.add(row("a", seed, score))
    made.add(row("b", 0, 3.0))
    a, b = read(tmp_path / "summary.csv")
    assert (a["point"], a["seeds"], float(a["score"])) == ("a", "2", 2.5)
    assert float(a["score_deviation"]) == statistics.stdev((1.0, 4.0))
    assert (b["seeds"], float(b["score"]), b["score_deviation"]) == ("1", 3.0, "")
    assert "seed" not in a


def test_a_score_that_is_no_number_is_kept_and_spoils_its_points_mean_alone(tmp_path):
    made = table(tmp_path)
    made.add(row("a", 0, float("nan")))
    made.add(row("a", 1, 1.0))
    made.add(row("b", 0, 1.0))
    again = table(tmp_path)
    assert [math.isnan(each["score"]) for each in again.summary()] == [True, False]
    assert again.missing() == [("b", 1)]


def test_another_ablations_folder_is_refused_with_the_fields_that_differ(tmp_path):
    table(tmp_path).add(row("a", 0, 1.0))
    other = {"seeds": (0, 1), "grid": {"strategy": {"steps": (4, 6)}}, "sheet": 3}
    with pytest.raises(StudyError, match=r"grid\.strategy\.steps = \[4, 6\], there \[4, 8\]"):
        table(tmp_path, other)
    assert table(tmp_path).missing() == ORDER[1:]  # nothing was lost


@pytest.mark.parametrize("text", ["point,seed\nz,0\n", "point,seed,score\na,x,1\n", "name\n1\n"])
def test_a_table_that_cannot_be_read_is_named(tmp_path, text):
    table(tmp_path).add(row("a", 0, 1.0))
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(AblateError, match=r"cannot read .*results\.csv"):
        table(tmp_path)
