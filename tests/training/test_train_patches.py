import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from enat_jax.__main__ import main
from enat_jax.checkpoints.digests import weights_digest
from enat_jax.checkpoints.store import CheckpointError
from enat_jax.checkpoints.tokenizer import load_tokenizer, load_vqgan
from enat_jax.config import PatchesRunConfig, TokenizerConfig
from enat_jax.config_file import make_config
from enat_jax.errors import UserError
from enat_jax.sampling.sampler import restore
from enat_jax.tokenizers.config import PatchesConfig
from enat_jax.training.train_patches import learn_patches, train_patches

COLOURS = np.uint8(200) * np.indices((2, 2, 2), np.uint8).reshape(3, 8).T


def chequered(numbers):
    """Images of 2 x 2 plain squares of 3 pixels in the colours of some numbers `[b 2 2]`."""
    return COLOURS[numbers].repeat(3, axis=1).repeat(3, axis=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "chequered"
    folder.mkdir()
    numbers = np.random.default_rng(1).permutation(np.arange(48) % 8).reshape(12, 2, 2)
    for number, image in enumerate(chequered(numbers)):  # in four brightnesses
        Image.fromarray(image + np.uint8(number % 4)).save(folder / f"{number}.png")
    return folder.parent


def config(folder, *overrides):
    fields = {"model": {"codebook_size": 8}, "images": {"folder": str(folder)},
              "train": {"image_size": 6}}  # fmt: skip
    return make_config(PatchesRunConfig, fields, overrides)


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("patches")
    train_patches(config(folder), workdir, log=str)
    return workdir


def tokenizer_config(workdir):
    return TokenizerConfig(name="patches", grid=(2, 2), weights=str(workdir))


def test_a_code_is_found_for_each_kind_of_patch(workdir):
    tokenizer = load_tokenizer(tokenizer_config(workdir), 8)
    assert tokenizer.digest == weights_digest(tokenizer.params)
    images = jnp.asarray(chequered(np.arange(8).reshape(2, 2, 2))) / jnp.float32(255)
    token_ids = tokenizer.encode(tokenizer.params, images)
    assert sorted(token_ids.ravel().tolist()) == list(range(8))
    decoded = tokenizer.decode(tokenizer.params, token_ids, (2, 2))
    np.testing.assert_allclose(decoded, images, atol=4 / 255)


def test_the_same_seed_gives_the_same_patches_and_another_others():
    images = np.random.default_rng(2).integers(0, 256, (20, 12, 12, 3), np.uint8)
    cfg = PatchesConfig(codebook_size=9)
    first, again, other = (learn_patches(images, cfg, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first.min() >= 0, first.max() <= 1, first.shape) == (True, True, (9, 27))


def test_what_most_patches_are_is_a_code_exactly():
    noise = np.random.default_rng(3).integers(0, 256, (30, 12, 12, 3), np.uint8)
    noise[:, :6] = 250  # half of all patches are plain
    noise[::3, :3, :3] = 245  # and others nearly
    assert (
        (learn_patches(noise, PatchesConfig(codebook_size=4), 0) == np.float32(250 / 255))
        .any(axis=0)
        .all()
    )


def test_a_finished_workdir_is_left_alone_and_other_patches_are_refused(folder, workdir):
    lines = []
    train_patches(config(folder), workdir, log=lines.append)
    assert lines == [f"{workdir}/checkpoints holds these patches already"]
    with pytest.raises(UserError, match=r"holds another model: .*seed"):
        train_patches(config(folder, "train.seed=1"), workdir)


def test_too_few_different_patches_are_refused_and_nothing_is_written(folder, tmp_path):
    with pytest.raises(UserError, match=r"codebook_size = 99: the images have only \d+ different"):
        train_patches(config(folder, "model.codebook_size=99"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_its_weights_are_taken_for_nothing_else(workdir):
    with pytest.raises(UserError, match=r"codebook_size = 9, the patches in .* has 8"):
        load_tokenizer(tokenizer_config(workdir), 9)
    with pytest.raises(CheckpointError, match="holds another model than a VQGAN"):
        load_vqgan(workdir)
    with pytest.raises(CheckpointError, match="holds no checkpoint of an image generator"):
        restore(workdir)


def test_the_verb_learns_patches_where_the_config_names_them(folder, workdir, tmp_path, capsys):
    code = main(["train_tokenizer", "--config=configs/emoji_tokenizer.py",
                 f"--workdir={tmp_path}", "--config.images.name=",
                 f"--config.images.folder={folder}", "--config.model.codebook_size=8",
                 "--config.train.image_size=6"])  # fmt: skip
    assert (code, "8 patches of 12 of 12 images" in capsys.readouterr().out) == (0, True)
    here, there = (load_tokenizer(tokenizer_config(each), 0) for each in (tmp_path, workdir))
    assert here.digest == there.digest
