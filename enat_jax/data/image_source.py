"""Images by number, out of a folder of class folders or a TFDS data set."""

import abc
import contextlib
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from enat_jax.config import ImageConfig
from enat_jax.data.crops import center_crop, decode_image, random_crop, reason
from enat_jax.data.prepared import DataError, prepared_builder, quiet
from enat_jax.errors import UserError

_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


class ImageError(UserError):
    """Images that are not there, or not laid out as they should be."""


class UnreadableImage(UserError):
    """One image that cannot be decoded: its name, and why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class ImageSource(abc.ABC):
    """Images and their classes by number.

    Attributes:
        name: which images, for people.
        digest: which images, exactly: names or versions and their order, not the pixels.
        class_names: names of the classes by class id.
        summary: how many there are, in a line.
    """

    name: str
    digest: str
    class_names: tuple[str, ...]
    summary: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images, unreadable ones included."""

    @abc.abstractmethod
    def label(self, index: int) -> int:
        """Class id of an image.

        Raises:
            ImageError: it has none in [0, num_classes).
        """

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """The image's name in messages."""

    @abc.abstractmethod
    def encoded(self, index: int) -> bytes:
        """The image as it lies on disk."""

    def read(
        self, index: int, size: int, rng: np.random.Generator | None = None
    ) -> UInt8[np.ndarray, "size size 3"]:
        """One image as a square crop.

        Args:
            index: which, in [0, len).
            size: pixels per side.
            rng: for a random crop, mirrored half of the time; the centre crop without.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        try:
            image = decode_image(self.encoded(index))
            if rng is None:
                return center_crop(image, size)
            crop = random_crop(image, size, rng)
            return np.ascontiguousarray(crop[:, ::-1]) if rng.integers(2) else crop
        except Exception as error:  # Pillow's formats raise whatever their parsers come across
            raise UnreadableImage(self.describe(index), reason(error)) from error


def open_images(cfg: ImageConfig) -> ImageSource:
    """The images of a config; a data set that the project ships is prepared first.

    Raises:
        ImageError: fields out of range, or a folder that is not one of class folders.
        DataError: a data set that is not prepared, or has no images and labels.
    """
    errors = []
    if bool(cfg.folder) == bool(cfg.name):
        errors.append(f"give one of folder = {cfg.folder!r} and name = {cfg.name!r}")
    if not 0 <= cfg.max_unreadable < 1:
        errors.append(f"max_unreadable = {cfg.max_unreadable}, must lie in [0, 1)")
    errors += [
        f"{field} = {getattr(cfg, field)}, must be at least 1"
        for field in ("shard_size", "read_threads")
        if getattr(cfg, field) < 1
    ]
    if errors:
        raise ImageError(f"images: {'; '.join(errors)}")
    return _FolderImages(cfg.folder) if cfg.folder else _TFDSImages(cfg)


class _FolderImages(ImageSource):
    """A folder of class folders: classes by name, and their images by name."""

    def __init__(self, folder: str):
        self._root = pathlib.Path(folder).expanduser()
        if not self._root.is_dir():
            raise ImageError(f"folder {folder!r}: no such folder")
        entries = [path for path in self._root.iterdir() if path.name[0] != "."]
        classes = sorted(path.name for path in entries if path.is_dir())
        loose = sorted(path.name for path in entries if _is_image(path.name))
        errors, files, others = [], [], sum(path.is_file() for path in entries) - len(loose)
        labels = []
        for class_id, name in enumerate(classes):
            found, ignored = _listed(self._root / name)
            inner = sorted({file.split("/")[0] for file in found})
            if not found:
                errors.append(f"class folder {name!r} holds no images")
            elif len(inner) > 1 and all("/" in file for file in found):
                errors.append(
                    f"class folder {name!r} holds {len(inner)} folders of images"
                    f" ({_some(inner)}): are those the classes?"
                )
            files += [f"{name}/{file}" for file in found]
            labels += [class_id] * len(found)
            others += ignored
        ignored = f" ({others} other files ignored)" if others else ""
        if loose:
            errors.append(f"images that belong to no class folder: {_some(loose)}")
        elif not classes:
            errors.append("holds no class folders")
        if errors:
            raise ImageError(f"folder {folder!r}: {_some(errors, '; ', 3)}{ignored}")
        self._files, self._labels = files, np.array(labels, np.int32)
        self.class_names = tuple(classes)
        self.name = f"folder {self._root.resolve().name}"
        self.digest = _digest(files)
        self.summary = f"{len(files)} images of {len(classes)} classes in {self.name}{ignored}"

    def __len__(self) -> int:
        return len(self._files)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def describe(self, index: int) -> str:
        return self._files[index]

    def encoded(self, index: int) -> bytes:
        return (self._root / self._files[index]).read_bytes()


class _TFDSImages(ImageSource):
    """A prepared TFDS data set, whose images are left for us to decode."""

    def __init__(self, cfg: ImageConfig):
        where = f"data set {cfg.name!r}, split {cfg.split!r}, data_dir {cfg.data_dir!r}"
        missing = (
            "not prepared; `tfds build"
            f" {cfg.name} --data_dir={cfg.data_dir} --file_format=array_record` prepares it"
        )
        builder = prepared_builder(cfg.name, cfg.data_dir, where=where, missing=missing)
        held: Any = builder.info.features or {}
        features = dict(held.items())
        label = features.get("label")
        if not isinstance(features.get("image"), tfds.features.Image) or not isinstance(
            label, tfds.features.ClassLabel
        ):
            raise DataError(
                f"{where}: it must have an image and a label, it has {sorted(features)}"
            )
        try:
            with quiet():
                as_data_source: Any = builder.as_data_source
                raw = {"image": tfds.decode.SkipDecoding()}
                self._source = as_data_source(split=cfg.split, decoders=raw)
        except (NotImplementedError, ValueError) as error:
            raise DataError(f"{where}: {' '.join(str(error).split())}") from error
        if len(self._source) == 0:
            raise DataError(f"{where}: the split is empty")
        self._file_names = "file_name" in features
        self.class_names = tuple(label.names)
        self.name = f"{builder.info.full_name}, split {cfg.split}"
        self.digest = _digest([self.name, str(len(self)), *self.class_names])
        self.summary = f"{len(self)} images of {self.num_classes} classes in {self.name}"

    def __len__(self) -> int:
        return len(self._source)

    def label(self, index: int) -> int:
        label = int(self._source[index]["label"])
        if not 0 <= label < self.num_classes:
            raise ImageError(
                f"{self.describe(index)} has label {label}, must lie in [0, {self.num_classes})"
            )
        return label

    def describe(self, index: int) -> str:
        record = f"record {index} of {self.name}"
        if self._file_names:
            with contextlib.suppress(RuntimeError):  # the record itself may be damaged
                record += f" ({self._source[index]['file_name'].decode(errors='replace')})"
        return record

    def encoded(self, index: int) -> bytes:
        return self._source[index]["image"]


def _listed(folder: pathlib.Path) -> tuple[list[str], int]:
    """The images at any depth of a folder, by relative name in order; how many files are not."""
    images, others = [], 0
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        inside = pathlib.Path(parent).relative_to(folder).as_posix()
        seen = [name for name in files if name[0] != "."]
        here = [name if inside == "." else f"{inside}/{name}" for name in seen if _is_image(name)]
        images += here
        others += len(seen) - len(here)
    return sorted(images), others


def _is_image(name: str) -> bool:
    return name[0] != "." and os.path.splitext(name)[1].lower() in _SUFFIXES


def _digest(names: Sequence[str]) -> str:
    text = "\n".join(names).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()[:16]


def _some(values: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    shown = separator.join(values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
