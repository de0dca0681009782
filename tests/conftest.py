"""What the tests share: the reference's recordings and the network they were recorded from."""

import atexit
import json
import os
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from safetensors.numpy import load_file

from enat_jax.config import load_config
from enat_jax.convert.apply import apply_rules
from enat_jax.convert.enat import never_read, rules
from enat_jax.models.enat import ENAT, ENATConfig
from enat_jax.train import train

# What one test compiled no other compiles again, in other processes of the same run neither.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="enat_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# recordings of the reference; the committed ones are a subset, and every test reads what is there
GOLDEN = pathlib.Path(os.environ.get("ENAT_GOLDEN", pathlib.Path(__file__).parent / "golden"))


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles in half the time: for modules of many tiny programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# configs/digits.py made as small as it can be; a constant rate, so that a longer run has the same
# programs
TINY = {
    "model": {"width": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1},
    "train": {"steps": 4, "batch_size": 8, "images_per_row": 2, "log_every": 2,
              "sample_every": 4, "checkpoint_every": 2},
    "optim": {"warmup_steps": 1, "learning_rate": 1e-2, "decay": "constant"},
    "strategy": {"steps": 2},
    "sample": {"batch_size": 20},
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_overrides(tmp_path_factory):
    """What makes configs/digits.py tiny; its records are prepared once, on first use."""
    data = tmp_path_factory.mktemp("data")
    fields = {**TINY, "data": {"data_dir": str(data)}}
    return [f"{s}.{name}={value}" for s, values in fields.items() for name, value in values.items()]


@pytest.fixture(scope="session")
def tiny_config(tiny_overrides):
    """The tiny config with further overrides."""
    return lambda *overrides: load_config("configs/digits.py", [*tiny_overrides, *overrides])


@pytest.fixture(scope="session")
def trained(tiny_config, tmp_path_factory):
    """The workdir of a finished tiny run; tests leave it as it is."""
    workdir = tmp_path_factory.mktemp("trained")
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.default_matmul_precision("highest"):  # as in tests, whose runs need no new programs
        train(tiny_config(), workdir)
    jax.config.update("jax_disable_most_optimizations", before)
    return workdir


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


def torch_arrays(tree, cfg=None):
    """A tree of parameters, or shaped like them, by PyTorch name; vectors lose axes of length 1."""
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(tree)}
    arrays = {}
    for rule in rules(cfg or golden_enat_config()):
        leaf = np.asarray(leaves[rule.target])
        parts = [leaf] if isinstance(rule.source, str) else leaf
        for name, part in zip(rule.names, parts, strict=True):
            if "key_value" in rule.target:
                arrays[name] = rearrange(
                    part, "i k o -> (k o) i" if part.ndim == 3 else "k o -> (k o)"
                )
            else:
                arrays[name] = rule.transform(part)  # its own inverse, but for lost axes
    return arrays


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
