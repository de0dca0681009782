import dataclasses
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

from enat_jax.config import load_config
from enat_jax.core.strategy import clipped_counts, read_strategy
from enat_jax.errors import UserError
from enat_jax.evaluation.objective import ObjectiveConfig
from enat_jax.experiments.search import loop
from enat_jax.experiments.search.config import SearchConfig
from enat_jax.experiments.search.evaluations import Evaluations
from enat_jax.experiments.search.parameters import Parameters
from enat_jax.models.networks import make_network
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.sampling.sampler import Restored, Sampler, sampler_of

STEPS = 2
PARAMETERS = Parameters(STEPS)
KNOWN = np.array([0.6, 0.5, 0.8, 0.9, 0.4, 0.7])  # where `distance` is least
CONFIG = SearchConfig(
    steps=STEPS, num_images=(10, 50), updates=(3, 4), seed=3, strategies_per_call=3,
    objective=ObjectiveConfig(
        name="tests.experiments.search.test_loop:never_called", output="token_ids"
    ),
)  # fmt: skip


def never_called(token_ids, class_ids):
    raise AssertionError


class Distance(Evaluations):
    """In place of images: the distance of a strategy's numbers to known ones, and who asked."""

    asked = 0
    bad = ()  # evaluations that are not finite
    fatal = None  # the evaluation that kills the process

    def __init__(self, cfg, sampler, objective, start):
        self.parameters = Parameters(cfg.steps)

    def __call__(self, candidates, images, *, together=None):
        found = []
        for numbers in candidates:
            Distance.asked += 1
            if Distance.asked == Distance.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            # few images flatter, so that values of two sizes do not compare
            value = float(np.sum((numbers - KNOWN) ** 2) - 100 / images)
            found.append({"never_called": np.nan if Distance.asked in Distance.bad else value})
        return found


def restored():
    config = load_config(
        "configs/digits_autonat.py", ["model.width=4", "model.num_heads=1", "model.depth=2"]
    )
    init = jax.jit(lambda: nnx.split(make_network(config.model, rngs=nnx.Rngs(0)), nnx.Param)[1])
    return Restored(config, init(), 7, None, "")


def still(restored):
    """A sampler that knows its config, and is never asked for anything."""
    sampler = object.__new__(Sampler)
    sampler.config, sampler.placement = restored.config, Placement.of(MeshConfig(data=1))
    return sampler


@pytest.fixture(scope="module")
def model():
    return restored()


@pytest.fixture(autouse=True)
def _distances(monkeypatch):
    monkeypatch.setattr(loop, "Evaluations", Distance)
    monkeypatch.setattr(loop, "sampler_of", still)
    for name, value in (("asked", 0), ("bad", ()), ("fatal", None)):
        monkeypatch.setattr(Distance, name, value)


def search(model, out, say=lambda line: None, **changes):
    return loop.search(dataclasses.replace(CONFIG, **changes), model, out, say=say)


def text(folder):
    return (folder / "evaluations.csv").read_text()


@pytest.mark.parametrize("optimiser", ["sgd", "cma"])
def test_two_searches_with_one_seed_write_the_same(model, tmp_path, optimiser):
    for name in ("a", "b"):
        search(model, tmp_path / name, optimiser=optimiser)
    files = [sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.*"))
             for name in ("a", "b")]  # fmt: skip
    assert files[0] == files[1]
    assert len(files[0]) == 3 + 7  # and a strategy per update
    for path in files[0]:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_another_seed_is_another_search(model, tmp_path):
    search(model, tmp_path / "a", optimiser="cma")
    search(model, tmp_path / "b", optimiser="cma", seed=4)
    assert text(tmp_path / "a") != text(tmp_path / "b")


def test_the_record_has_a_row_per_evaluation_and_its_value(model, tmp_path):
    search(model, tmp_path)
    header, *lines = text(tmp_path).splitlines()
    assert header.split(",") == ["update", "candidate", "images", *PARAMETERS.names, "never_called"]
    rows = [line.split(",") for line in lines]
    assert len(rows) == 7 * 7  # updates of 4T - 1 evaluations
    assert [int(row[0]) for row in rows] == np.repeat(np.arange(7), 7).tolist()
    assert [int(row[1]) for row in rows] == 7 * list(range(7))
    assert [int(row[2]) for row in rows] == 21 * [10] + 28 * [50]
    for row in rows:
        numbers = np.array(row[3:9], np.float64)
        assert float(row[9]) == np.sum((numbers - KNOWN) ** 2) - 100 / int(row[2])


def test_the_best_is_that_of_the_largest_sample_and_can_be_read(model, tmp_path):
    found = search(model, tmp_path)
    rows = [line.split(",") for line in text(tmp_path).splitlines()[1:]]
    best = min((row for row in rows if row[2] == "50"), key=lambda row: float(row[-1]))
    assert found.value == float(best[-1])
    again = read_strategy(found.path, steps=STEPS)
    numbers = np.array(best[3:9], np.float64)
    assert again.masked_counts(64) == clipped_counts(numbers[:1], 64)
    np.testing.assert_array_equal(again.sampling_temperature, numbers[2:4])
    np.testing.assert_array_equal(again.guidance_scale, numbers[4:6])


def test_a_phase_starts_where_the_last_one_ended(model, tmp_path):
    search(model, tmp_path)
    rows = [line.split(",") for line in text(tmp_path).splitlines()[1:]]
    ended = yaml.safe_load((tmp_path / "updates/0002.yaml").read_text())
    assert list(map(float, rows[21][7:9])) == ended["manual_cfg"]  # the first on 50 images


