import json

import pytest

from enat_jax.experiments.study_folder import StudyError, open_study

ABOUT = {"seed": 3, "run": {"step": (7, 8)}}


def test_a_study_goes_on_in_its_own_folder(tmp_path):
    for _ in range(2):
        open_study(tmp_path / "a/b", ABOUT, results="rows.csv")
        (tmp_path / "a/b/rows.csv").write_text("a row\n")
    assert json.loads((tmp_path / "a/b/about.json").read_text()) == {
        "seed": 3,
        "run": {"step": [7, 8]},
    }
    assert (tmp_path / "a/b/rows.csv").read_text() == "a row\n"


def test_another_study_is_refused_and_the_folder_stays_as_it_was(tmp_path):
    open_study(tmp_path, ABOUT, results="rows.csv")
    before = (tmp_path / "about.json").read_text()
    with pytest.raises(StudyError, match=r"else \(seed = 4, there 3\): choose another --out"):
        open_study(tmp_path, {**ABOUT, "seed": 4}, results="rows.csv")
    assert (tmp_path / "about.json").read_text() == before


def test_results_of_unknown_origin_are_left_alone(tmp_path):
    (tmp_path / "rows.csv").write_text("mine\n")
    with pytest.raises(StudyError, match=r"holds rows\.csv but no about\.json"):
        open_study(tmp_path, ABOUT, results="rows.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_a_damaged_about_is_named(tmp_path, content):
    (tmp_path / "about.json").write_bytes(content)
    with pytest.raises(StudyError, match=r"cannot read .*about\.json: .*; remove it"):
        open_study(tmp_path, ABOUT, results="rows.csv")
