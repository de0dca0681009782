import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.evaluation.inception import (
    Block,
    FeatureExtractor,
    Features,
    Inception,
    average_pool_same,
    block_a,
    block_b,
    block_c,
    block_d,
    block_e,
    max_pool_same,
    resize,
)
from enat_jax.evaluation.inception_weights import block_rules, inception_from
from enat_jax.models.import_table import apply_rules
from enat_jax.parallel.placement import MeshConfig, Placement
from tests.support.fake_inception import FakeInception
from tests.support.golden import GOLDEN

RECORDED = {299: 4, 64: 4, 256: 2}  # images by size
ONE_PART_IN_1000 = 1e-3  # of the largest, asked for; float32 convolutions are 1000 times closer
CLOSE = 2e-5


def seeded_module():
    spec = importlib.util.spec_from_file_location("seeded", GOLDEN / "inception/seeded.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SEEDED = seeded_module()


def channels_last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


def apart(ours, recorded):
    """The largest difference, as a share of the largest value."""
    assert ours.shape == recorded.shape
    return np.abs(np.asarray(ours) - recorded).max() / np.abs(recorded).max()


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(GOLDEN / "inception/features.npz"))


@pytest.fixture(scope="module")
def network():
    shapes = json.loads((GOLDEN / "inception/state_dict_shapes.json").read_text())
    return inception_from({name: SEEDED.weight(name, shape) for name, shape in shapes.items()})


@pytest.fixture(scope="module")
def images(recorded):
    made = {n: SEEDED.images(count, n, int(recorded[f"{n}/images_seed"]))
            for n, count in RECORDED.items()}  # fmt: skip
    for n, each in made.items():
        sums = each.astype(np.float64).sum(axis=(1, 2, 3))
        np.testing.assert_allclose(sums, recorded[f"{n}/image_checksum"], rtol=1e-9)
    return {n: channels_last(each) for n, each in made.items()}


@pytest.fixture(scope="module")
def seen(network, images):
    """Features and stages of all recorded images, of one compiled program, by size of image."""
    graphdef, state = nnx.split(network)

    @jax.jit
    def everything(state, resized):
        model = nnx.merge(graphdef, state)
        return model(resized), model.stages(resized)

    batch = jnp.concatenate([resize(images[n]) for n in RECORDED])
    outputs = jax.tree.map(np.asarray, everything(state, batch))
    ends = dict(zip(RECORDED, np.cumsum(list(RECORDED.values())), strict=True))
    return {
        n: jax.tree.map(lambda x, n=n: x[ends[n] - RECORDED[n] : ends[n]], outputs)
        for n in RECORDED
    }


@pytest.mark.parametrize("size", [299, 64, pytest.param(256, marks=pytest.mark.slow)])
class TestRecorded:
    def test_pool_features_are_the_references(self, seen, recorded, size):
        features, _ = seen[size]
        difference = apart(features.pool, recorded[f"{size}/features"])
        assert difference < ONE_PART_IN_1000
        assert difference < CLOSE

    @pytest.mark.parametrize("block", range(4))
    def test_statistics_of_every_block_are_the_references(self, seen, recorded, size, block):
        features, stages = seen[size]
        maps = (stages.pool_1, stages.pool_2, stages.mixed_6e, features.pool)[block]
        values = maps.reshape(-1, maps.shape[-1]).astype(np.float64)
        for name, ours in (("mean", values.mean(axis=0)), ("std", values.std(axis=0, ddof=1))):
            assert apart(ours, recorded[f"{size}/block{block}_{name}"]) < 1e-4


class TestResize:
    def test_it_is_the_references(self, images, recorded):
        resized = np.moveaxis(np.asarray(resize(images[64])), -1, 1)
        corner = resized[:, :, :24, -24:]
        np.testing.assert_allclose(corner, recorded["64/resized_corner"], atol=1e-6)
        row_mean = resized.mean(axis=3, dtype=np.float64)
        np.testing.assert_allclose(row_mean, recorded["64/resized_rowmean"], atol=1e-6)

    def test_images_of_the_networks_own_size_are_left_alone(self, images):
        np.testing.assert_array_equal(resize(images[299]), images[299])

    def test_larger_images_are_not_antialiased(self):
        """Of 897 pixels every third is looked at: the middle ones of three."""
        image = np.zeros((1, 897, 897, 3), np.float32)
        image[:, 1::3, 1::3] = 1.0
        np.testing.assert_allclose(resize(jnp.asarray(image)), 1.0, atol=1e-4)

    def test_sides_may_differ(self):
        column = np.linspace(0, 1, 10, dtype=np.float32)
        image = np.broadcast_to(column[:, None, None], (1, 10, 77, 3))
        resized = np.asarray(resize(jnp.asarray(image)))
        np.testing.assert_allclose(resized[0, :, 0, 0], resized[0, :, 298, 2])
        assert (resized[0, 0, 0, 0], resized[0, 298, 0, 0]) == (0, 1)


