"""Captions on disk: text files beside images, a table of them, or COCO's annotations."""

import csv
import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from enat_jax.errors import UserError
from enat_jax.files import read_bytes, read_json

Captions = dict[str, tuple[str, ...]]  # by the image's file, relative to its folder

MOST_BYTES = 2**20  # of one image's captions
_MOST_BYTES = 2**30  # of a file of all captions: COCO's of 2014 have 64 MB, CC3M's 500
_COCO = (
    "is not laid out as COCO's: `images` with `id` and `file_name`, `annotations` with the"
    " `image_id` of one of these and a `caption`"
)


def beside(root: pathlib.Path, images: Sequence[str], others: Sequence[str]) -> Captions:
    """The lines of each image's `NAME.txt`; those without an image stand under their own names.

    Args:
        root: folder that the names are relative to.
        images: names of images.
        others: names of the other files.

    Raises:
        UserError: a file that cannot be read.
    """
    texts = {name for name in others if name.endswith(".txt")}
    of_image = {image: str(pathlib.PurePosixPath(image).with_suffix(".txt")) for image in images}
    found = {image: text for image, text in of_image.items() if text in texts}
    strays = sorted(texts.difference(found.values()))
    lines = {image: _lines(root / text) for image, text in found.items()}
    return lines | dict.fromkeys(strays, ())


def from_file(name: str) -> Captions:
    """Captions by the images' files, from COCO's annotations (`.json`) or a table.

    A table is a `.csv` or a `.jsonl` with `file` and `caption` in each row; several rows of a file
    are several captions.

    Raises:
        UserError: a file that cannot be read, or is none of these.
    """
    path = pathlib.Path(name).expanduser()
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _coco_rows}
    try:
        if path.suffix not in readers:
            raise ValueError(f"must be 'beside', 'tar' or a file of {', '.join(readers)}")
        captions: dict[str, list[str]] = {}
        for file, caption in readers[path.suffix](path):
            captions.setdefault(str(pathlib.PurePosixPath(file)), []).append(caption)
    except OSError as error:
        raise UserError(f"images.captions = {name!r}: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"images.captions = {name!r}: {error}") from error
    return {file: clean(each) for file, each in captions.items()}


def clean(captions: Iterable[str]) -> tuple[str, ...]:
    """Captions with single spaces between words, those of no words left out."""
    words = (caption.encode("utf-8", "replace").decode().split() for caption in captions)
    return tuple(" ".join(each) for each in words if each)


def read_prompts(name: str) -> list[str]:
    """The captions of a text file, one a line.

    Raises:
        UserError: a file that cannot be read, or holds none.
    """
    if not (prompts := _lines(pathlib.Path(name).expanduser(), most=_MOST_BYTES)):
        raise UserError(f"captions {name!r}: holds none")
    return list(prompts)


def _lines(path: pathlib.Path, most: int = MOST_BYTES) -> tuple[str, ...]:
    try:
        return clean(read_bytes(path, most=most).decode("utf-8-sig").splitlines())
    except OSError as error:
        raise UserError(f"captions {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"captions {str(path)!r}: {error}") from error


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(_text(path), newline=""))
    if lacking := {"file", "caption"}.difference(rows.fieldnames or ()):
        raise ValueError(f"lacks the columns {', '.join(sorted(lacking))}")
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(
                f"line {rows.line_num} has {'more' if None in row else 'fewer'} cells than columns"
                ' (captions with commas stand in "")'
            )
        yield row["file"], row["caption"]


def _jsonl_rows(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is no JSON: {error}") from error
        file, caption = (row.get("file"), row.get("caption")) if isinstance(row, dict) else (0, 0)
        if not (isinstance(file, str) and isinstance(caption, str)):
            raise ValueError(f"line {number} is no object with texts `file` and `caption`")
        yield file, caption


def _coco_rows(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    content = read_json(path, most=_MOST_BYTES)
    try:
        files = {image["id"]: image["file_name"] for image in content["images"]}
        rows = [(files[each["image_id"]], each["caption"]) for each in content["annotations"]]
    except (KeyError, TypeError) as error:
        raise ValueError(_COCO) from error
    if not all(isinstance(text, str) for row in rows for text in row):
        raise ValueError(_COCO)
    yield from rows


def _text(path: pathlib.Path) -> str:
    return read_bytes(path, most=_MOST_BYTES).decode("utf-8-sig")