def test_a_search_that_is_done_evaluates_nothing_when_run_again(model, tmp_path):
    once = search(model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    asked = Distance.asked
    again = search(model, tmp_path)
    assert Distance.asked == asked
    assert (again.value, again.evaluations) == (once.value, once.evaluations)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


@pytest.mark.parametrize("optimiser", ["sgd", "cma"])
def test_cut_off_anywhere_the_record_is_completed_byte_for_byte(model, tmp_path, optimiser):
    search(model, tmp_path / "whole", optimiser=optimiser)
    whole = text(tmp_path / "whole")
    for at in np.random.default_rng(0).integers(0, len(whole), size=6):
        folder = tmp_path / str(at)
        folder.mkdir()
        (folder / "about.json").write_bytes((tmp_path / "whole/about.json").read_bytes())
        (folder / "evaluations.csv").write_text(whole[:at])
        Distance.asked = 0
        search(model, folder, optimiser=optimiser)
        assert text(folder) == whole
        missing = whole.count("\n") - max(whole[:at].count("\n"), 1)
        assert missing <= Distance.asked < missing + CONFIG.strategies_per_call


KILLED = """
import sys
import tests.experiments.search.test_loop as t
t.loop.Evaluations, t.loop.sampler_of = t.Distance, t.still
t.Distance.fatal = 26
t.search(t.restored(), sys.argv[1])
"""


def test_killed_and_run_again_it_writes_the_same(model, tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert text(tmp_path / "killed").count("\n") == 1 + 24  # whole calls of 3, 3 and 1
    lines = []
    search(model, tmp_path / "killed", say=lines.append)
    assert lines[0] == "going on: 24 evaluations are there"
    search(model, tmp_path / "whole")
    assert text(tmp_path / "killed") == text(tmp_path / "whole")


def test_another_config_is_refused_with_the_field(model, tmp_path):
    search(model, tmp_path)
    with pytest.raises(
        UserError, match=r"started with something else \(sgd\.probe = 0\.2, there 0"
    ):
        search(model, tmp_path, sgd=dataclasses.replace(CONFIG.sgd, probe=0.2))
    with pytest.raises(UserError, match=r"run\.step = 8, there 7"):
        search(model._replace(step=8), tmp_path)


def test_a_record_of_other_evaluations_is_refused(model, tmp_path):
    search(model, tmp_path)
    (tmp_path / "evaluations.csv").write_text(text(tmp_path).replace("\n0,1,10,", "\n0,1,11,"))
    with pytest.raises(UserError, match="candidate 1 of update 0 is not the one"):
        search(model, tmp_path)


def test_a_damaged_line_is_named(model, tmp_path):
    search(model, tmp_path)
    lines = text(tmp_path).splitlines(keepends=True)
    lines[4] = "0,3,ten" + lines[4][6:]
    (tmp_path / "evaluations.csv").write_text("".join(lines))
    with pytest.raises(UserError, match=r"evaluations\.csv, line 5"):
        search(model, tmp_path)


def test_a_value_that_is_not_finite_stops_and_is_named_with_its_strategy(model, tmp_path):
    Distance.bad = (10,)
    with pytest.raises(
        UserError, match="= nan of candidate 2 of update 1, the strategy in"
    ) as said:
        search(model, tmp_path)
    path = str(said.value).rpartition(" ")[2]
    row = text(tmp_path).splitlines()[10].split(",")
    assert row[-1] == "nan"
    np.testing.assert_array_equal(read_strategy(path).sampling_temperature,
                                  np.array(row[5:7], np.float64))  # fmt: skip


def test_or_the_search_goes_on_with_the_worst_value_so_far(model, tmp_path):
    Distance.bad = (10,)
    lines = []
    search(model, tmp_path, on_nonfinite="worst", say=lines.append)
    assert sum("goes on as" in line for line in lines) == 1
    values = [float(line.split(",")[-1]) for line in text(tmp_path).splitlines()[1:]]
    assert np.isnan(values).sum() == 1
    worst = np.nanmax(values[:14])
    assert any(f"goes on as {worst:.6g}" in line for line in lines)
    # and one that had stopped there goes on, too, to the same end
    Distance.asked = 0
    with pytest.raises(UserError):
        search(model, tmp_path / "other")
    Distance.bad = ()
    search(model, tmp_path / "other", on_nonfinite="worst")
    assert text(tmp_path / "other") == text(tmp_path)


def test_progress_names_the_best_the_rate_and_what_is_left(model, tmp_path):
    lines = []
    search(model, tmp_path, say=lines.append)
    assert len(lines) == 7
    assert lines[0].startswith("update 1 of 7, 10 images: best never_called ")
    assert "evaluations/s, about " in lines[0]
    assert lines[-1].startswith("update 7 of 7, 50 images")


class TestStart:
    def start(self, model, **changes):
        return loop.starting_numbers(dataclasses.replace(CONFIG, **changes), sampler_of(model))

    def test_published_of_the_run_or_a_file(self, model, tmp_path):
        found = search(model, tmp_path)
        np.testing.assert_array_equal(self.start(model), PARAMETERS.published_start())
        np.testing.assert_allclose(self.start(model, start="run")[:2], [0.5**0.5, 16])
        np.testing.assert_allclose(
            self.start(model, start=str(found.path)), PARAMETERS.numbers(found.strategy)
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"start": "none.yaml"}, "start = 'none.yaml' must be 'published', 'run' or a file"),
            ({"steps": 65}, "steps = 65 must be between 1 and 64 tokens"),
        ],
    )
    def test_what_cannot_be_is_refused(self, model, changes, message):
        with pytest.raises(UserError, match=message):
            self.start(model, **changes)
