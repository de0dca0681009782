"""The training run: from a config and a workdir to checkpoints, logs and sample grids."""

import dataclasses
import functools
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from enat_jax.checkpoint import CheckpointError, Checkpoints
from enat_jax.config import Config, ConfigError
from enat_jax.data import RecordInfo, record_info, training_batches
from enat_jax.errors import UserError
from enat_jax.images import image_grid, write_png
from enat_jax.metric_log import MetricLog
from enat_jax.models.enat import ENAT
from enat_jax.models.flops import training_flops
from enat_jax.optim import learning_rate_schedule, make_optimizer
from enat_jax.plans import training_plans
from enat_jax.sample import CHECKPOINTS, Sampler, abstract_params
from enat_jax.sharding import (
    batch_sharding,
    batch_shards,
    constrain_activations,
    make_mesh,
    place,
    replicated,
)
from enat_jax.training_step import StepConfig, TrainState, training_step

_GRID_CLASSES = 10  # a sample grid shows this many classes, so many images each


class TrainError(UserError):
    """A run that cannot go on."""


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
    _check_records(config, info)
    mesh = make_mesh(config.mesh)
    _check_batch(config, mesh)
    workdir = pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"cannot write to workdir {workdir}: {error}") from error
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep=config.train.keep)
    try:
        _train(config, info, mesh, workdir, checkpoints, say)
    finally:
        checkpoints.close()


def _train(
    config: Config,
    info: RecordInfo,
    mesh: Mesh,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    say: Callable[[str], object],
) -> None:
    cfg = config.train
    metadata = {"config": dataclasses.asdict(config), "class_names": list(info.class_names)}
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

    key = jax.device_put(jax.random.key(cfg.seed), replicated(mesh))
    sampler = None
    pending: list[dict[str, jax.Array]] = []  # metrics since the last line of the log
    waited, since = 0.0, time.perf_counter()
    bar = tqdm(total=cfg.steps, initial=start, unit="step", disable=None, dynamic_ncols=True)
    with MetricLog(workdir, start_step=start) as log, bar:
        for step in range(start, cfg.steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            state, metrics = run.step(step, state, batch, key)
            pending.append(metrics)
            if len(pending) > 1:  # one step behind, so that the device never waits
                _stop_if_not_finite(pending[-2], step, checkpoints)
            done = step + 1
            bar.update()
            last = done == cfg.steps
            if done % cfg.log_every == 0 or last:
                _stop_if_not_finite(metrics, done, checkpoints)
                elapsed = time.perf_counter() - since
                values = run.summary(done, pending, elapsed, waited)
                log.scalars(done, values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                if bar.disable:
                    left = elapsed / len(pending) * (cfg.steps - done)
                    say(
                        f"step {done}/{cfg.steps} loss {values['loss']:.4f}"
                        f" {values['images_per_second']:.0f} images/s, {left / 60:.1f} min left"
                    )
                pending, waited, since = [], 0.0, time.perf_counter()
            if cfg.sample_every and (done % cfg.sample_every == 0 or last):
                paused = time.perf_counter()
                sampler = _sampled(sampler, config, info, state, mesh, log, workdir, done)
                since += time.perf_counter() - paused
            if done % cfg.checkpoint_every == 0 or last:
                _stop_if_not_finite(metrics, done, checkpoints)
                trees = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}
                checkpoints.save(done, trees, data=batches, metadata=metadata)
        checkpoints.wait()
    say(f"trained {cfg.steps} steps; the checkpoint is in {workdir / CHECKPOINTS}")


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
        self, done: int, metrics: list[dict[str, jax.Array]], seconds: float, waited: float
    ) -> dict[str, float]:
        """Means over the steps since the last line, and how fast they were."""
        host = jax.device_get(metrics)
        rate = len(metrics) / max(seconds, 1e-9)
        flops = np.mean([training_flops(self.config.model, plans) for plans in self.plans])
        images = rate * self.config.train.batch_size
        return {
            **{name: float(np.mean([each[name] for each in host])) for name in host[0]},
            "learning_rate": float(self.schedule(done - 1)),
            "images_per_second": images,
            "steps_per_second": rate,
            "teraflops_per_second": images * float(flops) / 1e12,
            "data_wait": waited / max(seconds, 1e-9),
        }


def _restored(
    run: Run,
    checkpoints: Checkpoints,
    batches: Any,
    metadata: dict[str, Any],
    say: Callable[[str], object],
) -> TrainState | None:
    """The newest state in the workdir, with the data moved to its position."""
    if not checkpoints.steps():
        return None
    saved, wanted = checkpoints.metadata().get("config", {}), metadata["config"]
    saved = {section: _as_json(fields) for section, fields in saved.items()}
    differences = [
        f"{section}.{name} = {value!r}, there {saved.get(section, {}).get(name)!r}"
        for section in ("model", "tokenizer")
        for name, value in _as_json(wanted[section]).items()
        if saved.get(section, {}).get(name) != value and name not in ("attention", "remat", "dtype")
    ]
    if differences:
        raise CheckpointError(f"the workdir holds another model: {'; '.join(differences)}")
    abstract = {
        name: jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            getattr(run.abstract, name),
            getattr(run.sharding, name),
        )
        for name in ("params", "ema", "opt_state")
    }
    found = checkpoints.restore(abstract, data=batches, warn=say)
    if found is None:
        return None
    step, trees = found
    say(f"resuming from step {step}")
    return TrainState(step=jax.device_put(jnp.int32(step), replicated(run.mesh)), **trees)


def _as_json(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}


def _stop_if_not_finite(metrics: dict[str, jax.Array], step: int, checkpoints: Checkpoints) -> None:
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if math.isfinite(loss) and math.isfinite(norm):
        return
    checkpoints.wait()
    steps = checkpoints.steps()
    kept = f"the last good checkpoint is of step {steps[-1]}" if steps else "nothing was saved yet"
    raise TrainError(f"step {step}: loss {loss}, gradient norm {norm}, not finite; {kept}")


def _sampled(
    sampler: Sampler | None,
    config: Config,
    info: RecordInfo,
    state: TrainState,
    mesh: Mesh,
    log: MetricLog,
    workdir: pathlib.Path,
    step: int,
) -> Sampler | None:
    """Writes a grid of what the moving average generates now."""
    if config.tokenizer.name == "none":
        return None
    if sampler is None:
        sampler = Sampler(config, state.ema, class_names=info.class_names, mesh=mesh)
    else:
        sampler.update(state.ema)
    classes = np.repeat(np.arange(min(info.num_classes, _GRID_CLASSES)), _GRID_CLASSES)
    grid = image_grid(sampler.sample(classes), [sampler.class_names[c] for c in classes])
    folder = workdir / "samples"
    folder.mkdir(exist_ok=True)
    write_png(folder / f"step_{step:07d}.png", grid)
    log.image(step, "samples", grid)
    return sampler


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


def _check_batch(config: Config, mesh: Mesh) -> None:
    cfg = config.train
    unit = batch_shards(mesh) * cfg.images_per_row * cfg.accumulation
    if cfg.batch_size % unit:
        raise ConfigError(
            f"config: train.batch_size = {cfg.batch_size} must be a multiple of {unit}:"
            f" {batch_shards(mesh)} devices x {cfg.images_per_row} images a row x"
            f" {cfg.accumulation} microbatches"
        )
