"""Everything that the scores of a set of images need to know of it, gathered batch by batch."""

import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from enat_jax.errors import UserError
from enat_jax.evaluation.inception import CLASSES, POOL_FEATURES, SPATIAL_FEATURES, Features
from enat_jax.evaluation.moments import Moments, across_hosts, scores_across_hosts
from enat_jax.evaluation.neighbours import precision_recall
from enat_jax.evaluation.reference import Reference
from enat_jax.evaluation.scores import SPLITS, ScoreSums, frechet_distance_of_moments


@dataclass(eq=False)
class Collected:
    """Sums over the features of images, and where asked for the pool features themselves.

    Attributes:
        pool: moments of the pool features.
        spatial: moments of the spatial features.
        sums: of the Inception Score; None for fewer images than it has splits.
        features: pool features by the image's index; None where nobody needs them.
    """

    pool: Moments
    spatial: Moments
    sums: ScoreSums | None
    features: Float[np.ndarray, "b p"] | None

    @classmethod
    def empty(cls, images: int, features_file: str | os.PathLike[str] | None = None) -> "Collected":
        """Nothing yet of a known number of images.

        Args:
            images: how many there will be.
            features_file: a new `.npy` file for their pool features, 8 kB each; not kept if None.
        """
        features = None
        if features_file is not None:
            shape = (images, POOL_FEATURES)
            features = np.lib.format.open_memmap(features_file, "w+", np.float32, shape)
        return cls(
            pool=Moments.empty(POOL_FEATURES),
            spatial=Moments.empty(SPATIAL_FEATURES),
            sums=ScoreSums.empty(images, CLASSES) if images >= SPLITS else None,
            features=features,
        )

    def add(self, features: Features, indices: Int[np.ndarray, " b"]) -> None:
        """Adds images of given indices, in `[0, images)`, to the sums; each image once.

        Raises:
            UserError: features that are not finite.
        """
        self.pool = self.pool.add(features.pool)
        self.spatial = self.spatial.add(features.spatial)
        if self.sums is not None:
            self.sums = self.sums.add(np.asarray(features.logits), indices)

    def keep(self, pool: Float[np.ndarray, "b p"], indices: Int[np.ndarray, " b"]) -> None:
        """Keeps the pool features of images of given indices, where single ones are kept."""
        if self.features is not None:
            self.features[indices] = pool

    def as_arrays(self) -> dict[str, np.ndarray]:
        """The sums by name, for a file; the single features are in theirs."""
        if isinstance(self.features, np.memmap):
            self.features.flush()
        parts = {"pool": self.pool, "spatial": self.spatial, "sums": self.sums}
        return {
            f"{part}.{name}": array
            for part, value in parts.items()
            if value is not None
            for name, array in value.as_arrays().items()
        }

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], features_file: str | os.PathLike[str] | None
    ) -> "Collected":
        """What `as_arrays` named, and the features in their file, to be gone on with."""

        def part(name: str) -> dict[str, np.ndarray]:
            prefix = f"{name}."
            return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

        features = None
        if features_file is not None:
            if not pathlib.Path(features_file).is_file():
                raise UserError(f"{features_file} is gone: the features gathered so far")
            features = np.lib.format.open_memmap(features_file, "r+")
        return cls(
            pool=Moments.from_arrays(part("pool")),
            spatial=Moments.from_arrays(part("spatial")),
            sums=ScoreSums.from_arrays(part("sums")) if part("sums") else None,
            features=features,
        )

    def to_first_host(self) -> "Collected":
        """The sums over all hosts, on process 0; nothing yet on the others, which start again.

        So what is saved of process 0 is all there is, and whatever is gathered later counts once,
        on however many hosts. All hosts call it together.
        """
        if jax.process_count() == 1:
            return self
        sums = None if self.sums is None else scores_across_hosts(self.sums)
        pool, spatial = across_hosts(self.pool), across_hosts(self.spatial)
        if jax.process_index() == 0:
            return type(self)(pool, spatial, sums, self.features)
        return type(self)(
            pool=Moments.empty(POOL_FEATURES),
            spatial=Moments.empty(SPATIAL_FEATURES),
            sums=None if sums is None else ScoreSums.empty(sums.total, CLASSES),
            features=None,
        )

    def scores(self, reference: Reference) -> dict[str, Any]:
        """FID, sFID, Inception Score, precision and recall, as far as the reference allows."""
        found: dict[str, Any] = {
            "fid": frechet_distance_of_moments(
                self.pool.mean, self.pool.covariance(), reference.mean, reference.covariance
            )
        }
        if reference.spatial_mean is not None and reference.spatial_covariance is not None:
            found["sfid"] = frechet_distance_of_moments(
                self.spatial.mean,
                self.spatial.covariance(),
                reference.spatial_mean,
                reference.spatial_covariance,
            )
        if self.sums is not None:
            mean, spread = self.sums.score()
            found["inception_score"] = {"mean": mean, "spread": spread, "splits": SPLITS}
        if self.features is not None and reference.features is not None:
            found |= precision_recall(reference.features, self.features)._asdict()
        return found
