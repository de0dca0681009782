"""Makes reference statistics: the Inception features of real images, in a file."""

import contextlib
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from enat_jax.config import EvaluateConfig
from enat_jax.convert.inception import load_inception
from enat_jax.errors import UserError
from enat_jax.features import FeatureExtractor
from enat_jax.image_source import ImageConfig, open_images
from enat_jax.metrics.inception import POOL_FEATURES, SPATIAL_FEATURES
from enat_jax.metrics.moments import Moments
from enat_jax.metrics.reference import write_reference
from enat_jax.read_ahead import read_batches
from enat_jax.sharding import batch_sharding, batch_shards

MOST_FEATURES = 10_000  # of single images: as many as ADM's reference batches hold images


def reference_statistics(
    images: ImageConfig,
    cfg: EvaluateConfig,
    out: str | os.PathLike[str],
    *,
    size: int,
    mesh: Mesh,
    say: Callable[[str], object] = print,
) -> None:
    """Writes `mu`, `sigma` (pool), `mu_s`, `sigma_s` (spatial) and `features` of real images.

    Images are cropped as `tokenize` crops them, and not mirrored. Unreadable ones are named and
    skipped, up to `images.max_unreadable`. `features` are the pool features of up to 10,000
    images spread evenly over the set, for precision and recall.

    Args:
        images: which ones.
        cfg: where Inception's weights are.
        out: the `.npz` to write.
        size: pixels per side of the crops: that of the images they are to be compared with.
        mesh: devices that share a batch.
        say: called with lines for the user.

    Raises:
        UserError: images or weights that cannot be read, or too many unreadable images.
    """
    if not cfg.inception:
        raise UserError("config: evaluate.inception must name a file")
    source = open_images(images)
    extract = FeatureExtractor(
        load_inception(cfg.inception, digest=cfg.inception_digest), mesh, at_once=cfg.batch_size
    )
    say(source.summary)
    pool, spatial = Moments.empty(POOL_FEATURES), Moments.empty(SPATIAL_FEATURES)
    every = -(-len(source) // MOST_FEATURES)
    kept: list[np.ndarray] = []
    batch_size = cfg.batch_size * batch_shards(mesh)
    every_image = range(len(source))
    spans = [every_image[start : start + batch_size] for start in every_image[::batch_size]]
    batches = read_batches(
        source, spans, batch_size=batch_size, size=size, threads=images.read_threads
    )
    skipped = 0
    with contextlib.closing(batches), tqdm(total=len(source), unit="image", disable=None) as bar:
        for batch in batches:
            for error in batch.unreadable:
                with bar.external_write_mode():
                    say(f"skipped {error}")
            skipped += len(batch.unreadable)
            if skipped > images.max_unreadable * len(source):
                raise UserError(
                    f"{skipped} of {len(source)} images are unreadable so far, more than"
                    f" images.max_unreadable = {images.max_unreadable} allows"
                )
            made = extract(jax.device_put(batch.images, batch_sharding(mesh)))
            features = np.asarray(made.pool)[batch.readable]
            pool = pool.add(features)
            spatial = spatial.add(np.asarray(made.spatial)[batch.readable])
            rows = np.arange(batch.span.start, batch.span.start + batch_size)[batch.readable]
            kept.append(features[rows % every == 0])
            bar.update(len(batch.span))
    write_reference(out, pool, spatial, np.concatenate(kept), source=source.name, image_size=size)
    say(f"wrote the statistics of {pool.count} images of {size} x {size} pixels to {out}")
