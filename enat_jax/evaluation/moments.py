"""Running mean and covariance of features, in float64 on the host.

Feature by feature what a single pass over all of them would give, in whatever batches and on
however many devices and hosts they come.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Real

from enat_jax.errors import UserError
from enat_jax.evaluation.scores import ScoreSums

PIECE_BYTES = 2**24  # gathered from every host at once


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of features.

    Attributes:
        count: samples seen.
        mean: of every feature.
        scatter: sum of outer products of the samples' deviations from the mean.
    """

    count: int
    mean: Float[np.ndarray, " p"]
    scatter: Float[np.ndarray, "p p"]

    @classmethod
    def empty(cls, features: int) -> "Moments":
        """The moments of no sample yet."""
        return cls(0, np.zeros(features), np.zeros((features, features)))

    def add(self, features: Real[np.ndarray, "b p"] | Real[Array, "b p"]) -> "Moments":
        """The moments with further samples.

        Every call passes over the whole scatter, so batches of some hundreds are quickest.

        Args:
            features: an array of the host; or of devices, of which this host adds its own rows
                (see `local_rows`).

        Raises:
            UserError: a feature that is infinite or not a number.
        """
        rows = local_rows(features).astype(np.float64)
        if not np.isfinite(rows).all():
            wrong = len(rows) - int(np.isfinite(rows).all(axis=1).sum())
            raise UserError(f"features of {wrong} of {len(rows)} images are infinite or NaN")
        if not len(rows):
            return self
        mean = rows.mean(axis=0)
        rows -= mean
        return self.merge(type(self)(len(rows), mean, rows.T @ rows))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of samples (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if not count:
            return self
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        scatter = np.outer(difference, difference * (self.count * other.count / count))
        scatter += self.scatter
        scatter += other.scatter
        return type(self)(count, mean, scatter)

    def covariance(self) -> Float[np.ndarray, "p p"]:
        """Over `count - 1`, as FID's reference statistics have it.

        Raises:
            UserError: fewer than two samples.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)

    def as_arrays(self) -> dict[str, np.ndarray]:
        """Count, mean and scatter by name, for a file."""
        return {"count": np.array(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """The moments that `as_arrays` named."""
        return cls(int(arrays["count"]), np.asarray(arrays["mean"]), np.asarray(arrays["scatter"]))


def local_rows(array: np.ndarray | Array) -> np.ndarray:
    """The rows of an array that this host answers for, in their order.

    Of an array spread over the devices of several hosts, the rows that lie here; those that lie
    on several devices are answered for once. Otherwise all rows. Arrays spread alike, such as
    features and the images' indices, give rows of the same images.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    if any(shard.data.shape[1:] != array.shape[1:] for shard in shards):
        raise ValueError(f"{array.sharding} splits rows, want whole rows on every device")
    shards.sort(key=lambda shard: shard.index[0].start or 0)
    parts = [np.asarray(shard.data) for shard in shards]
    return np.concatenate(parts) if parts else np.zeros((0, *array.shape[1:]), array.dtype)


def across_hosts(moments: Moments) -> Moments:
    """The moments of all hosts' samples, on every host the same to the last bit.

    All hosts call it together. It holds some tens of MiB beside the moments.
    """
    if jax.process_count() == 1:
        return moments
    count = int(sum_across_hosts(np.array([moments.count]))[0])
    if not count:
        return moments
    mean = sum_across_hosts(moments.mean * (moments.count / count))
    # deviations from the common mean: its own part of every host, which alone can be summed
    difference = moments.mean - mean
    scatter = np.outer(difference, difference * moments.count)
    scatter += moments.scatter
    return Moments(count, mean, sum_across_hosts(scatter))


def scores_across_hosts(sums: ScoreSums) -> ScoreSums:
    """The sums of all hosts' images, on every host; all hosts call it together."""
    summed = {name: sum_across_hosts(array) for name, array in sums.as_arrays().items()}
    return ScoreSums.from_arrays(summed | {"total": np.array(sums.total)})


def sum_across_hosts(array: Real[np.ndarray, "..."]) -> Real[np.ndarray, "..."]:
    """The sum of an array of 64-bit numbers over hosts, in the order of hosts.

    JAX would round to 32 bits what it carries between hosts, so pairs of 32-bit words travel.
    All hosts call it together, with arrays of one shape and type.
    """
    if jax.process_count() == 1:
        return array
    flat = np.ascontiguousarray(array).reshape(-1)  # a word view needs one axis
    total = np.zeros_like(flat)
    step = PIECE_BYTES // flat.itemsize
    for start in range(0, len(flat), step):
        words = flat[start : start + step].view(np.uint32)
        for part in np.asarray(multihost_utils.process_allgather(words)):
            total[start : start + step] += part.view(flat.dtype)
    return total.reshape(array.shape)
