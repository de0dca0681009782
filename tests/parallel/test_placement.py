import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from enat_jax.config import OptimConfig
from enat_jax.errors import UserError
from enat_jax.models.enat.block import Block
from enat_jax.models.enat.network import ENATConfig
from enat_jax.models.layers import UNPLACED
from enat_jax.models.networks import abstract_params
from enat_jax.parallel.placement import MeshConfig, Placement, make_mesh
from enat_jax.training.optim import make_optimizer
from tests.support.on_hosts import on_two_hosts


def fake_devices(count):
    """Stand-ins for devices: deciding where arrays lie only counts them."""
    return jax.devices()[:1] * count


def placement_of(*, data=1, fsdp=1, tensor=1, policy="zero2"):
    """On devices that need not be there."""
    cfg = MeshConfig(data, fsdp, tensor, policy)
    return Placement.of(cfg, fake_devices(data * fsdp * tensor))


def specs(tree, placement):
    """Where the leaves of a tree lie between steps, by dotted name."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(placement.params(tree)):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        spec = tuple(leaf.sharding.spec)
        named[name] = (spec + (None,) * (leaf.ndim - len(spec)), leaf)
    return named


@pytest.fixture(scope="module")
def params():
    """ENAT-B's parameters by shape, with the published, odd, numbers of rows."""
    return abstract_params(ENATConfig())[1]


class TestMesh:
    @pytest.mark.parametrize(
        ("cfg", "sizes"),
        [
            (MeshConfig(), (8, 1, 1)),
            (MeshConfig(fsdp=2), (4, 2, 1)),
            (MeshConfig(fsdp=2, tensor=2), (2, 2, 2)),
            (MeshConfig(data=1, fsdp=-1), (1, 8, 1)),
            (MeshConfig(data=2, fsdp=2, tensor=-1), (2, 2, 2)),
            (MeshConfig(data=1, fsdp=2, tensor=4), (1, 2, 4)),
        ],
    )
    def test_what_is_left_open_is_filled_with_the_devices_left(self, cfg, sizes):
        assert tuple(make_mesh(cfg, fake_devices(8)).shape.values()) == sizes

    def test_one_device_is_a_mesh_too(self):
        assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {
            "data": 1,
            "fsdp": 1,
            "tensor": 1,
        }

    @pytest.mark.parametrize(
        ("cfg", "message"),
        [
            (MeshConfig(data=3), "data=3, fsdp=1, tensor=1 needs 3 devices, there are 8"),
            (MeshConfig(fsdp=3), "data=-1, fsdp=3, tensor=1 needs 6 devices, there are 8"),
            (MeshConfig(fsdp=16), "needs 16 devices, there are 8"),
            (MeshConfig(fsdp=-1), r"\(-1, -1, 1\): sizes must be at least 1, and at most one -1"),
            (MeshConfig(tensor=0), r"\(-1, 1, 0\): sizes must be at least 1"),
            (MeshConfig(tensor=-2), r"\(-1, 1, -2\): sizes must be at least 1"),
        ],
    )
    def test_sizes_that_do_not_fit_the_devices_are_refused(self, cfg, message):
        with pytest.raises(UserError, match=message):
            make_mesh(cfg, fake_devices(8))

    def test_a_batch_is_split_over_data_and_fsdp_alone(self):
        placement = placement_of(data=2, fsdp=3, tensor=4)
        assert placement.batch_shards == 6
        assert placement.batch.spec == P(("data", "fsdp"))
        assert placement.replicated.spec == P()


