"""Small models that nobody trained, and that say different things everywhere."""

import dataclasses

import jax
import numpy as np

from enat_jax.checkpoints.store import Checkpoints
from enat_jax.config import load_config
from enat_jax.models.networks import abstract_params
from enat_jax.sampling.sampler import Restored

SMALL = ("model.width=8", "model.num_heads=2", "model.length=16", "model.dtype=float32",
         "tokenizer.grid=(4,4)", "sample.batch_size=8", "train.steps=4",
         "optim.warmup_steps=1")  # fmt: skip
DEPTH = {
    "digits": ("model.encoder_depth=2", "model.decoder_depth=1"),
    "digits_autonat": ("model.depth=2",),
}


def made_up(name, *overrides, seed=0):
    """A checkpoint of step 4, as `restore` returns it, of a config in `configs/`."""
    config = load_config(f"configs/{name}.py", [*SMALL, *DEPTH[name], *overrides])
    rng, shapes = np.random.default_rng(seed), abstract_params(config.model)[1]
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(x.dtype), shapes)
    return Restored(config, params, 4, None, "")


def save(restored, workdir):
    """Makes the checkpoint a run's; returns the workdir."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    metadata = {"config": dataclasses.asdict(restored.config)}
    checkpoints.save(restored.step, {"ema": restored.ema}, metadata=metadata)
    checkpoints.close()
    return workdir
