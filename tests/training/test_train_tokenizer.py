import dataclasses
import json
import math
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.checkpoints.tokenizer import load_vqgan
from enat_jax.config import load_tokenizer_config
from enat_jax.config_file import ConfigError
from enat_jax.data.image_source import ImageError
from enat_jax.training.loop import TrainError
from enat_jax.training.train_tokenizer import TokenizerRun, train_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

# configs/photos_tokenizer.py made as small as it can be; the codebook begins at step 1 and the
# discriminator at step 3, between two checkpoints
TINY = {
    "model.channels": 2, "model.channel_multipliers": (1, 2), "model.latent_channels": 4,
    "model.codebook_size": 8, "loss.codebook_start": 1, "loss.restart_after": 3,
    "loss.adversarial": 0.1, "loss.adversarial_start": 3, "discriminator.channels": 2,
    "discriminator.levels": 1, "optim.warmup_steps": 1, "optim.decay": "constant",
    "optim.learning_rate": 1e-2, "optim.ema_decay": 0.9,
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
    """The workdir of a finished tiny run, and what it said; tests leave it as it is."""
    workdir, said = tmp_path_factory.mktemp("trained"), []
    train_tokenizer(tiny_config(), workdir, say=said.append)
    return workdir, said


def saved(workdir, step):
    """All arrays of a checkpoint by name, and where it is in the data."""
    folder = workdir / "checkpoints" / str(step)
    names = ("params", "ema", "opt_state", "codes", "discriminator", "discriminator_opt_state")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax guesses where arrays lie when it is not told
        trees = {name: ocp.load(folder, checkpointable_name=name) for name in names}
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    return arrays, checkpoints.metadata(step)["position"]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


class TestRun:
    def test_a_run_that_was_killed_ends_bit_for_bit_as_one_that_was_not(
        self, trained, tiny_config, tmp_path, monkeypatch
    ):
        step = TokenizerRun.step

        def killed(self, index, state, batch, key):
            if index == 3:  # a step later than the checkpoint
                raise Killed
            return step(self, index, state, batch, key)

        monkeypatch.setattr(TokenizerRun, "step", killed)
        with pytest.raises(Killed):
            train_tokenizer(tiny_config(), tmp_path, say=lambda line: None)
        monkeypatch.undo()
        said = []
        train_tokenizer(tiny_config(), tmp_path, say=said.append)
        assert said[0] == "resuming from step 2"
        (arrays, position), (expected, expected_position) = saved(tmp_path, 4), saved(trained[0], 4)
        assert position == expected_position
        assert arrays.keys() == expected.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)

    def test_the_discriminator_begins_at_its_step(self, trained):
        early, late = (saved(trained[0], step)[0] for step in (2, 4))
        counts = [{name: int(array) for name, array in arrays.items()
                   if "discriminator_opt_state" in name and name.endswith("count']")}
                  for arrays in (early, late)]  # fmt: skip
        assert set(counts[0].values()) == {0}
        assert set(counts[1].values()) == {1}

    def test_the_log_tells_losses_speed_and_what_became_of_held_out_images(self, trained):
        first, second, held_out = lines(trained[0])
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
        assert all(math.isfinite(value) for line in (first, second, held_out)
                   for value in line.values())  # fmt: skip

    def test_there_are_pictures_and_lines_for_the_user(self, trained):
        workdir, said = trained
        with Image.open(workdir / "samples/step_0000004.png") as picture:
            assert picture.size == (3 * 68 + 4, 2 * (68 + 18))
        assert list((workdir / "tensorboard").iterdir())
        assert said[0].startswith("training a VQGAN of 0.002439M parameters on ")
        assert "12 images of 2 classes in folder train, steps 0 to 4, on " in said[0]
        assert said[1].startswith("step 2/4 loss ")
        assert said[3].startswith("step 4: PSNR ")
        assert said[3].endswith(" dB on 5 held-out images")
        assert said[4] == f"trained 4 steps; the checkpoint is in {workdir / 'checkpoints'}"

    def test_others_can_load_the_checkpoint(self, trained, tiny_config):
        metadata = Checkpoints(trained[0] / "checkpoints", read_only=True).metadata()
        model = tiny_config().model
        assert metadata["kind"] == "vqgan"
        assert metadata["config"]["train"]["steps"] == 4
        cfg, params = load_vqgan(trained[0])
        assert cfg == model
        codebook = saved(trained[0], 4)[0]["['ema']['codebook']['value']"]
        np.testing.assert_array_equal(params["codebook"][...], codebook)
        assert metadata["vqgan"] == json.loads(json.dumps(dataclasses.asdict(model)))

    def test_a_finished_run_says_so(self, trained, tiny_config):
        said = []
        train_tokenizer(tiny_config(), trained[0], say=said.append)
        assert said == ["resuming from step 4", f"{trained[0]} is trained already: 4 of 4 steps"]

    def test_reconstructions_become_better(self, tiny_config, tmp_path):
        config = tiny_config("train.steps=80", "train.log_every=80", "train.sample_every=20",
                             "train.checkpoint_every=80")  # fmt: skip
        train_tokenizer(config, tmp_path, say=lambda line: None)
        found = [line["held_out_psnr"] for line in lines(tmp_path) if "held_out_psnr" in line]
        assert found[-1] > found[0] + 3
        assert found[-1] > 15


