import csv
import dataclasses

import numpy as np
import pytest
import yaml

from enat_jax.core.strategy import clipped_counts
from enat_jax.errors import UserError
from enat_jax.experiments.search import loop
from enat_jax.experiments.search.parameters import Parameters
from enat_jax.sampling.strategy_file import read_strategy
from tests.support.made_up import made_up
from tests.support.searches import CONFIG, KNOWN, Distance, idle, without_images

PARAMETERS = Parameters(2)


@pytest.fixture(scope="module")
def model():
    return made_up("digits_autonat")


@pytest.fixture(autouse=True)
def _no_images(monkeypatch):
    without_images(monkeypatch, loop)


def search(model, out, log=lambda line: None, **changes):
    return loop.search(dataclasses.replace(CONFIG, **changes), model, out, log=log)


def text(folder):
    return (folder / "evaluations.csv").read_text()


def table(folder):
    """Rows of names and numbers."""
    return [{name: float(value) for name, value in row.items()}
            for row in csv.DictReader(text(folder).splitlines())]  # fmt: skip


def numbers(row):
    return np.array([row[name] for name in PARAMETERS.names])


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.mark.parametrize("optimiser", ["sgd", "cma"])
def test_the_seed_decides_all_that_is_written(model, tmp_path, optimiser):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        search(model, tmp_path / name, optimiser=optimiser, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 3 + 7  # and a strategy per update
    assert (text(tmp_path / "a") == text(tmp_path / "c")) == (optimiser == "sgd")


def test_a_row_per_evaluation_has_its_numbers_and_value(model, tmp_path):
    search(model, tmp_path)
    header = text(tmp_path).splitlines()[0].split(",")
    assert header == ["update", "candidate", "images", *PARAMETERS.names, "never_called"]
    rows = table(tmp_path)
    assert [row["update"] for row in rows] == np.repeat(np.arange(7), 7).tolist()  # 4T - 1 each
    assert [row["candidate"] for row in rows] == 7 * list(range(7))
    assert [row["images"] for row in rows] == 21 * [10] + 28 * [50]
    for row in rows:
        assert row["never_called"] == np.sum((numbers(row) - KNOWN) ** 2) - 100 / row["images"]


def test_the_best_is_that_of_the_largest_sample_and_can_be_read(model, tmp_path):
    best = search(model, tmp_path)
    row = min((row for row in table(tmp_path) if row["images"] == 50),
              key=lambda row: row["never_called"])  # fmt: skip
    assert best == (tmp_path / "best.yaml", row["never_called"], 49)
    again = read_strategy(best.path, steps=2)
    assert again.masked_counts(16) == clipped_counts(numbers(row)[:1], 16)
    np.testing.assert_array_equal(again.sampling_temperature, numbers(row)[2:4])
    np.testing.assert_array_equal(again.guidance_scale, numbers(row)[4:6])


def test_a_phase_starts_where_the_last_one_ended(model, tmp_path):
    search(model, tmp_path)
    ended = yaml.safe_load((tmp_path / "updates/0002.yaml").read_text())
    assert numbers(table(tmp_path)[21])[4:].tolist() == ended["manual_cfg"]


@pytest.mark.parametrize("optimiser", ["sgd", "cma"])
def test_cut_off_anywhere_the_table_is_completed_byte_for_byte(model, tmp_path, optimiser):
    search(model, tmp_path / "complete", optimiser=optimiser)
    complete = text(tmp_path / "complete")
    for at in [*np.random.default_rng(0).integers(0, len(complete), size=6), len(complete)]:
        folder = tmp_path / str(at)
        folder.mkdir()
        (folder / "about.json").write_bytes((tmp_path / "complete/about.json").read_bytes())
        (folder / "evaluations.csv").write_text(complete[:at])
        Distance.asked = 0
        search(model, folder, optimiser=optimiser)
        assert files(folder) == files(tmp_path / "complete")
        missing = complete.count("\n") - max(complete[:at].count("\n"), 1)
        assert missing <= Distance.asked < missing + (CONFIG.strategies_per_call if missing else 1)


def test_killed_it_has_every_complete_call_and_goes_on_to_the_same_files(model, tmp_path):
    Distance.fatal = 26
    with pytest.raises(KeyboardInterrupt):
        search(model, tmp_path / "killed")
    assert text(tmp_path / "killed").count("\n") == 1 + 24  # calls of 3, 3 and 1
    lines = []
    search(model, tmp_path / "killed", log=lines.append)
    assert lines[0] == "going on: 24 evaluations are there"
    search(model, tmp_path / "complete")
    assert files(tmp_path / "killed") == files(tmp_path / "complete")


def test_another_search_is_refused(model, tmp_path):
    search(model, tmp_path)
    probe = dataclasses.replace(CONFIG.sgd, probe=0.2)
    with pytest.raises(UserError, match=r"with something else \(sgd\.probe = 0\.2, there 0"):
        search(model, tmp_path, sgd=probe)
    with pytest.raises(UserError, match=r"run\.step = 8, there 4"):
        search(model._replace(step=8), tmp_path)


def test_a_value_that_is_not_finite_stops_and_is_named_with_its_strategy(model, tmp_path):
    Distance.bad = (10,)
    with pytest.raises(UserError, match="= nan of candidate 2 of update 1, the strat") as error:
        search(model, tmp_path)
    row = table(tmp_path)[9]
    assert np.isnan(row["never_called"])
    named = read_strategy(str(error.value).rpartition(" ")[2])
    np.testing.assert_array_equal(named.sampling_temperature, numbers(row)[2:4])


def test_or_the_search_goes_on_with_the_worst_value_so_far(model, tmp_path):
    Distance.bad, lines = (10,), []
    search(model, tmp_path, on_nonfinite="worst", log=lines.append)
    values = [row["never_called"] for row in table(tmp_path)]
    assert np.isnan(values).sum() == 1
    worst = f"goes on as {np.nanmax(values[:14]):.6g}"
    assert [worst in line for line in lines if "goes on as" in line] == [True]
    # and one that had stopped there goes on, too, to the same end
    Distance.asked = 0
    with pytest.raises(UserError):
        search(model, tmp_path / "other")
    Distance.bad = ()
    search(model, tmp_path / "other", on_nonfinite="worst")
    assert text(tmp_path / "other") == text(tmp_path)


def test_progress_names_the_best_the_rate_and_what_is_left(model, tmp_path):
    lines = []
    search(model, tmp_path, log=lines.append)
    assert len(lines) == 7
    assert lines[0].startswith("update 1 of 7, 10 images: best never_called ")
    assert "evaluations/s, about " in lines[0]
    assert lines[-1].startswith("update 7 of 7, 50 images")


def test_several_hosts_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="search runs on one host, not on 2"):
        search(model, tmp_path)


class TestStart:
    def start(self, model, **changes):
        return loop.starting_numbers(dataclasses.replace(CONFIG, **changes), idle(model))

    def test_published_of_the_run_or_a_file(self, model, tmp_path):
        best = search(model, tmp_path)
        np.testing.assert_array_equal(self.start(model), PARAMETERS.published_start())
        np.testing.assert_allclose(self.start(model, start="run")[:2], [0.5**0.5, 16])
        np.testing.assert_array_equal(
            self.start(model, start=str(best.path)), PARAMETERS.numbers(read_strategy(best.path))
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"start": "none.yaml"}, "start = 'none.yaml' must be 'published', 'run' or a file"),
            ({"steps": 17}, "steps = 17 must be between 1 and 16 tokens"),
        ],
    )
    def test_what_cannot_be_is_refused(self, model, changes, message):
        with pytest.raises(UserError, match=message):
            self.start(model, **changes)
