"""Random crops of scikit-learn's two photographs, a temple and a flower."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SIZE = 64  # pixels along a crop's side
HELD_OUT_ROW = 275  # of the photographs: test crops lie below, train crops above


# class: the photograph's file in scikit-learn, of 640 x 427 pixels; its columns around the subject
PHOTOGRAPHS = {"temple": ("china.jpg", 0, 520), "flower": ("flower.jpg", 40, 600)}
# split: how many crops of each photograph, and how much the photograph is reduced for them in turn
SPLITS = {"train": (3000, (2, 3)), "test": (200, (2,))}


class Photos(tfds.core.GeneratorBasedBuilder):
    """64 x 64 crops of two photographs, reduced two- or threefold so that a crop shows its subject.

    Test crops come from below row 275 of the photographs, train crops from above it. The two parts
    are cut apart before they are reduced, so no pixel of one has a share in the other.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Crops of the two photographs that come with scikit-learn.",
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_sample_images.html",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(PHOTOGRAPHS)),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # the photographs come with scikit-learn
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        from sklearn.datasets import load_sample_image  # seconds to import, needed once per machine

        count, reductions = SPLITS[split]
        for number, (label, (file, left, right)) in enumerate(PHOTOGRAPHS.items()):
            rng = np.random.default_rng([list(SPLITS).index(split), number])
            photograph = Image.fromarray(load_sample_image(file))
            top, bottom = (0, HELD_OUT_ROW) if split == "train" else (HELD_OUT_ROW, 427)
            part = photograph.crop((left, top, right, bottom))
            sizes = [(part.width // by, part.height // by) for by in reductions]
            reduced = [part.resize(size, Image.Resampling.LANCZOS) for size in sizes]
            for index in range(count):
                picture = reduced[index % len(reduced)]
                x, y = (int(rng.integers(side - SIZE + 1)) for side in picture.size)
                crop = io.BytesIO()  # bytes: TFDS would encode an array with TensorFlow
                picture.crop((x, y, x + SIZE, y + SIZE)).save(crop, format="PNG")
                yield f"{label}_{index}", {"image": crop.getvalue(), "label": label}
