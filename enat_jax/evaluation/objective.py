"""The scores that a config can ask for, by name."""

import dataclasses
import importlib
from collections.abc import Callable

import numpy as np
from sklearn.datasets import load_digits

from enat_jax.config import Config, EvaluateConfig, ObjectiveConfig
from enat_jax.data.captions import read_prompts
from enat_jax.errors import UserError
from enat_jax.evaluation.digits import digits_objective
from enat_jax.evaluation.emoji import Cells, emoji_objective
from enat_jax.evaluation.frechet import frechet
from enat_jax.evaluation.inception import FeatureExtractor
from enat_jax.evaluation.inception_score import SPLITS, inception_score
from enat_jax.evaluation.inception_weights import load_inception
from enat_jax.evaluation.metric import Metric, Objective, Wants
from enat_jax.evaluation.neighbours import precision_recall_metric
from enat_jax.evaluation.statistics import read_reference
from enat_jax.parallel.placement import Placement


def make_objective(cfg: ObjectiveConfig, generator: Config, placement: Placement) -> Objective:
    """The objective that a config describes, of a generator whose batches are placed so.

    Raises:
        UserError: an unknown name, files that are missing or wrong, a function that cannot be
            imported, or a generator that the objective cannot score.
    """
    return _objectives("objective.name", cfg.name, cfg, (cfg.output,), generator, placement)[0]


def evaluated(generator: Config, placement: Placement) -> list[Objective]:
    """What `evaluate` scores a generator by, for each protocol; otherwise as `make_objective`."""
    cfg = generator.evaluate
    outputs = ("floats", "uint8") if cfg.protocol == "both" else (cfg.protocol,)
    given = "evaluate.metrics", cfg.metrics, cfg, outputs, generator, placement
    if not cfg.prompts:
        return _objectives(*given)
    prompts = read_prompts(cfg.prompts)
    return [dataclasses.replace(each, prompts=prompts) for each in _objectives(*given)]


def _objectives(
    field: str,
    name: str,
    cfg: ObjectiveConfig | EvaluateConfig,
    outputs: tuple[Wants, ...],
    generator: Config,
    placement: Placement,
) -> list[Objective]:
    """The objective of a name for each output that it takes; `field` is where the name stands."""
    what, inception = f"{field} = {name!r}", "fid" if field == "objective.name" else "inception"
    if name == "digits":
        model = generator.model
        sizes = (model.length, model.codebook_size, model.num_classes)
        if sizes != (64, 17, 10):
            raise UserError(
                f"{what} scores models of 64 tokens, 17 codes and 10 classes, not of {sizes[0]},"
                f" {sizes[1]} and {sizes[2]}"
            )
        return [digits_objective(*load_digits(return_X_y=True))]
    if outputs != ("token_ids",) and generator.tokenizer.name == "none":
        raise UserError(
            f"{what} scores images, but tokenizer.name is 'none': this model gives token ids, not"
            " images"
        )
    if name == "emoji":
        return [emoji_objective(Cells(generator.images.data_dir, generator.images.split))]
    if name == inception:
        section = field.partition(".")[0]
        missing = [f"{section}.{n}" for n in ("inception", "reference") if not getattr(cfg, n)]
        if missing:
            raise UserError(f"config: {' and '.join(missing)} must name a file, for {what}")
        if "token_ids" in outputs:
            raise UserError(f"{what} scores images: {section}.output = 'token_ids' cannot be")
        network = load_inception(cfg.inception, digest=cfg.inception_digest)
        at_once = min(cfg.batch_size, generator.sample.batch_size)
        look = FeatureExtractor(network, placement, at_once=at_once)
        metrics = _inception_metrics(cfg)
        return [Objective(wants, metrics, look) for wants in outputs]
    if ":" not in name.strip(":"):
        raise UserError(
            f"{what} must be {inception!r}, 'digits', 'emoji' or 'package.module:function'"
        )
    metrics = (user_function(what, name),)
    return [Objective(wants, metrics) for wants in outputs]


def _inception_metrics(cfg: ObjectiveConfig | EvaluateConfig) -> tuple[Metric, ...]:
    """Those that see Inception's features, as far as the reference statistics allow."""
    reference = read_reference(cfg.reference)
    metrics = [frechet("fid", reference.pool, lambda seen: seen.pool)]
    if isinstance(cfg, EvaluateConfig):
        if reference.spatial is not None:
            metrics.append(frechet("sfid", reference.spatial, lambda seen: seen.spatial))
        if cfg.num_images >= SPLITS:
            metrics.append(inception_score(cfg.num_images))
        if cfg.precision_recall and reference.features is not None:
            metrics.append(precision_recall_metric(reference.features))
    return tuple(metrics)


def user_function(what: str, name: str) -> Metric:
    """The metric of an importable function of all that was made and its class ids."""
    module, _, name = name.partition(":")
    try:
        function: Callable[..., float] = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing a user's own code may raise anything
        raise UserError(f"{what} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"{what} is no function but {function!r}")

    def value(sums: tuple[list[np.ndarray], list[np.ndarray]]) -> dict[str, float]:
        try:
            return {name: float(function(*map(np.concatenate, sums)))}
        except Exception as error:  # a user's own code may raise anything
            raise UserError(f"{what}: {type(error).__name__}: {error}") from error

    return Metric(
        names=(name,),
        empty=lambda: ([], []),
        add=lambda sums, seen, class_ids: ([*sums[0], seen], [*sums[1], class_ids]),
        value=value,
    )
