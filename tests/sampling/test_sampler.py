import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import enat_jax
from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.config import config_from_dict
from enat_jax.errors import UserError
from enat_jax.models.enat.network import ENAT
from enat_jax.models.networks import abstract_params
from enat_jax.parallel.placement import MeshConfig
from enat_jax.sampling.sampler import Sampler, restore
from enat_jax.tokenizers.pixels import Pixels
from enat_jax.tokenizers.protocol import as_uint8
from tests.support.on_hosts import on_devices, on_two_hosts


@pytest.fixture(scope="module")
def model(trained):
    return enat_jax.load(trained)


def with_config(model, **sections):
    """The same parameters under another config; nothing is compiled before it is used."""
    config = model.config
    for section, fields in sections.items():
        changed = dataclasses.replace(getattr(config, section), **fields)
        config = dataclasses.replace(config, **{section: changed})
    params = nnx.split(ENAT(config.model, rngs=nnx.Rngs(0)), nnx.Param)[1]
    return Sampler(config, params)


def tokens(model, classes, **options):
    return np.concatenate(list(model.token_batches(classes, **options)))


class TestImages:
    def test_a_loaded_run_gives_images_of_the_classes_asked_for(self, model):
        images = model.sample([3, 7, 0])
        assert images.shape == (3, 8, 8, 3)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images[..., 0], images[..., 1])  # pixels are grey

    def test_images_are_the_decoded_tokens(self, model):
        token_ids = tokens(model, [3, 7], seed=1)
        assert token_ids.shape == (2, 64)
        assert token_ids.min() >= 0
        assert token_ids.max() < 17
        images = as_uint8(Pixels(17).decode((), jax.numpy.asarray(token_ids), (8, 8)))
        np.testing.assert_array_equal(model.sample([3, 7], seed=1), images)

    def test_the_same_seed_gives_the_same_images_and_another_seed_others(self, model):
        first, again, other = (tokens(model, [1, 2], seed=seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert np.any(first != other)

    def test_an_image_is_the_same_in_any_batch(self, model, monkeypatch):
        classes = [4, 4, 1, 10, 7]
        whole = tokens(model, classes)
        for size in (2, 4):
            sample = dataclasses.replace(model.config.sample, batch_size=size)
            config = dataclasses.replace(model.config, sample=sample)
            monkeypatch.setattr(model.program, "config", config)
            batches = list(model.token_batches(classes))
            assert [len(batch) for batch in batches] == [
                min(size, 5 - start) for start in range(0, 5, size)
            ]
            np.testing.assert_array_equal(np.concatenate(batches), whole)

    def test_an_image_depends_on_its_place_and_not_on_its_neighbours(self, model):
        ours, theirs = tokens(model, [4, 4]), tokens(model, [4, 9])
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert np.any(ours[0] != ours[1])

    def test_batches_from_an_image_on_are_the_later_ones(self, model):
        made = [np.asarray(b)[:n] for n, b in model.batches([1] * 5, output="uint8", first=2)]
        np.testing.assert_array_equal(np.concatenate(made), model.sample([1] * 5)[2:])

    def test_floats_round_to_the_images(self, model):
        (_, floats), (_, rounded) = (
            next(model.batches([1, 2], output=output)) for output in ("floats", "uint8")
        )
        assert floats.dtype == np.float32
        np.testing.assert_array_equal(as_uint8(floats), rounded)

    @pytest.mark.slow
    def test_how_many_are_decoded_at_a_time_changes_nothing(self, model):
        whole = with_config(model, sample={"decode_batch_size": 8}).sample([1] * 6)
        for size in (1, 3, 100):
            chunked = with_config(model, sample={"decode_batch_size": size})
            np.testing.assert_array_equal(chunked.sample([1] * 6), whole)

    def test_layers_in_arrays_of_their_own_change_nothing(self, model, trained):
        stacked = enat_jax.load(trained, layers="stacked")
        np.testing.assert_array_equal(tokens(stacked, [3, 7, 0]), tokens(model, [3, 7, 0]))

    def test_other_parameters_give_other_images(self, model, trained):
        sampler = enat_jax.load(trained)
        before = tokens(sampler, [3, 7])
        sampler.update(nnx.split(ENAT(model.config.model, rngs=nnx.Rngs(5)), nnx.Param)[1])
        assert np.any(tokens(sampler, [3, 7]) != before)


class TestRefusals:
    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            ([3, 11], r"class ids \[11\] are out of range: 0 to 9, or 10 for any class"),
            ([-1, 3, 99, -1], r"class ids \[-1, 99\] are out of range"),
            ([], "must be a list of whole numbers"),
            (np.array([0.5]), "must be a list of whole numbers"),
            (np.array(["cat"]), "must be a list of whole numbers"),
            (np.array([[1, 2]]), "must be a list of whole numbers"),
        ],
    )
    def test_a_class_that_is_not_there_is_named(self, model, classes, message):
        with pytest.raises(UserError, match=message):
            model.sample(classes)

    @pytest.mark.parametrize(
        ("strategy", "message"),
        [
            ({"steps": 0}, "steps is 0, must be at least 1"),
            ({"steps": -3}, "steps is -3, must be at least 1"),
            ({"steps": 65}, "steps is 65, must be between 1 and 64 tokens"),
            ({"step": 4}, "step"),
            ({"sampling_temperature": 0.0}, "sampling_temperature must be within"),
            ({"guidance_scale": -1.0}, "guidance_scale must be within"),
            ({"rule": "file", "file": "none.yaml"}, "strategy file none.yaml: .*No such file"),
        ],
    )
    def test_a_strategy_that_cannot_be_is_named(self, model, strategy, message):
        with pytest.raises(UserError, match=message):
            model.sample([1], **strategy)

    def test_a_model_without_tokenizer_gives_tokens_but_no_images(self, model):
        bare = with_config(model, tokenizer={"name": "none"})
        assert bare.tokenizer is None
        with pytest.raises(UserError, match=r"tokenizer\.name is 'none'.*token ids, not images"):
            bare.sample([1])
        assert tokens(bare, [1]).shape == (1, 64)


