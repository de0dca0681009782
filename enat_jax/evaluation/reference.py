"""Reference statistics of real images: what generated ones are compared with, in a file."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from enat_jax.errors import UserError
from enat_jax.evaluation.inception import POOL_FEATURES, SPATIAL_FEATURES
from enat_jax.evaluation.moments import Moments
from enat_jax.files import write_arrays


class ReferenceError(UserError):
    """Reference statistics that cannot be read, or are of something else than Inception."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of the Inception features of real images.

    Attributes:
        mean: of the pool features.
        covariance: of the pool features.
        spatial_mean: of the spatial features; None where the file has none.
        spatial_covariance: likewise.
        features: pool features of single images; None where the file has none.
        images: how many were counted; None where the file does not say.
    """

    mean: Float[np.ndarray, " p"]
    covariance: Float[np.ndarray, "p p"]
    spatial_mean: Float[np.ndarray, " q"] | None = None
    spatial_covariance: Float[np.ndarray, "q q"] | None = None
    features: Float[np.ndarray, "m p"] | None = None
    images: int | None = None


def read_reference(path: str | os.PathLike[str]) -> Reference:
    """Reads reference statistics: `mu`, `sigma`, and where there are `mu_s`, `sigma_s`, `features`.

    The files of the ADM suite and of U-ViT work as they are.

    Raises:
        ReferenceError: an unreadable file, or arrays missing, misshapen or not finite.
    """
    try:
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            names = ("mu", "sigma", "mu_s", "sigma_s", "features", "images")
            arrays = {name: file[name] for name in names if name in file.files}
            found = list(file.files)
    except Exception as error:  # NumPy lets pass what zip files and pickles raise
        raise ReferenceError(f"cannot read reference statistics {path}: {error}") from error
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if missing:
        raise ReferenceError(
            f"{path} holds no reference statistics: no {' and no '.join(missing)} among {found}"
        )
    p, q = POOL_FEATURES, SPATIAL_FEATURES
    shapes = {"mu": (p,), "sigma": (p, p), "mu_s": (q,), "sigma_s": (q, q)}
    wrong = [
        f"{name} is {arrays[name].shape}, must be {shape}"
        for name, shape in shapes.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if "features" in arrays and arrays["features"].shape[1:] != (p,):
        wrong.append(f"features is {arrays['features'].shape}, must be (images, {p})")
    wrong += [
        f"{name} has values that are not finite"
        for name, array in arrays.items()
        if array.dtype.kind not in "iuf" or not np.isfinite(array).all()
    ]
    if wrong:
        raise ReferenceError(f"reference statistics {path}: {'; '.join(wrong)}")
    count = arrays.get("images")
    return Reference(
        mean=arrays["mu"].astype(np.float64),
        covariance=arrays["sigma"].astype(np.float64),
        spatial_mean=_float64(arrays.get("mu_s")),
        spatial_covariance=_float64(arrays.get("sigma_s")),
        features=arrays.get("features"),
        images=None if count is None else int(count),
    )


def write_reference(
    path: str | os.PathLike[str],
    pool: Moments,
    spatial: Moments,
    features: Float[np.ndarray, "m p"] | None = None,
    **about: Any,
) -> None:
    """Writes the statistics of real images; the file has its name only once it is whole.

    Args:
        path: ends in `.npz`.
        pool: of the pool features.
        spatial: of the spatial features.
        features: pool features of some of the images, for precision and recall.
        about: what else the file is to say, such as where the images came from.

    Raises:
        UserError: fewer than two images.
    """
    arrays = {
        "mu": pool.mean,
        "sigma": pool.covariance(),
        "mu_s": spatial.mean,
        "sigma_s": spatial.covariance(),
        "images": np.array(pool.count),
        **({} if features is None else {"features": features}),
        **{name: np.array(value) for name, value in about.items()},
    }
    write_arrays(path, arrays)


def _float64(array: Shaped[np.ndarray, "..."] | None) -> Float[np.ndarray, "..."] | None:
    return None if array is None else array.astype(np.float64)
