"""The config of an experiment: typed, checked whole before anything is allocated."""

import ast
import copy
import dataclasses
import difflib
import importlib.util
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_collections

from enat_jax.data import DataConfig
from enat_jax.errors import UserError
from enat_jax.models.enat import ENATConfig
from enat_jax.optim import OptimConfig
from enat_jax.sharding import MeshConfig
from enat_jax.strategy import SCHEDULES, StrategyConfig, make_strategy


class ConfigError(UserError):
    """A config that cannot be run; the message names every field that is wrong."""


@dataclass(frozen=True)
class TokenizerConfig:
    """What turns token ids into images.

    Attributes:
        name: `pixels` (grey levels are tokens), or `none`: token ids only.
        grid: rows and columns of tokens.
    """

    name: Literal["pixels", "none"] = "none"
    grid: tuple[int, int] = (16, 16)


@dataclass(frozen=True)
class TrainConfig:
    """A training run; ENAT's recipe by default (its section 5.1).

    Attributes:
        seed: of everything random.
        steps: optimiser steps.
        batch_size: images per step, over all devices.
        accumulation: microbatches a step's gradient is averaged over.
        images_per_row: images packed into one row, each with its own mask ratio.
        programs: compiled training programs, each with its own plans.
        mask_beta: the mask ratio's Beta distribution.
        reuse_probability: share of images trained with reused features.
        class_dropout: share of images trained without their class. The reference drops 0.15 in
            its data and 0.1 of the rest in the network: 0.235 in all.
        label_smoothing: of the cross-entropy.
        log_every: steps between two lines of the log.
        sample_every: steps between two sample grids; 0 makes none.
        checkpoint_every: steps between two checkpoints.
        keep: newest checkpoints kept.
    """

    seed: int = 0
    steps: int = 500_000
    batch_size: int = 2048
    accumulation: int = 1
    images_per_row: int = 8
    programs: int = 4
    mask_beta: tuple[float, float] = (12.0, 3.0)
    reuse_probability: float = 0.5
    class_dropout: float = 0.235
    label_smoothing: float = 0.1
    log_every: int = 100
    sample_every: int = 5000
    checkpoint_every: int = 5000
    keep: int = 3


@dataclass(frozen=True)
class SampleConfig:
    """How images are generated.

    Attributes:
        batch_size: images per call, over all devices.
        buckets: compiled step bodies; 0 chooses, see `plans.group_into_buckets`.
        max_padding: most extra FLOPs of the automatic choice, as a fraction.
    """

    batch_size: int = 64
    buckets: int = 0
    max_padding: float = 0.15


