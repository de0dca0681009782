"""Sources of images, read by number as square crops: of classes, or with captions."""

import contextlib
import hashlib
import io
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from enat_jax.config import ImageConfig
from enat_jax.data import captions, tar_shards
from enat_jax.data.prepared import open_prepared
from enat_jax.errors import UserError, printable
from enat_jax.files import read_bytes

_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no other parser sees a byte
_MAX_BYTES = 2**30  # of a file: no format needs as many for so many pixels
_MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3  # where Pillow begins to warn of decompression bombs
_SMALLEST_CROP = 0.8  # of the shorter side, in random crops


class UnreadableImage(UserError):
    """One image that cannot be decoded: its name, and why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


@dataclass(frozen=True)
class ImageSource:
    """Images and their classes or captions by number; several threads may read.

    Attributes:
        name: which images, for people.
        digest: which images, exactly: names or versions and their order, not the pixels.
        class_names: names of the classes by class id; none where there are captions.
        count: how many images there are, unreadable ones included.
        class_id: the class of an image, where there are classes; raises UserError where it has
            none.
        describe: an image's name in messages.
        encoded: an image as it lies on disk.
        ignored: files that are no images.
        captions: the captions of an image, at least one; None where there are classes.
    """

    name: str
    digest: str
    class_names: tuple[str, ...]
    count: int
    class_id: Callable[[int], int]
    describe: Callable[[int], str]
    encoded: Callable[[int], bytes]
    ignored: int = 0
    captions: Callable[[int], tuple[str, ...]] | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def summary(self) -> str:
        """How many images there are of what, in a line."""
        ignored = f" ({self.ignored} other files ignored)" if self.ignored else ""
        if self.captions:
            return f"{self.count} captioned images in {self.name}{ignored}"
        return f"{self.count} images of {len(self.class_names)} classes in {self.name}{ignored}"

    def read(
        self, index: int, size: int, rng: np.random.Generator | None = None
    ) -> UInt8[np.ndarray, "size size 3"]:
        """One image as a square crop: at random with `rng`, else its centre.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        try:
            image = decode_image(self.encoded(index))
            return center_crop(image, size) if rng is None else random_crop(image, size, rng)
        except Exception as error:  # Pillow's formats raise whatever their parsers come across
            raise UnreadableImage(self.describe(index), _reason(error)) from error


def open_images(cfg: ImageConfig) -> ImageSource:
    """The images of a config; a data set that the project ships is prepared first.

    Raises:
        UserError: not one of folder and name, a folder that is not one of class folders, images
            without captions or captions without images, or a data set that is not prepared, or
            has no images and labels.
    """
    if bool(cfg.folder) == bool(cfg.name):
        raise UserError(f"images: give one of folder = {cfg.folder!r} and name = {cfg.name!r}")
    if cfg.captions:
        if not cfg.folder:
            raise UserError(f"images.captions = {cfg.captions!r} are those of a folder: give it")
        return _captioned(cfg)
    source = _class_folders(cfg.folder) if cfg.folder else _data_set(cfg)
    if odd := [repr(name) for name in source.class_names if printable(name) != name]:
        raise UserError(f"class names of no UTF-8 or with control characters: {_some(odd)}")
    return source


def _class_folders(folder: str) -> ImageSource:
    """A folder of class folders: classes by name, and their images by name."""
    root = _root(folder)
    entries = sorted(path for path in root.iterdir() if path.name[0] != ".")
    classes = [path.name for path in entries if path.is_dir()]
    loose = [path.name for path in entries if path.is_file()]
    stray = [name for name in loose if _is_image(name)]
    ignored, errors, files, class_ids = len(loose) - len(stray), [], [], []
    for class_id, name in enumerate(classes):
        images, others = _listed(root / name)
        inner = sorted({image.split("/")[0] for image in images})
        if not images:
            errors.append(f"class folder {name!r} holds no images")
        elif len(inner) > 1 and all("/" in image for image in images):
            errors.append(
                f"class folder {name!r} holds {len(inner)} folders of images"
                f" ({_some(inner)}): are those the classes?"
            )
        files += [f"{name}/{image}" for image in images]
        class_ids += [class_id] * len(images)
        ignored += len(others)
    if stray:
        errors.append(f"images that belong to no class folder: {_some(stray)}")
    elif not classes:
        errors.append("holds no class folders")
    if errors:
        others = f" ({ignored} other files ignored)" if ignored else ""
        raise UserError(f"folder {folder!r}: {_some(errors, '; ', 3)}{others}")
    return ImageSource(
        name=f"folder {printable(root.resolve().name)}",
        digest=_digest(files),
        class_names=tuple(classes),
        count=len(files),
        class_id=class_ids.__getitem__,
        describe=lambda index: printable(files[index]),
        encoded=lambda index: read_bytes(root / files[index], most=_MAX_BYTES),
        ignored=ignored,
    )


