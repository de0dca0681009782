"""From a folder of pictures to generated ones, by the verbs that a user types."""

import json

import numpy as np
import pytest
from PIL import Image

from enat_jax import load
from enat_jax.__main__ import main
from enat_jax.config import config_from_dict

VQGAN = [
    "model.channels=4", "model.channel_multipliers=(1,1,1)", "model.num_res_blocks=1",
    "model.latent_channels=4", "model.codebook_size=11", "model.dtype=float32", "train.steps=3",
    "train.batch_size=8", "train.image_size=16", "train.log_every=3", "train.sample_every=3",
    "train.checkpoint_every=3", "loss.codebook_start=1", "loss.adversarial=0.0",
    "optim.warmup_steps=1", "held_out.pictures=2", "held_out.batch_size=4",
]  # fmt: skip
ENAT = [
    "model.length=16", "model.width=16", "model.num_heads=2", "model.encoder_depth=1",
    "model.decoder_depth=1", "model.dtype=float32", "tokenizer.grid=(4,4)", "train.steps=2",
    "train.batch_size=8", "train.images_per_row=2", "train.programs=1", "train.log_every=2",
    "train.sample_every=2", "train.checkpoint_every=2", "optim.warmup_steps=1",
    "strategy.steps=2", "sample.batch_size=6",
]  # fmt: skip


def run(verb, *flags, overrides=()):
    return main([verb, *map(str, flags), *(f"--config.{text}" for text in overrides)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of three classes of pictures, and all that the verbs made of it."""
    home = tmp_path_factory.mktemp("pipeline")
    rng = np.random.default_rng(0)
    for number in range(24):
        file = home / "pictures" / ("bird", "cat", "dog")[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)
    folder = f"images.folder={home / 'pictures'}"
    mine = [*ENAT, folder, f"tokenizer.weights={home / 'vqgan'}", f"data.data_dir={home / 'data'}"]
    config = "--config=configs/my_images.py"
    assert run("train_tokenizer", "--config=configs/my_images_tokenizer.py",
               f"--workdir={home / 'vqgan'}", overrides=[*VQGAN, folder]) == 0  # fmt: skip
    assert run("tokenize", config, f"--check={home / 'check.png'}", "--batch_size=4",
               overrides=mine) == 0  # fmt: skip
    assert run("train", config, f"--workdir={home / 'run'}", overrides=mine) == 0
    return home, mine


def test_classes_and_codes_are_read_from_the_records(made):
    model = load(made[0] / "run")
    assert model.config.model.num_classes == 3
    assert model.config.model.codebook_size == 11
    assert model.class_names == ["bird", "cat", "dog"]


def test_images_are_decoded_by_the_vqgan_at_its_resolution(made):
    model = load(made[0] / "run")
    images = model.sample([0, 1, 2, 3])
    assert images.shape == (4, 16, 16, 3)
    assert images.dtype == np.uint8
    assert np.any(images[..., 0] != images[..., 1])  # in colour


def test_pixels_do_not_depend_on_the_batch(made):
    def sample(size):
        sized = [f"sample.batch_size={size}", "sample.decode_batch_size=2"]
        model = load(made[0] / "run", overrides=lambda fields: config_from_dict(fields, sized))
        return model.sample([0, 1, 2, 0, 1])

    np.testing.assert_array_equal(sample(4), sample(3))


def test_records_are_shown_as_a_picture(made):
    with Image.open(made[0] / "check.png") as picture:
        assert picture.size[0] > 64


def test_a_grid_is_drawn_while_training(made):
    assert [path.name for path in (made[0] / "run/samples").iterdir()] == ["step_0000002.png"]


def test_a_sample_is_written_as_the_adm_suite_reads_it(made):
    out = made[0] / "images.npz"
    assert run("sample", f"--workdir={made[0] / 'run'}", f"--out={out}", "--format=npz",
               "--per_class=3") == 0  # fmt: skip
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (9, 16, 16, 3)
        np.testing.assert_array_equal(arrays["arr_1"], np.repeat([0, 1, 2], 3))
        np.testing.assert_array_equal(
            arrays["arr_0"], load(made[0] / "run").sample(np.repeat([0, 1, 2], 3))
        )


class TestRefusals:
    @pytest.fixture
    def other(self, made, tmp_path):
        """A VQGAN of the same sizes and other weights."""
        flags = ("--config=configs/my_images_tokenizer.py", f"--workdir={tmp_path / 'other'}")
        folder = f"images.folder={made[0] / 'pictures'}"
        overrides = [*VQGAN, folder, "train.seed=1", "train.sample_every=0"]
        assert run("train_tokenizer", *flags, overrides=overrides) == 0
        return f"tokenizer.weights={tmp_path / 'other'}"

    def test_another_tokenizer_than_the_records_is_refused_by_all(
        self, made, other, tmp_path, capsys
    ):
        home, mine = made
        config = "--config=configs/my_images.py"
        assert run("train", config, f"--workdir={tmp_path / 'r'}", overrides=[*mine, other]) == 1
        assert not (tmp_path / "r").exists()
        assert run("tokenize", config, "--batch_size=4", overrides=[*mine, other]) == 1
        flags = (f"--workdir={home / 'run'}", f"--out={tmp_path / 'x.png'}")
        assert run("sample", *flags, overrides=[other]) == 1
        assert not (tmp_path / "x.png").exists()
        trained, tokenized, sampled = capsys.readouterr().err.splitlines()[-3:]
        assert "has digest" in trained
        assert "the records my_tokens were made with" in trained
        assert "tokenizer_digest = " in tokenized
        assert "the model was trained on tokens of" in sampled

    @pytest.mark.parametrize(
        ("override", "part"),
        [
            ("model.num_classes=5", "model.num_classes = 5, the records have 3"),
            ("model.codebook_size=12", "model.codebook_size = 12, the records have 11"),
            ("tokenizer.weights=nowhere", "tokenizer.weights = 'nowhere' is no workdir of a VQGAN"),
            ("tokenizer.weights=", "must name the workdir of a VQGAN"),
            ("data.name=none", "no prepared records"),
        ],
    )
    def test_a_config_that_does_not_fit_is_one_line(self, made, tmp_path, capsys, override, part):
        flags = ("--config=configs/my_images.py", f"--workdir={tmp_path / 'r'}")
        assert run("train", *flags, overrides=[*made[1], override]) == 1
        err = capsys.readouterr().err
        assert part in err
        assert err.count("\n") == 1
        assert not (tmp_path / "r").exists()

    def test_a_vqgan_is_no_generator(self, made, tmp_path, capsys):
        flags = (f"--workdir={made[0] / 'vqgan'}", f"--out={tmp_path / 'x.png'}")
        assert run("sample", *flags) == 1
        assert "holds no checkpoint of an image generator" in capsys.readouterr().err

    def test_an_evaluation_without_files_names_them(self, made, tmp_path, capsys):
        out = tmp_path / "fid.json"
        assert run("evaluate", f"--workdir={made[0] / 'run'}", f"--out={out}") == 1
        assert "evaluate.inception and evaluate.reference must name" in capsys.readouterr().err
        assert not out.exists()


def test_the_log_of_a_vqgan_has_its_psnr(made):
    log = (made[0] / "vqgan/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert any("psnr" in name for line in lines for name in line)
