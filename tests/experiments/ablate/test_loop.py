import csv
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import enat_jax
from enat_jax.checkpoints.store import Checkpoints
from enat_jax.config import override_config
from enat_jax.config_file import make_config
from enat_jax.errors import UserError
from enat_jax.experiments.ablate import loop, measure
from enat_jax.experiments.ablate.config import AblateConfig
from enat_jax.experiments.ablate.loop import ablate
from enat_jax.experiments.ablate.points import AblateError
from enat_jax.models.flops import generation_flops
from enat_jax.models.networks import abstract_params
from enat_jax.sampling import program as generation_program
from enat_jax.sampling.sampler import restore, sampler_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGES = 30  # three batches of 8 and one that is filled up
CLASSES = np.arange(IMAGES) % 10


def checksum(made, class_ids):
    """A score that tells token ids, their order and their classes apart."""
    assert made.shape == (IMAGES, 64)
    return float(np.sum(made * np.arange(made.size).reshape(made.shape) % 101) + class_ids[-1])


def brightness(made, class_ids):
    assert made.dtype == np.uint8
    return float(made.mean())


def nowhere(made, class_ids):
    return float("nan")


def config(*overrides, function="checksum", output="token_ids", **fields):
    return make_config(
        AblateConfig,
        {
            "grid": {
                "strategy": {"steps": (3, 2), "choice_temperature": (1.0, 8.0)},
                "sample": {"batch_size": 8},
            },
            "objective": {"name": f"{__name__}:{function}", "output": output},
            "num_images": IMAGES,
            "timed_batches": 2,
            "sheet": 10,  # of two batches
            **fields,
        },
        overrides,
    )


def run(cfg, out, workdir, say=lambda line: None):
    return ablate(cfg, out, workdir=str(workdir) if workdir else None, say=say)


def rows(folder, name="results.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def traced(monkeypatch):
    """How often generation was traced: once for every program that is compiled."""
    calls = []
    generate = generation_program.generate
    monkeypatch.setattr(
        generation_program, "generate", lambda *a, **k: (calls.append(1), generate(*a, **k))[1]
    )
    return calls


@pytest.fixture
def judged(monkeypatch):
    """(point, seed) of all rows that were measured."""
    calls = []
    judge = measure.Generators.judge

    def counted(self, point, objective, classes, *, seed, keep):
        calls.append((point.name, seed))
        return judge(self, point, objective, classes, seed=seed, keep=keep)

    monkeypatch.setattr(measure.Generators, "judge", counted)
    return calls


@pytest.fixture(scope="module")
def model(trained):
    return enat_jax.load(trained)


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory):
    """The folder of a finished ablation, and what it said."""
    out, said = tmp_path_factory.mktemp("ablation") / "out", []
    run(config(seeds=(5, 6)), out, trained, said.append)
    return out, said


def test_every_row_is_the_score_of_its_settings_and_seed(done, model):
    found = rows(done[0])
    assert len(found) == 8
    for row in found[:3]:
        made = np.concatenate(list(model.token_batches(
            CLASSES, seed=int(row["seed"]), steps=int(row["steps"]),
            choice_temperature=float(row["choice_temperature"]),
        )))  # fmt: skip
        assert float(row["checksum"]) == checksum(made, CLASSES)


def test_flops_are_the_formulas_in_both_units(done, model):
    for row in rows(done[0]):
        layout, _ = model.plan(steps=int(row["steps"]))
        flops = generation_flops(model.config.model, layout.buckets, padded=False)
        assert float(row["gigaflop_per_image"]) == flops / 1e9
        assert float(row["gigamac_per_image"]) == flops / 2e9


def test_seeds_share_their_points_speed_and_points_their_programs_compile_time(done):
    found = rows(done[0])
    speeds = {row["point"]: {r["images_per_second"] for r in found if r["point"] == row["point"]}
              for row in found}  # fmt: skip
    assert all(len(speed) == 1 for speed in speeds.values())
    for steps in ("2", "3"):
        assert len({row["compile_seconds"] for row in found if row["steps"] == steps}) == 1
    assert all(float(row["compile_seconds"]) > 0 for row in found)


def test_the_summary_and_the_plot_are_there(done):
    out, said = done
    assert [row["seeds"] for row in rows(out, "summary.csv")] == ["2"] * 4
    with Image.open(out / "pareto.png") as image:
        assert image.size[0] > 1000
    assert said[0] == "4 points, 2 programs, 8 of 8 rows to measure"
    assert "min left" in said[1]
    assert said[-1] == f"wrote results.csv, summary.csv, pareto.png, sheet.png to {out}"


