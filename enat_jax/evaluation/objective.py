"""What a generator is judged by: the score of the images that it made."""

import importlib
import math
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped
from sklearn.datasets import load_digits

from enat_jax.config import Config, ObjectiveConfig, Wants
from enat_jax.errors import UserError
from enat_jax.evaluation.digits_score import Judge
from enat_jax.evaluation.features import FeatureExtractor
from enat_jax.evaluation.inception import POOL_FEATURES
from enat_jax.evaluation.inception_weights import load_inception
from enat_jax.evaluation.moments import Moments, across_hosts, local_rows, sum_across_hosts
from enat_jax.evaluation.reference import read_reference
from enat_jax.evaluation.scores import frechet_distance_of_moments
from enat_jax.parallel.hosts import all_gather
from enat_jax.parallel.placement import Placement

Function = Callable[[Shaped[np.ndarray, "b ..."], Int[np.ndarray, " b"]], float]
Batch = Shaped[Array, "b ..."] | Shaped[np.ndarray, "b ..."]


class ObjectiveError(UserError):
    """An objective that does not exist, or that the generator cannot be judged by."""


@runtime_checkable
class Scorer(Protocol):
    """Judges one set of images, batch by batch; all hosts call it together."""

    def add(self, made: Batch, class_ids: Int[np.ndarray, " m"]) -> None:
        """Adds a batch.

        Args:
            made: what the objective wants, as many as the mesh's devices can share evenly.
            class_ids: of the images that count, the first of the batch: no more than it holds.
        """
        ...

    def value(self) -> dict[str, float]:
        """The scores by name; the first one is to be minimised, and all may be infinite or NaN."""
        ...


@runtime_checkable
class Objective(Protocol):
    """How sets of images are judged.

    Attributes:
        wants: what a scorer is given.
        names: of the scores, the one to be minimised first.
    """

    wants: Wants
    names: tuple[str, ...]

    def start(self) -> Scorer:
        """A scorer of a new set of images."""
        ...


def make_objective(cfg: ObjectiveConfig, generator: Config, placement: Placement) -> Objective:
    """The objective that a config describes.

    Args:
        cfg: the objective's config.
        generator: the config of the generator to be judged.
        placement: of the devices that its batches are split over.

    Raises:
        UserError: an unknown name, files that are missing or wrong, a function that cannot be
            imported, or a generator that the objective cannot judge.
    """
    if cfg.name == "digits":
        sizes = (generator.model.length, generator.model.codebook_size, generator.model.num_classes)
        if sizes != (64, 17, 10):
            raise ObjectiveError(
                "objective.name = 'digits' judges models of 64 tokens, 17 codes and 10 classes, not"
                f" of {sizes[0]}, {sizes[1]} and {sizes[2]}"
            )
        return _Digits()
    wants: Wants = cfg.output
    if generator.tokenizer.name == "none" and (cfg.name == "fid" or wants != "token_ids"):
        raise ObjectiveError(
            f"objective.name = {cfg.name!r} judges images, but tokenizer.name is 'none': this model"
            " gives token ids"
        )
    if cfg.name == "fid":
        return _Fid(cfg, placement)
    return _UserFunction(cfg.name, _imported(cfg.name), wants)


class _Fid:
    """Frechet distance of Inception's pool features."""

    names: tuple[str, ...] = ("fid",)

    def __init__(self, cfg: ObjectiveConfig, placement: Placement):
        problems = [f"objective.{name} must name a file, for objective.name = 'fid'"
                    for name in ("inception", "reference") if not getattr(cfg, name)]  # fmt: skip
        if cfg.output == "token_ids":
            problems.append("objective.output = 'token_ids', FID needs 'floats' or 'uint8'")
        if cfg.batch_size < 1:
            problems.append(f"objective.batch_size = {cfg.batch_size}, must be at least 1")
        if problems:
            raise ObjectiveError("; ".join(problems))
        self.wants: Wants = cfg.output
        self.reference = read_reference(cfg.reference)
        inception = load_inception(cfg.inception, digest=cfg.inception_digest)
        self.extract = FeatureExtractor(inception, placement, at_once=cfg.batch_size)
        self.placement = placement

    def start(self) -> "_FidScorer":
        return _FidScorer(self)


class _FidScorer:
    def __init__(self, objective: _Fid):
        self._objective = objective
        self._moments, self._finite = Moments.empty(POOL_FEATURES), True

    def add(self, made: Batch, class_ids: Int[np.ndarray, " m"]) -> None:
        placement = self._objective.placement
        images = placement.put(made, placement.batch)
        rows = np.arange(len(images), dtype=np.int32)
        own = local_rows(placement.put(rows, placement.batch))
        pool = local_rows(self._objective.extract(images).pool)[own < len(class_ids)]
        if np.isfinite(pool).all():
            self._moments = self._moments.add(pool)
        else:
            self._finite = False

    def value(self) -> dict[str, float]:
        if sum_across_hosts(np.array([not self._finite], np.int64))[0]:
            return {"fid": math.nan}
        made, real = across_hosts(self._moments), self._objective.reference
        distance = frechet_distance_of_moments(
            made.mean, made.covariance(), real.mean, real.covariance
        )
        return {"fid": float(distance)}


class _Kept:
    """Keeps all images, and judges them together."""

    def __init__(self, judge: Callable[[np.ndarray, np.ndarray], dict[str, float]]):
        self._judge = judge
        self._made: list[np.ndarray] = []
        self._classes: list[np.ndarray] = []

    def add(self, made: Batch, class_ids: Int[np.ndarray, " m"]) -> None:
        whole = all_gather(made) if isinstance(made, jax.Array) else made
        self._made.append(np.asarray(whole)[: len(class_ids)])
        self._classes.append(np.asarray(class_ids))

    def value(self) -> dict[str, float]:
        return self._judge(np.concatenate(self._made), np.concatenate(self._classes))


class _Digits:
    """Frechet distance of the pixel values, and the share of digits read as what they should be."""

    wants: Wants = "token_ids"
    names: tuple[str, ...] = ("frechet_distance", "accuracy")

    def __init__(self) -> None:
        self._score = Judge(*load_digits(return_X_y=True))

    def start(self) -> _Kept:
        return _Kept(self._judge)

    def _judge(self, token_ids: np.ndarray, class_ids: np.ndarray) -> dict[str, float]:
        score = self._score(token_ids, class_ids)
        return {name: getattr(score, name) for name in self.names}


class _UserFunction:
    """A function of all that was made."""

    def __init__(self, name: str, function: Function, wants: Wants):
        self.wants: Wants = wants
        self.names: tuple[str, ...] = (name.partition(":")[2],)
        self._name, self._function = name, function

    def start(self) -> _Kept:
        return _Kept(self._judge)

    def _judge(self, made: np.ndarray, class_ids: np.ndarray) -> dict[str, float]:
        try:
            value = float(self._function(made, class_ids))
        except Exception as error:  # a user's own code may raise anything
            raise ObjectiveError(
                f"objective.name = {self._name!r}: {type(error).__name__}: {error}"
            ) from error
        return {self.names[0]: value}


def is_finite(scores: dict[str, float]) -> bool:
    """Whether the score to be minimised is a finite number."""
    return math.isfinite(next(iter(scores.values())))


def _imported(name: str) -> Function:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ObjectiveError(
            f"objective.name = {name!r} must be 'fid', 'digits' or 'package.module:function'"
        )
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing a user's own code may raise anything
        raise ObjectiveError(
            f"objective.name = {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ObjectiveError(f"objective.name = {name!r} is no function but {found!r}")
    return cast(Function, found)