class TestFeatures:
    def test_images_of_any_size_are_resized_first(self, network, images, seen):
        features = nnx.jit(lambda model, x: model(x))(network, images[64])
        np.testing.assert_allclose(features.pool, seen[64][0].pool, atol=1e-5)

    def test_spatial_features_are_seven_channels_of_mixed_6d_by_row_and_column(self, seen):
        features, stages = seen[256]
        assert features.spatial.shape == (2, 2023)
        grid = features.spatial.reshape(2, 17, 17, 7)
        np.testing.assert_array_equal(grid, stages.mixed_6d[..., :7])

    def test_logits_leave_the_published_bias_out(self, seen):
        features, _ = seen[299]
        weight = SEEDED.weight("fc.weight", (1008, 2048))
        np.testing.assert_allclose(features.logits, features.pool @ weight.T, atol=1e-4)

    def test_of_images_of_any_shape_they_have_one_length(self):
        model = nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0)))
        features = nnx.eval_shape(lambda m, x: m(x), model, jnp.zeros((3, 32, 48, 3)))
        assert isinstance(features, Features)
        assert [x.shape for x in features] == [(3, 2048), (3, 2023), (3, 1008)]
        assert {x.dtype for x in features} == {jnp.dtype("float32")}


BLOCKS = {
    "A": block_a(4),
    "B": block_b(),
    "C": block_c(6),
    "D": block_d(),
    "E1": block_e(average_pool_same),
    "E2": block_e(max_pool_same),
}


def single_block(name):
    """The block whose output is recorded, as a compiled function."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Block(8, BLOCKS[name], rngs=nnx.Rngs(0))))
    rules = [rule._replace(source=f"{name}.{rule.source}") for rule in block_rules(BLOCKS[name])]
    shapes = {".".join(path): leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    weights = {}
    for rule in rules:
        *window, features_in, features_out = (0, *shapes[rule.target])
        is_kernel = rule.target.endswith("kernel")
        published = (features_out, features_in, *window[1:]) if is_kernel else (features_out,)
        weights[rule.source] = SEEDED.weight(rule.source, published)
    block = nnx.merge(graphdef, apply_rules(rules, weights, abstract))
    return block, jax.jit(block)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_single_block_is_the_references(recorded, name):
    _, run = single_block(name)
    out = np.moveaxis(np.asarray(run(channels_last(recorded[f"blocks/{name}/in"]))), -1, 1)
    assert apart(out, recorded[f"blocks/{name}/out"]) < CLOSE


def test_the_first_channels_of_mixed_6d_are_its_1x1_branch(recorded):
    block, run = single_block("C")
    x = channels_last(recorded["blocks/C/in"])
    np.testing.assert_allclose(run(x)[..., :192], block.branch1x1(x), atol=1e-5)


@pytest.mark.parametrize(
    ("pool", "name"),
    [(average_pool_same, "avg_count_include_pad_False"), (max_pool_same, "max")],
)
def test_pools_leave_the_padding_out(recorded, pool, name):
    out = np.moveaxis(np.asarray(pool(channels_last(recorded["pool/in"]))), -1, 1)
    np.testing.assert_allclose(out, recorded[f"pool/{name}"], rtol=1e-6)


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_levels_and_floats_have_the_same_features_however_many_are_looked_at(at_once):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    floats = (images / 255).astype(np.float32)
    expected = FakeInception()(jnp.asarray(floats))
    extract = FeatureExtractor(FakeInception(), Placement.of(MeshConfig()), at_once=at_once)
    for given in (images, floats):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), extract(given), expected
        )
