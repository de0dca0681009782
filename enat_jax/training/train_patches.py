"""A codebook of patches, learnt from images by k-means: images in, a workdir out."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

from enat_jax.checkpoints.store import Checkpoints
from enat_jax.checkpoints.tokenizer import CHECKPOINTS
from enat_jax.config import PatchesRunConfig
from enat_jax.data.images import open_images
from enat_jax.errors import UserError, differences
from enat_jax.evaluation.reconstructions import psnr, read_images, usage
from enat_jax.files import Path
from enat_jax.parallel import hosts
from enat_jax.tokenizers.config import PatchesConfig
from enat_jax.tokenizers.patches import PatchesTokenizer, cut, patches_params

_BATCH = 4096  # patches per step of k-means


def train_patches(
    config: PatchesRunConfig, workdir: Path, *, log: Callable[[str], object] = print
) -> None:
    """Writes a codebook as the EMA of step 0; does nothing where it stands in the workdir already.

    Raises:
        UserError: images that cannot be read or have too few different patches, a workdir with
            another model, or several processes.
    """
    if hosts.several():
        raise UserError("patches are learnt by one process, not by several")
    described = dataclasses.asdict(config)
    metadata = {"kind": "patches", "patches": described["model"], "config": described}
    folder = pathlib.Path(workdir) / CHECKPOINTS
    there = Checkpoints(folder, read_only=True)
    if there.steps():
        if phrases := differences(there.metadata().get("config", {}), described):
            raise UserError(f"{folder} holds another model: {phrases}")
        log(f"{folder} holds these patches already")
        return
    source, size = open_images(config.images), config.train.image_size
    images = read_images(source, config.train.images, size, warn=log)
    params = patches_params(jnp.asarray(learn_patches(images, config.model, config.train.seed)))
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(0, {"ema": params}, metadata=metadata)
    tokenizer, grid = PatchesTokenizer(config.model, params, ""), size // config.model.patch
    pixels = jnp.asarray(images[:: max(1, len(images) // 500)]) / jnp.float32(255)
    token_ids = tokenizer.encode(params, pixels)
    errors = jnp.square(tokenizer.decode(params, token_ids, (grid, grid)) - pixels)
    used = usage(np.asarray(token_ids), tokenizer.codebook_size)["codes_used"]
    log(
        f"{tokenizer.codebook_size} patches of {len(images)} of {source.summary}, in {folder};"
        f" {len(pixels)} images: {psnr(np.asarray(errors.mean(axis=(1, 2, 3)))):.1f} dB, with"
        f" {used:.0%} of the patches"
    )


def learn_patches(
    images: UInt8[np.ndarray, "b y x 3"], cfg: PatchesConfig, seed: int
) -> Float32[np.ndarray, "v p"]:
    """The centres of mini-batch k-means over the patches of images, in [0, 1].

    A patch that occurs n times weighs as root n: counted alike, plain areas would take most of the
    codebook; counted once, they would be missed. A centre becomes the patch that most of what is
    nearest to it shows, if there is one: plain areas stay plain.

    Raises:
        UserError: fewer different patches than the codebook has entries.
    """
    from sklearn.cluster import MiniBatchKMeans  # a second to import

    every = np.concatenate(cut(images, cfg.patch))
    patches, counts = np.unique(every, axis=0, return_counts=True)
    if len(patches) < cfg.codebook_size:
        raise UserError(
            f"model.codebook_size = {cfg.codebook_size}: the images have only {len(patches)}"
            " different patches"
        )
    batch = max(_BATCH, cfg.codebook_size)
    once: Any = 1  # whose type scikit-learn says wrongly
    means = MiniBatchKMeans(cfg.codebook_size, batch_size=batch, n_init=once, random_state=seed)
    pixels = patches.astype(np.float32) / 255
    labels = means.fit(pixels, sample_weight=np.sqrt(counts)).predict(pixels)
    codebook = np.clip(means.cluster_centers_, 0, 1).astype(np.float32)
    totals = np.bincount(labels, counts, minlength=cfg.codebook_size)
    most = np.flatnonzero(counts > totals[labels] / 2)
    codebook[labels[most]] = pixels[most]
    return codebook
