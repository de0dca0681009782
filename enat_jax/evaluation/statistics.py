"""Statistics of the Inception features of real images: made, written, read."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from enat_jax.config import EvaluateConfig
from enat_jax.data.image_batches import read_batches
from enat_jax.data.images import ImageConfig, open_images
from enat_jax.errors import UserError
from enat_jax.evaluation.frechet import Gaussian, Moments
from enat_jax.evaluation.inception import POOL_FEATURES, SPATIAL_FEATURES, FeatureExtractor
from enat_jax.evaluation.inception_weights import load_inception
from enat_jax.files import Path, write_arrays
from enat_jax.parallel.hosts import all_gather, from_primary, is_primary, primary_only
from enat_jax.parallel.placement import Placement

MOST_FEATURES = 10_000  # of single images: as many as ADM's reference batches hold images


@dataclass(frozen=True, eq=False)
class Reference:
    """What generated images are compared with.

    Attributes:
        pool: of the pool features.
        spatial: of the spatial features; None where the file has none.
        features: pool features of single images; None where the file has none.
    """

    pool: Gaussian
    spatial: Gaussian | None = None
    features: Float[np.ndarray, "m p"] | None = None


def read_reference(path: Path) -> Reference:
    """Reads statistics: `mu`, `sigma`, and where there are `mu_s`, `sigma_s`, `features`.

    The files of the ADM suite and of U-ViT work as they are.

    Raises:
        UserError: an unreadable file, or arrays missing, misshapen or not finite.
    """
    p, q = POOL_FEATURES, SPATIAL_FEATURES
    shapes = {"mu": (p,), "sigma": (p, p), "mu_s": (q,), "sigma_s": (q, q)}
    try:
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            names = list(file.files)
            arrays = {name: file[name] for name in (*shapes, "features") if name in names}
    except Exception as error:  # NumPy lets pass what zip files and pickles raise
        raise UserError(f"cannot read reference statistics {path}: {error}") from error
    wrong = [f"no {name} among {names}" for name in ("mu", "sigma") if name not in arrays]
    for name, array in arrays.items():
        shape = shapes.get(name, (*array.shape[:1], p))
        if array.shape != shape:
            wrong.append(f"{name} is {array.shape}, must be {shape}")
        elif array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            wrong.append(f"{name} has values that are not finite")
    if wrong:
        raise UserError(f"reference statistics {path}: {'; '.join(wrong)}")
    has_spatial = "mu_s" in arrays and "sigma_s" in arrays
    return Reference(
        pool=Gaussian(arrays["mu"], arrays["sigma"]),
        spatial=Gaussian(arrays["mu_s"], arrays["sigma_s"]) if has_spatial else None,
        features=arrays.get("features"),
    )


def reference_statistics(
    images: ImageConfig,
    cfg: EvaluateConfig,
    out: Path,
    *,
    size: int,
    placement: Placement,
    say: Callable[[str], object] = print,
) -> None:
    """Writes `mu`, `sigma` (pool), `mu_s`, `sigma_s` (spatial) and `features` of real images.

    Images are cropped as `tokenize` crops them, and not mirrored. Unreadable ones are named and
    skipped, up to `images.max_unreadable`. `features` are the pool features of up to 10,000
    images spread evenly over the set, for precision and recall. Crops have `size` pixels per side:
    as many as the images that they are to be compared with. Each process reads its own share of a
    batch, and the primary process adds up and writes the `.npz` at `out`.

    Raises:
        UserError: images or weights that cannot be read, or too many unreadable images.
    """
    if not cfg.inception:
        raise UserError("config: evaluate.inception must name a file")
    source = open_images(images)
    inception = load_inception(cfg.inception, digest=cfg.inception_digest)
    extract = FeatureExtractor(inception, placement, at_once=cfg.batch_size)
    tell = primary_only(say)
    tell(source.summary)
    total, batch_size = len(source), cfg.batch_size * placement.batch_shards
    share = len(placement.own_rows(batch_size))
    first = jax.process_index() * share
    spans = [range(total)[start + first : start + first + share]
             for start in range(0, total, batch_size)]  # fmt: skip
    threads = images.read_threads
    batches = read_batches(source, spans, batch_size=share, size=size, threads=threads)
    pool, spatial = Moments.empty(POOL_FEATURES), Moments.empty(SPATIAL_FEATURES)
    single, every = [], -(-total // MOST_FEATURES)
    done = readable = 0
    hidden = None if is_primary() else True  # None: hidden where nobody looks
    with tqdm(total=total, unit="image", disable=hidden) as bar:
        for batch in batches:
            for error in batch.unreadable:
                with bar.external_write_mode():
                    say(f"skipped {error}")
            numbers = np.where(batch.readable, batch.span.start + np.arange(share), -1)
            numbers = placement.put_batch(numbers.astype(np.int32), batch_size)
            made = extract(placement.put_batch(batch.images, batch_size))
            seen, numbers = jax.tree.map(all_gather, (made, numbers))
            rows = np.argsort(numbers)[np.sum(numbers < 0) :]
            done = min(done + batch_size, total)
            readable += len(rows)
            if done - readable > images.max_unreadable * total:
                raise UserError(
                    f"{done - readable} of {total} images are unreadable so far, more than"
                    f" images.max_unreadable = {images.max_unreadable} allows"
                )
            if is_primary():
                pool, spatial = pool.add(seen.pool[rows]), spatial.add(seen.spatial[rows])
                single.append(seen.pool[rows[numbers[rows] % every == 0]])
            bar.update(done - bar.n)

    def write() -> None:
        (mu, sigma), (mu_s, sigma_s) = pool.gaussian(), spatial.gaussian()
        arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
        arrays |= {"images": pool.count, "features": np.concatenate(single)}
        write_arrays(out, {**arrays, "source": source.name, "image_size": size})

    from_primary(write)
    tell(f"wrote the statistics of {readable} images of {size} x {size} pixels to {out}")
