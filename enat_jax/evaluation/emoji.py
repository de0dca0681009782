"""Scores of generated emojis: whether role, gender and skin tone are what the caption asks for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from einops import rearrange
from jaxtyping import Bool, Int, UInt8

from enat_jax.data.emoji import SPLITS, Cell
from enat_jax.data.images import center_crop, decode_image
from enat_jax.data.prepared import open_prepared
from enat_jax.errors import UserError
from enat_jax.evaluation.metric import Metric, Objective
from enat_jax.tokenizers.protocol import Tokenizer, as_uint8

_ALL = ("train", *SPLITS, "left_out")
_SEED = 0  # of the prompts' order
_NAMES = ("error", "all", *Cell._fields)


class Cells:
    """The cells of one split as prompts, and the real pictures of all cells to read images by.

    An image shows the cell whose picture, on the background that was asked for, is nearest to it
    by the squared distance of pixels. Only roles whose three genders are drawn differently count.

    Attributes:
        prompts: one for each cell and background of the split, in an order that is random and
            always the same, so that the first of them are a fair sample.
    """

    def __init__(self, data_dir: str, split: str):
        """Reads the data set `emoji`, which is prepared first; errors as `open_prepared`'s.

        Raises:
            UserError: there is no such split, or the extra `emoji` is not installed.
        """
        if split not in _ALL:
            raise UserError(f"data set 'emoji': split {split!r} must be one of {', '.join(_ALL)}")
        raw, records = {"image": tfds.decode.SkipDecoding()}, []
        for name in _ALL:
            there = open_prepared("emoji", data_dir, name, missing="not prepared", decoders=raw)
            each = there.read(range(len(there.source)))
            records += [{**record, "split": name} for record in each if record["role"]]
        records.sort(key=lambda record: record["captions"][0])  # TFDS's order could change
        self._encoded = [record["image"] for record in records]
        self._cells = np.array([[record[name] for name in Cell._fields] for record in records])
        self._backgrounds = np.array([record["background"] for record in records])
        self._trained = np.array([record["split"] == "train" for record in records])
        own = [number for number, record in enumerate(records) if record["split"] == split]
        self._own = np.random.default_rng(_SEED).permutation(own)
        self.prompts = [records[number]["captions"][0].decode() for number in self._own]
        self._of_size = functools.cache(self._decoded)

    def pictures(self, size: int) -> UInt8[np.ndarray, "b size size 3"]:
        """The prompts' real pictures."""
        return self._of_size(size)[self._own]

    def right(
        self, images: UInt8[np.ndarray, "b y x 3"], indices: Int[np.ndarray, " b"]
    ) -> Bool[np.ndarray, "b 3"]:
        """Whether images show the role, the gender and the tone of the prompts at `indices`."""
        wanted = self._own[indices]
        return self._cells[self._nearest(images, wanted)] == self._cells[wanted]

    def score(
        self, images: UInt8[np.ndarray, "b y x 3"], indices: Int[np.ndarray, " b"]
    ) -> dict[str, float]:
        """Shares of images: with the right `role`, `gender`, `tone`, with `all`, with an `error`.

        The images are those of the prompts at `indices`, of 256 levels and any one size.
        """
        return _shares(_counts(self.right(images, indices)))

    def ceiling(self, tokenizer: Tokenizer, grid: tuple[int, int]) -> dict[str, float]:
        """The score of what a tokenizer makes of the prompts' real pictures."""

        @jax.jit
        def reconstruct(params, images):
            token_ids = tokenizer.encode(params, images / jnp.float32(255))
            return as_uint8(tokenizer.decode(params, token_ids, grid))

        made = reconstruct(tokenizer.params, self.pictures(grid[0] * tokenizer.patch))
        return self.score(np.asarray(made), np.arange(len(self.prompts)))

    def floors(self, size: int) -> dict[str, dict[str, float]]:
        """The scores of what composes nothing.

        `shuffled`: what other prompts of the split ask for, at random. `nearest`: of the training
        cells the one whose picture is nearest to the right one, which is wrong in one factor
        at least.
        """
        shuffled = np.random.default_rng(_SEED).permutation(self._own)
        nearest = self._nearest(self.pictures(size), self._own, self._trained)
        return {
            name: _shares(_counts(self._cells[shown] == self._cells[self._own]))
            for name, shown in (("shuffled", shuffled), ("nearest", nearest))
        }

    def _decoded(self, size: int) -> UInt8[np.ndarray, "m size size 3"]:
        return np.stack([center_crop(decode_image(each), size) for each in self._encoded])

    def _nearest(
        self,
        images: UInt8[np.ndarray, "b y x 3"],
        wanted: Int[np.ndarray, " b"],
        allowed: Bool[np.ndarray, " m"] | bool = True,
    ) -> Int[np.ndarray, " b"]:
        """Numbers of the nearest pictures, of the allowed ones on the backgrounds of the wanted."""
        flat = rearrange(images.astype(np.float32), "b y x c -> b (y x c)")
        nearest = np.zeros(len(images), np.int64)
        for background in np.unique(self._backgrounds[wanted]):
            rows = np.flatnonzero(self._backgrounds[wanted] == background)
            candidates = np.flatnonzero((self._backgrounds == background) & allowed)
            real = self._of_size(images.shape[1])[candidates].astype(np.float32)
            real = rearrange(real, "m y x c -> m (y x c)")
            distances = np.square(real).sum(axis=1) - 2 * flat[rows] @ real.T
            nearest[rows] = candidates[distances.argmin(axis=1)]
        return nearest


def emoji_objective(cells: Cells) -> Objective:
    """The score of images by the prompts' indices, which stand in place of class ids."""

    def add(sums: np.ndarray, seen: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return sums + _counts(cells.right(seen, indices))

    metric = Metric(_NAMES, lambda: np.zeros(len(_NAMES), np.int64), add, _shares)
    return Objective("uint8", (metric,), prompts=cells.prompts)


def _counts(right: Bool[np.ndarray, "b 3"]) -> Int[np.ndarray, " k"]:
    """How many images there are, how many are right in all, and how many in each."""
    return np.array([len(right), right.all(axis=1).sum(), *right.sum(axis=0)])


def _shares(counts: Int[np.ndarray, " k"]) -> dict[str, float]:
    if not counts[0]:
        raise UserError("the score of emojis needs at least 1 image")
    error, *others = (counts / counts[0]).tolist()
    return dict(zip(_NAMES, (error - others[0], *others), strict=True))
