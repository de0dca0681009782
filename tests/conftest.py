"""What the tests share: the reference's recordings and the network they were recorded from."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from enat_jax.convert.apply import apply_rules
from enat_jax.convert.enat import never_read, rules
from enat_jax.models.enat import ENAT, ENATConfig

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"):
        yield


def golden_enat_config():
    """The config of the recorded network."""
    recorded = json.loads((GOLDEN / "enat/config.json").read_text())
    return ENATConfig(
        length=recorded["seq_len"],
        codebook_size=recorded["codebook_size"],
        num_classes=recorded["num_classes"],
        width=recorded["hidden_size"],
        num_heads=recorded["num_heads"],
        encoder_depth=recorded["enc_dec"][0],
        decoder_depth=recorded["enc_dec"][1],
    )


def enat_from(weights, cfg=None):
    """The network with given PyTorch weights."""
    cfg = cfg or golden_enat_config()
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: ENAT(cfg, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, apply_rules(rules(cfg), weights, abstract, unused=never_read))


@pytest.fixture(scope="session")
def enat_weights():
    """The recorded network's PyTorch weights by name."""
    return load_file(GOLDEN / "enat/state_dict.safetensors")


@pytest.fixture(scope="session")
def enat(enat_weights):
    """The recorded network."""
    return enat_from(enat_weights)


@pytest.fixture
def golden():
    """Reads a recording by its path under tests/golden."""
    return lambda path: dict(np.load(GOLDEN / path))
