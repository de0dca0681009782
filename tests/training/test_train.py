import dataclasses
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from enat_jax.__main__ import main
from enat_jax.config import Config, TextConfig
from enat_jax.data.batches import record_info
from enat_jax.errors import UserError
from enat_jax.parallel.accelerators import Accelerator
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.training import programs as programs_module
from enat_jax.training.programs import TrainingPrograms
from enat_jax.training.train import _check_text, train
from tests.support.images import LetterEncoder, Letters
from tests.support.records import CAPTIONED, PLAN, TEXT, toys, written
from tests.support.runs import assert_same, entries, losses, saved


def programs_of(config):
    return TrainingPrograms(config, Placement.of(MeshConfig()))


def test_a_run_that_was_killed_ends_bit_for_bit_as_one_that_was_not(trained, tiny_config, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")  # as if killed before the last
    lines = []
    train(tiny_config("train.sample_every=0"), tmp_path / "run", log=lines.append)
    assert lines[0] == "resuming from step 2"
    assert_same(saved(tmp_path / "run"), saved(trained))  # sampling changes nothing
    assert losses(tmp_path / "run") == losses(trained)


def test_every_entry_of_the_metrics_is_complete(trained, tiny_config):
    for entry in entries(trained):
        assert set(entry) - {"checkpoint_write_seconds"} == {
            "step", "time", "loss", "grad_norm", "learning_rate", "images_per_second",
            "steps_per_second", "teraflops_per_second", "data_wait", "skipped",
            "compile_seconds", "checkpoint_seconds",
        }  # fmt: skip
        assert 1 < entry["loss"] < 4
        assert entry["grad_norm"] > 0
        assert entry["images_per_second"] == pytest.approx(8 * entry["steps_per_second"])
        assert 0 <= entry["data_wait"] <= 1
    schedule = programs_of(tiny_config()).schedule
    rates = [entry["learning_rate"] for entry in entries(trained)]
    assert rates == [float(schedule(1)), float(schedule(3))]


def test_weights_that_would_not_be_finite_are_not_taken(trained, tiny_overrides, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    flags = ["--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"]
    fields = [*tiny_overrides, "train.steps=9", "train.max_bad_steps=3", "optim.epsilon=0"]
    assert main(["train", *flags, *(f"--config.{field}" for field in fields)]) == 1
    assert "the last 3 steps were not finite" in capsys.readouterr().err
    assert_same(saved(tmp_path / "run"), saved(trained))


def test_there_is_a_sample_grid_of_every_class(trained):
    with Image.open(trained / "samples/step_0000004.png") as grid:
        assert grid.size == (10 * 68 + 4, 10 * (68 + 18))
    assert list((trained / "tensorboard").iterdir())


def test_the_loss_goes_down_and_records_without_tokenizer_need_no_grids(tiny_config, tmp_path):
    config = tiny_config(
        "train.steps=60", "train.log_every=10", "train.checkpoint_every=60", "tokenizer.name='none'"
    )
    train(config, tmp_path)
    assert losses(tmp_path)[10] > 2.2  # near log(17), which knows nothing
    assert losses(tmp_path)[60] < 0.85 * losses(tmp_path)[10]
    assert not (tmp_path / "samples").exists()


def test_flops_are_images_times_the_formula_and_mfu_their_share_of_all_devices(
    tiny_config, monkeypatch
):
    programs = programs_of(tiny_config())
    summary = programs.summary(4, images_per_second=1e12)
    flops = programs.flops
    assert summary["teraflops_per_second"] == pytest.approx(flops)
    assert "mfu" not in summary  # nobody specifies a CPU's peak
    card = Accelerator("card", ("cpu",), 8e12, 1)
    monkeypatch.setattr(programs_module, "accelerator_of", {"cpu": card}.get)
    assert programs.summary(4, images_per_second=1e12)["mfu"] == pytest.approx(flops / 8)


def test_how_a_model_computes_may_change_and_what_it_is_may_not(trained, tiny_config):
    lines = []
    train(tiny_config("model.remat='block'"), trained, log=lines.append)
    assert "trained already" in lines[-1]
    with pytest.raises(UserError) as caught:
        train(tiny_config("model.width=32", "model.decoder_depth=2", "train.steps=9"), trained)
    assert "the workdir holds another model: " in str(caught.value)
    assert "model.width = 32, there 16" in str(caught.value)
    assert "model.decoder_depth = 2, there 1" in str(caught.value)


def test_records_that_do_not_fit_are_refused_before_anything_is_written(tiny_config, tmp_path):
    config = tiny_config(
        "tokenizer.grid=(4, 16)", "model.codebook_size=18", "model.num_classes=11",
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        train(config, tmp_path / "run")
    assert str(caught.value).endswith(
        "tokenizer.grid = (4, 16), the records have (8, 8); model.codebook_size = 18, the records"
        " have 17; model.num_classes = 11, the records have 10"
    )
    with pytest.raises(UserError, match="the split is empty"):
        train(tiny_config("data.split=train[:0]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tensor", "devices", "problem"),
    [
        (1, 3, "batch_size = 8 must be a multiple of 6: 3 devices x 2 images each"),
        (4, 4, r"config: mesh\.tensor = 4 must divide model\.num_heads = 2"),
    ],
)
def test_what_the_devices_cannot_share_is_refused(tiny_config, tensor, devices, problem):
    placement = Placement.of(MeshConfig(tensor=tensor), jax.devices()[:1] * devices)
    with pytest.raises(UserError, match=problem):
        TrainingPrograms(tiny_config(), placement)


def test_every_program_runs_once_in_each_cycle_as_seed_and_step_say(tiny_config):
    programs, again, other = (
        programs_of(tiny_config("train.programs=4", f"train.seed={seed}")) for seed in (0, 0, 1)
    )
    assert len(programs.programs) == len(programs.rows) == 4
    drawn = np.array([programs.program(step) for step in range(400)])
    cycles = drawn.reshape(100, 4)
    np.testing.assert_array_equal(np.sort(cycles, axis=1), np.tile(np.arange(4), (100, 1)))
    assert len(np.unique(cycles, axis=0)) > 12  # in ever other orders
    steps = [397, 3, 12, 5, 0]  # as after a resumption, in any order
    assert [again.program(step) for step in steps] == drawn[steps].tolist()
    assert [other.program(step) for step in range(400)] != drawn.tolist()


def test_the_first_state_depends_on_the_seed_alone(tiny_config):
    first, again, other = (
        programs_of(tiny_config(f"train.seed={seed}")).initial_state() for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    jax.tree.map(np.testing.assert_array_equal, first.params, first.ema)
    pairs = zip(jax.tree.leaves(first.params), jax.tree.leaves(other.params), strict=True)
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs)


def check_text(data_dir, records, cfg, digests=None):
    """Records of classes, or with some fields of TEXT changed, beside a config and its CLIP."""
    plan = dataclasses.asdict(PLAN if records is None else CAPTIONED)
    written(data_dir, **plan | ({} if records is None else {"text": TEXT | records}))
    config = Config(text=TextConfig(**cfg), data=toys(data_dir))
    of, encoder = digests or (None, None)
    clip = (Letters(digest=of), LetterEncoder(encoder)) if digests else (None, None)
    _check_text(config, record_info(config.data), *clip)


WORDS, CLIP = {"name": "words"}, {"name": "clip", "digest": "56", "encoder_digest": "78"}


@pytest.mark.parametrize(
    ("records", "cfg", "digests"),
    [
        (None, {}, None),
        (WORDS, WORDS, None),
        (WORDS, {**WORDS, "length": 4}, None),
        (CLIP, {"name": "clip"}, ("56", "78")),
    ],
)
def test_records_fit_the_text_that_read_their_captions(tmp_path, records, cfg, digests):
    check_text(tmp_path, records, cfg, digests)


@pytest.mark.parametrize(
    ("records", "cfg", "digests", "message"),
    [
        (WORDS, {}, None, "text.name = none, the records have words$"),
        (None, WORDS, None, "text.name = words, the records have none$"),
        (WORDS, {**WORDS, "length": 5}, None, "text.length = 5, the records have 4$"),
        (CLIP, {"name": "clip"}, ("9" * 64, "78"),
         "digest of text.weights' tokenizer = 999999999999, the records have 56$"),
        (CLIP, {"name": "clip"}, ("56", "87"),
         "digest of text.weights' encoder = 87, the records have 78$"),
    ],
)  # fmt: skip
def test_records_of_another_text_are_refused(tmp_path, records, cfg, digests, message):
    with pytest.raises(UserError, match=f"config does not fit the records toys: {message}"):
        check_text(tmp_path, records, cfg, digests)
