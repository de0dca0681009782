"""Images with captions in tar files, as img2dataset writes and WebDataset reads them."""

import pathlib
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field

from enat_jax.data.captions import MOST_BYTES, Captions, clean
from enat_jax.errors import UserError

_END = bytes(1024)  # of a tar file: two blocks of zeros


@dataclass(frozen=True)
class TarShards:
    """Where images lie in a folder's tar files, and their captions; several threads may read.

    Attributes:
        root: the folder.
        places: offset and number of bytes of each image, by a name such as `00000.tar/0012.jpg`.
        captions: by the image's name; those without an image by their own.
    """

    root: pathlib.Path
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    captions: Captions = field(default_factory=dict)

    def read(self, name: str) -> bytes:
        """An image as it lies in its shard."""
        offset, size = self.places[name]
        with open(self.root / name.partition("/")[0], "rb") as file:
            file.seek(offset)
            return file.read(size)


def open_shards(root: pathlib.Path, is_image: Callable[[str], bool], most: int) -> TarShards:
    """Finds what lies in all `*.tar` of a folder: `KEY.jpg` or alike, and `KEY.txt`, its captions.

    Other files, such as img2dataset's `KEY.json`, are passed over. All headers are read, some
    30,000 a second, but no image is.

    Args:
        root: the folder.
        is_image: whether a file is an image, by its name.
        most: bytes of an image.

    Raises:
        UserError: there are no shards, or one is cut off or corrupt.
    """
    shards = TarShards(root)
    for path in sorted(root.glob("*.tar")):
        try:
            _add(shards, path, is_image, most)
        except OSError as error:
            raise UserError(f"{str(path)!r}: {error.strerror or error}") from error
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"{str(path)!r}: cut off or corrupt: {error}") from error
    return shards


def _add(shards: TarShards, path: pathlib.Path, is_image: Callable[[str], bool], most: int) -> None:
    if not path.is_file():
        raise ValueError("is no regular file")
    images: dict[str, str] = {}  # by key: a name up to the first dot
    texts: dict[str, tuple[str, ...]] = {}
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in filter(tarfile.TarInfo.isreg, tar):
            folder, slash, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")
            key = f"{path.name}/{folder}{slash}{key}"
            if not (suffix == "txt" or is_image(name)):
                continue
            if member.size > (MOST_BYTES if suffix == "txt" else most):
                raise ValueError(f"{member.name} has {member.size} bytes")
            if suffix == "txt":
                file.seek(member.offset_data)
                texts[key] = clean(file.read(member.size).decode("utf-8-sig").splitlines())
            elif key in images:
                raise ValueError(f"{member.name} is the second image of its key")
            else:
                images[key] = f"{path.name}/{member.name}"
                shards.places[images[key]] = member.offset_data, member.size
        file.seek(tar.offset)  # tarfile takes what is no header for the end
        if file.read(len(_END)) != _END:
            raise ValueError(f"no header and no end at byte {tar.offset}")
    shards.captions.update({images.get(key, f"{key}.txt"): each for key, each in texts.items()})
