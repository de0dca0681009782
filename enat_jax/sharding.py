"""Where arrays lie on the devices: the mesh, and placement by path rules."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from enat_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 for one axis means all that are left.

    Attributes:
        data: copies of the model, each with its share of the batch.
        fsdp: shares of every large parameter, and of the batch.
        tensor: shares of heads and of the MLP's hidden width.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


# path of a parameter -> how its last two axes lie on the mesh; the first match counts
RULES = (
    (r"(query|own_key_value|context_key_value|up|modulation)\.kernel$", ("fsdp", "tensor")),
    (r"(out|down)\.kernel$", ("tensor", "fsdp")),
    (r"linear\.kernel$", ("fsdp", None)),
    (r"(word|position|class_embedding)$", (None, "fsdp")),  # an odd number of rows: one is extra
    (r"", ()),
)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of axes data, fsdp, tensor.

    Raises:
        UserError: the axes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {tuple(sizes)}: sizes must be at least 1, and at most one -1")
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(len(devices) // rest, 1)
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh data={cfg.data}, fsdp={cfg.fsdp}, tensor={cfg.tensor} needs"
            f" {math.prod(sizes)} devices, there are {len(devices)}"
        )
    names = ("data", "fsdp", "tensor")
    return Mesh(np.array(devices).reshape(sizes), names, axis_types=(AxisType.Auto,) * 3)


def place(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a tree of parameters (or shaped like them), by path rules."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = (
            ".".join(str(getattr(part, "key", getattr(part, "name", ""))) for part in path)
            .removesuffix(".value")
            .rstrip(".")
        )
        axes = next(axes for pattern, axes in RULES if re.search(pattern, name))
        if leaf.ndim < len(axes):
            return NamedSharding(mesh, P())
        sizes = leaf.shape[leaf.ndim - len(axes) :]
        fitting = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, sizes, strict=True)
        ]
        return NamedSharding(mesh, P(*[None] * (leaf.ndim - len(axes)), *fitting))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices that hold different images."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def constrain_activations(mesh: Mesh) -> Callable[[Array], Array]:
    """Keeps activations split by rows alone; for the callable that a model is given."""
    return lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def map_in_chunks(function: Callable[[Any], Any], batch: Array, mesh: Mesh, at_once: int) -> PyTree:
    """Applies a function of a batch to a few items of every device at a time.

    It saves memory; and since a device always meets the same number of items, filled up with
    zeros at the end, an item's result does not depend on the size of the batch.

    Args:
        function: of arrays with the items along the first axis, to a tree of such arrays.
        batch: its first axis lies as `batch_sharding` says.
        mesh: the devices.
        at_once: items of a device in a call of the function.
    """
    shards = batch_shards(mesh)
    local = len(batch) // shards

    def some(part: Array) -> PyTree:
        made = function(rearrange(part, "s b ... -> (s b) ..."))
        return jax.tree.map(lambda x: rearrange(x, "(s b) ... -> s b ...", s=shards), made)

    # devices hold neighbouring items: each chunk takes some of every device's
    rows = rearrange(batch, "(s l) ... -> s l ...", s=shards)
    filled = jnp.pad(rows, [(0, 0), (0, -local % at_once)] + [(0, 0)] * (rows.ndim - 2))
    parts = rearrange(filled, "s (m b) ... -> m s b ...", b=at_once)
    made = jax.lax.map(some, parts)

    def joined(x: Array) -> Array:
        rows = rearrange(x, "m s b ... -> s (m b) ...")[:, :local]
        return rearrange(rows, "s l ... -> (s l) ...")

    return jax.tree.map(joined, made)


def batch_shards(mesh: Mesh) -> int:
    """How many shares a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
