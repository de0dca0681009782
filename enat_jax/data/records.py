"""Token records on disk: a TFDS data set written shard by shard, so that a killed run goes on."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from enat_jax.errors import UserError, differences
from enat_jax.files import PARTIAL, atomic, fsync, read_json

_CHUNK = 1 << 22  # bytes read at once
_VERSION, _SPLIT = "1.0.0", "train"
_PLAN, _LAST = "plan.json", "dataset_info.json"  # the first and the last file of a data set


@dataclass(frozen=True)
class RecordPlan:
    """All that decides what the shards of a data set hold.

    Attributes:
        name: TFDS name of the data set.
        codebook_size: at most 65536.
        grid: rows and columns of tokens.
        image_size: pixels per side of the square crops.
        flips: whether each image is followed by its mirror image.
        source: which images, for people; `source_digest` says it exactly.
        num_images: unreadable ones included.
        class_names: none where there are captions.
        shard_size: images per shard.
        text: what turned captions into ids: `name`, `digest`, `length` (ids per caption),
            `vocabulary` (all are below); `words` where it is a table of them, `encoder_digest`
            where an encoder reads the ids. None where there are classes.
    """

    name: str
    tokenizer: str
    tokenizer_digest: str
    codebook_size: int
    grid: tuple[int, int]
    image_size: int
    flips: bool
    source: str
    source_digest: str
    num_images: int
    class_names: tuple[str, ...]
    shard_size: int
    text: Mapping[str, Any] | None = None

    @property
    def num_shards(self) -> int:
        """Number of shards, the last of which may be shorter."""
        return -(-self.num_images // self.shard_size)

    def images_of(self, shard: int) -> range:
        """The images whose records are in a shard."""
        return range(self.num_images)[shard * self.shard_size : (shard + 1) * self.shard_size]


class RecordFolder:
    """The folder of one data set while its shards are written, by one process or several.

    Every file is atomic. A shard is followed by its description (`shard-00003.json`: records,
    bytes, their CRC-32, images skipped and why), and only a shard that is as described counts;
    `dataset_info.json` comes last of all. So whatever a killed run or a bad disk leaves is complete
    or written again, and the bytes of a shard follow from the plan and the tokens alone. Earlier
    versions wrote no CRC-32: of theirs, only the length is known.

    Raises:
        UserError: an impossible name, or a folder that another plan was begun in: which values
            differ.
    """

    def __init__(self, plan: RecordPlan, data_dir: str | os.PathLike[str]):
        if not re.fullmatch("[a-z][a-z0-9_]*", plan.name):
            rule = "must be small letters, digits and _, a letter first"
            raise UserError(f"records: name = {plan.name!r}, {rule}")
        self.plan = plan
        self.path = pathlib.Path(data_dir).expanduser() / plan.name / _VERSION
        length = plan.grid[0] * plan.grid[1]
        self._verified: set[tuple[int, int]] = set()  # shards, and when they were written
        features: dict[str, Any] = {
            "tokens": tfds.features.Tensor(shape=(length,), dtype=np.uint16),
            "flipped": tfds.features.Scalar(np.bool_),
        }
        if plan.text is None:
            features["label"] = tfds.features.ClassLabel(names=list(plan.class_names))
        else:
            ids = tfds.features.Tensor(shape=(plan.text["length"],), dtype=np.int32)
            features["captions"] = tfds.features.Sequence(tfds.features.Text())
            features["caption_ids"] = tfds.features.Sequence(ids)
        self._features = tfds.features.FeaturesDict(features)
        serialized: Any = self._features.get_serialized_info()
        self._serializer = tfds.core.ExampleSerializer(serialized)
        self.path.mkdir(parents=True, exist_ok=True)
        # Fields that came later are absent where they say nothing: earlier records go on.
        fields = {k: v for k, v in dataclasses.asdict(plan).items() if v is not None}
        begun = self._read_json(_PLAN)
        if begun is not None:
            if changed := differences(begun, fields):
                raise UserError(
                    f"the records in {self.path} were begun with something else ({changed}):"
                    " choose another name, or delete that folder"
                )
        elif others := sorted(path.name for path in self.path.iterdir() if path.name[0] != "."):
            raise UserError(f"{self.path} holds something else ({others[0]}): choose another name")
        else:
            self._write_json(_PLAN, fields)

    @property
    def finished(self) -> bool:
        """Whether the data set is complete, described, and as it was written."""
        described = all(self._read_json(name) for name in (_LAST, "features.json"))
        return described and not self.missing()

    def missing(self) -> list[int]:
        """The shards still to be written, in order."""
        return [shard for shard in range(self.plan.num_shards) if not self._described(shard)]

    def num_skipped(self) -> int:
        """Images that have no records because they are unreadable, in the shards that are there."""
        described = map(self._described, range(self.plan.num_shards))
        return sum(len(each["skipped"]) for each in described if each)

    def write(
        self,
        shard: int,
        columns: Mapping[str, Sequence[Any] | np.ndarray],
        skipped: Mapping[str, str],
    ) -> None:
        """Writes one shard.

        Args:
            shard: its number.
            columns: a value per record of `tokens`, `flipped`, and either `label` (a class id) or
                `captions` (texts) and `caption_ids` (their ids, `[k t]`).
            skipped: its images without records, name -> reason.
        """
        with atomic(self._shard(shard)) as part:
            try:
                # TFDS's own choice: each record can be read alone.
                writer = ArrayRecordWriter(str(part), "group_size:1")
                for values in zip(*columns.values(), strict=True):
                    writer.write(self._serialize(dict(zip(columns, values, strict=True))))
                writer.close()
            except RuntimeError as error:
                raise OSError(f"cannot write {part}: {error}") from error
            size, crc = part.stat().st_size, _crc(part)
        count = len(columns["tokens"])
        described = {"records": count, "bytes": size, "crc32": crc, "skipped": dict(skipped)}
        self._write_json(_description(shard), described)

    def finish(self) -> int:
        """Describes the complete data set; returns the number of its records.

        Raises:
            UserError: shards are missing, or none holds a record.
        """
        plan = self.plan
        if missing := self.missing():
            raise UserError(f"{self.path}: {len(missing)} shards are missing, first {missing[0]}")
        shards = [self._described(shard) or {} for shard in range(plan.num_shards)]
        lengths = [shard["records"] for shard in shards]
        if sum(lengths) == 0:
            raise UserError(f"{self.path}: none of {plan.num_images} images is readable")
        info = tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(
                name=plan.name,
                version=tfds.core.Version(_VERSION),
                data_dir=str(self.path),
                module_name="",
            ),
            description=f"Images of {plan.source} as tokens of {plan.tokenizer}.",
            features=self._features,
            metadata=tfds.core.MetadataDict(
                tokenizer=plan.tokenizer,
                tokenizer_digest=plan.tokenizer_digest,
                codebook_size=plan.codebook_size,
                grid=list(plan.grid),
                num_classes=len(plan.class_names),
                image_size=plan.image_size,
                flips=plan.flips,
                source=plan.source,
                source_digest=plan.source_digest,
                num_images=plan.num_images,
                num_skipped=self.num_skipped(),
                **({} if plan.text is None else {"text": dict(plan.text)}),
            ),
        )
        info.set_file_format("array_record")
        size = sum(shard["bytes"] for shard in shards)
        split = tfds.core.SplitInfo(name=_SPLIT, shard_lengths=lengths, num_bytes=size)
        info.set_splits(tfds.core.SplitDict([split]))
        with tempfile.TemporaryDirectory(dir=self.path, prefix=PARTIAL) as folder:
            info.write_to_directory(folder)
            for file in sorted(pathlib.Path(folder).iterdir(), key=lambda file: file.name == _LAST):
                fsync(file)
                file.replace(self.path / file.name)
        for left in self.path.glob(f"{PARTIAL}*"):  # by runs that were killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return sum(lengths)

    def _shard(self, shard: int) -> pathlib.Path:
        number = f"{shard:05d}-of-{self.plan.num_shards:05d}"
        return self.path / f"{self.plan.name}-{_SPLIT}.array_record-{number}"

    def _described(self, shard: int) -> dict[str, Any] | None:
        """A shard's description; None where the shard is not complete."""
        described, file = self._read_json(_description(shard)), self._shard(shard)
        if not (described and {"records", "bytes", "skipped"} <= described.keys()):
            return None
        if not (file.is_file() and file.stat().st_size == described["bytes"]):
            return None
        verified = (shard, file.stat().st_mtime_ns)
        if verified not in self._verified and "crc32" in described:
            if _crc(file) != described["crc32"]:
                return None
            self._verified.add(verified)
        return described

    def _serialize(self, record: dict[str, Any]) -> bytes:
        # TFDS's serializer leaves the order of the fields open; that of their names is always one.
        encoded = self._features.encode_example(record)
        return self._serializer.get_tf_example(encoded).SerializeToString(deterministic=True)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            content = read_json(path) if path.exists() else None
        except ValueError:  # corrupt, as if it were not there
            return None
        return content if isinstance(content, dict) else None

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        with atomic(self.path / name) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _crc(path: pathlib.Path) -> int:
    with open(path, "rb") as file:
        return functools.reduce(
            lambda crc, chunk: zlib.crc32(chunk, crc), iter(lambda: file.read(_CHUNK), b""), 0
        )


def _description(shard: int) -> str:
    return f"shard-{shard:05d}.json"
