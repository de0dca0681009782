import math
import shutil

import numpy as np
import pytest
from PIL import Image

from enat_jax.checkpoints.tokenizer import load_vqgan
from enat_jax.config import TokenizerRunConfig
from enat_jax.config_file import read_config
from enat_jax.errors import UserError
from enat_jax.training.train_tokenizer import train_tokenizer
from tests.support.on_hosts import on_devices
from tests.support.runs import assert_same, entries, saved

# configs/photos_tokenizer.py made as small as it can be; the discriminator begins between
# two checkpoints
TINY = {
    "model.channels": 2, "model.channel_multipliers": (1,), "model.num_res_blocks": 1,
    "model.latent_channels": 4, "model.codebook_size": 8, "loss.codebook_start": 1,
    "loss.restart_after": 3, "loss.adversarial": 0.1, "loss.adversarial_start": 50,
    "discriminator.channels": 2, "discriminator.levels": 1, "optim.warmup_steps": 1,
    "optim.decay": "constant", "optim.learning_rate": 1e-2, "optim.ema_decay": 0.9,
    "train.steps": 80, "train.batch_size": 4, "train.image_size": 8, "train.random_crops": True,
    "train.log_every": 40, "train.sample_every": 20, "train.checkpoint_every": 40,
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
    return lambda *overrides: read_config(
        TokenizerRunConfig, "configs/photos_tokenizer.py", [*tiny, *overrides]
    )


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """The workdir of a finished tiny run, and its lines; tests leave it as it is."""
    workdir, lines = tmp_path_factory.mktemp("trained"), []
    train_tokenizer(tiny_config(), workdir, log=lines.append)
    return workdir, lines


def test_a_run_that_was_killed_ends_bit_for_bit_as_one_that_was_not(trained, tiny_config, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/80")  # as if killed before the last
    train_tokenizer(tiny_config("train.sample_every=0"), tmp_path / "run")
    assert_same(saved(tmp_path / "run"), saved(trained[0]))


def test_the_metrics_are_losses_speed_and_what_became_of_held_out_images(trained):
    _, first, _, _, second, held_out = entries(trained[0])
    common = {"step", "time", "loss", "l1", "l2", "codebook", "commitment", "grad_norm",
              "perplexity", "restarted_codes", "learning_rate", "images_per_second",
              "steps_per_second", "data_wait", "skipped",
              "compile_seconds", "checkpoint_seconds"}  # fmt: skip
    may = {"checkpoint_write_seconds"}  # where a save has ended by then
    assert set(first) - may == common
    assert set(second) - may == common | {"adversarial", "discriminator"}
    assert set(held_out) == {"step", "time"} | {
        f"held_out_{name}" for name in ("images", "psnr", "codes_used", "perplexity")
    }
    assert held_out["held_out_images"] == 5
    assert held_out["held_out_psnr"] > max(
        15, entries(trained[0])[0]["held_out_psnr"] + 3
    )  # learnt
    assert all(math.isfinite(value) for entry in entries(trained[0]) for value in entry.values())


def test_there_are_pictures_and_lines_for_the_user(trained):
    workdir, lines = trained
    with Image.open(workdir / "samples/step_0000080.png") as picture:
        assert picture.size == (3 * 68 + 4, 2 * (68 + 18))
    assert "12 images of 2 classes in folder train, steps 0 to 80, on " in lines[0]
    assert lines[1].startswith("step 20: held_out_images 5, held_out_psnr ")


def test_others_can_load_the_checkpoint(trained, tiny_config):
    cfg, params = load_vqgan(trained[0])
    assert cfg == tiny_config().model
    codebook = saved(trained[0])[0]["['ema']['codebook']['value']"]
    np.testing.assert_array_equal(params["codebook"][...], codebook)


FOUR_DEVICES = """
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.config import TokenizerRunConfig
from enat_jax.config_file import read_config
from enat_jax.training.train_tokenizer import TokenizerPrograms
config = read_config(TokenizerRunConfig, "configs/photos_tokenizer.py", [
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


def test_too_many_unreadable_images_stop_the_run(tiny_config, tmp_path):
    paint(tmp_path / "images", 2)
    (tmp_path / "images/red/0.png").write_bytes(b"no picture")
    config = tiny_config(f"images.folder={tmp_path / 'images'}", "images.max_unreadable=0.1")
    with pytest.raises(UserError, match=r"red/0.png: .* 1 of 4 images are unreadable"):
        train_tokenizer(config, tmp_path / "run")
