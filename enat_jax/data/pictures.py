"""Images on disk: labelled grids, single PNGs, and the ADM suite's `.npz`."""

import itertools
import math
import os
import pathlib
import zipfile
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from enat_jax.files import atomic

_SMALLEST_CELL = 64  # smaller images are enlarged in a grid, pixel by pixel
_GAP = 4
_LINE = 15  # pixels from one line of text to the next


def image_grid(
    images: UInt8[np.ndarray, "b y x 3"],
    labels: Sequence[str],
    *,
    columns: int | None = None,
    wrap: bool = False,
) -> UInt8[np.ndarray, "height width 3"]:
    """Arranges images in rows; a label stands above the first image of each run of equal labels.

    By default there is a row per label where all labels are equally frequent, else a square. With
    `wrap` long labels go on in further lines, each as wide as its image.
    """
    count, height, width, _ = images.shape
    per_row = columns or _columns(labels)
    zoom = max(1, -(-_SMALLEST_CELL // min(height, width)))
    font = ImageFont.load_default(size=12)
    cell_y, cell_x = height * zoom + _GAP, width * zoom + _GAP
    if wrap:
        labels = [_wrapped(label, font, cell_x - _GAP) for label in labels]
    text = 3 + _LINE * max(1 + label.count("\n") for label in labels)
    rows = -(-count // per_row)
    sheet = Image.new("RGB", (per_row * cell_x + _GAP, rows * (cell_y + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = index // per_row, index % per_row
        x, y = _GAP + column * cell_x, row * (cell_y + text)
        if column == 0 or labels[index - 1] != label:
            for line, part in enumerate(label.split("\n")):
                draw.text((x, y + 2 + line * _LINE), part, fill="black", font=font)
        tile = Image.fromarray(image).resize(
            (width * zoom, height * zoom), Image.Resampling.NEAREST
        )
        sheet.paste(tile, (x, y + text))
    return np.asarray(sheet)


def _wrapped(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A label in lines of at most so many pixels, where its words are no longer."""
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _columns(labels: Sequence[str]) -> int:
    runs = 1 + sum(a != b for a, b in itertools.pairwise(labels))
    per_run = len(labels) // runs if len(labels) % runs == 0 else 1
    return per_run if per_run > 1 else math.ceil(len(labels) ** 0.5)


def write_png(path: str | os.PathLike[str], image: UInt8[np.ndarray, "y x 3"]) -> None:
    """Writes one image."""
    with atomic(path) as part:
        Image.fromarray(image).save(part, format="PNG")


def write_pngs(
    folder: str | os.PathLike[str],
    batches: Iterable[UInt8[np.ndarray, "_ y x 3"]],
    class_ids: Int[np.ndarray, " b"],
) -> None:
    """Writes `00000_class_3.png` and so on into a folder, batch by batch."""
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    images = itertools.chain.from_iterable(batches)
    for index, (image, label) in enumerate(zip(images, class_ids, strict=True)):
        write_png(pathlib.Path(folder) / f"{index:05d}_class_{label}.png", image)


def write_npz(
    path: str | os.PathLike[str],
    batches: Iterable[UInt8[np.ndarray, "_ y x 3"]],
    class_ids: Int[np.ndarray, " b"],
) -> None:
    """Writes `arr_0` (uint8 NHWC) and `arr_1` (labels), as the ADM evaluation suite reads them.

    One batch is held at a time; the file has its name only once it is whole.
    """
    count = 0
    with atomic(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for batch in batches:
                if not count:
                    shape = (len(class_ids), *batch.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(batch).data)
                count += len(batch)
        if count != len(class_ids):
            raise ValueError(f"{count} images for {len(class_ids)} class ids")
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.asarray(class_ids))
