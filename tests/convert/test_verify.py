"""Recordings replay on the networks they are of, and on no other."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.convert.verify import Comparison, verify, verify_files
from enat_jax.errors import UserError
from enat_jax.evaluation.inception import Features, Inception
from tests.support.golden import enat_from, golden_enat_config
from tests.support.imports import recorded

TOLERANCE = {"enat": 5e-5, "autonat": 1e-4, "vqgan": 1e-4}
RECORDINGS = {  # a file, and which of its arrays are taken
    "forward": ("enat", "enat/forward.npz", ("context", "a/half_masked/", "b/chain2/")),
    "autonat": ("autonat", "autonat/forward.npz", ("context", "ragged/", "half_masked/")),
    "vqgan": ("vqgan", "vqgan/io.npz", ("",)),
}
REPLAYED = {
    "forward": {f"{group}/{name}" for group in ("a/half_masked", "b/chain2/0", "b/chain2/1")
                for name in ("logits", "feat", "masking")},
    "autonat": {"ragged/logits", "half_masked/logits"},
    "vqgan": {"encoder_out", "indices", "decode", "random_decode"},
}  # fmt: skip


@pytest.fixture
def arrays(golden):
    """A recording's network and arrays, by name."""

    def arrays(name):
        network, file, prefixes = RECORDINGS[name]
        return network, {k: x for k, x in golden(file).items() if k.startswith(prefixes)}

    return arrays


def failed(comparisons, tolerance=5e-5):
    return {each.name for each in comparisons if each.fails(tolerance)}


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_recorded_network_passes(arrays, name):
    network, recording = arrays(name)
    comparisons = verify(recorded(network).model(), recording)
    assert {each.name for each in comparisons} == REPLAYED[name]
    assert failed(comparisons, TOLERANCE[network]) == set()
    assert {each.name for each in comparisons if each.exact} == {
        each for each in REPLAYED[name] if each.endswith(("ids", "mask", "masking", "indices"))
    }


@pytest.mark.parametrize(
    ("name", "tensor", "outputs"),
    [
        ("forward", "blocks.0.attn.proj.bias", {"a/half_masked", "b/chain2/0", "b/chain2/1"}),
        ("forward", "prev_proj.mlp.fc2.bias", {"b/chain2/1"}),  # of what reuses features alone
        ("autonat", "in_blocks.0.attn.proj.bias", {"ragged", "half_masked"}),
        ("vqgan", "decoder.conv_out.bias", {"decode", "random_decode"}),
        ("vqgan", "encoder.conv_out.bias", {"encoder_out"}),
        ("vqgan", "quantize.embedding.weight", {"decode", "random_decode"}),
    ],
)
def test_one_perturbed_weight_fails(arrays, name, tensor, outputs):
    network, recording = arrays(name)
    case = recorded(network)
    changed = case.weights[tensor].copy()
    changed[..., 2] += 0.01
    wrong = failed(verify(case.model(**{tensor: changed}), recording), TOLERANCE[network])
    assert {each.rpartition("/")[0] or each for each in wrong} - {"indices"} == outputs


def test_a_wrong_number_of_heads_fails(arrays, enat_weights):
    cfg = dataclasses.replace(golden_enat_config(), num_heads=8)
    recording = arrays("forward")[1]
    only = {name: recording[name] for name in recording if not name.startswith("b/")}
    assert failed(verify(enat_from(enat_weights, cfg), only))


@pytest.mark.parametrize(
    ("name", "key", "where", "value"),
    [
        ("forward", "a/half_masked/logits", (0, 0, 0), np.nan),
        ("vqgan", "decode", (1, 2, 3, 4), 5.0),
    ],
)
def test_one_wrong_number_fails(arrays, name, key, where, value):
    network, recording = arrays(name)
    recording[key][where] = value
    (wrong,) = [e for e in verify(recorded(network).model(), recording) if e.fails(1e-4)]
    assert wrong.name == key