def _captioned(cfg: ImageConfig) -> ImageSource:
    """A folder's images by name, at any depth or in tar files, with their captions."""
    root = _root(cfg.folder)
    if cfg.captions == "tar":
        shards = tar_shards.open_shards(root, _is_image, _MAX_BYTES)
        files, others, of_file = sorted(shards.places), [], shards.captions
    else:
        files, others = _listed(root)
        if cfg.captions == "beside":
            of_file = captions.beside(root, files, others)
            others = [name for name in others if not name.endswith(".txt")]
        else:
            of_file = captions.from_file(cfg.captions)
        shards = None
    known = set(files)
    wrong = {
        "images without captions": [name for name in files if name not in of_file],
        "captions without images": [name for name in of_file if name not in known],
        "empty captions": [name for name in files if of_file.get(name) == ()],
    }
    errors = [
        f"{what}: {_some([*map(printable, names)])}" for what, names in wrong.items() if names
    ]
    if not files:
        errors.append(f"holds no {'images in .tar files' if shards else 'images'}")
    if errors:
        raise UserError(f"folder {cfg.folder!r}: {'; '.join(errors)}")
    lines = (f"{name}\t{each}" for name in files for each in of_file[name])
    return ImageSource(
        name=f"folder {printable(root.resolve().name)}",
        digest=_digest(lines),
        class_names=(),
        count=len(files),
        class_id=().__getitem__,
        describe=lambda index: printable(files[index]),
        encoded=lambda index: (
            shards.read(files[index])
            if shards
            else read_bytes(root / files[index], most=_MAX_BYTES)
        ),
        ignored=len(others),
        captions=lambda index: of_file[files[index]],
    )


def _data_set(cfg: ImageConfig) -> ImageSource:
    """A prepared TFDS data set, whose images are left for us to decode."""
    missing = (
        f"not prepared; `tfds build {cfg.name} --data_dir={cfg.data_dir}"
        " --file_format=array_record` prepares it"
    )
    raw = {"image": tfds.decode.SkipDecoding()}
    where, name, _, features, source = open_prepared(
        cfg.name, cfg.data_dir, cfg.split, missing=missing, decoders=raw
    )
    image, label = features.get("image"), features.get("label")
    pictured = isinstance(image, tfds.features.Image)
    classed = isinstance(label, tfds.features.ClassLabel)
    captioned = isinstance(features.get("captions"), tfds.features.Sequence)
    if not (pictured and (classed or captioned)):
        raise UserError(
            f"{where}: it must have an image, and a label or captions, it has {sorted(features)}"
        )
    name, classes = f"{name}, split {cfg.split}", tuple(label.names) if classed else ()

    def describe(index: int) -> str:
        record = f"record {index} of {name}"
        if "file_name" in features:
            with contextlib.suppress(RuntimeError):  # the record itself may be corrupt
                record += f" ({source[index]['file_name'].decode(errors='replace')})"
        return record

    def class_id(index: int) -> int:
        label = int(source[index]["label"])
        if not 0 <= label < len(classes):
            raise UserError(f"{describe(index)} has label {label}, must lie in [0, {len(classes)})")
        return label

    def captions(index: int) -> tuple[str, ...]:
        return tuple(text.decode(errors="replace") for text in source[index]["captions"])

    return ImageSource(
        name=name,
        digest=_digest([name, str(len(source)), *classes]),
        class_names=classes,
        count=len(source),
        class_id=class_id,
        describe=describe,
        encoded=lambda index: source[index]["image"],
        captions=None if classed else captions,
    )


def decode_image(encoded: bytes) -> Image.Image:
    """An RGB image from the bytes of a file; the first frame where there are several.

    Greys of 16 bits are scaled to 8. What is transparent is laid over white. Orientation tags
    (EXIF) are left alone, as the reference leaves them, so that the crops are the reference's.

    Raises:
        Exception: whatever Pillow raises for corrupt data; ValueError for an image of too many
            pixels or of values without a known range.
    """
    if not encoded:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        if image.mode[0] in "IF":  # I;16 and its byte orders, I, F
            greys = np.asarray(image)
            if image.mode == "F" or greys.min() < 0 or greys.max() > 65535:
                raise ValueError(f"greys beyond 16 bits (mode {image.mode})")
            image = Image.fromarray(((greys.astype(np.uint32) + 128) // 257).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The square in the middle of an image whose shorter side is brought to `size`.

    This is the crop of ADM (Dhariwal and Nichol, 2021), which the published tokens and reference
    statistics were made with: halved by boxes while that leaves at least `size`, then bicubic.
    """
    pixels = _resized(image, size, size)
    y, x = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[y : y + size, x : x + size]


def random_crop(
    image: Image.Image, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """A square anywhere in an image, of 0.8 to 1 of its shorter side: ADM's random crop."""
    shorter = int(rng.integers(size, math.ceil(size / _SMALLEST_CROP), endpoint=True))
    pixels = _resized(image, shorter, size)
    y, x = (int(rng.integers(side - size, endpoint=True)) for side in pixels.shape[:2])
    return pixels[y : y + size, x : x + size]


def _resized(image: Image.Image, shorter: int, size: int) -> UInt8[np.ndarray, "y x 3"]:
    """The image with a shorter side of `shorter` pixels, at least `size`."""
    while min(image.size) >= 2 * shorter:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > _MAX_PIXELS:
        raise ValueError(f"too narrow: {width} x {height} pixels where {size} x {size} are cropped")
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _reason(error: Exception) -> str:
    """Why an image is unreadable, in words that are the same in every run."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {_MAX_PIXELS} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split())) or type(error).__name__


def _root(folder: str) -> pathlib.Path:
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"folder {folder!r}: no such folder")
    return root


def _listed(folder: pathlib.Path) -> tuple[list[str], list[str]]:
    """The images at any depth of a folder, and what is none: relative names, images in order."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        inside = pathlib.Path(parent).relative_to(folder)
        files += [(inside / name).as_posix() for name in names if name[0] != "."]
    return sorted(filter(_is_image, files)), [name for name in files if not _is_image(name)]


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def _digest(names: Iterable[str]) -> str:
    text = "\n".join(names).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()[:16]


def _some(values: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    shown = separator.join(values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
