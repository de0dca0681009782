"""The image sheet of an ablation: a row per point, the same noise and classes in all of them."""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from enat_jax.data.pictures import image_grid, write_png
from enat_jax.files import atomic

_TILES = "tiles"


def keep_tiles(folder: pathlib.Path, row: int, images: UInt8[np.ndarray, "k y x 3"]) -> None:
    """Keeps a row's images until the sheet is drawn, whole or not at all."""
    path = _tiles(folder, row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part, open(part, "wb") as file:
        np.save(file, images)


def write_sheet(folder: pathlib.Path, names: Sequence[str]) -> bool:
    """Draws `sheet.png` of the images kept; says whether there were any.

    Args:
        folder: the ablation's.
        names: of the rows; images smaller than the largest are enlarged.
    """
    rows = {
        name: np.load(_tiles(folder, row))
        for row, name in enumerate(names)
        if _tiles(folder, row).exists()
    }
    if not rows:
        return False
    height, width = np.max([images.shape[1:3] for images in rows.values()], axis=0)

    def enlarged(image: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "height width 3"]:
        size = (int(width), int(height))
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.NEAREST))

    images = np.stack([enlarged(image) for row in rows.values() for image in row])
    labels = [name for name, row in rows.items() for _ in row]
    columns = len(next(iter(rows.values())))
    write_png(folder / "sheet.png", image_grid(images, labels, columns=columns))
    return True


def _tiles(folder: pathlib.Path, row: int) -> pathlib.Path:
    return folder / _TILES / f"{row:03d}.npy"
