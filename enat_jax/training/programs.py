"""The compiled programs of a training run, and where their arrays lie."""

import abc
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from enat_jax.checkpoints.caption_reader import CaptionReader
from enat_jax.config import Config
from enat_jax.core.plans import Plan, training_plans
from enat_jax.data.pictures import image_grid
from enat_jax.errors import UserError
from enat_jax.models.captions import condition_shapes
from enat_jax.models.flops import training_flops
from enat_jax.models.networks import make_network
from enat_jax.parallel.accelerators import accelerator_of
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.sampler import Sampler
from enat_jax.tokenizers.protocol import Tokenizer
from enat_jax.training.optim import learning_rate_schedule, make_optimizer
from enat_jax.training.step import TrainState, training_step
from enat_jax.training.strata import Stratum, training_strata

_GRID_CLASSES = 10  # a sample grid shows this many classes, so many images each
Metrics = Mapping[str, jax.Array]
Shown = tuple[UInt8[np.ndarray, "y x 3"], Mapping[str, float]]  # a picture, and its scores


class Programs(abc.ABC):
    """What a kind of network does in a run, compiled.

    Its state is a NamedTuple of `step`, `params` and whatever else a checkpoint holds, trees or
    None. Nothing is allocated before `initial_state()`, so the devices need not be there. In a step
    each has so many `images`, or a multiple. The config has sections `optim` and `train`.

    Attributes:
        abstract: the state's shapes, and where its leaves lie.
        sharding: that alone.
        initial_state: makes it, from the config's seed.

    Raises:
        UserError: a batch that does not divide over the devices.
    """

    def __init__(self, config: Any, placement: Placement, images: int = 1):
        unit, batch_size = placement.batch_shards * images, config.train.batch_size
        if batch_size % unit:
            raise UserError(
                f"config: train.batch_size = {batch_size} must be a multiple of {unit}:"
                f" {placement.batch_shards} devices x {images} images each"
            )
        self.config, self.placement = config, placement
        self.schedule = learning_rate_schedule(config.optim, config.train.steps)
        self.optimizer = make_optimizer(config.optim, self.schedule)
        shapes = jax.eval_shape(self._first_state)
        self.sharding = shapes._replace(**placement.state(shapes._asdict()))
        self.abstract = jax.tree.map(
            lambda leaf, where: leaf.update(sharding=where), shapes, self.sharding
        )
        self.initial_state = jax.jit(self._first_state, out_shardings=self.sharding)

    @abc.abstractmethod
    def _first_state(self) -> Any:
        """The state before the first step."""

    @abc.abstractmethod
    def step(self, step: int, state: Any, batch: Any, key: jax.Array) -> tuple[Any, Metrics]:
        """One step, counted from 0, on this host's rows of a batch.

        Its metrics are `loss`, `grad_norm`, `skipped`, and the network's own.
        """

    @abc.abstractmethod
    def show(self, state: Any) -> Shown | None:
        """A picture of what has been learnt, and its scores; None shows nothing."""

    def summary(self, done: int, images_per_second: float) -> dict[str, float]:
        """What is logged after so many steps besides their metrics: the learning rate."""
        return {"learning_rate": float(self.schedule(done - 1))}


