"""Checkpoints of a run: written asynchronously, the newest whole one restored on any hosts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

import jax
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import utils as orbax_utils
from orbax.checkpoint import v1 as ocp

from enat_jax.checkpoints.digests import find_damage, write_digests
from enat_jax.errors import UserError
from enat_jax.parallel.agreement import FailedOnAHost, agreed, from_all

_LOGGER = logging.getLogger(__name__)
_MOST_NAMED = 8  # fields named in one error line
_T = TypeVar("_T")


class CheckpointError(UserError):
    """A checkpoint cannot be written, read, or is of another model; the message is one line."""


class _Damage(Exception):
    """A checkpoint is not as it was written; the message says in one line what is wrong."""


class Checkpoints:
    """The checkpoints in one directory, a numbered directory for each step.

    With `read_only` nothing is created, cleaned or moved: a run may be writing there. With several
    processes all call every method together, on one directory they share, and all see the same: a
    checkpoint that one of them finds damaged is damaged for all.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3, read_only: bool = False):
        path = epath.Path(directory)  # gs:// and the like are absolute already
        self._directory = path if "://" in str(directory) else path.expanduser().absolute()
        self._saving: tuple[int, Future[None]] | None = None
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._last_save_seconds: float | None = None
        self._verified: dict[tuple[int, frozenset[str] | None], bool | str] = {}
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

    @property
    def last_save_seconds(self) -> float | None:
        """From the start of the newest complete save to its commit, mostly in the background."""
        return self._last_save_seconds

    def save(self, step: int, trees: Mapping[str, PyTree], *, metadata: dict) -> None:
        """Starts writing `trees` as they are now; a step already saved is left alone.

        The trees hold global arrays, and each can be read without the others. `metadata` is
        whatever JSON can hold, usually the run's config and the position in its data. As soon as
        the step is committed, digests of its files are put beside them, by the same background
        thread. Raises CheckpointError if this save cannot start or the one before it failed.
        """
        if self._checkpointer is None:
            raise CheckpointError(f"{self._directory} was opened to be read only")
        self.wait()
        if step in self.steps():
            return
        started = time.monotonic()
        saved_as = {"fields": _shapes(trees), "metadata": metadata}
        try:
            response = self._checkpointer.save_checkpointables_async(
                step, dict(trees), force=True, custom_metadata=saved_as
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
        """The steps saved completely, ascending; a damaged one is among them until it is read."""

        def listed() -> list[int]:
            there = self._directory.exists()
            return sorted(orbax_utils.checkpoint_steps(self._directory)) if there else []

        try:
            steps = _agreed(listed)
        except FailedOnAHost as error:
            raise CheckpointError(f"cannot list {self._directory}: {error}") from error
        return [int(step) for step in from_all(" ".join(map(str, steps)))[0].split()]

    def metadata(self, step: int | None = None, *, trees: Collection[str] | None = None) -> dict:
        """What `save` was given as `metadata`: of `step`, or of the one `restore` would read.

        Args:
            step: its metadata alone is verified.
            trees: without a step, the names of the trees that `restore` will be asked for; None
                for all. Their files are verified now, and not again by the next `restore`.

        Raises CheckpointError if there is none, or none that is whole.
        """
        looked_into = trees if step is None else ()
        found = self._newest_whole(step, lambda each: self._whole(each, looked_into)[0])
        if found is None:
            raise CheckpointError(f"no checkpoint in {self._directory}")
        return found[1]["metadata"]

    def restore(
        self,
        abstract: Mapping[str, PyTree],
        *,
        step: int | None = None,
        warn: Callable[[str], object] = _LOGGER.warning,
    ) -> tuple[int, dict[str, PyTree]] | None:
        """Reads the newest checkpoint that is not damaged, or the one of `step`.

        Neither the mesh nor the number of processes need be those it was saved from. The files
        read are compared with their digests first; one without digests, which a kill between the
        commit and them leaves behind, is used if it can be read.

        Args:
            abstract: `jax.ShapeDtypeStruct` trees, only the ones wanted: no other is read. A leaf
                has the dtype and sharding asked for when it comes back, or lies on one device.
            step: the one to read, with no other to fall back on.
            warn: called with one line for each damaged checkpoint passed over, and with one if
                what was read could not be verified.

        Returns the step and its trees, or None where nothing is saved yet. Raises CheckpointError
        if all are damaged, or one does not fit `abstract` or the memory.
        """
        placed = {name: jax.tree.map(_placed, tree) for name, tree in abstract.items()}
        try:
            found = self._newest_whole(step, lambda each: self._read(each, placed))
        finally:
            self._verified.clear()  # files may be damaged later
        if found is None:
            return None
        whole, (trees, verified), damaged = found
        for each, reason in damaged.items():
            warn(f"skipped the damaged checkpoint {self._directory / str(each)} ({reason})")
        if not verified:
            warn(
                f"{self._directory / str(whole)} was read but could not be verified: digests of "
                "its files are missing"
            )
        if damaged and self._checkpointer is not None:
            self._set_aside(damaged)
            self._checkpointer.reload()
        return whole, trees

    def _commit(self, step: int, written: Callable[[], object], started: float) -> None:
        """Waits for Orbax, then writes the digests: work for the background thread."""
        written()  # it also ends a thread of Orbax's, which Checkpointer.wait() does not
        self._last_save_seconds = time.monotonic() - started
        directory = self._directory / str(step)
        try:
            write_digests(directory, jax.process_index(), jax.process_count())
        except Exception as error:  # the checkpoint itself is whole
            _LOGGER.warning("no digests for %s: %s", directory, _line(error))

    def _newest_whole(
        self, step: int | None, read: Callable[[int], _T]
    ) -> tuple[int, _T, dict[int, str]] | None:
        """The newest step `read` can read, what it read, and why newer ones were passed over."""
        self.wait()
        steps, damaged = self.steps(), {}
        if step is not None and step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"no checkpoint of step {step} in {self._directory}: {there}")
        for candidate in steps[::-1] if step is None else [step]:
            try:
                return candidate, read(candidate), damaged
            except FailedOnAHost as error:
                damaged[candidate] = str(error)
        if not damaged:
            return None
        told = "".join(f"; step {each}: {reason}" for each, reason in damaged.items())
        raise CheckpointError(f"no readable checkpoint in {self._directory}{told}")

    def _whole(self, step: int, trees: Collection[str] | None) -> tuple[dict, bool]:
        """What a step was saved as, and whether all its digests were there to verify it."""
        path = self._directory / str(step)
        names = None if trees is None else frozenset(trees)
        known = self._verified.get((step, names), self._verified.get((step, None)))

        def verify() -> bool:
            damage, complete = find_damage(path, trees, jax.process_index(), jax.process_count())
            if damage:
                raise _Damage(damage)
            return complete

        if known is None:
            try:
                known = _agreed(verify)
            except FailedOnAHost as error:
                known = str(error)
            self._verified[step, names] = known
        if isinstance(known, str):
            raise FailedOnAHost(known)

        def saved_as() -> dict:
            saved = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
            return {"fields": saved["fields"], "metadata": saved["metadata"]}

        return _agreed(saved_as), known

    def _read(self, step: int, abstract: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], bool]:
        path = self._directory / str(step)
        saved_as, verified = self._whole(step, abstract)

        def compare() -> None:
            differences = _differences(saved_as["fields"], abstract)
            if differences:
                more = len(differences) - _MOST_NAMED
                told = differences[:_MOST_NAMED] + ([f"and {more} more"] if more > 0 else [])
                raise CheckpointError(f"{path} is of another model: {'; '.join(told)}")
            for name in () if verified else abstract:  # `load` fails before its first barrier
                ocp.metadata(path, checkpointable_name=name)

        _agreed(compare)
        return _agreed(lambda: _load(path, abstract)), verified

    def _set_aside(self, steps: Iterable[int]) -> None:
        """Renames damaged steps: left in place they would count as kept, and never be rewritten."""

        def rename() -> None:
            for step in steps if jax.process_index() == 0 else ():
                aside = self._directory / f"{step}.damaged"
                if aside.exists():
                    aside.rmtree()
                (self._directory / str(step)).rename(aside)

        try:
            _agreed(rename)
        except FailedOnAHost as error:
            raise CheckpointError(f"cannot rename in {self._directory}: {error}") from error

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(f"step {step} was not saved to {self._directory}: {_line(error)}")


def _load(path: epath.Path, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Reads trees without waiting for other processes: one that fails must not keep them waiting.

    Orbax counts what it loads, and the counts of all processes must agree when it saves: so one
    that fails still begins to load every tree.
    """
    alone = ocp.Context()
    alone.multiprocessing.primary_host = process = ocp.multihost.process_index()
    alone.multiprocessing.active_processes = {process}
    trees, reasons, no_room = {}, [], False
    with alone:
        for name, tree in abstract.items():
            try:
                trees[name] = ocp.load(path, tree, checkpointable_name=name)
            except Exception as error:
                no_room |= isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
                reasons.append(_line(error))
    if no_room:
        raise CheckpointError(f"no room for {path}: {reasons[0]}")
    if reasons:
        raise _Damage(reasons[0])
    return trees


def _agreed(work: Callable[[], _T]) -> _T:
    return agreed(work, CheckpointError, _line)


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
    if isinstance(error, _Damage):
        return str(error)
    text = str(error).strip().partition("\n")[0].partition(" [tensorstore_spec")[0]
    text = text.partition(" See full TensorStore details")[0]
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _is_not_an_orbax_error(record: logging.LogRecord) -> bool:
    """Drops Orbax's errors, never its warnings: each is raised here too, without its traces."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname
