"""The same run on any mesh, of one process or of two."""

import numpy as np
import pytest

from tests.support.on_hosts import on_devices, on_two_hosts

pytestmark = pytest.mark.slow

# data, fsdp, tensor, placement; a mesh of one device is what the others are compared with
ALONE = "1,1,1,zero2"
EIGHT = [
    "8,1,1,zero2", "1,8,1,zero2", "2,2,2,zero2", "1,8,1,zero1", "2,2,2,fsdp", "1,8,1,fsdp",
    "2,4,1,replicated",
]  # fmt: skip
TWO_PROCESSES = ["1,4,1,zero2", "1,2,2,fsdp"]  # of two devices each

TWENTY_STEPS = """
from enat_jax.config import load_config
from enat_jax.data.batches import training_batches
from enat_jax.parallel.placement import Placement
from enat_jax.data.batches import Share
from enat_jax.training.programs import TrainingPrograms

out, meshes, *fields = arguments
for spec in meshes.split():
    data, fsdp, tensor, policy = spec.split(",")
    config = load_config("configs/digits.py", [
        *fields, "train.batch_size=16", "train.steps=20", "train.programs=2",
        "optim.learning_rate=2e-3", f"mesh.data={data}", f"mesh.fsdp={fsdp}",
        f"mesh.tensor={tensor}", f"mesh.placement={policy}"])
    devices = jax.devices()[: int(data) * int(fsdp) * int(tensor)]
    placement = Placement.of(config.mesh, devices)
    programs = TrainingPrograms(config, placement)
    batches = training_batches(config.data, Share(16, placement.own_rows(16)), seed=0)
    state, key = programs.initial_state(), placement.put(jax.random.key(0))
    losses = []
    for step in range(20):
        state, metrics = programs.step(step, state, next(batches), key)
        losses.append(metrics["loss"])
    # moments and EMA lie as their parameters; with zero1 the moments alone are sharded
    def flat(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    params, ema, moments = flat(state.params), flat(state.ema), flat(state.opt_state)
    sharded = 0
    for name, leaf in params.items():
        own = [x for key, x in moments.items() if key.endswith(name)]
        assert ema[name].sharding == leaf.sharding, name
        assert len(own) == 2, name
        for moment in own:
            sharded += "fsdp" in str(moment.sharding.spec)
            if policy != "zero1":
                assert moment.sharding == leaf.sharding, name
    assert bool(sharded) == (policy != "replicated"), sharded
    gather = jax.jit(lambda x: x, out_shardings=placement.replicated)
    leaves = jax.tree.leaves(gather((state.params, state.ema, losses)))
    if jax.process_index() == 0:
        np.savez(f"{out}/{spec}.npz", *map(np.asarray, leaves))
"""


def arrays(folder, mesh):
    return list(np.load(folder / f"{mesh}.npz").values())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_overrides):
    folder = tmp_path_factory.mktemp("alone")
    on_devices(TWENTY_STEPS, folder, ALONE, *tiny_overrides, devices=1)
    return arrays(folder, ALONE)


@pytest.mark.parametrize("meshes", [EIGHT, TWO_PROCESSES], ids=["alone", "two_processes"])
def test_twenty_steps_on_any_mesh_are_those_of_one_device(alone, tmp_path, tiny_overrides, meshes):
    assert alone[-1] < alone[-20] - 0.05  # the losses are last
    arguments = (TWENTY_STEPS, tmp_path, " ".join(meshes), *tiny_overrides)
    if meshes is EIGHT:
        on_devices(*arguments, devices=8)
    else:
        on_two_hosts(*arguments)
    for mesh in meshes:
        for ours, theirs in zip(arrays(tmp_path, mesh), alone, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.max(np.abs(theirs)))
