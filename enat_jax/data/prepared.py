"""Prepared TFDS data sets: where they lie, and those that the project prepares itself."""

import contextlib
import io
import logging
from collections.abc import Iterator

import tensorflow_datasets as tfds

from enat_jax.data.digits import Digits
from enat_jax.data.photos import Photos
from enat_jax.data.records import unfinished
from enat_jax.errors import UserError

SHIPPED = {"digits": Digits, "photos": Photos}  # prepared on first use


class DataError(UserError):
    """A data set that is missing, unreadable, or not what its metadata say."""


def prepared_builder(
    name: str, data_dir: str, *, where: str, missing: str
) -> tfds.core.DatasetBuilder:
    """A builder that reads the newest prepared version of a data set.

    Args:
        name: TFDS name, or `name/config`; one that the project ships is prepared on first use.
        data_dir: folder of the prepared data sets.
        where: how errors begin: which data set.
        missing: what errors say of a data set that is not there.

    Raises:
        DataError: nothing is prepared, or it is unfinished or unreadable.
    """
    folder = tfds.core.Path(data_dir).expanduser() / name
    with quiet():
        if name in SHIPPED:
            _prepare(SHIPPED[name], folder)
        # TFDS writes into a folder of another name and renames it last, so a folder named by a
        # version is a whole data set, unless `records` is still at work on it.
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        versions = [tfds.core.Version(n) for n in names if tfds.core.Version.is_valid(n)]
        if not versions:
            raise DataError(f"{where}: {missing} (prepared on first use: {', '.join(SHIPPED)})")
        newest = folder / str(max(versions))
        if state := unfinished(newest):
            raise DataError(f"{where}: {state}")
        try:
            return tfds.builder_from_directory(newest)
        except (OSError, ValueError) as error:
            raise DataError(f"{where}: {error}") from error


def _prepare(builder_class: type[tfds.core.GeneratorBasedBuilder], folder: tfds.core.Path) -> None:
    """Writes a data set that the project ships, unless it is there."""
    builder = builder_class(data_dir=folder.parent, file_format="array_record")
    try:
        builder.download_and_prepare()
    except OSError:
        if not builder.data_path.exists():  # else another process was quicker: its copy is as good
            raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS's progress bars, prints and routine log lines off the terminal."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