FOUR_DEVICES = """
import jax, numpy as np
from enat_jax.config import load_tokenizer_config
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.training.train_tokenizer import TokenizerRun
assert jax.device_count() == 4
config = load_tokenizer_config("configs/photos_tokenizer.py", [
    "model.channels=2", "model.channel_multipliers=(1, 2)", "model.codebook_size=8",
    "train.batch_size=8", "train.image_size=8", "optim.warmup_steps=0", "loss.adversarial=0.1",
    "loss.codebook_start=1", "loss.restart_after=1", "discriminator.channels=2"])
batch = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
losses = []
one, four = Placement.of(MeshConfig(), jax.devices()[:1]), Placement.of(MeshConfig(data=2, fsdp=2))
for placement in (one, four):
    run = TokenizerRun(config, placement)
    state = run.initial_state()
    for step in range(4):
        state, metrics = run.step(step, state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
assert len(state.params["codebook"][...].sharding.device_set) == 4
assert any("fsdp" in str(x.sharding.spec) for x in jax.tree.leaves(state.params))
one, four = losses[:4], losses[4:]
assert one[1] != one[3]
np.testing.assert_allclose(one, four, rtol=1e-4)
"""


@pytest.mark.slow
def test_four_devices_take_the_same_steps_as_one():
    env = {"PYTHONPATH": ".", "PATH": "", "JAX_PLATFORMS": "cpu",
           "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_DEFAULT_MATMUL_PRECISION": "highest",
           "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", FOUR_DEVICES], capture_output=True, text=True,
                          env=env, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


class TestRefusals:
    def test_a_loss_that_is_not_finite_stops_the_run(self, tiny_config, tmp_path, monkeypatch):
        def poisoned(self, index, state, batch, key):
            metrics = {"loss": jnp.nan, "grad_norm": 1.0, "skipped": 1.0}
            return state, {name: jnp.float32(value) for name, value in metrics.items()}

        monkeypatch.setattr(TokenizerRun, "step", poisoned)
        with pytest.raises(TrainError, match=r"^step 2: loss nan.*the last 2 steps"):
            train_tokenizer(tiny_config("train.max_bad_steps=2"), tmp_path, say=lambda line: None)

    def test_a_workdir_of_another_model_is_refused(self, trained, tiny_config):
        with pytest.raises(CheckpointError, match=r"model.codebook_size = 16, there 8"):
            train_tokenizer(tiny_config("model.codebook_size=16", "train.steps=9"), trained[0])

    def test_too_many_unreadable_images_stop_the_run(self, tiny_config, tmp_path):
        paint(tmp_path / "images", 2)
        (tmp_path / "images/red/0.png").write_bytes(b"no picture")
        config = tiny_config(f"images.folder={tmp_path / 'images'}", "images.max_unreadable=0.1")
        with pytest.raises(ImageError, match=r"red/0.png: .* 1 of 4 images are unreadable"):
            train_tokenizer(config, tmp_path / "run", say=lambda line: None)

    def test_a_batch_that_devices_cannot_share_is_refused(self, tiny_config, monkeypatch):
        monkeypatch.setattr("enat_jax.training.train_tokenizer.batch_shards", lambda mesh: 3)
        with pytest.raises(ConfigError, match=r"train.batch_size = 4 must be a multiple of the 3"):
            train_tokenizer(tiny_config(), "nowhere")
