import csv
import json
import shutil
import statistics

import numpy as np
import pytest
from PIL import Image

import enat_jax
from enat_jax.config import config_from_dict
from enat_jax.config_file import make_config
from enat_jax.errors import UserError
from enat_jax.experiments.ablate import loop
from enat_jax.experiments.ablate.config import AblateConfig
from enat_jax.experiments.ablate.loop import ablate
from enat_jax.models.flops import generation_flops
from enat_jax.sampling import program
from tests.support.made_up import made_up, save

IMAGES = 30  # three batches of 8 and one that is filled up
CLASSES = np.arange(IMAGES) % 10
TWO_STEPS = {"strategy": {"steps": (2,)}}


def checksum(made, class_ids):
    """A score that tells token ids, their order and their classes apart."""
    assert made.shape == (IMAGES, 16)
    return float(np.sum(made * np.arange(made.size).reshape(made.shape) % 101) + class_ids[-1])


def brightness(made, class_ids):
    assert made.dtype == np.uint8
    return float(made.mean())


def nowhere(made, class_ids):
    return float("nan")


def run(out, workdir, log=lambda line: None, function="checksum", output="token_ids", **fields):
    grid = {"strategy": {"steps": (3, 2), "choice_temperature": (1.0, 8.0)}}
    objective = {"name": f"{__name__}:{function}", "output": output}
    fields = {"grid": grid, "objective": objective, "num_images": IMAGES, "timed_batches": 2,
              "sheet": 10, "seeds": (5, 6), **fields}  # fmt: skip
    cfg = make_config(AblateConfig, fields)
    return ablate(cfg, out, workdir=workdir and str(workdir), log=log)


