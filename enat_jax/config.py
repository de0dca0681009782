"""The config of an experiment: typed, checked whole before anything is allocated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from enat_jax.config_file import make_config, read_fields
from enat_jax.core.strategy import SCHEDULES, StrategyConfig, make_strategy
from enat_jax.data.batches import DataConfig
from enat_jax.data.images import ImageConfig
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.networks import NetworkConfig, network_problems
from enat_jax.parallel.placement import MeshConfig


@dataclass(frozen=True)
class TokenizerConfig:
    """What turns token ids into images.

    Attributes:
        name: `vqgan`, `pixels` (grey levels are tokens), or `none`: token ids only.
        grid: rows and columns of tokens.
        weights: workdir of the VQGAN, made by `train_tokenizer` or `convert --kind=vqgan`.
        dtype: of the VQGAN's activations; the reference encodes in float32.
    """

    name: Literal["vqgan", "pixels", "none"] = "none"
    grid: tuple[int, int] = (16, 16)
    weights: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class OptimConfig:
    """ENAT's recipe by default (its section 5.1 and code).

    Attributes:
        learning_rate: after the warm-up, for the config's own batch size.
        warmup_steps: steps of linear warm-up; the first two steps have rate 0, as the reference's.
        decay: `constant`, or `cosine` to 0 at the last step.
        weight_decay: decoupled, on every parameter.
        betas: Adam's averages of gradient and squared gradient.
        epsilon: added to the root of the second moment.
        max_grad_norm: clips the global gradient norm; 0 does not clip.
        ema_decay: of the moving average of parameters, used for features and for sampling.
    """

    learning_rate: float = 4e-4
    warmup_steps: int = 5000
    decay: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.03
    betas: tuple[float, float] = (0.99, 0.99)
    epsilon: float = 1e-8
    max_grad_norm: float = 0.0
    ema_decay: float = 0.9999


@dataclass(frozen=True)
class LoopConfig:
    """What every kind of training run has in its `train` section.

    Attributes:
        seed: of everything random.
        steps: optimiser steps.
        batch_size: images per step, over all devices.
        log_every: steps between two lines of the log.
        sample_every: steps between two pictures; 0 makes none.
        checkpoint_every: steps between two checkpoints.
        keep: newest checkpoints kept.
        max_bad_steps: steps in a row with a loss or a gradient that is not finite, none of them
            applied, after which the run stops.
        profile_steps: first and last step, counted from 1, of a profiler trace that TensorBoard
            shows; (0, 0) traces nothing.
    """

    seed: int = 0
    steps: int = 500_000
    batch_size: int = 2048
    log_every: int = 100
    sample_every: int = 5000
    checkpoint_every: int = 5000
    keep: int = 3
    max_bad_steps: int = 10
    profile_steps: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """A training run; ENAT's recipe by default (its section 5.1).

    Attributes:
        accumulation: microbatches a step's gradient is averaged over.
        images_per_row: images packed into one row, each with its own mask ratio.
        programs: compiled training programs, each with its own plans.
        mask_beta: the mask ratio's Beta distribution.
        reuse_probability: share of images trained with reused features.
        class_dropout: share of images trained without their class. The reference drops 0.15 in
            its data and 0.1 of the rest in the network: 0.235 in all.
        label_smoothing: of the cross-entropy.
        mean_over: `images` takes the mean of every image's mean loss, `tokens` counts every masked
            token of a row alike, as AutoNAT does.
    """

    accumulation: int = 1
    images_per_row: int = 8
    programs: int = 4
    mask_beta: tuple[float, float] = (12.0, 3.0)
    reuse_probability: float = 0.5
    class_dropout: float = 0.235
    label_smoothing: float = 0.1
    mean_over: Literal["images", "tokens"] = "images"


@dataclass(frozen=True)
class SampleConfig:
    """How images are generated.

    Attributes:
        batch_size: images per call, over all devices.
        decode_batch_size: images that a device decodes at a time, because a VQGAN takes more
            memory per image than the network; 0 chooses: 1 on a CPU, 8 elsewhere. Pixels can
            differ by a level between one number and another, not between batch sizes.
        buckets: compiled step bodies; 0 chooses, see `plans.group_into_buckets`.
        max_padding: most extra FLOPs of the automatic choice, as a fraction.
    """

    batch_size: int = 64
    decode_batch_size: int = 0
    buckets: int = 0
    max_padding: float = 0.15


@dataclass(frozen=True)
class EvaluateConfig:
    """How a generator is scored.

    Attributes:
        inception: path of `pt_inception-2015-12-05-6726825d.pth`.
        inception_digest: how the file's SHA-256 begins; another only for weights of one's own.
        reference: path of the real images' statistics (`.npz` with `mu` and `sigma`), such as
            ADM's, U-ViT's, or made by the verb `statistics`.
        num_images: images to make; FID-50k has 50,000.
        protocol: `floats` takes images as they come from the decoder, as the reference does;
            `uint8` rounds them to 256 levels, as everybody does who saves them first; or `both`.
        precision_recall: also where the reference holds features of single images.
        batch_size: images that a device looks at at a time.
        save_every: images between two saves of what was gathered.
    """

    inception: str = ""
    inception_digest: str = "6726825d"
    reference: str = ""
    num_images: int = 50_000
    protocol: Literal["floats", "uint8", "both"] = "both"
    precision_recall: bool = True
    batch_size: int = 16
    save_every: int = 5000


@dataclass(frozen=True)
class Config:
    """One experiment.

    `model.num_classes = 0` and `model.codebook_size = 0` are read from the token records when
    training starts.
    """

    model: NetworkConfig = field(default_factory=ENATConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    images: ImageConfig = field(default_factory=ImageConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, applies overrides (`section.field=value` each), and checks the whole.

    Raises:
        ConfigError: an unreadable file, unknown fields, wrong types or values; all at once.
    """
    return override_config(read_fields(path), overrides)