class TestDescription:
    def test_it_says_steps_bodies_flops_and_padding(self, model):
        assert model.describe(steps=8).startswith("8 steps in 8 compiled bodies, ")
        assert "without padding, which adds 0.0%" in model.describe(steps=8)

    def test_padding_is_said_where_there_is_some(self, model):
        bucketed = with_config(model, sample={"buckets": 2})
        text = bucketed.describe(steps=8)
        assert text.startswith("8 steps in 2 compiled bodies, ")
        assert float(text.rpartition("adds ")[2].removesuffix("%)")) > 5

    def test_a_strategy_that_cannot_be_is_refused_here_too(self, model):
        with pytest.raises(UserError, match="steps is 65"):
            model.describe(steps=65)


class TestLoading:
    def test_a_workdir_and_its_checkpoints_are_the_same(self, model, trained):
        again = enat_jax.load(trained / "checkpoints")
        for ours, theirs in zip(
            jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        assert again.class_names == list("0123456789")

    def test_an_earlier_checkpoint_can_be_asked_for(self, model, trained):
        earlier = enat_jax.load(trained, step=2)
        pairs = zip(jax.tree.leaves(earlier.params), jax.tree.leaves(model.params), strict=True)
        assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs)

    def test_a_step_that_was_not_saved_is_refused_with_those_that_were(self, trained):
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 in .*: 2, 4$"):
            enat_jax.load(trained, step=3)

    @pytest.mark.parametrize("name", ["", "nothing/there"])
    def test_a_missing_checkpoint_is_refused(self, tmp_path, name):
        with pytest.raises(CheckpointError, match="no checkpoint in ") as caught:
            enat_jax.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert list(tmp_path.iterdir()) == []  # and nothing was made on the way

    def test_the_stored_config_can_be_overridden(self, trained):
        fewer = enat_jax.load(
            trained, overrides=lambda f: config_from_dict(f, ["strategy.steps=3"])
        )
        assert fewer.config.strategy.steps == 3
        assert fewer.describe().startswith("3 steps")

    def test_an_override_that_makes_it_another_model_is_refused(self, trained):
        for override, differs in (
            ("model.num_classes=11", "model.num_classes = 11, there 10"),
            ("model.num_heads=4", "model.num_heads = 4, there 2"),  # of the same shapes
            ("tokenizer.grid=(4,16)", r"tokenizer.grid = \[4, 16\], there \[8, 8\]"),
        ):
            with pytest.raises(CheckpointError, match=f"is of another model: {differs}$"):
                enat_jax.load(trained, overrides=lambda f, o=override: config_from_dict(f, [o]))
        with pytest.raises(UserError, match=r"model\.width = 17"):
            enat_jax.load(trained, overrides=lambda f: config_from_dict(f, ["model.width=17"]))


