"""The program that makes a batch of images, described by shapes alone."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, PyTree, Shaped

from enat_jax.config import Config
from enat_jax.core.generate import Layout, TracedStrategy, generate, image_noise, plan_generation
from enat_jax.core.strategy import GenerationStrategy
from enat_jax.errors import UserError
from enat_jax.models.captions import condition_shapes
from enat_jax.models.flops import step_flops
from enat_jax.models.layers import cast_kernels
from enat_jax.models.networks import abstract_params, make_network
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.strategy_file import configured_strategy
from enat_jax.tokenizers.protocol import Tokenizer, as_uint8

Layers = Literal["auto", "stacked", "unstacked"]
Output = Literal["token_ids", "floats", "uint8"]
_KEPT = 8  # compiled layouts: each takes tens of megabytes


class GenerationProgram:
    """What a sampler runs, and where everything lies that it is given.

    Nothing is allocated: the devices, of any number of processes, need not be there, and the
    tokenizer's weights may be shapes; there may be no tokenizer where no images are asked for.
    `layers="unstacked"` gives every block arrays of its own, so that no step copies a layer's
    weights out of a stack: 1.5 times faster on CPU, but slower to compile. `auto` does so on CPU
    only.

    Raises:
        UserError: attention heads that do not divide over the mesh.

    Attributes:
        decode: the jitted second half of what `run` does: images of the tokenizer's weights and
            token ids `[b n]`; `output` is given by name.
        stored: shapes of the network's parameters as a checkpoint has them, placed.
        params: the same as `run` takes them, see `prepare`.
        decode_batch_size: images that a device decodes at a time.
    """

    def __init__(
        self,
        config: Config,
        placement: Placement,
        tokenizer: Tokenizer | None,
        *,
        layers: Layers = "auto",
    ):
        placement.check_attention(config.model)
        self.config, self.placement, self.tokenizer = config, placement, tokenizer
        on_cpu = placement.mesh.devices.flat[0].platform == "cpu"
        self.decode_batch_size = config.sample.decode_batch_size or (1 if on_cpu else 8)
        self._unstacked = layers == "unstacked" or (layers == "auto" and on_cpu)
        self.stored = placement.params(abstract_params(config.model)[1])
        self.params = placement.params(jax.eval_shape(self._prepare, self.stored))
        self._graphdef = nnx.graphdef(nnx.eval_shape(self._network))
        by_image = placement.batch
        self._by_layout: dict[tuple[Layout, Output], Any] = {}
        self.decode = jax.jit(self._images, static_argnames="output", out_shardings=by_image)
        self._prepared = jax.jit(
            self._prepare, out_shardings=jax.tree.map(lambda x: x.sharding, self.params)
        )

    def prepare(self, params: nnx.State) -> nnx.State:
        """Parameters as `run` takes them, from ones that every process has or that are placed.

        Operands of matrix products are cast once, not at every step.
        """
        where = jax.tree.map(lambda x: x.sharding, self.stored)
        return self._prepared(self.placement.put(params, where))

    def network(self, params: nnx.State) -> Any:
        """The network of parameters as `prepare` returns them; called within a program."""
        return nnx.merge(self._graphdef, self.placement.weights(params))

    def run(self, *given: Any, layout: Layout, output: Output) -> Array:
        """Makes a batch: token ids or images, split over the devices by image.

        Given are the network's parameters, the tokenizer's, conditions (class ids `[b]`, or
        `Captions`), image ids `[b]`, the strategy's numbers and the key.
        """
        return self.jitted(layout, output)(*given)

    def jitted(self, layout: Layout, output: Output) -> Any:
        """What `run` calls. The layouts used last are kept compiled, earlier ones are let go."""
        program = self._by_layout.pop((layout, output), None)
        if program is None:
            make = functools.partial(self._run, layout=layout, output=output)
            program = jax.jit(make, out_shardings=self.placement.batch)
        self._by_layout[layout, output] = program  # as the last
        if len(self._by_layout) > _KEPT:
            self._by_layout.pop(next(iter(self._by_layout))).clear_cache()
        return program

    def strategy(self, **changes: Any) -> GenerationStrategy:
        """The config's strategy, step by step, with some fields changed.

        Raises:
            UserError: an unknown field or one out of range.
        """
        try:
            changed = dataclasses.replace(self.config.strategy, **changes)
            return configured_strategy(changed, self.config.model.length)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error

    def plan(
        self, by_step: GenerationStrategy | None = None, **strategy: Any
    ) -> tuple[Layout, TracedStrategy]:
        """What is compiled and what is traced of a strategy, by default the config's.

        Raises:
            UserError: an unknown field, one out of range, or a strategy that does not fit the
                network's length.
        """
        cfg = self.config
        reuse = strategy.get("reuse", cfg.strategy.reuse)
        by_step = by_step or self.strategy(**strategy)
        try:
            return plan_generation(
                by_step,
                cfg.model.length,
                lambda plan: step_flops(cfg.model, plan),
                reuse=cfg.model.carries_features and reuse,
                reads_masked=cfg.model.carries_masked_features,
                buckets=cfg.sample.buckets or None,
                max_padding=cfg.sample.max_padding,
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    def batch_size(self, images: int | None = None) -> int:
        """Images in a call, of so many in all: a multiple of what the devices share a batch by."""
        size, shards = self.config.sample.batch_size, self.placement.batch_shards
        return -(-min(size, images or size) // shards) * shards

    def decoder(self, output: Output) -> PyTree:
        """The tokenizer's weights where `output` needs them.

        Raises:
            UserError: images are asked of a model without a tokenizer.
        """
        if output == "token_ids":
            return ()
        if self.tokenizer is None:
            raise UserError("tokenizer.name is 'none': this model gives token ids, not images")
        return self.tokenizer.params

    def lower(self, *, output: Output, batch_size: int | None = None) -> jax.stages.Lowered:
        """The program of a batch of `self.batch_size()` images by default, ready to be compiled."""
        layout, traced = self.plan()
        ids = jax.ShapeDtypeStruct((batch_size or self.batch_size(),), jnp.int32)
        ids = ids.update(sharding=self.placement.batch)
        condition = condition_shapes(self.config.model, ids.shape[0], sharding=self.placement.batch)
        small = (self.decoder(output), traced, jax.eval_shape(lambda: jax.random.key(0)))
        decoder, traced, key = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.placement.replicated),
            small,
        )
        given = (self.params, decoder, condition, ids, traced, key)
        return self.jitted(layout, output).lower(*given)

    def _network(self) -> nnx.Module:
        model = make_network(self.config.model, rngs=nnx.Rngs(0), placement=self.placement)
        return model.unstacked() if self._unstacked else model

    def _prepare(self, params: nnx.State) -> nnx.State:
        params = cast_kernels(params, jnp.dtype(self.config.model.dtype))
        if not self._unstacked:
            return params
        network = nnx.merge(abstract_params(self.config.model)[0], params)
        return nnx.split(network.unstacked(), nnx.Param)[1]

    def _run(
        self,
        params: nnx.State,
        decoder: PyTree,
        condition: PyTree,
        image_ids: Int[Array, " b"],
        strategy: TracedStrategy,
        key: jax.Array,
        *,
        layout: Layout,
        output: Output,
    ) -> Array:
        model = self.network(params)
        noise = image_noise(key, image_ids, model.cfg.codebook_size)
        token_ids, _ = generate(model, condition, strategy, noise, layout=layout)
        return token_ids if output == "token_ids" else self._images(decoder, token_ids, output)

    def _images(
        self, decoder: PyTree, token_ids: Int[Array, "b n"], output: Output
    ) -> Shaped[Array, "b y x 3"]:
        """Decodes a batch, a few images of each device at a time."""
        tokenizer: Any = self.tokenizer

        def images(ids: Int[Array, "b n"]) -> Shaped[Array, "b y x 3"]:
            floats = tokenizer.decode(decoder, ids, self.config.tokenizer.grid)
            return as_uint8(floats) if output == "uint8" else floats

        return self.placement.map_in_chunks(images, token_ids, self.decode_batch_size)
