"""Prepared TFDS data sets, made on first use where they come with the project."""

import contextlib
import importlib.util
import io
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from enat_jax.errors import UserError
from enat_jax.files import read_json

_FEATURES = "tensorflow_datasets.core.features."


class Prepared(NamedTuple):
    """One split of a data set.

    Attributes:
        where: which one, as errors begin.
        name: with its version.
        metadata: what it was made with.
        features: the fields of its records.
        source: its records by number, of which there is at least one.
    """

    where: str
    name: str
    metadata: dict[str, Any]
    features: dict[str, Any]
    source: Any  # a TFDS data source: a sequence that takes many indices at once

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The records at some indices.

        Raises:
            UserError: a file is missing or corrupt.
        """
        try:
            return self.source.__getitems__(indices)  # a third of the time of one by one
        except RuntimeError as error:
            raise UserError(f"{self.where}: a file is missing or corrupt: {error}") from error


def open_prepared(
    name: str, data_dir: str, split: str, *, missing: str, **decoding: Any
) -> Prepared:
    """Opens the newest prepared version of a data set.

    Args:
        name: TFDS name, or `name/config`; one that the project ships is prepared on first use.
        data_dir: folder of the prepared data sets.
        split: TFDS split, such as `train` or `train[:90%]`.
        missing: what the error says of a data set that is not there.
        decoding: how records are decoded, see TFDS's `as_data_source`.

    Raises:
        UserError: nothing is prepared, or it is unfinished, unreadable or empty.
    """
    where = f"data set {name!r}, split {split!r}, data_dir {data_dir!r}"
    folder = tfds.core.Path(data_dir).expanduser() / name
    with _quiet():
        if builder := shipped(name):
            _prepare(builder, folder)
        # TFDS writes into a folder of another name and renames it last, so a folder named by a
        # version is complete, unless `records` is still at work on it.
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        versions = [tfds.core.Version(n) for n in names if tfds.core.Version.is_valid(n)]
        if not versions:
            raise UserError(f"{where}: {missing}")
        newest = folder / str(max(versions))
        if not (newest / "dataset_info.json").exists():
            raise UserError(
                f"{where}: it is unfinished, without dataset_info.json; where the verb tokenize"
                " wrote it, the same command goes on where it stopped"
            )
        try:
            _refuse_foreign_classes(read_json(newest / "features.json"))
            opened: Any = tfds.builder_from_directory(newest)
            if opened.info.splits[split].num_examples == 0:
                raise ValueError("the split is empty")
            _refuse_damaged_shards(newest, opened.info.splits[split].filepaths)
            source = opened.as_data_source(split=split, **decoding)
        except (OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    info = opened.info
    features = dict((info.features or {}).items())
    return Prepared(where, info.full_name, dict(info.metadata or {}), features, source)


def _refuse_foreign_classes(features: Any) -> None:
    """Raises ValueError unless TFDS has all the classes that a `features.json` names.

    TFDS imports the module of any other: a folder of data could run a program of its own.
    """
    values = [features]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            for key in ("pythonClassName", "python_class_name", "type"):
                name = value.get(key, _FEATURES)
                if isinstance(name, str) and not name.startswith(_FEATURES):
                    raise ValueError(f"features.json names the class {name!r}, none of TFDS's own")
            values += value.values()
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):  # as TFDS did once
            with contextlib.suppress(ValueError):
                values.append(json.loads(value))


def _refuse_damaged_shards(folder: Any, shards: Sequence[Any]) -> None:
    """Raises ValueError for a shard that is missing, or not as long as `tokenize` wrote it."""
    for shard in map(tfds.core.Path, shards):
        number = shard.name.rpartition("-of-")[0].rpartition("-")[2]
        described = folder / f"shard-{number}.json"  # only token records have those
        whole = shard.exists()
        if whole and described.exists():
            written = read_json(described)
            whole = isinstance(written, dict) and written.get("bytes") == shard.stat().length
        if not whole:
            raise ValueError(f"{shard.name} is missing or damaged: tokenize mends token records")


def shipped(name: str) -> type[tfds.core.GeneratorBasedBuilder] | None:
    """The builder of a data set that comes with the project: it stands in `enat_jax/data/NAME.py`.

    None where there is no such module, or one of something else.
    """
    module = f"{__package__}.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module) is None:
        return None
    for value in vars(importlib.import_module(module)).values():
        if isinstance(value, type) and issubclass(value, tfds.core.GeneratorBasedBuilder):
            return value
    return None


def _prepare(builder_class: type[tfds.core.GeneratorBasedBuilder], folder: tfds.core.Path) -> None:
    """Writes a data set that the project ships, unless it is there."""
    builder = builder_class(data_dir=folder.parent, file_format="array_record")
    try:
        builder.download_and_prepare()
    except OSError:
        if not builder.data_path.exists():  # else another process was quicker: its copy is as good
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