# Generates what the tests below compare, on every mesh named; all hosts have all of it.
GENERATE = """
import enat_jax
from enat_jax.config import config_from_dict
workdir, out, classes, *meshes = arguments
classes = [int(c) for c in classes.split(",")]
for number, mesh in enumerate(meshes):
    data, fsdp, tensor, placement, what = mesh.split()
    changes = [f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}",
               f"mesh.placement={placement}", "sample.batch_size=8"]
    model = enat_jax.load(workdir, overrides=lambda fields: config_from_dict(fields, changes))
    shares = {leaf.size // leaf.addressable_shards[0].data.size
              for leaf in jax.tree.leaves(model.params)}
    batches = list(getattr(model, f"{what}_batches")(classes))
    np.savez(f"{out}.{number}.{process}.npz", made=np.concatenate(batches),
             shares=sorted(shares), counts=[len(batch) for batch in batches])
"""
CLASSES = [3, 7, 0, 1, 10, 9, 9, 2, 5, 4, 8]  # two batches, the second filled up


def assert_same_images(found, model, what):
    whole = model.sample(CLASSES) if what == "image" else tokens(model, CLASSES)
    np.testing.assert_array_equal(found["made"], whole)
    assert found["counts"].tolist() == [8, 3]


def test_two_hosts_give_one_hosts_images_on_each_of_them(model, trained, tmp_path):
    meshes = ("4 1 1 zero2 token", "1 2 2 fsdp image")
    on_two_hosts(GENERATE, trained, tmp_path / "made", ",".join(map(str, CLASSES)), *meshes)
    for number, mesh in enumerate(meshes):
        for process in range(2):
            found = np.load(tmp_path / f"made.{number}.{process}.npz")
            assert_same_images(found, model, mesh.split()[-1])


def test_eight_devices_give_one_devices_images_whatever_they_share_out(model, trained, tmp_path):
    meshes = {"8 1 1 zero2 image": {1}, "2 2 2 zero2 token": {1, 2, 4},
              "2 2 2 fsdp token": {1, 2, 4}, "1 4 2 replicated token": {1, 2}}  # fmt: skip
    classes = ",".join(map(str, CLASSES))
    on_devices(GENERATE, trained, tmp_path / "made", classes, *meshes, devices=8)
    for number, (mesh, shares) in enumerate(meshes.items()):
        found = np.load(tmp_path / f"made.{number}.0.npz")
        assert_same_images(found, model, mesh.split()[-1])
        assert set(found["shares"]) == shares


def test_a_model_that_many_devices_trained_is_used_on_those_at_hand(trained, tmp_path):
    there, here = Checkpoints(trained / "checkpoints", read_only=True), tmp_path / "checkpoints"
    config = there.metadata()["config"]
    _, abstract = abstract_params(config_from_dict(config).model)
    _, trees = there.restore({"ema": abstract})
    pod = {"data": 2, "fsdp": 64, "tensor": 2, "placement": "fsdp"}
    copy = Checkpoints(here)
    copy.save(4, trees, metadata={**there.metadata(), "config": {**config, "mesh": pod}})
    copy.close()
    restored = restore(tmp_path)
    assert restored.config.mesh == MeshConfig()
    one = restore(tmp_path, overrides=lambda fields: config_from_dict(fields, ["mesh.fsdp=1"]))
    assert one.config.mesh.fsdp == 1
