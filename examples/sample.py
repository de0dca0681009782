"""Draws digits from a trained run; after `make quickstart`."""

import sys

from PIL import Image

import enat_jax

model = enat_jax.load(sys.argv[1] if sys.argv[1:] else "runs/digits")
images = model.sample(class_ids=range(10), steps=8, seed=0)  # uint8 [10, y, x, 3]
Image.fromarray(images.transpose(1, 0, 2, 3).reshape(images.shape[1], -1, 3)).save("digits_row.png")
