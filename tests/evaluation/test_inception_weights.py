import hashlib
import json
import re

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from enat_jax.convert.torch_file import WeightFileError
from enat_jax.errors import UserError
from enat_jax.evaluation.inception import Inception
from enat_jax.evaluation.inception_weights import (
    inception_from,
    inception_rules,
    load_inception,
    never_read,
)
from enat_jax.models.import_table import ConvertError
from tests.support.golden import GOLDEN


def shapes():
    return json.loads((GOLDEN / "inception/state_dict_shapes.json").read_text())


@pytest.fixture
def weights():
    """Tensors of the published names and shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0.5), shape) for name, shape in shapes().items()}


def refusal(weights):
    with pytest.raises(ConvertError) as caught:
        inception_from(weights)
    return str(caught.value)


def test_there_is_one_rule_per_parameter_and_statistic():
    network = nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0)))
    paths = [".".join(path) for path, _ in nnx.to_flat_state(nnx.state(network))]
    assert sorted(rule.target for rule in inception_rules()) == sorted(paths)
    assert len(paths) == 94 * 5 + 1


def test_every_tensor_of_the_published_file_is_read_once_or_has_no_part_in_features():
    read = [name for rule in inception_rules() for name in rule.names]
    unread = [name for name in shapes() if never_read(name)]
    assert len(shapes()) == 566
    assert sorted([*read, *unread]) == sorted(shapes())
    assert len(unread) == 94 + 1
    assert "fc.bias" in unread


def test_kernels_are_turned_window_first():
    name = "Mixed_6b.branch7x7_3.conv.weight"
    rule = next(rule for rule in inception_rules() if rule.source == name)
    weight = np.random.default_rng(0).normal(size=shapes()[name])
    kernel = rule.transform(weight)
    assert kernel.shape == (7, 1, 128, 192)
    assert kernel[5, 0, 3, 17] == weight[17, 3, 5, 0]


def test_counters_of_batches_may_be_there_or_not(weights):
    inception_from({name: x for name, x in weights.items() if not never_read(name)})


def test_weights_are_kept_in_float32_whatever_the_convolutions_take(weights):
    weights = {name: x.astype(np.float16) for name, x in weights.items()}
    state = nnx.state(inception_from(weights, dtype="bfloat16"))
    assert {str(leaf[...].dtype) for _, leaf in nnx.to_flat_state(state)} == {"float32"}


def test_missing_extra_and_misshapen_tensors_are_all_named_at_once(weights):
    del weights["Conv2d_1a_3x3.bn.running_var"], weights["Mixed_7c.branch_pool.conv.weight"]
    weights["AuxLogits.fc.weight"] = np.zeros(3, np.float32)
    weights["fc.weight"] = np.zeros((1000, 2048), np.float32)
    weights["Conv2d_2b_3x3.conv.weight"] = np.zeros((64, 32), np.float32)
    weights["Conv2d_4a_3x3.conv.weight"] = np.zeros((3, 3, 80, 192), np.float32)
    message = refusal(weights)
    assert "2 missing: Conv2d_1a_3x3.bn.running_var, Mixed_7c.branch_pool.conv.weight;" in message
    assert "1 extra: AuxLogits.fc.weight;" in message
    assert "3 misshapen: " in message
    assert "Conv2d_2b_3x3.conv.weight (64, 32) for conv_2b.kernel (3, 3, 32, 64)" in message
    assert "Conv2d_4a_3x3.conv.weight (3, 3, 80, 192) for conv_4a.kernel (3, 3, 80, 192)" in message
    assert "fc.weight (1000, 2048) for classifier (2048, 1008)" in message
    assert "\n" not in message


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes().items()}
    tensors["fc.weight"][7, 2000] = 2.0
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class TestFile:
    @pytest.mark.parametrize("letters", [8, 64])
    def test_a_file_of_the_named_digest_is_loaded(self, path, digest, letters):
        network = load_inception(path, digest=digest[:letters].upper())
        assert network.classifier[...][2000, 7] == 2.0
        assert network.classifier[...][7, 200] == 0.5

    def test_any_other_file_is_refused_with_both_digests(self, path, digest):
        message = f"{path}: SHA-256 {digest[:8]}..., expected 6726825d...: not FID's published"
        with pytest.raises(ConvertError, match=re.escape(message)):
            load_inception(path)

    def test_a_damaged_file_is_refused(self, path, tmp_path, digest):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        (tmp_path / "damaged.safetensors").write_bytes(content)
        with pytest.raises(ConvertError, match="or an incomplete download"):
            load_inception(tmp_path / "damaged.safetensors", digest=digest)

    def test_a_file_of_other_tensors_is_named(self, tmp_path):
        path = tmp_path / "other.safetensors"
        safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with pytest.raises(ConvertError) as caught:
            load_inception(path, digest=digest)
        assert str(caught.value).startswith(f"{path}: the weights do not fit the network: ")
        assert str(caught.value).endswith("; 1 extra: a")

    def test_a_file_that_is_no_weight_file_is_named(self, tmp_path):
        (tmp_path / "weights.pth").write_text("hello")
        digest = hashlib.sha256(b"hello").hexdigest()
        with pytest.raises(WeightFileError, match=r"weights\.pth: neither a torch zip file"):
            load_inception(tmp_path / "weights.pth", digest=digest)

    def test_a_file_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"absent\.pth: No such file or directory"):
            load_inception(tmp_path / "absent.pth")
