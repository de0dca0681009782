"""Token records on disk: a TFDS data set written shard by shard, so that a killed run goes on."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Bool, Int, UInt16

from enat_jax.data.record_plan import RecordPlan, RecordsError, as_json, check_plan, some
from enat_jax.errors import differences
from enat_jax.files import to_disk, written_whole

VERSION = "1.0.0"
SPLIT = "train"
_PLAN, _LAST = "plan.json", "dataset_info.json"  # the first and the last file of a data set
_PARTIAL = ".partial-"


class RecordFolder:
    """The folder of one data set while its shards are written, by one process or several.

    A shard is written under another name and renamed when it is whole; then its description
    (`shard-00003.json`: records, bytes, images skipped and why) is written in the same way, and
    only what has a description counts. `dataset_info.json` comes last of all. So whatever a
    killed run leaves is either whole or not looked at, and the bytes of a shard follow from the
    plan and the tokens alone.

    Args:
        plan: What the shards hold.
        data_dir: Folder of the prepared data sets; for several processes one that they share.

    Raises:
        RecordsError: an impossible plan, a folder that cannot be written to, or one that another
            plan was begun in: which values differ.
    """

    def __init__(self, plan: RecordPlan, data_dir: str | os.PathLike[str]):
        check_plan(plan)
        self.plan = plan
        self.path = pathlib.Path(data_dir).expanduser() / plan.name / VERSION
        self._features = tfds.features.FeaturesDict(
            {
                "tokens": tfds.features.Tensor(
                    shape=(plan.grid[0] * plan.grid[1],), dtype=np.uint16
                ),
                "label": tfds.features.ClassLabel(names=list(plan.class_names)),
                "flipped": tfds.features.Scalar(np.bool_),
            }
        )
        serialized: Any = self._features.get_serialized_info()
        self._serializer = tfds.core.ExampleSerializer(serialized)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordsError(f"cannot write records to {self.path}: {error}") from error
        begun = _read_json(self.path / _PLAN)
        if begun is None:
            if others := sorted(path.name for path in self.path.iterdir() if path.name[0] != "."):
                raise RecordsError(
                    f"{self.path} holds something else ({others[0]}): choose another name"
                )
            self._write_json(_PLAN, as_json(plan))
        else:
            if changed := differences(begun, as_json(plan)):
                raise RecordsError(
                    f"the records in {self.path} were begun with something else ({changed}):"
                    " choose another name, or delete that folder"
                )

    @property
    def finished(self) -> bool:
        """Whether the data set is whole and described."""
        return (self.path / _LAST).exists()

    def missing(self) -> list[int]:
        """The shards still to be written, in order."""
        return [shard for shard in range(self.plan.num_shards) if self._described(shard) is None]

    def num_skipped(self) -> int:
        """Images that have no records because they are unreadable, in the whole shards."""
        described = map(self._described, range(self.plan.num_shards))
        return sum(len(each["skipped"]) for each in described if each)

    def write(
        self,
        shard: int,
        tokens: UInt16[np.ndarray, "b n"],
        labels: Int[np.ndarray, " b"],
        flipped: Bool[np.ndarray, " b"],
        skipped: Mapping[str, str],
    ) -> None:
        """Writes one shard.

        Args:
            shard: which, in [0, num_shards).
            tokens: the records' token ids.
            labels: their class ids.
            flipped: whether they are of mirror images.
            skipped: the shard's images without records: name -> reason.

        Raises:
            RecordsError: the file cannot be written.
        """
        name = self._file(shard)
        try:
            with self._written_whole(name) as part:
                # TFDS's own choice: each record can be read alone.
                writer = ArrayRecordWriter(str(part), "group_size:1")
                for row, label, flip in zip(tokens, labels, flipped, strict=True):
                    writer.write(self._serialize({"tokens": row, "label": label, "flipped": flip}))
                writer.close()
                size = part.stat().st_size
        except (OSError, RuntimeError) as error:
            raise RecordsError(f"cannot write {self.path / name}: {error}") from error
        described = {"records": len(tokens), "bytes": size, "skipped": dict(skipped)}
        self._write_json(_description(shard), described)

    def finish(self) -> int:
        """Describes the whole data set; returns the number of its records.

        Raises:
            RecordsError: shards are missing, or none holds a record.
        """
        if missing := self.missing():
            raise RecordsError(f"{self.path}: shards {some(missing)} are missing")
        shards = [self._described(shard) or {} for shard in range(self.plan.num_shards)]
        lengths = [shard["records"] for shard in shards]
        if sum(lengths) == 0:
            raise RecordsError(f"{self.path}: none of {self.plan.num_images} images is readable")
        plan = self.plan
        info = tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(
                name=plan.name,
                version=tfds.core.Version(VERSION),
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
            ),
        )
        info.set_file_format("array_record")
        split = tfds.core.SplitInfo(
            name=SPLIT, shard_lengths=lengths, num_bytes=sum(shard["bytes"] for shard in shards)
        )
        info.set_splits(tfds.core.SplitDict([split]))
        with tempfile.TemporaryDirectory(dir=self.path, prefix=_PARTIAL) as folder:
            info.write_to_directory(folder)
            files = sorted(pathlib.Path(folder).iterdir(), key=lambda file: file.name == _LAST)
            for file in files:
                to_disk(file)
                file.replace(self.path / file.name)
        for left in self.path.glob(f"{_PARTIAL}*"):  # by runs that were killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return sum(lengths)

    def _file(self, shard: int) -> str:
        return f"{self.plan.name}-{SPLIT}.array_record-{shard:05d}-of-{self.plan.num_shards:05d}"

    def _described(self, shard: int) -> dict[str, Any] | None:
        """A shard's description; None where the shard is not whole."""
        described = _read_json(self.path / _description(shard))
        file = self.path / self._file(shard)
        whole = described and file.exists() and file.stat().st_size == described["bytes"]
        return described if whole else None

    def _serialize(self, record: dict[str, Any]) -> bytes:
        # TFDS's serializer leaves the order of the fields open; that of their names is always one.
        encoded = self._features.encode_example(record)
        return self._serializer.get_tf_example(encoded).SerializeToString(deterministic=True)

    def _written_whole(self, name: str) -> contextlib.AbstractContextManager[pathlib.Path]:
        """As `written_whole`, under a name that no other process writes to meanwhile."""
        unique = f"{socket.gethostname()}-{os.getpid()}"
        return written_whole(self.path / name, partial=f"{_PARTIAL}{unique}")

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        try:
            with self._written_whole(name) as part:
                part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise RecordsError(f"cannot write {self.path / name}: {error}") from error


def unfinished(path: str | os.PathLike[str]) -> str | None:
    """What a data set's folder lacks, in a line; None where it is whole, or not made by this."""
    folder = pathlib.Path(path)
    begun = _read_json(folder / _PLAN)
    if begun is None or (folder / _LAST).exists():
        return None
    shards = -(-begun["num_images"] // begun["shard_size"])
    there = sum((folder / _description(shard)).exists() for shard in range(shards))
    return (
        f"unfinished records: {there} of {shards} shards are there; the same tokenize command"
        " goes on where it stopped"
    )


def _description(shard: int) -> str:
    return f"shard-{shard:05d}.json"


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
