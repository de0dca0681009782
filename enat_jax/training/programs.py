"""The compiled side of a training run: its programs, and where their arrays lie."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from enat_jax.config import Config
from enat_jax.config_file import ConfigError
from enat_jax.core.plans import training_plans
from enat_jax.models.flops import training_flops
from enat_jax.models.networks import abstract_params, make_network
from enat_jax.parallel.accelerators import accelerator_of
from enat_jax.parallel.placement import Placement
from enat_jax.training.optim import learning_rate_schedule, make_optimizer
from enat_jax.training.step import StepConfig, TrainState, training_step


class Run:
    """A training run's programs, and where their arrays lie.

    Args:
        config: the experiment; its numbers of classes and codes are known.
        placement: on devices that need not be there.

    Raises:
        ConfigError: a batch or attention heads that do not divide over the mesh.
    """

    def __init__(self, config: Config, placement: Placement):
        cfg = config.train
        _check(config, placement)
        self.config, self.placement = config, placement
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
        parts = self.abstract._asdict()
        del parts["step"]
        self.sharding = TrainState(step=cast(Any, placement.replicated), **placement.state(parts))
        graphdef, _ = nnx.split(
            nnx.eval_shape(
                lambda: make_network(config.model, rngs=nnx.Rngs(0), placement=placement)
            )
        )
        step_cfg = StepConfig(
            class_dropout=cfg.class_dropout,
            label_smoothing=cfg.label_smoothing,
            mean_over=cfg.mean_over,
            ema_decay=config.optim.ema_decay,
            accumulation=cfg.accumulation,
        )
        batch, whole = placement.batch, placement.replicated
        self.init = jax.jit(self._initial, out_shardings=self.sharding)
        self.programs = [
            jax.jit(
                functools.partial(
                    training_step,
                    graphdef=graphdef,
                    optimizer=self.optimizer,
                    plans=plans,
                    cfg=step_cfg,
                    placement=placement,
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

    def _initial(self) -> TrainState:
        model = make_network(self.config.model, rngs=nnx.Rngs(self.config.train.seed))
        return self._from_params(nnx.split(model, nnx.Param)[1])

    def initial_state(self) -> TrainState:
        """Fresh parameters from the config's seed, placed on the mesh."""
        return self.init()

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the programs take, by shape and place: state, token ids, class ids, key."""

        def at(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        count, batch = self.config.train.batch_size, self.placement.batch
        key = jax.eval_shape(lambda: jax.random.key(0))
        return (
            jax.tree.map(at, self.abstract, self.sharding),
            jax.ShapeDtypeStruct((count, self.config.model.length), jnp.int32, sharding=batch),
            jax.ShapeDtypeStruct((count,), jnp.int32, sharding=batch),
            at(key, self.placement.replicated),
        )

    def program(self, step: int) -> int:
        """Which program a step runs: every host draws the same, each once in `programs` steps."""
        count = len(self.programs)
        rng = np.random.default_rng([self.config.train.seed, step // count])
        return int(rng.permutation(count)[step % count])

    def step(
        self, step: int, state: TrainState, batch: dict[str, np.ndarray], key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimiser step on this host's rows of the batch."""
        count = self.config.train.batch_size
        tokens, classes = (
            self.placement.put_batch(batch[name], count) for name in ("token_ids", "class_ids")
        )
        return self.programs[self.program(step)](state, tokens, classes, key)

    def summary(self, done: int, images_per_second: float) -> dict[str, float]:
        """The learning rate, and the FLOP rate by formula, as a share of the devices' where known.

        Args:
            done: steps.
            images_per_second: over all devices.
        """
        flops = np.mean([training_flops(self.config.model, plans) for plans in self.plans])
        rate = images_per_second * float(flops)
        values = {
            "learning_rate": float(self.schedule(done - 1)),
            "teraflops_per_second": rate / 1e12,
        }
        accelerator = accelerator_of(self.placement.mesh.devices.flat[0].device_kind)
        if accelerator is not None:
            values["mfu"] = rate / (accelerator.flops * self.placement.mesh.devices.size)
        return values


def images_per_round(config: Config, placement: Placement) -> int:
    """Images of a batch in which every device has one row per microbatch."""
    return placement.batch_shards * config.train.images_per_row * config.train.accumulation


def _check(config: Config, placement: Placement) -> None:
    placement.check_heads(config.model.num_heads)
    cfg, unit = config.train, images_per_round(config, placement)
    if cfg.batch_size % unit:
        raise ConfigError(
            f"config: train.batch_size = {cfg.batch_size} must be a multiple of {unit}:"
            f" {placement.batch_shards} devices x {cfg.images_per_row} images a row x"
            f" {cfg.accumulation} microbatches"
        )