def test_logits_differ_by_fractions_of_the_largest(arrays, enat):
    recording = arrays("forward")[1]
    logits = recording["a/half_masked/logits"]
    logits[0, 0, 0] += 0.1
    (wrong,) = [e for e in verify(enat, recording) if e.fails(1e-4)]
    assert wrong.difference == pytest.approx(0.1 / np.abs(logits).max(), rel=1e-2)


class Means(Inception):
    """In place of Inception: pool features that are the means of the channels."""

    def __init__(self):
        self.scale = nnx.Param(jnp.full(2048, 2.0))

    def __call__(self, images):
        pool = jnp.tile(images.mean((1, 2)), 683)[:, :2048] * self.scale[...]
        return Features(pool, jnp.zeros((len(images), 2023)), jnp.zeros((len(images), 1008)))


def test_inceptions_features_differ_by_fractions_of_the_largest():
    images = np.random.default_rng(0).random((2, 3, 20, 30), np.float32)
    features = np.tile(images.mean((2, 3)), 683)[:, :2048] * 2
    recording = {"20/images": images, "20/features": features, "other/features": np.zeros(3)}
    (same,) = verify(Means(), recording)
    assert not same.fails(1e-5)
    assert same.size == 2 * 2048
    features[1, 7] += 0.25
    (other,) = verify(Means(), recording)
    assert other.difference == pytest.approx(0.25 / features.max(), rel=1e-3)


class TestRefusal:
    def test_a_chain_that_lacks_a_link(self, arrays, enat):
        recording = arrays("forward")[1]
        del recording["b/chain2/0/ids"]
        with pytest.raises(UserError, match="b/chain2/1/ continues a chain"):
            verify(enat, recording)

    def test_images_with_different_counts(self, arrays, enat):
        recording = arrays("forward")[1]
        ids = recording["a/half_masked/ids"]
        ids[0, ids[0] == 64] = 3
        with pytest.raises(UserError, match="different counts of tokens"):
            verify(enat, recording)

    def test_arrays_of_another_shape(self, arrays, enat):
        recording = arrays("forward")[1]
        recording["a/half_masked/feat"] = recording["a/half_masked/feat"][..., :32]
        with pytest.raises(UserError, match=r"a/half_masked/feat: recorded \(2, 64, 32\)"):
            verify(enat, recording)

    @pytest.mark.parametrize("network", ["enat", "autonat", "vqgan"])
    def test_nothing_to_replay(self, network):
        with pytest.raises(UserError, match=r"nothing to verify among the keys \['pictures'"):
            verify(recorded(network).model(), {"pictures": np.zeros(3)})

    @pytest.mark.parametrize("content", [None, b"no zip file", b"PK\x03\x04 damaged", b""])
    def test_files_that_cannot_be_read(self, tmp_path, content):
        if content is not None:
            (tmp_path / "few.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"few.npz: (no recording|No such file)") as caught:
            verify_files(Means(), [tmp_path / "few.npz"])
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("shape", [(1, 64, 64, 3), (1, 3, 64, 40), (64, 64)])
    def test_images_that_are_none(self, tmp_path, shape):
        np.savez(tmp_path / "few.npz", image=np.zeros(shape, np.float32), decode=np.zeros(3))
        with pytest.raises(UserError, match=r"few.npz: "):
            verify_files(recorded("vqgan").model(), [tmp_path / "few.npz"])


@pytest.mark.parametrize(
    ("difference", "exact", "row"),
    [
        (0.0, True, "ok   x: 0 of 9 differ"),
        (1.0, True, "FAIL x: 1 of 9 differ"),
        (4e-5, False, "ok   x: largest difference 4.00e-05 of 9 numbers"),
        (6e-5, False, "FAIL x: largest difference 6.00e-05 of 9 numbers"),
        (np.nan, False, "FAIL x: largest difference nan of 9 numbers"),
        (np.inf, False, "FAIL x: largest difference inf of 9 numbers"),
    ],
)
def test_integers_must_be_equal_and_floats_within_tolerance(difference, exact, row):
    assert Comparison("x", difference, exact, 9).row(5e-5) == row
