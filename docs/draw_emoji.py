"""Draws emojis of captions that were never trained on, each beside the real one.

python docs/draw_emoji.py runs/emoji docs/emoji.png
"""

import pathlib
import sys

import numpy as np

import enat_jax
from enat_jax.data.pictures import image_grid, write_png
from enat_jax.evaluation.emoji import Cells

PAIRS, COLUMNS = 24, 12


def main(workdir: str, out: str) -> None:
    """Writes the sheet: in every pair the generated picture stands on the left."""
    model = enat_jax.load(workdir)
    cells = Cells(model.config.images.data_dir, "held_out")
    prompts = cells.prompts[:PAIRS]  # in a random order that is always the same
    made = model.sample(prompts=prompts, seed=0)
    pairs = np.stack([made, cells.pictures(made.shape[1])[:PAIRS]], axis=1)
    labels = [prompt for prompt in prompts for _ in range(2)]
    sheet = image_grid(pairs.reshape(-1, *made.shape[1:]), labels, columns=COLUMNS, wrap=True)
    write_png(pathlib.Path(out), sheet)


if __name__ == "__main__":
    main(*sys.argv[1:])
