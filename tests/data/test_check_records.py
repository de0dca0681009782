from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat
from PIL import Image

from enat_jax.data.batches import DataConfig, DataError
from enat_jax.data.check_records import OtherTokenizerError, check_records
from enat_jax.data.pictures import image_grid
from enat_jax.data.record_plan import RecordPlan
from enat_jax.data.records import RecordFolder
from enat_jax.errors import UserError

NAMES = ("cat", "dog", "owl", "yak")


@dataclass(frozen=True)
class Greys:
    """Tokens are greys, beyond black and white too."""

    name: str = "greys"
    digest: str = "abcd"
    codebook_size: int = 500
    patch: int = 8
    params: tuple = ()

    def encode(self, params, images):
        raise NotImplementedError

    def decode(self, params, token_ids, grid):
        greys = (token_ids.astype(jnp.float32) - 100) / 255
        return repeat(greys, "b (y x) -> b (y u) (x v) 3", y=grid[0], x=grid[1], u=8, v=8)


@pytest.fixture
def records(tmp_path):
    """Twelve images of each class; token 0 is the image, token 1 whether it is mirrored."""

    def write(flips=True):
        plan = RecordPlan(
            "toys", "greys", "abcd", 500, (2, 2), 16, flips, "", "", 48, NAMES, shard_size=48
        )
        folder = RecordFolder(plan, tmp_path)
        images = np.repeat(np.arange(48), 1 + flips)
        flipped = np.arange(len(images)) % 2 == 1 if flips else np.zeros(len(images), bool)
        tokens = np.stack([images, 200 * flipped, 0 * images, 0 * images + 499], axis=1)
        folder.write(0, tokens.astype(np.uint16), (images // 12).astype(np.int32), flipped, {})
        folder.finish()
        return DataConfig(name="toys", data_dir=str(tmp_path))

    return write


def decoded(images, flipped):
    values = [[image, 200 * flip, 0, 499] for image, flip in zip(images, flipped, strict=True)]
    greys = np.clip(np.array(values) - 100, 0, 255).astype(np.uint8)
    return repeat(greys, "b (y x) -> b (y u) (x v) 3", y=2, x=2, u=8, v=8)


def test_originals_and_their_mirror_images_of_all_classes_stand_side_by_side(records, tmp_path):
    check_records(records(), Greys(), tmp_path / "look.png", count=8)
    images = np.repeat([0, 12, 24, 36], 2)
    labels = [label for name in NAMES for label in (name, "flipped")]
    expected = image_grid(decoded(images, [0, 1] * 4), labels, columns=2)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "look.png")), expected)


def test_records_without_mirror_images_are_shown_too(records, tmp_path):
    check_records(records(flips=False), Greys(), tmp_path / "look.png", count=4)
    labels = [NAMES[0], NAMES[0], NAMES[2], NAMES[2]]
    expected = image_grid(decoded([0, 1, 24, 25], [0] * 4), labels, columns=2)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "look.png")), expected)


def test_where_fewer_are_there_each_is_shown_once(records, tmp_path):
    cfg = replace(records(), split="train[:4]")
    check_records(cfg, Greys(), tmp_path / "look.png", count=16)
    labels = ["cat", "flipped"] * 2
    expected = image_grid(decoded([0, 0, 1, 1], [0, 1] * 2), labels, columns=2)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "look.png")), expected)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Greys(digest="ffff"), "tokenizer_digest = ffff, the records have abcd"),
        (Greys(name="colours", codebook_size=7), "tokenizer = colours.*; codebook_size = 7"),
    ],
)
def test_another_tokenizer_is_refused(records, tokenizer, message, tmp_path):
    with pytest.raises(OtherTokenizerError, match=f"records 'toys' are of another.*{message}"):
        check_records(records(), tokenizer, tmp_path / "look.png")
    assert not (tmp_path / "look.png").exists()


def test_a_damaged_file_is_refused(records, tmp_path):
    cfg = records()
    (file,) = (tmp_path / "toys/1.0.0").glob("*array_record*")
    file.write_bytes(file.read_bytes()[:40000])
    with pytest.raises(DataError, match="a file is missing or damaged"):
        check_records(cfg, Greys(), tmp_path / "look.png")


def test_fewer_than_a_pair_are_refused(records, tmp_path):
    with pytest.raises(UserError, match="count = 1, must be at least 2"):
        check_records(records(), Greys(), tmp_path / "look.png", count=1)
