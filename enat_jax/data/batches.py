"""Token records as training batches: one endless stream that all processes walk along together."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int, UInt, UInt16

from enat_jax.config import DataConfig
from enat_jax.data.prepared import Prepared, open_prepared
from enat_jax.errors import UserError

_CHUNK = 4096  # records decoded at a time: some MB


@dataclass(frozen=True)
class RecordInfo:
    """What a set of token records was made with, and how many there are.

    `tokenizer_digest` names the tokenizer's weights in hexadecimal digits; it is empty where the
    records do not say, as those of a tokenizer without weights. `text` says what turned captions
    into ids, as `RecordPlan.text`; it is None where images have classes.
    """

    tokenizer: str
    tokenizer_digest: str
    codebook_size: int
    grid: tuple[int, int]
    num_classes: int
    class_names: tuple[str, ...]
    num_records: int
    text: Mapping[str, Any] | None = None


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
    may exceed the number of records. Of an image's captions one is drawn, anew each time it is
    seen. `seed`, in [0, 2**32), decides order and captions.

    Returns:
        An iterator of `{"token_ids": int32 [b, n], "class_ids": int32 [b]}` in NumPy arrays, of
        the share's own rows; of images with captions `"caption_ids": int32 [b, t]` instead.

    Raises:
        UserError: as in `record_info`, and for records that cannot be read, or whose length,
            token ids, labels or captions contradict the metadata: here with `cfg.cache`, else on
            reading.
    """
    info, records = open_records(cfg)
    cached = _decode_all(info, records) if cfg.cache else None
    threads = 1 if cached else cfg.read_threads

    def batch(drawn: Sequence[tuple[int, float]]) -> dict[str, np.ndarray]:
        numbers, draws = (np.array(each) for each in zip(*drawn, strict=True))
        columns = cached or _decode(info, records, numbers.tolist())
        rows = numbers if cached else np.arange(len(numbers))
        first, end = columns.starts[rows], columns.starts[rows + 1]
        conditions = columns.conditions[first + (draws * (end - first)).astype(int)]
        return {
            "token_ids": columns.tokens[rows].astype(np.int32),
            "class_ids" if info.text is None else "caption_ids": conditions.astype(np.int32),
        }

    # Only numbers go through the pipeline record by record; a batch is read at once.
    stream = shuffled(info.num_records, seed)
    if info.text is None:
        stream = stream.map(lambda number: (number, 0.0))
    else:
        stream = stream.random_map(lambda number, rng: (number, rng.random()))
    numbers = own_part(stream, share)
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
    text = metadata.get("text")
    fields = ("tokens", "label") if text is None else ("tokens", "captions", "caption_ids")
    lacking += [f"features lack {key}" for key in fields if key not in features]
    if lacking:
        raise UserError(f"{where}: not token records: {'; '.join(lacking)}")
    names = getattr(features.get("label"), "names", map(str, range(metadata["num_classes"])))
    info = RecordInfo(
        tokenizer=metadata["tokenizer"],
        tokenizer_digest=metadata.get("tokenizer_digest", ""),
        codebook_size=metadata["codebook_size"],
        grid=tuple(metadata["grid"]),
        num_classes=metadata["num_classes"],
        class_names=tuple(names),
        num_records=len(source),
        text=text,
    )
    return info, records


class _Columns(NamedTuple):
    """Records by number; `conditions[starts[i]:starts[i + 1]]` are those of record i.

    Of images with classes there is one of each, its class id; of others the ids of each caption.
    """

    tokens: UInt16[np.ndarray, "b n"]
    conditions: UInt[np.ndarray, "c ..."]
    starts: Int[np.ndarray, " b+1"]


def _decode_all(info: RecordInfo, records: Prepared) -> _Columns:
    tokens = np.empty((info.num_records, info.grid[0] * info.grid[1]), np.uint16)
    conditions, starts = [], [np.zeros(1, int)]
    for start in range(0, info.num_records, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        columns = _decode(info, records, range(info.num_records)[chunk])
        tokens[chunk] = columns.tokens
        conditions.append(columns.conditions)
        starts.append(starts[-1][-1] + columns.starts[1:])
    return _Columns(tokens, np.concatenate(conditions), np.concatenate(starts))


def _decode(info: RecordInfo, records: Prepared, indices: Sequence[int]) -> _Columns:
    """The records at `indices`, compared with what the metadata say."""
    read, (height, width) = records.read(indices), info.grid
    lengths = {len(record["tokens"]) for record in read}
    if lengths != {height * width}:
        raise UserError(
            f"{records.where}: records of {sorted(lengths)} tokens, the grid {height} x {width} has"
            f" {height * width}"
        )
    tokens = np.stack([record["tokens"] for record in read])
    if info.text is None:
        field, limit, counts = "label", info.num_classes, [1] * len(read)
        conditions = np.array([record["label"] for record in read])
    else:
        field, limit, captions = "caption_ids", info.text["vocabulary"], info.text["length"]
        ids = [np.asarray(record[field]) for record in read]
        if {each.shape[1:] for each in ids} != {(captions,)} or not all(map(len, ids)):
            raise UserError(
                f"{records.where}: a record has no caption, or one of not {captions} ids"
            )
        conditions, counts = np.concatenate(ids), [len(each) for each in ids]
    for name, values, below in (
        ("tokens", tokens, info.codebook_size),
        (field, conditions, limit),
    ):
        if (wrong := values[(values < 0) | (values >= below)]).size:
            raise UserError(
                f"{records.where}: a record has {name} = {wrong[0]}, must lie in [0, {below})"
            )
    return _Columns(
        tokens.astype(np.uint16),
        conditions.astype(np.min_scalar_type(limit - 1)),
        np.cumsum([0, *counts]),
    )
