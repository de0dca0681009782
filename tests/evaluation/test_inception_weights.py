"""FID's Inception is what is published, by digest and by every tensor."""

import hashlib
import re

import numpy as np
import pytest
import safetensors.numpy

from enat_jax.errors import UserError
from enat_jax.evaluation.inception_weights import inception_rules, load_inception
from tests.support.imports import recorded


def test_rectangular_kernels_are_turned_window_first():
    name = "Mixed_6b.branch7x7_3.conv.weight"
    rule = next(rule for rule in inception_rules() if rule.source == name)
    weight = np.random.default_rng(0).normal(size=recorded("inception").weights[name].shape)
    kernel = rule.transform(weight)
    assert kernel.shape == (7, 1, 128, 192)
    assert kernel[5, 0, 3, 17] == weight[17, 3, 5, 0]


def test_the_network_has_the_published_94_convolutions():
    assert len(recorded("inception").weights) == 566
    assert len(inception_rules()) == 94 * 5 + 1


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    tensors = {name: np.array(x) for name, x in recorded("inception").weights.items()}
    tensors["fc.weight"][7, 2000] = 2.0
    safetensors.numpy.save_file(tensors, path)
    return path


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("letters", [8, 64])
def test_a_file_of_the_named_digest_is_loaded(path, letters):
    network = load_inception(path, digest=digest_of(path)[:letters].upper())
    assert network.classifier[...][2000, 7] == 2.0
    assert network.classifier[...][7, 200] == 1.0


def test_any_other_file_is_refused_with_both_digests(path):
    message = f"{path}: SHA-256 {digest_of(path)[:8]}..., expected 6726825d...: not FID's published"
    with pytest.raises(UserError, match=re.escape(message)):
        load_inception(path)


def test_a_file_of_other_tensors_is_named(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match=r"; 1 extra: a$") as caught:
        load_inception(path, digest=digest_of(path))
    assert str(caught.value).startswith(f"{path}: the weights do not fit the network: ")


def test_a_file_that_is_no_weight_file_or_not_there_is_named(tmp_path):
    (tmp_path / "weights.pth").write_text("hello")
    digest = hashlib.sha256(b"hello").hexdigest()
    with pytest.raises(UserError, match=r"weights\.pth: neither a torch zip file"):
        load_inception(tmp_path / "weights.pth", digest=digest)
    with pytest.raises(UserError, match=r"absent\.pth: No such file or directory"):
        load_inception(tmp_path / "absent.pth")