class TestParameters:
    @pytest.mark.parametrize(
        ("name", "spec"),
        [
            ("encoder.attention.query.kernel", (None, "fsdp", "tensor")),
            ("encoder.attention.own_key_value.kernel", (None, "fsdp", None, "tensor")),
            ("decoder.attention.context_key_value.kernel", (None, "fsdp", None, "tensor")),
            ("encoder.attention.out.kernel", (None, "tensor", "fsdp")),
            ("encoder.mlp.up.kernel", (None, "fsdp", "tensor")),
            ("encoder.mlp.down.kernel", (None, "tensor", "fsdp")),
            ("encoder.modulation.kernel", (None, None, ("tensor", "fsdp"))),
            ("reuse_projection.mlp.up.kernel", ("fsdp", "tensor")),
            ("head.linear.kernel", ("fsdp", "tensor")),
            ("embedding.word", (None, "fsdp")),
            ("embedding.position", (None, "fsdp")),
            ("class_embedding", (None, "fsdp")),
            ("encoder.mlp.up.bias", (None, None)),
            ("embedding.norm.scale", (None,)),
            ("head.bias", (None,)),
        ],
    )
    def test_a_parameter_lies_where_its_rule_says(self, params, name, spec):
        assert specs(params, placement_of(data=2, fsdp=2, tensor=2))[name][0] == spec

    @pytest.mark.parametrize("fsdp", [2, 4, 8])
    def test_every_large_parameter_is_shared_out(self, params, fsdp):
        # large: above 64 KiB in one block; a stack is sliced into its blocks
        for name, (spec, leaf) in specs(params, placement_of(fsdp=fsdp)).items():
            spec = [part for axis in spec for part in (axis if isinstance(axis, tuple) else [axis])]
            stacked = name.startswith(("encoder.", "decoder."))
            size = 4 * leaf.size // (leaf.shape[0] if stacked else 1)
            assert ("fsdp" in spec) == (size > 64 * 1024), f"{name} {leaf.shape}: {spec}"

    def test_what_a_device_holds_shrinks_with_their_number(self, params):
        leaves = jax.tree.leaves(placement_of(fsdp=8).params(params))
        held = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves)
        assert held < 1.02 * sum(leaf.size for leaf in leaves) / 8

    def test_a_stack_is_never_cut_between_blocks(self, params):
        for name, (spec, _) in specs(params, placement_of(fsdp=5, tensor=3)).items():
            if name.startswith(("encoder.", "decoder.")):
                assert spec[0] is None

    def test_an_axis_that_does_not_divide_stays_whole(self, params):
        spec, leaf = specs(params, placement_of(fsdp=5))["encoder.mlp.up.kernel"]
        assert leaf.shape == (15, 768, 3072)
        assert spec == (None, None, "tensor")

    def test_moments_and_average_lie_as_their_parameters(self, params):
        placement = placement_of(data=2, fsdp=2, tensor=2)
        optimizer = make_optimizer(OptimConfig(max_grad_norm=1.0), 1e-3)
        trees = {"params": params, "ema": params, "opt": jax.eval_shape(optimizer.init, params)}
        found = specs(trees, placement)
        placed = {name.partition(".")[2]: spec for name, (spec, _) in found.items()
                  if name.startswith("params.")}  # fmt: skip
        moments = 0
        for name, (spec, leaf) in found.items():
            if leaf.ndim:
                own = max((each for each in placed if name.endswith(f".{each}")), key=len)
                assert spec == placed[own], name
                moments += name.startswith("opt.")
            else:
                assert spec == ()
        assert moments == 2 * len(placed)


