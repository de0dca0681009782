"""The training run of a VQGAN: images in, a workdir out."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from enat_jax.config import TokenizerRunConfig
from enat_jax.data.image_batches import image_batches
from enat_jax.data.images import ImageSource, open_images
from enat_jax.evaluation.lpips_weights import load_lpips
from enat_jax.evaluation.reconstructions import Reconstructions, read_images
from enat_jax.files import Path
from enat_jax.parallel import hosts
from enat_jax.parallel.placement import Placement
from enat_jax.tokenizers.discriminator import Discriminator
from enat_jax.tokenizers.vqgan import VQGAN, abstract_vqgan
from enat_jax.training.loop import training_loop
from enat_jax.training.programs import Programs, Shown
from enat_jax.training.tokenizer_step import (
    Networks,
    TokenizerState,
    codebook_from_images,
    tokenizer_step,
)
from enat_jax.training.workdir import Workdir


def train_tokenizer(
    config: TokenizerRunConfig, workdir: Path, *, log: Callable[[str], object] = print
) -> None:
    """Trains, or goes on from the workdir's newest checkpoint, as `train` does.

    Raises:
        UserError: images, weights or a workdir that do not fit the config, too many steps in a row
            that are not finite.
    """
    log = hosts.primary_only(log)
    source = open_images(config.images)
    run = Workdir(
        workdir,
        config,
        metadata={"kind": "vqgan", "vqgan": dataclasses.asdict(config.model)},
        stream={
            "train.seed": config.train.seed,
            "images.name": config.images.name,
            "images.split": config.images.split,
            "images in all": len(source),
        },
        sections=("model",),
        may_differ=("dtype",),
        log=log,
    )
    placement = Placement.of(config.mesh)
    held_out = _held_out(config, placement, source, log)
    programs = TokenizerPrograms(config, placement, held_out)
    batches = functools.partial(image_batches, source, config=config, warn=log)
    with run:
        training_loop(programs, run, batches, data=source.summary)


class TokenizerPrograms(Programs):
    """The programs of a VQGAN: with and without codebook, with and without discriminator.

    `held_out` are the images that the run shows; None shows nothing.

    Raises:
        UserError: a batch that does not divide over the devices; or as `load_lpips`.
    """

    def __init__(
        self,
        config: TokenizerRunConfig,
        placement: Placement,
        held_out: Reconstructions | None = None,
    ):
        cfg = config.discriminator
        self.discriminator_optimizer = optax.adam(cfg.learning_rate, *cfg.betas)
        super().__init__(config, placement)
        self._held_out, self._lpips = held_out, None
        discriminator = lpips = None
        if config.loss.adversarial:
            discriminator = nnx.graphdef(nnx.eval_shape(self._discriminator))
        if config.loss.lpips_weights:
            lpips, weights = nnx.split(load_lpips(config.loss.lpips_weights))
            self._lpips = placement.put(weights)
        graphdef, _ = abstract_vqgan(config.model)
        begin = functools.partial(codebook_from_images, graphdef=graphdef)
        self._begin_codebook = jax.jit(begin, out_shardings=self.sharding, donate_argnums=0)
        self._step = jax.jit(
            functools.partial(
                tokenizer_step,
                networks=Networks(graphdef, discriminator, lpips),
                optimizer=self.optimizer,
                discriminator_optimizer=self.discriminator_optimizer,
                cfg=config.loss,
                ema_decay=config.optim.ema_decay,
                placement=placement,
            ),
            static_argnums=(4, 5),
            in_shardings=(self.sharding, placement.batch, *2 * [placement.replicated]),
            out_shardings=(self.sharding, placement.replicated),
            donate_argnums=0,
        )

    def _discriminator(self) -> Discriminator:
        return Discriminator(self.config.discriminator, rngs=nnx.Rngs(self.config.train.seed + 1))

    def _first_state(self) -> TokenizerState:
        model = VQGAN(self.config.model, rngs=nnx.Rngs(self.config.train.seed))
        params = nnx.split(model, nnx.Param)[1]
        state = TokenizerState(
            step=jnp.int32(0),
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=self.optimizer.init(params),
            codes={"idle": jnp.zeros(self.config.model.codebook_size, jnp.int32)},
        )
        if not self.config.loss.adversarial:
            return state
        params = nnx.split(self._discriminator(), nnx.Param)[1]
        opt_state = self.discriminator_optimizer.init(params)
        return state._replace(discriminator=params, discriminator_opt_state=opt_state)

    def step(
        self, step: int, state: TokenizerState, batch: np.ndarray, key: jax.Array
    ) -> tuple[TokenizerState, dict[str, jax.Array]]:
        """One optimiser step, on uint8 images; at `codebook_start` the codebook is laid first."""
        loss = self.config.loss
        images = self.placement.put_batch(batch, self.config.train.batch_size)
        if step == loss.codebook_start:
            state = self._begin_codebook(state, images, key)
        adversarial = loss.adversarial > 0 and step >= loss.adversarial_start
        quantised = step >= loss.codebook_start
        return self._step(state, images, key, self._lpips, quantised, adversarial)

    def show(self, state: TokenizerState) -> Shown | None:
        """What the EMA makes of the held-out images."""
        if self._held_out is None:
            return None
        scores, picture = self._held_out(state.ema)
        return picture, {f"{self._held_out.name}_{k}": v for k, v in scores.items()}


def _held_out(
    config: TokenizerRunConfig,
    placement: Placement,
    source: ImageSource,
    log: Callable[[str], object],
) -> Reconstructions:
    """The held-out images of a config, training images where it has none."""
    cfg, name = config.held_out, "held_out"
    if cfg.folder:
        held_out = {"folder": cfg.folder, "name": "", "captions": cfg.captions}
        source = open_images(dataclasses.replace(config.images, **held_out))
    elif cfg.split:
        source = open_images(dataclasses.replace(config.images, split=cfg.split))
    else:
        name = "training"
    return Reconstructions(
        abstract_vqgan(config.model)[0],
        config.model.codebook_size,
        read_images(source, cfg.images, config.train.image_size, warn=log),
        placement,
        name=name,
        batch_size=cfg.batch_size,
        pictures=cfg.pictures,
        inception=cfg.inception,
    )
