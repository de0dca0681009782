import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat
from PIL import Image

from enat_jax.data.pictures import image_grid
from enat_jax.data.preview import preview
from enat_jax.errors import UserError
from tests.support.records import CAPTIONED, toys, written

CLASSES = ("cat", "dog")


@dataclass(frozen=True)
class Greys:
    """Tokens are greys, of which 100 is black: there are others beyond black and white."""

    name: str = "patches"
    digest: str = "abcd"
    codebook_size: int = 1000
    patch: int = 8
    params: tuple = ()

    def encode(self, params, images):
        raise NotImplementedError

    def decode(self, params, token_ids, grid):
        greys = (token_ids.astype(jnp.float32) - 100) / 255
        return repeat(greys, "b (y x) -> b (y u) (x v) 3", y=grid[0], x=grid[1], u=8, v=8)


@pytest.mark.parametrize(
    ("plan", "split", "count", "images", "flipped"),
    [
        ({"num_images": 160}, "train", 8, [0, 40, 80, 120], [0, 1]),
        ({"num_images": 160, "flips": False}, "train", 4, [0, 1, 80, 81], [0]),
        ({"num_images": 160}, "train[300:304]", 16, [150, 151], [0, 1]),
    ],
    ids=["mirror images beside their originals", "none are there", "fewer are there"],
)
def test_records_from_all_over_the_data_set_are_decoded(
    tmp_path, plan, split, count, images, flipped
):
    written(tmp_path, **plan)
    preview(toys(tmp_path, split=split), Greys(), tmp_path / "look.png", count=count)
    tokens = np.array([image + 500 * flip for image in images for flip in flipped])
    greys = np.clip(tokens - 100, 0, 255).astype(np.uint8)
    pictures = repeat(greys, "b -> b y x 3", y=16, x=24)
    labels = ["flipped" if flip else CLASSES[image % 2] for image in images for flip in flipped]
    expected = image_grid(pictures, labels, columns=2)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "look.png")), expected)


def test_captions_stand_above_their_pictures(tmp_path):
    written(tmp_path, **dataclasses.asdict(CAPTIONED))
    preview(toys(tmp_path, split="train[4:6]"), Greys(), tmp_path / "look.png", count=2)
    greys = np.clip(np.array([2, 502]) - 100, 0, 255).astype(np.uint8)
    pictures = repeat(greys, "b -> b y x 3", y=16, x=24)
    labels = ["2.0 | 2.1 | 2.2", "flipped"]
    expected = image_grid(pictures, labels, columns=2, wrap=True)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "look.png")), expected)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Greys(digest="ffff"), "tokenizer_digest = ffff, the records have abcd"),
        (Greys(name="colours", codebook_size=7), "tokenizer = colours.*; codebook_size = 7"),
    ],
)
def test_another_tokenizer_is_refused(tokenizer, message, tmp_path):
    written(tmp_path)
    with pytest.raises(UserError, match=f"records 'toys' are of another.*{message}"):
        preview(toys(tmp_path), tokenizer, tmp_path / "look.png")
    assert not (tmp_path / "look.png").exists()
