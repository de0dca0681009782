"""AutoNAT in training: the reference's gradients, a run from its start to images, placement."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import enat_jax
from enat_jax.config import load_config
from enat_jax.core.plans import Plan
from enat_jax.errors import UserError
from enat_jax.models.autonat.network import AutoNATConfig
from enat_jax.models.networks import abstract_params
from enat_jax.training.step import Draws, row_loss
from enat_jax.training.train import train
from tests.parallel.test_placement import placement_of, specs
from tests.support.on_hosts import on_devices
from tests.support.recorded_autonat import (
    recorded_autonat,
    recorded_config,
    recorded_weights,
    torch_arrays,
)
from tests.support.runs import Killed, assert_same, losses, saved, watch

# Its gradients.


def test_loss_and_gradients_are_the_references(golden):
    recorded = golden("autonat/train.npz")
    graphdef, params = nnx.split(recorded_autonat())
    masked = recorded["xn"] == recorded_config().mask_id
    plans = tuple(Plan(0, 64 - int(n), int(n)) for n in masked.sum(axis=1))
    assert [plan.masked for plan in plans] == recorded["n_masked"].tolist()
    assert len(set(plans)) == 4  # of each image its own
    draws = Draws(
        jnp.asarray(np.argsort(masked, axis=1, kind="stable")[None], jnp.int32),
        jnp.asarray(recorded["context"].T),
    )

    def loss(params):
        model = nnx.merge(graphdef, params)
        tokens = jnp.asarray(recorded["x0"])[None]
        return row_loss(model, model, tokens, draws, plans, label_smoothing=0.1, mean_over="tokens")

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, recorded["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(optax.tree.norm(grads), recorded["grad_norm"], rtol=1e-5)

    ours = torch_arrays(grads)
    assert {name for name in ours if np.any(ours[name])} == set(recorded_weights())
    names = [key.removeprefix("grad/") for key in recorded if key.startswith("grad/")]
    assert len(names) >= 68
    for name in names:
        expected = recorded[f"grad/{name}"]
        grad, largest = ours[name].reshape(expected.shape), np.max(np.abs(expected))
        np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-4 * largest, err_msg=name)
        if "embeddings" in name or name == "mlm_layer.bias":  # rows that nothing reads
            np.testing.assert_array_equal(grad == 0, expected == 0, err_msg=name)


def test_every_masked_token_counts_the_same_and_all_may_be_masked():
    model = recorded_autonat()
    plans = (Plan(0, 60, 4), Plan(0, 0, 64))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(64, size=(1, 2, 64)))
    draws = Draws(jnp.asarray(rng.permuted(np.tile(np.arange(64), (1, 2, 1)), axis=-1)),
                  jnp.array([[3, 4]]))  # fmt: skip

    def loss(tokens, draws, plans):
        return row_loss(model, model, tokens, draws, plans, label_smoothing=0.1, mean_over="tokens")

    alone = [
        loss(tokens[:, i : i + 1], jax.tree.map(lambda x, i=i: x[:, i : i + 1], draws), (plan,))
        for i, plan in enumerate(plans)
    ]
    expected = np.average(alone, weights=[plan.masked for plan in plans])
    np.testing.assert_allclose(loss(tokens, draws, plans), expected, rtol=1e-5)
    assert abs(expected - np.mean(alone)) > 1e-3


# A run.


@pytest.fixture(scope="module")
def config(tiny_overrides):
    """configs/digits_autonat.py made as small as it can be, with further overrides."""
    own = [text for text in tiny_overrides if not text.startswith("model.")]
    own += ["model.width=16", "model.num_heads=2", "model.depth=2"]
    return lambda *more: load_config("configs/digits_autonat.py", [*own, *more])


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The workdir of a finished run; tests leave it as it is."""
    workdir = tmp_path_factory.mktemp("autonat")
    with jax.default_matmul_precision("highest"):
        train(config(), workdir)
    return workdir