@dataclass(frozen=True)
class Config:
    """One experiment."""

    model: ENATConfig = field(default_factory=ENATConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, applies overrides, and checks the whole.

    Args:
        path: a Python file with `get_config() -> ml_collections.ConfigDict`; after a colon, an
            argument for it.
        overrides: `section.field=value` each.

    Raises:
        ConfigError: an unreadable file, unknown fields, wrong types or values; all at once.
    """
    file, _, argument = path.partition(":")
    if not os.path.isfile(file):
        raise ConfigError(f"no config file {file!r}")
    try:
        spec = importlib.util.spec_from_file_location("enat_jax_config", file)
        if spec is None or spec.loader is None:
            raise ImportError("it must be a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded = module.get_config(*([argument] if argument else []))
    except Exception as error:
        raise ConfigError(f"config file {file}: {type(error).__name__}: {error}") from error
    if not isinstance(loaded, ml_collections.ConfigDict):
        raise ConfigError(f"config file {file}: get_config() gave no ConfigDict")
    return override_config(loaded.to_dict(), overrides)


def override_config(fields: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """Builds and checks a config from nested mappings after applying overrides.

    Args:
        fields: section -> field -> value.
        overrides: `section.field=value` each.

    Raises:
        ConfigError: unknown fields, wrong types or values; all at once.
    """
    changed = copy.deepcopy(dict(fields))
    problems = [problem for text in overrides if (problem := _override(changed, text))]
    return config_from_dict(changed, problems)


def config_from_dict(fields: Mapping[str, Any], problems: Sequence[str] = ()) -> Config:
    """Builds and checks a config from nested mappings; what is absent keeps its default.

    Args:
        fields: section -> field -> value, as `dataclasses.asdict` or JSON gives them.
        problems: found before, to be reported together with what is found here.

    Raises:
        ConfigError: unknown fields, wrong types or values; all at once.
    """
    found = list(problems)
    config = _build(Config, fields, "", found)
    if not found:
        found += check(config)
    if found:
        raise ConfigError("config: " + "; ".join(found))
    return config


def check(config: Config) -> list[str]:
    """What is wrong with a config, one phrase per problem, each with value, limit and field."""
    model, train, optim = config.model, config.train, config.optim
    unit = train.images_per_row * train.accumulation
    rules = [
        (model.width % max(model.num_heads, 1) == 0, "model.width", model.width,
         f"must be a multiple of model.num_heads = {model.num_heads}"),
        (config.tokenizer.grid[0] * config.tokenizer.grid[1] == model.length,
         "model.length", model.length,
         f"must be the product of tokenizer.grid = {config.tokenizer.grid}"),
        (model.codebook_size < 2**16, "model.codebook_size", model.codebook_size,
         f"must be below {2**16}"),
        (config.tokenizer.name != "pixels" or model.codebook_size <= 256, "model.codebook_size",
         model.codebook_size, "must be at most 256 greys for tokenizer.name = 'pixels'"),
        (1 <= config.strategy.steps <= model.length, "strategy.steps", config.strategy.steps,
         f"must be between 1 and model.length = {model.length}"),
        (config.strategy.schedule in SCHEDULES, "strategy.schedule", config.strategy.schedule,
         f"must be one of {sorted(SCHEDULES)}"),
        (config.strategy.sampling_temperature > 0, "strategy.sampling_temperature",
         config.strategy.sampling_temperature, "must be above 0"),
        (config.strategy.choice_temperature >= 0, "strategy.choice_temperature",
         config.strategy.choice_temperature, "must be at least 0"),
        (config.strategy.guidance_scale >= 0, "strategy.guidance_scale",
         config.strategy.guidance_scale, "must be at least 0"),
        (train.batch_size % max(unit, 1) == 0, "train.batch_size", train.batch_size,
         f"must be a multiple of train.images_per_row x train.accumulation = {unit}"),
        (train.seed < 2**32, "train.seed", train.seed, f"must be below {2**32}"),
        (model.mlp_ratio > 0, "model.mlp_ratio", model.mlp_ratio, "must be above 0"),
        (min(train.mask_beta) > 0, "train.mask_beta", train.mask_beta, "must be above 0"),
        (1 <= train.programs <= 4, "train.programs", train.programs, "must be between 1 and 4"),
        (optim.decay == "constant" or optim.warmup_steps < train.steps, "optim.warmup_steps",
         optim.warmup_steps, f"must be below train.steps = {train.steps}"),
    ]  # fmt: skip
    rules += [
        (value >= 1, name, value, "must be at least 1")
        for name, value in {
            **{f"model.{name}": getattr(model, name) for name in
               ("num_classes", "width", "num_heads", "encoder_depth", "decoder_depth")},
            "model.length - 1": model.length - 1,
            "model.codebook_size - 1": model.codebook_size - 1,
            **{f"train.{name}": getattr(train, name) for name in
               ("steps", "batch_size", "accumulation", "images_per_row", "log_every",
                "checkpoint_every", "keep")},
            "tokenizer.grid[0]": config.tokenizer.grid[0],
            "tokenizer.grid[1]": config.tokenizer.grid[1],
            "data.read_threads": config.data.read_threads,
            "sample.batch_size": config.sample.batch_size,
        }.items()
    ]  # fmt: skip
    rules += [
        (value >= 0, name, value, "must be at least 0")
        for name, value in {
            "train.seed": train.seed,
            "train.sample_every": train.sample_every,
            "sample.buckets": config.sample.buckets,
            "sample.max_padding": config.sample.max_padding,
            "optim.learning_rate": optim.learning_rate,
            "optim.warmup_steps": optim.warmup_steps,
            "optim.weight_decay": optim.weight_decay,
            "optim.epsilon": optim.epsilon,
            "optim.max_grad_norm": optim.max_grad_norm,
        }.items()
    ]
    rules += [
        (0 <= value < 1, name, value, "must be in [0, 1)")
        for name, value in {
            "model.dropout": model.dropout,
            "train.class_dropout": train.class_dropout,
            "train.label_smoothing": train.label_smoothing,
            "optim.ema_decay": optim.ema_decay,
            "optim.betas[0]": optim.betas[0],
            "optim.betas[1]": optim.betas[1],
        }.items()
    ]
    rules.append((0 <= train.reuse_probability <= 1, "train.reuse_probability",
                  train.reuse_probability, "must be in [0, 1]"))  # fmt: skip
    problems = [f"{name} = {value} {limit}" for holds, name, value, limit in rules if not holds]
    if not problems and config.strategy.rule != "file":  # a file is read where it is used
        try:
            make_strategy(config.strategy).masked_counts(model.length)
        except ValueError as error:
            problems.append(f"strategy: {error}")
    return problems


def _override(fields: dict[str, Any], text: str) -> str | None:
    """Puts one `section.field=value` into nested dicts; returns what is wrong with it."""
    path, equals, value = text.partition("=")
    *sections, name = path.split(".")
    if not equals:
        return f"override {text!r} is not of the form section.field=value"
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            return f"{path} = {value}: {section} is no section"
    try:
        fields[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        fields[name] = value
    return None


def _build(kind: Any, fields: Any, path: str, problems: list[str]) -> Any:
    """Builds a dataclass from a mapping, collecting problems instead of raising."""
    if not isinstance(fields, Mapping):
        problems.append(f"{path or 'config'} = {fields!r} must be a section of fields")
        return kind()
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in fields.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            guess = f" (did you mean {close[0]}?)" if close else ""
            problems.append(f"{where} = {value!r} is no field of {path or 'the config'}{guess}")
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, where, problems)
        else:
            before = len(problems)
            value = _typed(hints[name], value, where, problems)
            if len(problems) == before:
                values[name] = value
    return kind(**values)


def _typed(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """A value of the field's type, or a problem."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments:
            return value
        problems.append(f"{where} = {value!r} must be one of {', '.join(map(repr, arguments))}")
    elif origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        return tuple(_typed(k, v, where, problems) for k, v in zip(arguments, value, strict=True))
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    else:
        name = kind if isinstance(kind, types.GenericAlias) else kind.__name__
        problems.append(f"{where} = {value!r} must be of type {name}")
    return value
