import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from PIL import Image

from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.checkpoints.tokenizer import load_vqgan
from enat_jax.data.image_source import ImageError
from enat_jax.errors import UserError
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.training.tokenizer_config import load_tokenizer_config
from enat_jax.training.train_tokenizer import TokenizerPrograms, train_tokenizer
from tests.support.on_hosts import on_devices
from tests.support.runs import Killed, assert_same, entries, saved, watch

pytestmark = pytest.mark.usefixtures("quick_compilation")

# configs/photos_tokenizer.py made as small as it can be; the codebook begins at step 1 and the
# discriminator at step 3, between two checkpoints
TINY = {
    "model.channels": 2, "model.channel_multipliers": (1, 2), "model.num_res_blocks": 1,
    "model.latent_channels": 4, "model.codebook_size": 8, "loss.codebook_start": 1,
    "loss.restart_after": 3, "loss.adversarial": 0.1, "loss.adversarial_start": 3,
    "discriminator.channels": 2, "discriminator.levels": 1, "optim.warmup_steps": 1,
    "optim.decay": "constant", "optim.learning_rate": 1e-2, "optim.ema_decay": 0.9,
    "train.steps": 4, "train.batch_size": 4, "train.image_size": 8, "train.random_crops": True,
    "train.log_every": 2, "train.sample_every": 4, "train.checkpoint_every": 2,
    "images.name": "", "held_out.split": "", "held_out.images": 5, "held_out.pictures": 3,
    "held_out.batch_size": 2,
}  # fmt: skip


def paint(folder, count):
    """Pictures of two classes: bright ramps of one colour each."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 10)[:, None, None]
    for number in range(count):
        for channel, name in enumerate(("red", "green")):
            (folder / name).mkdir(parents=True, exist_ok=True)
            colour = rng.uniform(0, 100) * np.eye(3)[channel]
            picture = 40 + 60 * ramp + colour + np.zeros((1, 9, 1))
            Image.fromarray(picture.astype(np.uint8)).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paint(folder / "train", 6)
    paint(folder / "held_out", 3)
    fields = {**TINY, "images.folder": folder / "train", "held_out.folder": folder / "held_out"}
    tiny = [f"{name}={value}" for name, value in fields.items()]
    return lambda *overrides: load_tokenizer_config(
        "configs/photos_tokenizer.py", [*tiny, *overrides]
    )


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """The workdir of a finished tiny run, and its lines; tests leave it as it is."""
    workdir, lines = tmp_path_factory.mktemp("trained"), []
    train_tokenizer(tiny_config(), workdir, log=lines.append)
    return workdir, lines


def test_a_run_that_was_killed_ends_bit_for_bit_as_one_that_was_not(
    trained, tiny_config, tmp_path, monkeypatch
):
    watch(monkeypatch, kill_after=3, programs=TokenizerPrograms)  # later than the checkpoint
    with pytest.raises(Killed):
        train_tokenizer(tiny_config(), tmp_path)
    monkeypatch.undo()
    train_tokenizer(tiny_config(), tmp_path)
    assert_same(saved(tmp_path), saved(trained[0]))


def test_the_discriminator_begins_at_its_step(trained):
    counts = [
        {int(array) for name, array in saved(trained[0], step)[0].items()
         if "discriminator_opt_state" in name and name.endswith("count']")}
        for step in (2, 4)
    ]  # fmt: skip
    assert counts == [{0}, {1}]


def test_the_metrics_are_losses_speed_and_what_became_of_held_out_images(trained):
    first, second, held_out = entries(trained[0])
    common = {"step", "time", "loss", "l1", "l2", "codebook", "commitment", "grad_norm",
              "perplexity", "restarted_codes", "learning_rate", "images_per_second",
              "steps_per_second", "data_wait", "skipped",
              "compile_seconds", "checkpoint_seconds"}  # fmt: skip
    may = {"checkpoint_write_seconds"}  # where a save has ended by then
    assert set(first) - may == common  # of two steps the first had no codebook yet
    assert set(second) - may == common | {"adversarial", "discriminator"}
    assert set(held_out) == {"step", "time"} | {
        f"held_out_{name}" for name in ("images", "psnr", "codes_used", "perplexity")
    }
    assert held_out["held_out_images"] == 5
    assert all(math.isfinite(value) for entry in entries(trained[0]) for value in entry.values())


def test_there_are_pictures_and_lines_for_the_user(trained):
    workdir, lines = trained
    with Image.open(workdir / "samples/step_0000004.png") as picture:
        assert picture.size == (3 * 68 + 4, 2 * (68 + 18))
    assert "12 images of 2 classes in folder train, steps 0 to 4, on " in lines[0]
    assert lines[3].startswith("step 4: held_out_images 5, held_out_psnr ")


def test_others_can_load_the_checkpoint(trained, tiny_config):
    metadata = Checkpoints(trained[0] / "checkpoints", read_only=True).metadata()
    model = tiny_config().model
    assert metadata["kind"] == "vqgan"
    assert metadata["config"]["train"]["steps"] == 4
    assert metadata["vqgan"] == json.loads(json.dumps(dataclasses.asdict(model)))
    cfg, params = load_vqgan(trained[0])
    assert cfg == model
    codebook = saved(trained[0])[0]["['ema']['codebook']['value']"]
    np.testing.assert_array_equal(params["codebook"][...], codebook)


def test_reconstructions_become_better(tiny_config, tmp_path):
    config = tiny_config("train.steps=80", "train.log_every=80", "train.sample_every=20",
                         "train.checkpoint_every=80")  # fmt: skip
    train_tokenizer(config, tmp_path)
    psnr = [entry["held_out_psnr"] for entry in entries(tmp_path) if "held_out_psnr" in entry]
    assert psnr[-1] > psnr[0] + 3
    assert psnr[-1] > 15


FOUR_DEVICES = """
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.training.tokenizer_config import load_tokenizer_config
from enat_jax.training.train_tokenizer import TokenizerPrograms
config = load_tokenizer_config("configs/photos_tokenizer.py", [
    "model.channels=2", "model.channel_multipliers=(1, 2)", "model.codebook_size=8",
    "train.batch_size=8", "train.image_size=8", "optim.warmup_steps=0", "loss.adversarial=0.1",
    "loss.codebook_start=1", "loss.restart_after=1", "discriminator.channels=2"])
