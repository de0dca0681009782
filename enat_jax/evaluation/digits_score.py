"""Scores generated digits against the real ones: class accuracy and Frechet distance of pixels.

Run as `python -m enat_jax.evaluation.digits_score --workdir=runs/digits`.
"""

import argparse
import json
import sys
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float, Int, Real
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from enat_jax.errors import UserError
from enat_jax.evaluation.scores import frechet_distance
from enat_jax.parallel.compilation import keep_compiled_programs
from enat_jax.sampling.sampler import load


class Score(NamedTuple):
    """How good a set of digits is.

    Attributes:
        accuracy: share that an SVC reads as the class they should be.
        frechet_distance: of the 64 pixel values (0..16) to those of all real digits.
    """

    accuracy: float
    frechet_distance: float


class Judge:
    """Scores digits given as 64 grey levels each, against real ones.

    Args:
        real: the real ones; the SVC learns from them, once.
        labels: what they are.
    """

    def __init__(self, real: Float[np.ndarray, "m n"], labels: Int[np.ndarray, " m"]):
        self._real = real
        self._reader = SVC(gamma=cast(Any, 0.001)).fit(real, labels)

    def __call__(self, pixels: Real[np.ndarray, "b n"], labels: Int[np.ndarray, " b"]) -> Score:
        """The score of digits that should be `labels`."""
        accuracy = float(np.mean(self._reader.predict(pixels) == labels))
        return Score(accuracy, float(frechet_distance(pixels, self._real)))


def real_halves(
    real: Float[np.ndarray, "m n"], labels: Int[np.ndarray, " m"], seed: int = 0
) -> Score:
    """The same figures for real digits: one random half read and measured against the other."""
    order = np.random.default_rng(seed).permutation(len(real))
    one, other = np.array_split(order, 2)
    return Judge(real[other], labels[other])(real[one], labels[one])


def main(arguments: list[str]) -> int:
    """Generates digits from a run and prints their scores beside those of real digits."""
    parser = argparse.ArgumentParser(description="scores of generated digits")
    parser.add_argument("--workdir", required=True, help="a run of configs/digits.py")
    parser.add_argument("--per_class", type=int, default=100, help="images of each digit")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args(arguments)
    keep_compiled_programs()
    real, real_labels = load_digits(return_X_y=True)
    labels = np.repeat(np.arange(10), args.per_class)
    try:
        sampler = load(args.workdir)
        token_ids = np.concatenate(list(sampler.token_batches(labels, seed=args.seed)))
    except UserError as error:
        print(f"score: {error}", file=sys.stderr)
        return 1
    generated = Judge(real, real_labels)(token_ids, labels)
    halves = real_halves(real, real_labels)
    print(f"{len(labels)} generated digits: {sampler.describe()}")
    for name, each in (("generated", generated), ("real, half to half", halves)):
        print(
            f"{name:20} accuracy {each.accuracy:.3f}"
            f"   Frechet distance of pixels {each.frechet_distance:.1f}"
        )
    print(json.dumps({"generated": generated._asdict(), "real": halves._asdict()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
