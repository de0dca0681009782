"""The image sheet of an ablation: a row per point, the same noise and classes in all of them."""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from enat_jax.data.pictures import image_grid, write_png
from enat_jax.files import atomic


def keep_tiles(folder: pathlib.Path, row: int, images: UInt8[np.ndarray, "k y x 3"]) -> None:
    """Keeps a row's images in `tiles/` until the sheet is drawn."""
    path = folder / "tiles" / f"{row:03d}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part, open(part, "wb") as file:
        np.save(file, images)


def write_sheet(folder: pathlib.Path, names: Sequence[str]) -> bool:
    """Draws `sheet.png` of the images kept, if any, in rows of these names.

    Images smaller than the largest are enlarged.
    """
    paths = {name: folder / "tiles" / f"{row:03d}.npy" for row, name in enumerate(names)}
    rows = {name: np.load(path) for name, path in paths.items() if path.exists()}
    if not rows:
        return False
    height, width = np.max([images.shape[1:3] for images in rows.values()], axis=0)
    images = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST))
        for row in rows.values()
        for image in row
    ]
    labels = [name for name, row in rows.items() for _ in row]
    columns = len(next(iter(rows.values())))
    write_png(folder / "sheet.png", image_grid(np.stack(images), labels, columns=columns))
    return True
