"""Token records as training batches: one endless stream that all processes walk along together."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, Int32, UInt16

from enat_jax.config import DataConfig
from enat_jax.data.prepared import Prepared, open_prepared
from enat_jax.errors import UserError

Columns = tuple[UInt16[np.ndarray, "b n"], Int32[np.ndarray, " b"]]  # token ids, labels

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


@dataclass(frozen=True)
class Share:
    """Which of the stream's examples a process takes.

    Step `s` takes examples `first + s * batch_size` and on, whatever the number of processes.

    Attributes:
        batch_size: examples of a step, over all processes.
        rows: which of a step's are this process's, ascending; None for all.
        first: examples that were taken before the first step.
    """

    batch_size: int
    rows: Int[np.ndarray, " r"] | None = None
    first: int = 0

    @property
    def own_rows(self) -> Int[np.ndarray, " r"]:
        """This process's rows of a step."""
        return np.arange(self.batch_size) if self.rows is None else self.rows


def record_info(cfg: DataConfig) -> RecordInfo:
    """What the records of `cfg` were made with; prepares them first if the project ships them.

    Raises:
        UserError: the records are missing or empty, or their metadata are incomplete.
    """
    return open_records(cfg)[0]


def training_batches(cfg: DataConfig, share: Share, *, seed: int) -> grain.DatasetIterator:
    """An endless stream of shuffled batches, this process's part of it.

    All processes walk one stream of records together: epoch after epoch, each shuffled anew. Hence
    every epoch's records are seen once each, by exactly one process, also where they do not divide
    evenly, and a step holds the same records in the same rows on any number of processes. A batch
    may exceed the number of records. `seed`, in [0, 2**32), decides their order.

    Returns:
        An iterator of `{"token_ids": int32 [b, n], "class_ids": int32 [b]}` in NumPy arrays, of
        the share's own rows.

    Raises:
        UserError: as in `record_info`, and for records that cannot be read, or whose length,
            token ids or labels contradict the metadata: here with `cfg.cache`, else on reading.
    """
    info, records = open_records(cfg)
    cached = _decode_all(info, records) if cfg.cache else None
    threads = 1 if cached else cfg.read_threads

    def batch(numbers: Sequence[int]) -> dict[str, np.ndarray]:
        own = list(numbers)
        tokens, labels = [c[own] for c in cached] if cached else _decode(info, records, own)
        return {"token_ids": tokens.astype(np.int32), "class_ids": labels}

    # Only integers go through the pipeline record by record; a batch is read at once.
    numbers = own_part(shuffled(info.num_records, seed), share)
    batches = numbers.batch(len(share.own_rows), drop_remainder=True, batch_fn=batch)
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, cfg.prefetch_batches)
    )
    return iter(batches.to_iter_dataset(options))


def shuffled(count: int, seed: int) -> grain.MapDataset:
    """The numbers below `count`, epoch after epoch, each shuffled anew by the seed (< 2**32)."""
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


def own_part(stream: grain.MapDataset, share: Share) -> grain.MapDataset:
    """A process's examples, step after step: `len(share.own_rows)` of each."""
    rows = share.own_rows.tolist()

    def example(index: int) -> Any:
        step, row = divmod(index, len(rows))
        return stream[share.first + step * share.batch_size + rows[row]]

    return grain.MapDataset.range(sys.maxsize).map(example)


def open_records(cfg: DataConfig) -> tuple[RecordInfo, Prepared]:
    """What `record_info` says, and the records as they lie on disk."""
    missing = "no prepared records; tokenize the data set first, or correct name or data_dir"
    records = open_prepared(cfg.name, cfg.data_dir, cfg.split, missing=missing)
    where, _, metadata, features, source = records
    needed = ("tokenizer", "codebook_size", "grid", "num_classes")
    lacking = [f"metadata lack {key}" for key in needed if key not in metadata]
    lacking += [f"features lack {key}" for key in ("tokens", "label") if key not in features]
    if lacking:
        raise UserError(f"{where}: not token records: {'; '.join(lacking)}")
    names = getattr(features["label"], "names", None) or map(str, range(metadata["num_classes"]))
    info = RecordInfo(
        tokenizer=metadata["tokenizer"],
        tokenizer_digest=metadata.get("tokenizer_digest", ""),
        codebook_size=metadata["codebook_size"],
        grid=tuple(metadata["grid"]),
        num_classes=metadata["num_classes"],
        class_names=tuple(names),
        num_records=len(source),
    )
    return info, records


def _decode_all(info: RecordInfo, records: Prepared) -> Columns:
    tokens = np.empty((info.num_records, info.grid[0] * info.grid[1]), np.uint16)
    labels = np.empty(info.num_records, np.int32)
    for start in range(0, info.num_records, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        tokens[chunk], labels[chunk] = _decode(info, records, range(info.num_records)[chunk])
    return tokens, labels


def _decode(info: RecordInfo, records: Prepared, indices: Sequence[int]) -> Columns:
    """The records at `indices`, compared with what the metadata say."""
    read, (height, width) = records.read(indices), info.grid
    lengths = {len(record["tokens"]) for record in read}
    if lengths != {height * width}:
        raise UserError(
            f"{records.where}: records of {sorted(lengths)} tokens, the grid {height} x {width} has"
            f" {height * width}"
        )
    tokens = np.stack([record["tokens"] for record in read])
    labels = np.array([record["label"] for record in read])
    for field, values, limit in (
        ("tokens", tokens, info.codebook_size),
        ("label", labels, info.num_classes),
    ):
        if (wrong := values[(values < 0) | (values >= limit)]).size:
            raise UserError(
                f"{records.where}: a record has {field} = {wrong[0]}, must lie in [0, {limit})"
            )
    return tokens.astype(np.uint16), labels.astype(np.int32)
