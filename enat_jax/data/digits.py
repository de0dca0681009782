"""Scikit-learn's 1,797 handwritten digits as token records."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from einops import rearrange


class Digits(tfds.core.GeneratorBasedBuilder):
    """8 x 8 pictures of handwritten digits in 17 greys, one token per pixel.

    The metadata say what the tokens were made with: tokenizer, codebook size, grid and number of
    classes. Write them with `file_format="array_record"`, which is readable without TensorFlow.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits from scikit-learn as grids of grey levels.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(shape=(64,), dtype=np.uint16),
                    "label": tfds.features.ClassLabel(names=list("0123456789")),
                }
            ),
            metadata=tfds.core.MetadataDict(
                tokenizer="pixels", codebook_size=17, grid=[8, 8], num_classes=10
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # the pictures come with scikit-learn
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits  # seconds to import, needed once per machine

        digits: Any = load_digits()
        # The pictures hold greys from 0 to 16, which are the token ids as they stand.
        tokens = rearrange(digits.images.astype(np.uint16), "b y x -> b (y x)")
        for index, (row, label) in enumerate(zip(tokens, digits.target, strict=True)):
            yield index, {"tokens": row, "label": int(label)}
