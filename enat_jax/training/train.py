"""The training run: from a config and a workdir to checkpoints, logs and sample grids."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from enat_jax.checkpoints.resume import resume
from enat_jax.checkpoints.store import Checkpoints
from enat_jax.checkpoints.tokenizer import CHECKPOINTS, load_tokenizer
from enat_jax.config import Config
from enat_jax.config_file import ConfigError
from enat_jax.data.batches import RecordInfo, record_info, training_batches
from enat_jax.data.pictures import image_grid
from enat_jax.data.stream import Share
from enat_jax.parallel import hosts
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.sampler import Sampler
from enat_jax.tokenizers.protocol import Tokenizer
from enat_jax.training.loop import (
    Log,
    Metrics,
    open_workdir,
    require_same_run,
    run_steps,
    write_samples,
)
from enat_jax.training.programs import Run
from enat_jax.training.step import TrainState

_GRID_CLASSES = 10  # a sample grid shows this many classes, so many images each


def train(
    config: Config, workdir: str | os.PathLike[str], *, say: Callable[[str], object] = print
) -> None:
    """Trains, or goes on from the workdir's newest checkpoint; returns when all steps are done.

    Every host calls it, with the same arguments. Told to stop by SIGTERM, it saves and returns.

    Args:
        config: the experiment.
        workdir: holds `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `samples/`; one folder
            that all hosts share.
        say: called with lines for the user, on one host.

    Raises:
        UserError: records or a workdir that do not fit the config, hosts that disagree, too many
            steps in a row that are not finite.
    """
    say = hosts.primary_only(say)
    info = record_info(config.data)
    config = _with_counts(config, info)
    require_same_run(config, workdir, dataclasses.asdict(info))
    _check_records(config, info)
    placement = Placement.of(config.mesh)
    run = Run(config, placement)
    tokenizer = load_tokenizer(config.tokenizer, config.model.codebook_size, placement)
    _check_tokenizer(config, tokenizer, info)
    workdir = open_workdir(workdir)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep=config.train.keep)
    try:
        _train(run, info, tokenizer, workdir, checkpoints, say)
    finally:
        checkpoints.close()


def _train(
    run: Run,
    info: RecordInfo,
    tokenizer: Tokenizer | None,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    say: Callable[[str], object],
) -> None:
    config, cfg, placement = run.config, run.config.train, run.placement
    metadata = {
        "config": dataclasses.asdict(config),
        "class_names": list(info.class_names),
        "tokenizer_digest": info.tokenizer_digest,
    }
    stream = {
        "train.seed": cfg.seed,
        "data.name": config.data.name,
        "data.split": config.data.split,
        "records": info.num_records,
    }
    trees = ("params", "ema", "opt_state")
    found = resume(
        checkpoints,
        {name: getattr(run.abstract, name) for name in trees},
        {name: getattr(run.sharding, name) for name in trees},
        config=metadata["config"],
        sections=("model", "tokenizer"),
        may_differ=("attention", "remat", "dtype", "reproject", "weights"),
        stream=stream,
        say=say,
    )
    start, images = (found.step, found.images) if found else (0, 0)
    if start >= cfg.steps:
        say(f"{workdir} is trained already: {start} of {cfg.steps} steps")
        return
    state = (
        TrainState(step=placement.put(np.int32(start)), **found.trees)
        if found
        else run.initial_state()
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(
        f"training {size / 1e6:.4g}M parameters on {info.num_records} records of"
        f" {config.data.name}, steps {start} to {cfg.steps}, on {placement.mesh.devices.size} x"
        f" {jax.devices()[0].device_kind}"
    )
    share = Share(cfg.batch_size, placement.own_rows(cfg.batch_size), images)
    run_steps(
        _Steps(run, info, tokenizer, workdir),
        state,
        start,
        training_batches(config.data, share, seed=cfg.seed),
        placement.put(jax.random.key(cfg.seed)),
        cfg,
        workdir=workdir,
        checkpoints=checkpoints,
        metadata=metadata,
        position={**stream, "images": images},
        say=say,
    )


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

    def sample(self, done: int, state: TrainState, log: Log) -> None:
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
                placement=self.run.placement,
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
