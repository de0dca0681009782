"""Where a run goes on: the newest intact checkpoint of its workdir, if it is of the same run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.errors import differences


class Resumed(NamedTuple):
    """What a checkpoint gives back: steps done, trees by name, images taken from the data."""

    step: int
    trees: dict[str, PyTree]
    images: int


def resume(
    checkpoints: Checkpoints,
    abstract: Mapping[str, PyTree],
    sharding: Mapping[str, PyTree],
    *,
    config: Mapping[str, Any],
    sections: tuple[str, ...],
    may_differ: tuple[str, ...],
    stream: Mapping[str, Any],
    say: Callable[[str], object],
) -> Resumed | None:
    """The newest intact checkpoint of a run, on this mesh and these hosts, whatever wrote it.

    Args:
        checkpoints: the workdir's.
        abstract: the shapes of the trees wanted.
        sharding: where their leaves are to lie.
        config: of this run, as `dataclasses.asdict` gives it.
        sections: those that say what the model is, which must be as saved.
        may_differ: their fields that only say how it computes.
        stream: what decides the order of the data, which must be as saved.
        say: called with lines for the user.

    Returns:
        None where nothing is saved yet.

    Raises:
        CheckpointError: a checkpoint of another model or of other data, or no readable one.
    """
    if not checkpoints.steps():
        return None
    metadata = checkpoints.metadata()
    saved, position = metadata.get("config", {}), metadata.get("position", {})
    here = {
        section: {name: value for name, value in config[section].items() if name not in may_differ}
        for section in sections
    }
    there = {
        section: {name: value for name, value in saved.get(section, {}).items() if name in fields}
        for section, fields in here.items()
    }
    if phrases := differences(there, here):
        raise CheckpointError(f"the workdir holds another model: {phrases}")
    if phrases := differences({name: position.get(name) for name in stream}, stream):
        raise CheckpointError(
            f"the workdir's run is in the middle of other data: {phrases}; give a new run a workdir"
            " of its own"
        )
    placed = {
        name: jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            tree,
            sharding[name],
        )
        for name, tree in abstract.items()
    }
    restored = checkpoints.restore(placed, warn=say)
    if restored is None:
        return None
    step, trees = restored
    say(f"resuming from step {step}")
    return Resumed(step, trees, checkpoints.metadata(step)["position"]["images"])
