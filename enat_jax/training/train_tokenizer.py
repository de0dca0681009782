"""The training run of a VQGAN: from a config and a workdir to checkpoints, logs and pictures."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import PyTree

from enat_jax.checkpoints.resume import resume
from enat_jax.checkpoints.store import Checkpoints
from enat_jax.checkpoints.tokenizer import CHECKPOINTS, abstract_vqgan
from enat_jax.config import TokenizerRunConfig
from enat_jax.config_file import ConfigError
from enat_jax.data.image_batches import Reader, image_batches
from enat_jax.data.image_source import ImageSource, open_images
from enat_jax.data.stream import Share
from enat_jax.evaluation.lpips_weights import load_lpips
from enat_jax.evaluation.reconstructions import HeldOut, read_images
from enat_jax.parallel import hosts
from enat_jax.parallel.placement import Placement
from enat_jax.tokenizers.discriminator import Discriminator
from enat_jax.tokenizers.vqgan import VQGAN
from enat_jax.training.loop import (
    Log,
    Metrics,
    open_workdir,
    require_same_run,
    run_steps,
    write_samples,
)
from enat_jax.training.optim import learning_rate_schedule, make_optimizer
from enat_jax.training.tokenizer_step import (
    Networks,
    TokenizerState,
    codebook_from_images,
    tokenizer_step,
)


def train_tokenizer(
    config: TokenizerRunConfig,
    workdir: str | os.PathLike[str],
    *,
    say: Callable[[str], object] = print,
) -> None:
    """Trains, or goes on from the workdir's newest checkpoint; returns when all steps are done.

    Args:
        config: the run.
        workdir: holds `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `samples/`.
        say: called with lines for the user.

    Raises:
        UserError: images, weights or a workdir that do not fit the config, a loss that is not
            finite.
    """
    say = hosts.primary_only(say)
    source = open_images(config.images)
    require_same_run(config, workdir, {"images": len(source)})
    placement = Placement.of(config.mesh)
    _check_batch(config, placement)
    run = TokenizerRun(config, placement)
    held_out = _held_out(run, source, say)
    workdir = open_workdir(workdir)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, keep=config.train.keep)
    try:
        _train(run, source, held_out, workdir, checkpoints, say)
    finally:
        checkpoints.close()


def _train(
    run: "TokenizerRun",
    source: ImageSource,
    held_out: HeldOut,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    say: Callable[[str], object],
) -> None:
    config, cfg, placement = run.config, run.config.train, run.placement
    metadata = {
        "kind": "vqgan",
        "vqgan": dataclasses.asdict(config.model),
        "config": dataclasses.asdict(config),
    }
    stream = {
        "train.seed": cfg.seed,
        "images.name": config.images.name,
        "images.split": config.images.split,
        "images in all": len(source),
    }
    found = resume(
        checkpoints,
        run.trees(run.abstract),
        run.trees(run.sharding),
        config=metadata["config"],
        sections=("model",),
        may_differ=("dtype",),
        stream=stream,
        say=say,
    )
    start, images = (found.step, found.images) if found else (0, 0)
    if start >= cfg.steps:
        say(f"{workdir} is trained already: {start} of {cfg.steps} steps")
        return
    state = run.state_of(start, found.trees) if found else run.initial_state()
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(
        f"training a VQGAN of {size / 1e6:.4g}M parameters on {source.summary}, steps {start} to"
        f" {cfg.steps}, on {placement.mesh.devices.size} x {jax.devices()[0].device_kind}"
    )
    reader = Reader(
        source,
        size=cfg.image_size,
        random_crops=cfg.random_crops,
        max_unreadable=config.images.max_unreadable,
        warn=say,
    )
    share = Share(cfg.batch_size, placement.own_rows(cfg.batch_size), images)
    threads = config.images.read_threads
    run_steps(
        _Steps(run, held_out, workdir, say),
        state,
        start,
        image_batches(reader, len(source), share, seed=cfg.seed, threads=threads),
        placement.put(jax.random.key(cfg.seed)),
        cfg,
        workdir=workdir,
        checkpoints=checkpoints,
        metadata=metadata,
        position={**stream, "images": images},
        say=say,
    )


class TokenizerRun:
    """The compiled side of a run: its programs, and where their arrays lie."""

    def __init__(self, config: TokenizerRunConfig, placement: Placement):
        self.config, self.placement = config, placement
        self.schedule = learning_rate_schedule(config.optim, config.train.steps)
        self.optimizer = make_optimizer(config.optim, self.schedule)
        rate, betas = config.discriminator.learning_rate, config.discriminator.betas
        self.discriminator_optimizer = optax.adam(rate, *betas)
        self.graphdef, _ = abstract_vqgan(config.model)
        judge = lpips = None
        self.lpips: Any = None
        if config.loss.adversarial:
            judge = nnx.graphdef(nnx.eval_shape(self._discriminator))
        if config.loss.lpips_weights:
            lpips, state = nnx.split(load_lpips(config.loss.lpips_weights))
            self.lpips = placement.put(state)
        self.networks = Networks(self.graphdef, judge, lpips)
        self.abstract = jax.eval_shape(self._state)
        parts = {k: v for k, v in self.abstract._asdict().items() if v is not None}
        self.sharding = self.abstract._replace(**placement.state(parts))
        start = functools.partial(codebook_from_images, graphdef=self.graphdef)
        self.begin_codebook = jax.jit(start, out_shardings=self.sharding, donate_argnums=0)
        # one program for each part of the run: with and without codebook and discriminator
        self.program = functools.cache(self._program)

    def _discriminator(self) -> Discriminator:
        return Discriminator(self.config.discriminator, rngs=nnx.Rngs(self.config.train.seed + 1))

    def _state(self) -> TokenizerState:
        model = VQGAN(self.config.model, rngs=nnx.Rngs(self.config.train.seed))
        params = nnx.split(model, nnx.Param)[1]
        state = TokenizerState(
            step=jnp.int32(0),
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=self.optimizer.init(params),
            idle=jnp.zeros(self.config.model.codebook_size, jnp.int32),
        )
        if not self.config.loss.adversarial:
            return state
        judge = nnx.split(self._discriminator(), nnx.Param)[1]
        return state._replace(
            discriminator=judge, discriminator_opt_state=self.discriminator_optimizer.init(judge)
        )

    def initial_state(self) -> TokenizerState:
        """Fresh parameters from the config's seed."""
        return jax.jit(self._state, out_shardings=self.sharding)()

    def trees(self, state: TokenizerState) -> dict[str, PyTree]:
        """What a checkpoint holds of a state."""
        trees = state._asdict()
        trees["codes"] = {"idle": trees.pop("idle")}
        return {name: tree for name, tree in trees.items() if name != "step" and tree is not None}

    def state_of(self, step: int, trees: dict[str, PyTree]) -> TokenizerState:
        """The state that a checkpoint holds."""
        trees = {**trees, "idle": trees["codes"]["idle"]}
        del trees["codes"]
        return TokenizerState(step=self.placement.put(np.int32(step)), **trees)

    def _program(self, quantised: bool, judged: bool) -> Callable[..., Any]:
        whole = self.placement.replicated
        step = functools.partial(
            tokenizer_step,
            networks=self.networks if judged else self.networks._replace(discriminator=None),
            optimizer=self.optimizer,
            discriminator_optimizer=self.discriminator_optimizer,
            cfg=self.config.loss,
            ema_decay=self.config.optim.ema_decay,
            quantised=quantised,
            placement=self.placement,
        )
        return jax.jit(
            step,
            in_shardings=(self.sharding, self.placement.batch, whole, whole),
            out_shardings=(self.sharding, whole),
            donate_argnums=0,
        )

    def step(
        self, step: int, state: TokenizerState, batch: np.ndarray, key: jax.Array
    ) -> tuple[TokenizerState, Metrics]:
        """One optimiser step on this host's rows of the batch."""
        loss = self.config.loss
        images = self.placement.put_batch(batch, self.config.train.batch_size)
        if step == loss.codebook_start:
            state = self.begin_codebook(state, images, key)
        judged = loss.adversarial > 0 and step >= loss.adversarial_start
        program = self.program(step >= loss.codebook_start, judged)
        return program(state, images, key, self.lpips)

    def summary(self, done: int, images_per_second: float) -> dict[str, float]:
        """The learning rate."""
        return {"learning_rate": float(self.schedule(done - 1))}


class _Steps:
    """A run as the loop sees it."""

    def __init__(
        self,
        run: TokenizerRun,
        held_out: HeldOut,
        workdir: pathlib.Path,
        say: Callable[[str], object],
    ):
        self.run, self.held_out, self.workdir, self.say = run, held_out, workdir, say
        self.summary, self.trees = run.summary, run.trees

    def step(
        self, step: int, state: TokenizerState, batch: np.ndarray, key: jax.Array
    ) -> tuple[TokenizerState, Metrics]:
        """One optimiser step."""
        return self.run.step(step, state, batch, key)

    def sample(self, done: int, state: TokenizerState, log: Log) -> None:
        """Shows what the moving average makes of the held-out images."""
        look = self.held_out(state.ema)
        write_samples(self.workdir, done, look.picture, log)
        name = self.held_out.name
        log.scalars(done, {f"{name}_{score}": value for score, value in look.scores.items()})
        rfid = f", rFID {look.scores['rfid']:.2f}" if "rfid" in look.scores else ""
        self.say(
            f"step {done}: PSNR {look.scores['psnr']:.2f} dB{rfid} on {look.scores['images']:.0f}"
            f" {name.replace('_', '-')} images"
        )


def _held_out(run: TokenizerRun, source: ImageSource, say: Callable[[str], object]) -> HeldOut:
    """The held-out images of a config, training images where it has none."""
    cfg, images = run.config.held_out, run.config.images
    name = "held_out"
    if cfg.folder:
        source = open_images(dataclasses.replace(images, folder=cfg.folder, name=""))
    elif cfg.split:
        source = open_images(dataclasses.replace(images, split=cfg.split))
    else:
        name = "training"
    return HeldOut(
        run.graphdef,
        run.config.model.codebook_size,
        read_images(source, cfg.images, run.config.train.image_size, warn=say),
        run.placement,
        name=name,
        batch_size=cfg.batch_size,
        pictures=cfg.pictures,
        inception=cfg.inception,
    )


def _check_batch(config: TokenizerRunConfig, placement: Placement) -> None:
    shards, batch_size = placement.batch_shards, config.train.batch_size
    if batch_size % shards:
        raise ConfigError(
            f"config: train.batch_size = {batch_size} must be a multiple of the {shards} devices"
        )