def test_the_sheet_shows_the_same_noise_and_classes_in_every_row(done, model):
    with Image.open(done[0] / "sheet.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape[1] == 4 + 10 * (64 + 4)
    settings = [(3, 1.0), (3, 8.0), (2, 1.0), (2, 8.0)]
    for row, (steps, temperature) in enumerate(settings):
        images = model.sample(CLASSES[:10], seed=5, steps=steps, choice_temperature=temperature)
        for column, expected in enumerate(images):
            top, left = row * (64 + 4 + 18) + 18, 4 + column * (64 + 4)
            np.testing.assert_array_equal(sheet[top : top + 64 : 8, left : left + 64 : 8], expected)


def test_points_that_differ_in_numbers_alone_share_a_program(trained, tmp_path, traced):
    run(config(), tmp_path, trained)
    assert len(traced) == 2  # 2 and 3 steps; temperatures are traced


def test_runs_of_one_network_share_programs_and_keep_their_weights(trained, tmp_path, traced):
    other = shutil.copytree(trained, tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / "4")  # its newest is an earlier one
    cfg = config(grid={"workdir": (str(trained), str(other))}, seeds=(5,))
    table = run(cfg, tmp_path / "out", None)
    assert len(traced) == 1
    found = rows(tmp_path / "out")
    assert [row["checkpoint"] for row in found] == ["4", "2"]
    for row, path in zip(found, (trained, other), strict=True):
        made = np.concatenate(list(enat_jax.load(path).token_batches(CLASSES, seed=5)))
        assert float(row["checksum"]) == checksum(made, CLASSES)
    assert table.missing() == []


def test_fields_of_the_network_that_leave_its_weights_alone_are_compared(trained, tmp_path):
    there = Checkpoints(trained / "checkpoints", read_only=True)
    _, trees = there.restore({"ema": abstract_params(restore(trained).config.model)[1]})
    noisy = jax.tree.map(  # a tiny run's weights hardly read features
        lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), trees
    )
    copy = Checkpoints(tmp_path / "noisy" / "checkpoints")
    copy.save(4, noisy, metadata=there.metadata())
    copy.close()
    grid = {"model": {"reproject": (True, False)}, "strategy": {"steps": 4}}
    run(config(grid=grid), tmp_path, tmp_path / "noisy")
    found = {row["reproject"]: float(row["checksum"]) for row in rows(tmp_path)}
    for again in (True, False):
        once = [f"model.reproject={again}"]
        sampler = sampler_of(
            restore(tmp_path / "noisy", overrides=lambda f, o=once: override_config(f, o))
        )
        made = np.concatenate(list(sampler.token_batches(CLASSES, seed=0, steps=4)))
        assert found[str(again)] == checksum(made, CLASSES)
    assert found["True"] != found["False"]


def test_a_killed_ablation_does_only_what_is_missing(done, trained, tmp_path, judged):
    said = []

    def dies(line):
        said.append(line)
        if line.startswith("3 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config(seeds=(5, 6)), tmp_path, trained, dies)
    assert len(rows(tmp_path)) == 3
    assert not (tmp_path / "sheet.png").exists()
    first = list(judged)
    judged.clear()
    run(config(seeds=(5, 6)), tmp_path, trained)
    assert set(first).isdisjoint(judged)
    assert len(first) + len(judged) == 8
    times = ("images_per_second", "compile_seconds")
    ours, whole = ([{k: v for k, v in row.items() if k not in times} for row in rows(folder)]
                   for folder in (tmp_path, done[0]))  # fmt: skip
    assert ours == whole
    assert (tmp_path / "sheet.png").read_bytes() == (done[0] / "sheet.png").read_bytes()
    judged.clear()
    run(config(seeds=(5, 6)), tmp_path, trained)
    assert judged == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_images=29", "num_images = 29, there 30"),
        ("grid.strategy.steps=(3, 4)", r"grid\.strategy\.steps = \[3, 4\], there \[3, 2\]"),
        ("seeds=(5,)", r"seeds = \[5\], there \[5, 6\]"),
    ],
)
def test_a_changed_config_is_refused_with_its_field(done, trained, override, message):
    before = (done[0] / "results.csv").read_bytes()
    with pytest.raises(UserError, match=message):
        run(config(override, seeds=(5, 6)), done[0], trained)
    assert (done[0] / "results.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("field", "earlier", "message"),
    [
        ("checkpoint", 2, "checkpoint = 4, there 2"),
        ("digest", "f00d", r'digest = "[0-9a-f]{50}.*, there "f00d"'),
    ],
)
def test_a_run_that_has_other_weights_now_is_refused(
    done, trained, tmp_path, field, earlier, message
):
    about = json.loads((done[0] / "about.json").read_text())
    copy = shutil.copytree(done[0], tmp_path / "copy")
    for each in about["run"].values():
        each[field] = earlier
    (copy / "about.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"run\..*" + message):
        run(config(seeds=(5, 6)), copy, trained)


def test_an_objective_is_given_the_images_it_wants(trained, tmp_path, model):
    cfg = config(function="brightness", output="uint8", grid={"strategy": {"steps": (2,)}})
    run(cfg, tmp_path, trained)
    expected = brightness(model.sample(CLASSES, steps=2), CLASSES)
    assert float(rows(tmp_path)[0]["brightness"]) == expected


def test_a_score_that_is_no_number_is_said_and_left_out_of_the_plot(trained, tmp_path):
    said = []
    cfg = config(function="nowhere", grid={"strategy": {"steps": (2,)}}, sheet=0)
    run(cfg, tmp_path, trained, said.append)
    assert "nowhere nan, which is no score: it is left out of the plot" in said[1]
    assert not (tmp_path / "pareto.png").exists()
    assert said[-1] == f"wrote results.csv, summary.csv to {tmp_path}"


def test_what_cannot_be_is_said_before_anything_runs(trained, tmp_path, judged):
    out = tmp_path / "out"
    with pytest.raises(AblateError, match=r"steps = 0 must be between 1 and .* = 64$"):
        run(config("grid.strategy.steps=(2, 0)"), out, trained)
    with pytest.raises(AblateError, match="cannot be imported: AttributeError"):
        run(config(function="absent"), out, trained)
    assert judged == []
    assert not out.exists()


def test_several_hosts_are_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "several", lambda: True)
    with pytest.raises(AblateError, match="ablate runs on one host"):
        run(config(), tmp_path, trained)