batch = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
losses = []
one, four = Placement.of(MeshConfig(), jax.devices()[:1]), Placement.of(MeshConfig(data=2, fsdp=2))
for placement in (one, four):
    programs = TokenizerPrograms(config, placement)
    state = programs.initial_state()
    for step in range(4):
        state, metrics = programs.step(step, state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
assert len(state.params["codebook"][...].sharding.device_set) == 4
assert any("fsdp" in str(x.sharding.spec) for x in jax.tree.leaves(state.params))
assert losses[1] != losses[3]
np.testing.assert_allclose(losses[:4], losses[4:], rtol=1e-4)
"""


@pytest.mark.slow
def test_four_devices_take_the_same_steps_as_one():
    on_devices(FOUR_DEVICES, devices=4)


def test_a_workdir_of_another_model_is_refused(trained, tiny_config):
    with pytest.raises(CheckpointError, match=r"model.codebook_size = 16, there 8"):
        train_tokenizer(tiny_config("model.codebook_size=16", "train.steps=9"), trained[0])


def test_too_many_unreadable_images_stop_the_run(tiny_config, tmp_path):
    paint(tmp_path / "images", 2)
    (tmp_path / "images/red/0.png").write_bytes(b"no picture")
    config = tiny_config(f"images.folder={tmp_path / 'images'}", "images.max_unreadable=0.1")
    with pytest.raises(ImageError, match=r"red/0.png: .* 1 of 4 images are unreadable"):
        train_tokenizer(config, tmp_path / "run")


def test_a_batch_that_the_devices_cannot_share_is_refused(tiny_config):
    placement = Placement.of(MeshConfig(), jax.devices()[:1] * 3)
    with pytest.raises(UserError, match=r"train.batch_size = 4 must be a multiple of 3: 3 devices"):
        TokenizerPrograms(tiny_config(), placement)
