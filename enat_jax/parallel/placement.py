"""Where arrays lie on the devices: the mesh, and placement by path rules."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from enat_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Placement = Literal["replicated", "zero1", "zero2", "fsdp"]

# what a placement splits over the axis `fsdp` between steps: names of a training state's parts
_SPLIT: dict[str, Callable[[str], bool]] = {
    "replicated": lambda part: False,
    "zero1": lambda part: part.endswith("opt_state"),
    "zero2": lambda part: True,
    "fsdp": lambda part: True,
}


_SPLIT_WEIGHTS = ("zero2", "fsdp")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 for one axis means all that are left.

    Attributes:
        data: copies of the model, each with its share of the batch.
        fsdp: shares of every large parameter, as `placement` says, and of the batch.
        tensor: shares of heads and of the MLP's hidden width.
        placement: what the axis `fsdp` shares out. `replicated`: nothing. `zero1`: the optimiser's
            state and the gradients. `zero2`: parameters and their moving average as well, gathered
            once at the start of a step, in the activations' type. `fsdp`: the same, but gathered
            layer by layer, each time they are used: the least memory.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    placement: Placement = "zero2"


# path of a parameter -> how its last axes lie on the mesh; the first match counts
RULES = (
    (r"key_value\.kernel$", ("fsdp", None, "tensor")),
    (r"(query|up)\.kernel$", ("fsdp", "tensor")),
    (r"(out|down)\.kernel$", ("tensor", "fsdp")),
    (r"linear\.kernel$", ("fsdp", "tensor")),
    # never gathered: every device makes some columns of all images' vectors
    (r"modulation\.kernel$", (None, ("tensor", "fsdp"))),
    (r"kernel$", ("fsdp",)),  # convolutions, by output channel
    (r"(word|position|class_embedding)$", (None, "fsdp")),  # an odd number of rows: one is extra
    (r"", ()),
)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of axes data, fsdp, tensor, neighbours along an axis near each other.

    Where the devices are several slices (TPUs) or nodes, joined by a slower network, `data` runs
    across them first, `fsdp` with what is left, `tensor` never.

    Raises:
        UserError: the axes do not fit the number of devices or of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {tuple(sizes)}: sizes must be at least 1, and at most one -1")
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(len(devices) // rest, 1)
    asked = f"mesh data={cfg.data}, fsdp={cfg.fsdp}, tensor={cfg.tensor}"
    if math.prod(sizes) != len(devices):
        raise UserError(f"{asked} needs {math.prod(sizes)} devices, there are {len(devices)}")
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    across = []  # slices along each axis
    for size in sizes[:2]:
        across.append(math.gcd(size, slices // math.prod(across)))
    if math.prod(across) != slices:
        raise UserError(
            f"{asked}: {slices} slices or nodes must divide data x fsdp, {sizes[0]} x {sizes[1]}"
        )
    within = [size // more for size, more in zip(sizes, (*across, 1), strict=True)]
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(within, (*across, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=devices[0].platform == "tpu"
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_heads(mesh: Mesh, num_heads: int) -> None:
    """Refuses attention heads that the axis `tensor` cannot share.

    Raises:
        UserError: it does not divide them.
    """
    if num_heads % mesh.shape["tensor"]:
        raise UserError(
            f"config: mesh.tensor = {mesh.shape['tensor']} must divide model.num_heads ="
            f" {num_heads}"
        )


def place(tree: Any, mesh: Mesh, *, split: Callable[[str], bool] = lambda name: True) -> Any:
    """The sharding of every leaf of a tree of parameters (or shaped like them), by path rules.

    Args:
        tree: arrays or their shapes.
        mesh: the devices.
        split: by a leaf's name, whether the axis `fsdp` shares it out.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = (
            ".".join(str(getattr(part, "key", getattr(part, "name", ""))) for part in path)
            .removesuffix(".value")
            .rstrip(".")
        )
        whole = not split(name)
        axes = next(axes for pattern, axes in RULES if re.search(pattern, name))
        if leaf.ndim < len(axes):
            return NamedSharding(mesh, P())
        sizes = leaf.shape[leaf.ndim - len(axes) :]
        fitting = [
            tuple(name for name in _names(axis) if not (whole and name == "fsdp")) for axis in axes
        ]
        fitting = [
            names if size % math.prod(mesh.shape[name] for name in names) == 0 else ()
            for names, size in zip(fitting, sizes, strict=True)
        ]
        fitting = [names[0] if len(names) == 1 else names or None for names in fitting]
        return NamedSharding(mesh, P(*[None] * (leaf.ndim - len(axes)), *fitting))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def place_parts(parts: Mapping[str, Any], mesh: Mesh, placement: Placement) -> dict[str, Any]:
    """The shardings of a training state between steps, part by part.

    Args:
        parts: trees by name; a name that ends in `opt_state` is an optimiser's.
        mesh: the devices.
        placement: what `fsdp` shares out.
    """
    return {
        part: place(tree, mesh, split=lambda _, part=part: _SPLIT[placement](part))
        for part, tree in parts.items()
    }


