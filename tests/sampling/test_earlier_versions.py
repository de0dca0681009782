"""Runs of earlier versions: their checkpoints are read, and give their images bit for bit."""

import numpy as np
import pytest

import enat_jax
from tests.support.golden import GOLDEN


@pytest.mark.parametrize("commit", ["5f9fec3"])
def test_a_run_of_an_earlier_version_gives_its_images(commit):
    folder, warnings = GOLDEN / f"run_{commit}", []
    recorded = np.load(folder / "images.npz")
    model = enat_jax.load(folder, warn=warnings.append)
    assert warnings == []
    classes = list(range(10))
    np.testing.assert_array_equal(model.sample(classes, seed=3), recorded["images"])
    tokens = np.concatenate(list(model.token_batches(classes, seed=3)))
    np.testing.assert_array_equal(tokens, recorded["tokens"])
