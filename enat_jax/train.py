"""The training run: from a config and a workdir to checkpoints, logs and sample grids."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from enat_jax.checkpoint import Checkpoints
from enat_jax.config import Config
from enat_jax.config_file import ConfigError
from enat_jax.data import RecordInfo, record_info, training_batches
from enat_jax.images import image_grid
from enat_jax.metric_log import MetricLog
from enat_jax.models.enat import ENAT
from enat_jax.models.flops import training_flops
from enat_jax.optim import learning_rate_schedule, make_optimizer
from enat_jax.plans import training_plans
from enat_jax.sample import Sampler, abstract_params
from enat_jax.sharding import (
    batch_sharding,
    batch_shards,
    constrain_activations,
    make_mesh,
    place,
    replicated,
)
from enat_jax.tokenizer import CHECKPOINTS, load_tokenizer
from enat_jax.tokenizers.protocol import Tokenizer
from enat_jax.training_loop import (
    Metrics,
    averages,
    open_workdir,
    restore_trees,
    run_steps,
    write_samples,
)
from enat_jax.training_step import StepConfig, TrainState, training_step

_GRID_CLASSES = 10  # a sample grid shows this many classes, so many images each


def train(
    config: Config, workdir: str | os.PathLike[str], *, say: Callable[[str], object] = print
) -> None:
    """Trains, or goes on from the workdir's newest checkpoint; returns when all steps are done.

    Args:
        config: the experiment.
        workdir: holds `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `samples/`.
        say: called with lines for the user.

    Raises:
        UserError: records or a workdir that do not fit the config, a loss that is not finite.
    """
    info = record_info(config.data)
    config = _with_counts(config, info)
    _check_records(config, info)
    mesh = make_mesh(config.mesh)
    _check_batch(config, mesh)
    tokenizer = load_tokenizer(config.tokenizer, config.model.codebook_size, mesh)
    _check_tokenizer(config, tokenizer, info)
    workdir = open_workdir(workdir)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep=config.train.keep)
    try:
        _train(config, info, tokenizer, mesh, workdir, checkpoints, say)
    finally:
        checkpoints.close()


def _train(
    config: Config,
    info: RecordInfo,
    tokenizer: Tokenizer | None,
    mesh: Mesh,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    say: Callable[[str], object],
) -> None:
    cfg = config.train
    metadata = {
        "config": dataclasses.asdict(config),
        "class_names": list(info.class_names),
        "tokenizer_digest": info.tokenizer_digest,
    }
    batches = training_batches(
        config.data,
        batch_size=cfg.batch_size // jax.process_count(),
        seed=cfg.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    run = Run(config, mesh)
    state = _restored(run, checkpoints, batches, metadata, say) or run.initial_state()
    start = int(state.step)
    if start >= cfg.steps:
        say(f"{workdir} is trained already: {start} of {cfg.steps} steps")
        return
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(
        f"training {size / 1e6:.4g}M parameters on {info.num_records} records of"
        f" {config.data.name}, steps {start} to {cfg.steps}, on {mesh.devices.size} x"
        f" {jax.devices()[0].device_kind}"
    )

    run_steps(
        _Steps(run, info, tokenizer, workdir),
        state,
        start,
        batches,
        jax.device_put(jax.random.key(cfg.seed), replicated(mesh)),
        cfg,
        workdir=workdir,
        checkpoints=checkpoints,
        metadata=metadata,
        say=say,
    )


class Run:
    """The compiled side of a run: its programs, and where their arrays lie."""

    def __init__(self, config: Config, mesh: Mesh):
        cfg = config.train
        self.config, self.mesh = config, mesh
        self.schedule = learning_rate_schedule(config.optim, cfg.steps)
        self.optimizer = make_optimizer(config.optim, self.schedule)
        self.plans = training_plans(
            config.model.length,
            programs=cfg.programs,
            images_per_row=cfg.images_per_row,
            mask_beta=cfg.mask_beta,
            reuse_probability=cfg.reuse_probability,
            seed=cfg.seed,
        )
        _, abstract = abstract_params(config.model)
        self.abstract = jax.eval_shape(self._from_params, abstract)
        self.sharding = place(self.abstract, mesh)
        constrain = constrain_activations(mesh)
        graphdef, _ = nnx.split(
            nnx.eval_shape(lambda: ENAT(config.model, rngs=nnx.Rngs(0), constrain=constrain))
        )
        step_cfg = StepConfig(
            class_dropout=cfg.class_dropout,
            label_smoothing=cfg.label_smoothing,
            ema_decay=config.optim.ema_decay,
            accumulation=cfg.accumulation,
        )
        batch, whole = batch_sharding(mesh), replicated(mesh)
        self.programs = [
            jax.jit(
                functools.partial(
                    training_step,
                    graphdef=graphdef,
                    optimizer=self.optimizer,
                    plans=plans,
                    cfg=step_cfg,
                ),
                in_shardings=(self.sharding, batch, batch, whole),
                out_shardings=(self.sharding, whole),
                donate_argnums=0,
            )
            for plans in self.plans
        ]

    def _from_params(self, params: nnx.State) -> TrainState:
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, ema, self.optimizer.init(params))

    def initial_state(self) -> TrainState:
        """Fresh parameters from the config's seed, placed on the mesh."""

        def init() -> TrainState:
            model = ENAT(self.config.model, rngs=nnx.Rngs(self.config.train.seed))
            return self._from_params(nnx.split(model, nnx.Param)[1])

        return jax.jit(init, out_shardings=self.sharding)()

    def program(self, step: int) -> int:
        """Which program a step runs: every host draws the same, each once in `programs` steps."""
        count = len(self.programs)
        rng = np.random.default_rng([self.config.train.seed, step // count])
        return int(rng.permutation(count)[step % count])

    def step(
        self, step: int, state: TrainState, batch: dict[str, np.ndarray], key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimiser step on this process's part of the batch."""
        tokens, classes = (
            jax.make_array_from_process_local_data(batch_sharding(self.mesh), batch[name])
            for name in ("token_ids", "class_ids")
        )
        return self.programs[self.program(step)](state, tokens, classes, key)

    def summary(
        self, done: int, metrics: list[Metrics], seconds: float, waited: float
    ) -> dict[str, float]:
        """Means over the steps since the last line, and how fast they were."""
        cfg = self.config.train
        values = averages(metrics, seconds, waited, images_per_step=cfg.batch_size)
        flops = np.mean([training_flops(self.config.model, plans) for plans in self.plans])
        values["learning_rate"] = float(self.schedule(done - 1))
        values["teraflops_per_second"] = values["images_per_second"] * float(flops) / 1e12
        return values


def _restored(
    run: Run,
    checkpoints: Checkpoints,
    batches: Any,
    metadata: dict[str, Any],
    say: Callable[[str], object],
) -> TrainState | None:
    """The newest state in the workdir, with the data moved to its position."""
    names = ("params", "ema", "opt_state")
    found = restore_trees(
        checkpoints,
        {name: getattr(run.abstract, name) for name in names},
        {name: getattr(run.sharding, name) for name in names},
        batches=batches,
        config=metadata["config"],
        sections=("model", "tokenizer"),
        may_differ=("attention", "remat", "dtype", "weights"),
        say=say,
    )
    if found is None:
        return None
    step, trees = found
    return TrainState(step=jax.device_put(jnp.int32(step), replicated(run.mesh)), **trees)


class _Steps:
    """A run as the loop sees it."""

    def __init__(
        self, run: Run, info: RecordInfo, tokenizer: Tokenizer | None, workdir: pathlib.Path
    ):
        self.run, self.info, self.tokenizer, self.workdir = run, info, tokenizer, workdir
        self.summary = run.summary
        self.sampler: Sampler | None = None

    def step(
        self, step: int, state: TrainState, batch: dict[str, np.ndarray], key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One optimiser step."""
        return self.run.step(step, state, batch, key)

    def trees(self, state: TrainState) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}

    def sample(self, done: int, state: TrainState, log: MetricLog) -> None:
        """Writes a grid of what the moving average generates now."""
        config, info = self.run.config, self.info
        if self.tokenizer is None:
            return
        if self.sampler is None:
            self.sampler = Sampler(
                config,
                state.ema,
                class_names=info.class_names,
                tokenizer=self.tokenizer,
                mesh=self.run.mesh,
            )
        else:
            self.sampler.update(state.ema)
        classes = np.repeat(np.arange(min(info.num_classes, _GRID_CLASSES)), _GRID_CLASSES)
        names = [self.sampler.class_names[c] for c in classes]
        write_samples(self.workdir, done, image_grid(self.sampler.sample(classes), names), log)


def _with_counts(config: Config, info: RecordInfo) -> Config:
    """The config with the numbers of classes and codes that it leaves to the records."""
    model = dataclasses.replace(
        config.model,
        num_classes=config.model.num_classes or info.num_classes,
        codebook_size=config.model.codebook_size or info.codebook_size,
    )
    return dataclasses.replace(config, model=model)


def _check_records(config: Config, info: RecordInfo) -> None:
    """Refuses records that were made with something else than the config says."""
    pairs = {
        "tokenizer.name": (config.tokenizer.name, info.tokenizer),
        "tokenizer.grid": (config.tokenizer.grid, info.grid),
        "model.codebook_size": (config.model.codebook_size, info.codebook_size),
        "model.num_classes": (config.model.num_classes, info.num_classes),
    }
    wrong = [
        f"{name} = {ours}, the records have {theirs}"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs and (name, ours) != ("tokenizer.name", "none")
    ]
    if wrong:
        raise ConfigError(f"config does not fit the records {config.data.name}: {'; '.join(wrong)}")


def _check_tokenizer(config: Config, tokenizer: Tokenizer | None, info: RecordInfo) -> None:
    """Refuses a tokenizer of other weights than the records were made with."""
    if tokenizer is not None and info.tokenizer_digest not in ("", tokenizer.digest):
        raise ConfigError(
            f"config: tokenizer.weights = {config.tokenizer.weights!r} has digest"
            f" {tokenizer.digest[:12]}, the records {config.data.name} were made with"
            f" {info.tokenizer_digest[:12]}"
        )


def _check_batch(config: Config, mesh: Mesh) -> None:
    cfg = config.train
    unit = batch_shards(mesh) * cfg.images_per_row * cfg.accumulation
    if cfg.batch_size % unit:
        raise ConfigError(
            f"config: train.batch_size = {cfg.batch_size} must be a multiple of {unit}:"
            f" {batch_shards(mesh)} devices x {cfg.images_per_row} images a row x"
            f" {cfg.accumulation} microbatches"
        )
