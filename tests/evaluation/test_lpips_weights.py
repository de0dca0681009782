"""LPIPS from its two published files."""

import numpy as np
import pytest
import safetensors.numpy

from enat_jax.errors import UserError
from enat_jax.evaluation.lpips_weights import load_lpips
from tests.support.imports import recorded


def test_the_published_tensors_are_vgg16_and_the_linear_layers():
    network = recorded("lpips").model()
    assert network.stages[0][0].kernel.shape == (3, 3, 3, 64)
    assert network.stages[4][2].kernel.shape == (3, 3, 512, 512)
    assert [weight.shape for weight in network.weights] == [(n,) for n in (64, 128, 256, 512, 512)]


def test_the_two_files_are_read_as_one(tmp_path):
    for name in ("features.0.bias", "lin0.model.1.weight"):
        file = tmp_path / f"{name}.safetensors"
        safetensors.numpy.save_file({name: np.zeros((1, 64, 1, 1), np.float32)}, file)
    paths = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        load_lpips(paths)
    assert str(caught.value).startswith(f"{paths[0]}, {paths[1]}: the weights do not fit")
    assert f"{13 * 2 + 5 - 2} missing: " in str(caught.value)  # all but the two
    with pytest.raises(UserError, match=r"features.0.bias are in another file as well"):
        load_lpips([paths[0], paths[0]])