class TestPolicies:
    def parts(self, params):
        optimizer = make_optimizer(OptimConfig(), 1e-3)
        return {
            "params": params,
            "ema": params,
            "opt_state": jax.eval_shape(optimizer.init, params),
        }

    @pytest.mark.parametrize(
        ("policy", "shared"),
        [
            ("replicated", set()),
            ("zero1", {"opt_state"}),
            ("zero2", {"params", "ema", "opt_state"}),
            ("fsdp", {"params", "ema", "opt_state"}),
        ],
    )
    def test_a_policy_shares_out_the_parts_it_names_and_no_others(self, params, policy, shared):
        placement = placement_of(fsdp=4, tensor=2, policy=policy)
        found = placement.state(self.parts(params))
        for part, shardings in found.items():
            axes = {str(where.spec) for where in jax.tree.leaves(shardings)}
            assert any("fsdp" in each for each in axes) == (part in shared), part
            assert any("tensor" in each for each in axes), part

    @pytest.mark.parametrize("policy", ["replicated", "zero1", "zero2", "fsdp"])
    def test_placing_within_a_step_changes_no_value_and_no_gradient(self, policy):
        placement = placement_of(policy=policy)
        x = jnp.arange(12.0).reshape(2, 2, 3)
        for how in ("rows", "columns", "whole"):
            assert (placement.activations(x, how) == x).all()
        block = Block(ENATConfig(width=8, num_heads=2), reads_context=True, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(block)

        def loss(state, placement):
            placed = placement.block(nnx.merge(graphdef, placement.weights(state)))
            leaves = jax.tree.leaves(nnx.state(placed))
            return sum(jnp.sum(jnp.sin(leaf) * (i + 1)) for i, leaf in enumerate(leaves))

        ours, plain = (jax.grad(loss)(state, where) for where in (placement, UNPLACED))
        ours = placement.gradients(ours)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            assert (a == b).all()


class Chip:
    """A stand-in for a device of several slices."""

    platform, device_kind = "gpu", "chip"

    def __init__(self, number, slice_index):
        self.id = self.process_index = number
        self.slice_index = slice_index

    def __repr__(self):
        return f"{self.slice_index}.{self.id}"


class TestSlices:
    def chips(self, slices, each):
        return [Chip(i, i // each) for i in range(slices * each)]

    @pytest.mark.parametrize(
        ("cfg", "along"),
        [
            (MeshConfig(data=2, fsdp=4), "data"),
            (MeshConfig(data=4, fsdp=2), "data"),
            (MeshConfig(data=1, fsdp=8), "fsdp"),
            (MeshConfig(data=1, fsdp=2, tensor=4), "fsdp"),
        ],
    )
    def test_data_crosses_slices_first_and_tensor_never(self, cfg, along):
        grid = make_mesh(cfg, self.chips(2, 4)).devices
        slices = np.vectorize(lambda chip: chip.slice_index)(grid)
        assert (slices == slices[:, :, :1]).all()
        axis = ("data", "fsdp").index(along)
        halves = np.split(slices, 2, axis=axis)
        assert {int(half.min()) for half in halves} == {0, 1}
        assert all((half == half.min()).all() for half in halves)

    def test_a_mesh_whose_tensor_axis_would_cross_slices_is_refused(self):
        with pytest.raises(UserError, match="3 slices or nodes must divide data x fsdp, 1 x 1"):
            make_mesh(MeshConfig(data=1, fsdp=1, tensor=6), self.chips(3, 2))


def test_a_process_finds_its_rows_and_places_them():
    placement = placement_of()
    np.testing.assert_array_equal(placement.own_rows(6), np.arange(6))
    batch = np.arange(12).reshape(6, 2)
    np.testing.assert_array_equal(placement.put_batch(batch, 6), batch)


ROWS = """
from enat_jax.parallel.hosts import all_gather
from enat_jax.parallel.placement import MeshConfig, Placement
batch = np.arange(24).reshape(12, 2)
for cfg in (MeshConfig(), MeshConfig(data=1, fsdp=2, tensor=2)):
    placement = Placement.of(cfg)
    rows = placement.own_rows(12)
    assert rows.tolist() == list(range(6 * process, 6 * process + 6)), rows
    np.testing.assert_array_equal(all_gather(placement.put_batch(batch[rows], 12)), batch)
"""


def test_two_processes_place_the_rows_of_one_batch():
    on_two_hosts(ROWS)


def test_what_is_put_comes_back():
    placement = placement_of()
    tree = {"a": np.arange(3), "key": jax.random.key(3), "number": np.int32(5)}
    placed = placement.put(tree)
    np.testing.assert_array_equal(placed["a"], tree["a"])
    assert placed["key"] == tree["key"]
    assert placed["number"] == 5
    own = placement.put(tree, dict.fromkeys(tree, placement.replicated) | {"a": placement.batch})
    assert own["a"].sharding == placement.batch


def on_eight_devices(script, **environment):
    """Runs a script, which must end well, in a process of eight devices."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": ".",
            "PATH": "",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr


EIGHT_DEVICES = """
import dataclasses, jax, numpy as np
from enat_jax.config import load_config
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.training.programs import TrainingPrograms
assert jax.device_count() == 8
config = load_config("configs/digits.py", [
    "model.width=16", "model.num_heads=2", "model.encoder_depth=1", "train.programs=1",
    "train.batch_size=8", "train.images_per_row=1", "optim.warmup_steps=0", "train.steps=9"])
rng = np.random.default_rng(0)
batch = {"token_ids": rng.integers(17, size=(8, 64), dtype=np.int32),
         "class_ids": rng.integers(10, size=8, dtype=np.int32)}
losses = []
for cfg in (MeshConfig(data=1, fsdp=1, tensor=1), MeshConfig(data=2, fsdp=2, tensor=2)):
    devices = jax.devices()[: cfg.data * cfg.fsdp * cfg.tensor]
    run = TrainingPrograms(config, Placement.of(cfg, devices))
    state = run.initial_state()
    kernel = state.params["encoder"]["mlp"]["up"]["kernel"][...]
    shard = kernel.addressable_shards[0].data.shape
    assert shard == (4 // 4, 16 // cfg.fsdp, 64 // cfg.tensor), shard
    moment = jax.tree.leaves(state.opt_state)
    for step in range(4):
        state, metrics = run.step(step, state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert state.params["encoder"]["mlp"]["up"]["kernel"][...].sharding == kernel.sharding
one, eight = losses[:4], losses[4:]
assert one[0] != one[3]
np.testing.assert_allclose(one, eight, rtol=1e-5)
"""


@pytest.mark.slow
def test_eight_devices_take_the_same_steps_as_one():
    on_eight_devices(EIGHT_DEVICES, JAX_DISABLE_MOST_OPTIMIZATIONS="1")


CHUNKS = """
import jax, jax.numpy as jnp, numpy as np
from enat_jax.parallel.placement import MeshConfig, Placement
for shape, at_once in ((dict(data=8), 2), (dict(data=2, fsdp=2, tensor=2), 4)):
    placement = Placement.of(MeshConfig(**shape))
    items = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    seen = []
    def double(part):
        seen.append(len(part))
        return {"twice": 2 * part, "sum": part.sum(axis=1)}
    program = jax.jit(lambda x: placement.map_in_chunks(double, x, at_once))
    placed = jax.device_put(items, placement.batch)
    found = program(placed)
    np.testing.assert_array_equal(found["twice"], 2 * items)
    np.testing.assert_array_equal(found["sum"], items.sum(axis=1))
    shards = 8 if "fsdp" not in shape else 4
    assert seen[0] == shards * at_once, seen
    text = program.lower(placed).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
"""


def test_chunks_take_some_of_every_device_and_nothing_moves_between_devices():
    on_eight_devices(CHUNKS)
