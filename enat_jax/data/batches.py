"""Token records as Grain pipelines over TFDS data sources."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int32, UInt16

from enat_jax.config import DataConfig
from enat_jax.data.prepared import DataError, prepared_builder, quiet
from enat_jax.data.record_plan import MAX_CODEBOOK_SIZE
from enat_jax.data.stream import Share, own_part, shuffled

Columns = tuple[UInt16[np.ndarray, "b n"], Int32[np.ndarray, " b"]]

_CHUNK = 4096  # records decoded at a time: some MB


@dataclass(frozen=True)
class RecordInfo:
    """What a set of token records was made with, and how many there are.

    `tokenizer_digest` names the tokenizer's weights in hexadecimal digits; it is empty where the
    records do not say, as those of a tokenizer without weights.
    """

    tokenizer: str
    tokenizer_digest: str
    codebook_size: int
    grid: tuple[int, int]
    num_classes: int
    class_names: tuple[str, ...]
    num_records: int

    @property
    def num_tokens(self) -> int:
        """Tokens in each record."""
        return self.grid[0] * self.grid[1]


def record_info(cfg: DataConfig) -> RecordInfo:
    """What the records of `cfg` were made with; prepares them first if the project ships them.

    Raises:
        DataError: the records are missing or empty, or their metadata are incomplete or
            contradictory.
    """
    return _checked_info(_prepared_builder(cfg), cfg)


def training_batches(cfg: DataConfig, share: Share, *, seed: int) -> grain.DatasetIterator:
    """An endless stream of shuffled batches, this host's part of it.

    All hosts walk one stream of records together: epoch after epoch, each shuffled anew. Hence
    every epoch's records are seen once each, by exactly one host, also where they do not divide
    evenly, and a step holds the same records in the same rows on any number of hosts.

    Args:
        cfg: The records.
        share: Which of them, from where on; a batch may exceed the number of records.
        seed: Decides the order, in [0, 2**32).

    Returns:
        An iterator of `{"token_ids": int32 [b, n], "class_ids": int32 [b]}` in NumPy arrays, of
        the share's own rows.

    Raises:
        DataError: as in `record_info`, and for records that cannot be read, or whose length,
            token ids or labels contradict the metadata: here with `cfg.cache`, else on reading.
        ValueError: `seed` out of range.
    """
    builder = _prepared_builder(cfg)
    info = _checked_info(builder, cfg)
    with quiet():
        as_data_source: Any = builder.as_data_source  # wrapped beyond what pyright can follow
        source = as_data_source(split=cfg.split)
    if cfg.cache:
        tokens, labels = _decode_all(source, info, cfg)
        threads = 1

        def read(indices: list[int]) -> Columns:
            return tokens[indices], labels[indices]
    else:
        threads = cfg.read_threads

        def read(indices: list[int]) -> Columns:
            return _decode(source, indices, info, cfg)

    def batch(indices: Sequence[int]) -> dict[str, np.ndarray]:
        token_ids, class_ids = read(list(indices))
        return {"token_ids": token_ids.astype(np.int32), "class_ids": class_ids}

    # Only integers go through the pipeline record by record; a batch is gathered at once.
    numbers = own_part(shuffled(info.num_records, seed), share)
    batches = numbers.batch(len(share.own_rows), drop_remainder=True, batch_fn=batch)
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, cfg.prefetch_batches)
    )
    return iter(batches.to_iter_dataset(options))


def _prepared_builder(cfg: DataConfig) -> tfds.core.DatasetBuilder:
    """A builder that reads the newest prepared version of `cfg.name`."""
    missing = "no prepared records; tokenize the data set first, or correct name or data_dir"
    return prepared_builder(cfg.name, cfg.data_dir, where=_where(cfg), missing=missing)


def _checked_info(builder: tfds.core.DatasetBuilder, cfg: DataConfig) -> RecordInfo:
    """The metadata of `builder` as `RecordInfo`; all that is wrong with them in one error."""
    metadata = builder.info.metadata or {}
    features: Any = builder.info.features or {}
    missing = [
        f"metadata lack {key}"
        for key in ("tokenizer", "codebook_size", "grid", "num_classes")
        if key not in metadata
    ] + [f"features lack {key}" for key in ("tokens", "label") if key not in features]
    if missing:
        raise DataError(f"{_where(cfg)}: not token records: {'; '.join(missing)}")
    try:
        num_records = builder.info.splits[cfg.split].num_examples
    except ValueError as error:
        raise DataError(f"{_where(cfg)}: {error}") from error

    num_classes = metadata["num_classes"]
    names = getattr(features["label"], "names", None) or map(str, range(num_classes))
    info = RecordInfo(
        tokenizer=metadata["tokenizer"],
        tokenizer_digest=metadata.get("tokenizer_digest", ""),
        codebook_size=metadata["codebook_size"],
        grid=tuple(metadata["grid"]),
        num_classes=num_classes,
        class_names=tuple(names),
        num_records=num_records,
    )
    errors = []
    if num_records == 0:
        errors.append("the split is empty")
    if not 1 <= info.codebook_size <= MAX_CODEBOOK_SIZE:
        errors.append(f"codebook_size = {info.codebook_size}, must lie in [1, {MAX_CODEBOOK_SIZE}]")
    if len(info.class_names) != num_classes:
        errors.append(f"num_classes = {num_classes}, but {len(info.class_names)} class names")
    if errors:
        raise DataError(f"{_where(cfg)}: {'; '.join(errors)}")
    return info


def _decode_all(source: Sequence[Any], info: RecordInfo, cfg: DataConfig) -> Columns:
    """All records in two compact arrays."""
    tokens = np.empty((info.num_records, info.num_tokens), np.uint16)
    labels = np.empty(info.num_records, np.int32)
    for start in range(0, info.num_records, _CHUNK):
        chunk = slice(start, min(start + _CHUNK, info.num_records))
        indices = range(chunk.start, chunk.stop)
        tokens[chunk], labels[chunk] = _decode(source, list(indices), info, cfg)
    return tokens, labels


def _decode(source: Any, indices: list[int], info: RecordInfo, cfg: DataConfig) -> Columns:
    """The records at `indices`, compared with what the metadata say."""
    try:
        records = source.__getitems__(indices)  # a third of the time of one by one
    except RuntimeError as error:
        raise DataError(f"{_where(cfg)}: a file is missing or damaged: {error}") from error
    for index, record in zip(indices, records, strict=True):
        if len(record["tokens"]) != info.num_tokens:
            raise DataError(
                f"{_where(cfg)}: record {index} has {len(record['tokens'])} tokens, the grid "
                f"{info.grid[0]} x {info.grid[1]} has {info.num_tokens}"
            )
    tokens = np.stack([record["tokens"] for record in records])
    labels = np.array([record["label"] for record in records])
    for field, values, limit in (
        ("tokens", tokens, info.codebook_size),
        ("label", labels, info.num_classes),
    ):
        if values.min() < 0 or values.max() >= limit:
            wrong = (values < 0) | (values >= limit)
            record = indices[int(np.nonzero(wrong)[0][0])]
            raise DataError(
                f"{_where(cfg)}: record {record} has {field} = {values[wrong][0]}, "
                f"must lie in [0, {limit})"
            )
    return tokens.astype(np.uint16), labels.astype(np.int32)


def _where(cfg: DataConfig) -> str:
    return f"data set {cfg.name!r}, split {cfg.split!r}, data_dir {cfg.data_dir!r}"
