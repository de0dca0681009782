"""The same run on any mesh, of one process or of two."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

# data, fsdp, tensor, placement; a mesh of one device is what the others are compared with
ALONE = (1, 1, 1, "zero2")
EIGHT = [
    (8, 1, 1, "zero2"), (1, 8, 1, "zero2"), (2, 2, 2, "zero2"), (1, 8, 1, "zero1"),
    (2, 2, 2, "fsdp"), (1, 8, 1, "fsdp"), (2, 4, 1, "replicated"),
]  # fmt: skip
TWO_PROCESSES = [(1, 8, 1, "zero2"), (2, 2, 2, "fsdp")]

TWENTY_STEPS = """
import pathlib, sys
import jax, numpy as np
from enat_jax.parallel import hosts
from enat_jax.config import load_config
from enat_jax.data.batches import training_batches
from enat_jax.parallel.placement import Placement
from enat_jax.data.stream import Share
from enat_jax.training.programs import TrainingPrograms

out, meshes, port, process = sys.argv[1], sys.argv[2].split(), sys.argv[3], int(sys.argv[4])
if port != "0":
    hosts.connect(f"127.0.0.1:{port}", 2, process, wait=120)
for spec in meshes:
    data, fsdp, tensor, policy = spec.split(",")
    config = load_config("configs/digits.py", [
        *sys.argv[5:], f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}",
        f"mesh.placement={policy}"])
    devices = jax.devices()[: int(data) * int(fsdp) * int(tensor)]
    placement = Placement.of(config.mesh, devices)
    run = TrainingPrograms(config, placement)
    batches = training_batches(config.data, Share(16, placement.own_rows(16)), seed=0)
    state, key = run.initial_state(), placement.put(jax.random.key(0))
    losses = []
    for step in range(20):
        state, metrics = run.step(step, state, next(batches), key)
        losses.append(metrics["loss"])
    # moments and average lie as their parameters; with zero1 the moments alone are split
    def flat(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    params, ema, moments = flat(state.params), flat(state.ema), flat(state.opt_state)
    split = 0
    for name, leaf in params.items():
        own = [x for key, x in moments.items() if key.endswith(name)]
        assert ema[name].sharding == leaf.sharding, name
        assert len(own) == 2, name
        for moment in own:
            split += "fsdp" in str(moment.sharding.spec)
            if policy != "zero1":
                assert moment.sharding == leaf.sharding, name
    assert bool(split) == (policy != "replicated"), split
    gather = jax.jit(lambda x: x, out_shardings=placement.replicated)
    whole = gather((state.params, state.ema, losses))
    if process == 0:
        leaves = [np.asarray(x) for x in jax.tree.leaves(whole)]
        np.savez(pathlib.Path(out) / f"{spec}.npz", *leaves)
"""


def take(tmp_path, tiny_overrides, meshes, processes=1, devices=8):
    """Runs the script in processes of so many devices; returns what each mesh came to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] if processes > 1 else 0
    env = {**os.environ, "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu",
           "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_DEFAULT_MATMUL_PRECISION": "highest",
           "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}  # fmt: skip
    names = [",".join(map(str, mesh)) for mesh in meshes]
    fields = [
        *tiny_overrides,
        "train.batch_size=16",
        "train.images_per_row=2",
        "train.steps=20",
        "optim.learning_rate=2e-3",
    ]
    command = [sys.executable, "-c", TWENTY_STEPS, str(tmp_path), " ".join(names), str(port)]
    runs = [
        subprocess.Popen([*command, str(process), *fields], env=env, stderr=-1, text=True)
        for process in range(processes)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=1500)
        assert run.returncode == 0, errors[-3000:]
    return {mesh: list(np.load(tmp_path / f"{name}.npz").values())
            for mesh, name in zip(meshes, names, strict=True)}  # fmt: skip


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        scale = np.max(np.abs(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_overrides):
    return take(tmp_path_factory.mktemp("alone"), tiny_overrides, [ALONE], devices=1)[ALONE]


def test_twenty_steps_on_any_mesh_are_those_of_one_device(alone, tmp_path, tiny_overrides):
    losses = np.array(alone[-20:])
    assert losses[-1] < losses[0] - 0.05
    for found in take(tmp_path, tiny_overrides, EIGHT).values():
        assert_same(found, alone)


def test_two_processes_take_the_same_steps_too(alone, tmp_path, tiny_overrides):
    for found in take(tmp_path, tiny_overrides, TWO_PROCESSES, processes=2, devices=4).values():
        assert_same(found, alone)
