"""Checkpoints of a run: Orbax writes them in the background, the newest intact one is restored."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import utils as orbax_utils
from orbax.checkpoint import v1 as ocp

from enat_jax.checkpoints.digests import find_corruption, write_digests
from enat_jax.errors import UserError, differences
from enat_jax.files import read_json
from enat_jax.parallel.hosts import from_primary, is_primary, several

T = TypeVar("T")
_KINDS = {"fields": dict, "config": dict, "vqgan": dict, "patches": dict, "clip_text": dict,
          "text": dict, "position": dict, "images": int, "class_names": list,
          "tokenizer_digest": str}  # fmt: skip
_LOGGER = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint cannot be written, read, or is of another model; the message is one line."""


class _CorruptError(Exception):
    """A checkpoint is not as it was written."""


class Checkpoints:
    """The checkpoints in one directory, a numbered directory for each step.

    With `read_only` nothing is created, cleaned or moved: a run may be writing there. With several
    processes all call every method together, on one directory they share; the primary writes and
    verifies the digests, and all see what it sees.

    Attributes:
        last_save_seconds: from the start of the newest complete save to its commit, mostly in the
            background; None before the first.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3, read_only: bool = False):
        path = epath.Path(directory)  # gs:// and the like are absolute already
        self._directory = path if "://" in str(directory) else path.expanduser().absolute()
        self._saving: tuple[int, Future[None]] | None = None
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self.last_save_seconds: float | None = None
        self._checkpointer: ocp.training.Checkpointer | None = None
        logging.getLogger("absl").addFilter(_is_not_an_orbax_error)
        if not read_only:
            latest: Any = ocp.training.preservation_policies.LatestN(keep)
            self._checkpointer = ocp.training.Checkpointer(
                self._directory, preservation_policy=latest, cleanup_tmp_directories=True
            )

    def save(self, step: int, trees: Mapping[str, PyTree], *, metadata: dict) -> None:
        """Starts writing `trees` as they are now; a step already saved is left alone.

        The trees hold global arrays, and each can be read without the others. `metadata` is
        whatever JSON can hold, usually the run's config and the position in its data. Once the
        step is committed, digests of its files are put beside them, in the background, too.
        Raises CheckpointError if this save cannot start or the one before it failed.
        """
        if self._checkpointer is None:
            raise CheckpointError(f"{self._directory} was opened to be read only")
        self.wait()
        if step in self.steps():
            return
        started = time.monotonic()
        record: dict[str, Any] = {"fields": _shapes(trees), "metadata": metadata}
        try:
            response = self._checkpointer.save_checkpointables_async(
                step, dict(trees), force=True, custom_metadata=record
            )
        except Exception as error:
            raise self._not_saved(step, error) from error
        assert response is not None  # only a save that is not forced can be declined
        self._saving = step, self._background.submit(self._commit, step, response.result, started)

    def wait(self) -> None:
        """Returns once the save under way is complete, with its digests.

        Raises CheckpointError if it failed. Digests that could not be written are a warning.
        """
        if self._saving is None or self._checkpointer is None:
            return
        (step, committed), self._saving = self._saving, None
        try:
            committed.result()
        except Exception as error:
            with contextlib.suppress(Exception):
                self._checkpointer.wait()  # holds the same error once more for this thread
            self._checkpointer.reload()  # it has already struck off what this step was to replace
            raise self._not_saved(step, error) from error

    def close(self) -> None:
        """Waits for the save under way, then lets go of all threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if self._checkpointer is not None:
                self._checkpointer.close()

    def steps(self) -> list[int]:
        """The steps saved completely, ascending; a corrupt one is among them until it is read."""

        def listed() -> list[int]:
            there = self._directory.exists()
            return sorted(orbax_utils.checkpoint_steps(self._directory)) if there else []

        return from_primary(listed)

    def metadata(self, step: int | None = None) -> dict:
        """What `save` was given as `metadata`, at `step` or else the newest that has it intact.

        Raises CheckpointError if there is none.
        """
        newest = self._newest(step, (), lambda _, record: record["metadata"])
        if newest is None:
            raise CheckpointError(f"no checkpoint in {self._directory}")
        return newest[1]

    def restore(
        self,
        abstract: Mapping[str, PyTree],
        *,
        step: int | None = None,
        warn: Callable[[str], object] = _LOGGER.warning,
    ) -> tuple[int, dict[str, PyTree]] | None:
        """Reads the newest checkpoint that is not corrupt, or the one of `step`.

        Neither the mesh nor the number of processes need be those it was saved from. The files
        read are compared with their digests first; where a kill came between the commit and them,
        it is used if it can be read. One with a value that is not finite counts as corrupt. Newer
        ones that are corrupt are renamed to `STEP.damaged`.

        Args:
            abstract: `jax.ShapeDtypeStruct` trees, only the ones wanted: no other is read. A leaf
                has the dtype and sharding asked for when it comes back, or lies on one device.
            step: the one to read, with no other to fall back on.
            warn: called with one line for each corrupt checkpoint passed over.

        Returns the step and its trees, or None where nothing is saved yet. Raises CheckpointError
        if all are corrupt, or one does not fit `abstract` or the memory.
        """
        wanted = {name: jax.tree.map(_placed, tree) for name, tree in abstract.items()}
        newest = self._newest(step, wanted, lambda at, record: self._load(at, record, wanted))
        if newest is None:
            return None
        restored, trees, corrupt = newest
        for each, reason in corrupt.items():
            warn(f"skipped the damaged checkpoint {self._directory / str(each)} ({reason})")
        if corrupt and self._checkpointer is not None:
            from_primary(lambda: self._set_aside(corrupt))
            self._checkpointer.reload()
        return restored, trees

    def _commit(self, step: int, written: Callable[[], object], started: float) -> None:
        """Waits for Orbax, then writes the digests: work for the background thread."""
        written()  # it also ends a thread of Orbax's, which Checkpointer.wait() does not
        self.last_save_seconds = time.monotonic() - started
        if is_primary():
            try:
                write_digests(self._directory / str(step))
            except Exception as error:  # the checkpoint itself is complete
                _LOGGER.warning("no digests for %s/%s: %s", self._directory, step, _line(error))

    def _newest(
        self, step: int | None, trees: Collection[str], read: Callable[[int, dict[str, Any]], T]
    ) -> tuple[int, T, dict[int, str]] | None:
        """The newest intact step, or `step`; what `read` makes of it; and the corrupt after it.

        None where there is no step at all.
        """
        self.wait()
        steps, corrupt = self.steps(), {}
        if step is not None and step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"no checkpoint of step {step} in {self._directory}: {there}")
        for each in steps[::-1] if step is None else [step]:
            record = from_primary(lambda at=each: self._examine(at, trees))
            if not record["corrupt"]:
                try:
                    return each, read(each, record), corrupt
                except _CorruptError as error:
                    record["corrupt"] = str(error)
            corrupt[each] = record["corrupt"]
        if not corrupt:
            return None
        reasons = "".join(f"; step {each}: {reason}" for each, reason in corrupt.items())
        raise CheckpointError(f"no readable checkpoint in {self._directory}{reasons}")

    def _examine(self, step: int, trees: Collection[str]) -> dict[str, Any]:
        """What is corrupt in a step, or else what `save` put beside its trees."""
        path = self._directory / str(step)
        try:
            if corrupt := find_corruption(path, trees):
                return {"corrupt": corrupt}
            saved = read_json(path / "_CHECKPOINT_METADATA")["custom_metadata"]
            fields, metadata = saved["fields"], saved["metadata"]
            told = {"fields": fields, "metadata": metadata, **metadata}
            told |= {"images": told.get("position", {"images": 0})["images"]}
            if odd := [
                n for n, kind in _KINDS.items() if not isinstance(told.get(n, kind()), kind)
            ]:
                return {"corrupt": f"{', '.join(odd)} of its metadata: not as they are written"}
            return {"corrupt": "", "fields": fields, "metadata": metadata}
        except Exception as error:
            return {"corrupt": _line(error)}

    def _load(
        self, step: int, record: dict[str, Any], abstract: Mapping[str, PyTree]
    ) -> dict[str, PyTree]:
        """Reads trees; raises _CorruptError if they cannot be read, or are not finite."""
        path = self._directory / str(step)
        fields = {name: shape for name, shape in record["fields"].items()
                  if name.partition(".")[0] in abstract}  # fmt: skip
        if phrases := differences(fields, _shapes(abstract)):
            raise CheckpointError(f"{path} is of another model: {phrases}")
        try:
            trees = {name: ocp.load(path, tree, checkpointable_name=name)
                     for name, tree in abstract.items()}  # fmt: skip
        except Exception as error:
            no_room = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
            if no_room or several():  # the others may have read it, or wait for this process to
                raise CheckpointError(f"cannot read {path}: {_line(error)}") from error
            raise _CorruptError(_line(error)) from error
        finite = jax.jit(lambda leaf: jnp.isfinite(leaf).all())
        for name, leaf in zip(_shapes(trees), jax.tree.leaves(trees), strict=True):
            if not finite(leaf):
                raise _CorruptError(f"{name} is not finite")
        return trees

    def _set_aside(self, corrupt: Collection[int]) -> None:
        """Renames corrupt steps: left in place they would count as kept, and never be rewritten."""
        for step in corrupt:
            aside = self._directory / f"{step}.damaged"
            if aside.exists():
                aside.rmtree()
            (self._directory / str(step)).rename(aside)

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(f"step {step} was not saved to {self._directory}: {_line(error)}")


def _shapes(trees: Mapping[str, PyTree]) -> dict[str, list[int]]:
    """Shape of every leaf by its dotted name; the array in an `nnx.Variable` has the Variable's."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(dict(trees))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    shapes = [list(leaf.shape) for _, leaf in leaves]
    return {name.removesuffix(".value"): shape for name, shape in zip(names, shapes, strict=True)}


def _placed(leaf: jax.ShapeDtypeStruct | jax.Array) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0].partition(" [tensorstore_spec")[0]
    text = text.partition(" See full TensorStore details")[0]
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _is_not_an_orbax_error(record: logging.LogRecord) -> bool:
    """Drops Orbax's errors, never its warnings: each is raised here too, without its traces."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname
