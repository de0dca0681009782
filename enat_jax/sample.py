"""From a checkpoint to pictures: what `enat_jax.load` returns."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree, Shaped, UInt8

from enat_jax.checkpoint import CheckpointError, Checkpoints
from enat_jax.config import Config, config_from_dict
from enat_jax.errors import UserError
from enat_jax.generate import Layout, TracedStrategy, generate, image_noise, plan_generation
from enat_jax.models.enat import ENAT, ENATConfig
from enat_jax.models.flops import generation_flops, step_flops
from enat_jax.plans import padding
from enat_jax.sharding import (
    batch_sharding,
    batch_shards,
    make_mesh,
    map_in_chunks,
    place,
    replicated,
)
from enat_jax.strategy import GenerationStrategy, make_strategy
from enat_jax.tokenizer import CHECKPOINTS, load_tokenizer
from enat_jax.tokenizers.levels import as_uint8
from enat_jax.tokenizers.protocol import Tokenizer

Layers = Literal["auto", "stacked", "unstacked"]
Output = Literal["token_ids", "floats", "uint8"]


class SampleError(UserError):
    """Something asked of a model that it cannot give; one line."""


def abstract_params(cfg: ENATConfig) -> tuple[Any, nnx.State]:
    """The network's structure and the shapes of its parameters, without any memory."""
    return nnx.split(nnx.eval_shape(lambda: ENAT(cfg, rngs=nnx.Rngs(0))), nnx.Param)


class Sampler:
    """A network ready to generate.

    Args:
        config: the experiment's config.
        params: the network's parameters, usually the moving average.
        class_names: names of the classes; their numbers by default.
        tokenizer: turns token ids into images; loaded as the config says by default.
        mesh: devices to generate on; by default as the config says.
        layers: `unstacked` gives every block arrays of its own, so that no step copies a layer's
            weights out of a stack: 1.5 times faster on CPU, but slower to compile. `auto` does
            so on CPU only.
    """

    def __init__(
        self,
        config: Config,
        params: nnx.State,
        *,
        class_names: Sequence[str] | None = None,
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
        layers: Layers = "auto",
    ):
        self.config = config
        self.class_names = list(class_names or map(str, range(config.model.num_classes)))
        self.mesh = mesh or make_mesh(config.mesh)
        self.tokenizer = tokenizer or load_tokenizer(
            config.tokenizer, config.model.codebook_size, self.mesh
        )
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        self.decode_batch_size = config.sample.decode_batch_size or (1 if on_cpu else 8)
        self._unstacked = layers == "unstacked" or (layers == "auto" and on_cpu)
        graphdef = self.update(params)
        self.generate_batch = jax.jit(
            functools.partial(_generate_batch, graphdef, self._images),
            static_argnames=("layout", "output"),
        )

    def update(self, params: nnx.State) -> Any:
        """Takes other parameters of the same network; returns the structure they are used in."""
        graphdef, abstract = abstract_params(self.config.model)
        dtype = jnp.dtype(self.config.model.dtype)
        params = jax.tree_util.tree_map_with_path(  # operands are cast once, not at every step
            lambda path, x: x.astype(dtype) if "kernel" in jax.tree_util.keystr(path) else x, params
        )
        params = jax.device_put(params, place(abstract, self.mesh))
        if self._unstacked:
            graphdef, params = nnx.split(nnx.merge(graphdef, params).unstacked(), nnx.Param)
        self.params = params
        return graphdef

    def strategy(self, **changes: Any) -> GenerationStrategy:
        """The config's strategy, step by step, with some fields changed.

        Raises:
            SampleError: an unknown field or one out of range.
        """
        try:
            return make_strategy(dataclasses.replace(self.config.strategy, **changes))
        except (TypeError, ValueError) as error:
            raise SampleError(str(error)) from error

    def plan(self, **strategy: Any) -> tuple[Layout, TracedStrategy]:
        """What is compiled and what is traced for the config's strategy with some fields changed.

        Raises:
            SampleError: an unknown field or one out of range.
        """
        cfg, by_step = self.config, self.strategy(**strategy)
        try:
            return plan_generation(
                by_step,
                cfg.model.length,
                lambda plan: step_flops(cfg.model, plan),
                buckets=cfg.sample.buckets or None,
                max_padding=cfg.sample.max_padding,
            )
        except ValueError as error:
            raise SampleError(str(error)) from error

    def describe(self, **strategy: Any) -> str:
        """One line on the plan: steps, buckets, FLOPs per image and what padding adds to them."""
        layout, _ = self.plan(**strategy)
        exact, padded = (
            generation_flops(self.config.model, layout.buckets, padded=padded)
            for padded in (False, True)
        )
        extra = padding(layout.buckets, lambda plan: step_flops(self.config.model, plan))
        return (
            f"{layout.steps} steps in {len(layout.buckets)} compiled bodies,"
            f" {padded / 1e9:.4g} GFLOP per image"
            f" ({exact / 1e9:.4g} without padding, which adds {100 * extra:.1f}%)"
        )

    def batches(
        self,
        class_ids: Sequence[int] | np.ndarray,
        *,
        output: Output,
        seed: int = 0,
        first: int = 0,
        **strategy: Any,
    ) -> Iterator[tuple[int, Array]]:
        """Generates on the devices, batch by batch; image i depends on seed, i and its class alone.

        Args:
            class_ids: one class per image, in [0, num_classes]; num_classes is "any class".
            output: token ids `[b n]`, images in [0, 1] as they come from the decoder
                `[b y x 3]`, or those rounded to 256 levels.
            seed: of the noise.
            first: index of the first image to make; those before it were made already.
            strategy: fields of the config's strategy to change, such as `steps`.

        Yields:
            The number of images that count, and the batch: all batches are of one size, the last
            filled up.

        Raises:
            SampleError: no images, a class id out of range, a strategy that cannot be, or images
                asked of a model without a tokenizer.
        """
        if self.tokenizer is None and output != "token_ids":
            raise SampleError("tokenizer.name is 'none': this model gives token ids, not images")
        classes = self._checked(class_ids)
        layout, traced = self.plan(**strategy)
        shards = batch_shards(self.mesh)
        size = min(self.config.sample.batch_size, len(classes))
        size = -(-size // shards) * shards
        by_image, whole = batch_sharding(self.mesh), replicated(self.mesh)
        traced, key = jax.device_put((traced, jax.random.key(seed)), whole)
        decoder = self.tokenizer.params if self.tokenizer and output != "token_ids" else ()
        for start in range(first, len(classes), size):
            ids = np.arange(start, start + size)
            batch = classes[np.minimum(ids, len(classes) - 1)]  # the last one is filled up
            made = self.generate_batch(
                self.params,
                decoder,
                jax.device_put(jnp.asarray(batch), by_image),
                jax.device_put(jnp.asarray(ids, jnp.int32), by_image),
                traced,
                key,
                layout=layout,
                output=output,
            )
            yield min(size, len(classes) - start), made

    def token_batches(
        self, class_ids: Sequence[int] | np.ndarray, *, seed: int = 0, **strategy: Any
    ) -> Iterator[Int[np.ndarray, "b n"]]:
        """Generates token ids, batch by batch; arguments and errors as in `batches`."""
        for count, tokens in self.batches(class_ids, output="token_ids", seed=seed, **strategy):
            yield np.asarray(tokens)[:count]

    def image_batches(
        self, class_ids: Sequence[int] | np.ndarray, *, seed: int = 0, **strategy: Any
    ) -> Iterator[UInt8[np.ndarray, "b y x 3"]]:
        """Generates images, batch by batch; arguments and errors as in `batches`."""
        for count, images in self.batches(class_ids, output="uint8", seed=seed, **strategy):
            yield np.asarray(images)[:count]

    def sample(
        self, class_ids: Sequence[int] | np.ndarray, *, seed: int = 0, **strategy: Any
    ) -> UInt8[np.ndarray, "b y x 3"]:
        """Generates images; arguments and errors as in `batches`."""
        return np.concatenate(list(self.image_batches(class_ids, seed=seed, **strategy)))

    def _images(
        self, decoder: PyTree, token_ids: Int[Array, "b n"], output: Output
    ) -> Shaped[Array, "b y x 3"]:
        """Decodes a batch, a few images of each device at a time."""
        assert self.tokenizer is not None  # `batches` has seen to it
        decode, grid = self.tokenizer.decode, self.config.tokenizer.grid

        def images(ids: Int[Array, "b n"]) -> Shaped[Array, "b y x 3"]:
            floats = decode(decoder, ids, grid)
            return as_uint8(floats) if output == "uint8" else floats

        return map_in_chunks(images, token_ids, self.mesh, self.decode_batch_size)

    def _checked(self, class_ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, " b"]:
        classes = np.asarray(class_ids)
        limit = self.config.model.num_classes
        if classes.ndim != 1 or not classes.size or not np.issubdtype(classes.dtype, np.integer):
            raise SampleError(f"class_ids must be a list of whole numbers, not {class_ids!r}")
        wrong = sorted({int(c) for c in classes if not 0 <= c <= limit})
        if wrong:
            raise SampleError(
                f"class ids {wrong} are out of range: 0 to {limit - 1}, or {limit} for any class"
            )
        return classes.astype(np.int32)


def _generate_batch(
    graphdef: Any,
    to_images: Callable[[PyTree, Array, Output], Array],
    params: nnx.State,
    decoder: PyTree,
    class_ids: Int[Array, " b"],
    image_ids: Int[Array, " b"],
    strategy: TracedStrategy,
    key: jax.Array,
    layout: Layout,
    output: Output,
) -> Array:
    model = nnx.merge(graphdef, params)
    noise = image_noise(key, image_ids, model.cfg.codebook_size)
    token_ids, _ = generate(
        model, class_ids, strategy, noise, layout=layout, null_class_id=model.cfg.null_class_id
    )
    return token_ids if output == "token_ids" else to_images(decoder, token_ids, output)


class Restored(NamedTuple):
    """What a checkpoint holds for sampling."""

    config: Config
    ema: nnx.State
    step: int
    class_names: Sequence[str] | None
    tokenizer_digest: str


def restore(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    overrides: Callable[[dict[str, Any]], Config] = config_from_dict,
    mesh: Mesh | None = None,
    warn: Callable[[str], object] = print,
) -> Restored:
    """Reads a run's moving average; arguments and errors as in `load`."""
    folder = pathlib.Path(path)
    if (folder / CHECKPOINTS).is_dir():
        folder = folder / CHECKPOINTS
    checkpoints = Checkpoints(folder, read_only=True)
    metadata = checkpoints.metadata(step)
    if "config" not in metadata or "vqgan" in metadata:
        raise CheckpointError(f"{folder} holds no checkpoint of an image generator")
    config = overrides(metadata["config"])
    _, abstract = abstract_params(config.model)
    target = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        place(abstract, mesh or make_mesh(config.mesh)),
    )
    found = checkpoints.restore({"ema": target}, step=step, warn=warn)
    assert found is not None  # its metadata were there
    return Restored(
        config=config,
        ema=found[1]["ema"],
        step=found[0],
        class_names=metadata.get("class_names"),
        tokenizer_digest=metadata.get("tokenizer_digest", ""),
    )