def override_config(fields: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """A checked config from nested mappings after `section.field=value` overrides.

    Raises:
        ConfigError: unknown fields, wrong types or values; all at once.
    """
    return make_config(Config, fields, check, overrides)


def config_from_dict(fields: Mapping[str, Any]) -> Config:
    """A checked config from nested mappings, as `dataclasses.asdict` or JSON gives them.

    Raises:
        ConfigError: unknown fields, wrong types or values; all at once.
    """
    return make_config(Config, fields, check)


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
        (model.codebook_size != 1 and model.codebook_size < 2**16, "model.codebook_size",
         model.codebook_size, f"must be 0 (read from the records) or from 2 to {2**16 - 1}"),
        (config.tokenizer.name != "pixels" or 2 <= model.codebook_size <= 256,
         "model.codebook_size", model.codebook_size,
         "must be 2 to 256 greys for tokenizer.name = 'pixels'"),
        (config.tokenizer.name != "vqgan" or config.tokenizer.weights != "", "tokenizer.weights",
         repr(config.tokenizer.weights), "must name the workdir of a VQGAN (made by"
         " `train_tokenizer` or `convert --kind=vqgan`) for tokenizer.name = 'vqgan'"),
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
               ("width", "num_heads")},
            "model.length - 1": model.length - 1,
            **{f"train.{name}": getattr(train, name) for name in
               ("accumulation", "images_per_row")},
            "tokenizer.grid[0]": config.tokenizer.grid[0],
            "tokenizer.grid[1]": config.tokenizer.grid[1],
            "data.read_threads": config.data.read_threads,
            "sample.batch_size": config.sample.batch_size,
            "images.shard_size": config.images.shard_size,
            "images.read_threads": config.images.read_threads,
            "evaluate.num_images - 1": config.evaluate.num_images - 1,
            "evaluate.batch_size": config.evaluate.batch_size,
            "evaluate.save_every": config.evaluate.save_every,
        }.items()
    ]  # fmt: skip
    rules += [
        (value >= 0, name, value, "must be at least 0")
        for name, value in {
            "model.num_classes": model.num_classes,
            "model.codebook_size": model.codebook_size,
            "sample.decode_batch_size": config.sample.decode_batch_size,
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
            "images.max_unreadable": config.images.max_unreadable,
            "optim.ema_decay": optim.ema_decay,
            "optim.betas[0]": optim.betas[0],
            "optim.betas[1]": optim.betas[1],
        }.items()
    ]
    rules.append((model.carries_features or train.reuse_probability == 0,
                  "train.reuse_probability", train.reuse_probability,
                  "must be 0 for a network that carries no features"))  # fmt: skip
    rules.append((0 <= train.reuse_probability <= 1, "train.reuse_probability",
                  train.reuse_probability, "must be in [0, 1]"))  # fmt: skip
    problems = [f"{name} = {value} {limit}" for holds, name, value, limit in rules if not holds]
    problems += network_problems(model) + check_loop(train)
    if not problems and config.strategy.rule != "file":  # a file is read where it is used
        try:
            make_strategy(config.strategy, model.length).masked_counts(model.length)
        except ValueError as error:
            problems.append(f"strategy: {error}")
    return problems


def check_loop(train: LoopConfig) -> list[str]:
    """What is wrong with it, one phrase per problem, each with value, limit and field."""
    first, last = train.profile_steps
    rules = [
        (0 <= train.seed < 2**32, "seed", f"must be in [0, {2**32})"),
        (train.sample_every >= 0, "sample_every", "must be at least 0"),
        (first == last == 0 or 1 <= first <= last, "profile_steps",
         "must be the first and the last step, from 1, or (0, 0)"),
    ]  # fmt: skip
    rules += [
        (getattr(train, name) >= 1, name, "must be at least 1")
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep",
                     "max_bad_steps")
    ]  # fmt: skip
    return [
        f"train.{name} = {getattr(train, name)} {limit}" for good, name, limit in rules if not good
    ]
