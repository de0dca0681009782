"""What the tests share: exact products, a tiny run, and the recorded network."""

import atexit
import os
import shutil
import tempfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from enat_jax.config import load_config
from enat_jax.training.train import train
from tests.support.golden import GOLDEN, enat_from

# Tests compile many small programs and run each a few times: compilation is quick rather than good,
# here and in the processes that tests start, and what one compiled no other compiles again.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 11):  # later there are no others
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="enat_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"):
        yield


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
    with jax.default_matmul_precision("highest"):  # as in tests, whose runs need no new programs
        train(tiny_config(), workdir)
    return workdir


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