def rows(folder, name="results.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def scored(sampler, seed, **strategy):
    return checksum(
        np.concatenate([*sampler.token_batches(CLASSES, seed=seed, **strategy)]), CLASSES
    )


@pytest.fixture
def traced(monkeypatch):
    """How often generation was traced: once for every program that is compiled."""
    calls, generate = [], program.generate
    monkeypatch.setattr(
        program, "generate", lambda *a, **k: (calls.append(1), generate(*a, **k))[1]
    )
    return calls


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save(made_up("digits"), tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def model(trained):
    return enat_jax.load(trained)


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory):
    """The folder of a finished ablation, and its log."""
    out, lines = tmp_path_factory.mktemp("ablation") / "out", []
    run(out, trained, lines.append)
    return out, lines


def test_every_row_is_the_score_and_the_cost_of_its_settings(done, model):
    made = rows(done[0])
    assert [row["seed"] for row in made] == ["5", "6"] * 4
    for row in made:
        strategy = {
            "steps": int(row["steps"]),
            "choice_temperature": float(row["choice_temperature"]),
        }
        assert float(row["checksum"]) == scored(model, int(row["seed"]), **strategy)
        flops = generation_flops(
            model.config.model, model.program.plan(**strategy)[0].buckets, padded=False
        )
        assert float(row["gigaflop_per_image"]) == flops / 1e9
        assert float(row["gigamac_per_image"]) == flops / 2e9
    for of_point in zip(made[::2], made[1::2], strict=True):  # seeds share what was timed
        assert len({row["images_per_second"] for row in of_point}) == 1
    for of_program in (made[:4], made[4:]):
        assert len({row["compile_seconds"] for row in of_program}) == 1
        assert float(of_program[0]["compile_seconds"]) > 0


def test_the_summary_has_means_and_deviations_over_seeds(done):
    out, lines = done
    made = rows(out)
    for row, pair in zip(
        rows(out, "summary.csv"), zip(made[::2], made[1::2], strict=True), strict=True
    ):
        values = [float(each["checksum"]) for each in pair]
        assert (row["point"], row["seeds"]) == (pair[0]["point"], "2")
        assert float(row["checksum"]) == statistics.fmean(values)
        assert float(row["checksum_deviation"]) == statistics.stdev(values)
        assert "seed" not in row
    assert lines[0] == "4 points, 2 programs, 8 of 8 rows to measure"
    assert "min left" in lines[1]
    assert lines[-1] == f"wrote results.csv, summary.csv, pareto.png, sheet.png to {out}"


def test_the_sheet_shows_the_same_noise_and_classes_in_every_row(done, model):
    with Image.open(done[0] / "sheet.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape[1] == 4 + 10 * (64 + 4)
    for row, (steps, temperature) in enumerate([(3, 1.0), (3, 8.0), (2, 1.0), (2, 8.0)]):
        images = model.sample(CLASSES[:10], seed=5, steps=steps, choice_temperature=temperature)
        for column, expected in enumerate(images):
            top, left = row * (64 + 4 + 18) + 18, 4 + column * (64 + 4)
            tile = sheet[top : top + 64 : 16, left : left + 64 : 16]
            np.testing.assert_array_equal(tile, expected)


def test_numbers_and_runs_of_one_network_share_a_program_and_keep_their_weights(
    trained, tmp_path, traced
):
    other = save(made_up("digits", seed=1), tmp_path / "other")
    workdirs = (str(trained), str(other))
    grid = {"workdir": workdirs, "strategy": {"steps": 2, "choice_temperature": (1.0, 8.0)}}
    table = run(tmp_path / "out", None, grid=grid, seeds=(5,))
    assert len(traced) == 1
    assert table.missing() == []
    for row in rows(tmp_path / "out")[::2]:
        sampler = enat_jax.load(row["workdir"])
        assert float(row["checksum"]) == scored(sampler, 5, steps=2, choice_temperature=1.0)
    assert [row["workdir"] for row in rows(tmp_path / "out")[::2]] == list(workdirs)


@pytest.mark.slow
def test_fields_of_the_network_that_leave_its_weights_alone_are_compared(trained, tmp_path):
    grid = {"model": {"reproject": (True, False)}, "strategy": {"steps": 4}}
    run(tmp_path, trained, grid=grid, seeds=(0,))
    made = {row["reproject"]: float(row["checksum"]) for row in rows(tmp_path)}
    once = enat_jax.load(
        trained, overrides=lambda fields: config_from_dict(fields, ["model.reproject=False"])
    )
    assert made["False"] == scored(once, 0, steps=4)
    assert made["True"] != made["False"]


def test_a_killed_ablation_does_only_what_is_missing(done, trained, tmp_path, monkeypatch):
    made, score = [], loop._scores
    monkeypatch.setattr(
        loop,
        "_scores",
        lambda s, p, c, seed: (made.append((p.name, seed)), score(s, p, c, seed))[1],
    )

    def dies(line):
        if line.startswith("3 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, trained, dies)
    assert len(rows(tmp_path)) == 3
    assert not (tmp_path / "sheet.png").exists()
    run(tmp_path, trained)
    assert len(made) == len(set(made)) == 8
    times = ("images_per_second", "compile_seconds")
    ours, theirs = ([{k: v for k, v in row.items() if k not in times} for row in rows(folder)]
                    for folder in (tmp_path, done[0]))  # fmt: skip
    assert ours == theirs
    assert (tmp_path / "sheet.png").read_bytes() == (done[0] / "sheet.png").read_bytes()
    run(tmp_path, trained)
    assert len(made) == 8


def test_another_ablation_or_other_weights_are_refused(done, trained, tmp_path):
    before = (done[0] / "results.csv").read_bytes()
    with pytest.raises(
        UserError, match=r"num_images = 29, there 30; seeds = \[5\], there \[5, 6\]"
    ):
        run(done[0], trained, num_images=29, seeds=(5,))
    assert (done[0] / "results.csv").read_bytes() == before
    about = json.loads((done[0] / "about.json").read_text())
    copy = shutil.copytree(done[0], tmp_path / "copy")
    for each in about["run"].values():
        each |= {"checkpoint": 2, "digest": "f00d"}
    (copy / "about.json").write_text(json.dumps(about))
    with pytest.raises(
        UserError, match=r"checkpoint = 4, there 2; run\..*digest = .*there \"f00d\""
    ):
        run(copy, trained)


def test_an_objective_is_given_the_images_it_wants(trained, tmp_path, model):
    run(tmp_path, trained, function="brightness", output="uint8", grid=TWO_STEPS, seeds=(0,))
    expected = brightness(model.sample(CLASSES, steps=2), CLASSES)
    assert float(rows(tmp_path)[0]["brightness"]) == expected


def test_a_score_that_is_no_number_is_named_and_left_out_of_the_plot(trained, tmp_path):
    lines = []
    run(tmp_path, trained, lines.append, function="nowhere", grid=TWO_STEPS, sheet=0)
    assert "nowhere nan, which is no score: it is left out of the plot" in lines[1]
    assert rows(tmp_path, "summary.csv")[0]["nowhere_deviation"] == "nan"
    assert not (tmp_path / "pareto.png").exists()
    assert lines[-1] == f"wrote results.csv, summary.csv to {tmp_path}"


def test_what_cannot_be_is_refused_before_anything_runs(trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"steps = 0 must be between 1 and .* = 16$"):
        run(out, trained, grid={"strategy": {"steps": (2, 0)}})
    with pytest.raises(UserError, match="cannot be imported: AttributeError"):
        run(out, trained, function="absent")
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="ablate runs on one host, not on 2"):
        run(out, trained)
    assert not out.exists()