class TrainingPrograms(Programs):
    """The programs of ENAT and AutoNAT, one for each row of strata.

    The config's numbers of classes and codes are known. The tokenizer decodes what a run shows,
    under the names of the classes (by default their numbers), or of some captions; None shows
    nothing. A network of captions needs their reader.

    Raises:
        UserError: a batch or attention heads that do not divide over the mesh.
    """

    def __init__(
        self,
        config: Config,
        placement: Placement,
        tokenizer: Tokenizer | None = None,
        class_names: Sequence[str] = (),
        reader: CaptionReader | None = None,
        captions: Sequence[str] = (),
    ):
        placement.check_attention(config.model)
        cfg = config.train
        super().__init__(config, placement, cfg.images_per_row * cfg.accumulation)
        self._tokenizer, self._class_names = tokenizer, class_names
        self._reader, self._captions = reader, captions
        self._sampler: Sampler | None = None
        self.rows = self._rows()
        step = functools.partial(
            training_step,
            graphdef=nnx.graphdef(nnx.eval_shape(lambda: self._network(placement=placement))),
            optimizer=self.optimizer,
            cfg=cfg,
            ema_decay=config.optim.ema_decay,
            placement=placement,
        )
        batch, replicated = placement.batch, placement.replicated
        self.programs = [
            jax.jit(
                functools.partial(step, row=row),
                in_shardings=(self.sharding, batch, batch, replicated),
                out_shardings=(self.sharding, replicated),
                donate_argnums=0,
            )
            for row in self.rows
        ]

    def _rows(self) -> tuple[tuple[Stratum, ...], ...]:
        model, cfg = self.config.model, self.config.train
        options: dict[str, Any] = {
            "programs": cfg.programs,
            "images_per_row": cfg.images_per_row,
            "mask_beta": cfg.mask_beta,
            "reuse_probability": cfg.reuse_probability,
            "seed": cfg.seed,
        }
        if cfg.strata == "fixed":
            plans = training_plans(model.length, **options)
            return tuple(tuple(Stratum(plan, np.array([plan])) for plan in row) for row in plans)
        options["reuse_plans"] = cfg.reuse_plans
        return training_strata(model.length, lambda plan: training_flops(model, [plan]), **options)

    def _network(self, **placement: Placement) -> Any:
        cfg = self.config
        return make_network(cfg.model, rngs=nnx.Rngs(cfg.train.seed), **placement)

    def _first_state(self) -> TrainState:
        params = nnx.split(self._network(), nnx.Param)[1]
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, ema, self.optimizer.init(params))

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs of training on an image, averaged over the distribution of plans."""
        plans = np.concatenate([stratum.plans for row in self.rows for stratum in row])
        several = [Plan(*plan) for plan in plans[:: max(1, len(plans) // 4096)].tolist()]
        return training_flops(self.config.model, several)

    @property
    def padding(self) -> float:
        """Extra FLOPs of the strata's padding, as a fraction of the exact ones."""
        shapes = [stratum.shape for row in self.rows for stratum in row]
        return training_flops(self.config.model, shapes) / self.flops - 1

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the programs take, by shape and place: state, token ids, conditions, key."""
        images, model, batch = self.config.train.batch_size, self.config.model, self.placement.batch
        tokens = jax.ShapeDtypeStruct((images, model.length), jnp.int32, sharding=batch)
        condition = condition_shapes(model, images, sharding=batch)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return self.abstract, tokens, condition, key.update(sharding=self.placement.replicated)

    def program(self, step: int) -> int:
        """Which program a step runs: every host draws the same, each once in `programs` steps."""
        count = len(self.programs)
        rng = np.random.default_rng([self.config.train.seed, step // count])
        return int(rng.permutation(count)[step % count])

    def step(
        self, step: int, state: TrainState, batch: dict[str, np.ndarray], key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimiser step; the batch holds `token_ids`, and `class_ids` or `caption_ids`."""
        count = self.config.train.batch_size
        given = "class_ids" if self._reader is None else "caption_ids"
        tokens, condition = (
            self.placement.put_batch(batch[name], count) for name in ("token_ids", given)
        )
        if self._reader is not None:
            condition = self._reader.condition(condition)
        return self.programs[self.program(step)](state, tokens, condition, key)

    def summary(self, done: int, images_per_second: float) -> dict[str, float]:
        """The learning rate; the FLOP rate by formula, and its share of the devices' if known."""
        rate = images_per_second * self.flops
        values = super().summary(done, images_per_second) | {"teraflops_per_second": rate / 1e12}
        accelerator = accelerator_of(self.placement.mesh.devices.flat[0].device_kind)
        if accelerator is not None:
            values["mfu"] = rate / (accelerator.flops * self.placement.mesh.devices.size)
        return values

    def show(self, state: TrainState) -> Shown | None:
        """A grid of what the EMA makes of some classes or captions; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        if self._sampler is None:
            self._sampler = Sampler(
                self.config,
                state.ema,
                class_names=self._class_names,
                tokenizer=self._tokenizer,
                placement=self.placement,
                reader=self._reader,
            )
        else:
            self._sampler.update(state.ema)
        if self._reader is not None:
            images = self._sampler.sample(prompts=self._captions)
            return image_grid(images, self._captions, wrap=True), {}
        shown = min(self.config.model.num_classes, _GRID_CLASSES)
        classes = np.repeat(np.arange(shown), _GRID_CLASSES)
        names = [self._sampler.class_names[c] for c in classes]
        return image_grid(self._sampler.sample(classes), names), {}