def gather_weights(mesh: Mesh, placement: Placement) -> Callable[[PyTree], PyTree]:
    """What a step does first with parameters, so that they lie as `placement` has it in a step.

    Embeddings are gathered at once even with `fsdp`: rows cannot be looked up in parts of them.
    """

    def split(name: str) -> bool:
        return _stays_split(name) or (placement == "fsdp" and "kernel" in name)

    def gather(params: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(params, place(params, mesh, split=split))

    return gather if placement in _SPLIT_WEIGHTS else lambda params: params


def place_block(mesh: Mesh, placement: Placement) -> Callable[[Any], Any]:
    """What a step does with a block of a stack where it is used; for the model's callable.

    Its gradients are split there and then, so that what devices exchange is their sum's share, not
    the sum; with `fsdp` its weights are gathered.
    """

    def one(leaf: Array, split: NamedSharding, whole: NamedSharding) -> Array:
        return _constrained(leaf, whole if placement == "fsdp" else None, split)

    def place_leaves(block: Any) -> Any:
        graphdef, state = nnx.split(block)
        split = place(state, mesh)
        whole = place(state, mesh, split=_stays_split)
        return nnx.merge(graphdef, jax.tree.map(one, state, split, whole))

    return (lambda block: block) if placement == "replicated" else place_leaves


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _constrained(x: Array, forward: NamedSharding | None, backward: NamedSharding) -> Array:
    """The same array, laid out as asked; its gradient too."""
    return x if forward is None else jax.lax.with_sharding_constraint(x, forward)


_constrained.defvjp(
    lambda x, forward, backward: (_constrained(x, forward, backward), None),
    lambda forward, backward, _, g: (jax.lax.with_sharding_constraint(g, backward),),
)


def _stays_split(name: str) -> bool:
    return "modulation" in name


def split_gradients(mesh: Mesh, placement: Placement) -> Callable[[PyTree], PyTree]:
    """What a step does with all gradients, so that they lie as the optimiser's state does."""

    def split(grads: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(grads, place(grads, mesh))

    return (lambda grads: grads) if placement == "replicated" else split


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices that hold different images."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def put(tree: Any, sharding: Any) -> Any:
    """Puts values that every host holds alike on a mesh of any number of hosts.

    Args:
        tree: NumPy arrays, numbers, keys, or arrays of this host's devices.
        sharding: of all leaves, or a tree of each one's.
    """
    if isinstance(sharding, Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)

    def one(value: Any, where: NamedSharding) -> Array:
        if where.is_fully_addressable:
            return jax.device_put(value, where)
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            return _relay(where)(value)  # it lies on the mesh already
        if jnp.issubdtype(jnp.asarray(value).dtype, jax.dtypes.prng_key):
            words = one(jax.random.key_data(value), where)
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(value))
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(one, tree, sharding)


@functools.cache
def _relay(where: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=where)


@functools.lru_cache(maxsize=64)
def own_rows(mesh: Mesh, count: int) -> Int[np.ndarray, " r"]:
    """Which rows of a batch of `count` lie on this host's devices, ascending."""
    where = batch_sharding(mesh).addressable_devices_indices_map((count,))
    spans = {index[0].indices(count)[:2] for index in where.values() if index is not None}
    return np.concatenate([np.arange(*span) for span in sorted(spans)])


def place_batch(own: np.ndarray, mesh: Mesh, count: int) -> Array:
    """A batch on the mesh, from the rows that every host has of it.

    Args:
        own: the rows that `own_rows(mesh, count)` names, in that order.
        mesh: the devices.
        count: rows of the whole batch.
    """
    where = batch_sharding(mesh)
    if where.is_fully_addressable:
        return jax.device_put(own, where)
    rows = own_rows(mesh, count)

    def shard(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(count)
        first = int(np.searchsorted(rows, start))
        return own[first : first + stop - start]

    return jax.make_array_from_callback((count, *own.shape[1:]), where, shard)


def constrain_activations(mesh: Mesh, placement: Placement) -> Callable[[Array, str], Array]:
    """How activations lie; for the callable that a model is given.

    By `rows`: split by images alone. Where weights are split, adaLN's stay so: its input is then
    `whole` on the devices that share them, and its output first split by `columns`.
    """

    def lay(x: Array, *axes: Any) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))

    def constrain(x: Array, how: str) -> Array:
        between = [None] * (x.ndim - 2)
        if how == "rows" or placement not in _SPLIT_WEIGHTS:
            return lay(x, BATCH_AXES)
        if how == "whole" or x.shape[-1] % (mesh.shape["tensor"] * mesh.shape["fsdp"]):
            return lay(x, "data")
        x = lay(x, "data", *between, ("tensor", "fsdp"))
        return lay(x, BATCH_AXES, *between, "tensor")  # one exchange: rows for columns

    return constrain


def batch_shards(mesh: Mesh) -> int:
    """How many shares a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