def sampler_of(restored: Restored, **options: Any) -> Sampler:
    """A sampler of what `restore` read; options as `Sampler`'s.

    Raises:
        CheckpointError: the tokenizer is not the one whose tokens the model was trained on.
    """
    config, trained_on = restored.config, restored.tokenizer_digest
    sampler = Sampler(config, restored.ema, class_names=restored.class_names, **options)
    if sampler.tokenizer is not None and trained_on not in ("", sampler.tokenizer.digest):
        raise CheckpointError(
            f"tokenizer.weights = {config.tokenizer.weights!r} has digest"
            f" {sampler.tokenizer.digest[:12]}, the model was trained on tokens of"
            f" {trained_on[:12]}"
        )
    return sampler


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    overrides: Callable[[dict[str, Any]], Config] = config_from_dict,
    warn: Callable[[str], object] = print,
    mesh: Mesh | None = None,
    layers: Layers = "auto",
) -> Sampler:
    """Loads a run's moving average.

    Args:
        path: a workdir, or the checkpoints folder in it.
        step: which checkpoint; the newest readable one by default.
        overrides: turns the stored config's fields into the config to use.
        warn: called with one line per damaged checkpoint passed over.
        mesh: as `Sampler`'s.
        layers: as `Sampler`'s.

    Raises:
        CheckpointError: no readable checkpoint there, or one of another model, or the tokenizer
            is not the one whose tokens the model was trained on.
    """
    restored = restore(path, step=step, overrides=overrides, mesh=mesh, warn=warn)
    return sampler_of(restored, mesh=mesh, layers=layers)