@pytest.mark.slow
def test_a_run_that_was_killed_ends_bit_for_bit_as_one_that_was_not(
    config, finished, tmp_path, monkeypatch
):
    watch(monkeypatch, kill_after=3)  # a step later than the checkpoint
    with pytest.raises(Killed):
        train(config(), tmp_path)
    monkeypatch.undo()
    said = []
    train(config(), tmp_path, log=said.append)
    assert said[0] == "resuming from step 2"
    assert_same(saved(tmp_path), saved(finished))
    assert losses(tmp_path) == losses(finished)


def test_a_finished_run_gives_images(finished):
    assert [path.name for path in (finished / "samples").iterdir()] == ["step_0000004.png"]
    model = enat_jax.load(finished)
    assert model.config.model.name == "autonat"
    assert model.sample([3, 7]).shape == (2, 8, 8, 3)
    assert model.describe(steps=4).startswith("4 steps in 4 compiled bodies, ")


def test_reused_features_are_refused(config):
    with pytest.raises(UserError, match=r"reuse_probability = 0\.5 must be 0 for a network that"):
        config("train.reuse_probability=0.5")


# Placement.


@pytest.fixture(scope="module")
def params():
    """AutoNAT-L's parameters by shape, with the published, odd, numbers of rows."""
    return abstract_params(AutoNATConfig())[1]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("inward.query_key_value.kernel", (None, "fsdp", None, "tensor")),
        ("inward.out.kernel", (None, "tensor", "fsdp")),
        ("middle.mlp.up.kernel", ("fsdp", "tensor")),
        ("outward.mlp.down.kernel", (None, "tensor", "fsdp")),
        ("outward.skip.kernel", (None, None, "fsdp")),
        ("class_embedding.word", (None, "fsdp")),
        ("embedding.position", (None, "fsdp")),
        ("outward.attention_norm.scale", (None, None)),
    ],
)
def test_a_parameter_lies_where_its_rule_says(params, name, spec):
    assert specs(params, placement_of(data=2, fsdp=2, tensor=2))[name][0] == spec


@pytest.mark.parametrize("fsdp", [2, 8])
def test_every_large_parameter_is_shared_out_and_no_stack_cut_between_blocks(params, fsdp):
    # large: above 64 KiB in one block; a stack is sliced into its blocks
    for name, (spec, leaf) in specs(params, placement_of(fsdp=fsdp)).items():
        stacked = name.startswith(("inward.", "outward."))
        assert spec[0] is None or not stacked
        size = 4 * leaf.size // (leaf.shape[0] if stacked else 1)
        if size > 64 * 1024:
            assert "fsdp" in spec, f"{name} {leaf.shape}: {spec}"


STEPS = """
from enat_jax.config import load_config
from enat_jax.training.programs import TrainingPrograms
from enat_jax.parallel.placement import MeshConfig, Placement
assert jax.device_count() == 8
config = load_config("configs/digits_autonat.py", [
    "model.width=16", "model.num_heads=2", "model.depth=2", "train.programs=1",
    "train.batch_size=8", "train.images_per_row=1", "optim.warmup_steps=0", "train.steps=9"])
rng = np.random.default_rng(0)
batch = {"token_ids": rng.integers(17, size=(8, 64), dtype=np.int32),
         "class_ids": rng.integers(10, size=8, dtype=np.int32)}
losses = []
for sizes in ((1, 1, 1), (2, 2, 2)):
    devices = jax.devices()[: np.prod(sizes)]
    run = TrainingPrograms(config, Placement.of(MeshConfig(*sizes), devices))
    state = run.initial_state()
    kernel = state.params["outward"]["query_key_value"]["kernel"][...]
    shard = kernel.addressable_shards[0].data.shape
    assert shard == (1, 16 // sizes[1], 3, 16 // sizes[2]), shard
    for step in range(4):
        state, metrics = run.step(step, state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
one, eight = losses[:4], losses[4:]
assert one[0] != one[3]
np.testing.assert_allclose(one, eight, rtol=1e-5)
"""


@pytest.mark.slow
def test_eight_devices_take_the_same_steps_as_one():
    on_devices(STEPS, devices=8)
