"""Makes reference statistics: the Inception features of real images, in a file."""

import contextlib
import os
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from enat_jax.config import EvaluateConfig
from enat_jax.data.image_source import ImageConfig, open_images
from enat_jax.data.read_ahead import read_batches
from enat_jax.errors import UserError
from enat_jax.evaluation.features import FeatureExtractor
from enat_jax.evaluation.inception import POOL_FEATURES, SPATIAL_FEATURES
from enat_jax.evaluation.inception_weights import load_inception
from enat_jax.evaluation.moments import Moments, across_hosts, sum_across_hosts
from enat_jax.evaluation.reference import write_reference
from enat_jax.parallel.hosts import from_primary, primary_only
from enat_jax.parallel.placement import MeshConfig, Placement

MOST_FEATURES = 10_000  # of single images: as many as ADM's reference batches hold images


def reference_statistics(
    images: ImageConfig,
    cfg: EvaluateConfig,
    out: str | os.PathLike[str],
    *,
    size: int,
    placement: Placement,
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
        placement: of the devices that share a batch; of several processes, each takes its own
            devices for its own share of the images, and process 0 writes.
        say: called with lines for the user.

    Raises:
        UserError: images or weights that cannot be read, or too many unreadable images.
    """
    if not cfg.inception:
        raise UserError("config: evaluate.inception must name a file")
    source = open_images(images)
    hosts, host = jax.process_count(), jax.process_index()
    if hosts > 1:  # every host looks at images of its own, so none waits for another before the end
        placement = Placement.of(MeshConfig(), jax.local_devices())
    extract = FeatureExtractor(
        load_inception(cfg.inception, digest=cfg.inception_digest),
        placement,
        at_once=cfg.batch_size,
    )
    tell = primary_only(say)
    tell(source.summary)
    pool, spatial = Moments.empty(POOL_FEATURES), Moments.empty(SPATIAL_FEATURES)
    every = -(-len(source) // MOST_FEATURES)
    single = np.zeros((-(-len(source) // every), POOL_FEATURES), np.float32)
    kept = np.zeros(len(single), np.int64)
    batch_size = cfg.batch_size * placement.batch_shards
    own = range(len(source))[host::hosts]
    spans = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    batches = read_batches(
        source, spans, batch_size=batch_size, size=size, threads=images.read_threads
    )
    skipped, most = 0, images.max_unreadable * len(source)
    hidden = None if host == 0 else True  # None: hidden where nobody looks
    with contextlib.closing(batches), tqdm(total=len(own), unit="image", disable=hidden) as bar:
        for batch in batches:
            for error in batch.unreadable:
                with bar.external_write_mode():
                    say(f"skipped {error}")
            skipped += len(batch.unreadable)
            if skipped > most:
                break  # to where the other hosts learn of it
            made = extract(placement.put(batch.images, placement.batch))
            features = np.asarray(made.pool)[batch.readable]
            pool = pool.add(features)
            spatial = spatial.add(np.asarray(made.spatial)[batch.readable])
            rows = np.array(batch.span)[batch.readable[: len(batch.span)]]
            chosen = rows % every == 0
            single[rows[chosen] // every] = features[chosen]
            kept[rows[chosen] // every] = 1
            bar.update(len(batch.span))
    skipped = int(sum_across_hosts(np.array([skipped]))[0])
    if skipped > most:
        raise UserError(
            f"{skipped} of {len(source)} images are unreadable so far, more than"
            f" images.max_unreadable = {images.max_unreadable} allows"
        )
    pool, spatial = across_hosts(pool), across_hosts(spatial)
    # a row is of one host, and zeros of the others
    single = sum_across_hosts(single.astype(np.float64)).astype(np.float32)
    single = single[sum_across_hosts(kept) > 0]
    from_primary(
        lambda: write_reference(out, pool, spatial, single, source=source.name, image_size=size)
    )
    tell(f"wrote the statistics of {pool.count} images of {size} x {size} pixels to {out}")
