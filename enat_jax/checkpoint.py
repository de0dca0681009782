"""Checkpoints of a run: written asynchronously, the newest complete one restored."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import jax
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import utils as orbax_utils
from orbax.checkpoint import v1 as ocp

from enat_jax.errors import UserError

_LOGGER = logging.getLogger(__name__)
_MOST_NAMED = 8  # fields named in one error line


class CheckpointError(UserError):
    """A checkpoint cannot be written, read, or is of another model; the message is one line."""


class Checkpoints:
    """The checkpoints in one directory, a numbered directory for each step.

    With `read_only` nothing is created, cleaned or moved: a run may be writing there.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3, read_only: bool = False):
        path = epath.Path(directory)  # gs:// and the like are absolute already
        self._directory = path if "://" in str(directory) else path.expanduser().absolute()
        self._saving: tuple[int, ocp.AsyncResponse] | None = None
        self._checkpointer: ocp.training.Checkpointer | None = None
        logging.getLogger("absl").addFilter(_is_not_an_orbax_error)
        if read_only:
            return
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                preservation_policy=cast(Any, ocp.training.preservation_policies.LatestN(keep)),
                cleanup_tmp_directories=True,
            )
        except Exception as error:
            raise CheckpointError(f"cannot write to {self._directory}: {_line(error)}") from error

    def save(
        self,
        step: int,
        trees: Mapping[str, PyTree],
        *,
        data: ocp.StatefulCheckpointable | None = None,
        metadata: dict,
    ) -> None:
        """Starts writing `trees` as they are now; a step already saved is left alone.

        The trees hold global arrays, and each can be read without the others. `data` is a Grain
        iterator, saved at its present position; `metadata` whatever JSON can hold, usually the
        run's config. Raises CheckpointError if this save cannot start or the one before it failed.
        """
        if self._checkpointer is None:
            raise CheckpointError(f"{self._directory} was opened to be read only")
        self.wait()
        if step in self.steps():
            return
        processes = 0 if data is None else jax.process_count()
        saved_as = {"fields": _shapes(trees), "data_processes": processes, "metadata": metadata}
        checkpointables = dict(trees) if data is None else {**trees, "data": data}
        try:
            response = self._checkpointer.save_checkpointables_async(
                step, checkpointables, force=True, custom_metadata=saved_as
            )
        except Exception as error:
            raise self._not_saved(step, error) from error
        assert response is not None  # only a save that is not forced can be declined
        self._saving = step, response

    def wait(self) -> None:
        """Returns once the save under way is complete; raises CheckpointError if it failed."""
        if self._saving is None or self._checkpointer is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            response.result()  # it also ends a thread, which Checkpointer.wait() does not
        except Exception as error:
            with contextlib.suppress(Exception):
                self._checkpointer.wait()  # holds the same error once more for this thread
            self._checkpointer.reload()  # it has already struck off what this step was to replace
            raise self._not_saved(step, error) from error

    def close(self) -> None:
        """Waits for the save under way, then lets go of Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()

    def steps(self) -> list[int]:
        """The steps saved completely, ascending; a damaged one is among them until it is read."""
        there = self._directory.exists()
        return sorted(orbax_utils.checkpoint_steps(self._directory)) if there else []

    def metadata(self, step: int | None = None) -> dict:
        """What `save` was given as `metadata`: of `step`, or of the newest readable one."""
        found = self._newest_whole(step, lambda candidate: self._saved_as(candidate)["metadata"])
        if found is None:
            raise CheckpointError(f"no checkpoint in {self._directory}")
        return found[1]

    def restore(
        self,
        abstract: Mapping[str, PyTree],
        *,
        data: ocp.StatefulCheckpointable | None = None,
        step: int | None = None,
        warn: Callable[[str], object] = _LOGGER.warning,
    ) -> tuple[int, dict[str, PyTree]] | None:
        """Reads the newest checkpoint that is not damaged, or the one of `step`.

        Args:
            abstract: `jax.ShapeDtypeStruct` trees, only the ones wanted: no other is read. A leaf
                has the dtype and sharding asked for when it comes back, or lies on one device.
            data: the Grain iterator to move to the position saved.
            step: the one to read, with no other to fall back on.
            warn: called with one line for each damaged checkpoint passed over.

        Returns the step and its trees, or None where nothing is saved yet. Raises CheckpointError
        if all are damaged, or one does not fit `abstract`, `data` or the memory.
        """
        placed = {name: jax.tree.map(_placed, tree) for name, tree in abstract.items()}
        found = self._newest_whole(step, lambda candidate: self._read(candidate, placed, data))
        if found is None:
            return None
        whole, trees, damaged = found
        for each, reason in damaged.items():
            warn(f"skipped the damaged checkpoint {self._directory / str(each)} ({reason})")
        if damaged and self._checkpointer is not None:
            self._set_aside(damaged)
            self._checkpointer.reload()
        return whole, trees

    def _newest_whole(
        self, step: int | None, read: Callable[[int], Any]
    ) -> tuple[int, Any, dict[int, str]] | None:
        """The newest step `read` can read, what it read, and why newer ones were passed over."""
        self.wait()
        steps, damaged = self.steps(), {}
        if step is not None and step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"no checkpoint of step {step} in {self._directory}: {there}")
        for candidate in steps[::-1] if step is None else [step]:
            try:
                return candidate, read(candidate), damaged
            except CheckpointError:
                raise
            except Exception as error:
                damaged[candidate] = _line(error)
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise CheckpointError(f"no room for {candidate}: {_line(error)}") from error
        if not damaged:
            return None
        told = "".join(f"; step {each}: {reason}" for each, reason in damaged.items())
        raise CheckpointError(f"no readable checkpoint in {self._directory}{told}")

    def _saved_as(self, step: int) -> dict:
        path = self._directory / str(step) / "_CHECKPOINT_METADATA"
        return json.loads(path.read_text())["custom_metadata"]

    def _read(
        self, step: int, abstract: Mapping[str, PyTree], data: ocp.StatefulCheckpointable | None
    ) -> dict[str, PyTree]:
        path = self._directory / str(step)
        saved_as = self._saved_as(step)
        differences = _differences(saved_as["fields"], abstract)
        if differences:
            more = len(differences) - _MOST_NAMED
            told = differences[:_MOST_NAMED] + ([f"and {more} more"] if more > 0 else [])
            raise CheckpointError(f"{path} is of another model: {'; '.join(told)}")
        there, here = saved_as["data_processes"], jax.process_count()
        if data is not None and there != here:
            raise CheckpointError(f"{path} has the data position of {there} processes, not {here}")
        trees = {
            name: ocp.load(path, tree, checkpointable_name=name) for name, tree in abstract.items()
        }
        if data is not None:  # last: damage to a tree must leave the iterator where it is
            position = path / "data" / f"process_{jax.process_index()}-of-{there}.json"
            json.loads(position.read_text())  # raises if it is damaged
            try:
                ocp.load_checkpointables(path, {"data": data})
            except Exception as error:
                cause = _line(error.__cause__ or error)
                raise CheckpointError(f"{path} is of another data pipeline: {cause}") from error
        return trees

    def _set_aside(self, steps: Iterable[int]) -> None:
        """Renames damaged steps: left in place they would count as kept, and never be rewritten."""
        for step in steps if jax.process_index() == 0 else ():
            aside = self._directory / f"{step}.damaged"
            if aside.exists():
                aside.rmtree()
            (self._directory / str(step)).rename(aside)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(f"step {step} was not saved to {self._directory}: {_line(error)}")


def _shapes(trees: Mapping[str, PyTree]) -> dict[str, list[int]]:
    """Shape of every leaf by its dotted name; the array in an `nnx.Variable` has the Variable's."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(dict(trees))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    shapes = [list(leaf.shape) for _, leaf in leaves]
    return {name.removesuffix(".value"): shape for name, shape in zip(names, shapes, strict=True)}


def _differences(saved: Mapping[str, list[int]], abstract: Mapping[str, PyTree]) -> list[str]:
    """What keeps trees saved with these shapes from being read as `abstract`, a phrase each."""
    wanted = _shapes(abstract)
    names = {field.partition(".")[0] for field in saved}
    differences = [f"{name} is not in it" for name in abstract if name not in names]
    for field in sorted(saved.keys() | wanted.keys()):
        if field.partition(".")[0] not in names.intersection(abstract):
            continue
        if field not in saved:
            differences.append(f"{field} is not in it")
        elif field not in wanted:
            differences.append(f"{field} is only in it")
        elif saved[field] != wanted[field]:
            differences.append(f"{field} is {saved[field]} in it, not {wanted[field]}")
    return differences


def _placed(leaf: jax.ShapeDtypeStruct | jax.Array) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0].partition(" [tensorstore_spec")[0]
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _is_not_an_orbax_error(record: logging.LogRecord) -> bool:
    """Drops Orbax's errors, never its warnings: each is raised here too, without its traces."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname
