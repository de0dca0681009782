"""Where arrays lie on the devices: a mesh, and one object that is asked by what an array is."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from enat_jax.config import MeshConfig, Policy
from enat_jax.errors import UserError
from enat_jax.models.config import TransformerConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

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


@dataclass(frozen=True)
class Placement:
    """Where each kind of array lies, and how it gets there.

    Models are given one (or `models.layers.UNPLACED`) for their activations and blocks; programs
    ask it for the rest. Two with equal fields are equal, so that structures that hold them are.

    Attributes:
        mesh: devices along the axes `data`, `fsdp`, `tensor`.
        policy: what the axis `fsdp` shares out, see `MeshConfig`.
    """

    mesh: Mesh
    policy: Policy = "zero2"

    @classmethod
    def of(cls, cfg: MeshConfig, devices: Sequence[Any] | None = None) -> "Placement":
        """On a mesh made as a config says; errors as in `make_mesh`."""
        return cls(make_mesh(cfg, devices), cfg.placement)

    @property
    def local(self) -> "Placement":
        """The same on this process's devices alone."""
        return Placement(self.mesh.local_mesh, self.policy)

    @property
    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, P())

    @property
    def batch(self) -> NamedSharding:
        """The first axis over all devices that hold different images."""
        return NamedSharding(self.mesh, P(BATCH_AXES))

    @property
    def batch_shards(self) -> int:
        """How many shares a batch is split into."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def check_attention(self, model: TransformerConfig) -> None:
        """Raises UserError where the axis `tensor` does not divide heads, or cuDNN has no GPU."""
        if model.num_heads % self.mesh.shape["tensor"]:
            raise UserError(
                f"config: mesh.tensor = {self.mesh.shape['tensor']} must divide model.num_heads ="
                f" {model.num_heads}"
            )
        platform = self.mesh.devices.flat[0].platform
        if model.attention == "cudnn" and platform in ("cpu", "tpu"):
            raise UserError(
                f"config: model.attention = 'cudnn' needs an NVIDIA GPU, not a {platform}:"
                " --config.model.attention=xla"
            )

    # Between steps.

    def state(self, parts: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """The shardings of a training state between steps, part by part.

        A part whose name ends in `opt_state` is an optimiser's.
        """
        placed = {}
        for part, tree in parts.items():
            share = self._shards_weights or (self.policy == "zero1" and part.endswith("opt_state"))
            placed[part] = self._by_rules(tree, lambda name, share=share: share)
        return placed

    def params(self, abstract: PyTree) -> PyTree:
        """Shapes of parameters with the shardings that they have between steps."""
        placed = self.state({"params": abstract})["params"]
        return jax.tree.map(lambda leaf, where: leaf.update(sharding=where), abstract, placed)

    # Within a program.

    def weights(self, params: PyTree) -> PyTree:
        """Parameters as they lie within a step, gathered at its start.

        Embeddings are gathered at once even with `fsdp`: rows cannot be looked up in parts of them.
        """
        if not self._shards_weights:
            return params
        sharded = self._by_rules(
            params,
            lambda name: _stays_sharded(name) or (self.policy == "fsdp" and "kernel" in name),
        )
        return jax.lax.with_sharding_constraint(params, sharded)

    def block(self, block: Any) -> Any:
        """A block of a stack where it is used.

        Its gradients are split there and then, so that what devices exchange is their sum's share,
        not the sum; with `fsdp` its weights are gathered.
        """
        if self.policy == "replicated":
            return block

        def one(leaf: Array, sharded: NamedSharding, gathered: NamedSharding) -> Array:
            return _constrained(leaf, gathered if self.policy == "fsdp" else None, sharded)

        graphdef, state = nnx.split(block)
        gathered = self._by_rules(state, _stays_sharded)
        return nnx.merge(graphdef, jax.tree.map(one, state, self._by_rules(state), gathered))

    def gradients(self, grads: PyTree) -> PyTree:
        """Gradients of all parameters, as the optimiser's state lies."""
        if self.policy == "replicated":
            return grads
        return jax.lax.with_sharding_constraint(grads, self._by_rules(grads))

    def activations(self, x: Array, how: Literal["rows", "columns", "whole"]) -> Array:
        """Activations of images.

        By `rows`: split by images alone. Where weights are split, adaLN's stay so: its input is
        then `whole` on the devices that share them, and its output first split by `columns`.
        """

        def lay(x: Array, *axes: Any) -> Array:
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*axes)))

        shape, between = self.mesh.shape, [None] * (x.ndim - 2)
        if how == "rows" or not self._shards_weights:
            return lay(x, BATCH_AXES)
        if how == "whole" or x.shape[-1] % (shape["tensor"] * shape["fsdp"]):
            return lay(x, "data")
        x = lay(x, "data", *between, ("tensor", "fsdp"))
        return lay(x, BATCH_AXES, *between, "tensor")  # one exchange: rows for columns

    def map_in_chunks(self, function: Callable[[Any], Any], batch: Array, at_once: int) -> PyTree:
        """Applies a function of a batch to a few items of every device at a time.

        It saves memory; and since a device always meets the same number of items, filled up with
        zeros at the end, an item's result does not depend on the size of the batch.

        Args:
            function: of arrays with the items along the first axis, to a tree of such arrays.
            batch: its first axis lies as `self.batch` says.
            at_once: items of a device in a call of the function.
        """
        shards = self.batch_shards
        local = len(batch) // shards

        def some(part: Array) -> PyTree:
            made = function(rearrange(part, "s b ... -> (s b) ..."))
            return jax.tree.map(lambda x: rearrange(x, "(s b) ... -> s b ...", s=shards), made)

        # devices hold neighbouring items: each chunk takes some of every device's
        rows = rearrange(batch, "(s l) ... -> s l ...", s=shards)
        filled = jnp.pad(rows, [(0, 0), (0, -local % at_once)] + [(0, 0)] * (rows.ndim - 2))
        made = jax.lax.map(some, rearrange(filled, "s (m b) ... -> m s b ...", b=at_once))

        def joined(x: Array) -> Array:
            rows = rearrange(x, "m s b ... -> s (m b) ...")[:, :local]
            return rearrange(rows, "s l ... -> (s l) ...")

        return jax.tree.map(joined, made)

    # From processes to devices.

    def put(self, tree: PyTree, sharding: PyTree = None) -> PyTree:
        """Puts on the mesh what every process holds alike, or what lies on it otherwise.

        `sharding` is that of all leaves, or a tree of each one's; replicated by default.
        """
        where = self.replicated if sharding is None else sharding
        if isinstance(where, Sharding):
            return jax.tree.map(lambda value: _put(value, where), tree)
        return jax.tree.map(_put, tree, where)

    def own_rows(self, count: int) -> Int[np.ndarray, " r"]:
        """Which rows of a batch of `count` lie on this process's devices, ascending."""
        where = self.batch.addressable_devices_indices_map((count,))
        spans = {index[0].indices(count)[:2] for index in where.values() if index is not None}
        return np.concatenate([np.arange(*span) for span in sorted(spans)])

    def put_batch(self, own: np.ndarray, count: int) -> Array:
        """A batch of `count` rows on the mesh, from every process's `own_rows(count)` of it."""
        shape = (count, *own.shape[1:])
        return jax.make_array_from_process_local_data(self.batch, own, shape)

    @property
    def _shards_weights(self) -> bool:
        return self.policy in ("zero2", "fsdp")

    def _by_rules(self, tree: PyTree, sharded: Callable[[str], bool] = lambda name: True) -> PyTree:
        """The sharding of every leaf by `RULES`; `sharded` tells where `fsdp` shares a leaf out."""

        def sharding(path: Any, leaf: Any) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            axes = next(axes for pattern, axes in RULES if re.search(pattern, name))
            if leaf.ndim < len(axes):
                return self.replicated
            share = sharded(name)
            spec: list[Any] = [None] * (leaf.ndim - len(axes))
            for axis, size in zip(axes, leaf.shape[leaf.ndim - len(axes) :], strict=True):
                names = axis if isinstance(axis, tuple) else (axis,)
                names = [name for name in names if name and (share or name != "fsdp")]
                fits = size % math.prod(self.mesh.shape[name] for name in names) == 0
                spec.append(tuple(names) if names and fits else None)
            return NamedSharding(self.mesh, P(*spec))

        return jax.tree_util.tree_map_with_path(sharding, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _constrained(x: Array, forward: NamedSharding | None, backward: NamedSharding) -> Array:
    """The same array, laid out as asked; its gradient too."""
    return x if forward is None else jax.lax.with_sharding_constraint(x, forward)


_constrained.defvjp(
    lambda x, forward, backward: (_constrained(x, forward, backward), None),
    lambda forward, backward, _, g: (jax.lax.with_sharding_constraint(g, backward),),
)


def _stays_sharded(name: str) -> bool:
    return "modulation" in name


def _put(value: Any, where: Sharding) -> Array:
    lies_on_the_mesh = isinstance(value, jax.Array) and not value.is_fully_addressable
    if lies_on_the_mesh or where.is_fully_addressable:
        return jax.device_put(value, where)
    if jnp.issubdtype(jnp.asarray(value).dtype, jax.dtypes.prng_key):
        words = _put(jax.random.key_data(value), where)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(value))
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])
